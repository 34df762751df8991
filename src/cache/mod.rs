//! The node's verified span cache: a sparse file and a bitmap per (blob, span table), single-flight fills.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::archive::{BlobTable, SpanIx};
use crate::source::{BlobSource, SourceError};
use crate::units::{Compression, Digest};

mod blob;
pub mod fill;
mod flight;
mod ingest;
mod space;
mod store;

#[cfg(test)]
mod tests;

pub use blob::CachedBlob;

/// The `cache` section of the configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct CacheConfig {
    /// Where it lies.
    pub dir: PathBuf,
    /// Limit in bytes of allocated disk space.
    pub max_bytes: u64,
    /// Eviction starts at this share of `max_bytes`, in percent.
    pub high_watermark: u8,
    /// Eviction stops at this share, in percent.
    pub low_watermark: u8,
    /// Most bytes that fills in flight hold in memory, fetched and inflated. More fills wait, first come first served.
    pub fill_bytes: u64,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            dir: "/var/lib/clip-csi/cache".into(),
            max_bytes: 20 << 30,
            high_watermark: 90,
            low_watermark: 80,
            fill_bytes: 128 << 20,
        }
    }
}

/// What can go wrong between a read and its bytes.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The bytes do not match the digest that is held for them: never served.
    #[error("{what}: {detail}; the bytes were not served")]
    Corrupt {
        /// The blob.
        what: String,
        /// What does not match.
        detail: String,
    },
    /// No digest exists and `integrity: strict` was asked for.
    #[error("{what} can't be verified and integrity is strict")]
    Unverifiable {
        /// The file or blob.
        what: String,
    },
    /// The cache directory can't be used.
    #[error("cache {what}: {detail}")]
    Io {
        /// Path and operation.
        what: String,
        /// The system's words.
        detail: String,
    },
}

/// Identity of a cache file: a digest over everything that makes the bytes what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey(pub Digest);

impl CacheKey {
    /// For a blob with span digests: (blob digest, root of the table).
    pub fn table(blob: &Digest, root: &Digest) -> Self {
        Self(Digest::of(format!("table {blob} {root}").as_bytes()))
    }
    /// For a blob without: (where, identity of the content there, who may read it, geometry root).
    pub fn unverified(place: &str, identity: &str, scope: &str, geometry: &Digest) -> Self {
        let text = serde_json::json!(["object", place, identity, scope, geometry.to_string()]);
        Self(Digest::of(text.to_string().as_bytes()))
    }
}

/// The bytes of one span.
#[derive(Debug, Clone)]
pub struct Filled {
    /// The uncompressed bytes, exactly as long as the span.
    pub bytes: Bytes,
    /// Checked against a digest.
    pub verified: bool,
}

/// Brings spans that are not in the cache. Implemented for span tables in [`fill`], for old v1 archives in `fs`.
#[async_trait]
pub trait SpanFiller: Send + Sync + std::fmt::Debug {
    /// All spans of `spans`, in order, verified where that is possible; a span that fails its digest is an error.
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError>;
    /// Sends the spans one by one, in order, up to the first that fails, so that they need not fit in memory; stops when the
    /// receiver is gone.
    async fn fill_each(&self, spans: Range<u32>, sink: mpsc::Sender<Filled>) -> Result<(), CacheError> {
        for filled in self.fill(spans).await? {
            if sink.send(filled).await.is_err() {
                break;
            }
        }
        Ok(())
    }
    /// Spans that come together with `span` at the cost of one: filled together. By default just the span.
    fn run(&self, span: SpanIx) -> Range<u32> {
        span.0..span.0 + 1
    }
    /// Bytes that a fill of the span fetches: neighbours are joined into one request up to a limit.
    fn cost(&self, span: SpanIx) -> u64;
    /// Most bytes that a fill of these spans holds at a time beside what it hands on: fetched, and not inflated yet.
    fn held(&self, cost: u64) -> u64 {
        cost
    }
    /// What it is, for messages.
    fn describe(&self) -> String;
    /// Where it fetches from: [`BlobSource::place`].
    fn place(&self) -> String {
        self.describe()
    }
}

/// The cache of one node. One process owns the directory (locked).
#[derive(Debug)]
pub struct Cache {
    space: Arc<space::Space>,
}

impl Cache {
    /// Opens or creates it; what an earlier process left is used again. Starts one thread, which brings marks to the
    /// disk and evicts.
    pub fn open(config: &CacheConfig) -> Result<Arc<Self>, CacheError> {
        Ok(Arc::new(Self { space: space::Space::open(config)? }))
    }

    /// The cached view of one blob. Equal keys share one file, one bitmap and one set of fills in flight (the first
    /// filler of a key is used). `bounds` are the span boundaries: n + 1 ascending offsets from 0 to the length; no
    /// span is longer than [`crate::inflate::MAX_SPAN`].
    pub fn blob(
        &self,
        key: CacheKey,
        bounds: Arc<[u64]>,
        filler: Arc<dyn SpanFiller>,
    ) -> Result<Arc<CachedBlob>, CacheError> {
        self.space.blob(key, bounds, filler)
    }

    /// The span table of a layer that has none in its archive: kept from an earlier time, or made now by streaming
    /// the layer once. The bytes are kept on the way; they and the table are used only if the compressed bytes match
    /// `layer`. Callers of the same layer share one run. When the disk is full, the table comes all the same. Then
    /// use [`CacheKey::table`] and [`fill::TableFiller`], as with a table from an archive.
    pub async fn ingest(
        &self,
        layer: Digest,
        compression: Compression,
        source: Arc<dyn BlobSource>,
        span_size: u64,
    ) -> Result<Arc<BlobTable>, CacheError> {
        ingest::ingest(&self.space, layer, compression, source, span_size).await
    }

    /// Bytes on disk now, as far as known: exact after a flush.
    pub fn used(&self) -> u64 {
        self.space.used()
    }

    /// Waits for fills in flight, then brings everything to the disk. Done every few seconds and at the end anyway.
    pub async fn flush(&self) {
        // The sender lives in the space.
        let _ = self.space.flying.subscribe().wait_for(|n| *n == 0).await;
        let space = self.space.clone();
        // A panic there has been reported; the janitor goes on.
        let _ = tokio::task::spawn_blocking(move || space.flush()).await;
    }
}
