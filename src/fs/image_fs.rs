//! Inode numbers, reads, holes, xattrs: over a tree and its blobs. Knows no kernel; [`super::fuse`] does.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use prometheus::IntCounter;
use serde::{Deserialize, Serialize};

use super::blob::Blob;
use crate::archive::{BlobIx, Data, Kind, NodeId, Tree};
use crate::cache::CacheError;
use crate::metrics::metrics;
use crate::source::SourceError;

/// An errno value (positive). Chosen from errors in one place: [`Errno::of_cache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Not a regular file, but a directory.
    pub const ISDIR: Self = Self(libc::EISDIR);
    /// Not a regular file.
    pub const INVAL: Self = Self(libc::EINVAL);
    /// Past the end of the file (lseek).
    pub const NXIO: Self = Self(libc::ENXIO);

    /// The errno that a reader sees for a failed fill.
    ///
    /// * `EACCES`: credentials or the node's policy refuse the source.
    /// * `ETIMEDOUT`: the source can't be reached; reading again later may succeed.
    /// * `EIO`: everything else. A blob that is gone is `EIO` too: `ENOENT` would tell the reader that the *file* is
    ///   not there, which many programs take for an answer.
    pub fn of_cache(error: &CacheError) -> Self {
        Self(match FailureKind::of(error) {
            FailureKind::Denied | FailureKind::Refused => libc::EACCES,
            FailureKind::Unavailable => libc::ETIMEDOUT,
            FailureKind::NotFound
            | FailureKind::Corrupt
            | FailureKind::Invalid
            | FailureKind::Io
            | FailureKind::Unverifiable => libc::EIO,
        })
    }
}

/// The `kind` label of `clip_errors_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FailureKind {
    NotFound,
    Denied,
    Refused,
    Unavailable,
    Corrupt,
    Invalid,
    Io,
    Unverifiable,
}

impl FailureKind {
    const COUNT: usize = 8;

    fn of(error: &CacheError) -> Self {
        match error {
            CacheError::Source(source) => match source {
                SourceError::NotFound { .. } => Self::NotFound,
                SourceError::Denied { .. } => Self::Denied,
                SourceError::Refused { .. } => Self::Refused,
                SourceError::Unavailable { .. } => Self::Unavailable,
                SourceError::Corrupt { .. } => Self::Corrupt,
                SourceError::Invalid { .. } | SourceError::Exists { .. } => Self::Invalid,
                SourceError::Io { .. } => Self::Io,
            },
            CacheError::Corrupt { .. } => Self::Corrupt,
            CacheError::Unverifiable { .. } => Self::Unverifiable,
            CacheError::Io { .. } => Self::Io,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
            Self::Corrupt => "corrupt",
            Self::Invalid => "invalid",
            Self::Io => "io",
            Self::Unverifiable => "unverifiable",
        }
    }
}

/// What is shown as the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootView {
    /// A bundle shows `/rootfs`, anything else all of it.
    #[default]
    Auto,
    /// `/rootfs` of an OCI bundle.
    Bundle,
    /// The archive's own root.
    Archive,
}

/// What happens to bytes that no digest covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Integrity {
    /// Served and counted.
    #[default]
    Digest,
    /// Refused, unless the whole file can be fetched and checked first.
    Strict,
}

/// The answer to a read.
pub enum ReadResult {
    /// The bytes, now.
    Ready(Bytes),
    /// The bytes, later: to be driven on the runtime, never on a kernel thread.
    Pending(BoxFuture<'static, Result<Bytes, Errno>>),
}

/// A read that failed.
#[derive(Debug, Clone)]
pub struct ReadFailure {
    /// When.
    pub at: Instant,
    /// Of which file: its path in the archive.
    pub path: String,
    /// Why, and the remedy: one line.
    pub error: String,
}

/// statfs(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    /// Sum of file sizes in bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// The filesystem. Inode number = 1 + node id within the *shown root*'s tree (the shown root is always 1). Cheap to clone.
#[derive(Clone)]
pub struct ImageFs(Arc<Inner>);

struct Inner {
    tree: Arc<Tree>,
    root: NodeId,
    blobs: Box<[Arc<dyn Blob>]>,
    statfs: Statfs,
    has_xattrs: OnceLock<bool>,
    /// Whether `first_read` holds anything: all that a warm read looks at.
    waiting: AtomicBool,
    first_read: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
    failures: FailureLog,
    // Looked up once: finding a labelled series costs a hash and a lock.
    hits: IntCounter,
    misses: IntCounter,
    bytes: IntCounter,
}

impl fmt::Debug for ImageFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { tree, root, blobs, .. } = &*self.0;
        f.debug_struct("ImageFs").field("names", &tree.len()).field("root", root).field("blobs", blobs).finish()
    }
}

