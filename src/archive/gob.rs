//! Go's `encoding/gob`, as far as CLIP needs it.
//!
//! A stream defines its own types before it uses them. [`Decoder`] reads by those definitions: a caller plans a struct
//! once ([`Decoder::plan`], fields matched by name), then walks its fields; whatever it did not ask for is skipped,
//! interfaces and types with their own encoding included. Nothing is trusted: every count and length is bounded by the
//! bytes that are left (each value takes at least one), recursion by [`MAX_DEPTH`]; the decoder itself allocates
//! for type definitions only.
//!
//! [`Encoder`] writes what Go accepts: definitions first, one message each, zero fields left out.

mod encoder;

use std::collections::HashMap;
use std::rc::Rc;

pub use encoder::{Define, Encoder, Fields, Writer};

use super::ArchiveError;

/// Deepest nesting that is skipped. What CLIP uses nests 5 deep.
pub const MAX_DEPTH: u32 = 64;

/// First type id that a stream may define; those below are built in.
const FIRST_USER_ID: i64 = 64;

/// The id of a type: built in, or defined by the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TypeId(pub i64);

impl TypeId {
    /// `bool`.
    pub const BOOL: Self = Self(1);
    /// Every signed integer.
    pub const INT: Self = Self(2);
    /// Every unsigned integer.
    pub const UINT: Self = Self(3);
    /// `float64`, `float32`.
    pub const FLOAT: Self = Self(4);
    /// `[]byte`.
    pub const BYTES: Self = Self(5);
    /// `string`.
    pub const STRING: Self = Self(6);
    /// `complex128`, `complex64`.
    pub const COMPLEX: Self = Self(7);
    /// Any interface.
    pub const INTERFACE: Self = Self(8);
}

/// What a stream says of one of its types.
#[derive(Debug)]
enum Type<'a> {
    Slice(TypeId),
    Array(TypeId, u64),
    Map(TypeId, TypeId),
    Struct(Vec<(&'a [u8], TypeId)>),
    /// Encoded by its own method (`time.Time`): a run of bytes to us.
    Opaque,
}

/// The shape that a reader wants a field to have. Go refuses a field of another one; so do we.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// One of the built-in types.
    Basic(TypeId),
    /// A slice or an array.
    List,
    /// A map.
    Map,
    /// A struct (pointers to one are the same).
    Struct,
    /// A type with its own encoding.
    Opaque,
}

/// How to read one struct type of a stream: for each of its fields the reader's name, if it wants the field.
#[derive(Debug)]
pub struct Plan<F>(Vec<(Option<F>, TypeId)>);

impl<F: Copy> Plan<F> {
    /// The stream's type of the field `f`, as far as `same` says so.
    pub fn type_of(&self, same: impl Fn(F) -> bool) -> Option<TypeId> {
        self.0.iter().find(|(field, _)| field.is_some_and(&same)).map(|&(_, id)| id)
    }
}

/// Reads a gob stream.
#[derive(Debug)]
pub struct Decoder<'a> {
    what: &'static str,
    /// What is left of the current message.
    message: &'a [u8],
    /// What follows it.
    rest: &'a [u8],
    types: HashMap<TypeId, Rc<Type<'a>>>,
}

impl<'a> Decoder<'a> {
    /// `what` names the stream in errors: "index", "storage info".
    pub fn new(what: &'static str, stream: &'a [u8]) -> Self {
        Self { what, message: &[], rest: stream, types: HashMap::new() }
    }

    /// An error that says where the decoder is.
    #[cold]
    pub fn corrupt(&self, detail: impl Into<String>) -> ArchiveError {
        ArchiveError::Corrupt { what: self.what, detail: detail.into() }
    }

    #[cold]
    fn truncated(&self, need: u64) -> ArchiveError {
        ArchiveError::Truncated { what: self.what, need, have: self.message.len() as u64 }
    }

    /// Bytes left in the stream.
    pub fn left(&self) -> usize {
        self.message.len() + self.rest.len()
    }

    /// Goes to the next value and gives its type. Type definitions before it are taken in.
    pub fn value(&mut self) -> Result<TypeId, ArchiveError> {
        loop {
            self.next_message()?;
            let id = self.int()?;
            if id >= 0 {
                self.enter(TypeId(id))?;
                return Ok(TypeId(id));
            }
            self.define(id)?;
        }
    }

