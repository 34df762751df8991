//! One 512-byte tar header, in any of its dialects.

use crate::archive::Timestamp;

/// Bytes of a tar block.
pub(super) const BLOCK: usize = 512;
/// A tar block.
pub(super) type Block = [u8; BLOCK];

/// The fields of a header as they stand there.
#[derive(Debug)]
pub(super) struct Raw {
    /// Prefix and name.
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: u8,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub size: u64,
    pub mtime: Timestamp,
    pub atime: Option<Timestamp>,
    pub ctime: Option<Timestamp>,
    pub major: i64,
    pub minor: i64,
}

#[derive(PartialEq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Raw {
    /// Reads a header; checks its checksum.
    pub fn parse(block: &Block) -> Result<Self, String> {
        let declared = number(&block[148..156]).ok_or("its checksum field is not a number")?;
        let (unsigned, signed) = checksums(block);
        // Old tars summed signed bytes.
        if declared != unsigned && declared != signed {
            return Err(format!("its checksum is {declared}, {unsigned} would be right: not a tar, or damaged"));
        }
        let dialect = match (&block[257..263], &block[263..265]) {
            (b"ustar\0", _) if &block[508..512] == b"tar\0" => Dialect::Star,
            (b"ustar\0", _) => Dialect::Ustar,
            (b"ustar ", b" \0") => Dialect::Gnu,
            _ => Dialect::V7,
        };
        let field = |what: &str, range: std::ops::Range<usize>| {
            number(&block[range]).ok_or_else(|| format!("its {what} field is not a number"))
        };
        let time = |sec: i64| Timestamp { sec, nsec: 0 };
        let size = field("size", 124..136)?;
        let size = u64::try_from(size).map_err(|_| format!("its size is {size}"))?;
        let mut raw = Self {
            name: text(&block[0..100]),
            link: text(&block[157..257]),
            kind: block[156],
            mode: field("mode", 100..108)?,
            uid: field("owner", 108..116)?,
            gid: field("group", 116..124)?,
            size,
            mtime: time(field("time", 136..148)?),
            atime: None,
            ctime: None,
            major: 0,
            minor: 0,
        };
        if dialect == Dialect::V7 {
            return Ok(raw);
        }
        raw.major = field("device", 329..337)?;
        raw.minor = field("device", 337..345)?;
        let prefix = match dialect {
            Dialect::Ustar => text(&block[345..500]),
            Dialect::Star => {
                raw.atime = Some(time(field("access time", 476..488)?));
                raw.ctime = Some(time(field("change time", 488..500)?));
                text(&block[345..476])
            }
            _ => {
                let optional = |range: std::ops::Range<usize>| match block[range.start] {
                    0 => Some(None),
                    _ => number(&block[range]).map(|sec| Some(time(sec))),
                };
                match (optional(345..357), optional(357..369)) {
                    (Some(atime), Some(ctime)) => {
                        (raw.atime, raw.ctime) = (atime, ctime);
                        Vec::new()
                    }
                    // Go before 1.8 wrote a ustar prefix into GNU headers.
                    _ => Some(text(&block[345..500])).filter(|p| p.is_ascii()).unwrap_or_default(),
                }
            }
        };
        if !prefix.is_empty() {
            raw.name = [&prefix[..], b"/", &raw.name].concat();
        }
        Ok(raw)
    }
}

/// Sums of all bytes, unsigned and signed, the checksum field taken as spaces.
fn checksums(block: &Block) -> (i64, i64) {
    let mut sums = (0, 0);
    for (i, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&i) { b' ' } else { *byte };
        sums.0 += i64::from(byte);
        sums.1 += i64::from(byte as i8);
    }
    sums
}

/// A field's text, up to its first NUL.
fn text(field: &[u8]) -> Vec<u8> {
    field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())].to_vec()
}

/// A numeric field: octal with spaces or NULs around it (empty is 0), or base-256 with the top bit set.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let flip = if negative { 0xff } else { 0 };
        let mut value: u64 = 0;
        for (i, byte) in field.iter().enumerate() {
            let byte = (byte ^ flip) & if i == 0 { 0x7f } else { 0xff };
            if value >> 55 != 0 {
                return None;
            }
            value = value << 8 | u64::from(byte);
        }
        let value = i64::try_from(value).ok()?;
        return Some(if negative { !value } else { value });
    }
    let blank = |b: &u8| matches!(b, b' ' | 0);
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    if !digits[end..].iter().all(blank) {
        // Go takes what stands before the first NUL, and so do we; after a space there must be nothing more.
        let rest = &digits[end..];
        let nul = rest.iter().position(|b| *b == 0)?;
        if !rest[..nul].iter().all(|b| *b == b' ') {
            return None;
        }
    }
    digits[..end].iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

/// Linux' 32-bit `dev_t`: 12 bits of major number, 20 of minor, packed as `makedev` does.
pub(in super::super) fn device(major: i64, minor: i64) -> Result<u32, String> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => {
            Ok((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
        }
        _ => Err(format!("device {major}:{minor} is beyond what Linux numbers")),
    }
}
