//! What goes wrong on real nodes, end to end: the real binary, real mounts, real servers that break. A reader gets the
//! right bytes or an error, never wrong bytes; a publish that fails leaves nothing; the plugin lives on.

mod common;

use std::fs;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clip_csi::archive::{self, Extension, SeekTable};
use clip_csi::csi::proto::v1;
use clip_csi::units::{Compression, Digest};
use common::layers::{self, Layer};
use common::node::{Node, unmount_below};
use common::noise;
use common::registry::Registry;
use common::s3::S3;
use common::skip::{self, needs};
use serde_json::json;
use tonic::{Code, Status};

/// Runs the command; its output if it fails.
fn clip_csi(args: &[&str]) {
    let out = Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(args).output().unwrap();
    assert!(out.status.success(), "clip-csi {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The error number of a failed read.
fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// Reads a file on a thread of its own: a runtime's thread shall not wait for the plugin.
async fn read(path: PathBuf) -> io::Result<Vec<u8>> {
    tokio::task::spawn_blocking(move || fs::read(path)).await.unwrap()
}

/// Makes the kernel forget a file's pages, so that the next read asks the plugin.
fn forget(path: &Path) {
    let file = fs::File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// What NodeGetVolumeStats says of a volume's health; `None`: healthy.
async fn abnormal(node: &Node, name: &str) -> Option<String> {
    let request = v1::NodeGetVolumeStatsRequest {
        volume_id: format!("csi-{name}"),
        volume_path: text(&node.target(name)).to_owned(),
        ..Default::default()
    };
    let condition = node.client().node_get_volume_stats(request).await.unwrap().into_inner().volume_condition.unwrap();
    condition.abnormal.then_some(condition.message)
}

/// A refusal as people see it: one line that names `words`, and nothing is left of the publish.
fn assert_refused(node: &Node, name: &str, status: &Status, code: Code, words: &[&str]) {
    let message = status.message();
    assert_eq!(status.code(), code, "{message}");
    assert!(!message.contains('\n') && message.len() < 600, "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{words:?} in: {message}");
    assert_eq!(node.mounts(), Vec::<PathBuf>::new(), "{message}");
    assert!(!node.target(name).exists(), "{message}");
}

/// Two layers in a registry: eight files of noise in the first, a small one in the second; and the image's index.
struct Noisy {
    dir: tempfile::TempDir,
    registry: Registry,
    files: Vec<Vec<u8>>,
    layer: Digest,
}

impl Noisy {
    const SMALL: &[u8] = b"in a layer of its own\n";

    async fn new(registry: Registry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<_> = (0..8).map(|n| noise(768 << 10, n + 1)).collect();
        let lower = (files.iter().enumerate())
            .fold(Layer::new(Compression::Gzip), |layer, (n, bytes)| layer.file(&format!("f{n}"), bytes));
        let upper = Layer::new(Compression::Gzip).file("small", Self::SMALL);
        let (_, written) = layers::write_layout(&dir.path().join("layout"), vec![lower, upper]);
        registry.push_layout(&dir.path().join("layout"), "team/app", "v1").await;
        let noisy = Self { dir, registry, files, layer: written[0].0 };
        let layout = format!("oci:{}:latest", noisy.dir.path().join("layout").display());
        let reference = noisy.registry.image("team/app", "v1");
        clip_csi(&["index", &layout, "--store-as", &reference, "-o", &noisy.archive()]);
        noisy
    }

    fn archive(&self) -> String {
        text(&self.dir.path().join("image.clip")).to_owned()
    }

    fn config(&self) -> serde_json::Value {
        let roots = [self.dir.path()];
        json!({"sources": {"archiveRoots": roots, "registries": {self.registry.host(): {"plainHttp": true}}}})
    }

    /// Which of the files can be read; what can be is right, what can't is EIO.
    async fn readable(&self, target: &Path) -> Vec<bool> {
        let mut readable = vec![];
        for (n, wanted) in self.files.iter().enumerate() {
            let found = read(target.join(format!("f{n}"))).await;
            match &found {
                Ok(bytes) => assert!(bytes == wanted, "f{n} has wrong bytes"),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "f{n}: {error}"),
            }
            readable.push(found.is_ok());
        }
        readable
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_changed_under_its_digest_is_an_error_where_it_changed_until_it_is_restored() {
    needs!(fuse, "docker-registry");
    let image = Noisy::new(Registry::start()).await;
    let blob = image.registry.blob_file(&image.layer);
    let good = fs::read(&blob).unwrap();
    let len = good.len();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let mut zeroed = good.clone();
    zeroed[len / 2..len / 2 + 4096].fill(0);
    // Each with the least number of files that stay whole.
    for (damaged, least) in
        [(flipped(3000), 4), (flipped(len / 3), 4), (flipped(len - 9000), 4), (zeroed, 4), (noise(len, 99), 0)]
    {
        fs::write(&blob, &damaged).unwrap();
        let node = Node::start(image.config()).await;
        let target = node.publish("a", &[("archive", &image.archive())]).await.unwrap();
        assert_eq!(abnormal(&node, "a").await, None);
        let readable = image.readable(&target).await;
        let whole = readable.iter().filter(|readable| **readable).count();
        assert!((least..8).contains(&whole), "{readable:?}");
        assert_eq!(read(target.join("small")).await.unwrap(), Noisy::SMALL);
        let said = abnormal(&node, "a").await.unwrap();
        assert!(said.starts_with("a read failed") && said.contains("/f"), "{said}");
        assert!(node.metric("clip_errors_total").await > 0.0);

        fs::write(&blob, &good).unwrap();
        assert_eq!(image.readable(&target).await, [true; 8], "the same mount, the blob restored");
        node.unpublish("a").await.unwrap();
        assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_cut_short_serves_what_is_left_of_it() {
    needs!(fuse, "docker-registry");
    let image = Noisy::new(Registry::start()).await;
    let blob = image.registry.blob_file(&image.layer);
    let good = fs::read(&blob).unwrap();
    fs::write(&blob, &good[..good.len() / 2]).unwrap();
    let node = Node::start(image.config()).await;
    let target = node.publish("a", &[("archive", &image.archive())]).await.unwrap();
    assert!(read(target.join("f0")).await.unwrap() == image.files[0]);
    assert_eq!(errno(read(target.join("f7")).await), libc::EIO);
    fs::write(&blob, &good).unwrap();
    assert!(read(target.join("f7")).await.unwrap() == image.files[7]);
}

/// A small archive of each version, in a directory that a node may read.
fn archives(dir: &Path) -> [(&'static str, Vec<u8>); 2] {
    let layout = dir.join("layout");
    let layer = Layer::new(Compression::Gzip).dir("d", 0o755).file("d/big", &noise(100_000, 3)).symlink("l", "d/big");
    layers::write_layout(&layout, vec![layer]);
    let image = format!("oci:{}:latest", layout.display());
    let made = |verb: &str| {
        let out = dir.join("made.clip");
        clip_csi(&[verb, &image, "-o", text(&out)]);
        fs::read(out).unwrap()
    };
    [("v1", made("archive")), ("v2", made("index"))]
}

fn roots(dir: &Path) -> serde_json::Value {
    json!({"sources": {"archiveRoots": [dir]}})
}

const DAMAGE: [Code; 3] = [Code::DataLoss, Code::InvalidArgument, Code::FailedPrecondition];

#[tokio::test(flavor = "multi_thread")]
async fn archives_cut_short_at_any_length_are_refused_by_name_and_leave_nothing() {
    needs!(fuse);
    let dir = tempfile::tempdir().unwrap();
    let made = archives(dir.path());
    let node = Node::start(roots(dir.path())).await;
    let pid = node.pid();
    for (version, good) in made {
        let spread = (0..24).map(|n| 54 + (good.len() - 54) * n / 24);
        for len in [0, 1, 8, 9, 10, 53].into_iter().chain(spread).chain([good.len() - 8, good.len() - 1]) {
            let file = dir.path().join(format!("{version}-{len}.clip"));
            fs::write(&file, &good[..len]).unwrap();
            let status = node.publish("a", &[("archive", text(&file))]).await.unwrap_err();
            assert!(DAMAGE.contains(&status.code()), "{version} cut at {len}: {status}");
            assert_refused(&node, "a", &status, status.code(), &[text(&file)]);
            fs::remove_file(&file).unwrap();
        }
        assert_survived(&node, pid, dir.path(), &good).await;
    }
}

/// The same process publishes and unpublishes a good archive.
async fn assert_survived(node: &Node, pid: u32, dir: &Path, good: &[u8]) {
    let file = dir.join("good.clip");
    fs::write(&file, good).unwrap();
    let target = node.publish("good", &[("archive", text(&file))]).await.unwrap();
    assert!(read(target.join("d/big")).await.unwrap() == noise(100_000, 3));
    node.unpublish("good").await.unwrap();
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    assert_eq!(node.pid(), pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_and_absurd_headers_never_end_the_plugin() {
    needs!(fuse);
    let dir = tempfile::tempdir().unwrap();
    let made = archives(dir.path());
    let node = Node::start(roots(dir.path())).await;
    let pid = node.pid();
    for (version, good) in made {
        let mut bad: Vec<(String, Vec<u8>, bool)> = vec![];
        // Index length, index position, storage length, storage position.
        for (field, at) in [("index-len", 10), ("index-pos", 18), ("storage-len", 26)] {
            for value in [-1, i64::MIN, i64::MAX, 1 << 40, (1 << 30) - 1, 60 << 20] {
                let mut bytes = good.clone();
                bytes[at..at + 8].copy_from_slice(&i64::to_le_bytes(value));
                bad.push((format!("{version}-{field}-{value}"), bytes, true));
            }
        }
        // One bit in every second byte of the header, and in a sample of what the header names.
        let tail = archive::Header::decode(&good).unwrap().index.0 as usize;
        let sample = (0..60).map(|n| tail + (good.len() - tail) * n / 60);
        for at in (0..54).step_by(2).chain(sample) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            bad.push((format!("{version}-flip-{at}"), bytes, false));
        }
        for (name, bytes, must_fail) in bad {
            let file = dir.path().join(format!("{name}.clip"));
            fs::write(&file, &bytes).unwrap();
            match node.publish("a", &[("archive", text(&file))]).await {
                Err(status) => {
                    assert!(DAMAGE.contains(&status.code()), "{name}: {status}");
                    assert_refused(&node, "a", &status, status.code(), &[&name]);
                }
                // A bit of a time, a name or a mode is no damage that anything could tell; the tree must still be one.
                Ok(target) => {
                    assert!(!must_fail, "{name} was published");
                    tokio::task::spawn_blocking(move || look_at_all(&target, 0)).await.unwrap();
                    node.unpublish("a").await.unwrap();
                }
            }
            fs::remove_file(&file).unwrap();
        }
        assert_survived(&node, pid, dir.path(), &good).await;
    }
}

/// Lists and reads what can be; errors are fine, endless trees are not.
fn look_at_all(dir: &Path, depth: usize) {
    assert!(depth < 10, "{}", dir.display());
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => look_at_all(&entry.path(), depth + 1),
            Ok(kind) if kind.is_file() => {
                let mut buf = vec![0; 256 << 10];
                let _ = fs::File::open(entry.path()).and_then(|file| file.read_at(&mut buf, 0));
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_found_with_a_remedy() {
    needs!(fuse, "docker-registry");
    let (dir, registry, s3) = (tempfile::tempdir().unwrap(), Registry::start(), S3::start().await);
    s3.bucket("images");
    let keys = s3.keys();
    let node = Node::start(json!({
        "imageService": {"clipVersion": 2},
        "sources": {
            "archiveRoots": [dir.path()],
            "registries": {registry.host(): {"plainHttp": true}},
            "s3": [{"endpoint": s3.endpoint(), "bucket": "other", "pathStyle": true}],
        },
    }))
    .await;
    let file = dir.path().join("gone.clip");
    let status = node.publish("a", &[("archive", text(&file))]).await.unwrap_err();
    assert_refused(&node, "a", &status, Code::NotFound, &[text(&file), "check the path"]);

    let mut request = node.request("a", &[("archive", &s3.url("images", "gone.clip"))]);
    request.secrets = [("accessKeyId", keys.access_key), ("secretAccessKey", keys.secret_key)]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
    let status = node.send(request).await.unwrap_err();
    assert_refused(&node, "a", &status, Code::NotFound, &["images", "gone.clip", "check"]);

    let status = node.publish("a", &[("image", &registry.image("team/none", "v9"))]).await.unwrap_err();
    assert_refused(&node, "a", &status, Code::NotFound, &["team/none:v9", "check"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_taken_or_has_no_place_and_attributes_that_do_not_fit_are_refused() {
    needs!(fuse);
    let dir = tempfile::tempdir().unwrap();
    let [(_, good), _] = archives(dir.path());
    let file = dir.path().join("good.clip");
    fs::write(&file, good).unwrap();
    let (archive, node) = (text(&file), Node::start(roots(dir.path())).await);

    let full = node.target("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("precious"), "x").unwrap();
    let status = node.publish("full", &[("archive", archive)]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains(text(&full)) && status.message().contains("not empty"), "{status}");
    assert_eq!(fs::read(full.join("precious")).unwrap(), b"x");
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());

    let taken = node.target("taken");
    fs::create_dir(&taken).unwrap();
    rustix::mount::mount("other", &taken, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let status = node.publish("taken", &[("archive", archive)]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains(text(&taken)) && status.message().contains("tmpfs"), "{status}");
    assert_eq!(node.mounts(), std::slice::from_ref(&taken), "somebody else's mount stays, and it alone");
    rustix::mount::unmount(&taken, rustix::mount::UnmountFlags::DETACH).unwrap();
    node.publish("taken", &[("archive", archive)]).await.unwrap();
    node.unpublish("taken").await.unwrap();

    let mut orphan = node.request("orphan", &[("archive", archive)]);
    orphan.target_path = format!("{}/no/such/parent", node.target("orphan").display());
    let status = node.send(orphan).await.unwrap_err();
    assert_refused(&node, "orphan", &status, Code::FailedPrecondition, &["/no/such", "create the parent directory"]);

    let status = node.publish("a", &[("archive", archive), ("subpath", "d")]).await.unwrap_err();
    assert_refused(&node, "a", &status, Code::InvalidArgument, &["\"subpath\"", "did you mean subPath?"]);
    let status = node.publish("a", &[("archive", archive), ("image", "busybox")]).await.unwrap_err();
    assert_refused(&node, "a", &status, Code::InvalidArgument, &["both an image and an archive"]);
    let status = node.publish("a", &[("archive", archive), ("subPath", "d/none")]).await.unwrap_err();
    assert_refused(&node, "a", &status, Code::InvalidArgument, &["subPath \"d/none\""]);
}

/// A directory with a tmpfs of its own in it; unmounted with the guard, or with the node that takes the directory.
struct SmallDisk(Option<tempfile::TempDir>);

impl SmallDisk {
    fn new(name: &str, size: &str) -> Self {
        let disk = Self(Some(tempfile::tempdir().unwrap()));
        let at = disk.0.as_ref().unwrap().path().join(name);
        fs::create_dir(&at).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        rustix::mount::mount("small", &at, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str()).unwrap();
        disk
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            unmount_below(dir.path());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_without_space_costs_speed_and_nothing_else() {
    needs!(fuse);
    let dir = tempfile::tempdir().unwrap();
    let content = dir.path().join("content");
    fs::create_dir(&content).unwrap();
    let files: Vec<_> = (0..4).map(|n| noise(10 << 20, n + 40)).collect();
    for (n, bytes) in files.iter().enumerate() {
        fs::write(content.join(format!("f{n}")), bytes).unwrap();
    }
    let file = dir.path().join("image.clip");
    clip_csi(&["archive", text(&content), "-o", text(&file)]);

    let mut disk = SmallDisk::new("cache", "8m");
    let node = Node::start_in(disk.0.take().unwrap(), roots(dir.path())).await;
    let target = node.publish("a", &[("archive", text(&file))]).await.unwrap();
    for _ in 0..2 {
        for (n, wanted) in files.iter().enumerate() {
            let path = target.join(format!("f{n}"));
            assert!(read(path.clone()).await.unwrap() == *wanted, "f{n}");
            forget(&path);
        }
    }
    assert!(node.metric("clip_cache_uncached_reads_total").await > 0.0);
    assert_eq!(abnormal(&node, "a").await, None, "a reader notices nothing");
    node.unpublish("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_registry_is_gone_cached_reads_go_on_and_others_time_out_within_a_bound() {
    needs!(fuse, "docker-registry");
    let mut image = Noisy::new(Registry::start()).await;
    let node = Node::start(image.config()).await;
    let target = node.publish("a", &[("archive", &image.archive())]).await.unwrap();
    let (cached, uncached) = (target.join("f0"), target.join("f6"));
    assert!(read(cached.clone()).await.unwrap() == image.files[0]);

    image.registry.stop();
    forget(&cached);
    assert!(read(cached.clone()).await.unwrap() == image.files[0], "from the plugin's cache");
    let asked = Instant::now();
    assert_eq!(errno(read(uncached.clone()).await), libc::ETIMEDOUT);
    // Six tries with pauses of 6.2 s at most in all; nothing listens, so a try takes no time.
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    let said = abnormal(&node, "a").await.unwrap();
    assert!(
        said.contains("/f6") && said.contains(image.registry.host()) && said.contains("can't be reached"),
        "{said}"
    );

    image.registry.start_again();
    assert!(read(uncached).await.unwrap() == image.files[6]);
}

/// A v1 archive without what only we write in it: as the Go module makes it.
fn without_span_digests(bytes: &[u8]) -> Vec<u8> {
    let header = archive::Header::decode(bytes).unwrap();
    let part = |(pos, len): (u64, u64)| &bytes[pos as usize..(pos + len) as usize];
    let old = archive::decode(&bytes[..54], part(header.index), part(header.storage_info)).unwrap();
    let end = old.extension.unwrap().seek_table.unwrap().0;
    let new = archive::encode(&old.tree, &old.storage, Extension::default(), &SeekTable::default(), end).unwrap();
    [&new.header[..], &bytes[54..end as usize], &new.tail].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_no_digest_covers_are_counted_and_refused_by_strict_integrity() {
    needs!(fuse);
    const UNVERIFIED: &str = "clip_unverified_read_bytes_total";
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures/v1-local.clip");
    let small = dir.path().join("go.clip");
    fs::copy(golden, &small).unwrap();
    // A file of more than a span, whose parts nothing can check; damaged in its last part.
    let (content, full) = (dir.path().join("content"), dir.path().join("full.clip"));
    fs::create_dir(&content).unwrap();
    let large = noise(4 << 20, 5);
    fs::write(content.join("large"), &large).unwrap();
    clip_csi(&["archive", text(&content), "-o", text(&full)]);
    let legacy = without_span_digests(&fs::read(&full).unwrap());
    let at = legacy.windows(64).position(|w| *w == large[..64]).unwrap();
    let mut damaged = legacy.clone();
    damaged[at + (4 << 20) - 10] ^= 1;
    let (good, bad) = (dir.path().join("good.clip"), dir.path().join("bad.clip"));
    fs::write(&good, &legacy).unwrap();
    fs::write(&bad, &damaged).unwrap();

    let node = Node::start(roots(dir.path())).await;
    for integrity in ["digest", "strict"] {
        let target = node.publish("go", &[("archive", text(&small)), ("integrity", integrity)]).await.unwrap();
        assert_eq!(read(target.join("etc/hostname")).await.unwrap().len(), 7, "{integrity}");
        node.unpublish("go").await.unwrap();
    }
    assert_eq!(node.metric(UNVERIFIED).await, 0.0, "small files are checked whole");

    let strict = node.publish("strict", &[("archive", text(&good)), ("integrity", "strict")]).await.unwrap();
    assert!(read(strict.join("large")).await.unwrap() == large, "fetched whole and checked first");
    assert_eq!(node.metric(UNVERIFIED).await, 0.0);
    let strict = node.publish("bad", &[("archive", text(&bad)), ("integrity", "strict")]).await.unwrap();
    let mut first = [0; 4096];
    let refused = fs::File::open(strict.join("large")).unwrap().read_at(&mut first, 0);
    assert_eq!(errno(refused), libc::EIO, "not even the part that is right: it can't be known");

    let digest = node.publish("digest", &[("archive", text(&good)), ("integrity", "digest")]).await.unwrap();
    assert!(read(digest.join("large")).await.unwrap() == large);
    assert!(node.metric(UNVERIFIED).await >= f64::from(4 << 20), "{}", node.metric(UNVERIFIED).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_plugins_volumes_are_all_bound_again_and_those_of_removed_pods_are_gone() {
    needs!(fuse);
    let dir = tempfile::tempdir().unwrap();
    let made = archives(dir.path());
    let files = made.map(|(version, bytes)| {
        let file = dir.path().join(format!("{version}.clip"));
        fs::write(&file, bytes).unwrap();
        file
    });
    let node = Node::start(roots(dir.path())).await;
    let mut kept = vec![];
    for (name, file) in [("one", &files[0]), ("two", &files[0]), ("three", &files[1])] {
        kept.push(node.publish(name, &[("archive", text(file))]).await.unwrap());
    }
    let part = node.publish("part", &[("archive", text(&files[1])), ("subPath", "d")]).await.unwrap();
    let removed = node.publish("removed", &[("archive", text(&files[1]))]).await.unwrap();
    let forgotten = node.publish("forgotten", &[("archive", text(&files[0]))]).await.unwrap();
    let left = node.kill();
    for target in kept.iter().chain([&part, &removed, &forgotten]) {
        assert_eq!(errno(fs::read_dir(target)), libc::ENOTCONN);
    }
    // While no plugin was there, one pod was cleaned up by force, and of another the record was lost.
    rustix::mount::unmount(&removed, rustix::mount::UnmountFlags::DETACH).unwrap();
    fs::remove_dir(&removed).unwrap();
    let record = format!("{}.json", Digest::of(forgotten.as_os_str().as_encoded_bytes()).hex());
    fs::remove_file(left.path().join("volumes").join(record)).unwrap();

    let node = Node::start_in(left, roots(dir.path())).await;
    for target in &kept {
        assert!(read(target.join("d/big")).await.unwrap() == noise(100_000, 3));
    }
    assert!(read(part.join("big")).await.unwrap() == noise(100_000, 3));
    assert!(!removed.exists() && !node.mounts().contains(&forgotten));
    assert_eq!(node.mounts().len(), 2 + 4, "two shared mounts, four targets: {:?}", node.mounts());
    for name in ["one", "two", "three", "part", "removed", "forgotten"] {
        node.unpublish(name).await.unwrap();
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_volume_says_after_a_crash_that_it_lost_its_credentials_and_takes_those_of_the_next_pod() {
    needs!(fuse, "docker-registry");
    let image = Noisy::new(Registry::start_with_login()).await;
    let login = json!({"username": common::registry::USER, "password": common::registry::PASSWORD});
    let auths = json!({"auths": {image.registry.host(): login}}).to_string();
    let request = |node: &Node, name: &str| {
        let mut request = node.request(name, &[("archive", &image.archive())]);
        request.secrets.insert(".dockerconfigjson".into(), auths.clone());
        request
    };
    let node = Node::start(image.config()).await;
    let target = node.send(request(&node, "a")).await.unwrap();
    assert!(read(target.join("f0")).await.unwrap() == image.files[0]);
    let node = Node::start_in(node.kill(), image.config()).await;
    let said = async {
        loop {
            match abnormal(&node, "a").await {
                Some(said) => return said,
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let said = tokio::time::timeout(Duration::from_secs(20), said).await.unwrap();
    assert!(said.contains("credentials") && said.contains("restart the pod"), "{said}");
    assert!(!said.contains(common::registry::PASSWORD), "{said}");
    assert_eq!(errno(read(target.join("f6")).await), libc::EACCES);

    node.send(request(&node, "b")).await.unwrap();
    assert!(read(target.join("f6")).await.unwrap() == image.files[6], "the shared mount has the new pod's credentials");
    for name in ["a", "b"] {
        node.unpublish(name).await.unwrap();
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
}
