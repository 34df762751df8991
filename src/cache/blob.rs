//! One blob, as the filesystem reads it: hits from the file, misses through fills that readers share.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, TryFutureExt, TryStreamExt};
use tokio::sync::watch;

use super::flight::{self, Priority, Wanted};
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

impl Parts {
    /// Where the bytes of a span begin that were asked for, and their place in the answer.
    fn part(&mut self, span: &Range<u64>) -> (u64, &mut [u8]) {
        self.out.resize((self.range.end - self.range.start) as usize, 0);
        let (from, to) = (span.start.max(self.range.start), span.end.min(self.range.end));
        (from, &mut self.out[(from - self.range.start) as usize..(to - self.range.start) as usize])
    }

    /// Copies from a span that came.
    fn take(&mut self, span: &Range<u64>, bytes: &[u8]) {
        let (from, part) = self.part(span);
        let at = (from - span.start) as usize;
        part.copy_from_slice(&bytes[at..at + part.len()]);
    }
}

/// One blob, as the filesystem reads it. While one is held, the blob's file is not deleted; spans of it may be.
#[derive(Debug)]
pub struct CachedBlob {
    space: Arc<Space>,
    pub(super) store: Arc<Store>,
    filler: Arc<dyn SpanFiller>,
}

impl CachedBlob {
    pub(super) fn new(space: Arc<Space>, store: Arc<Store>, filler: Arc<dyn SpanFiller>) -> Self {
        Self { space, store, filler }
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
            // Each as soon as it is there: what waits for its turn to be copied would count for nobody's memory.
            let mut coming: FuturesUnordered<_> = if round < ROUNDS {
                let flights = self.want(parts.missing.iter().copied(), Priority::Foreground);
                let come = |Wanted { ix, outcome, foreign }| async move {
                    match landed(outcome).await {
                        Ok(filled) => Ok((ix, Some(filled.bytes))),
                        // In the next round with our own source and login.
                        Err(_) if foreign => Ok((ix, None)),
                        Err(error) => Err(error),
                    }
                };
                flights.into_iter().map(|wanted| come(wanted).boxed()).collect()
            } else {
                let fetch = |ix| self.fetch(ix).map_ok(move |bytes| (ix, Some(bytes))).boxed();
                parts.missing.iter().copied().map(fetch).collect()
            };
            let mut came = Vec::new();
            while let Some((ix, bytes)) = coming.try_next().await? {
                let Some(bytes) = bytes else { continue };
                let span = self.store.span(ix);
                // All of it within one span: no copy.
                if spans.len() == 1 {
                    return Ok(bytes.slice((range.start - span.start) as usize..(range.end - span.start) as usize));
                }
                parts.take(&span, &bytes);
                came.push(ix);
            }
            drop(coming);
            parts.missing.retain(|ix| !came.contains(ix));
            if !parts.missing.is_empty() {
                parts = self.assemble(parts).await?;
            }
            if parts.missing.is_empty() {
                break;
            }
        }
        Ok(parts.out.into())
    }

    /// Copies what is in the file.
    async fn assemble(&self, mut parts: Parts) -> Result<Parts, CacheError> {
        let store = self.store.clone();
        let copied = tokio::task::spawn_blocking(move || {
            let mut missing = std::mem::take(&mut parts.missing);
            missing.retain(|ix| {
                let (from, part) = parts.part(&store.span(*ix));
                !store.read_patiently(from, part)
            });
            Parts { missing, ..parts }
        });
        copied.await.map_err(|error| CacheError::Io {
            what: self.filler.describe(),
            detail: format!("the read was broken off: {error}"),
        })
    }

    /// Fetches a span past the cache.
    async fn fetch(&self, ix: u32) -> Result<Bytes, CacheError> {
        let span = self.store.span(ix);
        let held = self.filler.held(self.filler.cost(SpanIx(ix))).saturating_add(span.end - span.start);
        let _memory = self.space.memory(held).await;
        match self.filler.fill(ix..ix + 1).await?.pop() {
            Some(filled) if filled.bytes.len() as u64 == span.end - span.start => Ok(filled.bytes),
            _ => {
                let detail = format!("span {ix} came with another length");
                Err(CacheError::Corrupt { what: self.filler.describe(), detail })
            }
        }
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
            let start = self.store.span(first).start;
            // One fill at a time, so that a reader that comes meanwhile waits for no more than that.
            while end < left.end
                && cost < flight::COST_MAX
                && self.store.span(end).end - start <= flight::BYTES_MAX
                && !self.store.has(end)
            {
                cost = cost.saturating_add(self.filler.cost(SpanIx(end)));
                end += 1;
            }
            left.start = end;
            // The semaphore is never closed.
            let _permit = self.space.background.acquire().await;
            let _ = self.space.urgent.subscribe().wait_for(|n| *n == 0).await;
            for Wanted { outcome, .. } in self.want(first..end, Priority::Background) {
                landed(outcome).await?;
            }
        }
        Ok(())
    }

    /// Flights for those of `spans` that are not in the file, started where none is under way.
    fn want(&self, spans: impl Iterator<Item = u32>, priority: Priority) -> Vec<Wanted> {
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
