// A list of one range is what a fake recorded, not a mistaken collection.
#![allow(clippy::single_range_in_vec_init)]

mod memory;

use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use tokio::sync::Semaphore;

use super::fill::TableFiller;
use super::*;
use crate::inflate::Indexer;
use crate::source::BlobStat;

/// Bounds a test that waits for an event which never comes.
const LIMIT: Duration = Duration::from_secs(30);

fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|i| {
            if i % 8 == 0 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            }
            // Never zero: a hole that is served shows.
            (state >> (8 * (i % 8))) as u8 | 1
        })
        .collect()
}

/// Boundaries every `span` bytes.
fn bounds(len: usize, span: usize) -> Arc<[u64]> {
    (0..len).step_by(span).map(|at| at as u64).chain([len as u64]).collect()
}

/// Gives spans of a known content, and counts.
#[derive(Debug)]
struct Fake {
    plain: Vec<u8>,
    bounds: Arc<[u64]>,
    calls: Mutex<Vec<Range<u32>>>,
    /// One permit per call.
    gate: Semaphore,
    fails: AtomicBool,
    /// Bytes that are missing at the end of each span.
    short: AtomicU32,
    verified: bool,
}

impl Fake {
    fn new(plain: Vec<u8>, span: usize) -> Arc<Self> {
        Arc::new(Self {
            bounds: bounds(plain.len(), span),
            plain,
            calls: Mutex::default(),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            fails: AtomicBool::new(false),
            short: AtomicU32::new(0),
            verified: true,
        })
    }

    fn gated(plain: Vec<u8>, span: usize) -> Arc<Self> {
        let mut fake = Arc::into_inner(Self::new(plain, span)).unwrap();
        fake.gate = Semaphore::new(0);
        Arc::new(fake)
    }

    fn calls(&self) -> Vec<Range<u32>> {
        self.calls.lock().unwrap().clone()
    }

    fn open(self: &Arc<Self>, cache: &Cache, name: &str) -> Arc<CachedBlob> {
        cache.blob(CacheKey(Digest::of(name.as_bytes())), self.bounds.clone(), self.clone()).unwrap()
    }
}

#[async_trait]
impl SpanFiller for Fake {
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
        self.calls.lock().unwrap().push(spans.clone());
        self.gate.acquire().await.unwrap().forget();
        if self.fails.load(Ordering::Relaxed) {
            let what = "the fake".to_owned();
            return Err(SourceError::Unavailable { what, tries: 1, detail: "told to fail".into() }.into());
        }
        let short = self.short.load(Ordering::Relaxed) as usize;
        Ok(spans
            .map(|ix| {
                let (from, to) = (self.bounds[ix as usize] as usize, self.bounds[ix as usize + 1] as usize);
                Filled { bytes: self.plain[from..to - short].to_vec().into(), verified: self.verified }
            })
            .collect())
    }
    fn cost(&self, span: SpanIx) -> u64 {
        self.bounds[span.0 as usize + 1] - self.bounds[span.0 as usize]
    }
    fn describe(&self) -> String {
        "the fake".into()
    }
}

/// A blob in memory that counts what is fetched, and can flip a bit in what it gives.
#[derive(Debug, Default)]
struct Memory {
    blob: Vec<u8>,
    requests: Mutex<Vec<Range<u64>>>,
    streams: AtomicU32,
    /// Requests that still get a flipped bit.
    flips: AtomicU64,
    flip_at: u64,
}

impl Memory {
    fn new(blob: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { blob, ..Self::default() })
    }
}

#[async_trait]
impl BlobSource for Memory {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        self.requests.lock().unwrap().push(range.clone());
        let mut bytes = self.blob[range.start as usize..range.end as usize].to_vec();
        if range.contains(&self.flip_at)
            && self.flips.try_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
        {
            bytes[(self.flip_at - range.start) as usize] ^= 0x10;
        }
        Ok(bytes.into())
    }
    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let pieces: Vec<_> =
            self.blob[offset as usize..].chunks(10_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        Ok(futures::stream::iter(pieces).boxed())
    }
    async fn stat(&self) -> Result<BlobStat, SourceError> {
        Ok(BlobStat { size: self.blob.len() as u64, identity: "memory".into() })
    }
    fn describe(&self) -> String {
        "memory".into()
    }
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn table(blob: &[u8], compression: Compression, span: u64) -> Arc<BlobTable> {
    let mut indexer = Indexer::new(compression, span);
    indexer.push(blob, &mut |_| ()).unwrap();
    Arc::new(indexer.finish(&mut |_| ()).unwrap())
}

