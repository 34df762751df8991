//! The mount manager over FUSE: a small v1 archive, published, killed, recovered.

#[path = "common/appear.rs"]
#[allow(dead_code)]
mod appear;
#[path = "common/skip.rs"]
mod skip;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use clip_csi::archive::Version;
use clip_csi::build::progress::Silent;
use clip_csi::build::provider::{ImageServiceConfig, Provider};
use clip_csi::build::{BuildOptions, archive_dir};
use clip_csi::cache::{Cache, CacheConfig};
use clip_csi::fs::{Integrity, RootView};
use clip_csi::mount::{MountConfig, MountError, MountManager, MountSpec, TargetSpec};
use clip_csi::source::{Credentials, Location, Policy, Sources};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags, fsconfig_create,
    fsmount, fsopen, mount, mount_change, unmount,
};

/// Bytes of the large file: several spans.
const LARGE: usize = 5 << 20;

/// A private tmpfs with everything that is mounted, and a directory beside it for what is not. Both go with it.
struct Sandbox {
    mounts: tempfile::TempDir,
    files: tempfile::TempDir,
}

impl Sandbox {
    /// `None`: this machine can't mount FUSE filesystems, and that is noted.
    fn new() -> Option<Self> {
        if let Some(why) = skip::no_fuse() {
            skip::skipped_here(why);
            return None;
        }
        let sandbox = Self { mounts: tempfile::tempdir().unwrap(), files: tempfile::tempdir().unwrap() };
        mount("sandbox", sandbox.mounts.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(sandbox.mounts.path(), MountPropagationFlags::PRIVATE).unwrap();
        std::fs::create_dir(sandbox.mounts.path().join("pods")).unwrap();
        Some(sandbox)
    }

    fn target(&self, name: &str) -> PathBuf {
        self.mounts.path().canonicalize().unwrap().join("pods").join(name)
    }

    fn archive(&self) -> PathBuf {
        self.files.path().join("image.clip")
    }

    /// Makes the archive from a directory.
    async fn build(&self) {
        let image = self.files.path().join("image");
        std::fs::create_dir_all(image.join("usr/bin")).unwrap();
        std::fs::write(image.join("usr/bin/tool"), "the tool").unwrap();
        std::fs::set_permissions(image.join("usr/bin/tool"), std::fs::Permissions::from_mode(0o751)).unwrap();
        std::fs::hard_link(image.join("usr/bin/tool"), image.join("usr/bin/same")).unwrap();
        std::fs::write(image.join("large"), large()).unwrap();
        std::fs::write(image.join("empty"), "").unwrap();
        symlink("/usr/bin", image.join("absolute")).unwrap();
        symlink("../../../../usr", image.join("upwards")).unwrap();
        symlink("/etc/hostname", image.join("outside")).unwrap();
        archive_dir(&image, &self.archive(), &BuildOptions::default(), &Silent).await.unwrap();
    }

    fn manager(&self) -> MountManager {
        manager(self.mounts.path(), self.files.path())
    }

    fn spec(&self) -> MountSpec {
        spec(&self.archive())
    }

    /// Mount points below the sandbox.
    fn mounted(&self) -> usize {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let below = format!(" {}/", self.mounts.path().canonicalize().unwrap().display());
        table.lines().filter(|line| line.contains(&below)).count()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Takes everything below along.
        let _ = unmount(self.mounts.path(), UnmountFlags::DETACH);
    }
}

/// Kills its process.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn large() -> Vec<u8> {
    (0..LARGE).map(|n| (n / 7 % 251) as u8).collect()
}

fn manager(mounts: &Path, files: &Path) -> MountManager {
    let sources = Sources::new(Policy { trusted: true, config: Default::default() }).unwrap();
    let cache = Cache::open(&CacheConfig { dir: files.join("cache"), ..CacheConfig::default() }).unwrap();
    let images = ImageServiceConfig { archive_dir: files.join("archives"), ..ImageServiceConfig::default() };
    let provider = Provider::new(images, sources.clone()).unwrap();
    let config = MountConfig { mounts_dir: mounts.join("mounts"), state_dir: mounts.join("state") };
    MountManager::new(config, sources, cache, provider).unwrap()
}

