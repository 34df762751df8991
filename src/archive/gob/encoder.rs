//! Writing gob streams.

use super::TypeId;

/// A type for [`Encoder::define`].
#[derive(Debug, Clone, Copy)]
pub enum Define<'t> {
    /// A slice.
    Slice(TypeId),
    /// A map: key and element.
    Map(TypeId, TypeId),
    /// A struct: names and types of its fields.
    Struct(&'t [(&'t str, TypeId)]),
    /// A type with a `GobEncode` method.
    GobEncoder,
}

/// Writes a gob stream.
#[derive(Debug, Default)]
pub struct Encoder {
    out: Vec<u8>,
}

impl Encoder {
    /// Defines type `id` (64 or more), called `name`; before any value that holds it.
    pub fn define(&mut self, id: TypeId, name: &str, definition: Define<'_>) {
        let mut body = Writer::default();
        body.int(-id.0);
        let kind = match definition {
            Define::Slice(_) => 1,
            Define::Struct(_) => 2,
            Define::Map(..) => 3,
            Define::GobEncoder => 4,
        };
        let mut wire = body.fields();
        let mut of = wire.nested(kind).fields();
        let mut common = of.nested(0).fields();
        common.bytes(0, name.as_bytes());
        common.int(1, id.0);
        common.end();
        match definition {
            Define::Slice(element) => of.int(1, element.0),
            Define::Map(key, element) => {
                of.int(1, key.0);
                of.int(2, element.0);
            }
            Define::Struct([]) | Define::GobEncoder => {}
            Define::Struct(fields) => {
                let list = of.nested(1);
                list.uint(fields.len() as u64);
                for &(name, id) in fields {
                    let mut field = list.fields();
                    field.bytes(0, name.as_bytes());
                    field.int(1, id.0);
                    field.end();
                }
            }
        }
        of.end();
        wire.end();
        self.message(&body.0);
    }

    /// Writes a struct value of type `id`.
    pub fn structure(&mut self, id: TypeId, write: impl FnOnce(&mut Fields<'_>)) {
        let mut body = Writer::default();
        body.int(id.0);
        let mut fields = body.fields();
        write(&mut fields);
        fields.end();
        self.message(&body.0);
    }

    /// Writes a value of type `id` that is no struct.
    pub fn single(&mut self, id: TypeId, write: impl FnOnce(&mut Writer)) {
        let mut body = Writer::default();
        body.int(id.0);
        body.uint(0);
        write(&mut body);
        self.message(&body.0);
    }

    fn message(&mut self, body: &[u8]) {
        let mut len = Writer::default();
        len.uint(body.len() as u64);
        self.out.extend_from_slice(&len.0);
        self.out.extend_from_slice(body);
    }

    /// The stream.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// Writes values, one after the other.
#[derive(Debug, Default)]
pub struct Writer(pub(super) Vec<u8>);

impl Writer {
    /// An unsigned integer.
    pub fn uint(&mut self, value: u64) {
        if value < 0x80 {
            self.0.push(value as u8);
            return;
        }
        let bytes = value.to_be_bytes();
        let zeros = (value.leading_zeros() / 8) as usize;
        self.0.push((256 - (8 - zeros)) as u8);
        self.0.extend_from_slice(&bytes[zeros..]);
    }

    /// A signed integer.
    pub fn int(&mut self, value: i64) {
        let coded = if value < 0 { ((!value as u64) << 1) | 1 } else { (value as u64) << 1 };
        self.uint(coded);
    }

    /// A string, a `[]byte`, or a value of a type with its own encoding.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.uint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// Starts a struct.
    pub fn fields(&mut self) -> Fields<'_> {
        Fields { writer: self, last: -1 }
    }
}

/// Writes the fields of a struct in ascending order, leaving out zeros; ended by [`Fields::end`].
#[derive(Debug)]
pub struct Fields<'w> {
    writer: &'w mut Writer,
    last: i64,
}

impl Fields<'_> {
    /// Names field `number` (from 0), whatever follows: a nested value, to be written to the result.
    pub fn nested(&mut self, number: i64) -> &mut Writer {
        debug_assert!(number > self.last, "fields go in ascending order");
        self.writer.uint((number - self.last) as u64);
        self.last = number;
        self.writer
    }
    /// A signed integer.
    pub fn int(&mut self, number: i64, value: i64) {
        if value != 0 {
            self.nested(number).int(value);
        }
    }
    /// An unsigned integer; a bool as 0 or 1.
    pub fn uint(&mut self, number: i64, value: u64) {
        if value != 0 {
            self.nested(number).uint(value);
        }
    }
    /// A string or `[]byte`.
    pub fn bytes(&mut self, number: i64, value: &[u8]) {
        if !value.is_empty() {
            self.nested(number).bytes(value);
        }
    }
    /// A list or map of `count` elements, each written by `write`.
    pub fn list<T>(
        &mut self,
        number: i64,
        elements: impl ExactSizeIterator<Item = T>,
        mut write: impl FnMut(&mut Writer, T),
    ) {
        if elements.len() == 0 {
            return;
        }
        let writer = self.nested(number);
        writer.uint(elements.len() as u64);
        for element in elements {
            write(writer, element);
        }
    }
    /// Ends the struct.
    pub fn end(self) {
        self.writer.uint(0);
    }
}
