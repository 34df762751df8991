//! The filesystem as the kernel shows it: real mounts of trees in memory. Needs root and /dev/fuse; says so and passes
//! where they are missing.

#[path = "common/skip.rs"]
mod skip;

use std::collections::{BTreeSet, VecDeque};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use clip_csi::archive::{Entry, Extent, Kind, NodeId, Timestamp, Tree, TreeBuilder};
use clip_csi::cache::CacheError;
use clip_csi::fs::fuse::{FuseOptions, FuseServer};
use clip_csi::fs::{Blob, ImageFs, digest_dir, digest_fs, extract};
use clip_csi::source::SourceError;
use tokio::sync::Semaphore;

/// A blob whose byte at `i` is a function of `i`, as long as an archive can name.
#[derive(Debug, Default)]
struct PatternBlob {
    /// Reads are hits.
    warm: AtomicBool,
    /// Cold reads take their fault from here.
    faults: Mutex<VecDeque<CacheError>>,
    /// Cold reads wait for a permit here, where there is one.
    gate: Option<Arc<Semaphore>>,
    cold_reads: AtomicU64,
}

fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn pattern_bytes(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(pattern).collect()
}

#[async_trait]
impl Blob for PatternBlob {
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        let warm = self.warm.load(Ordering::Relaxed);
        if warm {
            buf.iter_mut().zip(off..).for_each(|(byte, at)| *byte = pattern(at));
        }
        warm
    }

    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        self.cold_reads.fetch_add(1, Ordering::Relaxed);
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        match self.faults.lock().unwrap().pop_front() {
            Some(error) => Err(error),
            None => Ok(pattern_bytes(off, len).into()),
        }
    }
}

fn warm() -> Arc<PatternBlob> {
    Arc::new(PatternBlob { warm: AtomicBool::new(true), ..PatternBlob::default() })
}

fn file(size: u64, offset: u64) -> Entry {
    Entry { size, offset, mtime: Timestamp { sec: 1_700_000_000, nsec: 123_456_789 }, ..Entry::new(Kind::File, 0o644) }
}

fn dir() -> Entry {
    Entry { mtime: Timestamp { sec: 1_600_000_000, nsec: 1 }, ..Entry::new(Kind::Dir, 0o755) }
}

fn tree(entries: impl IntoIterator<Item = (impl AsRef<[u8]>, Entry)>) -> Arc<Tree> {
    let mut builder = TreeBuilder::default();
    builder.insert(b"/", dir());
    entries.into_iter().for_each(|(path, entry)| builder.insert(path.as_ref(), entry));
    Arc::new(builder.finish().unwrap())
}

/// A mount that is taken away again, also when a test panics.
struct Mounted {
    server: Option<FuseServer>,
    dir: tempfile::TempDir,
    fs: Arc<ImageFs>,
    runtime: tokio::runtime::Runtime,
}

impl Mounted {
    /// `None` where this machine can't mount, which is noted.
    fn new(tree: Arc<Tree>, blob: Arc<PatternBlob>) -> Option<Self> {
        Self::of(ImageFs::new(tree, NodeId::ROOT, vec![blob]))
    }

    fn of(fs: ImageFs) -> Option<Self> {
        if let Some(why) = skip::no_fuse() {
            skip::skipped_here(why);
            return None;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let fs = Arc::new(fs);
        let server =
            FuseServer::mount(Arc::clone(&fs), dir.path(), &FuseOptions::default(), runtime.handle().clone()).unwrap();
        Some(Self { server: Some(server), dir, fs, runtime })
    }

    fn path(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.dir.path().join(name.as_ref())
    }

    fn server(&self) -> &FuseServer {
        self.server.as_ref().unwrap()
    }

    fn mountinfo(&self) -> Option<String> {
        mountinfo(self.dir.path())
    }
}

fn mountinfo(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().find(|line| line.split(' ').nth(4) == path.to_str()).map(str::to_owned)
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(server) = self.server.take()
            && let Err(error) = server.unmount()
        {
            eprintln!("unmount: {error}");
        }
    }
}

