//! A double of the kernel filesystem: real mounts (a read-only tmpfs, or a FUSE connection that nobody answers), and faults.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_remount};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::archive::Version;
use crate::fs::OpenError;
use crate::source::{Credentials, Location, SourceError};
use crate::units::Digest;

use super::super::serve::{Place, Served, Server};
use super::super::sys::{self, Liveness};
use super::super::target::Swap;
use super::super::{MountConfig, MountError, MountManager, MountSpec, io_error};
use crate::fs::mountinfo::MountTable;

/// A tmpfs of its own, private, with everything a manager needs; all that is mounted below it goes with it.
#[derive(Debug)]
pub struct Sandbox {
    dir: tempfile::TempDir,
    pub root: PathBuf,
}

impl Sandbox {
    /// `None`: nothing can be mounted here, and that is noted.
    pub fn new() -> Option<Self> {
        if let Some(why) = crate::skip::no_fuse() {
            crate::skip::skipped_here(why);
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        mount("sandbox", &root, "tmpfs", MountFlags::empty(), None).unwrap();
        let sandbox = Self { dir, root };
        mount_change(&sandbox.root, MountPropagationFlags::PRIVATE).unwrap();
        std::fs::create_dir(sandbox.root.join("pods")).unwrap();
        Some(sandbox)
    }

    pub fn config(&self) -> MountConfig {
        MountConfig { mounts_dir: self.root.join("mounts"), state_dir: self.root.join("state") }
    }

    pub fn manager(&self, fake: &Arc<Fake>) -> MountManager {
        MountManager::with_server(&self.config(), fake.clone()).unwrap()
    }

    pub fn target(&self, name: &str) -> PathBuf {
        self.root.join("pods").join(name)
    }

    /// Mount points below the sandbox, sorted, stacked ones as often as they are there.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let table = MountTable::read().unwrap();
        let below =
            |mount: &&crate::fs::mountinfo::Mount| mount.point.starts_with(&self.root) && mount.point != self.root;
        let mut points: Vec<_> = table.iter().filter(below).map(|mount| mount.point.clone()).collect();
        points.sort();
        points
    }

    /// Those in `mounts_dir`.
    pub fn shared_mounts(&self) -> usize {
        self.mounts().iter().filter(|point| point.starts_with(self.root.join("mounts"))).count()
    }

    /// Nothing mounted, no mount point, no target, no record.
    pub fn assert_clean(&self) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new());
        let names = |dir: &str| -> Vec<_> {
            let entries = std::fs::read_dir(self.root.join(dir)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|n| n != "lock").collect()
        };
        assert_eq!(names("mounts"), Vec::<String>::new());
        assert_eq!(names("pods"), Vec::<String>::new());
        assert_eq!(names("state"), Vec::<String>::new());
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Takes everything below along.
        let _ = sys::detach(&self.root);
        let _ = std::fs::remove_dir_all(self.dir.path());
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The archive can't be opened.
    Open,
    /// The mount fails.
    Mount,
    /// The mount is made, and then an error is reported.
    MountedThenError,
    /// The mount has another source column than it should.
    WrongName,
    /// The mount can be written to.
    Writable,
}

#[derive(Debug, Default)]
pub struct Fake {
    /// Bytes of the "archive" by path: their digest is the archive's.
    pub content: Mutex<BTreeMap<PathBuf, String>>,
    pub fault: Mutex<Option<Fault>>,
    /// FUSE connections instead of a tmpfs: they can die.
    pub fuse: bool,
    /// Deaths are announced, as FUSE sessions do.
    pub announces: bool,
    /// As on a kernel that can't mount beneath another mount.
    pub before_6_5: bool,
    /// Mounts that no record names are still answered.
    pub alive: bool,
    /// Nothing is admitted without credentials.
    pub private: bool,
    /// Set: each open waits for a permit.
    pub gate: Option<Semaphore>,
    pub opens: AtomicUsize,
    pub mounts: AtomicUsize,
    pub images: Mutex<Vec<Arc<FakeImage>>>,
}

impl Fake {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn fuse() -> Arc<Self> {
        Arc::new(Self { fuse: true, ..Self::default() })
    }

    fn text(&self, spec: &MountSpec) -> String {
        let Location::File(path) = &spec.archive else { unreachable!("the tests use files") };
        self.content.lock().unwrap().get(path).cloned().unwrap_or_else(|| path.display().to_string())
    }

    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }

    /// All servers die, as they do when their process does.
    pub fn die(&self) {
        for image in self.images.lock().unwrap().iter() {
            image.connection.lock().unwrap().take();
            image.alive.store(false, Ordering::SeqCst);
            if self.announces {
                image.ended.lock().unwrap().cancel();
            }
        }
    }
}

#[async_trait]
impl Server for Fake {
    async fn identity(&self, spec: &MountSpec) -> Result<String, MountError> {
        Ok(self.text(spec))
    }

    async fn open(&self, spec: &MountSpec) -> Result<Arc<dyn Served>, MountError> {
        self.opens.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let fault = *self.fault.lock().unwrap();
        if fault == Some(Fault::Open) {
            return Err(io_error("opening", "a fault"));
        }
        self.mounts.fetch_add(1, Ordering::SeqCst);
        let image = Arc::new(FakeImage {
            digest: Digest::of(self.text(spec).as_bytes()),
            fuse: self.fuse,
            fault,
            connection: Mutex::new(None),
            alive: AtomicBool::new(false),
            ended: Mutex::default(),
            failure: Mutex::default(),
            renewed: Mutex::default(),
        });
        self.images.lock().unwrap().push(image.clone());
        Ok(image)
    }

