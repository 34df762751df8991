//! From the compressed bytes of some spans to their uncompressed bytes, each checked against its digest.

use std::borrow::Borrow;
use std::ops::Range;

use super::zstream::{Stop, Wrap, ZStream};
use super::{InflateError, MAX_SPAN, window, zstd_frame};
use crate::archive::{BlobTable, Span, SpanIx};
use crate::units::{Compression, Digest};

/// Bytes that are inflated and thrown away at once, before the first span that is wanted.
const SKIP: usize = 64 << 10;

fn bad_table(table: &BlobTable, detail: impl Into<String>) -> InflateError {
    InflateError::Corrupt { compression: table.compression, at: 0, detail: format!("span table: {}", detail.into()) }
}

fn span(table: &BlobTable, ix: u32) -> Result<&Span, InflateError> {
    table.spans.get(ix as usize).ok_or_else(|| bad_table(table, format!("no span {ix} of {}", table.spans.len())))
}

/// Length of a span, checked.
fn span_len(table: &BlobTable, ix: u32) -> Result<usize, InflateError> {
    let start = span(table, ix)?.uoff;
    let end = table.spans.get(ix as usize + 1).map_or(table.ulen, |s| s.uoff);
    match end.checked_sub(start) {
        Some(len) if len <= MAX_SPAN => Ok(len as usize),
        _ => Err(bad_table(table, format!("span {ix} reaches from byte {start} to {end}"))),
    }
}

fn same_restart(a: &Span, b: &Span) -> bool {
    (a.coff, a.bits, a.starts_stream) == (b.coff, b.bits, b.starts_stream)
}

/// The spans that share one restart point with `ix`, itself included: inflating any of them starts at the first one's
/// first byte. Mostly just `ix`; several where a frame or block is longer than two spans, so that whoever fills one
/// of them does well to fill them all. A span that the table does not have: empty. Costs one binary search.
pub fn run_of(table: &BlobTable, ix: SpanIx) -> Range<u32> {
    let at = ix.0 as usize;
    let Some(span) = table.spans.get(at) else { return 0..0 };
    // Compressed offsets ascend in every table that was decoded; in another one the run may come out too short.
    let from = table.spans[..at].partition_point(|s| !same_restart(s, span));
    let to = at + table.spans[at..].partition_point(|s| same_restart(s, span));
    from as u32..to as u32
}

/// The bytes of the stored blob that inflating `spans` needs.
pub fn compressed_range(table: &BlobTable, spans: Range<u32>) -> Result<Range<u64>, InflateError> {
    if spans.is_empty() {
        return Ok(0..0);
    }
    let (start, end) = (span(table, spans.start)?.coff, span(table, spans.end - 1)?.cend);
    if start > end || end > table.clen {
        return Err(bad_table(table, format!("spans {spans:?} lie at {start}..{end} of {} bytes", table.clen)));
    }
    Ok(start..end)
}

/// A decoder that was put on a restart point.
struct Resumed {
    compression: Compression,
    decoder: Decoder,
    /// Stored bytes taken so far, for messages.
    at: u64,
}

enum Decoder {
    None,
    Gzip {
        stream: ZStream,
        /// Bits of the first byte that belong to us, until that byte has come.
        prime: u8,
        /// The window, until the first byte has come.
        window: Vec<u8>,
        raw: bool,
        /// Bytes of a trailer still to be skipped: raw data can't be checked against it, its spans have digests.
        trailer: u8,
        between: bool,
    },
    /// And whether its last frame has ended.
    Zstd(zstd_safe::DCtx<'static>, bool),
}

impl Resumed {
    fn new(table: &BlobTable, span: &Span) -> Result<Self, InflateError> {
        let no_memory = || bad_table(table, "no memory for a decoder");
        let decoder = match table.compression {
            Compression::None => Decoder::None,
            Compression::Gzip => {
                let raw = !span.starts_stream;
                let stream = ZStream::new(if raw { Wrap::Raw } else { Wrap::Gzip }).ok_or_else(no_memory)?;
                let (at, len) = span.window;
                let packed = usize::try_from(at)
                    .ok()
                    .and_then(|at| table.windows.get(at..at.checked_add(len as usize)?))
                    .ok_or_else(|| bad_table(table, "a window lies outside"))?;
                let window = window::unpack(packed).ok_or_else(|| bad_table(table, "a window can't be unpacked"))?;
                let prime = if raw { span.bits } else { 0 };
                if prime > 7 {
                    return Err(bad_table(table, format!("a span starts with {prime} bits")));
                }
                let mut stream = stream;
                if raw && prime == 0 {
                    stream.set_window(&window);
                }
                Decoder::Gzip { stream, prime, window, raw, trailer: 0, between: false }
            }
            Compression::Zstd => Decoder::Zstd(zstd_frame::decoder().ok_or_else(no_memory)?, false),
        };
        Ok(Self { compression: table.compression, decoder, at: span.coff })
    }

