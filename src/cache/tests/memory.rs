//! What the cache takes of the machine's memory: fills in flight, and pages of its own files.

use std::os::fd::AsRawFd;

use super::*;
use crate::skip::skipped_here;

/// Spans of one fill each that count what is in flight at a time.
#[derive(Debug)]
struct Wide {
    span: u64,
    /// Bytes that are being fetched, and the most there were.
    now: AtomicU64,
    peak: AtomicU64,
    begun: AtomicU64,
    gate: Semaphore,
}

impl Wide {
    fn new(span: u64) -> Arc<Self> {
        Arc::new(Self {
            span,
            now: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            gate: Semaphore::new(0),
        })
    }

    fn open(self: &Arc<Self>, cache: &Cache, name: &str, spans: u64) -> Arc<CachedBlob> {
        let bounds = (0..=spans).map(|n| n * self.span).collect();
        cache.blob(CacheKey(Digest::of(name.as_bytes())), bounds, self.clone()).unwrap()
    }
}

#[async_trait]
impl SpanFiller for Wide {
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
        let bytes = 2 * self.span * spans.len() as u64;
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.gate.acquire().await.unwrap().forget();
        self.now.fetch_sub(bytes, Ordering::Relaxed);
        Ok(spans.map(|_| Filled { bytes: vec![1; self.span as usize].into(), verified: true }).collect())
    }
    fn cost(&self, _: SpanIx) -> u64 {
        self.span
    }
    fn describe(&self) -> String {
        "wide spans".into()
    }
}

fn small(dir: &Path, fill_bytes: u64) -> Arc<Cache> {
    Cache::open(&CacheConfig { fill_bytes, ..config(dir, 1 << 30) }).unwrap()
}

/// Lets every task run until it waits for something.
async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn however_many_read_cold_fills_in_flight_stay_within_their_budget() {
    const READERS: u64 = 12;
    let dir = tempfile::tempdir().unwrap();
    // A fill holds the 64 KiB that it fetches and the 64 KiB that come of it: four at a time, as one place has half of the budget.
    let cache = small(dir.path(), 1 << 20);
    let wide = Wide::new(64 << 10);
    let blob = wide.open(&cache, "a", 2 * READERS);
    // Spans that do not touch: a fill each.
    let readers: Vec<_> = (0..READERS)
        .map(|n| {
            let blob = blob.clone();
            tokio::spawn(async move { blob.read(n * (128 << 10), 1000).await.unwrap().len() })
        })
        .collect();
    let all_in_flight = cache.space.flying.subscribe();
    tokio::time::timeout(LIMIT, all_in_flight.clone().wait_for(|n| *n == READERS as usize)).await.unwrap().unwrap();
    settle().await;
    assert_eq!(wide.begun.load(Ordering::Relaxed), 4, "the others wait");
    wide.gate.add_permits(READERS as usize);
    for reader in readers {
        assert_eq!(tokio::time::timeout(LIMIT, reader).await.unwrap().unwrap(), 1000);
    }
    assert_eq!(wide.peak.load(Ordering::Relaxed), 512 << 10);
}

#[tokio::test]
async fn a_fill_that_is_larger_than_the_budget_goes_alone_and_is_not_overtaken_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let cache = small(dir.path(), 1 << 20);
    let (narrow, wide) = (Wide::new(64 << 10), Wide::new(1 << 20));
    let (many, one) = (narrow.open(&cache, "narrow", 40), wide.open(&cache, "wide", 1));
    let read = |blob: &Arc<CachedBlob>, at: u64| {
        let blob = blob.clone();
        tokio::spawn(async move { blob.read(at, 100).await.unwrap().len() })
    };
    let first: Vec<_> = (0..4).map(|n| read(&many, n * (128 << 10))).collect();
    settle().await;
    let large = read(&one, 0);
    settle().await;
    let later: Vec<_> = (4..16).map(|n| read(&many, n * (128 << 10))).collect();
    settle().await;
    assert_eq!((narrow.begun.load(Ordering::Relaxed), wide.begun.load(Ordering::Relaxed)), (4, 0));
    narrow.gate.add_permits(4);
    for reader in first {
        tokio::time::timeout(LIMIT, reader).await.unwrap().unwrap();
    }
    // What they held is given back once their bytes are on the disk.
    tokio::time::timeout(LIMIT, cache.space.flying.subscribe().wait_for(|n| *n == 13)).await.unwrap().unwrap();
    settle().await;
    // Its turn, before those that came after it, and nothing beside it.
    assert_eq!((narrow.begun.load(Ordering::Relaxed), wide.begun.load(Ordering::Relaxed)), (4, 1));
    wide.gate.add_permits(1);
    narrow.gate.add_permits(12);
    for reader in later.into_iter().chain([large]) {
        assert_eq!(tokio::time::timeout(LIMIT, reader).await.unwrap().unwrap(), 100);
    }
}

