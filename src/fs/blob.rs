//! What a file's bytes come from: a cached blob, or one that is opened at its first read.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::OnceCell;

use crate::cache::{CacheError, CachedBlob};

/// One uncompressed blob, as the filesystem reads it.
#[async_trait]
pub trait Blob: Send + Sync + fmt::Debug {
    /// Copies `buf.len()` bytes from `off` if they are here; never waits on the network. Returns whether it did.
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool;

    /// Exactly `len` bytes from `off`, brought from wherever they are. A range beyond the end of the blob is
    /// [`CacheError::Corrupt`].
    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError>;
}

/// The error for a file that claims bytes which its blob does not have.
pub(super) fn beyond(what: &str, off: u64, len: usize, have: u64) -> CacheError {
    let end = off.saturating_add(len as u64);
    CacheError::Corrupt {
        what: what.into(),
        detail: format!("the archive names bytes {off}..{end} of it, but it ends at {have}; build the archive again"),
    }
}

#[async_trait]
impl Blob for CachedBlob {
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        off.checked_add(buf.len() as u64).is_some_and(|end| end <= self.len()) && CachedBlob::try_read(self, off, buf)
    }

    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        match off.checked_add(len as u64) {
            Some(end) if end <= self.len() => CachedBlob::read(self, off, len).await,
            _ => Err(beyond(&self.describe(), off, len, self.len())),
        }
    }
}

/// Opens a blob.
pub(super) type Opener = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Blob>, CacheError>> + Send + Sync>;

/// A blob that is opened at its first read: a mount costs nothing for the layers that nobody reads. Readers that come
/// while it is being opened wait for that one attempt; a failed attempt is made again by the next reader.
pub(super) struct LazyBlob {
    cell: OnceCell<Arc<dyn Blob>>,
    open: Opener,
}

impl LazyBlob {
    pub(super) fn new(open: Opener) -> Self {
        Self { cell: OnceCell::new(), open }
    }

    /// The blob, opened.
    pub(super) async fn get(&self) -> Result<&Arc<dyn Blob>, CacheError> {
        self.cell.get_or_try_init(|| (self.open)()).await
    }
}

impl fmt::Debug for LazyBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyBlob").field("opened", &self.cell.get()).finish_non_exhaustive()
    }
}

#[async_trait]
impl Blob for LazyBlob {
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        self.cell.get().is_some_and(|blob| blob.try_read(off, buf))
    }

    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        self.get().await?.read(off, len).await
    }
}