fn open_table(cache: &Cache, source: &Arc<Memory>, table: &Arc<BlobTable>) -> Arc<CachedBlob> {
    let filler = TableFiller { source: source.clone(), table: table.clone() };
    let key = CacheKey::table(&table.digest, &table.root());
    cache.blob(key, TableFiller::bounds(table), Arc::new(filler)).unwrap()
}

fn config(dir: &Path, max_bytes: u64) -> CacheConfig {
    CacheConfig { dir: dir.to_owned(), max_bytes, ..CacheConfig::default() }
}

fn open(dir: &Path) -> Arc<Cache> {
    Cache::open(&config(dir, 1 << 30)).unwrap()
}

/// Ends a cache as a process does, and waits until it has let go of the directory.
async fn close(cache: Arc<Cache>) {
    cache.flush().await;
    drop(cache);
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

#[tokio::test]
async fn a_span_is_fetched_once_and_then_read_from_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(1, 100_000), 10_000);
    let blob = fake.open(&cache, "a");
    let mut buf = vec![0; 25_000];
    assert!(!blob.try_read(5_000, &mut buf));
    assert!(!blob.is_verified(5_000..30_000));
    assert_eq!(blob.read(5_000, 25_000).await.unwrap(), fake.plain[5_000..30_000]);
    cache.flush().await;
    assert!(blob.try_read(5_000, &mut buf) && buf == fake.plain[5_000..30_000]);
    assert!(blob.is_verified(5_000..30_000) && !blob.is_verified(5_000..30_001));
    assert_eq!(fake.calls(), [0..3], "neighbours go into one fill");
    assert_eq!(blob.read(95_000, 99_999).await.unwrap(), fake.plain[95_000..], "short at the end");
    assert!(blob.read(100_000, 1).await.unwrap().is_empty());
    assert!(!blob.try_read(99_999, &mut [0; 2]));
    cache.flush().await;
    assert!(cache.used() >= 40_000);
}

#[tokio::test]
async fn single_flight() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::gated(content(2, 10_000), 10_000);
    let blob = fake.open(&cache, "a");
    let readers: Vec<_> = (0..40)
        .map(|i| {
            let blob = blob.clone();
            tokio::spawn(async move { blob.read(i * 100, 100).await })
        })
        .collect();
    // A reader that gives up takes nothing from the others.
    let mut fleeting = Box::pin(blob.read(0, 100));
    assert!((&mut fleeting).now_or_never().is_none());
    drop(fleeting);
    fake.gate.add_permits(1);
    for (i, reader) in readers.into_iter().enumerate() {
        let bytes = tokio::time::timeout(LIMIT, reader).await.unwrap().unwrap().unwrap();
        assert_eq!(bytes, fake.plain[i * 100..i * 100 + 100]);
    }
    assert_eq!(fake.calls(), [0..1]);
}

#[tokio::test]
async fn a_fill_outlives_the_reader_that_began_it() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::gated(content(3, 10_000), 10_000);
    let blob = fake.open(&cache, "a");
    let mut reader = Box::pin(blob.read(0, 10));
    assert!((&mut reader).now_or_never().is_none());
    drop(reader);
    fake.gate.add_permits(1);
    tokio::time::timeout(LIMIT, cache.flush()).await.unwrap();
    assert!(blob.try_read(0, &mut [0; 10_000]));
}