#[tokio::test]
async fn a_prefetch_of_what_inflates_a_thousandfold_goes_step_by_step() {
    /// Spans that cost next to nothing to fetch: the sizes of the fills, and the most that there were at a time.
    #[derive(Debug, Default)]
    struct Dense(Mutex<Vec<usize>>, AtomicU64, AtomicU64);
    #[async_trait]
    impl SpanFiller for Dense {
        async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
            self.0.lock().unwrap().push(spans.len());
            self.2.fetch_max(1 + self.1.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
            settle().await;
            self.1.fetch_sub(1, Ordering::Relaxed);
            Ok(spans.map(|_| Filled { bytes: vec![1; 4 << 20].into(), verified: true }).collect())
        }
        fn cost(&self, _: SpanIx) -> u64 {
            1000
        }
        fn describe(&self) -> String {
            "dense spans".into()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let dense = Arc::<Dense>::default();
    let bounds = (0..=10_u64).map(|n| n * (4 << 20)).collect();
    let blob = cache.blob(CacheKey(Digest::of(b"dense")), bounds, dense.clone()).unwrap();
    blob.prefetch(0..40 << 20).await.unwrap();
    assert_eq!(*dense.0.lock().unwrap(), [4, 4, 2]);
    assert_eq!(dense.2.load(Ordering::Relaxed), 1, "a reader that comes now waits for one fill at most");
}

/// Pages of the file's bytes from `off` on that the page cache holds; `None`: this kernel does not tell (Linux 6.5).
fn pages(file: &std::fs::File, off: u64, len: u64) -> Option<u64> {
    const CACHESTAT: libc::c_long = 451;
    let (range, mut counts) = ([off, len], [0_u64; 5]);
    // SAFETY: the kernel reads two and writes five numbers during the call, and the descriptor is borrowed, so open.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    (result == 0).then_some(counts[0])
}

/// Whether the file system of `dir` keeps its pages apart from its bytes (a tmpfs does not) and tells which are there.
fn drops_pages(dir: &Path) -> bool {
    let path = dir.join("try");
    std::fs::write(&path, [1; 4096]).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    let before = pages(&file, 0, 4096);
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    before == Some(1) && pages(&file, 0, 4096) == Some(0)
}

#[tokio::test]
async fn the_page_cache_does_not_keep_what_cold_and_warm_reads_went_through() {
    const LEN: usize = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    if !drops_pages(dir.path()) {
        return skipped_here("the file system of the temporary directory does not drop pages");
    }
    let cache = open(dir.path());
    let fake = Fake::new(content(77, LEN), 256 << 10);
    let blob = fake.open(&cache, "a");
    let data = super::super::store::paths(&cache.space.blobs(), &blob.store.key).0;
    let file = std::fs::File::open(data).unwrap();
    let tick = || {
        let space = cache.space.clone();
        async move { tokio::task::spawn_blocking(move || space.tick()).await.unwrap() }
    };

    assert_eq!(blob.read(0, LEN).await.unwrap(), fake.plain);
    let _ = cache.space.flying.subscribe().wait_for(|n| *n == 0).await;
    assert!(pages(&file, 0, LEN as u64) > Some(0), "written through the page cache");
    // Neighbours of what was read are likely read next: they stay for a round.
    tick().await;
    tick().await;
    assert_eq!(pages(&file, 0, LEN as u64), Some(0), "cold reads");

    // Small hits: what is being read stays, what is read no longer goes.
    let mut buf = vec![0; 4096];
    assert!(blob.try_read(0, &mut buf) && blob.try_read(2 << 20, &mut buf));
    tick().await;
    assert!(blob.try_read(0, &mut buf));
    tick().await;
    assert_eq!((pages(&file, 0, 4096), pages(&file, 0, LEN as u64)), (Some(1), Some(1)));
    tick().await;
    assert_eq!(pages(&file, 0, LEN as u64), Some(0), "small hits");

    // Large ones take their pages along.
    let mut buf = vec![0; LEN];
    assert!(blob.try_read(0, &mut buf) && buf == fake.plain);
    assert_eq!(pages(&file, 0, LEN as u64), Some(0), "large hits");
}

#[tokio::test]
async fn a_layer_that_was_indexed_leaves_no_pages_behind() {
    let dir = tempfile::tempdir().unwrap();
    if !drops_pages(dir.path()) {
        return skipped_here("the file system of the temporary directory does not drop pages");
    }
    let cache = open(dir.path());
    let source = Memory::new(gzip(&content(78, 3 << 20)));
    let table = table(&source.blob, Compression::Gzip, 128 << 10);
    cache.ingest(Digest::of(&source.blob), Compression::Gzip, source.clone(), 128 << 10).await.unwrap();
    let key = CacheKey::table(&table.digest, &table.root());
    let file = std::fs::File::open(super::super::store::paths(&cache.space.blobs(), &key).0).unwrap();
    assert_eq!(file.metadata().unwrap().len(), table.ulen);
    assert_eq!(pages(&file, 0, table.ulen), Some(0));
}
