//! PAX records: `<length> <key>=<value>\n`.

use super::sparse::PaxSparse;
use crate::archive::Timestamp;

/// Linux' `XATTR_NAME_MAX`.
const MAX_XATTR_NAME: usize = 255;
/// Linux' `XATTR_SIZE_MAX`.
const MAX_XATTR_VALUE: usize = 64 << 10;
/// Attributes of one entry: Linux lists at most 64 KiB of names.
const MAX_XATTRS: usize = 1000;

/// The records of one PAX header that mean something here. A record with an empty value is as good as absent.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub mtime: Option<Timestamp>,
    pub atime: Option<Timestamp>,
    pub ctime: Option<Timestamp>,
    /// Sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: PaxSparse,
}

impl Pax {
    /// Reads a header's records.
    pub fn parse(mut rest: &[u8]) -> Result<Self, String> {
        let mut pax = Self::default();
        let mut libarchive = Vec::new();
        while !rest.is_empty() {
            let (key, value, after) = record(rest).ok_or("a PAX record is malformed")?;
            rest = after;
            pax.take(key, value, &mut libarchive).map_err(|detail| format!("PAX {}: {detail}", super::show(key)))?;
        }
        // What GNU tar and Go write wins over bsdtar's own form of the same attribute.
        for (name, value) in libarchive {
            if !pax.xattrs.iter().any(|(n, _)| *n == name) {
                pax.xattrs.push((name, value));
            }
        }
        pax.xattrs.sort();
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8], libarchive: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            return add_xattr(&mut self.xattrs, name.to_vec(), value.to_vec());
        }
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let name = percent_decode(name);
            let value = base64(value).ok_or("not base64")?;
            return add_xattr(libarchive, name, value);
        }
        if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
            return self.sparse.take(key, value);
        }
        if value.is_empty() {
            return Ok(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)? as i64),
            b"gid" => self.gid = Some(decimal(value)? as i64),
            b"mtime" => self.mtime = Some(time(value)?),
            b"atime" => self.atime = Some(time(value)?),
            b"ctime" => self.ctime = Some(time(value)?),
            _ => {}
        }
        Ok(())
    }
}

/// Adds an attribute; a later record of the same name replaces an earlier one. `trusted.overlay.*` is overlayfs' own bookkeeping
/// on the machine that made the layer, never part of an image: shown by a lower layer it would steer a writable volume's overlay.
fn add_xattr(to: &mut Vec<(Vec<u8>, Vec<u8>)>, name: Vec<u8>, value: Vec<u8>) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_XATTR_NAME || name.contains(&0) {
        return Err(format!("an attribute's name must have 1 to {MAX_XATTR_NAME} bytes, none of them NUL"));
    }
    if value.len() > MAX_XATTR_VALUE {
        return Err(format!("the attribute is over {MAX_XATTR_VALUE} bytes"));
    }
    if name.starts_with(b"trusted.overlay.") {
        return Ok(());
    }
    if to.len() >= MAX_XATTRS {
        return Err(format!("the entry has over {MAX_XATTRS} attributes"));
    }
    to.retain(|(n, _)| *n != name);
    to.push((name, value));
    Ok(())
}

/// Key, value and what follows the first record.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(21).position(|b| *b == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space]).ok()?).ok()?;
    let body = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|b| *b == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, &bytes[length..]))
}

/// A decimal number without sign, below 2^63.
pub(super) fn decimal(text: &[u8]) -> Result<u64, String> {
    let bad = || format!("{:?} is not a number below 2^63", super::show(text));
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let value = text.iter().try_fold(0_u64, |v, d| v.checked_mul(10)?.checked_add(u64::from(d - b'0')));
    value.filter(|v| *v <= i64::MAX as u64).ok_or_else(bad)
}

/// `[-]seconds[.fraction]`; digits past the ninth are cut off.
fn time(text: &[u8]) -> Result<Timestamp, String> {
    let (negative, rest) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = rest.splitn(2, |b| *b == b'.');
    let sec = decimal(parts.next().unwrap_or_default())? as i64;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(format!("{:?} is not a time", super::show(text)));
    }
    let nsec = (0..9).fold(0_u32, |n, i| n * 10 + fraction.get(i).map_or(0, |d| u32::from(d - b'0')));
    Ok(match (negative, nsec) {
        (false, _) => Timestamp { sec, nsec },
        (true, 0) => Timestamp { sec: -sec, nsec: 0 },
        (true, _) => Timestamp { sec: -sec - 1, nsec: 1_000_000_000 - nsec },
    })
}

/// Standard base64, with or without padding.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut have) = (0_u32, 0);
    let unpadded = &text[..text.iter().position(|b| *b == b'=').unwrap_or(text.len())];
    if text.len() - unpadded.len() > 2 || unpadded.len() % 4 == 1 {
        return None;
    }
    for byte in unpadded {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        have += 6;
        if have >= 8 {
            have -= 8;
            out.push((bits >> have) as u8);
            bits &= (1 << have) - 1;
        }
    }
    Some(out)
}

/// Undoes `%41`; what is no escape stays.
fn percent_decode(text: &[u8]) -> Vec<u8> {
    let digit = |b: &u8| char::from(*b).to_digit(16).map(|d| d as u8);
    let mut out = Vec::with_capacity(text.len());
    let mut i = 0;
    while let Some(byte) = text.get(i) {
        match (byte, text.get(i + 1).and_then(digit), text.get(i + 2).and_then(digit)) {
            (b'%', Some(high), Some(low)) => {
                out.push(high << 4 | low);
                i += 3;
            }
            _ => {
                out.push(*byte);
                i += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_their_fraction_on_both_sides_of_the_epoch() {
        assert_eq!(time(b"12.5").unwrap(), Timestamp { sec: 12, nsec: 500_000_000 });
        assert_eq!(time(b"-1.25").unwrap(), Timestamp { sec: -2, nsec: 750_000_000 });
        assert_eq!(time(b"7.1234567899").unwrap(), Timestamp { sec: 7, nsec: 123_456_789 });
        assert_eq!(time(b"-3").unwrap(), Timestamp { sec: -3, nsec: 0 });
        assert!(time(b"").is_err() && time(b"1.x").is_err() && time(b"9223372036854775808").is_err());
    }

    #[test]
    fn base64_is_read_with_and_without_padding() {
        assert_eq!(base64(b"AQID").unwrap(), [1, 2, 3]);
        assert_eq!(base64(b"AQI=").unwrap(), base64(b"AQI").unwrap());
        assert_eq!(base64(b"AQ==").unwrap(), [1]);
        assert!(base64(b"A").is_none() && base64(b"A*==").is_none());
    }

    #[test]
    fn records_that_lie_about_their_length_are_refused() {
        for bad in
            [&b"5 a=b\n"[..], b"9 a=b\n", b"6 a=b", b"3 =\n", b"x a=b\n", b"99999999999999999999999 a=b\n", b"0 a=b\n"]
        {
            assert!(Pax::parse(bad).is_err(), "{}", super::super::show(bad));
        }
        assert!(Pax::parse(b"6 a=b\n").is_ok());
    }
}
