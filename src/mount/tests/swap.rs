//! How a new mount takes the place of a dead one: at no moment is the directory beneath to be seen.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::*;
use crate::fs::mountinfo::MountTable;

/// Device of what a path shows. Asks no filesystem anything.
fn device(path: &Path) -> (u32, u32) {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let found = statx(CWD, path, flags, StatxFlags::empty()).unwrap();
    (found.stx_dev_major, found.stx_dev_minor)
}

/// Looks at a path all the time.
struct Watch {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<usize>,
}

impl Watch {
    /// Counts how often `target` shows the filesystem of its parent, so nothing that is mounted there.
    fn start(target: &Path) -> Self {
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (path, beneath) = (target.to_owned(), device(target.parent().unwrap()));
        let (ends, looked) = (stop.clone(), looks.clone());
        let thread = std::thread::spawn(move || {
            let mut empty = 0;
            while !ends.load(Ordering::Relaxed) {
                empty += usize::from(device(&path) == beneath);
                looked.fetch_add(1, Ordering::Relaxed);
            }
            empty
        });
        Self { stop, looks, thread }
    }

    fn looked(&self) -> usize {
        self.looks.load(Ordering::Relaxed)
    }

    /// How often it saw nothing, of how many looks.
    fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        (self.thread.join().unwrap(), self.looks.load(Ordering::Relaxed))
    }
}

fn own_mounts_at(point: &Path) -> usize {
    MountTable::read().unwrap().iter().filter(|mount| mount.point == point).count()
}

fn server(before_6_5: bool) -> Arc<Fake> {
    Arc::new(Fake { before_6_5, ..Fake::default() })
}

/// Restarts of the plugin, one after the other, while somebody looks at a target.
async fn restarts(before_6_5: bool, mounts_left: usize) {
    let Some(sandbox) = Sandbox::new() else { return };
    let target = sandbox.target("t");
    let mut manager = sandbox.manager(&server(before_6_5));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    let watch = Watch::start(&target);
    let mut watched = 0;
    for round in 0.. {
        drop(manager);
        manager = sandbox.manager(&server(before_6_5));
        let before = watch.looked();
        assert_eq!(manager.recover().await.rebound, std::slice::from_ref(&target));
        assert!((1..=mounts_left).contains(&own_mounts_at(&target)), "they pile up: {:?}", sandbox.mounts());
        assert_eq!(manager.stats(&target).await.unwrap().abnormal, None);
        // A busy machine does not let the other thread look each time.
        watched += u32::from(watch.looked() > before + 1);
        if watched >= 20 {
            break;
        }
        assert!(round < 2000, "nobody looks");
    }
    let (empty, looks) = watch.end();
    assert_eq!(empty, 0, "of {looks} looks so many saw the empty directory");
    manager.unpublish(&target).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_is_never_empty_while_a_restarted_plugin_binds_it_again() {
    restarts(false, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_on_a_kernel_that_can_not_mount_beneath_and_dead_mounts_do_not_pile_up() {
    restarts(true, 2).await;
}

#[tokio::test]
async fn every_copy_of_a_shared_target_has_the_new_mount_and_no_dead_one() {
    let Some(sandbox) = Sandbox::new() else { return };
    // As on a node: what is mounted below the kubelet's directory shows up in the host's copy of it.
    mount_change(&sandbox.root, MountPropagationFlags::SHARED).unwrap();
    let copy = tempfile::tempdir().unwrap();
    rustix::mount::mount_bind(&sandbox.root, copy.path()).unwrap();
    let copy = Copy(copy);
    let target = sandbox.target("t");
    let manager = sandbox.manager(&server(false));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    drop(manager);
    let manager = sandbox.manager(&Arc::new(Fake { alive: true, ..Fake::default() }));
    assert_eq!(manager.recover().await.rebound, std::slice::from_ref(&target));
    let elsewhere = copy.0.path().canonicalize().unwrap().join("pods/t");
    assert_eq!((own_mounts_at(&target), own_mounts_at(&elsewhere)), (1, 1));
    assert_eq!(device(&target), device(&elsewhere));
    manager.unpublish(&target).await.unwrap();
    assert_eq!(own_mounts_at(&elsewhere), 0);
    drop(copy);
    sandbox.assert_clean();
}

struct Copy(tempfile::TempDir);

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = sys::detach(self.0.path());
    }
}

#[tokio::test]
async fn a_dead_mount_stays_until_a_new_publish_takes_its_place() {
    let Some(sandbox) = Sandbox::new() else { return };
    let fake = Fake::fuse();
    let target = sandbox.target("t");
    {
        let manager = sandbox.manager(&fake);
        manager.publish(&spec("/a"), &request(&target)).await.unwrap();
        fake.die();
    }
    let gated = Arc::new(Fake { gate: Some(tokio::sync::Semaphore::new(0)), ..Fake::default() });
    let manager = sandbox.manager(&gated);
    let watch = Watch::start(&target);
    let publish = {
        let (manager, target) = (manager.clone(), target.clone());
        tokio::spawn(async move { manager.publish(&spec("/a"), &request(&target)).await })
    };
    while gated.opens.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(std::fs::metadata(&target).unwrap_err().raw_os_error(), Some(libc::ENOTCONN), "while it is fetched");
    gated.gate.as_ref().unwrap().add_permits(1);
    publish.await.unwrap().unwrap();
    assert_eq!(watch.end().0, 0);
    assert_eq!((marker(&target), own_mounts_at(&target)), (Digest::of(b"/a").hex(), 1));
    manager.unpublish(&target).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn a_publish_that_fails_leaves_no_dead_mount_either() {
    let Some(sandbox) = Sandbox::new() else { return };
    let target = sandbox.target("t");
    {
        let fake = Fake::fuse();
        sandbox.manager(&fake).publish(&spec("/a"), &request(&target)).await.unwrap();
        fake.die();
    }
    let fake = Fake::new();
    let manager = sandbox.manager(&fake);
    fake.set_fault(Some(Fault::Open));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap_err();
    assert_eq!(own_mounts_at(&target), 0);
    manager.unpublish(&target).await.unwrap();
}
