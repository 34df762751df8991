//! Fills in flight: each missing span is fetched once, whoever wants it, and whoever stops wanting it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::fill::STEP;
use super::space::Space;
use super::store::{Joined, Outcome, Store, lock};
use super::{CacheError, Filled, SpanFiller};
use crate::archive::SpanIx;
use crate::metrics::metrics;

/// Neighbours are joined into one fill up to this many fetched bytes …
pub(super) const COST_MAX: u64 = 4 << 20;
/// … and this many uncompressed ones, which lie in memory until they are written.
pub(super) const BYTES_MAX: u64 = 16 << 20;
/// Spans of a long run that wait for the disk.
const QUEUE: usize = 2;

/// Who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Priority {
    /// A reader.
    Foreground,
    /// Nobody yet.
    Background,
}

pub(super) fn abandoned() -> CacheError {
    CacheError::Io { what: "fill".into(), detail: "it was broken off; read again".into() }
}

/// Spans that go into one fill.
struct Batch {
    pending: BTreeMap<u32, watch::Sender<Outcome>>,
    /// Bytes that it fetches.
    cost: u64,
    /// Bytes that come of it.
    bytes: u64,
    /// Of its longest span.
    longest: u64,
    /// All that is missing of a run that shares one restart point: streamed.
    run: bool,
}

/// A span that is on its way.
pub(super) struct Wanted {
    pub(super) ix: u32,
    pub(super) outcome: watch::Receiver<Outcome>,
    /// Another filler fetches it: if that fails, ours may succeed.
    pub(super) foreign: bool,
}

/// Flights for those of `spans` (ascending) that are not in the file, started where none is under way.
pub(super) fn want(
    space: &Arc<Space>,
    store: &Arc<Store>,
    filler: &Arc<dyn SpanFiller>,
    spans: impl Iterator<Item = u32>,
    priority: Priority,
) -> Vec<Wanted> {
    let own = Arc::as_ptr(filler).cast::<()>().addr();
    let known = |ix: u32, (outcome, whose): &Joined| Wanted { ix, outcome: outcome.clone(), foreign: *whose != own };
    let mut wanted = Vec::new();
    let mut batches: Vec<Batch> = Vec::new();
    {
        let mut flights = lock(&store.flights);
        for ix in spans {
            // Under the lock: a flight marks its span before it leaves the list.
            if store.has(ix) {
                continue;
            }
            if let Some(flight) = flights.get(&ix) {
                wanted.push(known(ix, flight));
                continue;
            }
            let run = filler.run(SpanIx(ix));
            let run = if run.contains(&ix) { run.start..run.end.min(store.count()) } else { ix..ix + 1 };
            let is_run = run.len() > 1;
            for ix in run {
                if store.has(ix) || flights.contains_key(&ix) {
                    continue;
                }
                let sender = watch::Sender::new(None);
                flights.insert(ix, (sender.subscribe(), own));
                let span = store.span(ix);
                let (cost, bytes) = (filler.cost(SpanIx(ix)), span.end - span.start);
                match batches.last_mut() {
                    Some(batch)
                        if batch.run == is_run
                            && batch.pending.last_key_value().is_some_and(|(last, _)| is_run || last + 1 == ix)
                            && (is_run
                                || batch.cost.saturating_add(cost) <= COST_MAX && batch.bytes + bytes <= BYTES_MAX) =>
                    {
                        batch.pending.insert(ix, sender);
                        // The spans of a run share what they fetch, from the restart point on.
                        batch.cost = if is_run { batch.cost.max(cost) } else { batch.cost + cost };
                        batch.bytes += bytes;
                        batch.longest = batch.longest.max(bytes);
                    }
                    _ => {
                        let pending = BTreeMap::from([(ix, sender)]);
                        batches.push(Batch { pending, cost, bytes, longest: bytes, run: is_run });
                    }
                }
            }
            if let Some(flight) = flights.get(&ix) {
                wanted.push(known(ix, flight));
            }
        }
    }
    for Batch { pending, cost, bytes, longest, run } in batches {
        // A run is handed on as it comes: what is inflated in one step, what waits for the disk, and the span in the making.
        let out = if run { bytes.min(STEP + (QUEUE as u64 + 3) * longest) } else { bytes };
        let memory = filler.held(cost).saturating_add(out);
        let flight = Flight {
            space: space.clone(),
            store: store.clone(),
            pending,
            failed: None,
            memory,
            urgent: priority == Priority::Foreground,
        };
        space.flying.send_modify(|n| *n += 1);
        if flight.urgent {
            space.urgent.send_modify(|n| *n += 1);
        }
        tokio::spawn(fly(flight, filler.clone(), run));
    }
    wanted
}

/// One fill under way. However it ends, its waiters are told and its spans leave the list.
struct Flight {
    space: Arc<Space>,
    store: Arc<Store>,
    pending: BTreeMap<u32, watch::Sender<Outcome>>,
    failed: Option<CacheError>,
    /// Most bytes that it holds.
    memory: u64,
    urgent: bool,
}