fn os_error<T>(result: io::Result<T>) -> i32 {
    result.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

fn of_rustix<T>(result: rustix::io::Result<T>) -> i32 {
    result.err().map_or(0, |e| e.raw_os_error())
}

/// One name of everything that an image can hold.
fn everything() -> Arc<Tree> {
    let group = |entry: Entry| Entry { link_group: 7, ..entry };
    tree([
        (&b"/setuid"[..], Entry { mode: 0o4711, uid: 0, gid: 42, ..file(1234, 99) }),
        (b"/empty", file(0, 0)),
        (b"/old", Entry { mtime: Timestamp { sec: -3, nsec: 250_000_000 }, ..file(1, 0) }),
        (b"/dir", Entry { mode: 0o1777, uid: 1000, gid: 1001, ..dir() }),
        (b"/dir/sub", dir()),
        (b"/dir/\xff\xfe \n\\040name", file(10, 5)),
        (b"/dir/link", Entry { target: b"../setuid".to_vec(), ..Entry::new(Kind::Symlink, 0o777) }),
        (b"/dir/raw", Entry { target: b"\xffnowhere".to_vec(), ..Entry::new(Kind::Symlink, 0o777) }),
        (b"/fifo", Entry::new(Kind::Fifo, 0o600)),
        (b"/socket", Entry::new(Kind::Socket, 0o640)),
        (b"/null", Entry { rdev: (1 << 8) | 3, ..Entry::new(Kind::CharDevice, 0o666) }),
        (b"/loop", Entry { rdev: (7 << 8) | 1, ..Entry::new(Kind::BlockDevice, 0o660) }),
        (b"/hard/a", group(file(5000, 7000))),
        (b"/hard/b", group(file(5000, 7000))),
        (b"/first", group(file(5000, 7000))),
        (
            b"/xattrs",
            Entry {
                xattrs: vec![
                    (b"user.empty".to_vec(), vec![]),
                    (b"user.mime".to_vec(), b"text/plain".to_vec()),
                    (b"user.bytes".to_vec(), vec![0, 255, 10]),
                ],
                ..file(3, 3)
            },
        ),
        (
            b"/sparse",
            Entry {
                extents: Some(vec![
                    Extent { offset: 4096, len: 4096, blob_offset: 10_000 },
                    Extent { offset: 65536, len: 100, blob_offset: 14_096 },
                ]),
                ..file(1 << 20, 0)
            },
        ),
    ])
}

#[test]
fn attributes_of_every_type_are_shown() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let meta = |name: &str| m.path(name).symlink_metadata().unwrap();
    let setuid = meta("setuid");
    assert_eq!((setuid.mode(), setuid.uid(), setuid.gid()), (0o104711, 0, 42));
    assert_eq!((setuid.size(), setuid.blocks(), setuid.nlink()), (1234, 3, 1));
    assert_eq!((setuid.mtime(), setuid.mtime_nsec()), (1_700_000_000, 123_456_789));
    assert_eq!((meta("old").mtime(), meta("old").mtime_nsec()), (-3, 250_000_000));
    let dir = meta("dir");
    assert_eq!((dir.mode(), dir.uid(), dir.gid(), dir.nlink()), (0o041777, 1000, 1001, 3));
    assert_eq!(m.path("").metadata().unwrap().ino(), 1);
    assert!(meta("fifo").file_type().is_fifo());
    assert!(meta("socket").file_type().is_socket());
    assert_eq!((meta("null").mode() & 0o170000, meta("null").rdev()), (0o020000, rustix::fs::makedev(1, 3)));
    assert_eq!((meta("loop").mode() & 0o170000, meta("loop").rdev()), (0o060000, rustix::fs::makedev(7, 1)));
    assert_eq!(meta("sparse").blocks(), 4196u64.div_ceil(512));
}

