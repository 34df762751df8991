//! What can be wrong with an archive's bytes.

/// Why bytes are not an archive that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The first bytes are not CLIP's magic number.
    #[error("not a CLIP archive: the first 9 bytes are {found}, a CLIP archive starts with 89434c49500d0a1a0a")]
    BadMagic {
        /// The bytes found, in hex.
        found: String,
    },
    /// A part of the archive ends before its declared length.
    #[error("truncated archive: {what} needs {need} bytes, {have} are there; fetch or build the archive again")]
    Truncated {
        /// The part.
        what: &'static str,
        /// Bytes that it declares.
        need: u64,
        /// Bytes that there are.
        have: u64,
    },
    /// A part contradicts the format, itself or another part.
    #[error("corrupt archive: {what}: {detail}; fetch or build the archive again")]
    Corrupt {
        /// The part: "header", "index", "storage info", "seek table".
        what: &'static str,
        /// What contradicts what.
        detail: String,
    },
    /// The archive needs something that this version does not know.
    #[error("unsupported archive: {detail}; use a newer clip-csi")]
    Unsupported {
        /// What is not known.
        detail: String,
    },
    /// A length or count is over the limit that protects the reader.
    #[error("refused archive: {what} is {value}, the limit is {limit}")]
    TooLarge {
        /// The length or count.
        what: &'static str,
        /// Its declared value.
        value: u64,
        /// Its limit.
        limit: u64,
    },
}
