//! Unpacking what a filesystem shows into a directory.
//!
//! Nothing is created through a path: every directory is opened from the destination with `openat2` (beneath it, no
//! symlinks, no other filesystem), every name is created in such a descriptor. A symlink in the image is only ever
//! written, never followed; so no image can reach outside of the destination.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{StreamExt as _, TryStreamExt as _};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::ImageFs;
use crate::archive::{Attr, Kind, NodeId};
use crate::cache::CacheError;

/// Files that are fetched and written at once.
const PARALLEL: usize = 8;

/// Bytes of one file that are fetched at once.
const CHUNK: usize = 4 << 20;

/// Why an extraction stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// The destination is there and not empty.
    #[error("{path} is not empty; name a directory that is empty or does not exist")]
    NotEmpty {
        /// The destination.
        path: String,
    },
    /// A file's bytes could not be had.
    #[error("{path}: {source}")]
    Read {
        /// Path in the image.
        path: String,
        /// Why.
        source: CacheError,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// Operation and path.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Names, the root not included.
    pub names: u64,
    /// Bytes of file content written.
    pub bytes: u64,
    /// What this process or that filesystem can't write: owners, device nodes, attributes. One line each kind, with a count.
    pub warnings: Vec<String>,
}

/// Unpacks the shown tree of `fs` into `dest`, which must be empty or not exist (its parent must). Types, modes, owners
/// and devices (as root), times, xattrs, hard links and holes are kept. `progress` hears of bytes as they are written.
/// Stops at the first error and leaves what is there.
pub async fn extract(
    fs: &ImageFs,
    dest: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Extracted, ExtractError> {
    let job = Arc::new(Job {
        fs: fs.clone(),
        root: open_empty(dest)?,
        privileged: rustix::process::geteuid().is_root(),
        left_out: Mutex::default(),
    });
    let nodes = blocking(&job, Job::plan).await?;
    let mut out = Extracted { names: nodes.names, ..Extracted::default() };
    let mut warnings = Warnings::default();
    let plan = Arc::new(nodes);
    blocking(&job, {
        let plan = Arc::clone(&plan);
        move |job| plan.dirs.iter().try_for_each(|dir| job.make_dir(*dir))
    })
    .await?;
    let mut files = futures::stream::iter(plan.others.iter().copied())
        .map(|node| Job::make(Arc::clone(&job), node, progress))
        .buffer_unordered(PARALLEL);
    while let Some((bytes, warning)) = files.try_next().await? {
        out.bytes += bytes;
        warnings.add(warning);
    }
    drop(files);
    warnings = blocking(&job, {
        let plan = Arc::clone(&plan);
        move |job| {
            for (first, name) in &plan.links {
                warnings.add(job.link(*first, *name)?);
            }
            // Bottom up: what is created in a directory changes its times.
            for dir in plan.dirs.iter().rev().chain([&job.fs.root()]) {
                warnings.add(job.finish_dir(*dir)?);
            }
            Ok(warnings)
        }
    })
    .await?;
    out.warnings = warnings.lines();
    Ok(out)
}

async fn blocking<T: Send + 'static>(
    job: &Arc<Job>,
    work: impl FnOnce(&Job) -> Result<T, ExtractError> + Send + 'static,
) -> Result<T, ExtractError> {
    let job = Arc::clone(job);
    tokio::task::spawn_blocking(move || work(&job))
        .await
        .map_err(|e| ExtractError::Io { what: "extract".into(), source: io::Error::other(e) })?
}

/// What can't be done here and stops nothing: not by this user, in this user namespace, or on this filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Warning {
    Owner,
    Device,
    Xattr,
}

#[derive(Debug, Default)]
struct Warnings(HashMap<Warning, u64>);

impl Warnings {
    fn add(&mut self, warnings: Vec<Warning>) {
        warnings.into_iter().for_each(|w| *self.0.entry(w).or_default() += 1);
    }
    fn lines(&self) -> Vec<String> {
        let text = |w: &Warning| match w {
            Warning::Owner => {
                "names belong to you instead of their owner (run as root, outside of user namespaces, to keep owners)"
            }
            Warning::Device => "device nodes were left out (run as root, with CAP_MKNOD, to create them)",
            Warning::Xattr => "extended attributes were left out (not permitted there, not supported or too long)",
        };
        let mut lines: Vec<String> = self.0.iter().map(|(w, n)| format!("{n} {}", text(w))).collect();
        lines.sort();
        lines
    }
}

