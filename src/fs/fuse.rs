//! The kernel adapter: the only place that names fuser. Here a session begins and ends; `adapter` answers its requests.
//!
//! The tree never changes, so the kernel is told to keep all it learns (names, absent names, attributes, directory
//! listings, link targets, pages) for as long as the mount lives, and never to ask before a file or directory is opened.
//! Measured against the defaults that makes warm metadata as fast as a local disk; see docs/architecture.md.

mod adapter;
mod connection;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use self::adapter::Adapter;
use self::connection::{abort, connection_of, detach, device_of, mountpoints_of};
use super::ImageFs;
use crate::metrics::metrics;

/// Largest read that the kernel sends, in bytes: its own cap of 256 pages.
const MAX_READ: u32 = 1 << 20;

/// How long an unmount waits for its users before the connection is aborted.
const UNMOUNT_GRACE: Duration = Duration::from_secs(2);

/// How a filesystem is mounted.
#[derive(Debug, Clone)]
pub struct FuseOptions {
    /// Threads that read requests; 2..=4.
    pub threads: usize,
    /// Read-ahead of the mount in KiB, written to its bdi after the mount.
    pub read_ahead_kb: u32,
    /// The source column in mountinfo.
    pub fs_name: String,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self { threads: 2, read_ahead_kb: 1024, fs_name: "clip-csi".into() }
    }
}

/// A running FUSE session. Dropping it does not unmount: [`FuseServer::unmount`] does.
#[derive(Debug)]
pub struct FuseServer {
    mountpoint: Option<PathBuf>,
    device: Option<(u32, u32)>,
    end: Arc<End>,
    stop: CancellationToken,
}

/// Says that the session's threads have ended.
#[derive(Debug, Default)]
struct End {
    done: Mutex<bool>,
    changed: Condvar,
    token: CancellationToken,
}

impl End {
    fn reached(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
        self.token.cancel();
    }

