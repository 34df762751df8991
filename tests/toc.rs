//! Layers that carry a table of contents, made by the libraries that make them in the field (`toc/main.go`): indexed by their tables
//! alone, published like any other image.

mod common;
// Not all of it is used here.
#[allow(dead_code)]
#[path = "interop/reference.rs"]
mod reference;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use clip_csi::units::{Compression, Digest};
use common::layers::{self, Layer, Stored};
use common::node::Node;
use common::proxy::Proxy;
use common::registry::Registry;
use common::skip::{self, needs};
use common::tree::{Facts, assert_same, walk};
use reference::Reference;
use serde_json::{Value, json};

const OCI: &str = "application/vnd.oci.image.layer.v1.tar";
const ESTARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// The Go program, built once per run.
static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("toc_maker");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/toc");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(".").current_dir(source).env("GOTOOLCHAIN", "local");
    succeeded(build.output().expect("go build can be started"), "go build");
    program
});

fn succeeded(output: Output, what: &str) -> Output {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn clip_csi(args: &[&str]) -> Output {
    let out = Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(args).output().unwrap();
    succeeded(out, &format!("clip-csi {args:?}"))
}

/// A tar as a layer of one of the kinds that the program makes.
fn layer(kind: &str, tar: &[u8]) -> Stored {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("in.tar"), dir.path().join("out"));
    std::fs::write(&from, tar).unwrap();
    let out = Command::new(&*PROGRAM).arg(kind).args([&from, &to]).output().unwrap();
    let said: Value = serde_json::from_slice(&succeeded(out, kind).stdout).unwrap();
    let suffix = if kind.starts_with("zstd") { "+zstd" } else { "+gzip" };
    Stored {
        media_type: format!("{OCI}{suffix}"),
        bytes: std::fs::read(to).unwrap(),
        diff_id: said["diffID"].as_str().unwrap().parse().unwrap(),
        annotations: said["annotations"].clone(),
    }
}

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
    fn node_config(&self, registries: &[&str]) -> Value {
        let registries: serde_json::Map<_, _> =
            registries.iter().map(|host| ((*host).to_owned(), json!({"plainHttp": true}))).collect();
        json!({"sources": {"archiveRoots": [self.0.path()], "registries": registries}})
    }

    /// What umoci unpacks of a layout here.
    fn oracle(&self, layout: &str) -> BTreeMap<PathBuf, Facts> {
        let bundle = self.path(&format!("{layout}-unpacked"));
        let image = format!("{}:latest", self.text(layout));
        let out = Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle).output().unwrap();
        succeeded(out, "umoci");
        plain(walk(&bundle.join("rootfs")))
    }
}

/// No layer has an entry for the root, so its time is whatever an unpacker makes of it.
fn plain(mut tree: BTreeMap<PathBuf, Facts>) -> BTreeMap<PathBuf, Facts> {
    tree.get_mut(Path::new("")).unwrap().mtime = (0, 0);
    tree
}

