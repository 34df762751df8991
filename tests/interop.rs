//! The Go module reads our archives and we read its: the same tree with the same content, in both directions, with real
//! mounts. Where the reference is known to be wrong, the exception has a name (`interop/reference.rs`) and must show.

mod common;
#[path = "interop/reference.rs"]
// Each test binary uses some of it.
#[allow(dead_code)]
mod reference;

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use clip_csi::archive::S3Storage;
use clip_csi::units::Compression;
use common::layers::{self, Layer, text_like};
use common::node::Node;
use common::registry::Registry;
use common::s3::S3;
use common::tree::{assert_same, walk};
use reference::{Defect, Reference, Seen, clip_csi, extracted, with_defects, without_root_time};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use serde_json::{Value, json};

/// Two spans of an archive that has no span digests, and some: a file that can be checked only as a whole.
const LARGE: usize = (2 << 20) + 12_345;

/// Directories of one test; gone with it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Makes an image of these layers as the layout `layout`, and gives what umoci unpacks of it.
    fn image(&self, layers: Vec<Layer>) -> Seen {
        layers::write_layout(&self.path("layout"), layers);
        let image = format!("{}:latest", self.text("layout"));
        let out = Command::new("umoci").args(["unpack", "--image", &image]).arg(self.path("unpacked")).output();
        let out = out.expect("umoci can be started");
        assert!(out.status.success(), "umoci: {}", String::from_utf8_lossy(&out.stderr));
        without_root_time(walk(&self.path("unpacked/rootfs")))
    }

    fn layout(&self) -> String {
        format!("oci:{}:latest", self.text("layout"))
    }

    /// A node plugin that may read archives here, and whatever else `sources` of its configuration says.
    async fn node(&self, mut sources: Value) -> Node {
        sources["archiveRoots"] = json!([self.0.path()]);
        Node::start(json!({"sources": sources})).await
    }
}

/// `sources` of a node for this registry.
fn plain_http(registry: &Registry) -> Value {
    json!({"registries": {registry.host(): {"plainHttp": true}}})
}

/// A directory of which the reference's archiver loses nothing.
fn plain_directory(root: &Path) {
    let write = |path: &str, mode: u32, bytes: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    // The reference puts these two directories first into the archive.
    write("rootfs/usr/lib/lib.so", 0o755, &text_like(3, 100_000));
    write("rootfs/usr/bin/large", 0o755, &text_like(4, LARGE));
    write("rootfs/usr/lib-x/beside", 0o600, b"sorts between /usr/lib and what is in it");
    write("etc/motd", 0o644, b"hello\n");
    write("etc/owned", 0o640, b"owned by somebody else");
    write("empty", 0o444, b"");
    write("a b/ünïcode\n", 0o644, b"odd names");
    write(".wh.plain", 0o644, b"in a directory this is a name like others");
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8")), b"bytes").unwrap();
    std::os::unix::fs::chown(root.join("etc/owned"), Some(1000), Some(2000)).unwrap();
    fs::create_dir(root.join("bare")).unwrap();
    std::os::unix::fs::symlink("../etc/motd", root.join("a b/link")).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", root.join("dangling")).unwrap();
    // Nearly all of it is a hole.
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"middle", 700_001).unwrap();
    sparse.set_len(900_000).unwrap();
}

