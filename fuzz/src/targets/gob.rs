//! Any bytes as a gob stream: skipping it ends, within its bounds. And streams that we write, of any types: skipped to the byte.

use arbitrary::{Result, Unstructured};

use super::memory::bounded;
use crate::archive::gob::{Decoder, Define, Encoder, Fields, TypeId, Want, Writer};

pub fn run(input: &[u8]) {
    bounded(input.len(), || {
        let mut d = Decoder::new("fuzzed", input);
        while d.left() > 0 {
            let before = d.left();
            if d.value().and_then(|id| d.skip(id)).is_err() {
                break;
            }
            assert!(d.left() < before, "a value of no bytes");
        }
    });
    let _ = written(&mut Unstructured::new(input));
}

/// First id that a stream may define, and what [`written`] defines from there on.
const FIRST: i64 = 64;
const SENTINEL: TypeId = TypeId(FIRST);
/// How deep values nest: below that they are empty.
const DEPTH: u32 = 8;

#[derive(Debug)]
enum Type {
    Slice(TypeId),
    Map(TypeId, TypeId),
    Struct(Vec<TypeId>),
    Opaque,
}

/// Writes types and a value of one of them that bytes pick, and a value behind it that must be found.
fn written(u: &mut Unstructured<'_>) -> Result<()> {
    let count = u.int_in_range(1..=6)?;
    let id = |u: &mut Unstructured<'_>| -> Result<TypeId> {
        // 1 to 7 are built in; interfaces (8) are left to the bytes.
        Ok(match u.int_in_range(0..=6 + count)? {
            basic @ 0..=6 => TypeId(basic + 1),
            own => TypeId(FIRST + own - 6),
        })
    };
    let mut types = Vec::new();
    for _ in 0..count {
        types.push(match u.int_in_range(0..=4)? {
            0 => Type::Slice(id(u)?),
            1 => Type::Map(id(u)?, id(u)?),
            2 => Type::Opaque,
            _ => Type::Struct((0..u.int_in_range(0..=5)?).map(|_| id(u)).collect::<Result<_>>()?),
        });
    }
    let mut encoder = Encoder::default();
    encoder.define(SENTINEL, "Sentinel", Define::Struct(&[("Text", TypeId::STRING), ("Number", TypeId::INT)]));
    for (at, of) in types.iter().enumerate() {
        let id = TypeId(FIRST + 1 + at as i64);
        match of {
            Type::Slice(element) => encoder.define(id, "slice", Define::Slice(*element)),
            Type::Map(key, element) => encoder.define(id, "map", Define::Map(*key, *element)),
            Type::Opaque => encoder.define(id, "opaque", Define::GobEncoder),
            Type::Struct(fields) => {
                let fields: Vec<_> = fields.iter().map(|id| ("Field", *id)).collect();
                encoder.define(id, "struct", Define::Struct(&fields));
            }
        }
    }
    let top = TypeId(FIRST + u.int_in_range(1..=count)?);
    let mut result = Ok(());
    match &types[(top.0 - FIRST - 1) as usize] {
        Type::Struct(of) => encoder.structure(top, |fields| result = write_fields(u, &types, of, fields, DEPTH)),
        _ => encoder.single(top, |writer| result = write(u, &types, top, writer, DEPTH)),
    }
    result?;
    let number: i64 = u.arbitrary()?;
    encoder.structure(SENTINEL, |fields| {
        fields.bytes(0, b"behind it");
        fields.int(1, number);
    });
    let stream = encoder.finish();
    let mut d = Decoder::new("written", &stream);
    assert_eq!(d.value().expect("a value"), top);
    d.skip(top).expect("it can be skipped");
    let id = d.value().expect("the next value");
    assert_eq!(id, SENTINEL);
    let fields = [("Text", Want::Basic(TypeId::STRING), 't'), ("Number", Want::Basic(TypeId::INT), 'n')];
    let plan = d.plan(id, "Sentinel", &fields).expect("its type");
    let (mut text, mut found, mut at) = (&b""[..], 0, 0);
    while let Some((field, _)) = d.field(&plan, &mut at).expect("its fields") {
        match field {
            't' => text = d.bytes().expect("a text"),
            _ => found = d.int().expect("a number"),
        }
    }
    assert_eq!((text, found, d.left()), (&b"behind it"[..], number, 0));
    Ok(())
}

/// Writes a value of type `id`.
fn write(u: &mut Unstructured<'_>, types: &[Type], id: TypeId, out: &mut Writer, depth: u32) -> Result<()> {
    let count = |u: &mut Unstructured<'_>| u.int_in_range(0..=if depth == 0 { 0 } else { 4 });
    match id {
        TypeId::BOOL | TypeId::UINT | TypeId::FLOAT => out.uint(u.arbitrary()?),
        TypeId::INT => out.int(u.arbitrary()?),
        TypeId::BYTES | TypeId::STRING => out.bytes(u.arbitrary()?),
        TypeId::COMPLEX => {
            out.uint(u.arbitrary()?);
            out.uint(u.arbitrary()?);
        }
        _ => match &types[(id.0 - FIRST - 1) as usize] {
            Type::Opaque => out.bytes(u.arbitrary()?),
            Type::Slice(element) => {
                let count = count(u)?;
                out.uint(count);
                for _ in 0..count {
                    write(u, types, *element, out, depth - 1)?;
                }
            }
            Type::Map(key, element) => {
                let count = count(u)?;
                out.uint(count);
                for _ in 0..count {
                    write(u, types, *key, out, depth - 1)?;
                    write(u, types, *element, out, depth - 1)?;
                }
            }
            Type::Struct(of) => {
                let mut fields = out.fields();
                write_fields(u, types, of, &mut fields, depth)?;
                fields.end();
            }
        },
    }
    Ok(())
}

/// Writes some of a struct's fields.
fn write_fields(
    u: &mut Unstructured<'_>,
    types: &[Type],
    of: &[TypeId],
    fields: &mut Fields<'_>,
    depth: u32,
) -> Result<()> {
    for (number, id) in of.iter().enumerate() {
        if depth > 0 && u.arbitrary()? {
            write(u, types, *id, fields.nested(number as i64), depth - 1)?;
        }
    }
    Ok(())
}
