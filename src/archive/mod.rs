//! The bytes of a CLIP archive and the tree that they describe. Pure: no I/O, no clock.
//!
//! [`header`] finds the parts, [`gob`] reads and writes Go's encoding of them, [`storage_info`] says where file
//! data lies, [`tree`] is the filesystem tree in memory, [`seek_table`] the random-access tables of our
//! extension, [`decode`]/[`encode`] put them together.

mod builder;
mod decode;
mod encode;
mod error;
pub mod extension;
pub mod gob;
pub mod header;
mod layout;
pub mod seek_table;
pub mod storage_info;
mod sum;
pub mod tree;

pub use builder::{Entry, MAX_NAME_LEN, MAX_PATH_LEN, MAX_TARGET_LEN, TreeBuilder};
pub use decode::{Archive, Version, decode};
pub use encode::{Encoded, encode};
pub use error::ArchiveError;
pub use extension::Extension;
pub use header::{HEADER_LEN, Header, MAX_INDEX_LEN, MAX_STORAGE_INFO_LEN};
pub use seek_table::{BlobTable, Chunks, MAX_SEEK_TABLE_LEN, SeekTable, Span, SpanIx};
pub use storage_info::{ImageMetadata, LayerMetadata, OciStorage, S3Storage, Storage};
pub use tree::{Attr, BlobIx, Data, Extent, Kind, NodeId, ResolveError, Timestamp, Tree, Xattr};
