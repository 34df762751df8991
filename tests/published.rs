//! The main job, from an image to a file that a pod reads: the real binary, real mounts, a real registry, a real S3
//! server, and an independent unpacker as the oracle.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use clip_csi::units::Compression;
use common::layers::{self, Layer};
use common::node::Node;
use common::registry::Registry;
use common::s3::S3;
use common::skip::{self, needs};
use common::tree::{Facts, assert_same, walk};
use serde_json::json;

/// Runs the command; its output if it fails.
fn clip_csi(args: &[&str]) {
    let out = Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(args).output().unwrap();
    assert!(out.status.success(), "clip-csi {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What umoci makes of the image in a layout.
fn oracle(layout: &Path, scratch: &Path) -> BTreeMap<PathBuf, Facts> {
    let bundle = scratch.join("bundle");
    let image = format!("{}:latest", layout.display());
    let out = Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle).output();
    let out = out.expect("umoci can be started (apt-get install umoci)");
    assert!(out.status.success(), "umoci: {}", String::from_utf8_lossy(&out.stderr));
    without_root_time(walk(&bundle.join("rootfs")))
}

/// No layer has an entry for the root, so its time is whatever an unpacker makes of it.
fn without_root_time(mut tree: BTreeMap<PathBuf, Facts>) -> BTreeMap<PathBuf, Facts> {
    tree.get_mut(Path::new("")).unwrap().mtime = (0, 0);
    tree
}

struct Fixture {
    dir: tempfile::TempDir,
    oracle: BTreeMap<PathBuf, Facts>,
}

impl Fixture {
    fn new(layers: Vec<Layer>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        layers::write_layout(&layout, layers);
        let oracle = oracle(&layout, dir.path());
        Self { dir, oracle }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn layout(&self) -> String {
        format!("oci:{}:latest", self.path("layout"))
    }

    fn roots(&self) -> serde_json::Value {
        json!({"sources": {"archiveRoots": [self.dir.path()]}})
    }

    fn assert_published(&self, target: &Path) {
        assert_same(&without_root_time(walk(target)), &self.oracle);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v1_archive_on_disk_is_published_as_the_image_is() {
    needs!(fuse, "umoci");
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let archive = image.path("image.clip");
    clip_csi(&["archive", &image.layout(), "-o", &archive]);
    let node = Node::start(image.roots()).await;
    let target = node.publish("a", &[("archive", &archive)]).await.unwrap();
    image.assert_published(&target);
    node.unpublish("a").await.unwrap();
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    assert!(!target.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v1_archive_in_s3_is_published_with_the_volumes_own_keys() {
    needs!(fuse, "umoci");
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let archive = image.path("image.clip");
    clip_csi(&["archive", &image.layout(), "-o", &archive]);
    let s3 = S3::start().await;
    s3.bucket("images");
    s3.put("images", "image.clip", &std::fs::read(&archive).unwrap());
    let node =
        Node::start(json!({"sources": {"s3": [{"endpoint": s3.endpoint(), "bucket": "other", "pathStyle": true}]}}))
            .await;
    let url = s3.url("images", "image.clip");
    let mut request = node.request("a", &[("archive", &url)]);
    let refused = node.send(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    let keys = s3.keys();
    request.secrets = [("accessKeyId", keys.access_key), ("secretAccessKey", keys.secret_key)]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
    let target = node.send(request).await.unwrap();
    image.assert_published(&target);
    assert!(s3.requests().iter().all(|line| line.starts_with("GET ") && !line.ends_with(" -")), "{:?}", s3.requests());
    node.unpublish("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v2_index_of_a_layout_is_published_as_the_image_is() {
    needs!(fuse, "umoci");
    for compression in [Compression::Gzip, Compression::None] {
        let image = Fixture::new(layers::tricky(compression));
        let archive = image.path("image.clip");
        clip_csi(&["index", &image.layout(), "-o", &archive]);
        let node = Node::start(image.roots()).await;
        let target = node.publish("a", &[("archive", &archive)]).await.unwrap();
        image.assert_published(&target);
        node.unpublish("a").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn zstd_layers_show_the_same_tree_as_gzip_ones() {
    needs!(fuse, "umoci");
    // umoci knows no zstd: the oracle is its view of the same entries in gzip layers.
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let zstd = image.dir.path().join("zstd");
    layers::write_layout(&zstd, layers::tricky(Compression::Zstd));
    let archive = image.path("image.clip");
    clip_csi(&["index", &format!("oci:{}:latest", zstd.display()), "-o", &archive]);
    let node = Node::start(image.roots()).await;
    let target = node.publish("a", &[("archive", &archive)]).await.unwrap();
    image.assert_published(&target);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_registry_is_indexed_on_demand_and_published() {
    needs!(fuse, "umoci", "docker-registry");
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let registry = Registry::start();
    registry.push_layout(Path::new(&image.path("layout")), "team/app", "v1").await;
    let config = json!({
        "imageService": {"clipVersion": 2},
        "sources": {"registries": {registry.host(): {"plainHttp": true}}},
    });
    let node = Node::start(config).await;
    let reference = registry.image("team/app", "v1");
    // Nothing is read before the second pod has come: it must leave alone what the first one's reads will need.
    let target = node.publish("a", &[("image", &reference)]).await.unwrap();
    let again = node.publish("b", &[("image", &reference)]).await.unwrap();
    image.assert_published(&target);
    image.assert_published(&again);
    assert_eq!(node.metric("clip_open_mounts").await, 1.0, "two pods share one mount");
    node.unpublish("a").await.unwrap();
    image.assert_published(&again);
    node.unpublish("b").await.unwrap();
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_image_is_refused_without_its_secret_though_it_is_cached() {
    needs!(fuse, "umoci", "docker-registry");
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let registry = Registry::start_with_login();
    registry.push_layout(Path::new(&image.path("layout")), "team/app", "v1").await;
    let config = json!({
        "imageService": {"clipVersion": 2},
        "sources": {"registries": {registry.host(): {"plainHttp": true}}},
    });
    let node = Node::start(config).await;
    let reference = registry.image("team/app", "v1");
    let mut request = node.request("a", &[("image", &reference)]);
    let auths = json!({"auths": {registry.host(): {"username": common::registry::USER, "password": common::registry::PASSWORD}}});
    request.secrets.insert(".dockerconfigjson".into(), auths.to_string());
    let target = node.send(request).await.unwrap();
    image.assert_published(&target);
    let refused = node.publish("stranger", &[("image", &reference)]).await.unwrap_err();
    assert!(matches!(refused.code(), tonic::Code::Unauthenticated | tonic::Code::PermissionDenied), "{refused}");
    assert!(!refused.message().contains(common::registry::PASSWORD));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_a_private_image_shows_nothing_without_the_secret_though_its_layers_are_cached() {
    needs!(fuse, "umoci", "docker-registry");
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let registry = Registry::start_with_login();
    registry.push_layout(Path::new(&image.path("layout")), "team/app", "v1").await;
    let (archive, reference) = (image.path("image.clip"), registry.image("team/app", "v1"));
    clip_csi(&["index", &image.layout(), "--store-as", &reference, "-o", &archive]);
    let mut config = image.roots();
    config["sources"]["registries"] = json!({registry.host(): {"plainHttp": true}});
    let node = Node::start(config).await;
    let mut request = node.request("a", &[("archive", &archive)]);
    let login = json!({"username": common::registry::USER, "password": common::registry::PASSWORD});
    let auths = json!({"auths": {registry.host(): login}});
    request.secrets.insert(".dockerconfigjson".into(), auths.to_string());
    let target = node.send(request).await.unwrap();
    image.assert_published(&target);
    for stranger in ["first", "second"] {
        let refused = node.publish(stranger, &[("archive", &archive)]).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");
    }
    assert_eq!(node.mounts().len(), 2, "the shared mount and its one target: {:?}", node.mounts());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_mebibyte_of_a_large_gzip_layer_fetches_less_than_three_percent_of_it() {
    needs!(fuse, "docker-registry");
    let dir = tempfile::tempdir().unwrap();
    let wanted = layers::letters(7, 1 << 20);
    // A few blocks of noise over and over: deflate looks back 32 KiB only, so they are as good as new ones.
    let blocks = [1, 2, 3, 4].map(|seed| layers::letters(seed, 16 << 20)).concat();
    let (before, after) = (blocks.repeat(5), blocks.repeat(3));
    // Level 1 would write blocks with fixed codes, which no usual image has; 2 is the fastest with codes of their own.
    let layer = Layer::new(Compression::Gzip).gzip_level(2);
    let layer = layer.file("before", &before).file("wanted", &wanted).file("after", &after);
    drop((before, after));
    let (_, written) = layers::write_layout(&dir.path().join("layout"), vec![layer]);
    let layer_bytes = written[0].1;
    assert!(layer_bytes > 400_000_000, "{layer_bytes}");
    let registry = Registry::start();
    registry.push_layout(&dir.path().join("layout"), "big", "v1").await;
    let archive = dir.path().join("big.clip");
    let reference = registry.image("big", "v1");
    clip_csi(&["index", &reference, "-o", archive.to_str().unwrap()]);
    let config = json!({
        "sources": {"archiveRoots": [dir.path()], "registries": {registry.host(): {"plainHttp": true}}},
    });
    let node = Node::start(config).await;
    let target = node.publish("a", &[("archive", archive.to_str().unwrap())]).await.unwrap();
    let archive_bytes = std::fs::metadata(&archive).unwrap().len();
    assert!(std::fs::read(target.join("wanted")).unwrap() == wanted);
    let fetched = node.metric("clip_range_get_bytes_total").await;
    println!(
        "layer {layer_bytes} bytes, archive {archive_bytes}, fetched {fetched}: {:.2} %",
        fetched * 100.0 / layer_bytes as f64
    );
    assert!(fetched < 0.03 * layer_bytes as f64, "{fetched} of {layer_bytes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_plugin_is_followed_by_one_that_brings_the_volume_back() {
    needs!(fuse, "umoci");
    let image = Fixture::new(layers::tricky(Compression::Gzip));
    let archive = image.path("image.clip");
    clip_csi(&["archive", &image.layout(), "-o", &archive]);
    let node = Node::start(image.roots()).await;
    let target = node.publish("a", &[("archive", &archive)]).await.unwrap();
    let left = node.kill();
    let dead = std::fs::read_dir(&target).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(libc::ENOTCONN));
    let node = Node::start_in(left, image.roots()).await;
    image.assert_published(&target);
    node.unpublish("a").await.unwrap();
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
}

/// Mounts at the same time, each of an archive of its own.
const MOUNTS: usize = 6;
/// MB that they may add to what the plugin holds: what their threads set aside for requests (16 MiB each) is hardly ever touched.
const MOUNTS_MB: u64 = 24;

/// MB of a process that no file is behind.
fn anonymous(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1000
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_take_little_memory_also_after_others_have_come_and_gone() {
    needs!(fuse);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: String| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(at("tree".into())).unwrap();
    let archives: Vec<String> = (0..MOUNTS).map(|n| at(format!("{n}.clip"))).collect();
    for (n, archive) in archives.iter().enumerate() {
        std::fs::write(at("tree/file".into()), format!("file of {n}")).unwrap();
        clip_csi(&["archive", &at("tree".into()), "-o", archive]);
    }
    let node = Node::start(json!({"sources": {"archiveRoots": [dir.path()]}})).await;
    let before = anonymous(node.pid());
    for round in 0..3 {
        for (n, archive) in archives.iter().enumerate() {
            let target = node.publish(&format!("{n}"), &[("archive", archive)]).await.unwrap();
            assert_eq!(std::fs::read(target.join("file")).unwrap(), format!("file of {n}").as_bytes());
        }
        let held = anonymous(node.pid());
        assert!(held < before + MOUNTS_MB, "round {round}: {held} MB with {MOUNTS} mounts, {before} MB without");
        for n in 0..MOUNTS {
            node.unpublish(&format!("{n}")).await.unwrap();
        }
    }
}
