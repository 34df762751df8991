//! The cache directory: its lock, what lies in it, how much, and what goes when it is too much.
//!
//! ```text
//! lock               held with flock by the one process that owns the directory
//! blobs/ab/cd….data  a blob's bytes, sparse        blobs/ab/cd….map  its marks; modified = last used
//! tables/<digest>    span tables of layers that were streamed once (see [`super::ingest`])
//! incoming/ trash/   bytes not yet known to be right, files being deleted: emptied at start
//! ```

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

use super::blob::CachedBlob;
use super::ingest::Ingests;
use super::store::{self, Store, lock};
use super::{CacheConfig, CacheError, CacheKey, SpanFiller};
use crate::metrics::metrics;
use crate::units::Digest;

/// How often the janitor looks: the most that a crash loses is the marks of this time.
const TICK: Duration = Duration::from_secs(5);
/// How long a predecessor may take to let go of the directory.
const LOCK_WAIT: Duration = Duration::from_millis(500);
/// Bytes written after which it looks at once.
const UNSYNCED_MAX: u64 = 64 << 20;
/// How often a blob's time of use is written, and how often a full disk is logged and made room on.
const MINUTE: Duration = Duration::from_secs(60);
/// Span tables that nobody has asked for in this time are deleted at start.
const TABLE_AGE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Prefetches that fill at the same time.
const BACKGROUND: usize = 2;
/// Fills that readers wait for at the same time; what they hold in memory is bounded by `cache.fillBytes`.
const FOREGROUND: usize = 32;
/// Of both, what fills from one place may take: a registry that does not answer leaves the other half to all others.
const PART_OF_ONE: usize = 2;
/// Unit of that bound: a semaphore counts in 32 bits.
const KIB: u64 = 1 << 10;
/// Layers that are indexed at the same time, some 8 MiB each.
const INGESTS: usize = 8;

/// What the directory holds of one key.
#[derive(Debug, Default)]
struct Known {
    bytes: Arc<AtomicU64>,
    /// Order of eviction among keys that nobody reads.
    last_used: Option<SystemTime>,
    /// When the time was last written to the disk.
    stamped: Option<SystemTime>,
    store: Weak<Store>,
}

/// What one place may take of the slots and of the memory.
#[derive(Debug)]
pub(super) struct PlaceShare {
    pub(super) foreground: Semaphore,
    memory: Semaphore,
    memory_kib: u32,
}

impl PlaceShare {
    /// As [`Space::memory`].
    pub(super) async fn memory(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        acquire(&self.memory, self.memory_kib, bytes).await
    }
}

async fn acquire(memory: &Semaphore, all: u32, bytes: u64) -> Option<SemaphorePermit<'_>> {
    let kib = u32::try_from(bytes.div_ceil(KIB)).unwrap_or(u32::MAX).min(all);
    // The semaphore is never closed.
    memory.acquire_many(kib).await.ok()
}

#[derive(Debug, Default)]
struct Bell {
    rung: bool,
    stop: bool,
}

/// The state of one open cache directory.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) dir: PathBuf,
    max: u64,
    high: u64,
    low: u64,
    low_percent: u64,
    known: Mutex<HashMap<CacheKey, Known>>,
    /// Disk space that the cache takes, as far as known.
    used: AtomicU64,
    /// Stores with bytes or marks to bring to the disk; kept open until then.
    dirty: Mutex<HashMap<CacheKey, Arc<Store>>>,
    unsynced: AtomicU64,
    /// One eviction at a time.
    evicting: Mutex<()>,
    /// The disk said that it is full.
    full: AtomicBool,
    squeezed: Mutex<Option<Instant>>,
    complained: Mutex<Option<Instant>>,
    bell: Arc<(Mutex<Bell>, Condvar)>,
    pub(super) background: Semaphore,
    pub(super) foreground: Semaphore,
    /// KiB that fills may still take into memory. Fair: a large fill is not overtaken for ever by small ones.
    memory: Semaphore,
    /// All of them.
    memory_kib: u32,
    /// The shares of places from which something is fetched.
    places: Mutex<HashMap<String, Weak<PlaceShare>>>,
    /// Fills in flight that a reader waits for.
    pub(super) urgent: watch::Sender<usize>,
    /// All fills in flight.
    pub(super) flying: watch::Sender<usize>,
    pub(super) ingests: Ingests,
    pub(super) ingesting: Semaphore,
    _lock: File,
}