impl Drop for Flight {
    fn drop(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        {
            let mut flights = lock(&self.store.flights);
            pending.keys().for_each(|ix| drop(flights.remove(ix)));
        }
        let error = self.failed.take().unwrap_or_else(abandoned);
        for sender in pending.into_values() {
            sender.send_replace(Some(Err(error.clone())));
        }
        if self.urgent {
            self.space.urgent.send_modify(|n| *n -= 1);
        }
        self.space.flying.send_modify(|n| *n -= 1);
    }
}

async fn fly(mut flight: Flight, filler: Arc<dyn SpanFiller>, run: bool) {
    let space = flight.space.clone();
    let share = space.place(filler.place());
    // The semaphores are never closed. Its place's share first: who waits there holds nothing of what is for all.
    let _part = if flight.urgent { share.foreground.acquire().await.ok() } else { None };
    let _part_of_memory = share.memory(flight.memory).await;
    let _slot = if flight.urgent { space.foreground.acquire().await.ok() } else { None };
    let _memory = space.memory(flight.memory).await;
    let (Some((first, _)), Some((last, _))) = (flight.pending.first_key_value(), flight.pending.last_key_value())
    else {
        return;
    };
    let spans = *first..*last + 1;
    let result =
        if run { stream(&mut flight, &*filler, spans).await } else { at_once(&mut flight, &*filler, spans).await };
    flight.failed = result.err();
}

fn check(flight: &Flight, filler: &dyn SpanFiller, ix: u32, filled: &Filled) -> Result<(), CacheError> {
    let span = flight.store.span(ix);
    let (want, got) = (span.end - span.start, filled.bytes.len() as u64);
    if want == got {
        return Ok(());
    }
    Err(CacheError::Corrupt { what: filler.describe(), detail: format!("span {ix} has {want} bytes, {got} came") })
}

/// Neighbours in one request: nothing is taken before all of it is right.
async fn at_once(flight: &mut Flight, filler: &dyn SpanFiller, spans: Range<u32>) -> Result<(), CacheError> {
    let filled = filler.fill(spans.clone()).await?;
    if filled.len() != spans.len() {
        let detail = format!("{} spans were asked for, {} came", spans.len(), filled.len());
        return Err(CacheError::Corrupt { what: filler.describe(), detail });
    }
    for (ix, filled) in spans.clone().zip(&filled) {
        check(flight, filler, ix, filled)?;
    }
    // All readers first, then the disk.
    for (ix, filled) in spans.clone().zip(&filled) {
        tell(flight, ix, filled);
    }
    for (ix, filled) in spans.zip(filled) {
        keep(flight, ix, filled).await;
    }
    Ok(())
}

/// A long run, span by span as it comes.
async fn stream(flight: &mut Flight, filler: &dyn SpanFiller, spans: Range<u32>) -> Result<(), CacheError> {
    let (sink, mut source) = mpsc::channel(QUEUE);
    let take = async {
        let mut next = spans.start;
        // Dropped at the end of this block: then the filler can't send and stops.
        let source = &mut source;
        while let Some(filled) = source.recv().await {
            let ix = next;
            next += 1;
            if !spans.contains(&ix) {
                let detail = format!("more spans came than the {} asked for", spans.len());
                return Err(CacheError::Corrupt { what: filler.describe(), detail });
            }
            check(flight, filler, ix, &filled)?;
            tell(flight, ix, &filled);
            let kept = keep(flight, ix, filled).await;
            // With nowhere to keep them and nobody waiting, the rest is not worth the network.
            if !kept && flight.pending.values().all(|sender| sender.receiver_count() <= 1) {
                source.close();
                return Ok(());
            }
        }
        if next < spans.end { Err(abandoned()) } else { Ok(()) }
    };
    let (sent, taken) = tokio::join!(filler.fill_each(spans.clone(), sink), take);
    sent.and(taken)
}

fn tell(flight: &Flight, ix: u32, filled: &Filled) {
    if let Some(sender) = flight.pending.get(&ix) {
        flight.store.served(ix, filled.verified);
        sender.send_replace(Some(Ok(filled.clone())));
    }
}

/// Writes a span to the file if it can be, and ends its flight. Returns whether it is kept.
async fn keep(flight: &mut Flight, ix: u32, filled: Filled) -> bool {
    let Some(sender) = flight.pending.remove(&ix) else { return true };
    let (space, store) = (flight.space.clone(), flight.store.clone());
    let written = tokio::task::spawn_blocking(move || {
        let len = filled.bytes.len() as u64;
        let kept = if !space.room_for(len) {
            false
        } else {
            match store.write(ix, &filled) {
                Ok(()) => {
                    space.wrote(&store, len);
                    true
                }
                Err(error) => {
                    space.write_failed(&error);
                    false
                }
            }
        };
        if !kept {
            metrics().cache_uncached_reads.inc();
        }
        kept
    });
    let kept = written.await.unwrap_or(false);
    // Marked first, then off the list: nobody fetches it again in between.
    lock(&flight.store.flights).remove(&ix);
    drop(sender);
    kept
}