/// In which order names are made.
#[derive(Debug, Default)]
struct Plan {
    names: u64,
    /// Directories below the root, parents first.
    dirs: Vec<NodeId>,
    /// Everything else; of hard-linked files the name that is made first.
    others: Vec<NodeId>,
    /// (the name that is made first, another name of it).
    links: Vec<(NodeId, NodeId)>,
}

struct Job {
    fs: ImageFs,
    root: OwnedFd,
    privileged: bool,
    /// Names that could not be made: nor can their other names.
    left_out: Mutex<HashSet<NodeId>>,
}

/// Owners that may not be given away, or that have no id in this user namespace.
fn no_such_owner(error: Errno) -> bool {
    matches!(error, Errno::PERM | Errno::INVAL)
}

/// Attributes that this user may not set (or only in another form), and those that the filesystem does not know or has no room for: on ext4 all of
/// a file's have to fit into one block, which is no sign of a full disk.
fn no_such_xattr(error: Errno) -> bool {
    matches!(error, Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)
}

fn open_empty(dest: &Path) -> Result<OwnedFd, ExtractError> {
    let io = |what: &str, e: rustix::io::Errno| ExtractError::Io {
        what: format!("{what} {}", dest.display()),
        source: e.into(),
    };
    match rustix::fs::mkdir(dest, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(e) => return Err(io("create", e)),
    }
    let fd = rustix::fs::open(dest, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| io("open", e))?;
    for entry in rustix::fs::Dir::read_from(&fd).map_err(|e| io("read", e))? {
        let entry = entry.map_err(|e| io("read", e))?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Err(ExtractError::NotEmpty { path: dest.display().to_string() });
        }
    }
    Ok(fd)
}

impl Job {
    fn plan(&self) -> Result<Plan, ExtractError> {
        let tree = self.fs.tree();
        let mut plan = Plan::default();
        let mut made: HashMap<NodeId, NodeId> = HashMap::new();
        let mut at = 0;
        let mut level = vec![self.fs.root()];
        while let Some(dir) = level.get(at).copied() {
            at += 1;
            for id in tree.children(dir).map(NodeId) {
                plan.names += 1;
                let attr = tree.attr(id);
                if attr.kind == Kind::Dir {
                    plan.dirs.push(id);
                    level.push(id);
                    continue;
                }
                match attr.nlink {
                    0 | 1 => plan.others.push(id),
                    _ => match made.get(&tree.inode(id)) {
                        Some(first) => plan.links.push((*first, id)),
                        None => {
                            made.insert(tree.inode(id), id);
                            plan.others.push(id);
                        }
                    },
                }
            }
        }
        Ok(plan)
    }

    /// The path from the shown root; empty for the root itself.
    fn path(&self, node: NodeId) -> Vec<u8> {
        let tree = self.fs.tree();
        let mut parts = Vec::new();
        let mut at = node;
        while at != self.fs.root() {
            parts.push(tree.name(at));
            at = tree.parent(at);
        }
        parts.reverse();
        parts.join(&b'/')
    }

    fn failed(&self, what: &str, node: NodeId, error: impl Into<io::Error>) -> ExtractError {
        let path = self.path(node);
        ExtractError::Io { what: format!("{what} /{}", String::from_utf8_lossy(&path)), source: error.into() }
    }