fn io_error(path: &Path, operation: &str) -> impl FnOnce(io::Error) -> CacheError {
    let what = format!("{}: {operation}", path.display());
    move |error| CacheError::Io { what, detail: error.to_string() }
}

impl Space {
    pub(super) fn open(config: &CacheConfig) -> Result<Arc<Self>, CacheError> {
        let CacheConfig { dir, max_bytes, high_watermark, low_watermark, fill_bytes } = config;
        if *high_watermark > 100 || low_watermark > high_watermark {
            return Err(CacheError::Io {
                what: "cache.lowWatermark and cache.highWatermark".into(),
                detail: format!(
                    "{low_watermark} and {high_watermark} must be percentages, the low one not above the high"
                ),
            });
        }
        let make = |dir: &Path| DirBuilder::new().recursive(true).mode(0o700).create(dir);
        make(dir).map_err(io_error(dir, "create the directory"))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.map_err(io_error(&path, "open"))?;
        take(&lock).map_err(|error| {
            let detail = match error {
                rustix::io::Errno::WOULDBLOCK => {
                    "another process uses it; give each process a cache.dir of its own".to_owned()
                }
                error => error.to_string(),
            };
            CacheError::Io { what: format!("directory {}", dir.display()), detail }
        })?;
        for name in ["incoming", "trash"] {
            let path = dir.join(name);
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error(&path, "empty")(error));
                }
                _ => {}
            }
        }
        for name in ["incoming", "trash", "blobs", "tables"] {
            let path = dir.join(name);
            make(&path).map_err(io_error(&path, "create the directory"))?;
        }
        let known = scan(&dir.join("blobs")).map_err(io_error(dir, "list"))?;
        prune_tables(&dir.join("tables"));
        let used = known.values().map(|k| k.bytes.load(Ordering::Relaxed)).sum();
        let share = |percent: u8| u128::from(*max_bytes) * u128::from(percent) / 100;
        let memory_kib = u32::try_from(fill_bytes / KIB).unwrap_or(u32::MAX).max(1);
        let space = Arc::new(Self {
            dir: dir.clone(),
            max: *max_bytes,
            high: share(*high_watermark) as u64,
            low: share(*low_watermark) as u64,
            low_percent: u64::from(*low_watermark),
            known: Mutex::new(known),
            used: AtomicU64::new(used),
            dirty: Mutex::default(),
            unsynced: AtomicU64::new(0),
            evicting: Mutex::default(),
            full: AtomicBool::new(false),
            squeezed: Mutex::default(),
            complained: Mutex::default(),
            bell: Arc::default(),
            places: Mutex::default(),
            background: Semaphore::new(BACKGROUND),
            foreground: Semaphore::new(FOREGROUND),
            memory: Semaphore::new(memory_kib as usize),
            memory_kib,
            urgent: watch::Sender::new(0),
            flying: watch::Sender::new(0),
            ingests: Ingests::default(),
            ingesting: Semaphore::new(INGESTS),
            _lock: lock,
        });
        space.account(0);
        let (bell, weak) = (space.bell.clone(), Arc::downgrade(&space));
        std::thread::Builder::new()
            .name("cache-janitor".into())
            .spawn(move || janitor(&bell, &weak))
            .map_err(io_error(dir, "start the janitor thread"))?;
        if used > space.high {
            space.ring();
        }
        Ok(space)
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.dir.join("blobs")
    }

    /// Waits until a fill that holds `bytes` may begin. One that is larger than the whole bound goes alone.
    pub(super) async fn memory(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        acquire(&self.memory, self.memory_kib, bytes).await
    }

    /// The share of a place.
    pub(super) fn place(&self, name: String) -> Arc<PlaceShare> {
        let mut places = lock(&self.places);
        if let Some(share) = places.get(&name).and_then(Weak::upgrade) {
            return share;
        }
        places.retain(|_, share| share.strong_count() > 0);
        let memory_kib = (self.memory_kib / PART_OF_ONE as u32).max(1);
        let share = Arc::new(PlaceShare {
            foreground: Semaphore::new(FOREGROUND / PART_OF_ONE),
            memory: Semaphore::new(memory_kib as usize),
            memory_kib,
        });
        places.insert(name, Arc::downgrade(&share));
        share
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Changes the count of used bytes.
    pub(super) fn account(&self, change: i64) {
        let before = self.used.fetch_add(change as u64, Ordering::Relaxed);
        metrics().cache_used_bytes.set(before.wrapping_add(change as u64) as f64);
    }

    /// The blob of a key. Its file is shared with all who have it open; what is missing, each fetches from where it has it, with its own login.
    pub(super) fn blob(
        self: &Arc<Self>,
        key: CacheKey,
        bounds: Arc<[u64]>,
        filler: Arc<dyn SpanFiller>,
    ) -> Result<Arc<CachedBlob>, CacheError> {
        check_bounds(&bounds, &*filler)?;
        let mut known = lock(&self.known);
        let entry = known.entry(key).or_default();
        let other = || CacheError::Corrupt {
            what: filler.describe(),
            detail: "its spans are not those that are being read under the same key".into(),
        };
        let store = match entry.store.upgrade() {
            Some(store) if store.bounds == bounds => store,
            Some(_) => return Err(other()),
            None => {
                let opened = Store::open(&self.blobs(), key, bounds, entry.bytes.clone());
                let (store, error) = opened.map_err(io_error(&store::paths(&self.blobs(), &key).0, "open"))?;
                if let Some(error) = error {
                    self.complain(&error);
                }
                let store = Arc::new(store);
                self.measure(&store);
                store
            }
        };
        entry.last_used = Some(SystemTime::now());
        entry.store = Arc::downgrade(&store);
        Ok(Arc::new(CachedBlob::new(self.clone(), store, filler)))
    }

    /// Takes over a finished data file and its marks; `false`: the key is there already, or it can't be done.
    pub(super) fn adopt(&self, key: CacheKey, data: &Path, map: &Path, bytes: u64) -> bool {
        let mut known = lock(&self.known);
        if known.contains_key(&key) {
            return false;
        }
        let (data_to, map_to) = store::paths(&self.blobs(), &key);
        let moved = data_to.parent().map_or(Ok(()), std::fs::create_dir_all);
        let moved = moved.and_then(|()| std::fs::rename(data, &data_to)).and_then(|()| std::fs::rename(map, &map_to));
        if let Err(error) = moved {
            self.complain(&error);
            let _ = std::fs::remove_file(&data_to);
            return false;
        }
        let bytes = Arc::new(AtomicU64::new(bytes));
        known.insert(key, Known { bytes, last_used: Some(SystemTime::now()), ..Known::default() });
        true
    }

    /// Whether `bytes` more may be stored; makes room for them first. Blocks while it evicts.
    pub(super) fn room_for(&self, bytes: u64) -> bool {
        if self.used().saturating_add(bytes) > self.high {
            self.ring();
        }
        if self.used().saturating_add(bytes) > self.max {
            self.evict(self.low);
        }
        self.used().saturating_add(bytes) <= self.max
    }

    /// A span was written: it counts, and its store must be brought to the disk.
    pub(super) fn wrote(&self, store: &Arc<Store>, bytes: u64) {
        self.account(bytes as i64);
        lock(&self.dirty).entry(store.key).or_insert_with(|| store.clone());
        if self.unsynced.fetch_add(bytes, Ordering::Relaxed) + bytes >= UNSYNCED_MAX {
            self.ring();
        }
    }

    /// A write failed: counted, logged once a minute, and if the disk is full, room is made on it.
    pub(super) fn write_failed(&self, error: &io::Error) {
        self.complain(error);
        if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
            self.full.store(true, Ordering::Relaxed);
            self.ring();
        }
    }

    fn complain(&self, error: &io::Error) {
        let mut last = lock(&self.complained);
        if last.is_none_or(|at| at.elapsed() >= MINUTE) {
            *last = Some(Instant::now());
            tracing::warn!(
                dir = %self.dir.display(),
                %error,
                "the cache can't store what was fetched, reads go on without it; free space on its disk or lower cache.maxBytes"
            );
        }
    }

    fn ring(&self) {
        lock(&self.bell.0).rung = true;
        self.bell.1.notify_one();
    }

    /// Brings bytes, then marks, of all blobs to the disk.
    pub(super) fn flush(&self) {
        let dirty = std::mem::take(&mut *lock(&self.dirty));
        self.unsynced.store(0, Ordering::Relaxed);
        for store in dirty.into_values() {
            if let Err(error) = store.flush() {
                self.complain(&error);
            }
            self.measure(&store);
        }
    }

    /// Takes the file system's count of what a store uses.
    fn measure(&self, store: &Store) {
        if let Ok(real) = store.measure() {
            let before = store.allocated.swap(real, Ordering::Relaxed);
            self.account(real.wrapping_sub(before) as i64);
        }
    }

    /// The janitor's round.
    pub(super) fn tick(&self) {
        self.flush();
        self.stamp();
        self.drop_pages();
        if self.full.swap(false, Ordering::Relaxed) {
            let mut last = lock(&self.squeezed);
            if last.is_none_or(|at| at.elapsed() >= MINUTE) {
                *last = Some(Instant::now());
                drop(last);
                self.evict((u128::from(self.used()) * u128::from(self.low_percent) / 100) as u64);
            }
        }
        if self.used() > self.high {
            self.evict(self.low);
        }
    }

    /// Notes which blobs were read, at most once a minute on disk.
    fn stamp(&self) {
        let now = SystemTime::now();
        for known in lock(&self.known).values_mut() {
            let Some(store) = known.store.upgrade() else { continue };
            if store.used.swap(false, Ordering::Relaxed) {
                known.last_used = Some(now);
                let due = known.stamped.is_none_or(|at| now.duration_since(at).is_ok_and(|age| age >= MINUTE));
                if due {
                    known.stamped = Some(now);
                    store.stamp(now);
                }
            }
        }
    }

    /// Gives the page cache of our files back. What readers had is in the pages of their own mounts.
    fn drop_pages(&self) {
        let open: Vec<_> = lock(&self.known).values().filter_map(|known| known.store.upgrade()).collect();
        open.iter().for_each(|store| store.drop_pages());
    }

    /// Evicts down to `target` bytes: first blobs that nobody has open, least recently used first; then spans of open
    /// ones that were not read of late, then any.
    pub(super) fn evict(&self, target: u64) {
        let _one = lock(&self.evicting);
        let before = self.used();
        if before <= target {
            return;
        }
        self.evict_closed(target);
        for cold in [true, false] {
            if self.used() <= target {
                break;
            }
            self.evict_open(target, cold);
        }
        metrics().cache_evicted_bytes.inc_by(before.saturating_sub(self.used()));
    }

    fn evict_closed(&self, target: u64) {
        let mut closed: Vec<_> = lock(&self.known)
            .iter()
            .filter(|(_, known)| known.store.strong_count() == 0)
            .map(|(key, known)| (known.last_used, *key))
            .collect();
        closed.sort_by_key(|(used, _)| *used);
        for (_, key) in closed {
            if self.used() <= target {
                return;
            }
            // Out of the way under the lock, so that nobody opens it meanwhile; deleting a large file takes time.
            let trash = self.dir.join("trash").join(key.0.hex());
            let bytes = {
                let mut known = lock(&self.known);
                match known.get(&key) {
                    Some(entry) if entry.store.strong_count() == 0 => {}
                    _ => continue,
                }
                let (data, map) = store::paths(&self.blobs(), &key);
                // First the marks, for good: then no crash brings them back beside another file of that name.
                let cleared = OpenOptions::new().write(true).open(&map).and_then(|map| {
                    map.set_len(0)?;
                    map.sync_data()
                });
                let gone =
                    cleared.and_then(|()| std::fs::remove_file(&map)).and_then(|()| std::fs::rename(&data, &trash));
                if let Err(error) = gone
                    && error.kind() != io::ErrorKind::NotFound
                {
                    self.complain(&error);
                    continue;
                }
                known.remove(&key).map_or(0, |entry| entry.bytes.load(Ordering::Relaxed))
            };
            let _ = std::fs::remove_file(&trash);
            self.account(-(bytes as i64));
        }
    }

    fn evict_open(&self, target: u64, cold: bool) {
        let mut open: Vec<_> =
            lock(&self.known).values().filter_map(|known| Some((known.last_used, known.store.upgrade()?))).collect();
        open.sort_by_key(|(used, _)| *used);
        for (_, store) in open {
            let excess = self.used().saturating_sub(target);
            if excess == 0 {
                return;
            }
            let mut bytes = 0;
            let spans: Vec<u32> = store
                .evictable(cold)
                .into_iter()
                .take_while(|ix| {
                    let enough = bytes >= excess;
                    let span = store.span(*ix);
                    bytes += span.end - span.start;
                    !enough
                })
                .collect();
            if let Err(error) = store.evict(&spans) {
                self.complain(&error);
            }
            self.measure(&store);
        }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        lock(&self.bell.0).stop = true;
        self.bell.1.notify_one();
        self.flush();
        self.stamp();
    }
}

