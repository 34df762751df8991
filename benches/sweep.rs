//! Which span size? A real image (Debian's python3, PyPI's numpy) behind a shaped link, read by a real program.
//!
//! `make bench-sweep`, or `cargo bench --bench sweep -- [LAYERS-DIR]`: the directory holds the layers as `*.tar.gz`, in their
//! order; `benches/sweep-image.sh` makes it where it is missing. Needs root, /dev/fuse and docker-registry.
//! For each span size: archive and seek table, the time to the first file, and `import numpy` in a chroot, all with an empty cache.
//! *Over-fetch*: bytes over the link for each that was read, compressed as the whole image is.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "common/image.rs"]
mod image;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clip_csi::build::DEFAULT_SPAN_KIB;
use common::node::Node;
use common::registry::Registry;
use common::skip;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

const SPANS_KIB: [u64; 6] = [256, 512, 1024, 2048, DEFAULT_SPAN_KIB, 4096];
/// Rounds over all sizes; medians are told.
const ROUNDS: usize = 3;
const ROUND_TRIP: Duration = Duration::from_millis(30);
/// Bits a second from the registry to the node.
const BANDWIDTH: u64 = 200_000_000;
/// A file of some 20 KB in the middle of the largest layer.
const FIRST_FILE: &str = "usr/lib/python3.11/heapq.py";
const IMAGE: (&str, &str) = ("bench/numpy", "v1");

