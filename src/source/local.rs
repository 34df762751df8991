//! Local files, read by range. On a node only below the configured roots.

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::ReadWriteFlags;

use super::{BlobSource, BlobStat, SourceError, policy};
use crate::metrics::metrics;

/// Bytes per piece of [`BlobSource::stream`]: large enough that the hop to the blocking pool does not show.
const STREAM_PIECE: u64 = 1 << 20;

/// Which files may be opened.
#[derive(Debug, Clone)]
pub struct Roots(Option<Arc<[PathBuf]>>);

impl Roots {
    /// Every file that the process may read: the shell, and files of the driver's own.
    pub fn any() -> Self {
        Self(None)
    }

    /// Files below one of `roots` only. Symbolic links are followed as long as they stay below that root.
    pub fn below(roots: &[PathBuf]) -> Self {
        Self(Some(roots.into()))
    }

    /// Opens a regular file for reading. Never blocks on a fifo, never becomes a controlling terminal.
    pub fn open(&self, path: &Path) -> Result<File, SourceError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file: File = match &self.0 {
            None => rustix::fs::open(path, flags, Mode::empty()),
            Some(roots) => {
                let root = root_of(roots, path)?;
                let inside = path.strip_prefix(root).unwrap_or(Path::new(""));
                let dir = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(root, dir, Mode::empty()).and_then(|root| {
                    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                    rustix::fs::openat2(root, inside, flags, Mode::empty(), stay)
                })
            }
        }
        .map_err(|error| match error {
            rustix::io::Errno::XDEV | rustix::io::Errno::LOOP => refused(path, "it leads out of its archive root"),
            other => SourceError::of_io(path.display(), &other.into()),
        })?
        .into();
        let meta = file.metadata().map_err(|e| SourceError::of_io(path.display(), &e))?;
        if !meta.is_file() {
            let detail = if meta.is_dir() {
                "is a directory, a file is needed (write oci:DIR for an OCI layout)"
            } else {
                "is not a regular file"
            };
            return Err(SourceError::Invalid { what: path.display().to_string(), detail: detail.into() });
        }
        Ok(file)
    }
}

fn root_of<'a>(roots: &'a [PathBuf], path: &Path) -> Result<&'a Path, SourceError> {
    if !policy::is_plain_absolute(path) {
        return Err(refused(path, "volumes name files by absolute paths without `..`"));
    }
    roots
        .iter()
        .map(PathBuf::as_path)
        .filter(|root| path.starts_with(root) && path != *root)
        .max_by_key(|root| root.as_os_str().len())
        .ok_or_else(|| refused(path, "it does not lie below a configured archive root"))
}

fn refused(path: &Path, why: &str) -> SourceError {
    let detail = format!("{why}; sources.archiveRoots lists the directories that volumes may use");
    SourceError::Refused { what: path.display().to_string(), detail }
}

/// What tells that a file is still the one that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        let m = file.metadata()?;
        Ok(Self { dev: m.dev(), ino: m.ino(), size: m.size(), mtime: (m.mtime(), m.mtime_nsec()) })
    }
}

/// A local file, or a run of bytes of one (a blob in an archived OCI layout). Cheap to clone.
#[derive(Debug, Clone)]
pub struct LocalFile {
    inner: Arc<Inner>,
    start: u64,
    len: u64,
    /// What the run of bytes is; `None`: the whole file.
    part: Option<Arc<str>>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    path: PathBuf,
    stamp: Stamp,
}

impl LocalFile {
    /// Opens a file of the driver's or the user's own, without asking a policy. Blocks for an open and a stat.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        Self::open_in(path, &Roots::any())
    }

    /// Opens a file that `roots` allow. Blocks for an open and a stat.
    pub fn open_in(path: &Path, roots: &Roots) -> Result<Self, SourceError> {
        let file = roots.open(path)?;
        let stamp = Stamp::of(&file).map_err(|e| SourceError::of_io(path.display(), &e))?;
        let inner = Arc::new(Inner { file, path: path.to_owned(), stamp });
        Ok(Self { inner, start: 0, len: stamp.size, part: None })
    }

    /// The bytes `start..start + len` of the file, named `part` in messages.
    pub(super) fn part(&self, start: u64, len: u64, part: &str) -> Result<Self, SourceError> {
        let end = start.checked_add(len).filter(|end| *end <= self.len);
        if end.is_none() {
            let detail = format!("{part} would end after the file's {} bytes; is it truncated?", self.len);
            return Err(SourceError::Corrupt { what: self.describe(), detail });
        }
        Ok(Self { inner: self.inner.clone(), start: self.start + start, len, part: Some(part.into()) })
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// [`BlobSource::read_range`] on the calling thread. The range must be checked (see [`Self::check`]).
    pub(super) fn read_blocking(&self, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        self.check(&range)?;
        let mut buf = vec![0; (range.end - range.start) as usize];
        self.inner.file.read_exact_at(&mut buf, self.start + range.start).map_err(|e| self.io(&e))?;
        self.unchanged()?;
        Ok(buf)
    }

    fn check(&self, range: &Range<u64>) -> Result<(), SourceError> {
        if range.start > range.end || range.end > self.len {
            let detail = format!(
                "bytes {}..{} were asked for and it has {}; is it truncated?",
                range.start, range.end, self.len
            );
            return Err(SourceError::Corrupt { what: self.describe(), detail });
        }
        Ok(())
    }

    /// The bytes if they are in the page cache, without ever waiting for a disk.
    fn read_now(&self, range: &Range<u64>) -> Option<Vec<u8>> {
        let mut buf = vec![0; (range.end - range.start) as usize];
        let at = self.start + range.start;
        let got =
            rustix::io::preadv2(&self.inner.file, &mut [IoSliceMut::new(&mut buf)], at, ReadWriteFlags::NOWAIT).ok()?;
        (got == buf.len()).then_some(buf)
    }

    fn unchanged(&self) -> Result<(), SourceError> {
        let now = Stamp::of(&self.inner.file).map_err(|e| self.io(&e))?;
        if now != self.inner.stamp {
            let detail = "the file was changed while it was in use; write a new file and rename it into place instead";
            return Err(SourceError::Corrupt { what: self.describe(), detail: detail.into() });
        }
        Ok(())
    }

    fn io(&self, error: &std::io::Error) -> SourceError {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            let detail = "the file was truncated while it was in use".into();
            return SourceError::Corrupt { what: self.describe(), detail };
        }
        SourceError::of_io(self.describe(), error)
    }
}

