//! One blob's two files: its bytes, sparse, and the marks that say which spans are there.
//!
//! The rules that keep a reader from ever seeing a byte that is not the span's:
//!
//! - a span's mark in memory is set after all its bytes are written, and cleared before a hole is punched;
//! - readers hold [`Store::reading`] shared from looking at the marks to the end of the copy, the evictor holds it
//!   alone while it clears marks: after that nobody reads what it punches;
//! - bytes, marks on disk and holes are written under [`Store::writing`], so that a hole never swallows a new fill;
//! - marks reach the disk after an fdatasync of the bytes, and are gone from the disk (fdatasync of the map) before
//!   a hole is punched. A crash can lose marks, never invent them.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

use rustix::fs::{Advice, FallocateFlags};
use tokio::sync::watch;

use super::{CacheError, CacheKey, Filled};
use crate::units::Digest;

const MAGIC: &[u8; 8] = b"CLIPMAP\x01";
/// Magic, number of spans, length, geometry digest, 8 bytes in reserve.
const HEADER: usize = 64;
/// Reads from this size on drop the file's pages behind them: the reader's own page cache holds those bytes then.
const DROP_BEHIND: usize = 128 << 10;

/// What waiters of a fill see: nothing yet, the bytes, or why there are none.
pub(super) type Outcome = Option<Result<Filled, CacheError>>;

/// A flight that may be joined, and whose it is: by the address of the filler, which is one of each blob that is open.
pub(super) type Joined = (watch::Receiver<Outcome>, usize);

/// A set of spans, changed without locks.
#[derive(Debug)]
pub(super) struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(words: &[u64]) -> Self {
        Self(words.iter().map(|w| AtomicU64::new(*w)).collect())
    }

    pub(super) fn has(&self, ix: u32) -> bool {
        self.0.get(ix as usize / 64).is_some_and(|w| w.load(Ordering::Acquire) >> (ix % 64) & 1 == 1)
    }

    fn set(&self, ix: u32, on: bool) {
        if let Some(word) = self.0.get(ix as usize / 64) {
            match on {
                true => word.fetch_or(1 << (ix % 64), Ordering::Release),
                false => word.fetch_and(!(1 << (ix % 64)), Ordering::Release),
            };
        }
    }

    /// As `set`, for a bit that is mostly set already: no write then, so no cache line is fought over.
    fn mark(&self, ix: u32) {
        if !self.has(ix) {
            self.set(ix, true);
        }
    }
}

#[derive(Debug)]
struct Files {
    data: File,
    map: File,
}

/// What is written under the lock.
#[derive(Debug, Default)]
struct Writing {
    /// Marks as they are on disk.
    durable: Vec<u64>,
    /// Spans whose bytes may not be on disk yet.
    unsynced: Vec<u32>,
    /// Goes up with each eviction: a flush that ran beside one starts over.
    evictions: u64,
}

/// The state of one key, shared by all who read it.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) key: CacheKey,
    pub(super) bounds: Arc<[u64]>,
    /// Disk space, as far as known. Shared with the registry, which outlives us.
    pub(super) allocated: Arc<AtomicU64>,
    /// Fills in flight.
    pub(super) flights: Mutex<HashMap<u32, Joined>>,
    /// Read since the janitor looked last.
    pub(super) used: AtomicBool,
    /// `None`: the disk has no room even for the files; everything is served uncached.
    files: Option<Files>,
    present: Bits,
    verified: Bits,
    /// Present, and the bytes are on disk.
    synced: Bits,
    /// Read since the evictor passed last.
    touched: Bits,
    /// Written or read since the janitor passed last: the page cache may hold some of it.
    warm: Bits,
    /// As `warm`, at the time before.
    cooling: Bits,
    reading: RwLock<()>,
    writing: Mutex<Writing>,
}

/// Digest of span boundaries.
pub(super) fn geometry(bounds: &[u64]) -> Digest {
    let bytes: Vec<u8> = bounds.iter().flat_map(|b| b.to_le_bytes()).collect();
    Digest::of(&bytes)
}

/// Where a key's files lie: data and map.
pub(super) fn paths(blobs: &Path, key: &CacheKey) -> (PathBuf, PathBuf) {
    let hex = key.0.hex();
    let (head, tail) = hex.split_at(2);
    let dir = blobs.join(head);
    (dir.join(format!("{tail}.data")), dir.join(format!("{tail}.map")))
}

/// Number of words for the spans between `bounds`.
fn words(bounds: &[u64]) -> usize {
    bounds.len().saturating_sub(1).div_ceil(64)
}

