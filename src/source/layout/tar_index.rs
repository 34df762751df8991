//! Where the entries of an uncompressed tar lie: its headers are walked once, its data is never read.

use std::collections::HashMap;

use super::super::SourceError;
use super::super::local::LocalFile;
use super::BlobSource;

/// Bytes of a tar block.
const BLOCK: u64 = 512;
/// Entries that a layout may have: far above any image, far below what could fill memory.
const MAX_ENTRIES: usize = 100_000;
/// Longest extended header (long name, PAX records) that is read, in bytes.
const MAX_EXTENDED: u64 = 1 << 20;

/// Name of each regular file -> position and length of its data in the tar.
#[derive(Debug, Default)]
pub(super) struct TarIndex(HashMap<String, (u64, u64)>);

impl TarIndex {
    pub(super) fn get(&self, name: &str) -> Option<(u64, u64)> {
        self.0.get(name).copied()
    }

    /// Walks the headers. Blocks: one read of 512 bytes per entry.
    pub(super) fn read(file: &LocalFile) -> Result<Self, SourceError> {
        let what = file.describe();
        let invalid = |detail: &str| SourceError::Invalid { what: what.clone(), detail: detail.into() };
        let corrupt = |detail: String| SourceError::Corrupt { what: what.clone(), detail };
        let start = file.read_blocking(0..file.size().min(4))?;
        if start.starts_with(&[0x1f, 0x8b]) || start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            return Err(invalid(
                "is compressed, so its blobs can't be read by range; decompress it first (gunzip, zstd -d)",
            ));
        }
        let mut entries = HashMap::new();
        let (mut pos, mut long_name, mut long_size) = (0u64, None, None);
        while pos + BLOCK <= file.size() {
            let block = file.read_blocking(pos..pos + BLOCK)?;
            let Some(header) = Header::parse(&block).map_err(|e| corrupt(format!("tar header at byte {pos}: {e}")))?
            else {
                break;
            };
            let data = pos + BLOCK;
            let size = long_size.take().filter(|_| header.is_file()).unwrap_or(header.size);
            let end = data.checked_add(size).filter(|end| *end <= file.size());
            let Some(end) = end else {
                return Err(corrupt(format!("the tar entry at byte {pos} ends after the file; is it truncated?")));
            };
            match header.kind {
                b'L' | b'x' if size > MAX_EXTENDED => {
                    return Err(corrupt(format!("the extended tar header at byte {pos} has {size} bytes")));
                }
                b'L' => long_name = Some(text(&file.read_blocking(data..end)?)),
                b'x' => {
                    for (key, value) in pax(&file.read_blocking(data..end)?) {
                        match key.as_str() {
                            "path" => long_name = Some(value),
                            "size" => long_size = value.parse().ok(),
                            _ => {}
                        }
                    }
                }
                _ => {
                    let name = long_name.take().unwrap_or(header.name);
                    if matches!(header.kind, 0 | b'0' | b'7') {
                        if entries.len() == MAX_ENTRIES {
                            return Err(corrupt(format!("has more than {MAX_ENTRIES} entries: not an image")));
                        }
                        entries.insert(name.trim_start_matches("./").to_owned(), (data, size));
                    }
                }
            }
            pos = end.next_multiple_of(BLOCK);
        }
        if !entries.contains_key("index.json") && entries.contains_key("manifest.json") {
            return Err(invalid(
                "is in the format of `docker save`; convert it: skopeo copy docker-archive:FILE oci-archive:NEW",
            ));
        }
        Ok(Self(entries))
    }
}

struct Header {
    name: String,
    size: u64,
    kind: u8,
}

impl Header {
    fn is_file(&self) -> bool {
        matches!(self.kind, 0 | b'0' | b'7')
    }

    /// `None` at the end mark (a block of zeros).
    fn parse(block: &[u8]) -> Result<Option<Self>, &'static str> {
        let field = |at: usize, len: usize| block.get(at..at + len).unwrap_or_default();
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let declared = octal(field(148, 8)).ok_or("its checksum is not a number: not a tar file")?;
        // The checksum is taken with its own field as spaces.
        let sum: u64 = block.iter().map(|b| u64::from(*b)).sum::<u64>()
            - field(148, 8).iter().map(|b| u64::from(*b)).sum::<u64>()
            + 8 * u64::from(b' ');
        if sum != declared {
            return Err("its checksum does not match: not a tar file, or a damaged one");
        }
        let size = number(field(124, 12)).ok_or("its size is not a number")?;
        let kind = field(156, 1).first().copied().unwrap_or(0);
        let mut name = text(field(0, 100));
        let prefix = text(field(345, 155));
        // GNU's own header keeps times where POSIX keeps the prefix.
        if field(257, 6) == b"ustar\0" && !prefix.is_empty() {
            name = format!("{prefix}/{name}");
        }
        Ok(Some(Self { name, size, kind }))
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn octal(bytes: &[u8]) -> Option<u64> {
    let text = text(bytes);
    let digits = text.trim();
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

/// An octal number, or GNU's big-endian one, marked by the high bit of the first byte.
fn number(bytes: &[u8]) -> Option<u64> {
    let (first, rest) = bytes.split_first()?;
    if *first != 0x80 {
        return octal(bytes);
    }
    rest.iter().try_fold(0u64, |n, b| n.checked_mul(256)?.checked_add(u64::from(*b)))
}

/// PAX records: `length key=value\n`.
fn pax(mut bytes: &[u8]) -> Vec<(String, String)> {
    let mut records = Vec::new();
    while let Some(space) = bytes.iter().position(|b| *b == b' ') {
        let length = bytes.get(..space).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| d.parse::<usize>().ok());
        let Some(record) = length.and_then(|n| bytes.get(space + 1..n)) else { break };
        let record = String::from_utf8_lossy(record.strip_suffix(b"\n").unwrap_or(record)).into_owned();
        if let Some((key, value)) = record.split_once('=') {
            records.push((key.to_owned(), value.to_owned()));
        }
        bytes = bytes.get(length.unwrap_or(bytes.len())..).unwrap_or_default();
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_gnu_binary() {
        assert_eq!(number(b"00000000017\0"), Some(15));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1]), Some((2 << 32) + 1));
        assert_eq!(number(&[0x80, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255]), None);
        assert_eq!(number(b"9"), None);
    }

    #[test]
    fn pax_records_are_read_and_broken_ones_end_the_list() {
        let records = pax(b"16 path=a/b=c.d\n12 size=100\nx");
        assert_eq!(records, [("path".into(), "a/b=c.d".into()), ("size".into(), "100".into())]);
        assert!(pax(b"99999999999999999999 a=b\n").is_empty());
        assert!(pax(b"3 a=b\n").len() <= 1);
    }
}
