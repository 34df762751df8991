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
        let declared = number(&block[CHECKSUM]).ok_or("its checksum field is not a number")?;
        let unsigned = checksum(block);
        // Old tars summed signed bytes.
        if declared != unsigned && declared != unsigned - negative(block) {
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

/// Where the checksum stands, which is summed as spaces.
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// Sum of all bytes, taken as unsigned. 32 bits, so that the compiler takes many at once.
fn checksum(block: &Block) -> i64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let spaces = CHECKSUM.len() as u32 * u32::from(b' ');
    i64::from(sum(block) - sum(&block[CHECKSUM]) + spaces)
}

/// By how much the sum of signed bytes is less.
fn negative(block: &Block) -> i64 {
    let count = |bytes: &[u8]| bytes.iter().filter(|byte| **byte > 127).count();
    256 * (count(block) - count(&block[CHECKSUM])) as i64
}

/// A field's text, up to its first NUL.
fn text(field: &[u8]) -> Vec<u8> {
    field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())].to_vec()
}

/// A numeric field: octal with spaces or NULs around it (empty is 0), or base-256 with the top bit set.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    plain_octal(field).or_else(|| any_number(field))
}

/// What nearly every field is: octal digits up to the last byte, which ends them. `None`: to be looked at closely.
fn plain_octal(field: &[u8]) -> Option<i64> {
    let (0 | b' ', digits) = field.split_last()? else { return None };
    if digits.is_empty() || digits.len() > 20 {
        return None;
    }
    let add = |value: i64, digit: &u8| (digit & !7 == b'0').then_some(value << 3 | i64::from(digit & 7));
    digits.iter().try_fold(0, add)
}

fn any_number(field: &[u8]) -> Option<i64> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_quick_way_to_a_number_is_the_careful_one(field in prop::collection::vec(prop::sample::select(&b"01234567 \0\x808"[..]), 0..13)) {
            if let Some(value) = plain_octal(&field) {
                prop_assert_eq!(any_number(&field), Some(value));
            }
        }

        #[test]
        fn checksums_are_sums_of_unsigned_and_of_signed_bytes(bytes in prop::collection::vec(any::<u8>(), BLOCK)) {
            let block: &Block = bytes.as_slice().try_into().unwrap();
            let with_spaces = bytes.iter().enumerate().map(|(i, byte)| if CHECKSUM.contains(&i) { b' ' } else { *byte });
            prop_assert_eq!(checksum(block), with_spaces.clone().map(i64::from).sum::<i64>());
            prop_assert_eq!(checksum(block) - negative(block), with_spaces.map(|byte| i64::from(byte as i8)).sum::<i64>());
        }
    }
}