/// Whether each layer was indexed by its table.
fn by_table(archive: &str) -> Vec<bool> {
    let out = clip_csi(&["inspect", "--json", archive]);
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    report["layers"].as_array().unwrap().iter().map(|layer| layer["tableOfContents"].as_bool().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_with_a_table_are_published_from_a_registry_as_an_unpacker_shows_them() {
    needs!(fuse, go, "umoci", "docker-registry");
    let tars: Vec<Vec<u8>> = layers::tricky(Compression::None).into_iter().map(Layer::into_tar).collect();
    let place = Place::new();
    layers::write_layout(&place.path("plain"), layers::tricky(Compression::Gzip));
    let plain_oracle = place.oracle("plain");
    let registry = Registry::start();
    for kind in ["estargz", "estargz-lossless", "estargz-shared", "zstd-stargz", "zstd-chunked"] {
        layers::write_stored(&place.path(kind), tars.iter().map(|tar| layer(kind, tar)));
        // umoci knows no zstd: there the image is what it is without its tables. eStargz has files of its own in the tar.
        let oracle = if kind.starts_with("zstd") { plain_oracle.clone() } else { place.oracle(kind) };
        let shows_table = ["estargz", "estargz-shared"].contains(&kind);
        assert_eq!(oracle.contains_key(Path::new("stargz.index.json")), shows_table, "{kind}");
        registry.push_layout(&place.path(kind), kind, "v1").await;
        let archive = place.text(&format!("{kind}.clip"));
        clip_csi(&["index", &registry.image(kind, "v1"), "-o", &archive]);
        assert_eq!(by_table(&archive), [true; 3], "{kind}");
        let node = Node::start(place.node_config(&[registry.host()])).await;
        let target = node.publish("a", &[("archive", &archive)]).await.unwrap();
        assert_same(&plain(walk(&target)), &oracle);
        node.unpublish("a").await.unwrap();
        let verified = clip_csi(&["verify", "--data", &archive]);
        println!("{kind}: {}", String::from_utf8_lossy(&verified.stdout).trim());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn indexing_by_a_table_fetches_less_than_two_percent_of_a_layer() {
    needs!(go, "docker-registry");
    let wanted = layers::letters(77, 100_000);
    let big: Vec<Vec<u8>> = (0..6).map(|seed| layers::letters(seed, 12 << 20)).collect();
    let mut made = Layer::new(Compression::None);
    for (i, bytes) in big.iter().enumerate() {
        made = made.file(&format!("big/{i}"), bytes);
        for j in 0..100 {
            made = made.file(&format!("small/{i}-{j}"), &layers::text_like(i as u64 * 100 + j, 3000));
        }
        if i == 3 {
            made = made.file("wanted", &wanted);
        }
    }
    let tar = made.into_tar();
    let registry = Registry::start();
    let proxy = Proxy::start(registry.host()).await;
    for kind in ["estargz", "zstd-chunked"] {
        let place = Place::new();
        let (_, written) = layers::write_stored(&place.path("layout"), [layer(kind, &tar)]);
        let layer_bytes = written[0].1;
        registry.push_layout(&place.path("layout"), kind, "v1").await;
        let archive = place.text("image.clip");
        proxy.take();
        clip_csi(&["index", &format!("{}/{kind}:v1", proxy.host()), "-o", &archive]);
        let indexed = proxy.take();
        assert_eq!(by_table(&archive), [true]);
        let out = clip_csi(&["cat", &archive, "/wanted"]);
        let read = proxy.take();
        assert!(out.stdout == wanted, "{kind}");
        let percent = |n: u64| n as f64 * 100.0 / layer_bytes as f64;
        println!(
            "{kind}: layer {layer_bytes} bytes, indexed with {indexed} ({:.2} %), 100 kB read with {read} ({:.2} %), archive {}",
            percent(indexed),
            percent(read),
            std::fs::metadata(&archive).unwrap().len()
        );
        assert!(indexed > 10_000 && percent(indexed) < 2.0, "{kind}: {indexed} of {layer_bytes}");
        assert!(read >= 50_000 && percent(read) < 2.0, "{kind}: {read} of {layer_bytes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_table_nobody_vouches_for_or_that_lies_is_streamed() {
    needs!(fuse, go, "umoci");
    let tars: Vec<Vec<u8>> = layers::tricky(Compression::None).into_iter().map(Layer::into_tar).collect();
    let manifest = |kind: &str, name: &str| format!("io.github.containers.zstd-chunked.manifest-{name}{kind}");
    let (position, checksum) = (manifest("", "position"), manifest("", "checksum"));
    type Edit<'a> = Box<dyn Fn(&mut Stored) + 'a>;
    let wrong = || json!(Digest::of(b"something else").to_string());
    let cases: Vec<(&str, &str, Edit)> = vec![
        ("no digest in the manifest", "estargz", Box::new(|layer| layer.annotations = json!({}))),
        ("another digest", "estargz", Box::new(|layer| layer.annotations[ESTARGZ_DIGEST] = wrong())),
        ("a digest that is none", "estargz", Box::new(|layer| layer.annotations[ESTARGZ_DIGEST] = json!("md5:00"))),
        ("no footer", "estargz", Box::new(|layer| layer.bytes.extend(flate2_empty()))),
        ("another digest", "zstd-chunked", Box::new(|layer| layer.annotations[&checksum] = wrong())),
        ("beyond the layer", "zstd-chunked", Box::new(|layer| layer.annotations[&position] = json!("1:99999999:5:1"))),
        ("no position", "zstd-chunked", Box::new(|layer| layer.annotations[&position] = json!("here"))),
        ("no annotations", "zstd-chunked", Box::new(|layer| layer.annotations = json!({}))),
    ];
    let place = Place::new();
    layers::write_layout(&place.path("plain"), layers::tricky(Compression::Gzip));
    let oracle = place.oracle("plain");
    for (i, (what, kind, edit)) in cases.iter().enumerate() {
        let name = format!("case-{i}");
        let stored = tars.iter().map(|tar| {
            let mut stored = layer(kind, tar);
            edit(&mut stored);
            stored
        });
        layers::write_stored(&place.path(&name), stored);
        let archive = place.text(&format!("{name}.clip"));
        let out = clip_csi(&["index", &format!("oci:{}:latest", place.text(&name)), "-o", &archive]);
        assert_eq!(by_table(&archive), [false; 3], "{kind}: {what}");
        let warned = String::from_utf8_lossy(&out.stderr).contains("its table of contents is not used");
        assert_eq!(
            warned,
            !what.starts_with("no ") || what.ends_with("footer") || what.ends_with("position"),
            "{what}"
        );
        let copy = place.path(&format!("{name}-copy"));
        clip_csi(&["extract", &archive, copy.to_str().unwrap()]);
        let mut shown = plain(walk(&copy));
        shown.retain(|path, _| !["stargz.index.json", ".no.prefetch.landmark"].map(Path::new).contains(&&**path));
        assert_same(&shown, &oracle);
    }
}

/// A gzip member of no bytes.
fn flate2_empty() -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&[]).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tables_every_layer_is_streamed_for_the_go_module_to_read() {
    needs!(go);
    let place = Place::new();
    let tar = Layer::new(Compression::None).file("a", b"content").into_tar();
    layers::write_stored(&place.path("layout"), [layer("estargz", &tar)]);
    let (image, archive) = (format!("oci:{}:latest", place.text("layout")), place.text("image.clip"));
    clip_csi(&["index", "--no-toc", &image, "-o", &archive]);
    assert_eq!(by_table(&archive), [false]);
    assert_eq!(clip_csi(&["cat", &archive, "/a"]).stdout, b"content");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_found_by_a_table_fails_in_the_go_module_rather_than_lies() {
    let Some(go) = Reference::or_skip(&["docker-registry"]) else { return };
    let place = Place::new();
    let with_table = Layer::new(Compression::None).dir("d", 0o755).file("d/found", b"by its table").into_tar();
    let tar = Layer::new(Compression::None).file("ordinary", b"by the stream").into_tar();
    let ordinary = Stored {
        media_type: OCI.to_owned() + "+gzip",
        diff_id: Digest::of(&tar),
        bytes: {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut encoder, &tar).unwrap();
            encoder.finish().unwrap()
        },
        annotations: json!({}),
    };
    layers::write_stored(&place.path("layout"), [layer("estargz", &with_table), ordinary]);
    let registry = Registry::start();
    registry.push_layout(&place.path("layout"), "team/app", "v1").await;
    let (reference, archive) = (registry.image("team/app", "v1"), place.path("image.clip"));
    clip_csi(&["index", &reference, "-o", &place.text("image.clip")]);
    assert_eq!(by_table(&place.text("image.clip")), [true, false]);
    {
        let mounted = go.mount(&archive, &place.path("go"), &place.path("go-cache"));
        assert_eq!(std::fs::metadata(mounted.dir.join("d/found")).unwrap().len(), 12);
        let refused = std::fs::read(mounted.dir.join("d/found")).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{refused}");
        assert_eq!(std::fs::read(mounted.dir.join("ordinary")).unwrap(), b"by the stream");
    }
    clip_csi(&["index", "--no-toc", &reference, "-o", &place.text("image.clip")]);
    let mounted = go.mount(&archive, &place.path("go-again"), &place.path("go-cache"));
    assert_eq!(std::fs::read(mounted.dir.join("d/found")).unwrap(), b"by its table");
}
