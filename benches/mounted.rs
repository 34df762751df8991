//! The product as its users meet it, as ratios against a baseline in the same run: a published image beside the same
//! tree on disk, an index build and a mount beside the Go reference (where Go is installed).
//!
//! `cargo bench --bench mounted [-- LAYERS-DIR]`; needs root, /dev/fuse and docker-registry. With the layers of the real image
//! that `make bench-sweep` makes, that is indexed too.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "common/image.rs"]
mod real;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clip_csi::units::Compression;
use common::layers::{self, Layer};
use common::node::{Node, unmount_below};
use common::registry::Registry;
use common::skip;
use serde_json::json;

/// Interleaved rounds of each pair; medians are told.
const ROUNDS: usize = 11;
const SMALL_FILES: usize = 5_000;
/// One file in so many is a large one.
const LARGE: usize = 8;
const ABSENT_LOOKUPS: usize = 100_000;

#[tokio::main]
async fn main() {
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    if skip::lacks_fuse("bench mounted") || skip::lacks("bench mounted", &["docker-registry"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let image = Image::new(&dir.path().join("30k"), 30_000, usual_size, &registry, "bench/30k").await;
    println!(
        "image of 30,000 files ({} MB) in 1,000 directories; medians of {ROUNDS} interleaved rounds",
        (0..30_000).map(usual_size).sum::<usize>() / 1_000_000
    );
    against_disk(&image, &registry).await;
    println!();
    let reference = reference(dir.path());
    index_build("index of that image from a registry", &image.reference, reference.as_deref(), dir.path());
    let layers = real::layers();
    if real::files(&layers).is_empty() {
        println!("SKIPPED: index of a real image: `make bench-sweep` makes its layers");
    } else {
        let (compressed, uncompressed) = real::layout(&layers, &dir.path().join("real"));
        registry.push_layout(&dir.path().join("real"), "bench/real", "v1").await;
        let name = format!("index of {} MB, {} unpacked", compressed / 1_000_000, uncompressed / 1_000_000);
        index_build(&name, &registry.image("bench/real", "v1"), reference.as_deref(), dir.path());
    }
    let tiny = Image::new(&dir.path().join("tiny"), 30_000, small_size, &registry, "bench/tiny").await;
    index_build("index of 30,000 small files only", &tiny.reference, reference.as_deref(), dir.path());
    drop(tiny);
    let large = Image::new(&dir.path().join("100k"), 100_000, small_size, &registry, "bench/100k").await;
    memory(&large, reference.as_deref(), &registry, dir.path()).await;
}

/// One generated tree: on disk, as a layout, in the registry, as a v2 archive.
struct Image {
    on_disk: PathBuf,
    archive: PathBuf,
    reference: String,
    dirs: usize,
    files: usize,
}

impl Image {
    /// `size`: bytes of a file by its number.
    async fn new(
        dir: &Path,
        files: usize,
        size: impl Fn(usize) -> usize,
        registry: &Registry,
        repository: &str,
    ) -> Self {
        let (on_disk, archive) = (dir.join("disk"), dir.join("image.clip"));
        let dirs = files / 30;
        let mut layer = Layer::new(Compression::Gzip);
        for d in 0..dirs {
            std::fs::create_dir_all(on_disk.join(dir_name(d))).unwrap();
            layer = layer.dir(&dir_name(d), 0o755);
        }
        for f in 0..files {
            let bytes = layers::text_like(f as u64 + 1, size(f));
            let path = file_name(f, dirs);
            std::fs::write(on_disk.join(&path), &bytes).unwrap();
            layer = layer.file(&path, &bytes);
        }
        layers::write_layout(&dir.join("layout"), vec![layer]);
        registry.push_layout(&dir.join("layout"), repository, "v1").await;
        let reference = registry.image(repository, "v1");
        run(Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(["-q", "index", &reference, "-o"]).arg(&archive));
        Self { on_disk, archive, reference, dirs, files }
    }
}

/// 4 KB on average.
fn small_size(f: usize) -> usize {
    200 + f * 7919 % 8000
}

/// 16 KB on average, as files of images have: one in [`LARGE`] has 100 KB.
fn usual_size(f: usize) -> usize {
    if f.is_multiple_of(LARGE) { 100_000 } else { small_size(f) }
}

fn dir_name(d: usize) -> String {
    format!("d{}/d{}", d % 20, d / 20)
}

fn file_name(f: usize, dirs: usize) -> String {
    format!("{}/file-{f}.txt", dir_name(f % dirs))
}

async fn against_disk(image: &Image, registry: &Registry) {
    let root = image.archive.parent().unwrap();
    let node = Node::start(json!({
        "telemetry": {"logLevel": "warn"},
        "sources": {"archiveRoots": [root], "registries": {registry.host(): {"plainHttp": true}}},
    }))
    .await;
    let archive = image.archive.to_str().unwrap();
    let mut publishes = vec![];
    for round in 0..ROUNDS {
        let name = format!("p{round}");
        let begin = Instant::now();
        node.publish(&name, &[("archive", archive)]).await.unwrap();
        publishes.push(begin.elapsed());
        node.unpublish(&name).await.unwrap();
    }
    println!(
        "publish of the indexed image            {:7.1} ms (first {:.1} ms)",
        ms(median(&publishes)),
        ms(publishes[0])
    );

    let mounted = node.publish("bench", &[("archive", archive)]).await.unwrap();
    let disk = &image.on_disk;
    compare("warm find", "disk", || find(&mounted), || find(disk));
    let files: Vec<String> = (0..image.files)
        .filter(|f| !f.is_multiple_of(LARGE))
        .step_by(5)
        .take(SMALL_FILES)
        .map(|f| file_name(f, image.dirs))
        .collect();
    compare("warm open + read of 5,000 small files", "disk", || read(&mounted, &files), || read(disk, &files));
    let absent: Vec<String> =
        (0..ABSENT_LOOKUPS).map(|i| format!("{}/absent-{}", dir_name(i % 100), i / 1000)).collect();
    compare("warm 100,000 lookups of absent names", "disk", || miss(&mounted, &absent), || miss(disk, &absent));
    node.unpublish("bench").await.unwrap();
}

fn find(root: &Path) {
    // A test of the time makes find stat every name.
    run(Command::new("find").arg(root).args(["-newermt", "2100-01-01"]));
}

fn read(root: &Path, files: &[String]) {
    for file in files {
        std::hint::black_box(std::fs::read(root.join(file)).unwrap());
    }
}

fn miss(root: &Path, names: &[String]) {
    for name in names {
        assert!(std::fs::symlink_metadata(root.join(name)).is_err());
    }
}

/// The Go reference, built; `None` where there is no Go.
fn reference(dir: &Path) -> Option<PathBuf> {
    let binary = dir.join("reference");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
    let built = Command::new("go").args(["build", "-o"]).arg(&binary).arg(".").current_dir(source).status();
    match built {
        Ok(status) if status.success() => Some(binary),
        _ => {
            println!("SKIPPED: comparison with the Go reference: no Go toolchain, or its modules can't be had");
            None
        }
    }
}

fn index_build(name: &str, image: &str, reference: Option<&Path>, dir: &Path) {
    let out = dir.join("out.clip");
    let ours =
        || run(Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(["-q", "index", "--no-cache", image, "-o"]).arg(&out));
    match reference {
        Some(reference) => {
            let theirs = || run(Command::new(reference).args(["index", image]).arg(dir.join("go.clip")));
            compare(name, "Go", ours, theirs);
            let cpu = |work: &dyn Fn()| {
                let before = cpu_of_children();
                (0..3).for_each(|_| work());
                cpu_of_children() - before
            };
            println!("{:39} in CPU time: ratio {:.2}", "", cpu(&ours) / cpu(&theirs));
        }
        None => println!("{name:39} {:7.1} ms", ms(timed(ours))),
    }
}

/// Seconds of CPU that the processes took which this one has waited for.
fn cpu_of_children() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // Behind the name, which may hold anything, field 3 comes first; wanted are 16 and 17, in ticks of 10 ms.
    let fields = stat.rsplit(')').next().unwrap().split_whitespace().skip(13);
    fields.take(2).map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
}

async fn memory(image: &Image, reference: Option<&Path>, registry: &Registry, dir: &Path) {
    let node = Node::start(json!({
        "telemetry": {"logLevel": "warn"},
        "sources": {"archiveRoots": [image.archive.parent()], "registries": {registry.host(): {"plainHttp": true}}},
    }))
    .await;
    let idle = resident(node.pid());
    let target = node.publish("m", &[("archive", image.archive.to_str().unwrap())]).await.unwrap();
    let published = resident(node.pid());
    find(&target);
    println!(
        "resident memory of the node plugin, 100,000 files: {:.1} MB (idle {:.1}, published {:.1}; after a find)",
        resident(node.pid()),
        idle,
        published,
    );
    let Some(reference) = reference else { return };
    let (mountpoint, cache) = (dir.join("go-mount"), dir.join("go-cache"));
    let archive = dir.join("go-100k.clip");
    run(Command::new(reference).args(["index", &image.reference]).arg(&archive));
    let mut child = Command::new(reference)
        .arg("mount")
        .args([&archive, &mountpoint, &cache])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if line.trim() == "ready" {
        let mounted = resident(child.id());
        // Listing one directory there scans every path below it: the root alone is asked for.
        std::fs::read_dir(&mountpoint).map(|entries| entries.count()).ok();
        println!(
            "resident memory of the Go reference's mount:       {:.1} MB (mounted {mounted:.1})",
            resident(child.id())
        );
    } else {
        println!("the Go reference could not mount its own archive of the image");
    }
    drop(child.stdin.take());
    let _ = child.kill();
    let _ = child.wait();
    unmount_below(&mountpoint);
}

/// VmRSS in MB.
fn resident(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1000.0
}

/// Runs both once unmeasured, then in turn.
fn compare(what: &str, baseline: &str, ours: impl Fn(), theirs: impl Fn()) {
    ours();
    theirs();
    let (mut a, mut b, mut ratios) = (vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let (x, y) = (timed(&ours), timed(&theirs));
        ratios.push(x.as_secs_f64() / y.as_secs_f64());
        a.push(x);
        b.push(y);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "{what:39} {:7.1} ms  {baseline} {:7.1} ms  ratio {:.2} ({:.2}..{:.2})",
        ms(median(&a)),
        ms(median(&b)),
        ratios[ratios.len() / 2],
        ratios[0],
        ratios[ratios.len() - 1],
    );
}

fn timed(work: impl Fn()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    sorted[sorted.len() / 2]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn run(command: &mut Command) {
    // What commands sum up at their end is no result of this one.
    let status = command.stdout(Stdio::null()).stderr(Stdio::inherit()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