fn spec(archive: &Path) -> MountSpec {
    MountSpec {
        archive: Location::File(archive.into()),
        pin: None,
        root: RootView::Auto,
        integrity: Integrity::Digest,
        scope: "public".into(),
        credentials: Credentials::default(),
    }
}

fn request(target: &Path, sub_path: Option<&str>) -> TargetSpec {
    TargetSpec {
        volume_id: "volume".into(),
        target: target.into(),
        sub_path: sub_path.map(str::to_owned),
        attributes: BTreeMap::new(),
    }
}

/// Ends a FUSE connection as an administrator does.
fn abort(device: u64) {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(&context).unwrap();
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    let path = format!("{}/abort", rustix::fs::minor(device));
    let file = rustix::fs::openat(&root, path, OFlags::WRONLY, Mode::empty()).unwrap();
    rustix::io::write(file, b"1").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_volumes_read_as_they_were_archived() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.build().await;
    let manager = sandbox.manager();
    let (whole, dir, link, file) =
        (sandbox.target("whole"), sandbox.target("dir"), sandbox.target("link"), sandbox.target("file"));
    let first = manager.publish(&sandbox.spec(), &request(&whole, None)).await.unwrap();
    assert!(first.version == Version::V1 && !first.shared, "{first:?}");
    for (target, sub_path) in [(&dir, "usr/bin"), (&link, "upwards/bin"), (&file, "absolute/tool")] {
        assert!(manager.publish(&sandbox.spec(), &request(target, Some(sub_path))).await.unwrap().shared);
    }
    assert_eq!(sandbox.mounted(), 5);

    assert_eq!(std::fs::read(whole.join("large")).unwrap(), large());
    assert_eq!(std::fs::read(whole.join("empty")).unwrap(), b"");
    for tool in [whole.join("usr/bin/tool"), dir.join("same"), link.join("tool"), file.clone()] {
        assert_eq!(std::fs::read(&tool).unwrap(), b"the tool", "{}", tool.display());
        let stat = std::fs::metadata(&tool).unwrap();
        assert_eq!((stat.mode() & 0o7777, stat.nlink()), (0o751, 2));
    }
    assert_eq!(std::fs::read_link(whole.join("outside")).unwrap(), Path::new("/etc/hostname"));
    let error = std::fs::write(whole.join("new"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(30), "read-only file system");

    let stats = manager.stats(&dir).await.unwrap();
    assert!(stats.bytes >= LARGE as u64 && stats.inodes >= 8 && stats.abnormal.is_none(), "{stats:?}");

    // A link out of the image ends inside of it, where nothing is.
    for refused in ["outside", "usr/../..", "/usr", "upwards/absent"] {
        let error = manager.publish(&sandbox.spec(), &request(&sandbox.target("no"), Some(refused))).await.unwrap_err();
        assert!(matches!(error, MountError::SubPath { .. }), "{refused}: {error:?}");
    }
    for target in [&whole, &dir, &link, &file] {
        manager.unpublish(target).await.unwrap();
        assert!(!target.exists());
    }
    assert_eq!(sandbox.mounted(), 0);
}

/// Not a test of its own: the plugin that `a_killed_plugin_is_recovered` starts and kills.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plugin_to_be_killed() {
    let Some(place) = std::env::var_os("CLIP_TEST_PLUGIN") else { return };
    let place = place.into_string().unwrap();
    let mut paths = place.split(':').map(Path::new);
    let (mounts, files) = (paths.next().unwrap(), paths.next().unwrap());
    let manager = manager(mounts, files);
    for target in paths {
        manager.publish(&spec(&files.join("image.clip")), &request(target, None)).await.unwrap();
    }
    println!("\nPUBLISHED");
    // Ends with the process that kills it, or at the latest when that one is gone.
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().lines().count()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_plugin_is_recovered() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.build().await;
    let targets = [sandbox.target("one"), sandbox.target("two"), sandbox.target("three")];
    let mut place = vec![sandbox.mounts.path(), sandbox.files.path()];
    place.extend(targets.iter().map(PathBuf::as_path));
    let place = std::env::join_paths(place).unwrap();
    let plugin = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "plugin_to_be_killed", "--nocapture"])
        .env("CLIP_TEST_PLUGIN", place)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut plugin = Guard(plugin);
    let output = BufReader::new(plugin.0.stdout.take().unwrap());
    assert!(output.lines().any(|line| line.unwrap() == "PUBLISHED"), "the plugin publishes");
    assert_eq!(std::fs::read(targets[0].join("usr/bin/tool")).unwrap(), b"the tool");
    // A container that runs meanwhile: it holds a file open.
    let running = std::fs::File::open(targets[0].join("large")).unwrap();

    plugin.0.kill().unwrap();
    plugin.0.wait().unwrap();
    // What the kernel has cached may still be seen; whoever asks the filesystem itself learns that nobody is there.
    for target in &targets {
        assert_eq!(rustix::fs::statfs(target.as_path()).unwrap_err(), rustix::io::Errno::NOTCONN);
    }

    let manager = sandbox.manager();
    // One of them is no longer wanted: teardown needs no recovery.
    manager.unpublish(&targets[2]).await.unwrap();
    assert!(!targets[2].exists());
    let mut recovery = manager.recover().await;
    recovery.rebound.sort();
    let mut wanted = targets[..2].to_vec();
    wanted.sort();
    assert_eq!((recovery.rebound, recovery.failed), (wanted, vec![]));
    for target in &targets[..2] {
        assert_eq!(std::fs::read(target.join("large")).unwrap(), large());
        assert!(manager.publish(&sandbox.spec(), &request(target, None)).await.unwrap().already);
        assert_eq!(manager.stats(target).await.unwrap().abnormal, None);
    }
    assert_eq!(sandbox.mounted(), 3);
    // What was open stays dead until its container restarts: documented, and so it is.
    assert_eq!((&running).read(&mut [0; 16]).unwrap_err().raw_os_error(), Some(107), "ENOTCONN");
    for target in &targets[..2] {
        manager.unpublish(target).await.unwrap();
    }
    assert_eq!(sandbox.mounted(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_connection_is_served_again() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.build().await;
    let (manager, target) = (sandbox.manager(), sandbox.target("t"));
    manager.publish(&sandbox.spec(), &request(&target, None)).await.unwrap();
    let before = std::fs::metadata(&target).unwrap().dev();
    abort(before);
    // A dead mount may still show what the kernel has cached: another device says that it is another session.
    let tool = target.join("usr/bin/tool");
    let healed = appear::mounts_change(|| std::fs::metadata(&tool).is_ok_and(|stat| stat.dev() != before));
    tokio::time::timeout(Duration::from_secs(20), healed).await.unwrap();
    assert_eq!(std::fs::read(&tool).unwrap(), b"the tool");
    assert_eq!(manager.stats(&target).await.unwrap().abnormal, None);
    manager.unpublish(&target).await.unwrap();
    assert_eq!(sandbox.mounted(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn targets_of_one_archive_come_and_go_over_one_session() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.build().await;
    let manager = Arc::new(sandbox.manager());
    let workers = (0..4).map(|n| {
        let (manager, spec, target) = (manager.clone(), sandbox.spec(), sandbox.target(&n.to_string()));
        tokio::spawn(async move {
            for _ in 0..5 {
                manager.publish(&spec, &request(&target, None)).await.unwrap();
                let file = target.join("usr/bin/tool");
                let read = tokio::task::spawn_blocking(move || std::fs::read(file));
                assert_eq!(read.await.unwrap().unwrap(), b"the tool");
                manager.unpublish(&target).await.unwrap();
            }
        })
    });
    let all = futures::future::join_all(workers);
    for outcome in tokio::time::timeout(Duration::from_secs(60), all).await.unwrap() {
        outcome.unwrap();
    }
    assert_eq!(sandbox.mounted(), 0);
}