#[tokio::test]
async fn an_error_is_shared_but_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::gated(content(4, 10_000), 10_000);
    fake.fails.store(true, Ordering::Relaxed);
    let blob = fake.open(&cache, "a");
    let (a, b, ()) = tokio::join!(blob.read(0, 10), blob.read(5, 10), async { fake.gate.add_permits(1) });
    for result in [a, b] {
        assert!(matches!(result, Err(CacheError::Source(SourceError::Unavailable { .. }))));
    }
    assert_eq!(fake.calls().len(), 1);
    fake.fails.store(false, Ordering::Relaxed);
    fake.gate.add_permits(1);
    assert_eq!(blob.read(0, 10).await.unwrap(), fake.plain[..10]);
}

#[tokio::test]
async fn a_fill_of_another_length_is_corrupt_and_nothing_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(5, 40_000), 10_000);
    fake.short.store(1, Ordering::Relaxed);
    let blob = fake.open(&cache, "a");
    let error = blob.read(0, 40_000).await.unwrap_err();
    assert!(matches!(&error, CacheError::Corrupt { what, detail } if what == "the fake" && detail.contains("9999")));
    cache.flush().await;
    assert!((0..4).all(|ix| !blob.store.has(ix)));
}

#[tokio::test]
async fn a_restart_keeps_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new(content(6, 100_000), 7_000);
    let cache = open(dir.path());
    let blob = fake.open(&cache, "a");
    blob.read(30_000, 20_000).await.unwrap();
    drop(blob);
    close(cache).await;
    let cache = open(dir.path());
    assert!(cache.used() > 20_000, "{}", cache.used());
    let blob = fake.open(&cache, "a");
    let mut buf = vec![0; 20_000];
    assert!(blob.try_read(30_000, &mut buf) && buf == fake.plain[30_000..50_000]);
    assert!(blob.is_verified(30_000..50_000));
    assert!(!blob.try_read(0, &mut buf));
}

#[tokio::test]
async fn a_crash_between_data_and_marks_loses_marks_only() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let fake = Fake::new(content(7, 50_000), 10_000);
    let cache = open(dir.path());
    let blob = fake.open(&cache, "a");
    blob.read(0, 50_000).await.unwrap();
    // The fill is over and the bytes are in the file, but no flush has been: what a crash leaves.
    let _ = cache.space.flying.subscribe().wait_for(|n| *n == 0).await;
    assert!(blob.try_read(0, &mut [0; 50_000]));
    copy_tree(dir.path(), before.path());
    cache.flush().await;
    copy_tree(dir.path(), after.path());

    let crashed = open(before.path());
    let fresh = Fake::new(fake.plain.clone(), 10_000);
    let blob = fresh.open(&crashed, "a");
    assert!(!blob.try_read(0, &mut [0; 1]));
    assert_eq!(blob.read(0, 50_000).await.unwrap(), fake.plain);
    assert_eq!(fresh.calls(), [0..5]);

    let whole = open(after.path());
    let mut buf = vec![0; 50_000];
    assert!(fresh.open(&whole, "a").try_read(0, &mut buf) && buf == fake.plain);
}

#[tokio::test]
async fn files_that_contradict_the_blob_are_started_over() {
    let fake = Fake::new(content(8, 50_000), 10_000);
    let key = CacheKey(Digest::of(b"a"));
    for damage in ["header", "short data", "no data", "short map"] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path());
        fake.open(&cache, "a").read(0, 50_000).await.unwrap();
        close(cache).await;
        let (data, map) = store::paths(&dir.path().join("blobs"), &key);
        let resize = |path, len| std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
        match damage {
            "header" => {
                let mut bytes = std::fs::read(&map).unwrap();
                bytes[30] ^= 1;
                std::fs::write(&map, bytes).unwrap();
            }
            "short data" => resize(data, 40_000),
            "no data" => std::fs::remove_file(data).unwrap(),
            _ => resize(map, 70),
        }
        let cache = open(dir.path());
        let blob = fake.open(&cache, "a");
        assert!(!blob.try_read(0, &mut [0; 1]), "{damage}");
        assert_eq!(blob.read(0, 50_000).await.unwrap(), fake.plain, "{damage}");
    }
}