    fn corrupt(&self, detail: impl Into<String>) -> InflateError {
        InflateError::Corrupt { compression: self.compression, at: self.at, detail: detail.into() }
    }

    /// After chunk `ix - 1`, on to chunk `ix`: the compressed bytes to pass over, and the uncompressed ones to skip then.
    fn go_to(&mut self, table: &BlobTable, ix: u32) -> Result<(u64, u64), InflateError> {
        let out_of_order = || bad_table(table, "chunks are out of order");
        let (before, next, skip) = (span(table, ix - 1)?, span(table, ix)?, lead(table, ix)?);
        if same_restart(before, next) {
            let end = lead(table, ix - 1)?.saturating_add(span_len(table, ix - 1)? as u64);
            return Ok((0, skip.checked_sub(end).ok_or_else(out_of_order)?));
        }
        let pass = next.coff.checked_sub(self.at).ok_or_else(out_of_order)?;
        *self = Self::new(table, next)?;
        Ok((pass, skip))
    }

    /// Takes from `input` and writes to `out` until one of them is used up. Returns the bytes written.
    fn read(&mut self, input: &mut &[u8], out: &mut [u8]) -> Result<usize, InflateError> {
        let mut written = 0;
        while written < out.len() {
            let (consumed, produced) = match self.step(input, &mut out[written..]) {
                Ok(step) => step,
                Err(detail) => return Err(self.corrupt(detail)),
            };
            *input = &input[consumed..];
            self.at += consumed as u64;
            written += produced;
            if consumed == 0 && produced == 0 {
                if input.is_empty() {
                    break;
                }
                return Err(self.corrupt("the decoder is stuck"));
            }
        }
        Ok(written)
    }

    /// The input has ended: in the middle of a stream?
    fn is_inside(&self) -> bool {
        match &self.decoder {
            Decoder::None => false,
            Decoder::Gzip { trailer, between, .. } => *trailer > 0 || !*between,
            Decoder::Zstd(_, ended) => !*ended,
        }
    }