    /// Whether the end came within `limit`.
    fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        while !*done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            done = self.changed.wait_timeout(done, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl FuseServer {
    /// Mounts at `mountpoint` (read-only, nosuid, nodev, allow_other, default_permissions) and serves. `runtime`: where cold reads run.
    ///
    /// Needs CAP_SYS_ADMIN and /dev/fuse, no fusermount. Blocks for the handshake with the kernel (well under 1 ms).
    pub fn mount(
        fs: Arc<ImageFs>,
        mountpoint: &Path,
        options: &FuseOptions,
        runtime: tokio::runtime::Handle,
    ) -> io::Result<Self> {
        let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
            with_context(
                e,
                "open /dev/fuse",
                "load the kernel module fuse, and run privileged where this is a container",
            )
        })?;
        let data = format!(
            "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions,max_read={MAX_READ}",
            device.as_raw_fd(),
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let data = CString::new(data).map_err(io::Error::from)?;
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount(options.fs_name.as_str(), mountpoint, "fuse.clip", flags, data.as_c_str()).map_err(
            |e| with_context(e, &format!("mount at {}", mountpoint.display()), "mounting needs CAP_SYS_ADMIN (root)"),
        )?;
        match Self::serve(fs, device, Some(mountpoint.to_path_buf()), options, runtime) {
            Ok(server) => Ok(server),
            Err(error) => {
                // Nobody serves it: take it away again. The first error is the one that says why.
                if let Err(e) = rustix::mount::unmount(mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                    tracing::warn!(mountpoint = %mountpoint.display(), "unmount after a failed mount: {e}");
                }
                Err(error)
            }
        }
    }

    /// Serves an already mounted /dev/fuse descriptor whose INIT is still to come. It must have been mounted with
    /// `default_permissions`: the kernel refuses id-mapped mounts, and with them the connection, to a server that checks
    /// permissions by itself.
    pub fn from_fd(
        fs: Arc<ImageFs>,
        fd: OwnedFd,
        options: &FuseOptions,
        runtime: tokio::runtime::Handle,
    ) -> io::Result<Self> {
        Self::serve(fs, fd, None, options, runtime)
    }

    fn serve(
        fs: Arc<ImageFs>,
        fd: OwnedFd,
        mountpoint: Option<PathBuf>,
        options: &FuseOptions,
        runtime: tokio::runtime::Handle,
    ) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let end = Arc::new(End::default());
        let adapter = Adapter { fs, runtime, stop: stop.clone(), no_open: true, no_opendir: true };
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(options.threads.clamp(1, 4));
        let session = Session::from_fd(adapter, fd, SessionACL::All, config)?;
        let connection = connection_of(session.as_fd());
        std::thread::Builder::new().name("fuse".into()).spawn({
            let (end, stop) = (Arc::clone(&end), stop.clone());
            move || {
                metrics().open_mounts.inc();
                // Also when a serving thread panics: whoever waits for the end must hear of it.
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| session.run()));
                metrics().open_mounts.dec();
                match outcome {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!("a FUSE session ended: {error}"),
                    Err(_) => tracing::error!("a FUSE session panicked"),
                }
                stop.cancel();
                end.reached();
            }
        })?;
        // The threads serve from here on. DONT_SYNC all the same: no request to ourselves.
        let device = match &mountpoint {
            Some(path) => device_of(path).ok(),
            None => connection.map(|minor| (0, minor)),
        };
        if let Some((major, minor)) = device {
            let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
            if let Err(error) = std::fs::write(&path, options.read_ahead_kb.to_string()) {
                tracing::debug!(path, "read-ahead stays at the kernel's 128 KiB: {error}");
            }
        }
        Ok(Self { mountpoint, device, end, stop })
    }

    /// True until the kernel ended the session (unmounted, aborted).
    pub fn is_alive(&self) -> bool {
        !self.end.token.is_cancelled()
    }

    /// Ready when the kernel ended the session: somebody unmounted it, or aborted its connection.
    pub fn ended(&self) -> WaitForCancellationFutureOwned {
        self.end.token.clone().cancelled_owned()
    }

    /// Device number of the mount, as stat(2) and mountinfo show it; its minor names the connection in fusectl.
    pub fn device(&self) -> Option<(u32, u32)> {
        self.device
    }

    /// Ends the connection at once: whoever waits for it, or asks it anything from now on, gets ENOTCONN. The mount point
    /// stays until it is unmounted.
    pub fn abort(&self) -> io::Result<()> {
        self.stop.cancel();
        match self.device {
            Some((_, minor)) => abort(minor),
            None => Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel does not tell the FUSE connection")),
        }
    }

    /// Detaches the mount and waits (bounded) for the threads to end.
    ///
    /// Blocks: up to 2 s (`UNMOUNT_GRACE`) while files of the mount are still open; then the connection is aborted and those
    /// readers get ENOTCONN. A mount that is gone already is fine.
    pub fn unmount(self) -> io::Result<()> {
        // Also when the session has ended: an aborted connection leaves its mount point behind, dead.
        match (&self.mountpoint, self.device) {
            (Some(path), Some(device)) => detach(path, device)?,
            (None, Some(device)) => {
                for path in mountpoints_of(device)? {
                    detach(&path, device)?;
                }
            }
            (Some(path), None) if self.is_alive() => {
                rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
            }
            _ => {}
        }
        if self.end.wait(UNMOUNT_GRACE) {
            return Ok(());
        }
        // Cold reads that still wait would keep their readers, and those the mount.
        self.stop.cancel();
        let place = self.mountpoint.as_deref().unwrap_or(Path::new("a given descriptor")).display().to_string();
        let Some((_, minor)) = self.device else {
            return Err(io::Error::other(format!(
                "the FUSE session of {place} does not end, its connection is not known"
            )));
        };
        tracing::warn!(mountpoint = place, "still in use {UNMOUNT_GRACE:?} after the unmount: aborting the connection");
        abort(minor)?;
        if self.end.wait(UNMOUNT_GRACE) {
            Ok(())
        } else {
            Err(io::Error::other(format!("the FUSE session of {place} does not end after its connection was aborted")))
        }
    }
}

fn with_context(error: rustix::io::Errno, what: &str, remedy: &str) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{what}: {error}; {remedy}"))
}