#[async_trait]
impl BlobSource for LocalFile {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        self.check(&range)?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        metrics().range_gets.with_label_values(&["file"]).inc();
        let bytes = match self.read_now(&range) {
            Some(bytes) => {
                self.unchanged()?;
                bytes
            }
            None => {
                let this = self.clone();
                blocking(&self.describe(), move || this.read_blocking(range)).await?
            }
        };
        metrics().range_get_bytes.with_label_values(&["file"]).inc_by(bytes.len() as u64);
        Ok(bytes.into())
    }

    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        self.check(&(offset..self.len))?;
        let this = self.clone();
        Ok(futures::stream::try_unfold(offset, move |at| {
            let this = this.clone();
            async move {
                if at == this.len {
                    return Ok(None);
                }
                let end = this.len.min(at + STREAM_PIECE);
                Ok(Some((this.read_range(at..end).await?, end)))
            }
        })
        .boxed())
    }

    async fn stat(&self) -> Result<BlobStat, SourceError> {
        let Stamp { dev, ino, size, mtime } = self.inner.stamp;
        let mut identity = format!("dev={dev},ino={ino},size={size},mtime={}.{:09}", mtime.0, mtime.1);
        if self.part.is_some() {
            identity.push_str(&format!(",bytes={}+{}", self.start, self.len));
        }
        Ok(BlobStat { size: self.len, identity })
    }

    fn describe(&self) -> String {
        match &self.part {
            Some(part) => format!("{part} in {}", self.inner.path.display()),
            None => self.inner.path.display().to_string(),
        }
    }
}

/// Runs file-system work where it may wait for a disk.
pub(super) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SourceError::Io { what: what.into(), detail: format!("the file task ended early: {error}") }),
    }
}

/// Copies `file` to `dest`: a temporary file beside it, flushed, then renamed. `create_only`: never over an existing file.
pub(super) fn put(
    dest: &Path,
    file: &Path,
    create_only: bool,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), SourceError> {
    use std::io::{Read, Write};
    let io = |what: &Path, e: &std::io::Error| SourceError::of_io(what.display(), e);
    let parent = dest.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut from = Roots::any().open(file)?;
    let mode = from.metadata().map_err(|e| io(file, &e))?.permissions();
    std::fs::create_dir_all(parent).map_err(|e| io(parent, &e))?;
    let mut temporary =
        tempfile::Builder::new().prefix(".clip-put-").tempfile_in(parent).map_err(|e| io(parent, &e))?;
    let mut buf = vec![0; 1 << 20];
    loop {
        let n = from.read(&mut buf).map_err(|e| io(file, &e))?;
        let Some(piece) = buf.get(..n).filter(|p| !p.is_empty()) else { break };
        temporary.write_all(piece).map_err(|e| io(dest, &e))?;
        progress(n as u64);
    }
    let out = temporary.as_file();
    out.set_permissions(mode).and_then(|()| out.sync_all()).map_err(|e| io(dest, &e))?;
    let moved = if create_only { temporary.persist_noclobber(dest) } else { temporary.persist(dest) };
    moved.map_err(|e| match e.error.kind() {
        std::io::ErrorKind::AlreadyExists => SourceError::Exists { what: dest.display().to_string() },
        _ => io(dest, &e.error),
    })?;
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| io(parent, &e))
}

/// Deletes a file; absent is fine.
pub(super) fn delete(path: &Path) -> Result<(), SourceError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(SourceError::of_io(path.display(), &e)),
        _ => Ok(()),
    }
}

