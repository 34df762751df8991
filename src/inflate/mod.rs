//! Random access into compressed streams. Pure: bytes in, bytes out.
//!
//! [`Indexer`] is fed a whole compressed blob once, hands on the uncompressed bytes, and leaves the blob's
//! [`BlobTable`]. [`inflate_span`] then turns the compressed bytes of any one span into its uncompressed bytes.
//!
//! | format | where inflating can start | what it needs |
//! |---|---|---|
//! | gzip | at a block boundary | up to 7 bits of the byte before, and what later data copies of the 32 KiB before ([`window`]) |
//! | gzip | at a member | nothing |
//! | zstd | at a frame | nothing |
//! | none | anywhere | nothing |
//!
//! Spans may also be [`crate::archive::Chunks`], pieces of files that a layer's own table of contents names: then what lies between
//! two of them in their streams is passed over.
//!
//! Where no such place comes for long (one huge zstd frame, one huge deflate block), spans are cut in its middle.
//! They carry the
//! `coff` of the place before them, so that several spans share one restart point ([`run_of`]): inflating a
//! later one goes through those before it, and a cache does well to fill them all in one pass ([`SpanInflater`]).

mod digests;
mod index;
mod resume;
mod side_work;
mod track;
mod twin;
pub mod window;
mod zstd_frame;
mod zstream;

#[cfg(test)]
mod tests;

pub use index::Indexer;
pub use resume::{
    SpanInflater, compressed_range, inflate_span, inflate_span_into, inflate_spans, inflate_whole, run_of,
};

#[cfg(doc)]
use crate::archive::BlobTable;
use crate::units::Compression;

/// Longest span in bytes: what a hostile table can make a reader allocate.
pub const MAX_SPAN: u64 = 64 << 20;

/// Takes uncompressed bytes in order.
type Sink<'a> = &'a mut dyn FnMut(&[u8]);

/// What can be wrong with a compressed stream.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum InflateError {
    /// The stream (or its span table) contradicts its format.
    #[error("corrupt {compression} data near compressed byte {at}: {detail}")]
    Corrupt {
        /// The format.
        compression: Compression,
        /// Offset in the compressed blob.
        at: u64,
        /// What the decoder said.
        detail: String,
    },
    /// The stream ends before its end.
    #[error("truncated {compression} data: it ends at compressed byte {at}")]
    Truncated {
        /// The format.
        compression: Compression,
        /// Offset in the compressed blob.
        at: u64,
    },
    /// The span inflates to other bytes than its digest says.
    #[error("span {span} of the blob does not match its digest")]
    DigestMismatch {
        /// The span.
        span: u32,
    },
}