    /// A directory of the destination, by a walk that nothing leads astray.
    fn open_dir(&self, dir: NodeId) -> Result<OwnedFd, ExtractError> {
        let mut path = self.path(dir);
        if path.is_empty() {
            path.push(b'.');
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        rustix::fs::openat2(&self.root, OsStr::from_bytes(&path), flags, Mode::empty(), resolve)
            .map_err(|e| self.failed("open", dir, e))
    }

    fn parent(&self, node: NodeId) -> Result<OwnedFd, ExtractError> {
        self.open_dir(self.fs.tree().parent(node))
    }

    fn make_dir(&self, dir: NodeId) -> Result<(), ExtractError> {
        let name = OsStr::from_bytes(self.fs.tree().name(dir));
        rustix::fs::mkdirat(self.parent(dir)?, name, Mode::RWXU).map_err(|e| self.failed("create", dir, e))
    }

    fn left_out(&self) -> MutexGuard<'_, HashSet<NodeId>> {
        self.left_out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, first: NodeId, node: NodeId) -> Result<Vec<Warning>, ExtractError> {
        if self.left_out().contains(&first) {
            return Ok(vec![Warning::Device]);
        }
        let (from, to) = (self.parent(first)?, self.parent(node)?);
        let tree = self.fs.tree();
        let (old, new) = (OsStr::from_bytes(tree.name(first)), OsStr::from_bytes(tree.name(node)));
        rustix::fs::linkat(from, old, to, new, AtFlags::empty()).map_err(|e| self.failed("link", node, e))?;
        Ok(Vec::new())
    }

    /// Makes one name that is no directory; gives the bytes written.
    async fn make(
        job: Arc<Self>,
        node: NodeId,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(u64, Vec<Warning>), ExtractError> {
        let attr = job.fs.tree().attr(node);
        if attr.kind != Kind::File {
            return Ok((0, blocking(&job, move |job| job.make_special(node, &attr)).await?));
        }
        let file = blocking(&job, move |job| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = OsStr::from_bytes(job.fs.tree().name(node));
            let file = rustix::fs::openat(job.parent(node)?, name, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|e| job.failed("create", node, e))?;
            rustix::fs::ftruncate(&file, attr.size).map_err(|e| job.failed("write", node, e))?;
            Ok(Arc::new(file))
        })
        .await?;
        let mut written = 0;
        let mut off = 0;
        while let Ok(start) = job.fs.seek_data(node, off) {
            let end = job.fs.seek_hole(node, start).unwrap_or(attr.size);
            off = start;
            while off < end {
                let want = usize::try_from(end - off).map_or(CHUNK, |left| left.min(CHUNK));
                let bytes = job.fs.fetch(node, off, want).await.map_err(|source| ExtractError::Read {
                    path: format!("/{}", String::from_utf8_lossy(&job.path(node))),
                    source,
                })?;
                let len = bytes.len() as u64;
                if len == 0 {
                    break;
                }
                blocking(&job, {
                    let file = Arc::clone(&file);
                    move |job| write_all(&file, &bytes, off).map_err(|e| job.failed("write", node, e))
                })
                .await?;
                off += len;
                written += len;
                progress(len);
            }
            if off < end {
                break;
            }
        }
        let warnings = blocking(&job, move |job| job.finish(file.as_fd(), node, &attr)).await?;
        Ok((written, warnings))
    }

