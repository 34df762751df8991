//! The blobs of an archive, each in one of three shapes: with span digests (our archives), a bare layer (v2 of the Go
//! module), a bare archive file (v1 of the Go module). What touches the network does so at the first read.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use tokio::sync::OnceCell;

use super::Integrity;
use super::blob::{Blob, LazyBlob};
use super::legacy::{LegacyBlob, WholeFileFiller};
use crate::archive::seek_table::MAX_SEEK_TABLE_LEN;
use crate::archive::{BlobTable, SeekTable, Tree};
use crate::cache::fill::TableFiller;
use crate::cache::{Cache, CacheError, CacheKey, SpanFiller};
use crate::source::{BlobSource, BlobStat, Credentials, Location, SourceError, Sources};
use crate::units::{Compression, Digest};

/// Bytes per span of a layer that comes without a seek table.
const LAYER_SPAN: u64 = 1 << 20;

/// A source that is opened at its first use: policy, credentials and connections cost nothing before.
pub(super) struct LazySource {
    sources: Sources,
    location: Location,
    access: RwLock<Access>,
}

/// Credentials, and the source that was opened with them.
#[derive(Clone)]
struct Access {
    credentials: Credentials,
    cell: Arc<OnceCell<Arc<dyn BlobSource>>>,
}

impl Access {
    fn new(credentials: Credentials) -> Self {
        Self { credentials, cell: Arc::default() }
    }
}

impl LazySource {
    pub(super) fn new(sources: Sources, location: Location, credentials: Credentials) -> Self {
        Self { sources, location, access: RwLock::new(Access::new(credentials)) }
    }

    /// What is fetched from now on is fetched with these.
    pub(super) fn renew(&self, credentials: &Credentials) {
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = Access::new(credentials.clone());
    }

    fn access(&self) -> Access {
        self.access.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn get(&self) -> Result<Arc<dyn BlobSource>, SourceError> {
        let Access { credentials, cell } = self.access();
        cell.get_or_try_init(|| self.sources.open(&self.location, &credentials)).await.cloned()
    }
}

impl fmt::Debug for LazySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LazySource").field(&self.location).finish()
    }
}

#[async_trait]
impl BlobSource for LazySource {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        self.get().await?.read_range(range).await
    }
    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        self.get().await?.stream(offset).await
    }
    async fn stat(&self) -> Result<BlobStat, SourceError> {
        self.get().await?.stat().await
    }
    fn describe(&self) -> String {
        if let Some(source) = self.access().cell.get() {
            return source.describe();
        }
        match &self.location {
            Location::File(path) => path.display().to_string(),
            Location::S3 { bucket, key, .. } => format!("s3://{bucket}/{key}"),
            Location::Registry { registry, repository, digest } => format!("{registry}/{repository}@{digest}"),
            Location::Artifact { .. } => self.location.to_string(),
            Location::Layout { dir, digest } => format!("oci:{}@{digest}", dir.display()),
        }
    }
    fn place(&self) -> String {
        match &self.location {
            Location::S3 { bucket, .. } => format!("s3://{bucket}"),
            Location::Registry { registry, .. } | Location::Artifact { registry, .. } => registry.clone(),
            Location::File(_) | Location::Layout { .. } => "this machine".into(),
        }
    }
}

/// The seek table of an archive, fetched once, at the first read that needs it.
#[derive(Debug)]
pub(super) struct Tables {
    source: Arc<dyn BlobSource>,
    at: (u64, u64, Digest),
    cell: OnceCell<Vec<Arc<BlobTable>>>,
}

impl Tables {
    /// `source`: the file that holds the table; `at`: position, length, SHA-256.
    pub(super) fn new(source: Arc<dyn BlobSource>, at: (u64, u64, Digest)) -> Self {
        Self { source, at, cell: OnceCell::new() }
    }

    pub(super) async fn get(&self) -> Result<&[Arc<BlobTable>], CacheError> {
        self.cell.get_or_try_init(|| self.fetch()).await.map(Vec::as_slice)
    }

    async fn fetch(&self) -> Result<Vec<Arc<BlobTable>>, CacheError> {
        let (pos, len, digest) = self.at;
        let corrupt = |detail: String| CacheError::Corrupt {
            what: format!("the seek table of {}", self.source.describe()),
            detail,
        };
        let end = pos.checked_add(len).filter(|_| len <= MAX_SEEK_TABLE_LEN);
        let end = end.ok_or_else(|| corrupt(format!("{len} bytes at {pos}; the limit is {MAX_SEEK_TABLE_LEN}")))?;
        let room = super::room::take(len).await;
        let bytes = self.source.read_range(pos..end).await?;
        let decoded = tokio::task::spawn_blocking(move || {
            let _room = room;
            let have = Digest::of(&bytes);
            if have == digest {
                SeekTable::decode(&bytes).map_err(|error| error.to_string())
            } else {
                Err(format!("it is {have}, the index says {digest}; fetch or build the archive again"))
            }
        });
        let table = decoded.await.map_err(|e| corrupt(e.to_string()))?.map_err(corrupt)?;
        Ok(table.blobs.into_iter().map(Arc::new).collect())
    }
}

