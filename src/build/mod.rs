//! Making archives: v1 from a directory or an image, v2 from an image; and the store that they are kept in.

mod artifacts;
mod bundle;
mod data_region;
mod dir;
mod image_config;
mod indexing;
mod layer;
pub mod merge;
mod output;
pub mod progress;
pub mod provider;
pub mod store;
mod tables;
pub mod tar;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod toc;
mod v1;
mod v2;

use std::path::Path;
use std::sync::Arc;

use crate::source::{ResolvedImage, SourceError};
use crate::units::Digest;
use progress::Progress;

pub use artifacts::Artifacts;
pub use indexing::Indexing;
pub use v1::write_remote_index;

/// What can go wrong in a build.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A layer is not what its digest says, is truncated, or its tar is broken.
    #[error("layer {layer}: {detail}")]
    BadLayer {
        /// The layer's digest.
        layer: Digest,
        /// What is wrong.
        detail: String,
    },
    /// v2 can't be built of this image, v1 could: the fallback applies.
    #[error("no v2 index can be built: {detail}")]
    V2Impossible {
        /// Why.
        detail: String,
    },
    /// The image itself contradicts the OCI rules.
    #[error("image {image}: {detail}")]
    BadImage {
        /// The reference.
        image: String,
        /// What is wrong.
        detail: String,
    },
    /// The archive could not be encoded.
    #[error(transparent)]
    Archive(#[from] crate::archive::ArchiveError),
    /// A build that several callers waited for failed.
    #[error(transparent)]
    Shared(std::sync::Arc<BuildError>),
    /// A local file.
    #[error("{what}: {detail}")]
    Io {
        /// Path and operation.
        what: String,
        /// The system's words.
        detail: String,
    },
}

impl BuildError {
    /// The error itself, where several callers share one.
    pub fn root(&self) -> &Self {
        match self {
            Self::Shared(inner) => inner.root(),
            other => other,
        }
    }

    /// An I/O error on a local path.
    pub(crate) fn io(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        Self::Io { what: what.to_string(), detail: error.to_string() }
    }
}

/// Uncompressed bytes per span, in KiB, where nothing else is asked for: found by measurement, see docs/performance.md.
pub const DEFAULT_SPAN_KIB: u64 = 2176;

/// Whether a span may aim at so many KiB: a multiple of 64 from 64 to 16384. Below, the table outgrows its use; above, most of
/// what is fetched is not wanted.
pub fn is_span_kib(kib: u64) -> bool {
    kib.is_multiple_of(64) && (64..=16384).contains(&kib)
}

/// Options of a build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Uncompressed bytes per span of our table.
    pub span_size: u64,
    /// Distance of the checkpoints that the Go module reads, in MiB.
    pub checkpoint_mib: u64,
    /// Index layers that carry a table of contents (eStargz, zstd:chunked) by that, without reading them.
    pub tables_of_contents: bool,
    /// What the archive says of where its layers lie, where that differs from where they were read.
    pub store_as: Option<crate::source::ImageRef>,
    /// What builds share. Default: one layer per CPU at a time, nothing kept.
    pub indexing: Arc<Indexing>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            span_size: DEFAULT_SPAN_KIB << 10,
            checkpoint_mib: 2,
            tables_of_contents: true,
            store_as: None,
            indexing: Arc::default(),
        }
    }
}

/// What a build made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildReport {
    /// Bytes of the archive.
    pub archive_bytes: u64,
    /// Names in the tree.
    pub nodes: u64,
    /// Sum of file sizes.
    pub content_bytes: u64,
    /// Sum of the (compressed) layers.
    pub layer_bytes: u64,
    /// What the user should know (a layout that only this machine can mount, …).
    pub warnings: Vec<String>,
}

/// Indexes an image: v2, written to `out` (temporary + rename).
pub async fn index_image(
    image: &ResolvedImage,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    v2::index_image(image, out, options, progress).await
}

/// Archives an image with its data: v1, in the bundle shape.
pub async fn archive_image(
    image: &ResolvedImage,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    v1::archive_image(image, out, options, progress).await
}

/// Archives a directory with its data: v1.
pub async fn archive_dir(
    dir: &Path,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    dir::archive_dir(dir, out, options, progress).await
}

/// What archives say of their maker.
fn generator() -> String {
    format!("clip-csi {}", env!("CARGO_PKG_VERSION"))
}