#[tokio::test]
async fn bounds_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(9, 100), 100);
    let key = CacheKey(Digest::of(b"a"));
    for bounds in [&[][..], &[1, 2], &[0, 5, 5], &[0, 9, 8], &[0, u64::MAX], &[0, 65 << 20]] {
        let error = cache.blob(key, bounds.into(), fake.clone()).unwrap_err();
        assert!(matches!(error, CacheError::Corrupt { .. }), "{bounds:?}");
    }
    assert!(cache.blob(key, [0].into(), fake.clone()).unwrap().is_empty());
}

#[tokio::test]
async fn a_second_opener_is_refused_by_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let error = Cache::open(&config(dir.path(), 1 << 30)).unwrap_err().to_string();
    assert!(error.contains("another process uses it") && error.contains("cache.dir"), "{error}");
    close(cache).await;
    open(dir.path());
}

#[tokio::test]
async fn corrupted_span_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(10, 300_000);
    let blob = gzip(&plain);
    let table = table(&blob, Compression::Gzip, 50_000);
    let flip_at = table.spans[1].coff + 1000;
    let bad = Arc::new(Memory { blob, flips: AtomicU64::new(u64::MAX), flip_at, ..Memory::default() });
    let cached = open_table(&cache, &bad, &table);
    let second = table.bounds(SpanIx(1));
    let error = cached.read(second.start, 10).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, CacheError::Corrupt { .. }));
    assert!(text.contains("memory") && text.contains(&table.digest.to_string()), "{text}");
    assert!(text.contains("not served") && (text.contains("span 1") || text.contains("corrupt gzip data")), "{text}");
    assert_eq!(bad.requests.lock().unwrap().len(), 2, "it was fetched once more before it was given up");
    cache.flush().await;
    assert!(!cached.try_read(second.start, &mut [0; 10]));
    assert_eq!(cached.read(0, 10).await.unwrap(), plain[..10], "other spans are");
}

#[tokio::test]
async fn a_slip_on_the_way_is_healed_by_fetching_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(11, 300_000);
    let blob = gzip(&plain);
    let table = table(&blob, Compression::Gzip, 50_000);
    let flip_at = table.spans[2].coff + 500;
    let source = Arc::new(Memory { blob, flips: AtomicU64::new(1), flip_at, ..Memory::default() });
    let cached = open_table(&cache, &source, &table);
    assert_eq!(cached.read(0, plain.len()).await.unwrap(), plain);
    assert_eq!(source.requests.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_table_that_lies_gets_a_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let (plain, other) = (content(12, 100_000), content(112, 100_000));
    let honest = table(&plain, Compression::None, 20_000);
    // Another archive claims the same layer digest for bytes of its own, and serves them.
    let mut lying = BlobTable::clone(&table(&other, Compression::None, 20_000));
    lying.digest = honest.digest;
    lying.diff_id = honest.diff_id;
    let (honest_source, lying_source) = (Memory::new(plain.clone()), Memory::new(other.clone()));
    let poisoner = open_table(&cache, &lying_source, &Arc::new(lying));
    assert_eq!(poisoner.read(0, 100_000).await.unwrap(), other);
    cache.flush().await;
    let victim = open_table(&cache, &honest_source, &honest);
    assert!(!victim.try_read(0, &mut [0; 1]));
    assert_eq!(victim.read(0, 100_000).await.unwrap(), plain);
}

#[tokio::test]
async fn images_that_agree_share_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(14, 100_000);
    let (one, two) = (Memory::new(plain.clone()), Memory::new(plain.clone()));
    let table = table(&plain, Compression::None, 20_000);
    let (a, b) = (open_table(&cache, &one, &table), open_table(&cache, &two, &table));
    assert!(Arc::ptr_eq(&a.store, &b.store));
    a.read(0, 100_000).await.unwrap();
    assert_eq!(b.read(0, 100_000).await.unwrap(), plain);
    assert!(two.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn neighbours_come_in_one_request_of_their_own_bytes_only() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(15, 500_000);
    let blob = gzip(&plain);
    let table = table(&blob, Compression::Gzip, 50_000);
    let source = Memory::new(blob);
    let cached = open_table(&cache, &source, &table);
    let range = table.bounds(SpanIx(2)).start..table.bounds(SpanIx(4)).end;
    let bytes = cached.read(range.start, (range.end - range.start) as usize).await.unwrap();
    assert_eq!(bytes, plain[range.start as usize..range.end as usize]);
    assert_eq!(*source.requests.lock().unwrap(), [table.spans[2].coff..table.spans[4].cend]);
}

