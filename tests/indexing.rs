//! Indexing as a machine does it again and again: streams that break, builds that are killed, layers that come in several images.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use clip_csi::build::progress::{Progress, Silent};
use clip_csi::build::{Artifacts, BuildOptions, Indexing, index_image};
use clip_csi::source::{Credentials, ResolvedImage};
use clip_csi::units::{Compression, Digest, Platform};
use common::http_fault::{Reply, Seen, Server};
use common::layers::{self, Layer};

/// A layer of noise: as large compressed as not.
fn noisy(seed: u64, len: usize) -> Layer {
    Layer::new(Compression::Gzip).dir("data", 0o755).file(&format!("data/{seed}"), &common::noise(len, seed))
}

/// Three layers, the largest first.
fn three(dir: &Path) -> Vec<(Digest, u64)> {
    layers::write_layout(dir, vec![noisy(1, 900_000), noisy(2, 500_000), noisy(3, 200_000)]).1
}

/// What a registry answers that holds one layout.
fn answer(seen: &Seen, layout: &Path) -> Reply {
    let blob = |digest: &str| std::fs::read(layout.join("blobs/sha256").join(digest)).map(Bytes::from);
    if let Some((_, digest)) = seen.path.split_once("/blobs/sha256:") {
        return blob(digest).map_or(Reply::status(404), |bytes| Reply::range(seen, &bytes));
    }
    if seen.path.contains("/manifests/") {
        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let manifest = blob(digest.strip_prefix("sha256:").unwrap()).unwrap();
        return Reply::ok(manifest).with("content-type", common::image::MANIFEST).with("docker-content-digest", digest);
    }
    Reply::ok("{}")
}

/// The GET requests for one blob.
fn gets(server: &Server, digest: &Digest) -> Vec<Seen> {
    let is_it = |seen: &Seen| seen.method == http::Method::GET && seen.path.ends_with(&format!("/blobs/{digest}"));
    server.seen().into_iter().filter(is_it).collect()
}

async fn resolve(host: &str, repository: &str) -> ResolvedImage {
    let image = format!("{host}/{repository}:latest").parse().unwrap();
    let sources = common::sources(true, Default::default());
    sources.resolve(&image, &Platform::host(), &Credentials::default()).await.unwrap()
}

