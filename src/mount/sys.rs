//! The system calls of mounting, each in the smallest wrapper. All of them block: never on an async thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

/// A detached copy of the mount at `root`, or of the directory or file `inside` it, made read-only, nosuid and nodev.
/// Dropping it ends the copy; nothing is visible anywhere until [`attach`].
///
/// `inside` is a path that the index has resolved: it holds no symlink. Should the filesystem see one there all the same
/// (or a mount point, or `..`), the kernel refuses it.
pub(super) fn clone_tree(root: &Path, inside: Option<&Path>) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut place = openat(CWD, root, flags | OFlags::DIRECTORY, Mode::empty())?;
    if let Some(inside) = inside {
        let resolve =
            ResolveFlags::IN_ROOT | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        place = openat2(&place, inside, flags, Mode::empty(), resolve)?;
    }
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(&place, "", clone)?;
    match restrict(&tree) {
        // Linux before 5.12: the copy has the flags of the shared mount, and the caller checks them in mountinfo.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
        other => other?,
    }
    Ok(tree)
}

/// Read-only, nosuid, nodev; and private, so that what somebody mounts inside one target is not seen in the others.
fn restrict(tree: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated literal, and `attributes` is a whole mount_attr of the size that is passed; the
    // kernel reads both during the call only. The descriptor is borrowed, so it is open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a detached mount to `target`, itself no symlink; on top of what is mounted there.
pub(super) fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    move_to(tree, target, MoveMountFlags::empty())
}

/// Attaches a detached mount beneath the topmost mount of `target`: it is seen once that one is detached. Linux 6.5; EINVAL
/// before.
pub(super) fn attach_beneath(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    move_to(tree, target, MoveMountFlags::MOVE_MOUNT_BENEATH)
}

fn move_to(tree: &OwnedFd, target: &Path, flags: MoveMountFlags) -> io::Result<()> {
    let target = openat(CWD, target, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let by_descriptors = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", by_descriptors | flags)?)
}

/// Takes the topmost mount away from `path`, at once, also a dead or a busy one. Nothing mounted there: fine.
pub(super) fn detach(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // EINVAL: no mount point.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        other => Ok(other?),
    }
}

/// Takes the directory for this process, until the file is dropped. `Ok(None)`: another process has it.
pub(super) fn lock_dir(dir: &Path) -> io::Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether a filesystem answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Liveness {
    /// It does.
    Alive,
    /// Its server is gone (ENOTCONN), or does not answer in time.
    Dead,
}

/// Asks the filesystem mounted at `path` for its statfs. A FUSE filesystem whose server is gone says ENOTCONN at once;
/// one whose server hangs holds the asking thread, so that thread is left behind after `deadline`.
pub(super) fn probe(path: &Path, deadline: Duration) -> Liveness {
    let (send, receive) = mpsc::channel();
    let path = path.to_owned();
    let asked = std::thread::Builder::new().name("mount-probe".into()).spawn(move || {
        let _ = send.send(rustix::fs::statfs(&path));
    });
    match asked.map(|_| receive.recv_timeout(deadline)) {
        Ok(Ok(Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED))) | Ok(Err(_)) => Liveness::Dead,
        // Any other answer is an answer; and where no thread can be had, nothing is known, so nothing is taken away.
        Ok(Ok(_)) | Err(_) => Liveness::Alive,
    }
}
