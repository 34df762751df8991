//! Filling spans from a blob source by a span table.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::{CacheError, Filled, SpanFiller};
use crate::archive::{BlobTable, SpanIx};
use crate::inflate::{self, InflateError, SpanInflater, compressed_range};
use crate::metrics::metrics;
use crate::source::{BlobSource, SourceError};

/// Most bytes per request. Longer runs of compressed bytes are fetched and inflated piece by piece.
const REQUEST: u64 = 8 << 20;
/// Uncompressed bytes that lie in memory before they are handed on, whatever a little input inflates to.
pub(super) const STEP: u64 = 8 << 20;
/// Tries of a fill whose bytes turn out wrong: the second one excludes a slip on the way.
const TRIES: u32 = 2;

/// Fills spans of one blob: fetches the compressed bytes of neighbours in one request, inflates them off the async
/// threads, and lets nothing through that does not match its digest.
#[derive(Debug, Clone)]
pub struct TableFiller {
    /// The blob as stored.
    pub source: Arc<dyn BlobSource>,
    /// Its spans.
    pub table: Arc<BlobTable>,
}

/// Where verified spans go.
enum Sink {
    Collect(Vec<Filled>),
    Send(mpsc::Sender<Filled>),
}

impl Sink {
    /// `false`: nobody wants more.
    async fn put(&mut self, bytes: Bytes) -> bool {
        let filled = Filled { bytes, verified: true };
        match self {
            Self::Collect(spans) => {
                spans.push(filled);
                true
            }
            Self::Send(sender) => sender.send(filled).await.is_ok(),
        }
    }
}

/// Why a try failed.
enum Failure {
    /// The bytes are wrong: worth one more try.
    Wrong(InflateError),
    /// The source failed (it has tried again itself), or nobody wants the bytes any more.
    Final(CacheError),
}

impl TableFiller {
    /// Boundaries of the table's spans, as [`super::Cache::blob`] takes them.
    pub fn bounds(table: &BlobTable) -> Arc<[u64]> {
        table.spans.iter().map(|span| span.uoff).chain([table.ulen]).collect()
    }

    fn corrupt(&self, error: &InflateError) -> CacheError {
        let what = format!("{} (layer {})", self.source.describe(), self.table.digest);
        CacheError::Corrupt { what, detail: error.to_string() }
    }

    /// A request for the piece at `at`, under way.
    fn request(&self, at: u64, end: u64) -> Option<AbortOnDropHandle<Result<Bytes, SourceError>>> {
        let (source, to) = (self.source.clone(), end.min(at.saturating_add(REQUEST)));
        (at < to).then(|| AbortOnDropHandle::new(tokio::spawn(async move { source.read_range(at..to).await })))
    }

    /// Sends `spans` from the first one that is not there yet; `sent` says how far it came.
    async fn attempt(&self, spans: Range<u32>, sent: &mut u32, sink: &mut Sink) -> Result<(), Failure> {
        let left = spans.start + *sent..spans.end;
        let range = compressed_range(&self.table, left.clone()).map_err(Failure::Wrong)?;
        let mut inflater = SpanInflater::new(self.table.clone(), left).map_err(Failure::Wrong)?;
        let mut at = range.start;
        let mut ahead = self.request(at, range.end);
        while at < range.end {
            let to = range.end.min(at + REQUEST);
            let Some(request) = ahead.take() else { break };
            let fetched = request.await.map_err(|_| Failure::Final(super::flight::abandoned()))?;
            let fetched = fetched.map_err(|e| Failure::Final(e.into()))?;
            // The next piece comes while this one is inflated.
            ahead = self.request(to, range.end);
            if fetched.len() as u64 != to - at {
                let error = InflateError::Truncated {
                    compression: self.table.compression,
                    at: at.saturating_add(fetched.len() as u64),
                };
                return Err(Failure::Wrong(error));
            }
            let mut done = 0;
            let mut more = true;
            while more {
                let piece = fetched.clone();
                let work = tokio::task::spawn_blocking(move || {
                    let start = Instant::now();
                    let (mut spans, mut input) = (Vec::new(), &piece[done..]);
                    let result = inflater.push_some(&mut input, STEP, &mut |_, bytes| spans.push(bytes));
                    metrics().inflate_cpu_seconds.inc_by(start.elapsed().as_secs_f64());
                    (inflater, spans, piece.len() - input.len(), result)
                });
                let (back, spans, taken, result) =
                    work.await.map_err(|_| Failure::Final(super::flight::abandoned()))?;
                (inflater, done) = (back, taken);
                for bytes in spans {
                    if !sink.put(bytes.into()).await {
                        return Ok(());
                    }
                    *sent += 1;
                }
                more = result.map_err(Failure::Wrong)?;
            }
            at = to;
        }
        inflater.finish().map_err(Failure::Wrong)
    }

    async fn fill_with(&self, spans: Range<u32>, sink: &mut Sink) -> Result<(), CacheError> {
        let mut sent = 0;
        for tries in 1.. {
            match self.attempt(spans.clone(), &mut sent, sink).await {
                Ok(()) => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Wrong(error)) if tries >= TRIES => return Err(self.corrupt(&error)),
                Err(Failure::Wrong(error)) => {
                    tracing::warn!(what = %self.source.describe(), %error, "fetched bytes are wrong, fetching them again");
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl SpanFiller for TableFiller {
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
        let mut sink = Sink::Collect(Vec::with_capacity(spans.len().min(self.table.spans.len())));
        self.fill_with(spans, &mut sink).await?;
        Ok(match sink {
            Sink::Collect(spans) => spans,
            Sink::Send(_) => Vec::new(),
        })
    }

    async fn fill_each(&self, spans: Range<u32>, sink: mpsc::Sender<Filled>) -> Result<(), CacheError> {
        self.fill_with(spans, &mut Sink::Send(sink)).await
    }

    fn run(&self, span: SpanIx) -> Range<u32> {
        inflate::run_of(&self.table, span)
    }

    fn cost(&self, span: SpanIx) -> u64 {
        self.table.spans.get(span.0 as usize).map_or(0, |span| span.cend.saturating_sub(span.coff))
    }

    fn held(&self, cost: u64) -> u64 {
        // The piece that is inflated and the one that is on its way.
        cost.min(2 * REQUEST)
    }

    fn describe(&self) -> String {
        self.source.describe()
    }

    fn place(&self) -> String {
        self.source.place()
    }
}