    /// One step: bytes taken and bytes written; nothing of both means that input is needed.
    fn step(&mut self, input: &[u8], out: &mut [u8]) -> Result<(usize, usize), String> {
        match &mut self.decoder {
            Decoder::None => {
                let n = input.len().min(out.len());
                out[..n].copy_from_slice(&input[..n]);
                Ok((n, n))
            }
            Decoder::Zstd(decoder, ended) => {
                let step = zstd_frame::step(decoder, input, out)?;
                // Without input nothing begins after an end.
                *ended = step.ended || (*ended && step.consumed == 0);
                Ok((step.consumed, step.produced))
            }
            Decoder::Gzip { stream, prime, window, raw, trailer, between } => {
                if *prime > 0 {
                    let Some(first) = input.first() else { return Ok((0, 0)) };
                    stream.prime(*prime, *first);
                    stream.set_window(window);
                    *prime = 0;
                    return Ok((1, 0));
                }
                if *trailer > 0 {
                    let n = input.len().min(usize::from(*trailer));
                    *trailer -= n as u8;
                    return Ok((n, 0));
                }
                if *between {
                    if input.is_empty() {
                        return Ok((0, 0));
                    }
                    stream.reset(Wrap::Gzip);
                    (*raw, *between) = (false, false);
                }
                let step = stream.inflate(input, out, false)?;
                if step.stop == Stop::End {
                    (*trailer, *between) = (if *raw { 8 } else { 0 }, true);
                }
                Ok((step.consumed, step.produced))
            }
        }
    }
}

/// Bytes that inflating from a span's restart point yields before the span itself.
fn lead(table: &BlobTable, ix: u32) -> Result<u64, InflateError> {
    if let Some(chunks) = &table.chunks {
        return Ok(chunks.skip(ix));
    }
    let leader = span(table, run_of(table, SpanIx(ix)).start)?;
    span(table, ix)?.uoff.checked_sub(leader.uoff).ok_or_else(|| bad_table(table, "spans are out of order"))
}

/// Inflates neighbouring spans out of a stream of compressed bytes, each checked before it is handed on.
///
/// The input is the blob from [`compressed_range`]'s start, in pieces of any size. One decoder goes through all of
/// it, but for chunks: there one goes through each stream, and what lies between two chunks is thrown away. Memory: the span in
/// work and the decoder. `T` is `&BlobTable` or `Arc<BlobTable>`.
pub struct SpanInflater<T: Borrow<BlobTable>> {
    table: T,
    decoder: Option<Resumed>,
    /// Compressed bytes before the stream of the next span that are still to be thrown away.
    pass: u64,
    /// Uncompressed bytes before the next span that are still to be thrown away.
    skip: u64,
    next: u32,
    end: u32,
    /// The span in work and how much of it is there.
    bytes: Vec<u8>,
    filled: usize,
}

impl<T: Borrow<BlobTable>> SpanInflater<T> {
    /// For `spans` of `table`. The first one may lie in the middle of a run: what comes before it is inflated and
    /// thrown away.
    pub fn new(table: T, spans: Range<u32>) -> Result<Self, InflateError> {
        let mut it = Self {
            decoder: None,
            pass: 0,
            skip: 0,
            next: spans.start,
            end: spans.end,
            bytes: Vec::new(),
            filled: 0,
            table,
        };
        if !spans.is_empty() {
            let known: &BlobTable = it.table.borrow();
            span(known, spans.end - 1)?;
            let leader = span(known, run_of(known, SpanIx(spans.start)).start)?;
            let skip = lead(known, spans.start)?;
            let (decoder, bytes) = (Resumed::new(known, leader)?, vec![0; span_len(known, spans.start)?]);
            (it.skip, it.decoder, it.bytes) = (skip, Some(decoder), bytes);
        }
        Ok(it)
    }

    /// Takes compressed bytes; `sink` gets each span that is whole and right. Input after the last span is ignored.
    pub fn push(&mut self, mut input: &[u8], sink: &mut dyn FnMut(SpanIx, Vec<u8>)) -> Result<(), InflateError> {
        self.push_some(&mut input, u64::MAX, sink).map(drop)
    }

    /// As [`SpanInflater::push`], but stops once `limit` bytes or more have been handed on, so that a little input that
    /// inflates to gigabytes does not fill the memory. Returns whether there may be more: then call it again, with what is
    /// left of `input`, be that nothing.
    pub fn push_some(
        &mut self,
        input: &mut &[u8],
        limit: u64,
        sink: &mut dyn FnMut(SpanIx, Vec<u8>),
    ) -> Result<bool, InflateError> {
        let table = self.table.borrow();
        let Some(decoder) = &mut self.decoder else { return Ok(false) };
        let mut given = 0;
        while self.next < self.end && given < limit {
            if self.pass > 0 {
                let n = usize::try_from(self.pass).unwrap_or(usize::MAX).min(input.len());
                *input = &input[n..];
                self.pass -= n as u64;
            }
            if self.pass == 0 && self.skip > 0 {
                skip(decoder, &mut self.skip, input)?;
            }
            if self.pass > 0 || self.skip > 0 {
                return Ok(false);
            }
            self.filled += decoder.read(input, &mut self.bytes[self.filled..])?;
            if self.filled < self.bytes.len() {
                return Ok(false);
            }
            check(table, self.next, &self.bytes)?;
            let ix = SpanIx(self.next);
            self.next += 1;
            self.filled = 0;
            given += self.bytes.len() as u64;
            if self.next < self.end && table.chunks.is_some() {
                (self.pass, self.skip) = decoder.go_to(table, self.next)?;
            }
            let following = if self.next < self.end { vec![0; span_len(table, self.next)?] } else { Vec::new() };
            sink(ix, std::mem::replace(&mut self.bytes, following));
        }
        Ok(self.next < self.end)
    }