#[test]
fn names_of_one_file_share_an_inode() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let inodes: BTreeSet<u64> = ["first", "hard/a", "hard/b"].map(|n| m.path(n).metadata().unwrap().ino()).into();
    assert_eq!(inodes.len(), 1);
    assert_eq!(m.path("hard/b").metadata().unwrap().nlink(), 3);
    assert_eq!(std::fs::read(m.path("hard/a")).unwrap(), pattern_bytes(7000, 5000));
    // The numbers of a listing are those of stat.
    for entry in std::fs::read_dir(m.path("hard")).unwrap() {
        assert_eq!(std::os::unix::fs::DirEntryExt::ino(&entry.unwrap()), *inodes.first().unwrap());
    }
}

#[test]
fn names_of_any_bytes_are_listed_and_opened() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let names: BTreeSet<OsString> = std::fs::read_dir(m.path("dir")).unwrap().map(|e| e.unwrap().file_name()).collect();
    let odd = OsString::from_vec(b"\xff\xfe \n\\040name".to_vec());
    let want: BTreeSet<OsString> = [odd.clone(), "link".into(), "raw".into(), "sub".into()].into();
    assert_eq!(names, want);
    assert_eq!(std::fs::read(m.path("dir").join(odd)).unwrap(), pattern_bytes(5, 10));
}

#[test]
fn symlinks_keep_their_targets() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    assert_eq!(std::fs::read_link(m.path("dir/link")).unwrap(), Path::new("../setuid"));
    assert_eq!(std::fs::read_link(m.path("dir/raw")).unwrap().as_os_str().as_bytes(), b"\xffnowhere");
    assert_eq!(std::fs::read(m.path("dir/link")).unwrap(), pattern_bytes(99, 1234));
}

#[test]
fn xattrs_are_read_with_their_errors() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let path = m.path("xattrs");
    let get = |name: &str, buf: &mut [u8]| rustix::fs::getxattr(&path, name, buf);
    let mut buf = [0; 64];
    assert_eq!(get("user.mime", &mut buf).unwrap(), 10);
    assert_eq!(&buf[..10], b"text/plain");
    assert_eq!(get("user.bytes", &mut buf).unwrap(), 3);
    assert_eq!(buf[..3], [0, 255, 10]);
    assert_eq!(get("user.empty", &mut buf).unwrap(), 0);
    assert_eq!(of_rustix(get("user.mime", &mut [0; 9])), libc::ERANGE);
    assert_eq!(of_rustix(get("user.absent", &mut buf)), libc::ENODATA);
    let len = rustix::fs::listxattr(&path, &mut buf[..]).unwrap();
    assert_eq!(&buf[..len], b"user.bytes\0user.empty\0user.mime\0");
    assert_eq!(of_rustix(rustix::fs::listxattr(&path, &mut [0; 4][..])), libc::ERANGE);
    assert_eq!(rustix::fs::listxattr(m.path("setuid"), &mut buf[..]).unwrap(), 0);
    assert_eq!(of_rustix(rustix::fs::getxattr(m.path("setuid"), "security.capability", &mut buf[..])), libc::ENODATA);
}

#[test]
fn a_tree_without_xattrs_lists_none() {
    let Some(m) = Mounted::new(tree([("/f", file(1, 0))]), warm()) else { return };
    let mut buf = [0; 64];
    assert_eq!(rustix::fs::listxattr(m.path("f"), &mut buf[..]).unwrap(), 0);
    for _ in 0..2 {
        assert_eq!(of_rustix(rustix::fs::getxattr(m.path("f"), "user.x", &mut buf[..])), libc::EOPNOTSUPP);
    }
}

#[test]
fn a_directory_of_100k_names_is_listed_whole() {
    let names =
        (0..100_000u32).map(|i| (format!("/big/{:x}-name-of-some-length", i.wrapping_mul(2_654_435_761)), file(1, 0)));
    let Some(m) = Mounted::new(tree(names), warm()) else { return };
    let started = std::time::Instant::now();
    let list = || -> BTreeSet<OsString> {
        std::fs::read_dir(m.path("big")).unwrap().map(|e| e.unwrap().file_name()).collect()
    };
    let cold = list();
    let cold_time = started.elapsed();
    assert_eq!(cold.len(), 100_000);
    assert_eq!(list(), cold);
    assert_eq!(std::fs::metadata(m.path("big/0-name-of-some-length")).unwrap().size(), 1);
    // Quadratic work would take minutes.
    assert!(cold_time < Duration::from_secs(20), "{cold_time:?}");
    eprintln!("100k names, cold: {cold_time:?}");
}