    async fn admit(&self, _: &dyn Served, spec: &MountSpec) -> Result<(), MountError> {
        if self.private && spec.credentials.identity.is_none() {
            let denied = SourceError::Denied { what: "the image".into(), detail: "a fault".into() };
            return Err(OpenError::from(denied).into());
        }
        Ok(())
    }

    fn pin(&self, _: &mut MountSpec) -> Result<(), MountError> {
        Err(io_error("pinning", "the tests have no store"))
    }

    fn probe(&self, path: &Path, deadline: Duration) -> Liveness {
        // A tmpfs answers always; what the earlier manager left of one counts as dead.
        match self.fuse {
            true => sys::probe(path, deadline),
            false if self.alive => Liveness::Alive,
            false => Liveness::Dead,
        }
    }

    fn swap(&self) -> Swap {
        if self.before_6_5 { Swap::Above } else { Swap::Beneath }
    }
}

#[derive(Debug)]
pub struct FakeImage {
    digest: Digest,
    fuse: bool,
    fault: Option<Fault>,
    connection: Mutex<Option<File>>,
    pub alive: AtomicBool,
    ended: Mutex<CancellationToken>,
    pub failure: Mutex<Option<(Duration, String)>>,
    /// Who brought the last credentials.
    pub renewed: Mutex<Option<Digest>>,
}

impl FakeImage {
    fn mount_tmpfs(&self, at: &Path, source: &str) -> io::Result<()> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount(source, at, "tmpfs", flags, None)?;
        std::fs::create_dir_all(at.join("usr/bin"))?;
        std::fs::write(at.join("usr/bin/tool"), "the tool")?;
        std::fs::write(at.join("marker"), self.digest.hex())?;
        std::os::unix::fs::symlink("usr/bin", at.join("bin"))?;
        std::os::unix::fs::symlink("/", at.join("lie"))?;
        std::fs::create_dir(at.join("crossing"))?;
        if self.fault == Some(Fault::Writable) {
            return Ok(());
        }
        Ok(mount_remount(at, flags | MountFlags::RDONLY, "")?)
    }
}

impl Served for FakeImage {
    fn data_location(&self) -> Option<Location> {
        None
    }

    fn digest(&self) -> Digest {
        self.digest
    }
    fn version(&self) -> Version {
        Version::V1
    }
    fn detected_from(&self) -> String {
        "the test".into()
    }
    fn bundle(&self) -> bool {
        false
    }
    fn resolve(&self, sub_path: &Path) -> Result<Place, String> {
        let place = |path: &str, is_dir| Ok(Place { path: Some(path.into()), is_dir });
        match sub_path.to_str().unwrap() {
            "usr" => place("usr", true),
            "usr/bin" | "bin" => place("usr/bin", true),
            "usr/bin/tool" | "bin/tool" => place("usr/bin/tool", false),
            "up" => Ok(Place { path: None, is_dir: true }),
            // An index that is wrong about its own filesystem.
            "lie" => place("lie", true),
            "lie/etc" => place("lie/etc", true),
            "dots" => place("../../..", true),
            "crossing" => place("crossing", true),
            _ => Err("no such file or directory in the image".into()),
        }
    }
    fn size(&self) -> (u64, u64) {
        (8, 7)
    }
    fn last_failure(&self) -> Option<(Duration, String)> {
        self.failure.lock().unwrap().clone()
    }
    fn renew(&self, credentials: &Credentials) {
        *self.renewed.lock().unwrap() = credentials.identity;
    }
    fn mount(&self, at: &Path, fs_name: &str, _: Handle) -> io::Result<()> {
        match self.fault {
            Some(Fault::Mount) => return Err(io::Error::other("a fault")),
            Some(Fault::WrongName) => self.mount_tmpfs(at, "clip-csi:00000000:00000000000000000000000000000000")?,
            _ if self.fuse => {
                let connection = File::options().read(true).write(true).open("/dev/fuse")?;
                mount_fuse(&connection, at, fs_name)?;
                *self.connection.lock().unwrap() = Some(connection);
            }
            _ => self.mount_tmpfs(at, fs_name)?,
        }
        if self.fault == Some(Fault::MountedThenError) {
            return Err(io::Error::other("a late fault"));
        }
        *self.ended.lock().unwrap() = CancellationToken::new();
        self.alive.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn ended(&self) -> BoxFuture<'static, ()> {
        self.ended.lock().unwrap().clone().cancelled_owned().boxed()
    }
    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }
    fn unmount(&self) -> io::Result<()> {
        self.alive.store(false, Ordering::SeqCst);
        // As the real one: the mount is detached by whoever calls, who looks at mountinfo.
        self.connection.lock().unwrap().take();
        Ok(())
    }
    fn abandon(&self) {
        self.alive.store(false, Ordering::SeqCst);
        self.connection.lock().unwrap().take();
    }
}

/// A FUSE mount whose root needs no answer to be bound. Dead (ENOTCONN) once `connection` is dropped.
pub fn mount_fuse(connection: &File, at: &Path, source: &str) -> io::Result<()> {
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", connection.as_raw_fd());
    let options = CString::new(options).unwrap();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY;
    Ok(mount(source, at, "fuse.clip", flags, options.as_c_str())?)
}
