//! Blobs that are the chunks of a table of contents (eStargz, zstd:chunked): section 5.
//!
//! `number of such blobs | blobs`; a blob is `its number less the last one's | number of skips | skips`, a skip
//! `its span's number less the last one's | bytes`. All are varints; the first number of a list counts from 0.

use super::{ArchiveError, BlobTable, Reader as Bytes, corrupt, varint};

/// Most bytes that are inflated in vain before a chunk: as many as a span may have.
pub const MAX_SKIP: u64 = 64 << 20;

/// Makes a [`BlobTable`] one of chunks. Its spans are pieces of files that the layer's own table of contents names, with the digests
/// from there. What the tar has between them (headers, padding) is no part of the uncompressed blob, so that offsets in the blob are
/// *not* offsets in the tar. Each span is inflated from a stream's start of its own, or one that it shares with its neighbours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunks {
    /// By span, ascending: bytes that the stream yields before the span's first byte. Spans that are not listed start with
    /// their stream.
    pub skips: Vec<(u32, u64)>,
}

impl Chunks {
    /// Bytes that the stream yields before this span's first byte.
    pub fn skip(&self, span: u32) -> u64 {
        self.skips.binary_search_by_key(&span, |(ix, _)| *ix).ok().and_then(|at| self.skips.get(at)).map_or(0, |s| s.1)
    }

    /// What contradicts what, if anything; all else of the table has been checked.
    pub(super) fn check(&self, table: &BlobTable) -> Result<(), String> {
        if !self.skips.is_sorted_by(|a, b| a.0 < b.0) {
            return Err("the skips of its chunks are out of order".into());
        }
        if self.skips.last().is_some_and(|(ix, _)| *ix as usize >= table.spans.len()) {
            return Err("a skip of a chunk that is not there".into());
        }
        let mut skips = self.skips.iter().copied().peekable();
        // Where in which stream the last chunk ended.
        let mut last = None;
        for (at, span) in table.spans.iter().enumerate() {
            let skip = skips.next_if(|(ix, _)| *ix as usize == at).map_or(0, |(_, skip)| skip);
            if !span.starts_stream {
                return Err(format!("chunk {at} is not in a stream of its own"));
            }
            if skip > MAX_SKIP || last.is_some_and(|(coff, end)| coff == span.coff && skip < end) {
                return Err(format!("chunk {at} lies {skip} bytes into its stream"));
            }
            let end = table.spans.get(at + 1).map_or(table.ulen, |next| next.uoff);
            last = Some((span.coff, skip.saturating_add(end - span.uoff)));
        }
        Ok(())
    }
}

/// The section's bytes; none where no blob is one of chunks.
pub(super) fn encode(blobs: &[BlobTable]) -> Vec<u8> {
    let mut out = Vec::new();
    let listed = || blobs.iter().enumerate().filter_map(|(ix, blob)| Some((ix as u64, blob.chunks.as_ref()?)));
    if listed().next().is_none() {
        return out;
    }
    varint(&mut out, listed().count() as u64);
    let mut last = 0;
    for (ix, chunks) in listed() {
        varint(&mut out, ix - last);
        last = ix;
        varint(&mut out, chunks.skips.len() as u64);
        let mut before = 0;
        for (span, skip) in &chunks.skips {
            // A list that is out of order wraps here and is refused when it is read.
            varint(&mut out, u64::from(*span).wrapping_sub(before));
            varint(&mut out, *skip);
            before = u64::from(*span);
        }
    }
    out
}

/// Reads the section blob by blob.
pub(super) struct Reader<'a> {
    bytes: Bytes<'a>,
    /// Blobs that are still to come, and the number of the next one.
    left: usize,
    next: u64,
}

impl<'a> Reader<'a> {
    /// Of no bytes: no blob is one of chunks.
    pub(super) fn new(bytes: Bytes<'a>) -> Result<Self, ArchiveError> {
        let mut reader = Self { bytes, left: 0, next: 0 };
        if !reader.bytes.0.is_empty() {
            reader.left = reader.bytes.count(2)?;
            reader.step()?;
        }
        Ok(reader)
    }

    fn step(&mut self) -> Result<(), ArchiveError> {
        if self.left > 0 {
            let delta = self.bytes.varint()?;
            self.next = self.next.checked_add(delta).ok_or_else(|| corrupt("a blob of chunks that is not there"))?;
        }
        Ok(())
    }

    /// The chunks of blob `ix`; to be called once for each, ascending.
    pub(super) fn of(&mut self, ix: usize) -> Result<Option<Chunks>, ArchiveError> {
        if self.left == 0 || self.next != ix as u64 {
            return Ok(None);
        }
        let count = self.bytes.count(2)?;
        let mut skips = Vec::with_capacity(count);
        let mut span = 0_u64;
        for _ in 0..count {
            let (delta, skip) = (self.bytes.varint()?, self.bytes.varint()?);
            span = span.checked_add(delta).ok_or_else(|| corrupt("a skip of a chunk that is not there"))?;
            skips.push((u32::try_from(span).map_err(|_| corrupt("a skip of a chunk that is not there"))?, skip));
        }
        self.left -= 1;
        self.step()?;
        Ok(Some(Chunks { skips }))
    }

    /// Every blob that is listed was asked for, and nothing follows.
    pub(super) fn is_at_end(&self) -> bool {
        self.left == 0 && self.bytes.0.is_empty()
    }
}