#[tokio::test]
async fn spans_of_one_huge_frame_are_filled_in_one_pass() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(16, 1_000_000);
    let blob = zstd::bulk::compress(&plain, 1).unwrap();
    let table = table(&blob, Compression::Zstd, 50_000);
    assert!(table.spans.len() > 10);
    let source = Memory::new(blob);
    let cached = open_table(&cache, &source, &table);
    assert_eq!(cached.read(400_000, 100).await.unwrap(), plain[400_000..400_100]);
    cache.flush().await;
    let mut all = vec![0; plain.len()];
    assert!(cached.try_read(0, &mut all) && all == plain);
    let fetched: u64 = source.requests.lock().unwrap().iter().map(|r| r.end - r.start).sum();
    assert_eq!(fetched, source.blob.len() as u64, "each byte once");
}

#[tokio::test]
async fn unverified_bytes_are_told_apart_and_stay_so() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let mut fake = Arc::into_inner(Fake::new(content(17, 30_000), 10_000)).unwrap();
    fake.verified = false;
    let fake = Arc::new(fake);
    let blob = fake.open(&cache, "a");
    blob.read(0, 30_000).await.unwrap();
    assert!(!blob.is_verified(0..30_000));
    drop(blob);
    close(cache).await;
    let cache = open(dir.path());
    let blob = fake.open(&cache, "a");
    assert!(blob.try_read(0, &mut [0; 30_000]) && !blob.is_verified(0..1));
}

#[tokio::test]
async fn a_reader_goes_before_a_prefetch() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let slow = Fake::gated(content(18, 10_000), 10_000);
    let ahead = Fake::new(content(19, 100_000), 10_000);
    let (reading, prefetching) = (slow.open(&cache, "slow"), ahead.open(&cache, "ahead"));
    let mut reader = Box::pin(reading.read(0, 10));
    assert!((&mut reader).now_or_never().is_none());
    let mut prefetch = Box::pin(prefetching.prefetch(0..100_000));
    assert!((&mut prefetch).now_or_never().is_none());
    assert!(ahead.calls().is_empty(), "a reader waits");
    slow.gate.add_permits(1);
    tokio::time::timeout(LIMIT, async { (reader.await.unwrap(), prefetch.await.unwrap()) }).await.unwrap();
    cache.flush().await;
    let mut buf = vec![0; 100_000];
    assert!(prefetching.try_read(0, &mut buf) && buf == ahead.plain);
}

/// A file system of a given size that goes away with the guard.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        match rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, Some(options.as_c_str())) {
            Ok(()) => Some(Self(dir)),
            Err(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) => {
                eprintln!("skipped: mounting a tmpfs needs root");
                None
            }
            Err(error) => panic!("tmpfs: {error}"),
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn reads_go_on_when_the_disk_is_full() {
    let Some(disk) = Tmpfs::new(1 << 20) else { return };
    let cache = open(disk.0.path());
    let plain = content(20, 4 << 20);
    let blob = gzip(&plain);
    let table = table(&blob, Compression::Gzip, 128 << 10);
    let source = Memory::new(blob);
    let cached = open_table(&cache, &source, &table);
    let before = crate::metrics::metrics().cache_uncached_reads.get();
    for round in 0..2 {
        for at in (0..plain.len()).step_by(256 << 10) {
            let bytes = cached.read(at as u64, 256 << 10).await.unwrap();
            assert!(bytes == plain[at..at + (256 << 10)], "round {round}, byte {at}");
        }
    }
    let _ = cache.space.flying.subscribe().wait_for(|n| *n == 0).await;
    assert!(crate::metrics::metrics().cache_uncached_reads.get() > before);
    // Not even the files of another blob fit now; it is read all the same.
    while let Ok(()) = std::fs::write(disk.0.path().join(format!("junk{}", rand())), vec![1; 4096]) {}
    let fake = Fake::new(content(21, 50_000), 10_000);
    assert_eq!(fake.open(&cache, "b").read(0, 50_000).await.unwrap(), fake.plain);
    // And a layer without a table is, too.
    let layer = Digest::of(&source.blob);
    let made = cache.ingest(layer, Compression::Gzip, source.clone(), 128 << 10).await.unwrap();
    assert_eq!(made.spans, table.spans);
}

