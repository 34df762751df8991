//! Any bytes as a seek table: bounded, the same when written and read again, and no table makes resuming panic or hand out bytes
//! that its digest does not know.

use super::memory::bounded;
use crate::archive::{BlobTable, SeekTable, SpanIx};
use crate::inflate::{SpanInflater, compressed_range, inflate_span, run_of};
use crate::units::Digest;

/// Bytes of the table's head and of its directory of two sections.
const HEAD: usize = 16 + 2 * 24;
/// Longest span that is inflated here.
const MAX_SPAN: u64 = 1 << 20;

pub fn run(input: &[u8]) {
    check(input, input);
    // As two sections behind a directory that fits.
    let [split, parts @ ..] = input else { return };
    let spans = usize::from(*split) * parts.len() / 255;
    let mut bytes = SeekTable::default().encode();
    bytes.truncate(HEAD);
    for (section, offset, len) in [(0, HEAD, spans), (1, HEAD + spans, parts.len() - spans)] {
        let at = 16 + section * 24 + 8;
        bytes[at..at + 8].copy_from_slice(&(offset as u64).to_le_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&(len as u64).to_le_bytes());
    }
    bytes.extend_from_slice(parts);
    check(&bytes, &parts[spans..]);
}

fn check(bytes: &[u8], blob: &[u8]) {
    let Ok(table) = bounded(bytes.len(), || SeekTable::decode(bytes)) else { return };
    assert_eq!(SeekTable::decode(&table.encode()).as_ref().ok(), Some(&table));
    for of in &table.blobs {
        of.root();
        for ix in 0..of.spans.len() as u32 {
            let bounds = of.bounds(SpanIx(ix));
            assert!(bounds.start <= bounds.end && bounds.end <= of.ulen);
            assert!(bounds.is_empty() || of.span_at(bounds.start) == SpanIx(ix));
            of.window(SpanIx(ix));
            assert!(run_of(of, SpanIx(ix)).contains(&ix));
            let range = compressed_range(of, ix..ix + 1).expect("a range of a table that was decoded");
            assert!(range.end <= of.clen);
        }
        (0..of.spans.len().min(4) as u32).for_each(|ix| resume(of, ix, blob));
    }
}

/// Inflates a span out of bytes that may be anything.
fn resume(table: &BlobTable, ix: u32, blob: &[u8]) {
    let run = run_of(table, SpanIx(ix));
    let end = table.bounds(SpanIx(ix)).end;
    if end - table.bounds(SpanIx(run.start)).start > MAX_SPAN {
        return;
    }
    if let Ok(bytes) = inflate_span(table, SpanIx(ix), blob) {
        assert_eq!(Digest::of(&bytes), table.spans[ix as usize].digest);
    }
    let mut inflater = match SpanInflater::new(table, run.start..ix + 1) {
        Ok(inflater) => inflater,
        Err(_) => return,
    };
    for piece in blob.chunks(7) {
        let pushed = inflater.push(piece, &mut |ix, bytes| {
            assert_eq!(Digest::of(&bytes), table.spans[ix.0 as usize].digest);
        });
        if pushed.is_err() {
            return;
        }
    }
    let _ = inflater.finish();
}
