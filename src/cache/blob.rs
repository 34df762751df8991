//! One blob, as the filesystem reads it: hits from the file, misses through fills that readers share.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::watch;

use super::flight::{self, Priority};
use super::space::Space;
use super::store::{Outcome, Store};
use super::{CacheError, SpanFiller};
use crate::archive::SpanIx;

/// Rounds of a read that keeps losing to eviction what it has just found, before it fetches past the cache.
const ROUNDS: usize = 4;

/// A read under way.
struct Parts {
    range: Range<u64>,
    out: Vec<u8>,
    /// Spans whose bytes are not in `out` yet.
    missing: Vec<u32>,
}

/// One blob, as the filesystem reads it. While one is held, the blob's file is not deleted; spans of it may be.
#[derive(Debug)]
pub struct CachedBlob {
    space: Arc<Space>,
    store: Arc<Store>,
    filler: Arc<dyn SpanFiller>,
}

impl CachedBlob {
    pub(super) fn new(space: Arc<Space>, store: Arc<Store>, filler: Arc<dyn SpanFiller>) -> Self {
        Self { space, store, filler }
    }

    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Length of the uncompressed blob.
    pub fn len(&self) -> u64 {
        self.store.len()
    }

    /// Whether the blob has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it is, for messages.
    pub fn describe(&self) -> String {
        self.filler.describe()
    }

    /// The hit path: copies `buf.len()` bytes from `off` if every span they touch is here; never waits on the network.
    /// Returns whether it did. Costs a binary search, a look at the marks and one pread; allocates nothing and takes no
    /// lock that it would have to wait for.
    pub fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        self.store.read(off, buf)
    }

    /// Whether every byte of `range` was checked against a digest when it was last fetched. `false` for bytes that
    /// have not been fetched.
    pub fn is_verified(&self, range: Range<u64>) -> bool {
        let range = range.start..range.end.min(self.len());
        range.is_empty() || self.store.verified(self.store.spans(&range))
    }

    /// Reads, filling what is missing; joins fills in flight. Short only at the end of the blob. Reads go on
    /// uncached when the disk is full. Dropping the future does not stop a fill that has begun.
    pub async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        let range = off..off.saturating_add(len as u64).min(self.len());
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let spans = self.store.spans(&range);
        let mut parts = Parts { out: Vec::new(), missing: spans.clone().collect(), range: range.clone() };
        for round in 0.. {
            let mut came = BTreeMap::new();
            if round < ROUNDS {
                for (ix, flight) in self.want(parts.missing.iter().copied(), Priority::Foreground) {
                    came.insert(ix, landed(flight).await?.bytes);
                }
            } else {
                self.fetch(&parts.missing, &mut came).await?;
            }
            // All of it within one span that has just come: no copy.
            if let Some(bytes) = came.get(&spans.start)
                && spans.len() == 1
            {
                let start = self.store.span(spans.start).start;
                return Ok(bytes.slice((range.start - start) as usize..(range.end - start) as usize));
            }
            parts = self.assemble(parts, came).await?;
            if parts.missing.is_empty() {
                break;
            }
        }
        Ok(parts.out.into())
    }

    /// Copies from the spans that came and, for the others, from the file.
    async fn assemble(&self, mut parts: Parts, came: BTreeMap<u32, Bytes>) -> Result<Parts, CacheError> {
        let store = self.store.clone();
        let copied = tokio::task::spawn_blocking(move || {
            let Parts { out, missing, range } = &mut parts;
            out.resize((range.end - range.start) as usize, 0);
            missing.retain(|ix| {
                let span = store.span(*ix);
                let (from, to) = (span.start.max(range.start), span.end.min(range.end));
                let part = &mut out[(from - range.start) as usize..(to - range.start) as usize];
                match came.get(ix) {
                    Some(bytes) => {
                        part.copy_from_slice(&bytes[(from - span.start) as usize..(to - span.start) as usize]);
                        false
                    }
                    None => !store.read_patiently(from, part),
                }
            });
            parts
        });
        copied.await.map_err(|error| CacheError::Io {
            what: self.filler.describe(),
            detail: format!("the read was broken off: {error}"),
        })
    }

    /// Fetches spans past the cache.
    async fn fetch(&self, spans: &[u32], came: &mut BTreeMap<u32, Bytes>) -> Result<(), CacheError> {
        for ix in spans {
            let filled = self.filler.fill(*ix..*ix + 1).await?.pop();
            let span = self.store.span(*ix);
            match filled {
                Some(filled) if filled.bytes.len() as u64 == span.end - span.start => {
                    came.insert(*ix, filled.bytes);
                }
                _ => {
                    let detail = format!("span {ix} came with another length");
                    return Err(CacheError::Corrupt { what: self.filler.describe(), detail });
                }
            }
        }
        Ok(())
    }

    /// Fills a range without reading it. Has low priority: it waits while a reader waits for a fill.
    pub async fn prefetch(&self, range: Range<u64>) -> Result<(), CacheError> {
        let range = range.start..range.end.min(self.len());
        if range.is_empty() {
            return Ok(());
        }
        let mut left = self.store.spans(&range);
        while let Some(first) = left.by_ref().find(|ix| !self.store.has(*ix)) {
            let mut cost = self.filler.cost(SpanIx(first));
            let mut end = first + 1;
            while end < left.end && cost < flight::COST_MAX && !self.store.has(end) {
                cost = cost.saturating_add(self.filler.cost(SpanIx(end)));
                end += 1;
            }
            left.start = end;
            // The semaphore is never closed.
            let _permit = self.space.background.acquire().await;
            let _ = self.space.urgent.subscribe().wait_for(|n| *n == 0).await;
            for (_, flight) in self.want(first..end, Priority::Background) {
                landed(flight).await?;
            }
        }
        Ok(())
    }

    /// Flights for those of `spans` that are not in the file, started where none is under way.
    fn want(&self, spans: impl Iterator<Item = u32>, priority: Priority) -> Vec<(u32, watch::Receiver<Outcome>)> {
        flight::want(&self.space, &self.store, &self.filler, spans, priority)
    }
}

impl Drop for CachedBlob {
    fn drop(&mut self) {
        // The janitor notes the time of last use while the store is open; here it closes.
        if self.store.used.swap(false, Ordering::Relaxed) {
            self.store.stamp(std::time::SystemTime::now());
        }
    }
}

/// Waits for a flight.
async fn landed(mut flight: watch::Receiver<Outcome>) -> Result<super::Filled, CacheError> {
    let outcome = flight.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
    outcome.unwrap_or_else(|| Err(flight::abandoned()))
}
