//! The manager with real mounts over a double of the kernel filesystem. `tests/mount.rs` does the same over FUSE.

mod fake;
mod swap;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use crate::build::provider::ImageServiceConfig;
use crate::fs::{Integrity, RootView};
use crate::metrics::metrics;
use crate::source::{Credentials, Location, Policy, S3Keys};

use super::key;
use super::sys::{self, Liveness};
use super::*;
use fake::{Fake, Fault, Sandbox, mount_fuse};

fn spec(archive: &str) -> MountSpec {
    MountSpec {
        archive: Location::File(archive.into()),
        pin: None,
        root: RootView::Auto,
        integrity: Integrity::Digest,
        scope: "public".into(),
        credentials: Credentials::default(),
    }
}

fn request(target: &Path) -> TargetSpec {
    TargetSpec { volume_id: "volume".into(), target: target.into(), sub_path: None, attributes: BTreeMap::new() }
}

fn sub(target: &Path, path: &str) -> TargetSpec {
    TargetSpec { sub_path: Some(path.into()), ..request(target) }
}

fn marker(target: &Path) -> String {
    std::fs::read_to_string(target.join("marker")).unwrap()
}

fn journaled(sandbox: &Sandbox) -> usize {
    let entries = std::fs::read_dir(sandbox.root.join("state")).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "json")).count()
}

macro_rules! sandbox {
    () => {
        match Sandbox::new() {
            Some(sandbox) => sandbox,
            None => return,
        }
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_targets_share_one_mount_and_the_last_one_ends_it() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let targets: Vec<_> = (0..20).map(|n| sandbox.target(&format!("t{n}"))).collect();
    let published = futures::future::join_all(targets.iter().map(|target| {
        let manager = manager.clone();
        async move { manager.publish(&spec("/a.clip"), &request(target)).await.unwrap() }
    }))
    .await;
    assert_eq!(published.iter().filter(|p| !p.shared).count(), 1);
    assert!(published.iter().all(|p| !p.already && p.version == Version::V1));
    assert_eq!((sandbox.shared_mounts(), sandbox.mounts().len()), (1, 21));
    assert_eq!(fake.opens.load(Ordering::SeqCst), 1, "one decode for all");
    for target in &targets {
        assert_eq!(marker(target), Digest::of(b"/a.clip").hex());
        assert!(std::fs::write(target.join("x"), "").is_err(), "read-only");
    }
    let (last, others) = targets.split_last().unwrap();
    for target in others {
        manager.unpublish(target).await.unwrap();
        assert!(!target.exists());
        assert_eq!(sandbox.shared_mounts(), 1);
    }
    manager.unpublish(last).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn an_existing_empty_directory_is_used_and_directories_are_private() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let (made, found) = (sandbox.target("made"), sandbox.target("found"));
    std::fs::create_dir(&found).unwrap();
    manager.publish(&spec("/a"), &request(&found)).await.unwrap();
    manager.publish(&spec("/a"), &request(&made)).await.unwrap();
    for dir in ["mounts", "state"] {
        assert_eq!(std::fs::metadata(sandbox.root.join(dir)).unwrap().permissions().mode() & 0o777, 0o700);
    }
    sys::detach(&made).unwrap();
    assert_eq!(std::fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o750);
    manager.unpublish(&made).await.unwrap();
    manager.unpublish(&found).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn a_second_publish_of_the_same_changes_nothing() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    assert!(!manager.publish(&spec("/a"), &request(&target)).await.unwrap().already);
    let before = sandbox.mounts();
    let second = manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    assert!(second.already && !second.shared);
    assert_eq!(sandbox.mounts(), before);
    assert_eq!(fake.opens.load(Ordering::SeqCst), 1);
    manager.unpublish(&target).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn other_parameters_on_a_published_target_conflict_and_touch_nothing() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    let before = sandbox.mounts();
    let mut other = request(&target);
    other.attributes.insert("platform".into(), "linux/arm64".into());
    let strict = MountSpec { integrity: Integrity::Strict, ..spec("/a") };
    for (spec, request, word) in [
        (spec("/a"), other, "platform"),
        (spec("/b"), request(&target), "archive"),
        (strict, request(&target), "integrity"),
        (spec("/a"), sub(&target, "usr"), "subPath"),
    ] {
        let error = manager.publish(&spec, &request).await.unwrap_err();
        assert!(matches!(error, MountError::Conflict { .. }), "{error:?}");
        assert!(error.to_string().contains(word) && error.to_string().contains("unpublish"), "{error}");
    }
    assert_eq!(sandbox.mounts(), before);
}

#[tokio::test]
async fn what_must_be_apart_does_not_share_a_mount() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let secret = MountSpec { scope: "sha256:secret".into(), ..spec("/a") };
    let strict = MountSpec { integrity: Integrity::Strict, ..spec("/a") };
    for (n, spec) in [spec("/a"), secret, strict, spec("/b")].iter().enumerate() {
        let published = manager.publish(spec, &request(&sandbox.target(&n.to_string()))).await.unwrap();
        assert!(!published.shared, "{spec:?}");
        assert_eq!(sandbox.shared_mounts(), n + 1);
    }
    // The same bytes at another place are the same archive.
    fake.content.lock().unwrap().insert("/copy".into(), "/a".into());
    assert!(manager.publish(&spec("/copy"), &request(&sandbox.target("copy"))).await.unwrap().shared);
}

