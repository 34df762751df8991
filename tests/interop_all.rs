//! Images as people have them, between us and the Go module in both directions: `make interop-all`. What is in an image, an independent
//! unpacker says (umoci). Where the reference is known to be wrong, the exception has a name, and the pathological image must show
//! each of them; in the others it may.
//!
//! `CLIP_CSI_IMAGES` is the directory where `tests/images/build` left the images; without it all is skipped by name.

mod common;
#[path = "interop/exceptions.rs"]
mod exceptions;
#[path = "interop/reference.rs"]
// Each test binary uses some of it.
#[allow(dead_code)]
mod reference;

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

use clip_csi::source::S3Keys;
use common::gateway::Gateway;
use common::node::Node;
use common::registry::Registry;
use common::skip::skipped;
use common::tree::{assert_same, walk};
use common::usage::{Usage, measured};
use exceptions::{Exceptions, settled};
use futures::FutureExt as _;
use reference::{Reference, Seen, extracted};
use serde_json::{Value, json};

/// What a build may hold, whatever the layers' sizes: the program and its buffers, and some hundred bytes a name.
const MEMORY: u64 = 128 << 20;
const MEMORY_NAME: u64 = 1 << 10;
/// Rounds of both indexers, in turns.
const ROUNDS: usize = 3;
/// Of the unpacked layers, in percent.
const MAX_TABLE: f64 = 0.1;
/// Bytes that a file must have on average for an archive of at most 1 % of its image.
const USUAL_FILE: u64 = 20_000;
const REPOSITORY: (&str, &str) = ("images/one", "v1");

/// An image, what it holds, and what was found out.
struct Image {
    name: &'static str,
    layout: PathBuf,
    place: tempfile::TempDir,
    go: Reference,
    oracle: Seen,
    exceptions: Exceptions,
    registry: Registry,
    failed: Mutex<Vec<String>>,
}