/// What the reference's archiver loses.
fn odd_names(root: &Path) {
    let mode = |path: &str, mode: u32| {
        fs::set_permissions(root.join(path), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    fs::create_dir(root.join("tmp")).unwrap();
    mode("tmp", 0o1777);
    fs::write(root.join("setuid"), b"#!/bin/sh\n").unwrap();
    mode("setuid", 0o4755);
    fs::write(root.join("noted"), b"has an xattr").unwrap();
    rustix::fs::lsetxattr(root.join("noted"), "user.note", b"value", XattrFlags::empty()).unwrap();
    fs::hard_link(root.join("etc/motd"), root.join("motd-too")).unwrap();
    let device = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, root.join("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), device).unwrap();
}

/// What its archiver can't be given: it opens a fifo, and waits, and fails on a socket.
fn special_files(root: &Path) {
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    rustix::fs::mknodat(CWD, root.join("socket"), FileType::Socket, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// The xattr of [`odd_names`], as a tree shows it.
fn note(root: &Path) -> rustix::io::Result<Vec<u8>> {
    let mut value = [0; 64];
    let len = rustix::fs::lgetxattr(root.join("noted"), "user.note", &mut value[..])?;
    Ok(value[..len].to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_go_module_mounts_our_v1_archive_of_a_directory() {
    let Some(go) = Reference::or_skip(&[]) else { return };
    let place = Place::new();
    let (dir, archive) = (place.path("dir"), place.path("dir.clip"));
    plain_directory(&dir);
    odd_names(&dir);
    special_files(&dir);
    clip_csi(&["archive", &place.text("dir"), "-o", &place.text("dir.clip")]);
    let go = go.mount(&archive, &place.path("go"), Path::new(""));
    let shown = walk(&go.dir);
    let lost = [reference::XATTRS_ARE_LOST, reference::DEVICE_NUMBERS_ARE_LOST];
    assert_same(&shown, &reference::with_lost_nanoseconds(with_defects(walk(&dir), &lost), &shown));
    assert_eq!(note(&go.dir), Err(rustix::io::Errno::NOTSUP), "xattrs are switched off in its mounts");
    // The same archive through our own mount: nothing is missing there.
    let node = place.node(json!({})).await;
    let target = node.publish("a", &[("archive", &place.text("dir.clip"))]).await.unwrap();
    assert_same(&walk(&target), &walk(&dir));
    assert_eq!(note(&target).unwrap(), b"value");
}

#[test]
fn the_go_module_extracts_our_v1_archive_of_a_directory() {
    let Some(go) = Reference::or_skip(&[]) else { return };
    let place = Place::new();
    let (dir, archive, out) = (place.path("dir"), place.path("dir.clip"), place.path("out"));
    plain_directory(&dir);
    odd_names(&dir);
    special_files(&dir);
    clip_csi(&["archive", &place.text("dir"), "-o", &place.text("dir.clip")]);
    let since = SystemTime::now();
    go.run("extract", [&archive, &out]);
    let lost = [reference::EXTRACTION, &[reference::XATTRS_ARE_LOST]].concat();
    assert_same(&extracted(&out, since), &with_defects(walk(&dir), &lost));
}

#[test]
fn the_go_module_mounts_and_extracts_our_v1_archive_of_an_image() {
    let Some(go) = Reference::or_skip(&["umoci"]) else { return };
    let place = Place::new();
    let oracle = place.image(layers::tricky(Compression::Gzip));
    let (archive, out) = (place.path("image.clip"), place.path("out"));
    clip_csi(&["archive", &place.layout(), "-o", &place.text("image.clip")]);
    let mounted = go.mount(&archive, &place.path("go"), Path::new(""));
    assert_same(&without_root_time(walk(&mounted.dir.join("rootfs"))), &oracle);
    let config: Value = serde_json::from_slice(&fs::read(mounted.dir.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["root"]["path"], "rootfs", "an OCI bundle, as beta9 writes them");
    let since = SystemTime::now();
    go.run("extract", [&archive, &out]);
    assert_same(&extracted(&out.join("rootfs"), since), &with_defects(oracle, reference::EXTRACTION));
    assert_eq!(fs::read(out.join("config.json")).unwrap(), fs::read(mounted.dir.join("config.json")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_go_module_mounts_our_v2_index_of_an_image_in_a_registry() {
    let Some(go) = Reference::or_skip(&["umoci", "docker-registry"]) else { return };
    let place = Place::new();
    let oracle = place.image(layers::tricky(Compression::Gzip));
    let registry = Registry::start();
    registry.push_layout(&place.path("layout"), "team/app", "v1").await;
    clip_csi(&["index", &registry.image("team/app", "v1"), "-o", &place.text("image.clip")]);
    // The tag moves on; what we wrote names the manifest, which the reference follows.
    layers::write_layout(&place.path("other"), vec![Layer::new(Compression::Gzip).file("other", b"image")]);
    registry.push_layout(&place.path("other"), "team/app", "v1").await;
    let mounted = go.mount(&place.path("image.clip"), &place.path("go"), &place.path("go-cache"));
    assert_same(&without_root_time(walk(&mounted.dir)), &oracle);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_go_module_mounts_our_index_of_an_archive_in_s3() {
    let Some(go) = Reference::or_skip(&["umoci"]) else { return };
    let place = Place::new();
    let oracle = place.image(layers::tricky(Compression::Gzip));
    clip_csi(&["archive", &place.layout(), "-o", &place.text("image.clip")]);
    let s3 = S3::start().await;
    s3.put("images", "image.clip", &fs::read(place.path("image.clip")).unwrap());
    let storage = S3Storage {
        bucket: "images".into(),
        region: "us-east-1".into(),
        key: "image.clip".into(),
        endpoint: s3.endpoint().into(),
        force_path_style: true,
    };
    let remote = place.path("image.rclip");
    clip_csi::build::write_remote_index(&place.path("image.clip"), storage, &remote).await.unwrap();
    let (keys, dir) = (s3.keys(), place.path("go"));
    let shown = tokio::task::spawn_blocking(move || {
        let mounted = go.mount_s3(&remote, &dir, &keys.access_key, &keys.secret_key);
        without_root_time(walk(&mounted.dir.join("rootfs")))
    });
    assert_same(&shown.await.unwrap(), &oracle);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v1_archive_of_the_go_module_is_published_as_its_directory_from_disk_and_from_s3() {
    let Some(go) = Reference::or_skip(&[]) else { return };
    let place = Place::new();
    let (dir, archive, remote) = (place.path("dir"), place.path("go.clip"), place.path("go.rclip"));
    plain_directory(&dir);
    go.run("create", [&dir, &archive]);
    let oracle = walk(&dir);
    let s3 = S3::start().await;
    s3.put("images", "go.clip", &fs::read(&archive).unwrap());
    let (endpoint, bucket, key) = (s3.endpoint(), Path::new("images"), Path::new("go.clip"));
    go.run("remote", [&archive, &remote, Path::new(endpoint), bucket, key]);
    s3.put("images", "go.rclip", &fs::read(&remote).unwrap());
    // The full archive and its index, each here and in S3. Each with a node of its own: nothing is cached yet.
    let local = place.text("go.clip");
    let (object, index, index_object) =
        (s3.url("images", "go.clip"), place.text("go.rclip"), s3.url("images", "go.rclip"));
    for archive in [&local, &object, &index, &index_object] {
        for integrity in ["digest", "strict"] {
            // Such an address must be configured; the keys are the volume's.
            let other = json!([{"endpoint": s3.endpoint(), "bucket": "other", "pathStyle": true}]);
            let node = place.node(json!({"s3": other})).await;
            let mut request = node.request("a", &[("archive", archive), ("integrity", integrity)]);
            if *archive != local {
                let refused = node.send(request.clone()).await.expect_err("the volume brings no keys");
                assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{archive}: {refused}");
                let keys = s3.keys();
                request.secrets.insert("accessKeyId".into(), keys.access_key);
                request.secrets.insert("secretAccessKey".into(), keys.secret_key);
            }
            let target = node.send(request).await.unwrap();
            assert_same(&walk(&target), &oracle);
            let unverified = node.metric("clip_unverified_read_bytes_total").await;
            // Part of a large file rests on the transport, and is counted; with `strict` there is none.
            assert_eq!(
                unverified > 0.0,
                integrity == "digest",
                "{archive}, {integrity}: {unverified} unverified bytes"
            );
            node.unpublish("a").await.unwrap();
            assert_eq!(node.mounts(), Vec::<PathBuf>::new());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_a_v1_archive_of_the_go_module_is_never_served_with_strict_integrity() {
    let Some(go) = Reference::or_skip(&[]) else { return };
    let place = Place::new();
    let (dir, archive) = (place.path("dir"), place.path("go.clip"));
    plain_directory(&dir);
    go.run("create", [&dir, &archive]);
    // The last byte of the large file, far from its first.
    let bytes = fs::read(&archive).unwrap();
    let large = text_like(4, LARGE);
    let at = bytes.windows(64).position(|window| *window == large[..64]).expect("it lies there whole") + LARGE - 1;
    assert_eq!(bytes[at], large[LARGE - 1]);
    let file = fs::File::options().write(true).open(&archive).unwrap();
    file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
    let node = place.node(json!({})).await;
    let attributes = [("archive", &*place.text("go.clip")), ("integrity", "strict")];
    let target = node.publish("a", &attributes).await.unwrap();
    let mut first = [0; 16];
    let large = fs::File::open(target.join("rootfs/usr/bin/large")).unwrap();
    let refused = large.read_exact_at(&mut first, 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{refused}");
    assert_eq!(
        fs::read(target.join("rootfs/usr/lib/lib.so")).unwrap(),
        text_like(3, 100_000),
        "its neighbour is intact"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_v1_archive_of_the_go_module_lacks_is_known_by_name() {
    let Some(go) = Reference::or_skip(&[]) else { return };
    let place = Place::new();
    let (dir, archive) = (place.path("dir"), place.path("go.clip"));
    plain_directory(&dir);
    odd_names(&dir);
    go.run("create", [&dir, &archive]);
    let node = place.node(json!({})).await;
    let target = node.publish("a", &[("archive", &place.text("go.clip"))]).await.unwrap();
    let lost = [
        reference::SPECIAL_BITS_ARE_LOST,
        reference::HARD_LINKS_ARE_COPIES,
        reference::DEVICES_ARE_DROPPED,
        reference::XATTRS_ARE_LOST,
    ];
    assert_same(&walk(&target), &with_defects(walk(&dir), &lost));
    assert_eq!(note(&target), Err(rustix::io::Errno::NOTSUP), "an archive without any xattr");
}

/// An image of which the reference's indexer loses nothing that we can't restore.
fn plain_image() -> Vec<Layer> {
    let lower = Layer::new(Compression::Gzip)
        .dir("etc", 0o755)
        .file("etc/motd", b"lower\n")
        .file("etc/gone", b"to be deleted\n")
        .dir("opt", 0o755)
        .dir("opt/old", 0o755)
        .file("opt/old/a", b"hidden by an opaque directory\n")
        .dir("usr", 0o755)
        .dir("usr/bin", 0o755)
        .file_with("usr/bin/tool", 0o755, 0, 0, &text_like(1, 300_000))
        .hard_link("usr/bin/tool-alias", "usr/bin/tool")
        .symlink("bin", "usr/bin")
        .hard_link("bin-too", "bin")
        .file_with("usr/owned", 0o640, 1000, 2000, b"owned by somebody else")
        .file("usr/empty", b"")
        .dir("var", 0o755)
        .dir("var/run", 0o755)
        .file("var/run/orphan", b"the reference leaves it below a symlink");
    let upper = Layer::new(Compression::Gzip)
        .file("etc/motd", b"upper\n")
        .whiteout("etc/gone")
        .dir("opt/old", 0o700)
        .opaque("opt/old")
        .file("opt/old/b", b"only this remains\n")
        .symlink("var/run", "/run")
        .file("usr/big", &text_like(2, 5 << 20))
        .symlink("usr/dangling", "/nowhere/at/all");
    vec![lower, upper]
}

/// An image that shows all that its indexer gets wrong.
fn wrong_image() -> Vec<Layer> {
    let lower = Layer::new(Compression::Gzip)
        .dir("usr", 0o755)
        .file_with("usr/setuid", 0o4755, 0, 0, b"#!/bin/sh\n")
        .dir("tmp", 0o1777)
        .dir("srv", 0o755)
        .file("srv/lower", b"hidden")
        .file("kept", b"lower")
        .fifo("pipe");
    let upper = Layer::new(Compression::Gzip)
        .dir("srv", 0o755)
        .file("srv/upper", b"before the opaque mark of its own layer")
        .opaque("srv")
        .file("kept", b"before the whiteout of its own layer")
        .whiteout("kept");
    vec![lower, upper]
}

/// What its indexer gets wrong, beside what others do too.
const INDEXING: &[Defect] = &[
    reference::SPECIAL_BITS_ARE_LOST,
    reference::SPECIAL_FILES_ARE_DROPPED,
    Defect {
        name: "an opaque mark hides what its own layer brought before it",
        of: |tree| drop_name(tree, "srv/upper"),
    },
    Defect { name: "a whiteout deletes what its own layer brought before it", of: |tree| drop_name(tree, "kept") },
];

fn drop_name(tree: &mut Seen, path: &str) {
    tree.remove(Path::new(path)).expect("the oracle has it");
}

/// Publishes what the reference makes of an image in a registry.
async fn publish_go_index(go: Reference, place: &Place) -> Seen {
    let registry = Registry::start();
    registry.push_layout(&place.path("layout"), "team/app", "v1").await;
    go.run("index", [Path::new(&registry.image("team/app", "v1")), &place.path("go.clip")]);
    let node = place.node(plain_http(&registry)).await;
    let attributes = [("archive", &*place.text("go.clip")), ("integrity", "strict")];
    let target = node.publish("a", &attributes).await.unwrap();
    without_root_time(walk(&target))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_the_go_module_is_published_as_the_image_is() {
    let Some(go) = Reference::or_skip(&["umoci", "docker-registry"]) else { return };
    let place = Place::new();
    let oracle = place.image(plain_image());
    assert_same(&publish_go_index(go, &place).await, &oracle);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_index_of_the_go_module_gets_wrong_is_known_by_name() {
    let Some(go) = Reference::or_skip(&["umoci", "docker-registry"]) else { return };
    let place = Place::new();
    let oracle = place.image(wrong_image());
    assert_same(&publish_go_index(go, &place).await, &with_defects(oracle, INDEXING));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_file_of_our_v2_index_fails_in_the_go_module_rather_than_lies() {
    const SPARSE_DATA: &[u8] = b"all the data that there is";
    let Some(go) = Reference::or_skip(&["docker-registry"]) else { return };
    let place = Place::new();
    let layer = Layer::new(Compression::Gzip)
        .file("before", b"an ordinary file")
        .sparse("sparse", 300_000, 8192, SPARSE_DATA)
        .file("after", b"another");
    // umoci knows no such entries: the oracle is what was put in.
    layers::write_layout(&place.path("layout"), vec![layer]);
    let mut whole = vec![0; 300_000];
    whole[8192..][..SPARSE_DATA.len()].copy_from_slice(SPARSE_DATA);
    let registry = Registry::start();
    registry.push_layout(&place.path("layout"), "team/app", "v1").await;
    clip_csi(&["index", &registry.image("team/app", "v1"), "-o", &place.text("image.clip")]);
    let mounted = go.mount(&place.path("image.clip"), &place.path("go"), &place.path("go-cache"));
    let refused = fs::read(mounted.dir.join("sparse")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{refused}");
    assert_eq!(fs::read(mounted.dir.join("after")).unwrap(), b"another");
    let node = place.node(plain_http(&registry)).await;
    let target = node.publish("a", &[("archive", &place.text("image.clip"))]).await.unwrap();
    assert!(fs::read(target.join("sparse")).unwrap() == whole);
    assert_eq!(fs::read(target.join("after")).unwrap(), b"another");
}
