//! Layers that carry a table of contents: eStargz and zstd:chunked. Indexing such a layer reads its tables, not the layer.
//!
//! All here is pure ([`estargz`], [`zstd_chunked`], [`entries`], [`tar_split`]): bytes in, [`Contents`] out, allocations bounded by their
//! input. `super::tables` fetches the bytes. What a table says is believed only where a digest in the image's manifest covers it, and then
//! as much as the manifest is; every chunk of it must have a digest, which becomes the digest of a span. Whatever is missing, broken or
//! contradictory makes the layer an ordinary one: it is streamed once, and why is logged.

pub mod entries;
pub mod estargz;
pub mod tar_split;
pub mod zstd_chunked;

#[cfg(test)]
mod tests;

pub use entries::{Chunk, Contents};

use crate::units::Digest;

/// Longest table of contents in bytes, uncompressed. A file takes some 300: that of 200,000 files fits.
pub const MAX_JSON: usize = 64 << 20;
/// Longest table as it is stored, in bytes.
pub const MAX_STORED: u64 = 32 << 20;

/// Why a table of contents is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TocError {
    /// It contradicts its format, the layer's size, or itself.
    #[error("{what} is broken: {detail}")]
    Broken {
        /// Which part.
        what: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// It is larger than what is read.
    #[error("{what} has {value} bytes, the limit is {limit}")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// What it has.
        value: u64,
        /// What it may have.
        limit: u64,
    },
    /// It is not what its digest says.
    #[error("{what} has the digest {found}, the manifest says {wanted}")]
    Digest {
        /// Which part.
        what: &'static str,
        /// What the manifest says.
        wanted: Digest,
        /// What was read.
        found: Digest,
    },
    /// It is right, but says less than what a mount needs.
    #[error("{0}")]
    Lacking(String),
}

pub(super) fn broken(what: &'static str, detail: impl Into<String>) -> TocError {
    TocError::Broken { what, detail: detail.into() }
}

/// Bytes are what their digest says.
fn check(what: &'static str, bytes: &[u8], wanted: &Digest) -> Result<(), TocError> {
    let found = Digest::of(bytes);
    if found == *wanted { Ok(()) } else { Err(TocError::Digest { what, wanted: *wanted, found }) }
}