#[test]
fn holes_read_as_zeros_and_are_found() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let bytes = std::fs::read(m.path("sparse")).unwrap();
    let mut want = vec![0; 1 << 20];
    want[4096..8192].copy_from_slice(&pattern_bytes(10_000, 4096));
    want[65536..65636].copy_from_slice(&pattern_bytes(14_096, 100));
    assert!(bytes == want);
    let file = File::open(m.path("sparse")).unwrap();
    let seek = |off, whence| {
        // SAFETY: lseek on an open descriptor touches no memory.
        let at = unsafe { libc::lseek(file.as_raw_fd(), off, whence) };
        if at < 0 { -i64::from(io::Error::last_os_error().raw_os_error().unwrap()) } else { at }
    };
    assert_eq!(seek(0, libc::SEEK_DATA), 4096);
    assert_eq!(seek(4096, libc::SEEK_HOLE), 8192);
    assert_eq!(seek(8192, libc::SEEK_DATA), 65536);
    assert_eq!(seek(65540, libc::SEEK_HOLE), 65636);
    assert_eq!(seek(65636, libc::SEEK_DATA), -i64::from(libc::ENXIO));
}

#[test]
fn a_file_of_many_gigabytes_is_read_at_its_end() {
    const TB: u64 = 1 << 40;
    let extents = vec![
        Extent { offset: 5 << 30, len: 8192, blob_offset: 6 << 30 },
        Extent { offset: TB - 10, len: 10, blob_offset: (6 << 30) + 8192 },
    ];
    let entries = [("/sparse", Entry { extents: Some(extents), ..file(TB, 0) }), ("/whole", file(TB, 1 << 33))];
    let Some(m) = Mounted::new(tree(entries), warm()) else { return };
    let sparse = File::open(m.path("sparse")).unwrap();
    assert_eq!(sparse.metadata().unwrap().size(), TB);
    let mut buf = vec![1; 8194];
    sparse.read_exact_at(&mut buf, (5 << 30) - 1).unwrap();
    assert_eq!((buf[0], buf[8193]), (0, 0));
    assert!(buf[1..8193] == pattern_bytes(6 << 30, 8192));
    sparse.read_exact_at(&mut buf[..10], TB - 10).unwrap();
    assert_eq!(buf[..10], pattern_bytes((6 << 30) + 8192, 10));
    assert_eq!(sparse.read_at(&mut buf, TB).unwrap(), 0);
    let mut whole = File::open(m.path("whole")).unwrap();
    whole.seek(SeekFrom::End(-100)).unwrap();
    let mut tail = Vec::new();
    whole.read_to_end(&mut tail).unwrap();
    assert_eq!(tail, pattern_bytes((1 << 33) + TB - 100, 100));
}

#[test]
fn an_empty_file_needs_no_blob() {
    let blob = Arc::new(PatternBlob::default());
    let Some(m) = Mounted::new(everything(), Arc::clone(&blob)) else { return };
    assert_eq!(std::fs::read(m.path("empty")).unwrap(), b"");
    assert_eq!(blob.cold_reads.load(Ordering::Relaxed), 0);
}

#[test]
fn every_write_is_refused_as_read_only() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let setuid = m.path("setuid");
    assert_eq!(os_error(File::options().write(true).open(&setuid)), libc::EROFS);
    assert_eq!(os_error(File::create(m.path("new"))), libc::EROFS);
    assert_eq!(os_error(std::fs::create_dir(m.path("new"))), libc::EROFS);
    assert_eq!(os_error(std::fs::remove_file(&setuid)), libc::EROFS);
    assert_eq!(os_error(std::fs::rename(&setuid, m.path("new"))), libc::EROFS);
    assert_eq!(os_error(std::fs::hard_link(&setuid, m.path("new"))), libc::EROFS);
    assert_eq!(os_error(std::os::unix::fs::symlink("x", m.path("new"))), libc::EROFS);
    assert_eq!(os_error(std::fs::set_permissions(&setuid, PermissionsExt::from_mode(0o777))), libc::EROFS);
    assert_eq!(of_rustix(rustix::fs::setxattr(&setuid, "user.x", b"1", rustix::fs::XattrFlags::empty())), libc::EROFS);
}

