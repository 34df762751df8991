//! What a hit costs: `try_read` against a bare pread of the same file, and a fill against fetching the bytes.
//!
//! `cargo bench --bench cache`. Rounds are interleaved, medians printed.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use clip_csi::archive::SpanIx;
use clip_csi::cache::{Cache, CacheConfig, CacheError, CacheKey, Filled, SpanFiller};
use clip_csi::units::Digest;

const SPAN: u64 = 1 << 20;
const SPANS: u64 = 64;
const ROUNDS: usize = 7;

/// Spans of one byte value each, out of memory.
#[derive(Debug)]
struct Filler;

#[async_trait]
impl SpanFiller for Filler {
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
        Ok(spans.map(|ix| Filled { bytes: vec![ix as u8 | 1; SPAN as usize].into(), verified: true }).collect())
    }
    fn cost(&self, _: SpanIx) -> u64 {
        SPAN
    }
    fn describe(&self) -> String {
        "memory".into()
    }
}

fn main() {
    let dir = tempfile::tempdir().expect("a directory");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let config = CacheConfig { dir: dir.path().join("cache"), ..CacheConfig::default() };
    let cache = Cache::open(&config).expect("a cache");
    let bounds: Arc<[u64]> = (0..=SPANS).map(|i| i * SPAN).collect();
    let blob = cache.blob(CacheKey(Digest::of(b"bench")), bounds, Arc::new(Filler)).expect("a blob");
    let start = Instant::now();
    runtime.block_on(async {
        blob.prefetch(0..SPANS * SPAN).await.expect("a fill");
        cache.flush().await;
    });
    println!("fill and flush {:.0} MB/s", (SPANS * SPAN) as f64 / 1e6 / start.elapsed().as_secs_f64());

    let plain = dir.path().join("plain");
    let mut file = File::create(&plain).expect("a file");
    (0..SPANS).for_each(|i| file.write_all(&vec![i as u8 | 1; SPAN as usize]).expect("space"));
    file.sync_all().expect("a disk");
    let file = File::open(&plain).expect("the file");

    for size in [4 << 10, 64 << 10, 128 << 10, 1 << 20] {
        let mut buf = vec![0; size];
        let count = (SPANS * SPAN) as usize / size;
        let offset = |i: usize| (i * 7919 % count * size) as u64;
        let mut times = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            let start = Instant::now();
            (0..count).for_each(|i| file.read_exact_at(&mut buf, offset(i)).expect("a read"));
            times[0].push(start.elapsed().as_secs_f64() * 1e9 / count as f64);
            let start = Instant::now();
            (0..count).for_each(|i| assert!(blob.try_read(offset(i), &mut buf)));
            times[1].push(start.elapsed().as_secs_f64() * 1e9 / count as f64);
        }
        let [bare, hit] = times.map(|mut t| {
            t.sort_by(f64::total_cmp);
            t[t.len() / 2]
        });
        println!("{:5} KiB: pread {bare:8.0} ns, hit {hit:8.0} ns, ratio {:.2}", size >> 10, hit / bare);
    }
}
