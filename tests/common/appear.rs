//! Waiting for files and mounts, told by the kernel rather than asked for again and again.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Ready once something lies at `path`, whose directory may be missing too. For a caller with a deadline.
pub async fn appears(path: &Path) {
    let dir = path.parent().expect("the root is there");
    if dir.symlink_metadata().is_err() {
        Box::pin(appears(dir)).await;
    }
    changes_of(dir, || path.symlink_metadata().is_ok()).await;
}

/// Ready once `condition` holds, which is looked at whenever a name comes into `dir`, which has to be there.
pub async fn changes_of(dir: &Path, condition: impl Fn() -> bool) {
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).expect("inotify");
    inotify::add_watch(&watch, dir, WatchFlags::CREATE | WatchFlags::MOVED_TO).expect("the directory is there");
    // SAFETY: it owns the descriptor, which nobody else closes.
    let watch = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) }.expect("a runtime");
    while !condition() {
        let mut ready = watch.readable().await.expect("a runtime");
        while rustix::io::read(watch.as_fd(), &mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {}
        ready.clear_ready();
    }
}

/// Ready once `condition` holds, which is looked at whenever a mount comes or goes in this mount namespace.
pub async fn mounts_change(condition: impl Fn() -> bool) {
    // The kernel says POLLERR and POLLPRI to who has this file open: proc_pid_mounts(5).
    let table = File::open("/proc/self/mountinfo").expect("mountinfo");
    // SAFETY: it owns the descriptor, which nobody else closes.
    let table =
        unsafe { AsyncFd::register_with_interest(table, Interest::PRIORITY | Interest::ERROR) }.expect("a runtime");
    while !condition() {
        table.ready(Interest::PRIORITY | Interest::ERROR).await.expect("a runtime").clear_ready();
    }
}