#[tokio::main]
async fn main() {
    // `cargo test --benches` builds this, and runs it with `--test`.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    if skip::lacks_fuse("bench sweep") || skip::lacks("bench sweep", &["docker-registry", "chroot"]) {
        return;
    }
    let layers = image::layers();
    image::make(&layers);
    let dir = tempfile::tempdir().unwrap();
    let (compressed, uncompressed) = image::layout(&layers, &dir.path().join("layout"));
    let registry = Registry::start();
    registry.push_layout(&dir.path().join("layout"), IMAGE.0, IMAGE.1).await;
    let link = Link::start(registry.host()).await;
    println!(
        "{:.0} MB in layers, {:.0} MB unpacked; {} ms, {} Mb/s; medians of {ROUNDS} rounds, each with an empty cache",
        mb(compressed),
        mb(uncompressed),
        ROUND_TRIP.as_millis(),
        BANDWIDTH / 1_000_000,
    );
    println!(
        "| span MiB | seek table | archive | first file | its requests | its MB | import numpy | requests | MB | over-fetch |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let archives: Vec<_> = SPANS_KIB.iter().map(|kib| archive(dir.path(), &registry, &link, *kib)).collect();
    let mut found: Vec<[Vec<Run>; 2]> = archives.iter().map(|_| [vec![], vec![]]).collect();
    for _ in 0..ROUNDS {
        for (archive, found) in archives.iter().zip(&mut found) {
            let first = |root: &Path| {
                std::fs::File::open(root.join(FIRST_FILE)).unwrap().read_exact(&mut [0; 17_000]).unwrap();
            };
            found[0].push(run(archive, &link, &first).await);
            let import = |root: &Path| {
                let python = ["/usr/bin/python3", "-B", "-c", "import numpy"];
                assert!(Command::new("chroot").arg(root).args(python).status().unwrap().success());
            };
            found[1].push(run(archive, &link, &import).await);
        }
    }
    for (archive, [first, import]) in archives.iter().zip(found) {
        let (first, import) = (median(first), median(import));
        println!(
            "| {} | {:.3} % | {:.2} % | {:.2} s | {} | {:.1} | {:.2} s | {} | {:.1} | {:.2} |",
            archive.kib as f64 / 1024.0,
            archive.seek_table as f64 * 100.0 / uncompressed as f64,
            archive.bytes as f64 * 100.0 / uncompressed as f64,
            first.time.as_secs_f64(),
            first.requests,
            mb(first.bytes),
            import.time.as_secs_f64(),
            import.requests,
            mb(import.bytes),
            import.bytes as f64 / (import.read * compressed as f64 / uncompressed as f64),
        );
    }
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// One archive of the image, whose layers are said to lie behind the link.
struct Archive {
    kib: u64,
    path: PathBuf,
    bytes: u64,
    seek_table: u64,
}

fn archive(dir: &Path, registry: &Registry, link: &Link, kib: u64) -> Archive {
    let path = dir.join(format!("{kib}.clip"));
    let behind = format!("{}/{}:{}", link.host, IMAGE.0, IMAGE.1);
    let status = Command::new(env!("CARGO_BIN_EXE_clip-csi"))
        .args(["-q", "index", "--no-cache", "--span-kib", &kib.to_string(), "--store-as", &behind, "-o"])
        .arg(&path)
        .arg(registry.image(IMAGE.0, IMAGE.1))
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let json = Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(["inspect", "--json"]).arg(&path).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let seek_table = json["extension"]["seekTableBytes"].as_u64().unwrap();
    let bytes = std::fs::metadata(&path).unwrap().len();
    Archive { kib, path, bytes, seek_table }
}

/// What one reading program took.
struct Run {
    time: Duration,
    requests: u64,
    bytes: u64,
    /// Bytes that the kernel asked for, read-ahead included.
    read: f64,
}

fn median(mut runs: Vec<Run>) -> Run {
    runs.sort_by_key(|run| run.time);
    runs.swap_remove(runs.len() / 2)
}

/// Publishes with an empty cache and runs `read`.
async fn run(archive: &Archive, link: &Link, read: &dyn Fn(&Path)) -> Run {
    let node = Node::start(json!({
        "sources": {"archiveRoots": [archive.path.parent()], "registries": {&link.host: {"plainHttp": true}}},
    }))
    .await;
    let root = node.publish("sweep", &[("archive", archive.path.to_str().unwrap())]).await.unwrap();
    link.take();
    let begin = Instant::now();
    read(&root);
    let time = begin.elapsed();
    let (requests, bytes) = link.take();
    let read = node.metric("clip_read_bytes_total").await;
    node.unpublish("sweep").await.unwrap();
    Run { time, requests, bytes, read }
}

/// A TCP proxy with a delay, and a bandwidth that all connections share.
struct Link {
    host: String,
    /// Blobs asked for, and bytes back.
    counted: Arc<[AtomicU64; 2]>,
}

impl Link {
    async fn start(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let counted: Arc<[AtomicU64; 2]> = Arc::default();
        // When the line is free again.
        let line = Arc::new(Mutex::new(Instant::now()));
        let (to, counts) = (to.to_owned(), counted.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (to, counts, line) = (to.clone(), counts.clone(), line.clone());
                tokio::spawn(async move {
                    // The handshake takes a round trip before anything can be said.
                    tokio::time::sleep(ROUND_TRIP).await;
                    let Ok(server) = TcpStream::connect(to).await else { return };
                    let _ = (client.set_nodelay(true), server.set_nodelay(true));
                    let ((client_in, client_out), (server_in, server_out)) = (client.into_split(), server.into_split());
                    let asked = counts.clone();
                    let up = carry(client_in, server_out, move |bytes| {
                        // A request is small: it comes in one piece.
                        let blob = bytes.starts_with(b"GET ") && bytes.windows(7).any(|part| part == b"/blobs/");
                        asked[0].fetch_add(blob.into(), SeqCst);
                        Instant::now()
                    });
                    let down = carry(server_in, client_out, move |bytes| {
                        counts[1].fetch_add(bytes.len() as u64, SeqCst);
                        let mut free = line.lock().unwrap();
                        let takes = Duration::from_nanos(bytes.len() as u64 * 8 * 1_000_000_000 / BANDWIDTH);
                        *free = (*free).max(Instant::now()) + takes;
                        *free
                    });
                    tokio::join!(up, down);
                });
            }
        });
        Self { host, counted }
    }

    /// Blobs asked for and bytes that came back since the last call.
    fn take(&self) -> (u64, u64) {
        let [requests, bytes] = &*self.counted;
        (requests.swap(0, SeqCst), bytes.swap(0, SeqCst))
    }
}

/// Carries bytes one way; `leaves` says when a piece has left for its half of the round trip.
async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    leaves: impl Fn(&[u8]) -> Instant + Send + 'static,
) {
    // As much as the line holds while it is underway, several times over: TCP's windows are no limit here.
    let (send, mut receive) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    let reader = async move {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            let arrives = leaves(&buffer[..n]) + ROUND_TRIP / 2;
            if send.send((arrives, buffer[..n].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let writer = async move {
        while let Some((arrives, bytes)) = receive.recv().await {
            tokio::time::sleep_until(arrives).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reader, writer);
}