    fn next_message(&mut self) -> Result<(), ArchiveError> {
        self.message = self.rest;
        let len = self.uint()?;
        let split = usize::try_from(len).ok().and_then(|len| self.message.split_at_checked(len));
        (self.message, self.rest) = split.ok_or_else(|| self.truncated(len))?;
        Ok(())
    }

    /// A value of its own that is no struct goes as the only field, number 0, of a struct that has no definition.
    fn enter(&mut self, id: TypeId) -> Result<(), ArchiveError> {
        if !self.is(id, Want::Struct) && self.uint()? != 0 {
            return Err(self.corrupt("a value that is no struct does not start with a zero byte"));
        }
        Ok(())
    }

    /// An unsigned integer.
    #[inline]
    pub fn uint(&mut self) -> Result<u64, ArchiveError> {
        match *self.message {
            [first, ref rest @ ..] if first < 0x80 => {
                self.message = rest;
                Ok(first.into())
            }
            [first, ref rest @ ..] => {
                let len = 256 - usize::from(first);
                if len > 8 {
                    return Err(self.corrupt(format!("an integer of {len} bytes")));
                }
                let Some((bytes, rest)) = rest.split_at_checked(len) else {
                    return Err(self.truncated(len as u64 + 1));
                };
                self.message = rest;
                Ok(bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
            }
            [] => Err(self.truncated(1)),
        }
    }

    /// An unsigned integer that fits in 32 bits.
    #[inline]
    pub fn uint32(&mut self) -> Result<u32, ArchiveError> {
        let value = self.uint()?;
        u32::try_from(value).map_err(|_| self.corrupt(format!("{value} where 32 bits are expected")))
    }

    /// A signed integer.
    #[inline]
    pub fn int(&mut self) -> Result<i64, ArchiveError> {
        let coded = self.uint()?;
        let value = (coded >> 1) as i64;
        Ok(if coded & 1 != 0 { !value } else { value })
    }

    /// A bool.
    pub fn bool(&mut self) -> Result<bool, ArchiveError> {
        Ok(self.uint()? != 0)
    }

    /// A string or a `[]byte`, borrowed from the stream.
    #[inline]
    pub fn bytes(&mut self) -> Result<&'a [u8], ArchiveError> {
        let len = self.uint()?;
        let split = usize::try_from(len).ok().and_then(|len| self.message.split_at_checked(len));
        let Some((bytes, rest)) = split else {
            return Err(self.truncated(len));
        };
        self.message = rest;
        Ok(bytes)
    }

