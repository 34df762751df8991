//! The kernel's side of a FUSE mount: where it is mounted, taking it away, ending its connection. None of it asks the
//! mount's server anything, which may be dead.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};

use crate::fs::mountinfo::MountTable;

/// Device number of what is mounted at `path`, without a request to its server.
pub(super) fn device_of(path: &Path) -> rustix::io::Result<(u32, u32)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::empty())?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// Unmounts `path` if it is still `device` that is mounted there.
pub(super) fn detach(path: &Path, device: (u32, u32)) -> io::Result<()> {
    match device_of(path) {
        Ok(there) if there == device => {}
        Ok(_) | Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // EINVAL: no mount point (any more).
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(error) => Err(io::Error::new(
            io::Error::from(error).kind(),
            format!("unmount {}: {}", path.display(), io::Error::from(error)),
        )),
    }
}

/// The number of the FUSE connection behind a descriptor, where the kernel tells it.
pub(super) fn connection_of(fd: impl AsFd) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("fuse_connection:")?.trim().parse().ok())
}

/// Where a device is mounted, by this process's mountinfo.
pub(super) fn mountpoints_of((major, minor): (u32, u32)) -> io::Result<Vec<PathBuf>> {
    let device = format!("{major}:{minor}");
    let table = MountTable::read()?;
    Ok(table.iter().filter(|mount| mount.device == device).map(|mount| mount.point.clone()).collect())
}

/// Ends a connection through the fusectl filesystem, which need not be mounted for that.
pub(super) fn abort(connection: u32) -> io::Result<()> {
    let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::openat(&root, format!("{connection}/abort"), flags, Mode::empty()) {
        Ok(file) => rustix::io::write(file, b"1").map(drop).map_err(Into::into),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