/// Content of a map file: header, then present and verified marks.
fn map_bytes(bounds: &[u64], present: &[u64], verified: &[u64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + 16 * present.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&(bounds.len() as u64 - 1).to_le_bytes());
    out.extend_from_slice(&bounds.last().copied().unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&geometry(bounds).0);
    out.resize(HEADER, 0);
    present.iter().chain(verified).for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
    out
}

/// A map file with every span present and verified.
pub(super) fn full_map(bounds: &[u64]) -> Vec<u8> {
    let spans = bounds.len() - 1;
    let all: Vec<u64> =
        (0..words(bounds)).map(|w| if spans - w * 64 >= 64 { u64::MAX } else { (1 << (spans - w * 64)) - 1 }).collect();
    map_bytes(bounds, &all, &all)
}

fn open_rw(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Whether the disk, rather than we, is at fault: then bytes are served uncached.
pub(super) fn degrades(error: &io::Error) -> bool {
    let codes = [libc::ENOSPC, libc::EDQUOT, libc::EIO, libc::EROFS];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

impl Files {
    /// Opens or makes the files; marks of another geometry, or beside data of another length, are dropped.
    fn open(blobs: &Path, key: &CacheKey, bounds: &[u64]) -> io::Result<(Self, Vec<u64>, Vec<u64>)> {
        let (data_path, map_path) = paths(blobs, key);
        if let Some(dir) = data_path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let (data, map) = (open_rw(&data_path)?, open_rw(&map_path)?);
        let (count, len) = (words(bounds), bounds.last().copied().unwrap_or(0));
        let blank = map_bytes(bounds, &vec![0; count], &vec![0; count]);
        let mut found = vec![0; blank.len()];
        let fits = data.metadata()?.len() == len
            && map.metadata()?.len() == found.len() as u64
            && map.read_exact_at(&mut found, 0).is_ok()
            && found[..HEADER] == blank[..HEADER];
        if !fits {
            map.set_len(0)?;
            data.set_len(0)?;
            data.set_len(len)?;
            map.write_all_at(&blank, 0)?;
            found = blank;
        }
        // The reader's own readahead comes in large requests already.
        let _ = rustix::fs::fadvise(&data, 0, None, Advice::Random);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |w, b| w << 8 | u64::from(*b));
        let mut marks = found[HEADER..].chunks_exact(8).map(word);
        let present = marks.by_ref().take(count).collect();
        Ok((Self { data, map }, present, marks.collect()))
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.data, flags, range.start, range.end - range.start)?)
    }

    /// Writes the given words of both sets of marks: verified first, so that a mark lost between says less.
    fn write_marks(&self, touched: impl Iterator<Item = usize>, durable: &[u64], verified: &Bits) -> io::Result<()> {
        for at in touched {
            let sure = verified.0.get(at).map_or(0, |w| w.load(Ordering::Acquire));
            let word = durable.get(at).copied().unwrap_or(0);
            self.map.write_all_at(&sure.to_le_bytes(), (HEADER + 8 * (durable.len() + at)) as u64)?;
            self.map.write_all_at(&word.to_le_bytes(), (HEADER + 8 * at) as u64)?;
        }
        Ok(())
    }
}