fn janitor(bell: &(Mutex<Bell>, Condvar), space: &Weak<Space>) {
    loop {
        {
            let mut state = lock(&bell.0);
            if !state.rung && !state.stop {
                let waited = bell.1.wait_timeout(state, TICK);
                state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            }
            if state.stop {
                return;
            }
            state.rung = false;
        }
        match space.upgrade() {
            Some(space) => space.tick(),
            None => return,
        }
    }
}

/// Takes the directory's lock, waiting a moment for a predecessor that is just going.
fn take(lock: &File) -> rustix::io::Result<()> {
    let end = Instant::now() + LOCK_WAIT;
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(LOCK_WAIT / 50),
            result => return result,
        }
    }
}

/// Boundaries come from archives: n + 1 ascending offsets from 0, each span short enough to hold in memory.
fn check_bounds(bounds: &[u64], filler: &dyn SpanFiller) -> Result<(), CacheError> {
    let bad = |detail: String| Err(CacheError::Corrupt { what: filler.describe(), detail });
    if bounds.first() != Some(&0) || bounds.len() > u32::MAX as usize || bounds.last() > Some(&(i64::MAX as u64)) {
        return bad("span boundaries must start at 0 and be fewer than 2^32, below 2^63".into());
    }
    match bounds.windows(2).position(|b| b[0] >= b[1] || b[1] - b[0] > crate::inflate::MAX_SPAN) {
        Some(at) => bad(format!("span {at} is empty or longer than 64 MiB")),
        None => Ok(()),
    }
}