fn options(layers: usize, artifacts: Option<&Path>) -> BuildOptions {
    let artifacts = artifacts.map(|dir| Artifacts::new(dir.to_owned(), 1 << 30));
    BuildOptions {
        span_size: 256 << 10,
        indexing: Arc::new(Indexing::new(layers, artifacts, u64::MAX)),
        ..BuildOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_again_and_again_goes_on_from_the_last_byte_that_came() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let written = three(&layout);
    let breaks = Arc::new(AtomicBool::new(false));
    let broken = breaks.clone();
    // Later every answer breaks: the largest layer takes more of them than there are tries.
    let server = Server::start(move |seen, _| match broken.load(Ordering::SeqCst) && seen.path.contains("/blobs/") {
        true => answer(seen, &layout).cut_after(60_000),
        false => answer(seen, &layout),
    })
    .await;
    let (out, again) = (dir.path().join("whole.clip"), dir.path().join("broken.clip"));
    let image = resolve(server.host(), "x").await;
    index_image(&image, &out, &options(2, None), &Silent).await.unwrap();
    let before = server.seen().len();
    breaks.store(true, Ordering::SeqCst);
    index_image(&image, &again, &options(2, None), &Silent).await.unwrap();
    assert_eq!(
        std::fs::read(&out).unwrap(),
        std::fs::read(&again).unwrap(),
        "the archive is the same as without a break"
    );
    let later = server.seen().split_off(before);
    for (digest, size) in &written {
        let of_it = later.iter().filter(|seen| seen.path.ends_with(&digest.to_string()));
        let starts: Vec<u64> = of_it.map(|seen| seen.range().map_or(0, |range| range.0)).collect();
        assert!(starts.windows(2).all(|pair| pair[0] < pair[1]), "no byte that came is asked for again: {starts:?}");
        assert!(starts.len() as u64 >= size / 60_000, "{starts:?} for {size} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_two_images_share_is_streamed_once() {
    let dir = tempfile::tempdir().unwrap();
    let base = || noisy(7, 600_000);
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let (_, of_one) = layers::write_layout(&one, vec![base(), noisy(8, 50_000)]);
    layers::write_layout(&two, vec![base(), noisy(9, 50_000)]);
    let (shared, size) = of_one[0];
    let server = Server::start(move |seen, _| match seen.path.contains("/one/") {
        true => answer(seen, &one),
        false => answer(seen, &two),
    })
    .await;
    let kept = dir.path().join("kept");
    let options = options(4, Some(&kept));
    let (one, two) = (resolve(server.host(), "one").await, resolve(server.host(), "two").await);
    let (out_one, out_two) = (dir.path().join("1.clip"), dir.path().join("2.clip"));
    // At the same time, so that neither finds what the other has kept before it asks.
    let (a, b) =
        tokio::join!(index_image(&one, &out_one, &options, &Silent), index_image(&two, &out_two, &options, &Silent));
    a.unwrap();
    b.unwrap();
    assert_eq!(gets(&server, &shared).len(), 1);
    // And later, in another process' words: other options, the same directory.
    let again = BuildOptions { indexing: self::options(1, Some(&kept)).indexing, ..options.clone() };
    let counted = Counted::default();
    index_image(&two, &dir.path().join("3.clip"), &again, &counted).await.unwrap();
    assert_eq!(gets(&server, &shared).len(), 1);
    assert_eq!(std::fs::read(&out_two).unwrap(), std::fs::read(dir.path().join("3.clip")).unwrap());
    assert!(counted.0[0].load(Ordering::SeqCst) >= size, "its bytes count as done");
    assert_eq!(counted.0[0].load(Ordering::SeqCst), counted.0[1].load(Ordering::SeqCst));
}

/// Bytes announced and bytes done.
#[derive(Default)]
struct Counted([AtomicU64; 2]);

impl Progress for Counted {
    fn begin(&self, _: &str, total: Option<u64>) -> u64 {
        self.0[0].fetch_add(total.unwrap_or(0), Ordering::SeqCst);
        0
    }
    fn advance(&self, _: u64, bytes: u64) {
        self.0[1].fetch_add(bytes, Ordering::SeqCst);
    }
    fn end(&self, _: u64) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archive_does_not_depend_on_how_many_layers_are_in_work_or_what_was_kept() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let layers = (1..9).map(|n| noisy(n, 40_000 * (1 + n as usize * 5 % 7))).chain(layers::tricky(Compression::Gzip));
    layers::write_layout(&layout, layers.collect());
    let server = Server::start(move |seen, _| answer(seen, &layout)).await;
    let image = resolve(server.host(), "x").await;
    let kept = dir.path().join("kept");
    let mut archives = Vec::new();
    for (number, (layers, artifacts)) in
        [(1, None), (3, None), (64, None), (2, Some(&kept)), (5, Some(&kept))].into_iter().enumerate()
    {
        let out = dir.path().join(format!("{number}.clip"));
        let counted = Counted::default();
        index_image(&image, &out, &options(layers, artifacts.map(PathBuf::as_path)), &counted).await.unwrap();
        let [announced, done] = counted.0.map(AtomicU64::into_inner);
        let size: u64 = image.layers.iter().map(|layer| layer.size).sum();
        assert_eq!((announced, done), (size, size), "progress with {layers} layers at a time");
        archives.push(std::fs::read(out).unwrap());
    }
    assert!(archives.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_layers_are_streamed_at_a_time_than_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let written = three(&layout).into_iter().map(|(digest, _)| digest).collect::<Vec<_>>();
    let server = Server::start(move |seen, _| answer(seen, &layout)).await;
    let image = resolve(server.host(), "x").await;
    index_image(&image, &dir.path().join("x.clip"), &options(1, None), &Silent).await.unwrap();
    let order: Vec<Digest> = server
        .seen()
        .iter()
        .filter_map(|seen| seen.path.rsplit_once("/blobs/").and_then(|(_, digest)| digest.parse().ok()))
        .filter(|digest| written.contains(digest))
        .collect();
    // One after the other, the largest first: no request for the next before the last one has ended.
    assert_eq!(order, written);
}

/// Ends the process that it holds.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_was_killed_goes_on_with_the_layer_that_was_in_work() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let written = three(&layout);
    let healthy = Arc::new(AtomicBool::new(false));
    // Which layer comes first is not promised: whichever it is comes whole.
    let first_asked = Arc::new(OnceLock::new());
    let digests: Vec<Digest> = written.iter().map(|(digest, _)| *digest).collect();
    let (known, asked_first, well) = (digests.clone(), first_asked.clone(), healthy.clone());
    let server = Server::start(move |seen, _| {
        let layer = known.iter().find(|digest| seen.path.ends_with(&digest.to_string()));
        match layer.is_some_and(|layer| asked_first.get_or_init(|| *layer) != layer) && !well.load(Ordering::SeqCst) {
            // Half of the next one, then nothing but errors: the command waits and tries again.
            true if seen.range().is_none_or(|range| range.0 == 0) => answer(seen, &layout).cut_after(100_000),
            true => Reply::status(503),
            false => answer(seen, &layout),
        }
    })
    .await;
    let reference = format!("{}/x:latest", server.host());
    let (out, cache) = (dir.path().join("x.clip"), dir.path().join("cache"));
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clip-csi"));
        command.args(["-q", "index", &reference, "--concurrency", "1", "--cache-dir"]).arg(&cache).arg("-o").arg(&out);
        command.stdout(Stdio::null());
        command
    };
    let mut first = Running(command().spawn().unwrap());
    let layers = cache.join("layers");
    // Whole, that is: it is written under another name, which begins with a dot.
    let whole = |file: &std::fs::DirEntry| !file.file_name().as_encoded_bytes().starts_with(b".");
    let kept = || std::fs::read_dir(&layers).is_ok_and(|files| files.flatten().any(|file| whole(&file)));
    let under_way = async {
        let others = || digests.iter().filter(|digest| first_asked.get() != Some(*digest));
        server.until(|_| others().map(|digest| gets(&server, digest).len()).sum::<usize>() >= 2).await;
        // What was kept comes from a thread of its own: its directory may still be missing.
        common::appear::appears(&layers).await;
        common::appear::changes_of(&layers, kept).await;
    };
    let in_time = tokio::time::timeout(Duration::from_secs(120), under_way).await;
    in_time.expect("another layer is asked for, and the first one kept");
    assert!(first.0.try_wait().unwrap().is_none(), "it ended by itself");
    drop(first);
    assert!(!out.exists());
    healthy.store(true, Ordering::SeqCst);
    let before = server.seen().len();
    assert!(tokio::task::block_in_place(|| command().status().unwrap()).success());
    let later = server.seen().split_off(before);
    for digest in &digests {
        let asked = later.iter().filter(|seen| seen.path.ends_with(&digest.to_string())).count();
        assert_eq!(
            asked,
            usize::from(first_asked.get() != Some(digest)),
            "{digest}: the first layer is not fetched again"
        );
    }
}

/// Names without content: small as a layer, large in memory.
fn names(seed: u64, count: usize) -> Layer {
    (0..count).fold(Layer::new(Compression::Gzip), |layer, n| layer.file(&format!("{seed}-{n}"), b""))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_names_of_an_image_take_is_bounded_over_all_its_layers() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, out) = (dir.path().join("layout"), dir.path().join("out.clip"));
    // 500 names take some 100 kB.
    layers::write_layout(&layout, vec![names(1, 500), names(2, 500)]);
    let image = clip_csi::source::ImageRef::Layout { dir: layout, tag: Some("latest".into()) };
    let sources = common::sources(true, Default::default());
    let mut image = sources.resolve(&image, &Platform::host(), &Credentials::default()).await.unwrap();
    let within = |limit, kept: Option<&Path>| BuildOptions {
        indexing: Arc::new(Indexing::new(2, kept.map(|dir| Artifacts::new(dir.to_owned(), 1 << 30)), limit)),
        ..BuildOptions::default()
    };
    let kept = dir.path().join("layers");
    let options = within(300_000, Some(&kept));
    for round in ["streamed", "kept"] {
        index_image(&image, &out, &options, &Silent).await.expect(round);
        let error = index_image(&image, &out, &within(150_000, Some(&kept)), &Silent).await.unwrap_err().to_string();
        assert!(error.contains("its names and attributes take over") && error.contains("clip-csi index"), "{error}");
    }
    // The same layer again and again is as many names, hidden though they are.
    let (config, layer) =
        (serde_json::from_slice::<serde_json::Value>(&image.config).unwrap(), image.layers[0].clone());
    let diff_ids = vec![config["rootfs"]["diff_ids"][0].clone(); 5];
    image.layers = vec![layer; 5];
    image.config = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string().into();
    let error = index_image(&image, &out, &options, &Silent).await.unwrap_err().to_string();
    assert!(error.contains("its names and attributes take over"), "{error}");
}
