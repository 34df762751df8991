//! The kernel's requests, answered from an [`ImageFs`]: warm ones on the thread that read them, cold ones from a task.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::MAX_READ;
use crate::archive::{Kind, NodeId, Timestamp};
use crate::fs::ImageFs;
use crate::fs::image_fs::Errno;

/// How long the kernel may keep what it was told. The tree is immutable: longer than any mount lives. 100 years.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Read-ahead and other asynchronous requests that the kernel keeps in flight. Cold reads wait for the network, so this
/// is how many ranges are fetched at once for one mount.
const MAX_BACKGROUND: u16 = 64;

/// Longest name that the kernel takes from a FUSE server (`FUSE_NAME_MAX`); a longer one would fail the whole listing.
const NAME_MAX: usize = 1024;

/// Block size that stat(2) and statfs(2) report.
const BLOCK_SIZE: u32 = 4096;

/// Answers the kernel's requests from an [`ImageFs`].
pub(super) struct Adapter {
    pub(super) fs: Arc<ImageFs>,
    pub(super) runtime: tokio::runtime::Handle,
    /// Ends the cold reads in flight.
    pub(super) stop: CancellationToken,
    /// Whether ENOSYS to OPEN and OPENDIR means "never ask again" to this kernel.
    pub(super) no_open: bool,
    pub(super) no_opendir: bool,
}

thread_local! {
    /// One buffer per serving thread, as large as the largest read so far: a warm read allocates nothing.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.0)
}

fn time(t: Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(t.nsec.min(999_999_999)));
    let seconds = Duration::from_secs(t.sec.unsigned_abs());
    let whole = if t.sec < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

/// A name of a listing; the cookie of an entry is its index + 1, so that a listing goes on anywhere at no cost.
enum Listed<'a> {
    Dot,
    DotDot,
    Child(NodeId, &'a [u8]),
}

impl Adapter {
    fn node(&self, ino: INodeNo) -> Result<NodeId, fuser::Errno> {
        // A number that the tree does not have was never handed out by this server.
        self.fs.node(ino.0).ok_or(fuser::Errno::ESTALE)
    }

    fn dir(&self, ino: INodeNo) -> Result<NodeId, fuser::Errno> {
        let node = self.node(ino)?;
        if self.fs.tree().attr(node).kind == Kind::Dir { Ok(node) } else { Err(fuser::Errno::ENOTDIR) }
    }

    fn attr(&self, node: NodeId) -> FileAttr {
        let attr = self.fs.tree().attr(node);
        FileAttr {
            ino: INodeNo(self.fs.ino(node)),
            size: attr.size,
            blocks: self.fs.blocks(node),
            atime: time(attr.atime),
            mtime: time(attr.mtime),
            ctime: time(attr.ctime),
            crtime: UNIX_EPOCH,
            kind: file_type(attr.kind),
            perm: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            blksize: BLOCK_SIZE,
            flags: 0,
        }
    }

    /// "There is no such name, and there never will be": an entry without inode, kept like any other.
    fn absent() -> FileAttr {
        FileAttr {
            ino: INodeNo(0),
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: FileType::RegularFile,
            perm: 0,
            nlink: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 0,
            flags: 0,
        }
    }