/// When a file was last written; `None`: it is not there.
pub(super) fn written(path: &Path) -> Result<Option<SystemTime>, SourceError> {
    match std::fs::metadata(path).and_then(|meta| meta.modified()) {
        Ok(written) => Ok(Some(written)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(SourceError::of_io(path.display(), &e)),
    }
}

/// The regular files below `prefix`, at any depth, sorted, with when each was last written; an absent directory is empty. Symbolic links are not followed.
pub(super) fn list(prefix: &Path) -> Result<Vec<(PathBuf, SystemTime)>, SourceError> {
    let mut found = Vec::new();
    let mut dirs = vec![prefix.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(SourceError::of_io(dir.display(), &e)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| SourceError::of_io(dir.display(), &e))?;
            match entry.file_type() {
                Ok(t) if t.is_dir() => dirs.push(entry.path()),
                // One that went since is no file any more.
                Ok(t) if t.is_file() => {
                    if let Ok(written) = entry.metadata().and_then(|meta| meta.modified()) {
                        found.push((entry.path(), written));
                    }
                }
                _ => {}
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[tokio::test]
    async fn ranges_are_exact_and_a_range_past_the_end_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let source = LocalFile::open(&file(dir.path(), "a", &data)).unwrap();
        assert_eq!(source.read_range(10..70_000).await.unwrap(), data[10..70_000]);
        assert!(source.read_range(7..7).await.unwrap().is_empty());
        let error = source.read_range(99_999..100_001).await.unwrap_err();
        assert!(matches!(&error, SourceError::Corrupt { what, .. } if what.ends_with("/a")), "{error}");
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = source.read_range(9..8).await;
        assert!(backwards.is_err());
        assert!(source.read_range(u64::MAX - 1..u64::MAX).await.is_err());
    }

    #[tokio::test]
    async fn a_stream_is_the_rest_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let data = vec![7; 3 * STREAM_PIECE as usize + 5];
        let source = LocalFile::open(&file(dir.path(), "a", &data)).unwrap();
        let pieces: Vec<_> = source.stream(3).await.unwrap().collect().await;
        let total: usize = pieces.into_iter().map(|p| p.unwrap().len()).sum();
        assert_eq!(total, data.len() - 3);
        assert!(source.stream(data.len() as u64).await.unwrap().next().await.is_none());
    }

    #[tokio::test]
    async fn a_file_that_is_changed_in_place_is_never_read_as_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "a", b"old content");
        let source = LocalFile::open(&path).unwrap();
        let before = source.stat().await.unwrap();
        std::fs::write(&path, b"new content, longer").unwrap();
        assert_eq!(source.read_range(0..5).await.unwrap_err().kind(), "corrupt");
        assert_ne!(before, LocalFile::open(&path).unwrap().stat().await.unwrap());
    }

    #[test]
    fn untrusted_paths_stay_below_the_archive_roots() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        file(&base, "secret", b"s");
        file(&base, "root/sub/a.clip", b"a");
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, base.join(name)).unwrap();
        link("sub/a.clip", "root/inside");
        link("../secret", "root/outside");
        link("/etc/passwd", "root/absolute");
        link("/proc/self/root/etc/passwd", "root/magic");
        let roots = Roots::below(&[base.join("root")]);
        let kind = |path: PathBuf| roots.open(&path).map(|_| "ok").unwrap_or_else(|e| e.kind());
        assert_eq!(kind(base.join("root/sub/a.clip")), "ok");
        assert_eq!(kind(base.join("root/inside")), "ok");
        assert_eq!(kind(base.join("root/none")), "not_found");
        for bad in ["secret", "root/outside", "root/absolute", "root/magic", "root/../secret", "root2", "root"] {
            assert_eq!(kind(base.join(bad)), "refused", "{bad}");
        }
        assert_eq!(kind("root/sub/a.clip".into()), "refused");
        let none = Roots::below(&[]);
        let error = none.open(&base.join("root/sub/a.clip")).unwrap_err();
        assert!(error.to_string().contains("archiveRoots"), "{error}");
    }

    #[test]
    fn fifos_and_directories_are_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert_eq!(Roots::any().open(&fifo).unwrap_err().kind(), "invalid");
        assert_eq!(Roots::any().open(dir.path()).unwrap_err().kind(), "invalid");
    }

    #[test]
    fn put_replaces_or_creates_but_never_half() {
        let dir = tempfile::tempdir().unwrap();
        let from = file(dir.path(), "from", b"content");
        let to = dir.path().join("deep/er/to");
        put(&to, &from, true, &|_| {}).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"content");
        assert!(matches!(put(&to, &from, true, &|_| {}), Err(SourceError::Exists { .. })));
        std::fs::write(&from, b"second").unwrap();
        put(&to, &from, false, &|_| {}).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"second");
        let listed: Vec<_> = list(&dir.path().join("deep")).unwrap().into_iter().map(|(path, _)| path).collect();
        assert_eq!(listed, std::slice::from_ref(&to));
        delete(&to).unwrap();
        delete(&to).unwrap();
        assert!(list(&dir.path().join("deep")).unwrap().is_empty());
    }
}