    fn make_special(&self, node: NodeId, attr: &Attr) -> Result<Vec<Warning>, ExtractError> {
        let tree = self.fs.tree();
        let (dir, name) = (self.parent(node)?, OsStr::from_bytes(tree.name(node)));
        let created = match attr.kind {
            Kind::Symlink => rustix::fs::symlinkat(OsStr::from_bytes(tree.target(node)), &dir, name),
            Kind::Fifo => rustix::fs::mknodat(&dir, name, FileType::Fifo, Mode::empty(), 0),
            Kind::Socket => rustix::fs::mknodat(&dir, name, FileType::Socket, Mode::empty(), 0),
            Kind::CharDevice => {
                rustix::fs::mknodat(&dir, name, FileType::CharacterDevice, Mode::empty(), u64::from(attr.rdev))
            }
            Kind::BlockDevice => {
                rustix::fs::mknodat(&dir, name, FileType::BlockDevice, Mode::empty(), u64::from(attr.rdev))
            }
            Kind::File | Kind::Dir => Ok(()),
        };
        match (created, attr.kind) {
            (Ok(()), _) => {}
            (Err(Errno::PERM), Kind::CharDevice | Kind::BlockDevice) => {
                self.left_out().insert(node);
                return Ok(vec![Warning::Device]);
            }
            (Err(e), _) => return Err(self.failed("create", node, e)),
        }
        let owner = || rustix::fs::chownat(&dir, name, uid(attr.uid), gid(attr.gid), AtFlags::SYMLINK_NOFOLLOW);
        let mut warnings = self.give_away(node, attr, owner)?;
        if attr.kind != Kind::Symlink {
            // The node was made here a moment ago and is no symlink: nothing can be followed.
            rustix::fs::chmodat(&dir, name, mode(attr), AtFlags::empty())
                .map_err(|e| self.failed("change the mode of", node, e))?;
        }
        for (attribute, value) in tree.xattrs(node) {
            // No call sets one by a name in a directory: this path is the directory's descriptor and the name, which is not followed.
            let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
            path.extend_from_slice(name.as_bytes());
            match rustix::fs::lsetxattr(path, OsStr::from_bytes(attribute), value, XattrFlags::empty()) {
                Ok(()) => {}
                // Where there is no /proc it can't be done.
                Err(e) if no_such_xattr(e) || e == Errno::NOENT => warnings.push(Warning::Xattr),
                Err(e) => return Err(self.failed("set an extended attribute of", node, e)),
            }
        }
        rustix::fs::utimensat(&dir, name, &times(attr), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.failed("set the times of", node, e))?;
        Ok(warnings)
    }

    /// Gives a name to its owner with `chown`, where this process may try.
    fn give_away(
        &self,
        node: NodeId,
        attr: &Attr,
        chown: impl FnOnce() -> rustix::io::Result<()>,
    ) -> Result<Vec<Warning>, ExtractError> {
        if !self.privileged {
            let own = attr.uid == rustix::process::geteuid().as_raw();
            return Ok(if own { Vec::new() } else { vec![Warning::Owner] });
        }
        match chown() {
            Ok(()) => Ok(Vec::new()),
            Err(e) if no_such_owner(e) => Ok(vec![Warning::Owner]),
            Err(e) => Err(self.failed("change the owner of", node, e)),
        }
    }

    fn finish_dir(&self, dir: NodeId) -> Result<Vec<Warning>, ExtractError> {
        let fd = self.open_dir(dir)?;
        self.finish(fd.as_fd(), dir, &self.fs.tree().attr(dir))
    }

    /// Owner, attributes, mode, times: in this order, since each of them undoes a later one.
    fn finish(&self, fd: std::os::fd::BorrowedFd<'_>, node: NodeId, attr: &Attr) -> Result<Vec<Warning>, ExtractError> {
        let mut warnings = self.give_away(node, attr, || rustix::fs::fchown(fd, uid(attr.uid), gid(attr.gid)))?;
        for (name, value) in self.fs.tree().xattrs(node) {
            match rustix::fs::fsetxattr(fd, OsStr::from_bytes(name), value, XattrFlags::empty()) {
                Ok(()) => {}
                Err(e) if no_such_xattr(e) => warnings.push(Warning::Xattr),
                Err(e) => return Err(self.failed("set an extended attribute of", node, e)),
            }
        }
        rustix::fs::fchmod(fd, mode(attr)).map_err(|e| self.failed("change the mode of", node, e))?;
        rustix::fs::futimens(fd, &times(attr)).map_err(|e| self.failed("set the times of", node, e))?;
        Ok(warnings)
    }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut off: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, off) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = bytes.get(n..).unwrap_or_default();
                off += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// -1 is no id (the kernel reads it as "leave it").
fn uid(id: u32) -> Option<Uid> {
    (id != u32::MAX).then(|| Uid::from_raw(id))
}

fn gid(id: u32) -> Option<Gid> {
    (id != u32::MAX).then(|| Gid::from_raw(id))
}

fn mode(attr: &Attr) -> Mode {
    Mode::from_raw_mode(u32::from(attr.mode & 0o7777))
}

fn times(attr: &Attr) -> Timestamps {
    let time = |t: crate::archive::Timestamp| Timespec { tv_sec: t.sec, tv_nsec: t.nsec.min(999_999_999).into() };
    Timestamps { last_access: time(attr.atime), last_modification: time(attr.mtime) }
}