    /// Hands the entries of a directory from index `from` on to `add`, with their cookies, until it says that it is full.
    fn list(&self, dir: NodeId, from: u64, mut add: impl FnMut(u64, Listed<'_>) -> bool) {
        let tree = self.fs.tree();
        let children = tree.children(dir);
        if from == 0 && add(1, Listed::Dot) {
            return;
        }
        if from <= 1 && add(2, Listed::DotDot) {
            return;
        }
        let skip = u32::try_from(from.saturating_sub(2)).unwrap_or(u32::MAX);
        let first = children.start.saturating_add(skip);
        for id in first..children.end.max(first) {
            let cookie = u64::from(id - children.start) + 3;
            let name = tree.name(NodeId(id));
            if name.len() <= NAME_MAX && add(cookie, Listed::Child(NodeId(id), name)) {
                return;
            }
        }
    }

    fn xattr_reply(value: &[u8], size: u32, reply: ReplyXattr) {
        match u32::try_from(value.len()) {
            Err(_) => reply.error(fuser::Errno::E2BIG),
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if len > size => reply.error(fuser::Errno::ERANGE),
            Ok(_) => reply.data(value),
        }
    }

    fn opened(ask_again: bool, flags: FopenFlags, reply: ReplyOpen) {
        if ask_again { reply.opened(FileHandle(0), flags) } else { reply.error(fuser::Errno::ENOSYS) }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let have = config.capabilities();
        self.no_open = have.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.no_opendir = have.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        // READDIRPLUS without READDIRPLUS_AUTO: always, which is twice as fast for a cold walk. IDMAP: pods in user
        // namespaces see their own ids (the kernel maps; permissions are its to check anyway).
        let wanted = InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_ALLOW_IDMAP;
        let refused = |what: &str, value: u64| io::Error::other(format!("{what} is refused, the nearest is {value}"));
        config.add_capabilities(wanted & have).map_err(|flags| refused("a capability of the kernel", flags.bits()))?;
        // No write will come; the largest *read* follows from this too.
        config.set_max_write(MAX_READ).map_err(|near| refused("max_write", near.into()))?;
        config.set_max_background(MAX_BACKGROUND).map_err(|near| refused("max_background", near.into()))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.dir(parent) {
            Ok(dir) => {
                let attr = self.fs.tree().lookup(dir, name.as_bytes()).map_or_else(Self::absent, |id| self.attr(id));
                reply.entry(&FOREVER, &attr, Generation(0));
            }
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino) {
            Ok(node) => reply.attr(&FOREVER, &self.attr(node)),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.node(ino) {
            Ok(node) if self.fs.tree().attr(node).kind == Kind::Symlink => reply.data(self.fs.tree().target(node)),
            Ok(_) => reply.error(fuser::Errno::EINVAL),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        Self::opened(!self.no_open, FopenFlags::FOPEN_KEEP_CACHE, reply);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        Self::opened(!self.no_opendir, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR, reply);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(error),
        };
        let size = size as usize;
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let Some(buffer) = buffer.get_mut(..size) else { return reply.error(fuser::Errno::EINVAL) };
            match self.fs.try_read(node, offset, buffer) {
                Ok(Some(len)) => reply.data(buffer.get(..len).unwrap_or_default()),
                Ok(None) => {
                    let read = self.fs.read_later(node, offset, size);
                    let stop = self.stop.clone();
                    let span = tracing::debug_span!("cold_read", ino = ino.0, offset, size);
                    self.runtime.spawn(
                        async move {
                            match stop.run_until_cancelled(read).await {
                                Some(Ok(bytes)) => reply.data(&bytes),
                                Some(Err(error)) => reply.error(errno(error)),
                                None => reply.error(fuser::Errno::EIO),
                            }
                        }
                        .instrument(span),
                    );
                }
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let dir = match self.dir(ino) {
            Ok(dir) => dir,
            Err(error) => return reply.error(error),
        };
        self.list(dir, offset, |cookie, entry| {
            let (node, name) = match entry {
                Listed::Dot => (dir, &b"."[..]),
                Listed::DotDot => (self.fs.parent(dir), &b".."[..]),
                Listed::Child(id, name) => (id, name),
            };
            let kind = file_type(self.fs.tree().attr(node).kind);
            reply.add(INodeNo(self.fs.ino(node)), cookie, kind, OsStr::from_bytes(name))
        });
        reply.ok();
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let dir = match self.dir(ino) {
            Ok(dir) => dir,
            Err(error) => return reply.error(error),
        };
        self.list(dir, offset, |cookie, entry| {
            let (node, name) = match entry {
                Listed::Dot => (dir, &b"."[..]),
                Listed::DotDot => (self.fs.parent(dir), &b".."[..]),
                Listed::Child(id, name) => (id, name),
            };
            let attr = self.attr(node);
            reply.add(attr.ino, cookie, OsStr::from_bytes(name), &FOREVER, &attr, Generation(0))
        });
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let stat = self.fs.statfs();
        let blocks = stat.bytes.div_ceil(u64::from(BLOCK_SIZE));
        reply.statfs(blocks, 0, 0, stat.inodes, 0, BLOCK_SIZE, 255, BLOCK_SIZE);
    }

    /// Where the whole tree has no attribute at all, the kernel is told so once (ENOSYS) and never asks again: `ls` and
    /// overlays ask for one on nearly every name.
    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.fs.has_xattrs() {
            return reply.error(fuser::Errno::ENOSYS);
        }
        match self.node(ino) {
            Ok(node) => match self.fs.xattr(node, name.as_bytes()) {
                Some(value) => Self::xattr_reply(value, size, reply),
                None => reply.error(fuser::Errno::NO_XATTR),
            },
            Err(error) => reply.error(error),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.node(ino) {
            Ok(node) => {
                let all = self.fs.tree().xattrs(node).iter();
                let names: Vec<u8> = all.flat_map(|(name, _)| name.iter().copied().chain([0])).collect();
                Self::xattr_reply(&names, size, reply);
            }
            Err(error) => reply.error(error),
        }
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let found = self.node(ino).and_then(|node| {
            let off = u64::try_from(offset).map_err(|_| fuser::Errno::ENXIO)?;
            let found = match whence {
                libc::SEEK_DATA => self.fs.seek_data(node, off),
                libc::SEEK_HOLE => self.fs.seek_hole(node, off),
                _ => Err(Errno::INVAL),
            };
            i64::try_from(found.map_err(errno)?).map_err(|_| fuser::Errno::EOVERFLOW)
        });
        match found {
            Ok(at) => reply.offset(at),
            Err(error) => reply.error(error),
        }
    }

    // Nothing to do at close; ENOSYS makes the kernel stop asking.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }
    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }
    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }
    fn access(&self, _: &Request, _: INodeNo, _: fuser::AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }
    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(fuser::Errno::ENOSYS);
    }
    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    // The kernel refuses writes to a read-only mount before they come here; a descriptor that was mounted by somebody
    // else may be another matter.
    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<fuser::TimeOrNow>,
        _: Option<fuser::TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(fuser::Errno::EROFS);
    }
    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }
    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }
    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }
    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }
    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }
    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::EROFS);
    }
    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(fuser::Errno::EROFS);
    }
    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: fuser::WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(fuser::Errno::EROFS);
    }
    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(fuser::Errno::EROFS);
    }
    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }
    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }
    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EROFS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_beyond_reason_do_not_panic() {
        let minus = time(Timestamp { sec: -2, nsec: 250_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(minus).unwrap(), Duration::from_millis(1750));
        time(Timestamp { sec: i64::MIN, nsec: u32::MAX });
        time(Timestamp { sec: i64::MAX, nsec: u32::MAX });
    }
}