/// What an earlier process left. Halves of pairs are deleted.
fn scan(blobs: &Path) -> io::Result<HashMap<CacheKey, Known>> {
    let mut known = HashMap::new();
    for dir in std::fs::read_dir(blobs)? {
        let dir = dir?.path();
        let Some(head) = dir.file_name().and_then(|n| n.to_str()).map(str::to_owned) else { continue };
        for file in std::fs::read_dir(&dir)? {
            let path = file?.path();
            let key = path.file_stem().and_then(|stem| stem.to_str()).and_then(|tail| {
                let mut digest = [0; 32];
                hex::decode_to_slice(format!("{head}{tail}"), &mut digest).ok()?;
                Some(CacheKey(Digest(digest)))
            });
            let Some(key) = key else { continue };
            let (data, map) = store::paths(blobs, &key);
            match (std::fs::metadata(&data), std::fs::metadata(&map)) {
                (Ok(data), Ok(map)) => {
                    let bytes = Arc::new(AtomicU64::new((data.blocks() + map.blocks()) * 512));
                    let stamped = map.modified().ok();
                    known.insert(key, Known { bytes, last_used: stamped, stamped, ..Known::default() });
                }
                _ => {
                    let _ = std::fs::remove_file(&map);
                    let _ = std::fs::remove_file(&data);
                }
            }
        }
    }
    Ok(known)
}

fn prune_tables(tables: &Path) {
    let Ok(files) = std::fs::read_dir(tables) else { return };
    for file in files.flatten() {
        let age = file.metadata().and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > TABLE_AGE) {
            let _ = std::fs::remove_file(file.path());
        }
    }
}
