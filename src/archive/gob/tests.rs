use super::*;

fn point() -> Vec<u8> {
    // The worked example of Go's own documentation: Point{X: 22, Y: 33}.
    hex::decode("1fff8103010105506f696e7401ff8200010201015801040001015901040000000 7ff82012c014200".replace(' ', ""))
        .unwrap()
}

#[test]
fn gos_documented_example_decodes_and_encodes_to_the_same_bytes() {
    let stream = point();
    let mut decoder = Decoder::new("index", &stream);
    let id = decoder.value().unwrap();
    let plan = decoder.plan(id, "Point", &[("Y", Want::Basic(TypeId::INT), 'y'), ("X", Want::Basic(TypeId::INT), 'x')]);
    let (plan, mut at) = (plan.unwrap(), 0);
    let mut seen = Vec::new();
    while let Some((field, _)) = decoder.field(&plan, &mut at).unwrap() {
        seen.push((field, decoder.int().unwrap()));
    }
    assert_eq!(seen, [('x', 22), ('y', 33)]);

    let mut encoder = Encoder::default();
    encoder.define(TypeId(65), "Point", Define::Struct(&[("X", TypeId::INT), ("Y", TypeId::INT)]));
    encoder.structure(TypeId(65), |fields| {
        fields.int(0, 22);
        fields.int(1, 33);
    });
    assert_eq!(encoder.finish(), stream);
}

#[test]
fn integers_round_trip_at_every_length() {
    for shift in 0..64 {
        for value in [1u64 << shift, (1u64 << shift) - 1, u64::MAX >> shift] {
            let mut writer = Writer::default();
            writer.uint(value);
            writer.int(value as i64);
            writer.int(!(value as i64));
            let mut decoder = Decoder { message: &writer.0, ..Decoder::new("index", &[]) };
            assert_eq!(decoder.uint().unwrap(), value);
            assert_eq!(decoder.int().unwrap(), value as i64);
            assert_eq!(decoder.int().unwrap(), !(value as i64));
            assert_eq!(decoder.left(), 0);
        }
    }
}

#[test]
fn a_field_of_another_type_is_refused_by_name() {
    let stream = point();
    let mut decoder = Decoder::new("index", &stream);
    let id = decoder.value().unwrap();
    let error = decoder.plan(id, "Point", &[("X", Want::Basic(TypeId::STRING), ())]).unwrap_err();
    assert!(error.to_string().contains("Point.X"), "{error}");
}

/// Everything that can be skipped, in one struct, then a field that is wanted.
#[test]
fn what_is_not_wanted_is_skipped_whatever_its_type() {
    let mut encoder = Encoder::default();
    let (outer, list, map, inner, opaque, nothing) =
        (TypeId(65), TypeId(66), TypeId(67), TypeId(68), TypeId(69), TypeId(70));
    encoder.define(
        outer,
        "Outer",
        Define::Struct(&[
            ("Bool", TypeId::BOOL),
            ("Float", TypeId::FLOAT),
            ("Complex", TypeId::COMPLEX),
            ("Bytes", TypeId::BYTES),
            ("List", list),
            ("Map", map),
            ("Inner", inner),
            ("Time", opaque),
            ("Nil", TypeId::INTERFACE),
            ("Any", TypeId::INTERFACE),
            ("Wanted", TypeId::INT),
        ]),
    );
    encoder.define(list, "", Define::Slice(inner));
    encoder.define(map, "", Define::Map(TypeId::STRING, nothing));
    encoder.define(inner, "Inner", Define::Struct(&[("Self", inner), ("N", TypeId::INT)]));
    encoder.define(opaque, "Time", Define::GobEncoder);
    encoder.define(nothing, "", Define::Struct(&[]));
    // The definition of a type that first occurs inside an interface travels inside it.
    let mut concrete = Encoder::default();
    concrete.define(TypeId(71), "Concrete", Define::Struct(&[("N", TypeId::INT)]));
    let concrete = concrete.finish();
    encoder.structure(outer, |fields| {
        fields.uint(0, 1);
        fields.uint(1, 0x3ff0);
        let complex = fields.nested(2);
        complex.uint(300);
        complex.uint(1);
        fields.bytes(3, b"bytes");
        fields.list(4, [0, 1, 2].into_iter(), |writer, n| {
            let mut inner = writer.fields();
            let mut deeper = inner.nested(0).fields();
            deeper.int(1, n);
            deeper.end();
            inner.end();
        });
        fields.list(5, ["a", "b"].into_iter(), |writer, key| {
            writer.bytes(key.as_bytes());
            writer.fields().end();
        });
        fields.nested(6).fields().end();
        fields.bytes(7, &[1; 15]);
        fields.nested(8).bytes(b"");
        let any = fields.nested(9);
        any.bytes(b"main.Concrete");
        any.0.extend_from_slice(&concrete[1..]);
        any.uint(4);
        any.int(71);
        any.uint(3);
        any.0.extend_from_slice(&[1, 2, 0]);
        fields.int(10, -5);
    });
    let stream = encoder.finish();
    let mut decoder = Decoder::new("index", &stream);
    let id = decoder.value().unwrap();
    let plan = decoder.plan(id, "Outer", &[("Wanted", Want::Basic(TypeId::INT), ())]).unwrap();
    let mut at = 0;
    assert!(decoder.field(&plan, &mut at).unwrap().is_some());
    assert_eq!(decoder.int().unwrap(), -5);
    assert!(decoder.field(&plan, &mut at).unwrap().is_none());
    assert!(decoder.types.contains_key(&TypeId(71)), "a type defined inside an interface is known afterwards");
}

#[test]
fn endless_nesting_is_refused() {
    let mut encoder = Encoder::default();
    encoder.define(TypeId(65), "Loop", Define::Slice(TypeId(65)));
    encoder.single(TypeId(65), |writer| (0..1_000_000).for_each(|_| writer.uint(1)));
    let stream = encoder.finish();
    let mut decoder = Decoder::new("index", &stream);
    let id = decoder.value().unwrap();
    assert!(decoder.skip(id).unwrap_err().to_string().contains("nested"));
}

#[test]
fn counts_and_lengths_are_bounded_by_the_bytes_that_are_left() {
    let huge = [0xf8, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    type Read = fn(&mut Decoder<'_>) -> Result<(), ArchiveError>;
    let reads: [Read; 3] = [|d| d.count().map(drop), |d| d.bytes().map(drop), |d| d.skip(TypeId::STRING)];
    for read in reads {
        let mut decoder = Decoder { message: &huge, ..Decoder::new("index", &[]) };
        read(&mut decoder).unwrap_err();
    }
    Decoder::new("index", &huge).value().unwrap_err();
}

#[test]
fn a_type_defined_twice_or_below_the_user_ids_is_refused() {
    for ids in [[65, 65], [66, 2]] {
        let mut encoder = Encoder::default();
        ids.iter().for_each(|&id| encoder.define(TypeId(id), "T", Define::Slice(TypeId::INT)));
        let stream = encoder.finish();
        assert!(Decoder::new("index", &stream).value().unwrap_err().to_string().contains("twice"));
    }
}

#[test]
fn truncated_streams_are_errors_at_every_length() {
    let stream = point();
    for len in 0..stream.len() {
        let mut decoder = Decoder::new("index", &stream[..len]);
        let read = decoder.value().and_then(|id| decoder.skip(id));
        assert!(matches!(read, Err(ArchiveError::Truncated { .. })), "at {len}: {read:?}");
    }
}