    /// A string that must be text.
    pub fn string(&mut self) -> Result<String, ArchiveError> {
        let bytes = self.bytes()?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.into()),
            Err(_) => Err(self.corrupt(format!("{} is not UTF-8", super::builder::show(bytes)))),
        }
    }

    /// The number of elements of a list or map: never more than bytes are left, as each takes at least one.
    pub fn count(&mut self) -> Result<usize, ArchiveError> {
        let count = self.uint()?;
        // A value goes on in the next message where an interface in it brings a new type.
        let left = self.left();
        if count > left as u64 {
            return Err(self.corrupt(format!("{count} elements in {left} bytes")));
        }
        Ok(count as usize)
    }

    fn of(&self, id: TypeId) -> Result<Rc<Type<'a>>, ArchiveError> {
        self.types.get(&id).cloned().ok_or_else(|| self.corrupt(format!("type {} is not defined", id.0)))
    }

    /// The type of the elements of a list.
    pub fn element(&self, list: TypeId) -> Result<TypeId, ArchiveError> {
        match *self.of(list)? {
            Type::Slice(element) | Type::Array(element, _) => Ok(element),
            _ => Err(self.corrupt("a value is no list")),
        }
    }

    /// The types of a map's keys and elements.
    pub fn key_and_element(&self, map: TypeId) -> Result<(TypeId, TypeId), ArchiveError> {
        match *self.of(map)? {
            Type::Map(key, element) => Ok((key, element)),
            _ => Err(self.corrupt("a value is no map")),
        }
    }

    /// Whether a value of type `id` has the shape `want`.
    pub fn is(&self, id: TypeId, want: Want) -> bool {
        match (self.types.get(&id).map(Rc::as_ref), want) {
            (_, Want::Basic(basic)) => id == basic,
            (Some(Type::Slice(_) | Type::Array(..)), Want::List) => true,
            (Some(Type::Map(..)), Want::Map) => true,
            (Some(Type::Struct(_)), Want::Struct) => true,
            (Some(Type::Opaque), Want::Opaque) => true,
            _ => false,
        }
    }

    /// Refuses a value of another shape. `name` is for the error.
    pub fn expect(&self, id: TypeId, want: Want, name: &str) -> Result<(), ArchiveError> {
        if self.is(id, want) { Ok(()) } else { Err(self.corrupt(format!("{name} is of another type than CLIP's"))) }
    }

    /// Matches the fields of the struct type `id` by name. `name` is for errors.
    pub fn plan<F: Copy>(&self, id: TypeId, name: &str, fields: &[(&str, Want, F)]) -> Result<Plan<F>, ArchiveError> {
        let of = self.of(id)?;
        let Type::Struct(theirs) = &*of else {
            return Err(self.corrupt(format!("{name} is not a struct")));
        };
        let matched = theirs.iter().map(|&(field, id)| {
            let Some(&(ours, want, slot)) = fields.iter().find(|(ours, ..)| ours.as_bytes() == field) else {
                return Ok((None, id));
            };
            self.expect(id, want, &format!("{name}.{ours}"))?;
            Ok((Some(slot), id))
        });
        matched.collect::<Result<_, _>>().map(Plan)
    }

    /// The next field of a struct that the plan wants, and its type; `None` at the struct's end. `at` starts at 0 for each struct.
    #[inline]
    pub fn field<F: Copy>(&mut self, plan: &Plan<F>, at: &mut usize) -> Result<Option<(F, TypeId)>, ArchiveError> {
        loop {
            let delta = self.uint()?;
            if delta == 0 {
                return Ok(None);
            }
            let next = usize::try_from(delta).ok().and_then(|delta| at.checked_add(delta));
            let Some((next, &(slot, id))) = next.and_then(|next| Some((next, plan.0.get(next - 1)?))) else {
                return Err(self.corrupt("a field number that its struct does not have"));
            };
            *at = next;
            match slot {
                Some(slot) => return Ok(Some((slot, id))),
                None => self.skip(id)?,
            }
        }
    }

    /// Skips a value of type `id`.
    pub fn skip(&mut self, id: TypeId) -> Result<(), ArchiveError> {
        self.skip_at(id, MAX_DEPTH)
    }

    fn skip_at(&mut self, id: TypeId, depth: u32) -> Result<(), ArchiveError> {
        match id {
            TypeId::BOOL | TypeId::INT | TypeId::UINT | TypeId::FLOAT => return self.uint().map(drop),
            TypeId::BYTES | TypeId::STRING => return self.bytes().map(drop),
            TypeId::COMPLEX => {
                self.uint()?;
                return self.uint().map(drop);
            }
            TypeId::INTERFACE => return self.skip_interface(depth),
            _ => {}
        }
        let Some(depth) = depth.checked_sub(1) else {
            return Err(self.corrupt(format!("values nested deeper than {MAX_DEPTH}")));
        };
        match &*self.of(id)? {
            Type::Opaque => self.bytes().map(drop),
            &Type::Array(element, len) => {
                let count = self.count()?;
                if count as u64 != len {
                    return Err(self.corrupt(format!("an array of {len} has {count} elements")));
                }
                (0..count).try_for_each(|_| self.skip_at(element, depth))
            }
            &Type::Slice(element) => {
                let count = self.count()?;
                (0..count).try_for_each(|_| self.skip_at(element, depth))
            }
            &Type::Map(key, element) => {
                let count = self.count()?;
                (0..count).try_for_each(|_| {
                    self.skip_at(key, depth)?;
                    self.skip_at(element, depth)
                })
            }
            Type::Struct(fields) => {
                let mut at = 0usize;
                loop {
                    let delta = self.uint()?;
                    if delta == 0 {
                        return Ok(());
                    }
                    let next = usize::try_from(delta).ok().and_then(|delta| at.checked_add(delta));
                    let Some((next, &(_, id))) = next.and_then(|next| Some((next, fields.get(next - 1)?))) else {
                        return Err(self.corrupt("a field number that its struct does not have"));
                    };
                    at = next;
                    self.skip_at(id, depth)?;
                }
            }
        }
    }

    /// An interface value: the name of its concrete type, the definitions that the stream has not had yet, the type's id,
    /// and the value, preceded by its length. The length is of no use: Go counts only up to the first type that the value
    /// itself brings. After a definition Go starts a new message, or, within another interface, a new length.
    fn skip_interface(&mut self, depth: u32) -> Result<(), ArchiveError> {
        let Some(depth) = depth.checked_sub(1) else {
            return Err(self.corrupt(format!("values nested deeper than {MAX_DEPTH}")));
        };
        if self.bytes()?.is_empty() {
            return Ok(());
        }
        loop {
            let id = self.int()?;
            if id >= 0 {
                self.uint()?;
                self.enter(TypeId(id))?;
                return self.skip_at(TypeId(id), depth);
            }
            self.define(id)?;
            if self.message.is_empty() {
                self.next_message()?;
            } else {
                self.uint()?;
            }
        }
    }

    /// Takes in the definition of type `-negated`.
    fn define(&mut self, negated: i64) -> Result<(), ArchiveError> {
        let id = TypeId(negated.checked_neg().unwrap_or(0));
        if id.0 < FIRST_USER_ID || self.types.contains_key(&id) {
            return Err(self.corrupt(format!("type {} is defined twice", id.0)));
        }
        let mut defined = None;
        let mut at = 0;
        loop {
            match self.step(&mut at)? {
                0 => break,
                kind => defined = Some(self.definition(kind)?),
            }
        }
        let Some(defined) = defined else {
            return Err(self.corrupt(format!("the definition of type {} is empty", id.0)));
        };
        self.types.insert(id, Rc::new(defined));
        Ok(())
    }

    /// The number, from 1, of the next field of a built-in struct; 0 at its end.
    fn step(&mut self, at: &mut u64) -> Result<u64, ArchiveError> {
        let delta = self.uint()?;
        if delta == 0 {
            return Ok(0);
        }
        *at = at.saturating_add(delta);
        Ok(*at)
    }

    /// One field of Go's `wireType`: 1 array, 2 slice, 3 struct, 4 map, 5 to 7 types with their own encoding.
    fn definition(&mut self, kind: u64) -> Result<Type<'a>, ArchiveError> {
        let (mut element, mut key, mut len) = (TypeId(0), TypeId(0), 0);
        let mut fields = Vec::new();
        let mut at = 0;
        loop {
            match (kind, self.step(&mut at)?) {
                (_, 0) => break,
                (_, 1) => self.named().map(drop)?,
                (1 | 2, 2) | (4, 3) => element = TypeId(self.int()?),
                (1, 3) => len = self.int()?,
                (4, 2) => key = TypeId(self.int()?),
                (3, 2) => {
                    let count = self.count()?;
                    for _ in 0..count {
                        fields.push(self.named()?);
                    }
                }
                _ => return Err(self.corrupt("a type definition with an unknown part")),
            }
        }
        Ok(match kind {
            1 => Type::Array(element, u64::try_from(len).map_err(|_| self.corrupt("an array of negative length"))?),
            2 => Type::Slice(element),
            3 => Type::Struct(fields),
            4 => Type::Map(key, element),
            5..=7 => Type::Opaque,
            _ => return Err(self.corrupt("a type definition of an unknown kind")),
        })
    }

    /// A struct of a name and an id: `CommonType`, `fieldType`.
    fn named(&mut self) -> Result<(&'a [u8], TypeId), ArchiveError> {
        let (mut name, mut id): (&[u8], _) = (&[], TypeId(0));
        let mut at = 0;
        loop {
            match self.step(&mut at)? {
                0 => return Ok((name, id)),
                1 => name = self.bytes()?,
                2 => id = TypeId(self.int()?),
                _ => return Err(self.corrupt("a type definition with an unknown part")),
            }
        }
    }
}

#[cfg(test)]
mod tests;