#[tokio::test]
async fn a_busy_target_is_left_alone() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let (mounted, full) = (sandbox.target("mounted"), sandbox.target("full"));
    std::fs::create_dir(&mounted).unwrap();
    mount("somebody", &mounted, "tmpfs", MountFlags::empty(), None).unwrap();
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("data"), "precious").unwrap();
    for target in [&mounted, &full] {
        let error = manager.publish(&spec("/a"), &request(target)).await.unwrap_err();
        assert!(matches!(error, MountError::Busy { .. }), "{error:?}");
        assert!(error.to_string().contains("unmount it") || error.to_string().contains("move that away"), "{error}");
    }
    let error = manager.unpublish(&mounted).await.unwrap_err();
    assert!(matches!(&error, MountError::Busy { .. }) && error.to_string().contains("somebody"), "{error:?}");
    manager.unpublish(&full).await.unwrap();
    assert_eq!(std::fs::read_to_string(full.join("data")).unwrap(), "precious");
    assert_eq!(sandbox.mounts(), [mounted]);
    assert_eq!(journaled(&sandbox), 0);
}

#[tokio::test]
async fn the_drivers_own_directory_is_no_target() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    manager.publish(&spec("/a"), &request(&sandbox.target("t"))).await.unwrap();
    let before = sandbox.mounts();
    let own = before.iter().find(|point| point.starts_with(sandbox.root.join("mounts"))).unwrap();
    assert!(matches!(manager.unpublish(own).await, Err(MountError::Busy { .. })));
    assert!(matches!(manager.publish(&spec("/a"), &request(own)).await, Err(MountError::Busy { .. })));
    assert_eq!(sandbox.mounts(), before);
}

#[tokio::test]
async fn a_missing_parent_is_named() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let error = manager.publish(&spec("/a"), &request(&sandbox.target("absent/t"))).await.unwrap_err();
    assert!(matches!(error, MountError::NoParent { .. }) && error.to_string().contains("pods/absent"), "{error}");
    manager.unpublish(&sandbox.target("absent/t")).await.unwrap();
    assert_eq!(fake.opens.load(Ordering::SeqCst), 0);
    sandbox.assert_clean();
}

#[tokio::test]
async fn sub_paths_lead_to_directories_and_files_of_the_image() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let (dir, link, file, up) =
        (sandbox.target("dir"), sandbox.target("link"), sandbox.target("file"), sandbox.target("up"));
    manager.publish(&spec("/a"), &sub(&dir, "usr//bin/.")).await.unwrap();
    manager.publish(&spec("/a"), &sub(&link, "bin")).await.unwrap();
    manager.publish(&spec("/a"), &sub(&file, "bin/tool")).await.unwrap();
    manager.publish(&spec("/a"), &sub(&up, "up")).await.unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("tool")).unwrap(), "the tool");
    assert_eq!(std::fs::read_to_string(link.join("tool")).unwrap(), "the tool");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "the tool");
    assert!(up.join("marker").exists());
    assert_eq!(sandbox.shared_mounts(), 1);
    assert!(std::fs::OpenOptions::new().append(true).open(&file).is_err());
    assert!(manager.publish(&spec("/a"), &sub(&file, "bin/tool")).await.unwrap().already);
    assert_eq!(manager.stats(&file).await.unwrap().abnormal, None);
    for target in [&dir, &link, &file, &up] {
        manager.unpublish(target).await.unwrap();
    }
    sandbox.assert_clean();
}

#[tokio::test]
async fn no_sub_path_leads_out_of_the_image() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let target = sandbox.target("t");
    for refused in ["..", "usr/../..", "/usr", "absent", "usr/absent"] {
        let error = manager.publish(&spec("/a"), &sub(&target, refused)).await.unwrap_err();
        assert!(matches!(error, MountError::SubPath { .. }), "{refused}: {error:?}");
        sandbox.assert_clean();
    }
    // Were the index wrong about a symlink, the kernel would still not follow it.
    for refused in ["lie", "lie/etc", "dots"] {
        let outcome = manager.publish(&spec("/a"), &sub(&target, refused)).await;
        assert!(matches!(outcome, Err(MountError::Io { .. })), "{refused}: {outcome:?}");
        sandbox.assert_clean();
    }
}