impl Store {
    /// From now on the file is one that can't be written, and reads as zeros: as a broken disk.
    #[cfg(test)]
    pub(super) fn break_disk(&self) {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let data = &self.files.as_ref().unwrap().data;
        // SAFETY: both descriptors are open here, and `data` stays the owner of its number, which now leads elsewhere.
        assert!(
            unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&full), std::os::fd::AsRawFd::as_raw_fd(data)) } >= 0
        );
    }

    /// Opens or makes the files of a key. A full or broken disk gives a store that keeps nothing, and the error.
    pub(super) fn open(
        blobs: &Path,
        key: CacheKey,
        bounds: Arc<[u64]>,
        allocated: Arc<AtomicU64>,
    ) -> io::Result<(Self, Option<io::Error>)> {
        let (files, present, verified, error) = match Files::open(blobs, &key, &bounds) {
            Ok((files, present, verified)) => (Some(files), present, verified, None),
            Err(error) if degrades(&error) => (None, vec![0; words(&bounds)], vec![0; words(&bounds)], Some(error)),
            Err(error) => return Err(error),
        };
        let store = Self {
            key,
            allocated,
            flights: Mutex::default(),
            used: AtomicBool::new(true),
            files,
            present: Bits::new(&present),
            verified: Bits::new(&verified),
            synced: Bits::new(&present),
            touched: Bits::new(&vec![0; present.len()]),
            warm: Bits::new(&vec![0; present.len()]),
            cooling: Bits::new(&vec![0; present.len()]),
            reading: RwLock::new(()),
            writing: Mutex::new(Writing { durable: present, ..Writing::default() }),
            bounds,
        };
        Ok((store, error))
    }

    pub(super) fn len(&self) -> u64 {
        self.bounds.last().copied().unwrap_or(0)
    }

    /// Number of spans.
    pub(super) fn count(&self) -> u32 {
        self.bounds.len().saturating_sub(1) as u32
    }

    /// The spans that hold any of the bytes `range` (not empty, within the blob).
    pub(super) fn spans(&self, range: &Range<u64>) -> Range<u32> {
        let first = self.bounds.partition_point(|b| *b <= range.start).saturating_sub(1);
        let end = self.bounds.partition_point(|b| *b < range.end);
        first as u32..end.min(self.count() as usize) as u32
    }

    /// First byte of a span, and one past its last.
    pub(super) fn span(&self, ix: u32) -> Range<u64> {
        let at = |i: usize| self.bounds.get(i).copied().unwrap_or(self.len());
        at(ix as usize)..at(ix as usize + 1)
    }

    pub(super) fn has(&self, ix: u32) -> bool {
        self.present.has(ix)
    }

    /// Whether the last bytes that were had of every span in `spans` were checked against a digest.
    pub(super) fn verified(&self, mut spans: Range<u32>) -> bool {
        spans.all(|ix| self.verified.has(ix))
    }

    /// Copies `buf.len()` bytes from `off` if all of them are here. Waits for nothing but the disk.
    pub(super) fn read(&self, off: u64, buf: &mut [u8]) -> bool {
        self.reading.try_read().is_ok_and(|guard| self.read_under(&guard, off, buf))
    }

    /// As `read`, but waits for an eviction to be through with the marks.
    pub(super) fn read_patiently(&self, off: u64, buf: &mut [u8]) -> bool {
        self.reading.read().is_ok_and(|guard| self.read_under(&guard, off, buf))
    }

    fn read_under(&self, _guard: &RwLockReadGuard<'_, ()>, off: u64, buf: &mut [u8]) -> bool {
        let end = off.saturating_add(buf.len() as u64);
        if buf.is_empty() || end > self.len() {
            return buf.is_empty();
        }
        let spans = self.spans(&(off..end));
        let Some(files) = &self.files else { return false };
        if !spans.clone().all(|ix| self.present.has(ix)) || files.data.read_exact_at(buf, off).is_err() {
            return false;
        }
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        spans.clone().for_each(|ix| self.touched.mark(ix));
        // Only pages that are clean go, and asking for others is dear. Small reads have neighbours that will be read next, and a
        // system call each would cost them more than the read: theirs go with the janitor.
        if buf.len() >= DROP_BEHIND && spans.clone().all(|ix| self.synced.has(ix)) {
            let len = std::num::NonZeroU64::new(buf.len() as u64);
            let _ = rustix::fs::fadvise(&files.data, off, len, Advice::DontNeed);
        } else {
            spans.for_each(|ix| self.warm.mark(ix));
        }
        true
    }

    /// Drops from the page cache what was neither written nor read since the last call but one, and is on the disk: the
    /// reader's own page cache holds what was read. Waits for nothing.
    pub(super) fn drop_pages(&self) {
        let Some(files) = &self.files else { return };
        let mut run: Option<Range<u64>> = None;
        let drop_run = |run: Option<Range<u64>>| {
            if let Some(run) = run {
                let len = std::num::NonZeroU64::new(run.end - run.start);
                let _ = rustix::fs::fadvise(&files.data, run.start, len, Advice::DontNeed);
            }
        };
        for (at, (warm, cooling)) in self.warm.0.iter().zip(&self.cooling.0).enumerate() {
            if warm.load(Ordering::Relaxed) == 0 && cooling.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let (now, before) = (warm.swap(0, Ordering::Relaxed), cooling.load(Ordering::Relaxed));
            let synced = self.synced.0.get(at).map_or(0, |w| w.load(Ordering::Relaxed));
            let mut cold = before & !now & synced;
            cooling.store(now | before & !cold, Ordering::Relaxed);
            while cold != 0 {
                let span = self.span(at as u32 * 64 + cold.trailing_zeros());
                cold &= cold - 1;
                match &mut run {
                    Some(run) if run.end == span.start => run.end = span.end,
                    _ => drop_run(run.replace(span)),
                }
            }
        }
        drop_run(run);
    }

    /// Remembers what is known of a span that is served without being kept.
    pub(super) fn served(&self, ix: u32, verified: bool) {
        if !self.present.has(ix) {
            self.verified.set(ix, verified);
        }
    }

    /// Writes a span and marks it. On an error nothing is marked.
    pub(super) fn write(&self, ix: u32, filled: &Filled) -> io::Result<()> {
        let range = self.span(ix);
        let files = self.files.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        if filled.bytes.len() as u64 != range.end - range.start {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a span of another length"));
        }
        let mut writing = lock(&self.writing);
        if self.present.has(ix) {
            return Ok(());
        }
        if let Err(error) = files.data.write_all_at(&filled.bytes, range.start) {
            let _ = files.punch(range);
            return Err(error);
        }
        self.allocated.fetch_add(filled.bytes.len() as u64, Ordering::Relaxed);
        self.verified.set(ix, filled.verified);
        self.touched.set(ix, true);
        self.warm.set(ix, true);
        self.used.store(true, Ordering::Relaxed);
        self.present.set(ix, true);
        writing.unsynced.push(ix);
        Ok(())
    }

    /// Brings bytes, then marks, to the disk. Waits for the disk. What does not get there is no longer here.
    pub(super) fn flush(&self) -> io::Result<()> {
        let Some(files) = &self.files else { return Ok(()) };
        loop {
            let (batch, evictions) = {
                let mut writing = lock(&self.writing);
                (std::mem::take(&mut writing.unsynced), writing.evictions)
            };
            if batch.is_empty() {
                return Ok(());
            }
            let synced = files.data.sync_data();
            if let Err(error) = synced {
                // The kernel drops pages that it could not write, and what is read in their place is whatever the disk has:
                // nothing that has not reached the disk by now counts as here.
                let lost = std::mem::take(&mut lock(&self.writing).unsynced);
                return self.evict(&batch.into_iter().chain(lost).collect::<Vec<_>>()).and(Err(error));
            }
            let mut writing = lock(&self.writing);
            if writing.evictions != evictions {
                let present = batch.into_iter().filter(|ix| self.present.has(*ix));
                let again: Vec<u32> = present.collect();
                writing.unsynced.extend(again);
                continue;
            }
            for ix in &batch {
                if let Some(word) = writing.durable.get_mut(*ix as usize / 64) {
                    *word |= 1 << (ix % 64);
                }
                self.synced.set(*ix, true);
            }
            let mut touched: Vec<usize> = batch.iter().map(|ix| *ix as usize / 64).collect();
            touched.sort_unstable();
            touched.dedup();
            return files.write_marks(touched.into_iter(), &writing.durable, &self.verified);
        }
    }

    /// Spans that can go: present, and not read since the last call (`cold`), which forgets that they were; else all
    /// present ones.
    pub(super) fn evictable(&self, cold: bool) -> Vec<u32> {
        (0..self.count())
            .filter(|ix| self.present.has(*ix))
            .filter(|ix| {
                let touched = self.touched.has(*ix);
                self.touched.set(*ix, false);
                !(cold && touched)
            })
            .collect()
    }

    /// Takes spans off the disk.
    pub(super) fn evict(&self, spans: &[u32]) -> io::Result<()> {
        let Some(files) = &self.files else { return Ok(()) };
        let mut writing = lock(&self.writing);
        writing.evictions += 1;
        {
            // Readers that have seen the marks are through once this is held.
            let _alone = self.reading.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            for ix in spans {
                self.present.set(*ix, false);
                self.synced.set(*ix, false);
            }
        }
        writing.unsynced.retain(|ix| self.present.has(*ix));
        let mut touched: Vec<usize> = spans.iter().map(|ix| *ix as usize / 64).collect();
        touched.sort_unstable();
        touched.dedup();
        for at in &touched {
            let still = self.present.0.get(*at).map_or(0, |w| w.load(Ordering::Acquire));
            if let Some(word) = writing.durable.get_mut(*at) {
                *word &= still;
            }
        }
        files.write_marks(touched.into_iter(), &writing.durable, &self.verified)?;
        files.map.sync_data()?;
        let mut runs: Vec<Range<u64>> = Vec::new();
        for ix in spans {
            let range = self.span(*ix);
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        runs.into_iter().try_for_each(|run| files.punch(run))
    }

    /// Disk space now, by the file system's own count.
    pub(super) fn measure(&self) -> io::Result<u64> {
        let Some(files) = &self.files else { return Ok(0) };
        Ok((files.data.metadata()?.blocks() + files.map.metadata()?.blocks()) * 512)
    }

    /// Stamps the map file with the time of last use, which is the order of eviction after a restart.
    pub(super) fn stamp(&self, now: std::time::SystemTime) {
        if let Some(files) = &self.files {
            let _ = files.map.set_modified(now);
        }
    }
}

/// Locks; a panic under the lock leaves nothing half done that matters (see the rules above).
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