/// A part of a read that lies in one piece in a blob.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Where it goes in the answer.
    at: usize,
    /// Where it comes from.
    blob_off: u64,
    len: usize,
}

impl ImageFs {
    /// A filesystem that shows `root` of `tree`; `blobs` are those that the tree names, in the order of [`BlobIx`].
    /// Costs a walk over the tree (for statfs), no I/O.
    pub fn new(tree: Arc<Tree>, root: NodeId, blobs: Vec<Arc<dyn Blob>>) -> Self {
        let statfs = Statfs { bytes: tree.total_size(), inodes: tree.inodes() as u64 };
        let metrics = metrics();
        Self(Arc::new(Inner {
            tree,
            root,
            blobs: blobs.into(),
            statfs,
            has_xattrs: OnceLock::new(),
            waiting: AtomicBool::new(false),
            first_read: Mutex::default(),
            failures: FailureLog::default(),
            hits: metrics.reads.with_label_values(&["hit"]),
            misses: metrics.reads.with_label_values(&["miss"]),
            bytes: metrics.read_bytes.clone(),
        }))
    }

    /// The same tree and blobs under another root.
    pub(super) fn with_root(&self, root: NodeId) -> Self {
        Self::new(Arc::clone(&self.0.tree), root, self.0.blobs.to_vec())
    }

    /// The whole tree.
    pub fn tree(&self) -> &Arc<Tree> {
        &self.0.tree
    }

    /// The node shown as root.
    pub fn root(&self) -> NodeId {
        self.0.root
    }

    /// Space and inodes.
    pub fn statfs(&self) -> Statfs {
        self.0.statfs
    }

    /// The inode number of a name. The shown root is 1; where it is not the tree's root, those two swap numbers. All
    /// names of a hard-linked file give one number. A function of the tree alone: a restarted server gives the same.
    pub fn ino(&self, node: NodeId) -> u64 {
        let inode = self.0.tree.inode(node);
        1 + u64::from(self.swap(inode).0)
    }

    /// The node behind an inode number that [`Self::ino`] gave.
    pub fn node(&self, ino: u64) -> Option<NodeId> {
        let index = u32::try_from(ino.checked_sub(1)?).ok()?;
        ((index as usize) < self.0.tree.len()).then(|| self.swap(NodeId(index)))
    }

    fn swap(&self, node: NodeId) -> NodeId {
        if node == self.0.root {
            NodeId::ROOT
        } else if node == NodeId::ROOT {
            self.0.root
        } else {
            node
        }
    }

    /// The directory above, as seen from inside: the shown root's is the shown root.
    pub fn parent(&self, node: NodeId) -> NodeId {
        if node == self.0.root { node } else { self.0.tree.parent(node) }
    }

    /// Bytes of disk that stat(2) reports, in units of 512: holes do not count.
    pub fn blocks(&self, node: NodeId) -> u64 {
        let bytes = match self.0.tree.data(node) {
            Data::Empty => 0,
            Data::Contiguous { .. } => self.0.tree.attr(node).size,
            Data::Sparse { extents, .. } => extents.iter().fold(0u64, |sum, e| sum.saturating_add(e.len)),
        };
        bytes.div_ceil(512)
    }

    /// Whether any node has an extended attribute. The first call walks the tree.
    pub fn has_xattrs(&self) -> bool {
        let tree = &self.0.tree;
        *self.0.has_xattrs.get_or_init(|| (0..tree.len() as u32).any(|id| !tree.xattrs(NodeId(id)).is_empty()))
    }

    /// One extended attribute.
    pub fn xattr(&self, node: NodeId, name: &[u8]) -> Option<&[u8]> {
        let all = self.0.tree.xattrs(node);
        let at = all.binary_search_by(|(key, _)| (**key).cmp(name)).ok()?;
        all.get(at).map(|(_, value)| &**value)
    }

    /// The first byte at or after `off` that is data (`SEEK_DATA`); [`Errno::NXIO`] if only a hole follows.
    pub fn seek_data(&self, node: NodeId, off: u64) -> Result<u64, Errno> {
        let size = self.0.tree.attr(node).size;
        let found = match self.0.tree.data(node) {
            Data::Empty => None,
            Data::Contiguous { .. } => Some(off),
            Data::Sparse { extents, .. } => extents
                .get(extents.partition_point(|e| e.offset.saturating_add(e.len) <= off))
                .map(|e| e.offset.max(off)),
        };
        found.filter(|at| *at < size).ok_or(Errno::NXIO)
    }