#[tokio::test]
async fn a_sub_path_does_not_cross_into_another_mount() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    manager.publish(&spec("/a"), &request(&sandbox.target("t"))).await.unwrap();
    let shared = sandbox.mounts().into_iter().find(|p| p.starts_with(sandbox.root.join("mounts"))).unwrap();
    mount("somebody", shared.join("crossing"), "tmpfs", MountFlags::empty(), None).unwrap();
    let error = manager.publish(&spec("/a"), &sub(&sandbox.target("u"), "crossing")).await.unwrap_err();
    assert!(matches!(error, MountError::Io { .. }), "{error:?}");
    assert!(!sandbox.target("u").exists());
    assert_eq!(journaled(&sandbox), 1);
}

#[tokio::test]
async fn what_is_mounted_inside_one_target_is_not_seen_in_another() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    // The kubelet's directory is shared: what is mounted there becomes shared as well.
    mount_change(&sandbox.root, MountPropagationFlags::SHARED).unwrap();
    let manager = sandbox.manager(&fake);
    let (one, two) = (sandbox.target("one"), sandbox.target("two"));
    manager.publish(&spec("/a"), &request(&one)).await.unwrap();
    manager.publish(&spec("/a"), &request(&two)).await.unwrap();
    mount("somebody", one.join("crossing"), "tmpfs", MountFlags::empty(), None).unwrap();
    assert_eq!(std::fs::metadata(two.join("crossing")).unwrap().dev(), std::fs::metadata(&two).unwrap().dev());
    // Teardown goes on all the same.
    manager.unpublish(&one).await.unwrap();
    manager.unpublish(&two).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn a_failed_publish_leaves_nothing_behind() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let target = sandbox.target("t");
    for fault in [Fault::Open, Fault::Mount, Fault::MountedThenError, Fault::WrongName, Fault::Writable] {
        fake.set_fault(Some(fault));
        // An archive of its own each, so that nothing is remembered.
        let outcome = manager.publish(&spec(&format!("/{fault:?}")), &request(&target)).await;
        assert!(outcome.is_err(), "{fault:?}");
        if fault == Fault::WrongName {
            // Somebody else's by its name, so it is not for us to take away; in truth nothing makes such a mount.
            for point in sandbox.mounts() {
                sys::detach(&point).unwrap();
                std::fs::remove_dir(point).unwrap();
            }
        }
        sandbox.assert_clean();
    }
    fake.set_fault(None);
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
}

#[tokio::test]
async fn a_journal_that_can_not_be_written_undoes_the_publish() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    std::fs::rename(sandbox.root.join("state"), sandbox.root.join("gone")).unwrap();
    let error = manager.publish(&spec("/a"), &request(&sandbox.target("t"))).await.unwrap_err();
    assert!(error.to_string().contains("writing"), "{error}");
    std::fs::rename(sandbox.root.join("gone"), sandbox.root.join("state")).unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn unpublish_is_idempotent_and_takes_unknown_targets() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let target = sandbox.target("t");
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    manager.unpublish(&target).await.unwrap();
    manager.unpublish(&target).await.unwrap();
    std::fs::create_dir(&target).unwrap();
    manager.unpublish(&target).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn stacked_and_dead_mounts_that_nobody_knows_are_torn_down() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let target = sandbox.target("t");
    std::fs::create_dir(&target).unwrap();
    for _ in 0..3 {
        let connection = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        mount_fuse(&connection, &target, &key::fs_name("0badcafe", &"1".repeat(32))).unwrap();
    }
    assert_eq!(std::fs::metadata(&target).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    manager.unpublish(&target).await.unwrap();
    sandbox.assert_clean();
}

#[tokio::test]
async fn a_hung_mount_holds_up_neither_teardown_nor_publish() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let target = sandbox.target("t");
    std::fs::create_dir(&target).unwrap();
    // Nobody ever answers this connection, but it is open: whoever asks, waits.
    let connection = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    mount_fuse(&connection, &target, &key::fs_name(&manager.0.instance, &"1".repeat(32))).unwrap();
    let work = async {
        manager.publish(&spec("/a"), &request(&target)).await.unwrap();
        assert_eq!(manager.stats(&target).await.unwrap().abnormal, None);
        manager.unpublish(&target).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(20), work).await.unwrap();
    sandbox.assert_clean();
}

