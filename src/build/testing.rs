//! A tar writer for tests: plain entries in one call, and every header field open to abuse.
//!
//! Uses nothing but std, so that integration tests can take it in by path.

#![allow(dead_code, missing_docs)]

/// Magic and version as a header dialect writes them.
pub const USTAR: [u8; 8] = *b"ustar\x0000";
pub const GNU: [u8; 8] = *b"ustar  \0";
pub const V7: [u8; 8] = [0; 8];

/// A header's fields, written as they are.
#[derive(Clone)]
pub struct Header {
    pub name: Vec<u8>,
    pub prefix: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: u8,
    pub mode: u64,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    pub mtime: u64,
    pub major: u64,
    pub minor: u64,
    pub magic: [u8; 8],
}

impl Header {
    pub fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        Self {
            name: name.as_ref().to_vec(),
            prefix: Vec::new(),
            link: Vec::new(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 1_700_000_000,
            major: 0,
            minor: 0,
            magic: USTAR,
        }
    }

    pub fn block(&self) -> [u8; 512] {
        let mut block = [0; 512];
        put(&mut block[0..100], &self.name);
        number(&mut block[100..108], self.mode);
        number(&mut block[108..116], self.uid);
        number(&mut block[116..124], self.gid);
        number(&mut block[124..136], self.size);
        number(&mut block[136..148], self.mtime);
        block[156] = self.kind;
        put(&mut block[157..257], &self.link);
        block[257..265].copy_from_slice(&self.magic);
        if self.magic != V7 {
            number(&mut block[329..337], self.major);
            number(&mut block[337..345], self.minor);
            if !self.prefix.is_empty() {
                put(&mut block[345..500], &self.prefix);
            }
        }
        seal(&mut block);
        block
    }
}

fn put(field: &mut [u8], text: &[u8]) {
    let n = text.len().min(field.len());
    field[..n].copy_from_slice(&text[..n]);
}

/// Octal where it fits, base-256 where it does not.
fn number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let octal = format!("{value:0digits$o}");
    if octal.len() <= digits {
        field[..digits].copy_from_slice(octal.as_bytes());
        return;
    }
    let mut value = value;
    for byte in field.iter_mut().rev() {
        *byte = value as u8;
        value >>= 8;
    }
    field[0] |= 0x80;
}

/// Writes the checksum of a header that was changed by hand.
pub fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// One PAX record with its length.
pub fn record(key: &str, value: impl AsRef<[u8]>) -> Vec<u8> {
    let rest = key.len() + value.as_ref().len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest != length {
        length = length.to_string().len() + rest;
    }
    [format!("{length} {key}=").as_bytes(), value.as_ref(), b"\n"].concat()
}

/// A tar under construction. Every call appends.
#[derive(Clone, Default)]
pub struct Tar {
    pub bytes: Vec<u8>,
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }
    /// A header and its data, padded.
    pub fn raw(mut self, header: &Header, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(&header.block());
        self.data(data)
    }
    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }
    /// A header with data of the right size.
    pub fn with(self, mut header: Header, data: &[u8]) -> Self {
        header.size = data.len() as u64;
        self.raw(&header, data)
    }
    pub fn pax(self, records: &[Vec<u8>]) -> Self {
        self.with(Header::new(b'x', "pax"), &records.concat())
    }
    pub fn file(self, path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        self.with(Header::new(b'0', path), data.as_ref())
    }
    pub fn dir(self, path: impl AsRef<[u8]>) -> Self {
        self.raw(&Header::new(b'5', path), &[])
    }
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        let mut header = Header::new(b'2', path);
        header.link = target.as_ref().to_vec();
        header.mode = 0o777;
        self.raw(&header, &[])
    }
    pub fn hardlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        let mut header = Header::new(b'1', path);
        header.link = target.as_ref().to_vec();
        self.raw(&header, &[])
    }
    /// Two zero blocks, and the bytes.
    pub fn end(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }
}