#[test]
fn absent_names_and_attributes_are_kept_by_the_kernel() {
    let Some(mut m) = Mounted::new(everything(), warm()) else { return };
    let server = m.server.take().unwrap();
    let stat = |name: &str| os_error(m.path(name).metadata());
    assert_eq!((stat("absent"), stat("setuid"), stat("dir/link")), (libc::ENOENT, 0, 0));
    assert_eq!(std::fs::read_dir(m.path("dir")).unwrap().count(), 4);
    assert_eq!(std::fs::read(m.path("setuid")).unwrap().len(), 1234);
    // Nobody answers any more: what is known is known, what is new fails.
    server.abort().unwrap();
    m.runtime.block_on(server.ended());
    assert_eq!((stat("absent"), stat("setuid"), stat("dir/link")), (libc::ENOENT, 0, 0));
    assert_eq!(stat("also-absent"), libc::ENOTCONN);
    assert!(!server.is_alive() && m.mountinfo().is_some());
    server.unmount().unwrap();
    assert!(m.mountinfo().is_none());
}

#[test]
fn a_slow_source_holds_up_only_its_own_readers() {
    let gate = Arc::new(Semaphore::new(0));
    let slow = Arc::new(PatternBlob { gate: Some(Arc::clone(&gate)), ..PatternBlob::default() });
    let mut entries: Vec<(String, Entry)> = (0..16).map(|i| (format!("/slow{i}"), file(100, i * 1000))).collect();
    entries.push(("/fast".into(), Entry { blob: clip_csi::archive::BlobIx(1), ..file(100, 5) }));
    let fs = ImageFs::new(tree(entries), NodeId::ROOT, vec![slow, warm()]);
    let Some(m) = Mounted::of(fs) else { return };
    std::thread::scope(|scope| {
        // More readers than there are serving threads.
        let readers: Vec<_> = (0..16u64)
            .map(|i| {
                let path = m.path(format!("slow{i}"));
                scope.spawn(move || (i, std::fs::read(path).unwrap()))
            })
            .collect();
        assert_eq!(std::fs::read(m.path("fast")).unwrap(), pattern_bytes(5, 100));
        assert!(m.path("absent").metadata().is_err());
        assert!(readers.iter().all(|r| !r.is_finished()));
        gate.add_permits(16);
        for reader in readers {
            let (i, bytes) = reader.join().unwrap();
            assert_eq!(bytes, pattern_bytes(i * 1000, 100));
        }
    });
}

#[test]
fn a_failed_read_names_its_kind_and_a_later_one_succeeds() {
    let what = || "the layer".to_owned();
    let detail = || "a test".to_owned();
    let unavailable = SourceError::Unavailable { what: what(), tries: 3, detail: detail() };
    let cases = [
        (CacheError::Source(SourceError::Denied { what: what(), detail: detail() }), libc::EACCES),
        (CacheError::Source(SourceError::Refused { what: what(), detail: detail() }), libc::EACCES),
        (CacheError::Source(unavailable), libc::ETIMEDOUT),
        (CacheError::Source(SourceError::NotFound { what: what(), detail: detail() }), libc::EIO),
        (CacheError::Corrupt { what: what(), detail: detail() }, libc::EIO),
        (CacheError::Unverifiable { what: what() }, libc::EIO),
    ];
    let blob = Arc::new(PatternBlob::default());
    let Some(m) = Mounted::new(tree([("/f", file(100, 0))]), Arc::clone(&blob)) else { return };
    for (error, errno) in cases {
        // The kernel asks twice before it gives up: a read-ahead, then the page itself.
        blob.faults.lock().unwrap().extend([error.clone(), error.clone()]);
        assert_eq!(os_error(std::fs::read(m.path("f"))), errno, "{error}");
        blob.faults.lock().unwrap().clear();
    }
    assert_eq!(std::fs::read(m.path("f")).unwrap(), pattern_bytes(0, 100));
}