impl Image {
    /// Unpacks the image, or says by name that the test is skipped.
    async fn or_skip(name: &'static str, exceptions: Exceptions) -> Option<Self> {
        let Some(images) = std::env::var_os("CLIP_CSI_IMAGES") else {
            let test = std::thread::current().name().unwrap_or("interop_all").to_owned();
            skipped(&test, "CLIP_CSI_IMAGES is not set: make interop-all makes the images");
            return None;
        };
        let go = Reference::or_skip(&["umoci", "docker-registry"])?;
        let layout = Path::new(&images).join(name);
        let index = fs::read_to_string(layout.join("index.json"));
        let index = index.unwrap_or_else(|e| panic!("{}: {e}; run tests/images/build", layout.display()));
        let place = tempfile::tempdir().unwrap();
        // The same tree in entries that umoci knows, where it does not know all.
        let tag = if index.contains("\"oracle\"") { "oracle" } else { "latest" };
        let bundle = place.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        let unpack = Command::new("umoci")
            .args(["raw", "unpack", "--image", &format!("{}:{tag}", layout.display())])
            .arg(bundle.join("rootfs"))
            .output()
            .expect("umoci can be started");
        assert!(unpack.status.success(), "umoci: {}", String::from_utf8_lossy(&unpack.stderr));
        // Beside it what makes it a bundle, as beta9 archives them.
        fs::write(bundle.join("config.json"), r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"}}"#).unwrap();
        let oracle = settled(walk(&bundle.join("rootfs")));
        let registry = Registry::start();
        registry.push_layout(&layout, REPOSITORY.0, REPOSITORY.1).await;
        Some(Self { name, layout, place, go, oracle, exceptions, registry, failed: Mutex::default() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn reference(&self) -> String {
        self.registry.image(REPOSITORY.0, REPOSITORY.1)
    }

    /// One cell of the matrix: it fails alone, and is told.
    async fn cell(&self, what: &str, work: impl Future<Output = ()>) {
        let since = SystemTime::now();
        let result = AssertUnwindSafe(work).catch_unwind().await;
        let verdict = if result.is_ok() { "good" } else { "FAILED" };
        let seconds = since.elapsed().unwrap_or_default().as_secs();
        say(&format!("| {} | {what} | {verdict} | {seconds} s |", self.name));
        if result.is_err() {
            self.failed.lock().unwrap().push(format!("{}: {what}", self.name));
        }
    }

    /// An S3 server, or a note that this cell is skipped.
    async fn gateway(&self, cell: &str) -> Option<Gateway> {
        Gateway::or_skip(&format!("{}: {cell}", self.name), "images").await
    }

    /// We mount, list, read, extract and verify an archive of the Go module.
    async fn read_by_us(&self, archive: &str, s3: Option<&Gateway>, oracle: &Seen) {
        // An address must be configured; the keys are the volume's.
        let known: Vec<Value> =
            s3.iter().map(|s3| json!({"endpoint": s3.endpoint(), "bucket": "other", "pathStyle": true})).collect();
        let sources = json!({
            "archiveRoots": [self.place.path()],
            "registries": {self.registry.host(): {"plainHttp": true}},
            "s3": known,
        });
        let node = Node::start(json!({"sources": sources})).await;
        let mut request = node.request("a", &[("archive", archive), ("integrity", "strict")]);
        let mut environment = vec![];
        if let Some(S3Keys { access_key, secret_key, .. }) = s3.map(Gateway::keys) {
            environment.push(("AWS_ACCESS_KEY_ID", access_key.clone()));
            environment.push(("AWS_SECRET_ACCESS_KEY", secret_key.clone()));
            request.secrets.insert("accessKeyId".into(), access_key);
            request.secrets.insert("secretAccessKey".into(), secret_key);
        }
        let target = node.send(request).await.unwrap();
        let shown = settled(walk(&target));
        assert_same(&exceptions::wrong_where_expected(shown, oracle, &self.oracle), oracle);
        node.unpublish("a").await.unwrap();
        assert_eq!(node.mounts(), Vec::<PathBuf>::new());
        drop(node);
        let run = |args: &[&str]| {
            let mut command = Command::new(common::binary());
            let out = command.args(args).envs(environment.iter().map(|(k, v)| (*k, v.as_str()))).output().unwrap();
            assert!(out.status.success(), "clip-csi {args:?}: {}", String::from_utf8_lossy(&out.stderr));
            out.stdout
        };
        run(&["verify", "--data", archive]);
        let listing = run(&["ls", "-R", archive]);
        // A name may have line breaks in it, but hardly what looks like a mode after them.
        let is_entry = |line: &&[u8]| {
            line.len() > 10 && b"-dlpscb".contains(&line[0]) && line[1..10].iter().all(|b| b"rwxsStT-".contains(b))
        };
        let entries = listing.split(|b| *b == b'\n').filter(is_entry).count();
        assert_eq!(entries, oracle.len() - 1, "entries that `ls -R` lists");
        run(&["extract", archive, &self.text("copy")]);
        let copy = walk(&self.path("copy"));
        fs::remove_dir_all(self.path("copy")).unwrap();
        assert_same(&exceptions::wrong_where_expected(settled(copy), oracle, &self.oracle), oracle);
    }

    /// The Go module reads the index of an archive of ours: all names, of the right kind.
    fn dumped_by_go(&self, archive: &Path, below: &str) {
        let (_, out) = measured(self.go.command("dump").arg(archive));
        let mut found = BTreeMap::new();
        for line in out.lines() {
            let node: Value = serde_json::from_str(line).unwrap();
            let Some(path) = node["Path"].as_str() else { continue };
            let Some(path) = path.strip_prefix(below).filter(|rest| rest.is_empty() || rest.starts_with('/')) else {
                continue;
            };
            let size = if node["NodeType"] == "file" { node["Attr"]["Size"].as_u64().unwrap() } else { 0 };
            let mode = node["Attr"]["Mode"].as_u64().unwrap() & 0o7777;
            let kind = node["NodeType"].as_str().unwrap().to_owned();
            found.insert(path.trim_start_matches('/').to_owned(), (kind, mode, size));
        }
        let expected = self.oracle.iter().map(|(path, facts)| {
            let kind = if matches!(facts.kind, "dir" | "symlink") { facts.kind } else { "file" };
            let size = if facts.kind == "file" { facts.size } else { 0 };
            (path.to_string_lossy().into_owned(), (kind.to_owned(), u64::from(facts.mode), size))
        });
        let expected: BTreeMap<_, _> = expected.collect();
        let wrong: Vec<_> = expected.iter().filter(|(path, facts)| found.get(*path) != Some(*facts)).take(5).collect();
        assert!(wrong.is_empty(), "not in what the reference reads: {wrong:?}");
        assert_eq!(found.len(), expected.len(), "names that the reference reads");
    }

    async fn v1_of_theirs(&self) {
        let (bundle, archive) = (self.path("bundle"), self.path("go.clip"));
        for fifo in self.oracle.iter().filter(|(_, facts)| facts.kind == "fifo").map(|(path, _)| path) {
            // It opens them and waits for ever. Their directory's time stays.
            let fifo = bundle.join("rootfs").join(fifo);
            let dir = fs::File::open(fifo.parent().unwrap()).unwrap();
            let modified = dir.metadata().unwrap().modified().unwrap();
            fs::remove_file(fifo).unwrap();
            dir.set_modified(modified).unwrap();
        }
        self.go.run("create", [&bundle, &archive]);
        let oracle = self.exceptions.apply(&self.oracle, &[exceptions::ARCHIVING]);
        self.cell("v1 local, Go builds", self.read_by_us(&self.text("go.clip"), None, &oracle)).await;
        let Some(s3) = self.gateway("v1 remote, Go builds").await else { return };
        s3.put_file("images", "go.clip", &archive);
        let work = async {
            let (endpoint, bucket, key) = (Path::new(s3.endpoint()), Path::new("images"), Path::new("go.clip"));
            let remote = self.path("go.rclip");
            self.go.run("remote", [&archive, &remote, endpoint, bucket, key]);
            s3.put_file("images", "go.rclip", &remote);
            self.read_by_us(&s3.location("images", "go.rclip").to_string(), Some(&s3), &oracle).await;
        };
        self.cell("v1 remote, Go builds", work).await;
        fs::remove_file(archive).unwrap();
    }

    async fn v1_of_ours(&self) {
        let archive = self.path("ours.clip");
        let layout = format!("oci:{}:latest", self.layout.display());
        let mut command = Command::new(common::binary());
        let mounted = self.exceptions.apply(&self.oracle, &[exceptions::MOUNTING]);
        let work = async {
            let (took, _) = measured(command.args(["archive", &layout, "-o", &self.text("ours.clip")]));
            self.memory("archive", &took);
            self.dumped_by_go(&archive, "/rootfs");
            let go = self.go.mount(&archive, &self.path("mount"), Path::new(""));
            let shown = settled(walk(&go.dir.join("rootfs")));
            assert_same(&shown, &reference::with_lost_nanoseconds(mounted.clone(), &shown));
            drop(go);
            let (out, since) = (self.path("out"), SystemTime::now());
            self.go.run("extract", [&archive, &out]);
            let copy = settled(extracted(&out.join("rootfs"), since));
            fs::remove_dir_all(out).unwrap();
            assert_same(&copy, &self.exceptions.apply(&self.oracle, exceptions::EXTRACTING));
        };
        self.cell("v1 local, we build", work).await;
        let Some(s3) = self.gateway("v1 remote, we build").await else { return };
        let work = async {
            let (keys, url) = (s3.keys(), s3.location("images", "ours.clip").to_string());
            let mut push = Command::new(common::binary());
            push.args(["push", &self.text("ours.clip"), &url, "--rclip"]);
            push.env("AWS_ACCESS_KEY_ID", &keys.access_key).env("AWS_SECRET_ACCESS_KEY", &keys.secret_key);
            let (go, dir) = (self.go, self.path("mount-s3"));
            let remote = s3.path("images", "ours.rclip");
            measured(&mut push);
            let go = go.mount_s3(&remote, &dir, &keys.access_key, &keys.secret_key);
            let shown = settled(walk(&go.dir.join("rootfs")));
            drop(go);
            assert_same(&shown, &reference::with_lost_nanoseconds(mounted.clone(), &shown));
            // Its extractor has no source but the archive itself: of an index it would write the index's bytes.
            self.dumped_by_go(&s3.path("images", "ours.rclip"), "/rootfs");
        };
        self.cell("v1 remote, we build", work).await;
        fs::remove_file(archive).unwrap();
    }

    async fn v2_of_theirs(&self) {
        let oracle = self.exceptions.apply(&self.oracle, &[exceptions::INDEXING]);
        self.cell("v2, Go builds", self.read_by_us(&self.text("go-v2.clip"), None, &oracle)).await;
    }

    async fn v2_of_ours(&self) {
        let archive = self.path("v2.clip");
        let work = async {
            self.dumped_by_go(&archive, "");
            let go = self.go.mount(&archive, &self.path("mount"), &self.path("go-cache"));
            let shown = settled(walk(&go.dir));
            drop(go);
            let _ = fs::remove_dir_all(self.path("go-cache"));
            let oracle = self.exceptions.apply(&self.oracle, &[exceptions::MOUNTING, exceptions::MOUNTING_V2]);
            assert_same(&shown, &reference::with_lost_nanoseconds(oracle, &shown));
            let (out, since) = (self.path("out"), SystemTime::now());
            self.go.run("extract", [&archive, &out]);
            let copy = settled(extracted(&out, since));
            fs::remove_dir_all(out).unwrap();
            let lists = [&exceptions::EXTRACTING.concat()[..], exceptions::EXTRACTING_V2];
            let expected = self.exceptions.apply(&self.oracle, &lists);
            assert_same(&exceptions::wrong_where_expected(copy, &expected, &self.oracle), &expected);
        };
        self.cell("v2, we build", work).await;
    }

    /// Both index the image, in turns, and what that took is told.
    fn figures(&self) {
        let (ours, theirs) = (self.text("v2.clip"), self.text("go-v2.clip"));
        let (mut we, mut go) = (vec![], vec![]);
        for _ in 0..ROUNDS {
            let mut command = Command::new(common::binary());
            we.push(measured(command.args(["index", "--no-cache", &self.reference(), "-o", &ours])).0);
            go.push(measured(self.go.command("index").args([&self.reference(), &theirs])).0);
        }
        let (we, go) = (median(we), median(go));
        self.memory("index", &we);
        let inspect = Command::new(common::binary()).args(["inspect", "--json", &ours]).output().unwrap();
        let report: Value = serde_json::from_slice(&inspect.stdout).unwrap();
        let sum = |key: &str| -> u64 {
            report["layers"].as_array().unwrap().iter().map(|layer| layer[key].as_u64().unwrap()).sum()
        };
        let number = |value: &Value| value.as_u64().unwrap();
        let (compressed, image) = (sum("compressedBytes"), sum("uncompressedBytes"));
        let archive = number(&report["archiveBytes"]);
        let table = number(&report["extension"]["seekTableBytes"]);
        let percent = |part: u64| part as f64 * 100.0 / image as f64;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        say(&format!(
            "FIGURES | {} | {} | {:.0} | {:.0} | {:.2} % | {:.3} % | {:.2} s | {:.2} s | {:.2} s | {:.2} s | {:.0} | {:.0} |",
            self.name,
            number(&report["tree"]["names"]),
            mb(compressed),
            mb(image),
            percent(archive),
            percent(table),
            we.cpu.as_secs_f64(),
            go.cpu.as_secs_f64(),
            we.wall.as_secs_f64(),
            go.wall.as_secs_f64(),
            mb(we.peak_bytes),
            mb(go.peak_bytes),
        ));
        assert!(percent(table) <= MAX_TABLE, "the seek table has {:.3} % of the image", percent(table));
        let average = number(&report["tree"]["contentBytes"]) / number(&report["tree"]["files"]);
        if average >= USUAL_FILE {
            assert!(percent(archive) <= 1.0, "the archive has {:.2} % of the image", percent(archive));
        }
    }

    fn memory(&self, what: &str, took: &Usage) {
        let limit = MEMORY + MEMORY_NAME * self.oracle.len() as u64;
        let peak = took.peak_bytes;
        say(&format!("{}: {what} held {} MB at most", self.name, peak / 1_000_000));
        assert!(peak <= limit, "{what} of {} names held {peak} bytes, more than {limit}", self.oracle.len());
    }
}

fn median(mut rounds: Vec<Usage>) -> Usage {
    rounds.sort_by_key(|round| round.cpu);
    rounds[rounds.len() / 2]
}

/// To the real standard output: libtest keeps what a test prints that passes.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

async fn matrix(name: &'static str, exceptions: Exceptions) {
    let Some(image) = Image::or_skip(name, exceptions).await else { return };
    image.cell("figures", async { image.figures() }).await;
    image.v2_of_theirs().await;
    image.v2_of_ours().await;
    image.v1_of_ours().await;
    image.v1_of_theirs().await;
    let failed = image.failed.lock().unwrap();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minimal_image_goes_both_ways_in_every_form() {
    matrix("minimal", Exceptions::MayShow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_python_goes_both_ways_in_every_form() {
    matrix("python", Exceptions::MayShow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_runtime_goes_both_ways_in_every_form() {
    matrix("runtime", Exceptions::MayShow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_database_goes_both_ways_in_every_form() {
    matrix("database", Exceptions::MayShow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fat_image_goes_both_ways_in_every_form() {
    matrix("fat", Exceptions::MayShow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pathological_image_goes_both_ways_in_every_form() {
    matrix("pathological", Exceptions::MustShow).await;
}