    /// The first hole at or after `off`, the end of the file being one (`SEEK_HOLE`).
    pub fn seek_hole(&self, node: NodeId, off: u64) -> Result<u64, Errno> {
        let size = self.0.tree.attr(node).size;
        if off >= size {
            return Err(Errno::NXIO);
        }
        Ok(match self.0.tree.data(node) {
            Data::Empty => off,
            Data::Contiguous { .. } => size,
            Data::Sparse { extents, .. } => {
                let first = extents.partition_point(|e| e.offset.saturating_add(e.len) <= off);
                let mut at = off;
                for extent in extents.iter().skip(first) {
                    if extent.offset > at {
                        break;
                    }
                    at = extent.offset.saturating_add(extent.len);
                }
                at.min(size)
            }
        })
    }

    /// Calls `hook` when the next bytes are given to a reader (at once after a publish: the time to the first read).
    pub fn on_first_read(&self, hook: impl FnOnce() + Send + 'static) {
        self.0.first_read.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
        self.0.waiting.store(true, Ordering::Release);
    }

    /// The hit path: fills the front of `buf` with the bytes at `off` if all of them are here, and says how many
    /// (fewer than `buf.len()` only at the end of the file). `None`: something is missing, ask [`Self::read_later`].
    /// Never waits on the network, allocates nothing.
    pub fn try_read(&self, node: NodeId, off: u64, buf: &mut [u8]) -> Result<Option<usize>, Errno> {
        let fs = &*self.0;
        let len = fs.clamp(node, off, buf.len())?;
        let Some(buf) = buf.get_mut(..len) else { return Err(Errno::INVAL) };
        if !fs.try_fill(node, off, buf) {
            return Ok(None);
        }
        fs.hits.inc();
        fs.served(len);
        Ok(Some(len))
    }

    /// The miss path: the bytes at `off`, fetched. To be driven on the runtime. A failure is logged and counted, and
    /// only its errno is told.
    pub fn read_later(&self, node: NodeId, off: u64, len: usize) -> BoxFuture<'static, Result<Bytes, Errno>> {
        let fetch = self.fetch(node, off, len);
        let fs = Arc::clone(&self.0);
        Box::pin(async move {
            fetch.await.map_err(|error| {
                fs.failures.note(&error, || String::from_utf8_lossy(&fs.tree.path(node)).into_owned());
                Errno::of_cache(&error)
            })
        })
    }

    /// The last read that failed since the archive was opened, also if later ones succeeded.
    pub fn last_failure(&self) -> Option<ReadFailure> {
        self.0.failures.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads up to `len` bytes at `off`; short only at the end of the file.
    pub fn read(&self, node: NodeId, off: u64, len: u32) -> ReadResult {
        let failed = |errno| ReadResult::Pending(Box::pin(async move { Err(errno) }));
        let len = match self.0.clamp(node, off, len as usize) {
            Ok(len) => len,
            Err(errno) => return failed(errno),
        };
        let mut buf = vec![0; len];
        match self.try_read(node, off, &mut buf) {
            Ok(Some(_)) => ReadResult::Ready(buf.into()),
            Ok(None) => ReadResult::Pending(self.read_later(node, off, len)),
            Err(errno) => failed(errno),
        }
    }

    /// Like [`Self::read_later`], but with the whole error: for the command line, which prints it. Empty for what is
    /// no regular file.
    pub fn fetch(&self, node: NodeId, off: u64, len: usize) -> BoxFuture<'static, Result<Bytes, CacheError>> {
        let fs = Arc::clone(&self.0);
        Box::pin(async move {
            let len = fs.clamp(node, off, len).unwrap_or(0);
            fs.misses.inc();
            let bytes = fs.gather(node, off, len).await?;
            fs.served(bytes.len());
            Ok(bytes)
        })
    }
}