#[tokio::test]
async fn what_the_disk_has_not_taken_is_never_served_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(22, 300_000), 100_000);
    let blob = fake.open(&cache, "a");
    blob.read(0, 100_000).await.unwrap();
    cache.flush().await;
    blob.read(100_000, 100_000).await.unwrap();
    let _ = cache.space.flying.subscribe().wait_for(|n| *n == 0).await;
    // Its pages are gone, and in their place are zeros.
    blob.store.break_disk();
    cache.flush().await;
    assert!(!blob.store.has(1), "it never reached the disk");
    assert!(!blob.try_read(150_000, &mut [0; 10]));
    assert_eq!(blob.read(100_000, 200_000).await.unwrap(), fake.plain[100_000..]);
}

/// A number that no other call gives.
fn rand() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[tokio::test]
async fn eviction_takes_closed_blobs_first_and_the_oldest_of_them() {
    let dir = tempfile::tempdir().unwrap();
    // High watermark 900 kB, low 800 kB.
    let cache = Cache::open(&config(dir.path(), 1_000_000)).unwrap();
    let fakes: Vec<_> = (0..4).map(|i| Fake::new(content(30 + i, 200_000), 50_000)).collect();
    let live = fakes[0].open(&cache, "0");
    live.read(0, 200_000).await.unwrap();
    for (i, fake) in fakes.iter().enumerate().skip(1) {
        fake.open(&cache, &i.to_string()).read(0, 200_000).await.unwrap();
        cache.flush().await;
    }
    let used = cache.used();
    assert!((800_000..900_000).contains(&used), "{used}");
    cache.space.evict(used - 100_000);
    assert!(cache.used() <= used - 100_000);
    let here = |i: usize| fakes[i].open(&cache, &i.to_string()).try_read(0, &mut [0; 200_000]);
    assert_eq!([here(0), here(1), here(2), here(3)], [true, false, true, true]);
    assert!(std::fs::read_dir(dir.path().join("trash")).unwrap().next().is_none());
    drop(live);
}

#[tokio::test]
async fn of_open_blobs_the_spans_that_were_not_read_go() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(40, 1_000_000), 100_000);
    let blob = fake.open(&cache, "a");
    blob.read(0, 1_000_000).await.unwrap();
    cache.flush().await;
    // All have been read; a pass that is content with nothing forgets that.
    assert!(blob.store.evictable(true).is_empty());
    assert!(blob.try_read(300_000, &mut [0; 10]) && blob.try_read(700_000, &mut [0; 10]));
    cache.space.evict(300_000);
    assert!(cache.used() <= 300_000, "{}", cache.used());
    let here: Vec<u32> = (0..10).filter(|ix| blob.store.has(*ix)).collect();
    assert_eq!(here, [3, 7]);
    let mut buf = vec![0; 100_000];
    assert!(blob.try_read(700_000, &mut buf) && buf == fake.plain[700_000..800_000]);
    assert_eq!(blob.read(0, 1_000_000).await.unwrap(), fake.plain);
}

#[tokio::test]
async fn the_limit_holds() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(&config(dir.path(), 500_000)).unwrap();
    let fake = Fake::new(content(41, 3_000_000), 50_000);
    let blob = fake.open(&cache, "a");
    for at in (0..3_000_000).step_by(100_000) {
        assert_eq!(blob.read(at, 100_000).await.unwrap(), fake.plain[at as usize..at as usize + 100_000]);
        let _ = cache.space.flying.subscribe().wait_for(|n| *n == 0).await;
        assert!(cache.used() <= 500_000, "{}", cache.used());
    }
    cache.flush().await;
    assert!(cache.used() <= 500_000);
}