#[test]
fn the_first_read_is_told_once() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let told = Arc::new(AtomicU64::new(0));
    let hook = Arc::clone(&told);
    m.fs.on_first_read(move || {
        hook.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(std::fs::read_dir(m.path("dir")).unwrap().count(), 4);
    assert_eq!(told.load(Ordering::Relaxed), 0);
    std::fs::read(m.path("setuid")).unwrap();
    std::fs::read(m.path("first")).unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

#[test]
fn the_shown_root_is_inode_one_and_nothing_is_above_it() {
    let entries = [
        ("/config.json", file(10, 0)),
        ("/rootfs/etc/passwd", file(20, 50)),
        ("/rootfs/up", Entry { target: b"../config.json".to_vec(), ..Entry::new(Kind::Symlink, 0o777) }),
    ];
    let tree = tree(entries);
    let root = tree.lookup(NodeId::ROOT, b"rootfs").unwrap();
    let Some(m) = Mounted::of(ImageFs::new(tree, root, vec![warm()])) else { return };
    assert_eq!(m.path("").metadata().unwrap().ino(), 1);
    assert_eq!(std::fs::read(m.path("etc/passwd")).unwrap(), pattern_bytes(50, 20));
    assert_eq!(os_error(m.path("config.json").metadata()), libc::ENOENT);
    assert_eq!(os_error(m.path("up").metadata()), libc::ENOENT);
    let names: Vec<_> = std::fs::read_dir(m.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["etc", "up"]);
}

#[test]
fn mount_is_read_only_nosuid_nodev_and_named() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let line = m.mountinfo().unwrap();
    let (mount, super_block) = line.split_once(" - ").unwrap();
    let options: BTreeSet<&str> = mount.split(' ').nth(5).unwrap().split(',').collect();
    assert!(["ro", "nosuid", "nodev"].iter().all(|o| options.contains(o)), "{line}");
    assert!(super_block.starts_with("fuse.clip clip-csi ro,"), "{line}");
    assert!(super_block.contains("allow_other") && super_block.contains("default_permissions"), "{line}");
    assert!(super_block.contains("max_read=1048576"), "{line}");
    let (major, minor) = m.server().device().unwrap();
    assert!(mount.contains(&format!(" {major}:{minor} ")), "{line}");
    let read_ahead = std::fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap();
    assert_eq!(read_ahead.trim(), "1024");
    // A device node is inert.
    assert_eq!(os_error(File::open(m.path("null"))), libc::EACCES);
}

#[test]
fn any_user_reads_what_the_modes_allow() {
    let entries = [("/open", file(4, 0)), ("/closed", Entry { mode: 0o600, ..file(4, 0) })];
    let Some(m) = Mounted::new(tree(entries), warm()) else { return };
    std::fs::set_permissions(m.dir.path().parent().unwrap(), PermissionsExt::from_mode(0o1777)).unwrap();
    let cat = |name: &str| Command::new("cat").arg(m.path(name)).uid(65534).gid(65534).output().unwrap();
    let open = cat("open");
    assert_eq!((open.status.success(), open.stdout), (true, pattern_bytes(0, 4)));
    let closed = cat("closed");
    assert!(!closed.status.success() && String::from_utf8_lossy(&closed.stderr).contains("Permission denied"));
}

#[test]
fn statfs_tells_the_image() {
    let fs = everything();
    let (bytes, inodes) = (fs.total_size(), fs.inodes() as u64);
    let Some(m) = Mounted::new(fs, warm()) else { return };
    let stat = rustix::fs::statvfs(m.dir.path()).unwrap();
    assert_eq!((stat.f_blocks * stat.f_frsize, stat.f_files), (bytes.next_multiple_of(4096), inodes));
    assert_eq!((stat.f_bfree, stat.f_ffree), (0, 0));
}

#[test]
fn digest_of_the_mount_is_that_of_the_tree_and_of_what_extract_writes() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let of_fs = m.runtime.block_on(digest_fs(&m.fs, &|_| {})).unwrap();
    let of_mount = digest_dir(m.dir.path(), &|_| {}).unwrap();
    assert_eq!(of_mount, of_fs);
    assert_eq!(of_fs.names as usize, m.fs.tree().len());
    let out = tempfile::tempdir().unwrap();
    let done = m.runtime.block_on(extract(&m.fs, out.path(), &|_| {})).unwrap();
    assert_eq!((done.names, done.warnings.len()), (of_fs.names - 1, 0), "{:?}", done.warnings);
    assert_eq!(digest_dir(out.path(), &|_| {}).unwrap(), of_fs);
    let again = m.runtime.block_on(extract(&m.fs, out.path(), &|_| {})).unwrap_err();
    assert!(again.to_string().contains("not empty"), "{again}");
    // Holes stay holes.
    assert!(out.path().join("sparse").metadata().unwrap().blocks() * 512 < 64 << 10);
}

