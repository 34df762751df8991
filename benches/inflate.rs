//! What random access costs: index build against plain inflate + SHA-256, span inflate against plain inflate.
//!
//! `cargo bench --bench inflate [-- FILE.gz]`. Without a file it compresses up to 192 MB of this machine's /usr.
//! Rounds are interleaved and medians printed, so that a busy machine skews the ratios little.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clip_csi::archive::{BlobTable, SpanIx};
use clip_csi::inflate::{Indexer, compressed_range, inflate_span, inflate_spans};
use clip_csi::units::Compression;
use rustix::time::ClockId;
use sha2::{Digest, Sha256};

const SAMPLE: usize = 192 << 20;
const ROUNDS: usize = 5;
const SPAN: u64 = 1 << 20;

fn main() {
    let file = std::env::args().skip(1).find(|a| !a.starts_with('-')).map(PathBuf::from);
    let blob = match &file {
        Some(path) => std::fs::read(path).expect("the file"),
        None => sample(),
    };
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(&blob[..]).read_to_end(&mut plain).expect("a gzip file");
    let mb = plain.len() as f64 / 1e6;
    println!("{:.0} MB gzip, {mb:.0} MB inside, {} CPUs", blob.len() as f64 / 1e6, cpus());

    let mut times: [Vec<f64>; 7] = Default::default();
    let mut table = None;
    for _ in 0..ROUNDS {
        let mut add = |i: usize, seconds: f64| times[i].push(seconds);
        add(0, timed(|| inflate(&blob, |_| ())));
        // The baseline: inflate and hash on one core, the blob and what is in it.
        add(
            1,
            timed(|| {
                let mut hash = Sha256::new();
                inflate(&blob, |b| hash.update(b));
                std::hint::black_box(hash.finalize());
            }),
        );
        add(
            2,
            timed(|| {
                let (mut hash, mut stored) = (Sha256::new(), Sha256::new());
                stored.update(&blob);
                inflate(&blob, |b| hash.update(b));
                std::hint::black_box((hash.finalize(), stored.finalize()));
            }),
        );
        add(3, timed(|| table = Some(index(&blob))));
        let table = table.as_ref().expect("just made");
        add(
            4,
            timed(|| {
                for ix in 0..table.spans.len() as u32 {
                    let range = compressed_range(table, ix..ix + 1).expect("a span");
                    let bytes = inflate_span(table, SpanIx(ix), &blob[range.start as usize..range.end as usize]);
                    std::hint::black_box(bytes.expect("a span"));
                }
            }),
        );
        add(
            5,
            timed(|| {
                let n = table.spans.len() as u32;
                let range = compressed_range(table, 0..n).expect("spans");
                let part = &blob[range.start as usize..range.end as usize];
                inflate_spans(table, 0..n, part, &mut |_, b| drop(std::hint::black_box(b))).expect("spans");
            }),
        );
        add(
            6,
            timed(|| {
                std::hint::black_box(Sha256::digest(&plain));
            }),
        );
    }
    let m = times.map(median);
    let names = [
        "plain inflate",
        "plain inflate + SHA-256 of the content",
        "plain inflate + SHA-256 of both sides",
        "index build",
        "each span alone, verified",
        "all spans in one go, verified",
        "SHA-256 alone",
    ];
    for (name, seconds) in names.iter().zip(m) {
        println!("{name:40} {:7.0} MB/s", mb / seconds);
    }
    let table = table.expect("made");
    let plain_cpu = median((0..ROUNDS).map(|_| cpu(|| hashed(&blob)).0).collect());
    let (own, all): (Vec<f64>, Vec<f64>) = (0..ROUNDS).map(|_| cpu(|| drop(index(&blob)))).unzip();
    let (own, all) = (median(own), median(all));
    // The hashes run beside inflate: with a second core the slower of the two counts.
    println!("the same in CPU time: two cores              {:.2}", plain_cpu / own.max(all - own));
    println!("                      one core               {:.2}", plain_cpu / all);
    println!("index build / (plain inflate + SHA-256)      {:.2}  (aim 0.8)", m[1] / m[3]);
    println!("index build / (plain inflate + both SHA-256) {:.2}", m[2] / m[3]);
    let windows = table.spans.iter().filter(|s| s.window.1 > 0).count().max(1);
    println!(
        "{} spans; windows: {} bytes each, {} bytes per MiB of content, {:.4} % of the blob",
        table.spans.len(),
        table.windows.len() / windows,
        (table.windows.len() as f64 / (plain.len() as f64 / 1048576.0)) as u64,
        table.windows.len() as f64 * 100.0 / blob.len() as f64,
    );
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Seconds of CPU that the calling thread, and all threads, spend on the work: what a machine with two idle cores,
/// and what one with a single core takes, however busy this one is.
fn cpu(work: impl FnOnce()) -> (f64, f64) {
    let now = |clock| {
        let time = rustix::time::clock_gettime(clock);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let start = (now(ClockId::ThreadCPUTime), now(ClockId::ProcessCPUTime));
    work();
    (now(ClockId::ThreadCPUTime) - start.0, now(ClockId::ProcessCPUTime) - start.1)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The same zlib, without an index.
fn inflate(blob: &[u8], mut sink: impl FnMut(&[u8])) {
    let mut decoder = flate2::bufread::MultiGzDecoder::new(blob);
    let mut buffer = vec![0; 256 << 10];
    loop {
        match decoder.read(&mut buffer).expect("a gzip file") {
            0 => return,
            n => sink(&buffer[..n]),
        }
    }
}

fn hashed(blob: &[u8]) {
    let mut hash = Sha256::new();
    inflate(blob, |b| hash.update(b));
    std::hint::black_box(hash.finalize());
}

fn index(blob: &[u8]) -> BlobTable {
    let mut look = |bytes: &[u8]| {
        std::hint::black_box(bytes);
    };
    let mut indexer = Indexer::new(Compression::Gzip, SPAN);
    for piece in blob.chunks(64 << 10) {
        indexer.push(piece, &mut look).expect("a gzip file");
    }
    indexer.finish(&mut look).expect("a whole gzip file")
}

/// Files of this machine as one gzip member, as a layer would hold them.
fn sample() -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    let mut left = SAMPLE;
    for root in ["/usr/lib/python3", "/usr/include", "/usr/bin", "/usr/share", "/usr/lib"] {
        add(Path::new(root), &mut left, &mut encoder);
    }
    encoder.finish().expect("memory")
}

fn add(dir: &Path, left: &mut usize, out: &mut impl Write) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut paths: Vec<_> = entries.flatten().collect();
    paths.sort_by_key(std::fs::DirEntry::file_name);
    for entry in paths {
        let Ok(kind) = entry.file_type() else { continue };
        if *left == 0 {
            return;
        } else if kind.is_dir() {
            add(&entry.path(), left, out);
        } else if kind.is_file()
            && let Ok(bytes) = std::fs::read(entry.path())
        {
            let bytes = &bytes[..bytes.len().min(*left)];
            *left -= bytes.len();
            out.write_all(bytes).expect("memory");
        }
    }
}