#[tokio::test]
async fn evicted_marks_are_gone_from_the_disk_before_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(42, 500_000), 50_000);
    let blob = fake.open(&cache, "a");
    blob.read(0, 500_000).await.unwrap();
    cache.flush().await;
    cache.space.evict(200_000);
    // A crash now: no flush, no orderly end.
    copy_tree(dir.path(), copy.path());
    let crashed = open(copy.path());
    let again = fake.open(&crashed, "a");
    for ix in 0..10_u32 {
        let range = again.store.span(ix);
        let mut buf = vec![0; 50_000];
        if again.try_read(range.start, &mut buf) {
            assert!(buf == fake.plain[range.start as usize..range.end as usize]);
        }
        assert_eq!(again.store.has(ix), blob.store.has(ix));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_beside_eviction_never_see_other_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let fake = Fake::new(content(43, 640_000), 10_000);
    let blob = fake.open(&cache, "a");
    let stop = Arc::new(AtomicBool::new(false));
    let hits = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..2_u64)
        .map(|seed| {
            let (blob, fake, stop, hits) = (blob.clone(), fake.clone(), stop.clone(), hits.clone());
            std::thread::spawn(move || {
                let mut state = seed + 1;
                let mut buf = vec![0; 25_000];
                while !stop.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = (state >> 33) as usize % 610_000;
                    if blob.try_read(at as u64, &mut buf) {
                        hits.fetch_add(1, Ordering::Relaxed);
                        assert!(buf == fake.plain[at..at + 25_000], "other bytes at {at}");
                    }
                }
            })
        })
        .collect();
    let evictor = {
        let (cache, stop) = (cache.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                cache.space.evict(300_000);
                cache.space.flush();
                rounds += 1;
            }
            rounds
        })
    };
    let end = Instant::now() + Duration::from_millis(1500);
    let mut at = 0;
    while Instant::now() < end {
        at = (at + 70_001) % 560_000;
        assert!(blob.read(at, 80_000).await.unwrap() == fake.plain[at as usize..at as usize + 80_000]);
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(evictor.join().unwrap() > 3);
    assert!(hits.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn a_layer_without_a_table_is_streamed_once() {
    let dir = tempfile::tempdir().unwrap();
    let plain = content(50, 700_000);
    let source = Memory::new(gzip(&plain));
    let layer = Digest::of(&source.blob);
    let cache = open(dir.path());
    let ingest = || cache.ingest(layer, Compression::Gzip, source.clone(), 100_000);
    let (a, b) = tokio::join!(ingest(), ingest());
    let table = a.unwrap();
    assert_eq!(table, b.unwrap());
    let cached = open_table(&cache, &source, &table);
    let mut buf = vec![0; plain.len()];
    assert!(cached.try_read(0, &mut buf) && buf == plain, "the bytes were kept on the way");
    assert!(cached.is_verified(0..plain.len() as u64));
    drop(cached);
    close(cache).await;

    let cache = open(dir.path());
    let kept = cache.ingest(layer, Compression::Gzip, source.clone(), 100_000).await.unwrap();
    assert_eq!(kept, table);
    assert!(open_table(&cache, &source, &kept).try_read(0, &mut buf));
    assert_eq!(source.streams.load(Ordering::Relaxed), 1);
    assert!(source.requests.lock().unwrap().is_empty());
    assert!(cache.used() >= 700_000 && cache.used() < 800_000, "{}", cache.used());
}

#[tokio::test]
async fn a_layer_that_is_not_its_digest_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let source = Memory::new(gzip(&content(51, 300_000)));
    let claimed = Digest::of(b"another layer");
    let error = cache.ingest(claimed, Compression::Gzip, source.clone(), 100_000).await.unwrap_err().to_string();
    assert!(error.contains(&claimed.to_string()) && error.contains(&Digest::of(&source.blob).to_string()), "{error}");
    let mut cut = source.blob.clone();
    cut.truncate(cut.len() / 2);
    let cut = Memory::new(cut);
    let error = cache.ingest(Digest::of(&cut.blob), Compression::Gzip, cut.clone(), 100_000).await.unwrap_err();
    assert!(error.to_string().contains("truncated"), "{error}");
    cache.flush().await;
    for name in ["incoming", "tables", "blobs"] {
        assert!(std::fs::read_dir(dir.path().join(name)).unwrap().next().is_none(), "{name}");
    }
    assert_eq!(cache.used(), 0);
}

#[tokio::test]
async fn a_kept_table_that_was_damaged_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(gzip(&content(52, 300_000)));
    let layer = Digest::of(&source.blob);
    let cache = open(dir.path());
    let table = cache.ingest(layer, Compression::Gzip, source.clone(), 100_000).await.unwrap();
    let path = dir.path().join("tables").join(layer.hex());
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(cache.ingest(layer, Compression::Gzip, source.clone(), 100_000).await.unwrap(), table);
    assert_eq!(source.streams.load(Ordering::Relaxed), 2);
    assert!(
        open_table(&cache, &source, &table).try_read(0, &mut [0; 1000]),
        "and the bytes are still the adopted ones"
    );
}