    /// Ends the input: an error if a span is missing.
    pub fn finish(self) -> Result<(), InflateError> {
        match &self.decoder {
            Some(decoder) if self.next < self.end => {
                Err(InflateError::Truncated { compression: decoder.compression, at: decoder.at })
            }
            _ => Ok(()),
        }
    }
}

fn skip(decoder: &mut Resumed, left: &mut u64, input: &mut &[u8]) -> Result<(), InflateError> {
    let mut scratch = vec![0; usize::try_from(*left).unwrap_or(SKIP).min(SKIP)];
    while *left > 0 {
        let want = usize::try_from(*left).unwrap_or(SKIP).min(SKIP);
        let n = decoder.read(input, &mut scratch[..want])?;
        if n == 0 {
            break;
        }
        *left -= n as u64;
    }
    Ok(())
}

fn check(table: &BlobTable, ix: u32, bytes: &[u8]) -> Result<(), InflateError> {
    if Digest::of(bytes) == span(table, ix)?.digest { Ok(()) } else { Err(InflateError::DigestMismatch { span: ix }) }
}

/// Inflates one span from `compressed` = bytes `span.coff..span.cend` of the blob, and checks its digest.
pub fn inflate_span(table: &BlobTable, ix: SpanIx, compressed: &[u8]) -> Result<Vec<u8>, InflateError> {
    let mut out = vec![0; span_len(table, ix.0)?];
    inflate_span_into(table, ix, compressed, &mut out)?;
    Ok(out)
}

/// [`inflate_span`] into the caller's buffer, which must be exactly as long as the span. On an error it holds zeros.
pub fn inflate_span_into(table: &BlobTable, ix: SpanIx, compressed: &[u8], out: &mut [u8]) -> Result<(), InflateError> {
    let result = fill_span(table, ix, compressed, out);
    if result.is_err() {
        out.fill(0);
    }
    result
}

fn fill_span(table: &BlobTable, ix: SpanIx, mut input: &[u8], out: &mut [u8]) -> Result<(), InflateError> {
    let len = span_len(table, ix.0)?;
    if out.len() != len {
        return Err(bad_table(table, format!("span {} has {len} bytes, the buffer {}", ix.0, out.len())));
    }
    let leader = span(table, run_of(table, ix).start)?;
    let mut decoder = Resumed::new(table, leader)?;
    let mut before = lead(table, ix.0)?;
    skip(&mut decoder, &mut before, &mut input)?;
    if before > 0 || decoder.read(&mut input, out)? < len {
        return Err(InflateError::Truncated { compression: table.compression, at: decoder.at });
    }
    check(table, ix.0, out)
}

/// Inflates a whole stream (gzip members, zstd frames) of at most `limit` uncompressed bytes, with no table of it. Allocates as
/// much as comes out, doubled at most; one more byte is an error.
pub fn inflate_whole(compression: Compression, mut input: &[u8], limit: usize) -> Result<Vec<u8>, InflateError> {
    let (diff_id, spans, windows) = (Digest([0; 32]), Vec::new(), Vec::new());
    let (clen, ulen) = (input.len() as u64, limit as u64);
    let empty = BlobTable { digest: diff_id, compression, clen, ulen, diff_id, spans, windows, chunks: None };
    let start = Span { uoff: 0, coff: 0, cend: clen, bits: 0, starts_stream: true, window: (0, 0), digest: diff_id };
    let mut decoder = Resumed::new(&empty, &start)?;
    let mut out = Vec::new();
    loop {
        let filled = out.len();
        let more = (limit + 1 - filled).min(filled.max(SKIP));
        out.resize(filled + more, 0);
        let n = decoder.read(&mut input, &mut out[filled..])?;
        out.truncate(filled + n);
        if out.len() > limit {
            return Err(decoder.corrupt(format!("it inflates to more than {limit} bytes")));
        }
        if n < more {
            break;
        }
    }
    if decoder.is_inside() {
        return Err(InflateError::Truncated { compression, at: decoder.at });
    }
    Ok(out)
}

/// Inflates neighbouring spans from one contiguous piece of the blob, bytes [`compressed_range`]. The decoder
/// goes on across their boundaries, which is faster than one span at a time; every span is checked against its
/// digest before
/// `sink` gets it.
pub fn inflate_spans(
    table: &BlobTable,
    spans: Range<u32>,
    compressed: &[u8],
    sink: &mut dyn FnMut(SpanIx, Vec<u8>),
) -> Result<(), InflateError> {
    let mut inflater = SpanInflater::new(table, spans)?;
    inflater.push(compressed, sink)?;
    inflater.finish()
}
