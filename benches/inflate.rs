//! What random access costs: index build against plain inflate + SHA-256, span inflate against plain inflate.
//!
//! `cargo bench --bench inflate [-- FILE.gz]`. Without a file it compresses up to 192 MB of this machine's /usr.
//! Rounds are interleaved and medians printed, in CPU time too, so that a busy machine skews the ratios little.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clip_csi::archive::{BlobTable, SeekTable, SpanIx};
use clip_csi::build::DEFAULT_SPAN_KIB;
use clip_csi::build::tar::Walker;
use clip_csi::inflate::{Indexer, compressed_range, inflate_span, inflate_spans};
use clip_csi::units::Compression;
use rustix::time::ClockId;
use sha2::{Digest, Sha256};

const SAMPLE: usize = 192 << 20;
const ROUNDS: usize = 5;
const SPAN: u64 = DEFAULT_SPAN_KIB << 10;

fn main() {
    let file = std::env::args().skip(1).find(|a| !a.starts_with('-')).map(PathBuf::from);
    let blob = match &file {
        Some(path) => std::fs::read(path).expect("the file"),
        None => sample(),
    };
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(&blob[..]).read_to_end(&mut plain).expect("a gzip file");
    let mib = plain.len() as f64 / 1048576.0;
    println!("{:.0} MB gzip, {:.0} MB inside, {} CPUs", blob.len() as f64 / 1e6, plain.len() as f64 / 1e6, cpus());

    let table = index(&blob, SPAN);
    let work: [(&str, &dyn Fn()); 9] = [
        ("inflate", &|| inflate(&blob, |_| ())),
        ("SHA-256 of the content", &|| _ = std::hint::black_box(Sha256::digest(&plain))),
        ("SHA-256 of the blob", &|| _ = std::hint::black_box(Sha256::digest(&blob))),
        ("tar walk", &|| walk(&plain)),
        ("limit: inflate + both SHA-256", &|| limit(&blob)),
        ("index build", &|| drop(std::hint::black_box(index(&blob, SPAN)))),
        ("index build without windows", &|| drop(std::hint::black_box(index(&blob, u64::MAX)))),
        ("each span alone, verified", &|| each_span(&table, &blob)),
        ("all spans in one go, verified", &|| all_spans(&table, &blob)),
    ];
    let mut wall: [Vec<f64>; 9] = Default::default();
    let mut used: [Vec<f64>; 9] = Default::default();
    for _ in 0..ROUNDS {
        for (i, (_, work)) in work.iter().enumerate() {
            let start = Instant::now();
            used[i].push(cpu(work));
            wall[i].push(start.elapsed().as_secs_f64());
        }
    }
    let (mut limits, mut builds) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        limits.push(on_every_cpu(&|| limit(&blob)));
        builds.push(on_every_cpu(&|| drop(std::hint::black_box(index(&blob, SPAN)))));
    }
    let (wall, used) = (wall.map(median), used.map(median));
    println!("{:40} {:>12} {:>12}", "", "CPU ns/KiB", "wall MiB/s");
    for (i, (name, _)) in work.iter().enumerate() {
        println!("{name:40} {:12.0} {:12.0}", used[i] * 1e9 / 1024.0 / mib, mib / wall[i]);
    }
    println!("index build / limit, in CPU time             {:.2}  (aim 0.8)", used[4] / used[5]);
    println!("index build / limit, by the clock            {:.2}  (with a second core: above 1)", wall[4] / wall[5]);
    println!("the same, one of them on every core at once  {:.2}  (aim 0.8)", median(limits) / median(builds));
    let windows = table.spans.iter().filter(|s| s.window.1 > 0).count().max(1);
    let bytes = SeekTable { blobs: vec![table.clone()] }.encode().len();
    println!(
        "{} spans, {windows} windows of {} bytes each; seek table {:.4} % of the content",
        table.spans.len(),
        table.windows.len() / windows,
        bytes as f64 * 100.0 / plain.len() as f64,
    );
}

/// What the machine can do on one core: the same zlib, and one SHA-256 over each side.
fn limit(blob: &[u8]) {
    let (mut hash, mut stored) = (Sha256::new(), Sha256::new());
    for piece in blob.chunks(64 << 10) {
        stored.update(piece);
    }
    inflate(blob, |b| hash.update(b));
    std::hint::black_box((hash.finalize(), stored.finalize()));
}

fn walk(plain: &[u8]) {
    let mut walker = Walker::new();
    for piece in plain.chunks(256 << 10) {
        // A sample that is no tar fails at its first header: then there is nothing to measure.
        if walker.push(piece, &mut |entry| drop(std::hint::black_box(entry))).is_err() {
            return;
        }
    }
}

fn each_span(table: &BlobTable, blob: &[u8]) {
    for ix in 0..table.spans.len() as u32 {
        let range = compressed_range(table, ix..ix + 1).expect("a span");
        let bytes = inflate_span(table, SpanIx(ix), &blob[range.start as usize..range.end as usize]);
        std::hint::black_box(bytes.expect("a span"));
    }
}

fn all_spans(table: &BlobTable, blob: &[u8]) {
    let n = table.spans.len() as u32;
    let range = compressed_range(table, 0..n).expect("spans");
    let part = &blob[range.start as usize..range.end as usize];
    inflate_spans(table, 0..n, part, &mut |_, b| drop(std::hint::black_box(b))).expect("spans");
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Seconds of CPU that all threads spend on the work: says the same on a busy machine as on an idle one, nearly.
fn cpu(work: impl FnOnce()) -> f64 {
    let now = || {
        let time = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let start = now();
    work();
    now() - start
}

/// Seconds until as many of it as there are CPUs, begun together, are done.
fn on_every_cpu(work: &(dyn Fn() + Sync)) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..cpus() {
            scope.spawn(work);
        }
    });
    start.elapsed().as_secs_f64()
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

fn index(blob: &[u8], span: u64) -> BlobTable {
    let mut walker = Some(Walker::new());
    let mut look = |bytes: &[u8]| {
        // As in a build, where the walk runs on the inflating thread.
        if walker.as_mut().is_some_and(|walker| walker.push(bytes, &mut |e| drop(std::hint::black_box(e))).is_err()) {
            walker = None;
        }
    };
    let mut indexer = Indexer::new(Compression::Gzip, span);
    for piece in blob.chunks(64 << 10) {
        indexer.push(piece, &mut look).expect("a gzip file");
    }
    indexer.finish(&mut look).expect("a whole gzip file")
}

/// Files of this machine as one gzip member, as a layer would hold them.
fn sample() -> Vec<u8> {
    let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    let mut layer = tar::Builder::new(encoder);
    let mut left = SAMPLE;
    for root in ["/usr/lib/python3", "/usr/include", "/usr/bin", "/usr/share", "/usr/lib"] {
        add(Path::new(root), &mut left, &mut layer);
    }
    layer.into_inner().and_then(|encoder| encoder.finish()).expect("memory")
}

fn add(dir: &Path, left: &mut usize, out: &mut tar::Builder<impl Write>) {
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
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            let path = entry.path();
            // A name that the old format has no room for would only lengthen the sample's headers.
            drop(out.append_data(&mut header, path.strip_prefix("/").unwrap_or(&path), bytes));
        }
    }
}