/// Two mounts of one layer: the file is shared, the way to the bytes is not.
#[tokio::test]
async fn each_reader_of_a_blob_fetches_with_its_own_filler() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(3, 50_000);
    let (dead, alive) = (Fake::gated(plain.clone(), 10_000), Fake::new(plain.clone(), 10_000));
    dead.fails.store(true, Ordering::Relaxed);
    let (first, second) = (dead.open(&cache, "layer"), alive.open(&cache, "layer"));
    // It joins the fill that fails, and goes on with its own.
    let joined = async {
        while dead.calls().is_empty() {
            tokio::task::yield_now().await;
        }
        let read = second.read(0, 10_000);
        tokio::pin!(read);
        assert!(futures::poll!(&mut read).is_pending());
        dead.gate.add_permits(1);
        read.await
    };
    let (failed, read) = tokio::join!(first.read(0, 10_000), joined);
    assert!(failed.is_err());
    assert_eq!(read.unwrap(), plain[..10_000]);
    assert_eq!((dead.calls().len(), alive.calls().len()), (1, 1));
    // What one has fetched the other finds.
    assert_eq!(first.read(0, 10_000).await.unwrap(), plain[..10_000]);
    assert_eq!((dead.calls().len(), alive.calls().len()), (1, 1));
}

/// A filler somewhere else.
#[derive(Debug)]
struct At(&'static str, Arc<Fake>);

#[async_trait]
impl SpanFiller for At {
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
        self.1.fill(spans).await
    }
    fn cost(&self, span: SpanIx) -> u64 {
        self.1.cost(span)
    }
    fn describe(&self) -> String {
        self.1.describe()
    }
    fn place(&self) -> String {
        self.0.into()
    }
}

#[tokio::test]
async fn a_place_that_does_not_answer_keeps_no_other_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let plain = content(4, 100);
    let (silent, good) = (Fake::gated(plain.clone(), 100), Fake::new(plain.clone(), 100));
    let open = |place, fake: &Arc<Fake>, name: &str| {
        let filler = Arc::new(At(place, fake.clone()));
        cache.blob(CacheKey(Digest::of(name.as_bytes())), fake.bounds.clone(), filler).unwrap()
    };
    // More than there are slots in all.
    let stuck: Vec<_> = (0..100).map(|n| open("silent.example", &silent, &format!("blob {n}"))).collect();
    let waiting: Vec<_> =
        stuck.into_iter().map(|blob| tokio::spawn(async move { blob.read(0, 100).await.unwrap() })).collect();
    // All that can begin does: then every task waits for something.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(silent.calls().len(), 16, "half of the slots");
    let other = open("good.example", &good, "other");
    let read = tokio::time::timeout(Duration::from_secs(20), other.read(0, 100)).await;
    assert_eq!(read.expect("it waits for no place but its own").unwrap(), plain);
    silent.gate.add_permits(200);
    for read in waiting {
        assert_eq!(read.await.unwrap(), plain);
    }
}