impl Inner {
    /// How many of `len` bytes at `off` the file has.
    fn clamp(&self, node: NodeId, off: u64, len: usize) -> Result<usize, Errno> {
        let attr = self.tree.attr(node);
        match attr.kind {
            Kind::File => {}
            Kind::Dir => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        let left = attr.size.saturating_sub(off);
        Ok(usize::try_from(left).map_or(len, |left| left.min(len)))
    }

    fn served(&self, bytes: usize) {
        self.bytes.inc_by(bytes as u64);
        if bytes > 0 && self.waiting.load(Ordering::Acquire) {
            let hooks = {
                let mut hooks = self.first_read.lock().unwrap_or_else(PoisonError::into_inner);
                self.waiting.store(false, Ordering::Release);
                std::mem::take(&mut *hooks)
            };
            hooks.into_iter().for_each(|hook| hook());
        }
    }

    fn try_fill(&self, node: NodeId, off: u64, buf: &mut [u8]) -> bool {
        let data = self.tree.data(node);
        let blob = match data {
            Data::Empty => {
                buf.fill(0);
                return true;
            }
            Data::Contiguous { blob, .. } => blob,
            Data::Sparse { blob, .. } => {
                buf.fill(0);
                blob
            }
        };
        let len = buf.len();
        let Some(blob) = self.blob(blob) else { return len == 0 };
        pieces(&data, off, len).all(|piece| match buf.get_mut(piece.at..piece.at + piece.len) {
            Some(part) => blob.try_read(piece.blob_off, part),
            None => false,
        })
    }

    async fn gather(&self, node: NodeId, off: u64, len: usize) -> Result<Bytes, CacheError> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let (blob, pieces) = {
            let data = self.tree.data(node);
            let blob = match data {
                Data::Empty => return Ok(vec![0; len].into()),
                Data::Contiguous { blob, .. } | Data::Sparse { blob, .. } => blob,
            };
            (blob, pieces(&data, off, len).collect::<Vec<_>>())
        };
        let Some(blob) = self.blob(blob) else {
            let detail =
                format!("a file names blob {}, there are {}; build the archive again", blob.0, self.blobs.len());
            return Err(CacheError::Corrupt { what: "the archive".into(), detail });
        };
        if let [piece] = pieces[..]
            && piece.len == len
        {
            return blob.read(piece.blob_off, len).await;
        }
        let mut out = vec![0; len];
        // A sparse file's extents mostly follow each other in the blob: what touches there is one read.
        for run in pieces.chunk_by(|a, b| a.blob_off.saturating_add(a.len as u64) == b.blob_off) {
            let Some(first) = run.first() else { continue };
            let mut bytes = blob.read(first.blob_off, run.iter().map(|p| p.len).sum()).await?;
            for piece in run {
                let part = bytes.split_to(piece.len.min(bytes.len()));
                if let Some(to) = out.get_mut(piece.at..piece.at + part.len()) {
                    to.copy_from_slice(&part);
                }
            }
        }
        Ok(out.into())
    }

    fn blob(&self, ix: BlobIx) -> Option<&Arc<dyn Blob>> {
        self.blobs.get(usize::from(ix.0))
    }
}

/// The parts of `off..off + len` of a file that lie in its blob, in order; the rest is zeros. An offset that an archive
/// puts beyond 2^64 ends up beyond the blob's end, which the blob refuses.
fn pieces<'a>(data: &Data<'a>, off: u64, len: usize) -> impl Iterator<Item = Piece> + use<'a> {
    let end = off.saturating_add(len as u64);
    let (whole, extents) = match *data {
        Data::Empty => (None, &[][..]),
        Data::Contiguous { offset, .. } => (Some(Piece { at: 0, blob_off: offset.saturating_add(off), len }), &[][..]),
        Data::Sparse { extents, .. } => {
            (None, &extents[extents.partition_point(|e| e.offset.saturating_add(e.len) <= off)..])
        }
    };
    let parts = extents.iter().take_while(move |e| e.offset < end).map(move |e| {
        let start = e.offset.max(off);
        let stop = e.offset.saturating_add(e.len).min(end);
        Piece {
            at: (start - off) as usize,
            blob_off: e.blob_offset.saturating_add(start - e.offset),
            len: stop.saturating_sub(start) as usize,
        }
    });
    whole.into_iter().filter(|p| p.len > 0).chain(parts)
}

/// Logs failed reads: each kind of failure at most once in ten seconds, with the number of those left out.
#[derive(Debug, Default)]
struct FailureLog {
    slots: Mutex<[(Option<Instant>, u64); FailureKind::COUNT]>,
    last: Mutex<Option<ReadFailure>>,
}

impl FailureLog {
    const EVERY: Duration = Duration::from_secs(10);

    fn note(&self, error: &CacheError, path: impl FnOnce() -> String) {
        let kind = FailureKind::of(error);
        metrics().errors.with_label_values(&[kind.label()]).inc();
        let path = path();
        let failure = ReadFailure { at: Instant::now(), path: path.clone(), error: error.to_string() };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
        let suppressed = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((last, suppressed)) = slots.get_mut(kind as usize) else { return };
            if last.is_some_and(|at| at.elapsed() < Self::EVERY) {
                *suppressed += 1;
                return;
            }
            *last = Some(Instant::now());
            std::mem::take(suppressed)
        };
        let errno = Errno::of_cache(error).0;
        tracing::warn!(kind = kind.label(), errno, suppressed, path, "a read failed: {error}");
    }
}

#[cfg(test)]
mod tests;