#[test]
fn a_given_descriptor_is_served() {
    let Some(m) = Mounted::new(everything(), warm()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let fd: OwnedFd = File::options().read(true).write(true).open("/dev/fuse").unwrap().into();
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd.as_raw_fd());
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount("given", dir.path(), "fuse.clip", flags, CString::new(data).unwrap().as_c_str()).unwrap();
    let server =
        FuseServer::from_fd(Arc::clone(&m.fs), fd, &FuseOptions::default(), m.runtime.handle().clone()).unwrap();
    let given = std::fs::read(dir.path().join("first"));
    let known = server.device().is_some();
    if !known {
        // An older kernel does not tell which connection a descriptor is: whoever mounted it unmounts it.
        rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    server.unmount().unwrap();
    assert_eq!(given.unwrap(), pattern_bytes(7000, 5000));
    assert!(mountinfo(dir.path()).is_none());
}

#[test]
fn unmount_leaves_nothing_and_may_come_late() {
    let Some(mut m) = Mounted::new(everything(), warm()) else { return };
    assert!(m.mountinfo().is_some());
    // Somebody else was faster.
    rustix::mount::unmount(m.dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    m.runtime.block_on(m.server().ended());
    m.server.take().unwrap().unmount().unwrap();
    assert!(m.mountinfo().is_none());
}

#[test]
fn unmount_of_a_mount_in_use_ends_within_its_bound() {
    let gate = Arc::new(Semaphore::new(0));
    let blob = Arc::new(PatternBlob { gate: Some(gate), ..PatternBlob::default() });
    let Some(mut m) = Mounted::new(everything(), blob) else { return };
    let file = File::open(m.path("setuid")).unwrap();
    std::thread::scope(|scope| {
        // A reader whose source never answers.
        let reader = scope.spawn(|| file.read_at(&mut [0; 10], 0));
        m.server.take().unwrap().unmount().unwrap();
        assert_ne!(os_error(reader.join().unwrap()), 0);
    });
    assert!(m.mountinfo().is_none());
}

#[test]
fn programs_run_from_the_mount_and_pages_can_be_mapped() {
    // `true` of this machine, as a blob.
    #[derive(Debug)]
    struct Program(Vec<u8>);
    #[async_trait]
    impl Blob for Program {
        fn try_read(&self, _: u64, _: &mut [u8]) -> bool {
            false
        }
        async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
            Ok(Bytes::copy_from_slice(&self.0[off as usize..off as usize + len]))
        }
    }
    let program = std::fs::read("/bin/true").unwrap();
    let entries = [("/true", Entry { mode: 0o755, ..file(program.len() as u64, 0) })];
    let Some(m) = Mounted::of(ImageFs::new(tree(entries), NodeId::ROOT, vec![Arc::new(Program(program))])) else {
        return;
    };
    assert!(Command::new(m.path("true")).status().unwrap().success());
}
