//! The 54-byte header: where the index and the storage info lie.

use super::ArchiveError;

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 54;
/// Longest index that is written or read, in bytes. At some 150 bytes a name this is 1.7 million names; the largest images have one.
/// It bounds what an archive can make a node fetch and hold before anything is known of it.
pub const MAX_INDEX_LEN: u64 = 256 << 20;
/// Longest storage info that is read, in bytes. That of a 10 GB image with checkpoints every 2 MiB is 100 KB.
pub const MAX_STORAGE_INFO_LEN: u64 = 64 << 20;

const MAGIC: [u8; 9] = [0x89, b'C', b'L', b'I', b'P', b'\r', b'\n', 0x1a, b'\n'];
/// The same in v1 and v2 archives.
const FORMAT_VERSION: u8 = 1;

/// The header's fields, validated: lengths and positions are not negative and bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Position and length of the index (gob), in bytes from the start of the file.
    pub index: (u64, u64),
    /// Position and length of the storage info (gob); length 0 in a local v1 archive.
    pub storage_info: (u64, u64),
    /// The type field, NUL padding removed: "", "s3" or "oci". The wrapper's own type decides; this one may disagree.
    pub storage_type: String,
}

impl Header {
    /// Reads a header. Errors: bad magic, unknown format version, negative, absurd or overlapping ranges.
    pub fn decode(bytes: &[u8]) -> Result<Self, ArchiveError> {
        let found = &bytes[..bytes.len().min(MAGIC.len())];
        if !MAGIC.starts_with(found) {
            return Err(ArchiveError::BadMagic { found: hex::encode(found) });
        }
        let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
            let (need, have) = (HEADER_LEN as u64, bytes.len() as u64);
            return Err(ArchiveError::Truncated { what: "header", need, have });
        };
        let version = bytes[MAGIC.len()];
        if version != FORMAT_VERSION {
            return Err(ArchiveError::Unsupported {
                detail: format!("format version {version}, {FORMAT_VERSION} is known"),
            });
        }
        let range = |what: &'static str, at: usize, limit: u64| {
            let field = |at: usize| {
                let mut le = [0; 8];
                le.copy_from_slice(&bytes[at..at + 8]);
                let value = i64::from_le_bytes(le);
                u64::try_from(value).map_err(|_| corrupt(format!("{what} has position or length {value}")))
            };
            let (len, pos) = (field(at)?, field(at + 8)?);
            if len > limit {
                return Err(ArchiveError::TooLarge { what, value: len, limit });
            }
            if len > 0 && (pos < HEADER_LEN as u64 || pos.checked_add(len).is_none_or(|end| end > i64::MAX as u64)) {
                return Err(corrupt(format!(
                    "{what} of {len} bytes lies at {pos}, within the header or behind any file's end"
                )));
            }
            // Where nothing lies, its position means nothing.
            Ok(if len == 0 { (0, 0) } else { (pos, len) })
        };
        let index = range("index", 10, MAX_INDEX_LEN)?;
        let storage_info = range("storage info", 26, MAX_STORAGE_INFO_LEN)?;
        if index.1 == 0 {
            return Err(corrupt("the index has length 0; the archive was never finished".into()));
        }
        if storage_info.1 > 0 && storage_info.0 < index.0 + index.1 && index.0 < storage_info.0 + storage_info.1 {
            return Err(corrupt("index and storage info overlap".into()));
        }
        let storage_type = bytes[42..].split(|&b| b == 0).next().unwrap_or_default();
        Ok(Self { index, storage_info, storage_type: String::from_utf8_lossy(storage_type).into_owned() })
    }

    /// Refuses a header whose parts do not lie within a file of `size` bytes.
    pub fn check(&self, size: u64) -> Result<(), ArchiveError> {
        for (what, (pos, len)) in [("index", self.index), ("storage info", self.storage_info)] {
            let end = pos.saturating_add(len);
            if len > 0 && end > size {
                return Err(ArchiveError::Truncated { what, need: end, have: size });
            }
        }
        Ok(())
    }

    /// The 54 bytes. A storage type over 12 bytes is cut.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..MAGIC.len()].copy_from_slice(&MAGIC);
        out[MAGIC.len()] = FORMAT_VERSION;
        let fields = [self.index.1, self.index.0, self.storage_info.1, self.storage_info.0];
        for (chunk, field) in out[10..42].chunks_exact_mut(8).zip(fields) {
            chunk.copy_from_slice(&field.to_le_bytes());
        }
        for (byte, &of) in out[42..].iter_mut().zip(self.storage_type.as_bytes()) {
            *byte = of;
        }
        out
    }
}

fn corrupt(detail: String) -> ArchiveError {
    ArchiveError::Corrupt { what: "header", detail }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header { index: (1000, 500), storage_info: (1500, 70), storage_type: "oci".into() }
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let bytes = header().encode();
        assert_eq!(hex::encode(&bytes[..10]), "89434c49500d0a1a0a01");
        assert_eq!(bytes[10..18], 500u64.to_le_bytes());
        assert_eq!(bytes[18..26], 1000u64.to_le_bytes());
        assert_eq!(bytes[26..34], 70u64.to_le_bytes());
        assert_eq!(bytes[34..42], 1500u64.to_le_bytes());
        assert_eq!(&bytes[42..], b"oci\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn negative_absurd_and_overlapping_ranges_are_refused() {
        type Edit = fn(&mut Header);
        let edits: &[(&str, Edit)] = &[
            ("negative length", |h| h.index.1 = u64::MAX),
            ("negative position", |h| h.index.0 = u64::MAX),
            ("long index", |h| h.index.1 = MAX_INDEX_LEN + 1),
            ("long storage info", |h| h.storage_info.1 = MAX_STORAGE_INFO_LEN + 1),
            ("behind any end", |h| h.index.0 = i64::MAX as u64),
            ("in the header", |h| h.index.0 = 53),
            ("empty index", |h| h.index.1 = 0),
            ("overlap", |h| h.storage_info.0 = 1499),
        ];
        for (name, edit) in edits {
            let mut header = header();
            edit(&mut header);
            assert!(Header::decode(&header.encode()).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_no_clip_archive_is_said_to_be_none() {
        let gzip = [0x1f, 0x8b, 8, 0, 0];
        assert!(matches!(Header::decode(&gzip), Err(ArchiveError::BadMagic { .. })));
        let mut newer = header().encode();
        newer[9] = 2;
        assert!(matches!(Header::decode(&newer), Err(ArchiveError::Unsupported { .. })));
        assert!(matches!(Header::decode(&newer[..20]), Err(ArchiveError::Truncated { need: 54, have: 20, .. })));
    }

    #[test]
    fn parts_beyond_the_file_are_refused() {
        assert!(header().check(1570).is_ok());
        assert!(matches!(header().check(1569), Err(ArchiveError::Truncated { need: 1570, have: 1569, .. })));
    }

    proptest! {
        #[test]
        fn every_header_round_trips(pos in 54u64..1 << 40, len in 1u64..MAX_INDEX_LEN, info in 0u64..MAX_STORAGE_INFO_LEN) {
            let header = Header { index: (pos, len), storage_info: (if info == 0 { 0 } else { pos + len }, info), storage_type: "s3".into() };
            prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }

        #[test]
        fn arbitrary_headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), magic: bool) {
            let mut bytes = bytes;
            if magic && bytes.len() > 10 {
                bytes[..9].copy_from_slice(&MAGIC);
                bytes[9] = 1;
            }
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.index.1 <= MAX_INDEX_LEN);
            }
        }
    }
}