#[test]
fn dead_and_hung_mounts_are_told_from_living_ones() {
    let sandbox = sandbox!();
    let point = sandbox.target("t");
    std::fs::create_dir(&point).unwrap();
    let deadline = Duration::from_millis(200);
    assert_eq!(sys::probe(&point, deadline), Liveness::Alive);
    let connection = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    mount_fuse(&connection, &point, "test").unwrap();
    assert_eq!(sys::probe(&point, deadline), Liveness::Dead, "hung");
    drop(connection);
    assert_eq!(sys::probe(&point, Duration::from_secs(10)), Liveness::Dead, "dead");
}

#[tokio::test]
async fn a_path_with_spaces_and_a_symlinked_parent_is_one_target() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    std::fs::create_dir(sandbox.target("a b\tc\\d")).unwrap();
    std::os::unix::fs::symlink("a b\tc\\d", sandbox.target("link")).unwrap();
    let (real, linked) = (sandbox.target("a b\tc\\d/t #1"), sandbox.target("link/t #1"));
    manager.publish(&spec("/a"), &request(&real)).await.unwrap();
    assert!(manager.publish(&spec("/a"), &request(&linked)).await.unwrap().already);
    assert_eq!(sandbox.mounts().len(), 2);
    assert_eq!(manager.stats(&linked).await.unwrap().abnormal, None);
    manager.unpublish(&linked).await.unwrap();
    assert_eq!(sandbox.mounts(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn stats_come_from_the_index_and_tell_what_is_wrong() {
    let (sandbox, fake) = (sandbox!(), Fake::fuse());
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    assert!(matches!(manager.stats(&target).await, Err(MountError::NotPublished { .. })));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    // Nobody answers this FUSE connection: stats would hang if they asked the mount.
    let stats = manager.stats(&target).await.unwrap();
    assert_eq!(stats, VolumeStats { bytes: 8, inodes: 7, abnormal: None });
    fake.die();
    assert!(manager.stats(&target).await.unwrap().abnormal.unwrap().contains("served"));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    assert_eq!(manager.stats(&target).await.unwrap().abnormal, None);
    sys::detach(&target).unwrap();
    assert!(manager.stats(&target).await.unwrap().abnormal.unwrap().contains("mounted"));
}

#[tokio::test]
async fn publishing_again_revives_a_dead_mount_for_all_its_targets() {
    let (sandbox, fake) = (sandbox!(), Fake::fuse());
    let manager = sandbox.manager(&fake);
    let targets = [sandbox.target("one"), sandbox.target("two"), sandbox.target("three")];
    manager.publish(&spec("/a"), &request(&targets[0])).await.unwrap();
    manager.publish(&spec("/a"), &request(&targets[1])).await.unwrap();
    fake.die();
    for target in &targets[..2] {
        assert_eq!(std::fs::metadata(target).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    }
    assert!(manager.publish(&spec("/a"), &request(&targets[0])).await.unwrap().already);
    assert_eq!(manager.stats(&targets[1]).await.unwrap().abnormal, None);
    assert_eq!(sandbox.mounts().len(), 3);
    // A new target of a dead mount revives it as well.
    fake.die();
    assert!(manager.publish(&spec("/a"), &request(&targets[2])).await.unwrap().shared);
    assert_eq!(sandbox.mounts().len(), 4);
    for target in &targets {
        assert_eq!(manager.stats(target).await.unwrap().abnormal, None);
        manager.unpublish(target).await.unwrap();
    }
    sandbox.assert_clean();
}

#[tokio::test]
async fn a_bind_of_an_earlier_session_is_not_taken_for_a_living_one() {
    let (sandbox, fake) = (sandbox!(), Fake::fuse());
    let manager = sandbox.manager(&fake);
    let (one, two) = (sandbox.target("one"), sandbox.target("two"));
    manager.publish(&spec("/a"), &request(&one)).await.unwrap();
    manager.publish(&spec("/a"), &request(&two)).await.unwrap();
    fake.die();
    // While the mount is revived, somebody's mount hides the second target: it keeps its dead bind.
    let table = crate::fs::mountinfo::MountTable::read().unwrap();
    let dead = table.top(&two).unwrap().device.clone();
    mount("somebody", &two, "tmpfs", MountFlags::empty(), None).unwrap();
    manager.publish(&spec("/a"), &request(&one)).await.unwrap();
    sys::detach(&two).unwrap();
    assert_eq!(crate::fs::mountinfo::MountTable::read().unwrap().top(&two).unwrap().device, dead);

    assert!(manager.stats(&two).await.unwrap().abnormal.is_some());
    assert!(manager.publish(&spec("/a"), &request(&two)).await.unwrap().already);
    assert_eq!(manager.stats(&two).await.unwrap().abnormal, None);
    assert_ne!(crate::fs::mountinfo::MountTable::read().unwrap().top(&two).unwrap().device, dead);
}

#[tokio::test]
async fn a_target_that_somebody_unmounted_is_bound_again() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    sys::detach(&target).unwrap();
    assert!(manager.publish(&spec("/a"), &request(&target)).await.unwrap().already);
    assert_eq!(marker(&target), Digest::of(b"/a").hex());
    assert_eq!(sandbox.mounts().len(), 2);
    sys::detach(&target).unwrap();
    std::fs::remove_dir(&target).unwrap();
    assert!(manager.publish(&spec("/a"), &request(&target)).await.unwrap().already);
    assert_eq!(marker(&target), Digest::of(b"/a").hex());
}

#[tokio::test]
async fn different_archives_are_opened_side_by_side() {
    let sandbox = sandbox!();
    let fake = Arc::new(Fake { gate: Some(tokio::sync::Semaphore::new(0)), ..Fake::default() });
    let manager = sandbox.manager(&fake);
    let work = ["a", "b", "c"].map(|name| {
        let (manager, target) = (manager.clone(), sandbox.target(name));
        tokio::spawn(async move { manager.publish(&spec(name), &request(&target)).await.unwrap() })
    });
    let all_open = async {
        while fake.opens.load(Ordering::SeqCst) < 3 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all_open).await.unwrap();
    fake.gate.as_ref().unwrap().add_permits(3);
    for publish in work {
        publish.await.unwrap();
    }
    assert_eq!(sandbox.shared_mounts(), 3);
}

#[tokio::test]
async fn dead_mounts_of_an_earlier_process_are_served_and_bound_again() {
    let sandbox = sandbox!();
    let (whole, part, unwanted, unrecorded) =
        (sandbox.target("whole"), sandbox.target("part"), sandbox.target("unwanted"), sandbox.target("unrecorded"));
    {
        let fake = Fake::fuse();
        let manager = sandbox.manager(&fake);
        for target in [&whole, &unwanted, &unrecorded] {
            manager.publish(&spec("/a"), &request(target)).await.unwrap();
        }
        manager.publish(&spec("/b"), &request(&part)).await.unwrap();
        fake.die();
    }
    for target in [&whole, &part, &unrecorded] {
        assert_eq!(std::fs::metadata(target).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    }
    // The kubelet gave this one up while no plugin was there; of that one the record is lost.
    sys::detach(&unwanted).unwrap();
    std::fs::remove_dir(&unwanted).unwrap();
    let name = format!("{}.json", Digest::of(unrecorded.as_os_str().as_encoded_bytes()).hex());
    std::fs::remove_file(sandbox.root.join("state").join(name)).unwrap();

    let fake = Fake::new();
    let manager = sandbox.manager(&fake);
    let recovery = manager.recover().await;
    assert_eq!(recovery.rebound, [part.clone(), whole.clone()]);
    assert_eq!(recovery.detached, std::slice::from_ref(&unrecorded));
    assert_eq!(recovery.failed, []);
    assert_eq!(marker(&whole), Digest::of(b"/a").hex());
    assert_eq!(marker(&part), Digest::of(b"/b").hex());
    assert_eq!(sandbox.mounts().len(), 4, "{:?}", sandbox.mounts());
    assert_eq!(journaled(&sandbox), 2);

    assert!(manager.publish(&spec("/a"), &request(&whole)).await.unwrap().already);
    assert_eq!(manager.recover().await, Recovery::default(), "what is bound is left alone");
    for target in [&whole, &part, &unrecorded] {
        manager.unpublish(target).await.unwrap();
    }
    sandbox.assert_clean();
}

#[tokio::test]
async fn what_can_not_be_recovered_stays_dead_and_visible_until_it_is_published_again() {
    let sandbox = sandbox!();
    let (target, changed) = (sandbox.target("t"), sandbox.target("changed"));
    {
        let fake = Fake::fuse();
        let manager = sandbox.manager(&fake);
        manager.publish(&spec("/a"), &request(&target)).await.unwrap();
        manager.publish(&spec("/b"), &request(&changed)).await.unwrap();
        fake.die();
    }
    let fake = Fake::new();
    fake.content.lock().unwrap().insert("/b".into(), "another archive".into());
    let manager = sandbox.manager(&fake);
    fake.set_fault(Some(Fault::Open));
    let recovery = manager.recover().await;
    assert_eq!(recovery.failed.len(), 2, "{recovery:?}");
    fake.set_fault(None);
    assert_eq!(std::fs::metadata(&target).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert!(manager.stats(&target).await.unwrap().abnormal.unwrap().contains("a fault"));
    assert_eq!(journaled(&sandbox), 2);

    // Tried once more: one comes back, the other is not what was published.
    let recovery = manager.recover().await;
    assert_eq!(recovery.rebound, std::slice::from_ref(&target));
    assert!(recovery.failed.len() == 1 && recovery.failed[0].1.contains("changed"), "{recovery:?}");
    assert!(!manager.publish(&spec("/b"), &request(&changed)).await.unwrap().already);
    assert_eq!(marker(&changed), Digest::of(b"another archive").hex());
    for target in [&target, &changed] {
        assert_eq!(manager.stats(target).await.unwrap().abnormal, None);
        manager.unpublish(target).await.unwrap();
    }
    sandbox.assert_clean();
}

#[tokio::test]
async fn targets_that_were_never_recovered_can_be_unpublished() {
    let sandbox = sandbox!();
    let target = sandbox.target("t");
    {
        let fake = Fake::fuse();
        sandbox.manager(&fake).publish(&spec("/a"), &request(&target)).await.unwrap();
        fake.die();
    }
    let manager = sandbox.manager(&Fake::new());
    manager.unpublish(&target).await.unwrap();
    assert!(!target.exists());
    assert_eq!(journaled(&sandbox), 0);
    assert_eq!(manager.recover().await.failed, []);
    sandbox.assert_clean();
}

#[tokio::test]
async fn unpublish_does_not_wait_for_a_recovery_that_is_still_fetching() {
    let sandbox = sandbox!();
    let target = sandbox.target("t");
    {
        let fake = Fake::fuse();
        sandbox.manager(&fake).publish(&spec("/a"), &request(&target)).await.unwrap();
        fake.die();
    }
    let fake = Arc::new(Fake { gate: Some(tokio::sync::Semaphore::new(0)), ..Fake::default() });
    let manager = sandbox.manager(&fake);
    let recovery = tokio::spawn({
        let manager = manager.clone();
        async move { manager.recover().await }
    });
    while fake.opens.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::timeout(Duration::from_secs(10), manager.unpublish(&target)).await.unwrap().unwrap();
    let recovery = recovery.await.unwrap();
    assert!(recovery.rebound.is_empty() && recovery.failed.is_empty(), "{recovery:?}");
    assert!(matches!(manager.stats(&target).await, Err(MountError::NotPublished { .. })));
    sandbox.assert_clean();
}

#[tokio::test]
async fn mounts_of_another_installation_are_not_recoverys_business() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let other = sandbox.target("other");
    std::fs::create_dir(&other).unwrap();
    let connection = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    mount_fuse(&connection, &other, &key::fs_name("00000000", &"1".repeat(32))).unwrap();
    drop(connection);
    assert_eq!(manager.recover().await, Recovery::default());
    assert_eq!(sandbox.mounts(), std::slice::from_ref(&other));
    assert!(matches!(manager.publish(&spec("/a"), &request(&other)).await, Err(MountError::Busy { .. })));
}

#[tokio::test]
async fn a_living_mount_without_a_record_is_reported_and_left() {
    let (sandbox, fake) = (sandbox!(), Fake::fuse());
    let manager = sandbox.manager(&fake);
    let target = sandbox.target("t");
    std::fs::create_dir(&target).unwrap();
    mount(key::fs_name(&manager.0.instance, &"1".repeat(32)), &target, "tmpfs", MountFlags::empty(), None).unwrap();
    let recovery = manager.recover().await;
    assert!(recovery.detached.is_empty() && recovery.failed[0].0 == target, "{recovery:?}");
    assert_eq!(sandbox.mounts(), [target]);
}

#[tokio::test]
async fn unusable_records_are_reported_and_stop_nothing() {
    let sandbox = sandbox!();
    let target = sandbox.target("t");
    {
        let fake = Fake::fuse();
        sandbox.manager(&fake).publish(&spec("/a"), &request(&target)).await.unwrap();
        fake.die();
    }
    std::fs::write(sandbox.root.join("state/broken.json"), "{").unwrap();
    let manager = sandbox.manager(&Fake::new());
    let recovery = manager.recover().await;
    assert_eq!(recovery.rebound, [target]);
    assert_eq!(recovery.failed.len(), 1);
    assert!(recovery.failed[0].0.ends_with("broken.json") && recovery.failed[0].1.contains("kept as"), "{recovery:?}");
    assert!(sandbox.root.join("state/broken.json.unreadable").exists());
}

#[tokio::test]
async fn no_secret_reaches_the_disk() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let keys = S3Keys {
        access_key: "AKIASECRETSECRET".into(),
        secret_key: "topsecretkey".into(),
        session_token: Some("sessiontokensecret".into()),
    };
    let credentials = Credentials {
        docker_config: Some("{\"auths\":{\"r\":{\"auth\":\"ZG9ja2Vyc2VjcmV0\"}}}".into()),
        s3: Some(Arc::new(keys)),
        identity: Some(Digest::of(b"ns/secret/uid")),
    };
    let mut request = request(&sandbox.target("t"));
    request.attributes.insert("csi.storage.k8s.io/serviceAccount.tokens".into(), "podtokensecret".into());
    request.attributes.insert("archive".into(), "/a".into());
    manager.publish(&MountSpec { credentials, ..spec("/a") }, &request).await.unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir(sandbox.root.join("state")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        for secret in
            ["AKIASECRETSECRET", "topsecretkey", "sessiontokensecret", "ZG9ja2Vyc2VjcmV0", "podtokensecret", "auths"]
        {
            assert!(!text.contains(secret), "{secret} in {}", path.display());
        }
        if text.contains("\"archive\"") {
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            seen += 1;
        }
    }
    assert_eq!(seen, 1);
    // A rotated token is no other request.
    request.attributes.insert("csi.storage.k8s.io/serviceAccount.tokens".into(), "another".into());
    assert!(manager.publish(&spec("/a"), &request).await.unwrap().already);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publishes_and_unpublishes_of_one_mount_may_race() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let workers = (0..8).map(|n| {
        let (manager, target) = (manager.clone(), sandbox.target(&format!("t{}", n % 4)));
        tokio::spawn(async move {
            for _ in 0..15 {
                // The other one's unpublish ends a publish that is still fetching.
                if let Err(error) = manager.publish(&spec("/a"), &request(&target)).await {
                    assert!(error.to_string().contains("given up"), "{error}");
                }
                tokio::task::yield_now().await;
                manager.unpublish(&target).await.unwrap();
            }
        })
    });
    let all = futures::future::join_all(workers);
    for outcome in tokio::time::timeout(Duration::from_secs(60), all).await.unwrap() {
        outcome.unwrap();
    }
    sandbox.assert_clean();
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_the_work_to_its_retry() {
    let sandbox = sandbox!();
    let fake = Arc::new(Fake { gate: Some(tokio::sync::Semaphore::new(0)), ..Fake::default() });
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    let (first_spec, first_request) = (spec("/a"), request(&target));
    let first = manager.publish(&first_spec, &first_request);
    assert!(tokio::time::timeout(Duration::from_millis(50), first).await.is_err(), "still fetching");
    fake.gate.as_ref().unwrap().add_permits(1);
    let retry = manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    assert!(retry.already);
    assert_eq!(fake.opens.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn unpublish_does_not_wait_for_a_publish_that_is_still_fetching() {
    let sandbox = sandbox!();
    let fake = Arc::new(Fake { gate: Some(tokio::sync::Semaphore::new(0)), ..Fake::default() });
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    let publish = tokio::spawn({
        let (manager, target) = (manager.clone(), target.clone());
        async move { manager.publish(&spec("/a"), &request(&target)).await }
    });
    while fake.opens.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::timeout(Duration::from_secs(10), manager.unpublish(&target)).await.unwrap().unwrap();
    let error = publish.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("given up"), "{error}");
    sandbox.assert_clean();
}

#[tokio::test]
async fn an_archive_that_changed_under_its_identity_is_served_as_it_is_now() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    manager.publish(&spec("/a"), &request(&sandbox.target("one"))).await.unwrap();
    fake.content.lock().unwrap().insert("/a".into(), "second edition".into());
    manager.publish(&spec("/a"), &request(&sandbox.target("two"))).await.unwrap();
    assert_eq!(marker(&sandbox.target("one")), Digest::of(b"/a").hex());
    assert_eq!(marker(&sandbox.target("two")), Digest::of(b"second edition").hex());
    assert_eq!(sandbox.shared_mounts(), 2);
}

#[tokio::test]
async fn a_stopped_plugin_leaves_targets_bound_and_takes_no_more_work() {
    let sandbox = sandbox!();
    let target = sandbox.target("t");
    {
        let fake = Fake::fuse();
        let manager = sandbox.manager(&fake);
        manager.publish(&spec("/a"), &request(&target)).await.unwrap();
        manager.shutdown().await;
        assert!(fake.images.lock().unwrap().iter().all(|image| !image.alive.load(Ordering::SeqCst)));
        assert_eq!(sandbox.mounts().len(), 2);
        let error = manager.unpublish(&target).await.unwrap_err();
        assert!(error.to_string().contains("being stopped"), "{error}");
    }
    let manager = sandbox.manager(&Fake::new());
    assert_eq!(manager.recover().await.rebound, std::slice::from_ref(&target));
    assert_eq!(marker(&target), Digest::of(b"/a").hex());
}

#[tokio::test]
async fn one_process_owns_the_state_directory() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    let error = MountManager::with_server(&sandbox.config(), fake.clone()).unwrap_err();
    assert!(error.to_string().contains("another clip-csi"), "{error}");
    drop(manager);
    sandbox.manager(&fake);
}

#[tokio::test]
async fn bound_targets_are_counted() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let manager = sandbox.manager(&fake);
    manager.publish(&spec("/a"), &request(&sandbox.target("t"))).await.unwrap();
    // Other tests count as well, so only the lower bound is certain.
    assert!(metrics().bound_targets.get() >= 1.0);
}

#[tokio::test]
async fn a_mount_that_dies_is_served_again_by_itself_but_not_for_ever() {
    let sandbox = sandbox!();
    let fake = Arc::new(Fake { fuse: true, announces: true, ..Fake::default() });
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    for _ in 0..3 {
        fake.die();
        let healed = async {
            while manager.stats(&target).await.unwrap().abnormal.is_some() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), healed).await.unwrap();
        assert_eq!(sandbox.mounts().len(), 2);
    }
    fake.die();
    manager.shutdown().await;
    assert_eq!(std::fs::metadata(&target).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
}

#[tokio::test]
async fn a_failed_read_makes_the_condition_abnormal_for_five_minutes() {
    let (sandbox, fake) = (sandbox!(), Fake::new());
    let (manager, target) = (sandbox.manager(&fake), sandbox.target("t"));
    manager.publish(&spec("/a"), &request(&target)).await.unwrap();
    let image = fake.images.lock().unwrap()[0].clone();
    for (ago, shown) in [(12, true), (299, true), (300, false)] {
        *image.failure.lock().unwrap() = Some((Duration::from_secs(ago), "/usr/big: not to be had".into()));
        let abnormal = manager.stats(&target).await.unwrap().abnormal;
        assert_eq!(abnormal, shown.then(|| format!("a read failed {ago} s ago: /usr/big: not to be had")));
    }
}

#[tokio::test]
async fn a_private_volume_that_came_back_says_that_its_credentials_are_gone_until_a_publish_brings_them() {
    let sandbox = sandbox!();
    let (target, other) = (sandbox.target("t"), sandbox.target("other"));
    let credentials = Credentials { identity: Some(Digest::of(b"ns/secret/uid")), ..Credentials::default() };
    let private = MountSpec { scope: "private".into(), credentials, ..spec("/a") };
    let double = || Arc::new(Fake { fuse: true, private: true, ..Fake::default() });
    {
        let fake = double();
        sandbox.manager(&fake).publish(&private, &request(&target)).await.unwrap();
        fake.die();
    }
    // Once by a publish of the same target, once by another one's.
    for brings in [&target, &other] {
        let fake = double();
        let manager = sandbox.manager(&fake);
        manager.recover().await;
        let said = async {
            loop {
                match manager.stats(&target).await.unwrap().abnormal {
                    Some(said) => return said,
                    None => tokio::task::yield_now().await,
                }
            }
        };
        let said = tokio::time::timeout(Duration::from_secs(10), said).await.unwrap();
        assert!(said.contains("credentials") && said.contains("restart the pod"), "{said}");
        let image = fake.images.lock().unwrap()[0].clone();
        assert_eq!(*image.renewed.lock().unwrap(), None);
        manager.publish(&private, &request(brings)).await.unwrap();
        assert_eq!(*image.renewed.lock().unwrap(), private.credentials.identity, "later reads use them");
        assert_eq!(manager.stats(&target).await.unwrap().abnormal, None);
        fake.die();
    }
}

#[tokio::test]
async fn the_data_of_an_image_that_everybody_may_pull_is_fetched_with_nobodys_login() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.clip");
    std::fs::write(&path, b"an archive of the node's").unwrap();
    let config = ImageServiceConfig { archive_dir: dir.path().to_owned(), ..Default::default() };
    let sources = Sources::new(Policy { trusted: true, config: Default::default() }).unwrap();
    let pin = Provider::new(config, sources).unwrap().pin(&path);
    assert!(pin.is_some());
    let credentials = Credentials { identity: Some(Digest::of(b"ns/secret/uid")), ..Credentials::default() };
    let spec = |scope: &str, pin: &Option<Arc<Pin>>| MountSpec {
        scope: scope.into(),
        pin: pin.clone(),
        credentials: credentials.clone(),
        ..spec("/a")
    };
    assert_eq!(spec("public", &pin).lent().identity, None);
    assert_eq!(spec("private", &pin).lent().identity, credentials.identity);
    // An archive that the volume itself names says nothing of where its data lies.
    assert_eq!(spec("public", &None).lent().identity, credentials.identity);
}
