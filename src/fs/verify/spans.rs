//! Reading every span of a blob, each once, and going on behind those that are wrong.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::stored::Stored;
use super::{FileChecks, Verified};
use crate::archive::{BlobTable, SpanIx};
use crate::cache::fill::TableFiller;
use crate::cache::{CacheError, Filled, SpanFiller as _};
use crate::source::{BlobSource, SourceError};

/// Spans of their own that are asked for at once.
const SPANS_AT_ONCE: u32 = 8;

/// Checks all spans of a blob, and with `stored` the bytes around them too.
pub(super) async fn check_spans(
    table: &Arc<BlobTable>,
    source: &Arc<dyn BlobSource>,
    stored: Option<Arc<Stored>>,
    mut checks: FileChecks<'_>,
    progress: &(dyn Fn(u64) + Send + Sync),
    out: &mut Verified,
) -> Result<(), CacheError> {
    let source = stored.as_ref().map_or_else(|| Arc::clone(source), |stored| Arc::clone(stored) as Arc<dyn BlobSource>);
    let problems = out.problem_count;
    let filler = TableFiller { source, table: Arc::clone(table) };
    let length = |spans: Range<u32>| spans.map(|ix| table.bounds(SpanIx(ix))).map(|at| at.end - at.start).sum::<u64>();
    let count = u32::try_from(table.spans.len()).unwrap_or(u32::MAX);
    let mut next = 0;
    while next < count {
        let (mut left, is_run) = group(&filler, next, count);
        next = left.end;
        let mut failed = false;
        while !left.is_empty() {
            let mut good = 0;
            let take = |bytes: &[u8]| {
                checks.push(bytes);
                out.verified_bytes += bytes.len() as u64;
                progress(bytes.len() as u64);
                good += 1;
            };
            let error = match each(&filler, left.clone(), stored.as_deref(), take).await {
                Ok(()) => break,
                Err(error @ (CacheError::Corrupt { .. } | CacheError::Source(SourceError::Corrupt { .. }))) => error,
                Err(other) => return Err(other),
            };
            left.start += good;
            // A span with another digest may be followed by good ones. Where a second one fails at once, the stream can't be inflated
            // from there on, and nothing that is left of its run can be had.
            let lost = if is_run && failed && good == 0 { left.clone() } else { left.start..left.start + 1 };
            out.problem(match lost.len() {
                0 | 1 => error.to_string(),
                many => format!("{error}; nor can the {} spans after it be read", many - 1),
            });
            checks.skip(length(lost.clone()));
            progress(length(lost.clone()));
            (left.start, failed) = (lost.end, true);
        }
        if let Some(stored) = &stored {
            stored.fill_gaps().await?;
        }
    }
    checks.report(out);
    if let Some(stored) = stored {
        let digest = stored.finish().await?;
        // Spans that are wrong have been told.
        if digest != Some(table.digest) && out.problem_count == problems {
            let content = digest.map_or_else(|| format!("not {} bytes long", table.clen), |digest| digest.to_string());
            out.problem(format!("{} is {content}: bytes between its spans differ", filler.source.describe()));
        }
    }
    Ok(())
}

/// Spans from `next` on that are read together, and whether they are what is left of a run: one inflater goes through all of that, however
/// long it is, where each further one would begin at the run's start.
fn group(filler: &TableFiller, next: u32, count: u32) -> (Range<u32>, bool) {
    let run = filler.run(SpanIx(next));
    if run.len() > 1 && run.contains(&next) {
        return (next..run.end.min(count), true);
    }
    let end = (next + 1..count.min(next + SPANS_AT_ONCE)).find(|ix| filler.run(SpanIx(*ix)).len() > 1);
    (next..end.unwrap_or(count.min(next + SPANS_AT_ONCE)), false)
}

/// Hands each span on, in order, up to the first that is wrong.
async fn each(
    filler: &TableFiller,
    spans: Range<u32>,
    stored: Option<&Stored>,
    mut take: impl FnMut(&[u8]),
) -> Result<(), CacheError> {
    let (sink, mut source) = mpsc::channel::<Filled>(1);
    // Owns the receiver: where it fails, the filler can't send any more and stops.
    let taken = async move {
        while let Some(filled) = source.recv().await {
            take(&filled.bytes);
            // Nothing piles up behind bytes that no span needs.
            if let Some(stored) = stored {
                stored.fill_gaps().await?;
            }
        }
        Ok(())
    };
    let (sent, taken) = tokio::join!(filler.fill_each(spans, sink), taken);
    sent.and(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inflate::Indexer;
    use crate::source::fake::FakeSource;
    use crate::units::Compression;

    fn indexed(stored: &[u8], span: u64) -> Arc<BlobTable> {
        let mut indexer = Indexer::new(Compression::Zstd, span);
        indexer.push(stored, &mut |_| ()).unwrap();
        Arc::new(indexer.finish(&mut |_| ()).unwrap())
    }

    #[tokio::test]
    async fn a_frame_of_many_spans_is_fetched_and_inflated_once() {
        let content: Vec<u8> = (0..1_000_000_u32).flat_map(|i| (i % 70_001).to_le_bytes()).collect();
        let stored = zstd::bulk::compress(&content, 1).unwrap();
        let source = FakeSource::new("layer", stored.clone());
        let table = indexed(&stored, 64 << 10);
        let count = table.spans.len() as u32;
        assert!(count > 3 * SPANS_AT_ONCE);
        let filler = TableFiller { source: source.clone(), table };

        let (spans, is_run) = group(&filler, 0, count);
        assert_eq!((spans.clone(), is_run), (0..count, true));
        let mut read = Vec::new();
        each(&filler, spans, None, |bytes| read.extend_from_slice(bytes)).await.unwrap();
        assert!(read == content);
        assert!(source.bytes_read() <= stored.len() as u64);
        assert_eq!(group(&filler, 5, count), (5..count, true), "after a failure, the rest of it");
    }

    #[test]
    fn spans_of_their_own_go_together_up_to_the_next_long_frame() {
        let short = zstd::bulk::compress(&[7; 100 << 10], 1).unwrap();
        let long = zstd::bulk::compress(&[8; 400 << 10], 1).unwrap();
        let stored = [short.repeat(SPANS_AT_ONCE as usize + 2), long].concat();
        let table = indexed(&stored, 100 << 10);
        let (count, source) = (table.spans.len() as u32, FakeSource::new("layer", stored));
        let filler = TableFiller { source, table };
        let alone = SPANS_AT_ONCE + 2;
        assert_eq!(group(&filler, 0, count), (0..SPANS_AT_ONCE, false));
        assert_eq!(group(&filler, SPANS_AT_ONCE, count), (SPANS_AT_ONCE..alone, false));
        assert_eq!(group(&filler, alone, count), (alone..count, true));
    }
}