/// What one blob of an archive is.
#[derive(Debug)]
pub(super) enum Shape {
    /// A layer of a v2 archive, named by its digest.
    Layer { digest: Digest },
    /// The file of a v1 archive of ours: offsets in the blob are positions in the file.
    File,
    /// The file of a v1 archive without span digests.
    Legacy,
}

/// One blob: all that is needed to read it, or to verify it.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) shape: Shape,
    pub(super) source: Arc<dyn BlobSource>,
    pub(super) tables: Option<Arc<Tables>>,
}

/// What a part can be verified with, found out with the network's help.
pub(super) enum Proof {
    /// Span digests.
    Table(Arc<BlobTable>),
    /// The layer's digest only.
    Layer(Digest, Compression),
    /// Checks of whole files only.
    Files,
}

/// Where and for whom blobs are cached.
#[derive(Debug, Clone)]
pub(super) struct CacheContext {
    pub(super) cache: Arc<Cache>,
    pub(super) integrity: Integrity,
    pub(super) scope: String,
}

impl Part {
    /// Finds what this part can be verified with.
    pub(super) async fn proof(&self) -> Result<Proof, CacheError> {
        let tables = match &self.tables {
            Some(tables) => tables.get().await?,
            None => &[],
        };
        match &self.shape {
            Shape::Layer { digest } => match tables.iter().find(|table| table.digest == *digest) {
                Some(table) => Ok(Proof::Table(Arc::clone(table))),
                None => Ok(Proof::Layer(*digest, self.compression().await?)),
            },
            Shape::File => match tables {
                [table] => Ok(Proof::Table(Arc::clone(table))),
                _ => Err(CacheError::Corrupt {
                    what: format!("the seek table of {}", self.source.describe()),
                    detail: format!("a v1 archive has one blob, this one {}; build it again", tables.len()),
                }),
            },
            Shape::Legacy => Ok(Proof::Files),
        }
    }

    /// By its first bytes, as when it is indexed: builders are known to mislabel layers.
    async fn compression(&self) -> Result<Compression, CacheError> {
        let size = self.source.stat().await?.size;
        let magic = self.source.read_range(0..size.min(4)).await?;
        Ok(match *magic {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            // A frame, or a skippable frame (RFC 8878, 3.1.2).
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Compression::Zstd,
            _ => Compression::None,
        })
    }

    /// The blob, to be opened at its first read.
    pub(super) fn blob(self: &Arc<Self>, tree: &Arc<Tree>, context: &CacheContext) -> Arc<dyn Blob> {
        let (part, tree, context) = (Arc::clone(self), Arc::clone(tree), context.clone());
        Arc::new(LazyBlob::new(Box::new(move || {
            let (part, tree, context) = (Arc::clone(&part), Arc::clone(&tree), context.clone());
            Box::pin(async move { part.open(tree, &context).await })
        })))
    }

    async fn open(&self, tree: Arc<Tree>, context: &CacheContext) -> Result<Arc<dyn Blob>, CacheError> {
        match self.proof().await? {
            Proof::Table(table) => table_blob(&context.cache, table, Arc::clone(&self.source)),
            Proof::Layer(digest, compression) => {
                let table = ingest(&context.cache, digest, compression, Arc::clone(&self.source)).await?;
                table_blob(&context.cache, table, Arc::clone(&self.source))
            }
            Proof::Files => {
                let stat = self.source.stat().await?;
                let source = Arc::clone(&self.source);
                let filler = tokio::task::spawn_blocking(move || WholeFileFiller::new(tree, source, stat.size));
                let filler = Arc::new(
                    filler
                        .await
                        .map_err(|e| CacheError::Io { what: self.source.describe(), detail: e.to_string() })??,
                );
                let place = self.source.describe();
                let key = CacheKey::unverified(&place, &stat.identity, &context.scope, &filler.geometry.digest);
                let bounds = Arc::clone(&filler.geometry.bounds);
                let cached = context.cache.blob(key, bounds, Arc::clone(&filler) as Arc<dyn SpanFiller>)?;
                Ok(Arc::new(LegacyBlob::new(cached, filler, context.integrity)))
            }
        }
    }
}

/// The cached view of a blob with span digests. Images that agree on every span share it.
fn table_blob(cache: &Cache, table: Arc<BlobTable>, source: Arc<dyn BlobSource>) -> Result<Arc<dyn Blob>, CacheError> {
    let key = CacheKey::table(&table.digest, &table.root());
    let bounds = TableFiller::bounds(&table);
    Ok(cache.blob(key, bounds, Arc::new(TableFiller { source, table }))?)
}

/// Brings a whole layer that came without a seek table into the cache, unserved until its digest matches.
async fn ingest(
    cache: &Arc<Cache>,
    digest: Digest,
    compression: Compression,
    source: Arc<dyn BlobSource>,
) -> Result<Arc<BlobTable>, CacheError> {
    cache.ingest(digest, compression, source, LAYER_SPAN).await
}
