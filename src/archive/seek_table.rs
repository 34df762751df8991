//! The seek table: how to reach the middle of each blob, and the digest of every span of it.
//!
//! A binary format of our own, little-endian, integers in the tables as LEB128 varints:
//!
//! ```text
//! magic "XClipSk\n" | major u16 | minor u16 | number of sections u32
//! section directory: { id u32 | flags u32 | offset u64 | length u64 } per section, offsets from the table's start
//! sections
//! ```
//!
//! Section 1 holds the blobs and their spans, section 2 all windows, so that a reader may fetch the one without the
//! other. Section 5, only there where it is needed, says which blobs are [`Chunks`]. Ids 3 (profiles of what a workload reads first)
//! and 4 (other digests) are reserved. A section with flag 1 may be ignored by a reader that does not know it; any other unknown
//! section, and a newer major version, are refused by name; a newer minor version is read.

mod chunks;

pub use chunks::{Chunks, MAX_SKIP};

use super::ArchiveError;
use crate::units::{Compression, Digest};

/// Index of a span in a [`BlobTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpanIx(pub u32);

/// One span: a run of uncompressed bytes that is fetched, inflated and verified as one.
/// It ends where the next one starts; the last one at [`BlobTable::ulen`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte in the uncompressed blob.
    pub uoff: u64,
    /// First byte of the compressed blob that inflating needs. With `bits` > 0 that is the byte holding those bits.
    pub coff: u64,
    /// One past the last byte of the compressed blob that inflating this span needs.
    pub cend: u64,
    /// Bits of the byte at `coff` that belong to the span, counted from its high end (0..=7; 0: starts on a byte).
    pub bits: u8,
    /// The compressed stream (gzip member, zstd frame) starts here: no window, a header comes first.
    pub starts_stream: bool,
    /// Position and length in [`BlobTable::windows`] of this span's packed window; length 0: none needed.
    pub window: (u64, u32),
    /// SHA-256 of the span's uncompressed bytes.
    pub digest: Digest,
}

/// One blob's spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobTable {
    /// SHA-256 of the blob as stored (a layer's digest; for a v1 archive the SHA-256 of its data region).
    pub digest: Digest,
    /// Its compression.
    pub compression: Compression,
    /// Length of the stored blob in bytes.
    pub clen: u64,
    /// Length of the uncompressed blob in bytes, trailing padding included.
    pub ulen: u64,
    /// SHA-256 of the uncompressed blob (a layer's diff ID). With [`BlobTable::chunks`]: what the image's config claims it to be.
    pub diff_id: Digest,
    /// The spans in order; the first has `uoff` 0.
    pub spans: Vec<Span>,
    /// All packed windows (see [`crate::inflate::window`]), back to back.
    pub windows: Vec<u8>,
    /// The spans are chunks out of a table of contents, and the uncompressed blob is those chunks back to back; `None`: the spans
    /// cover the layer's tar (or the data region) without a gap.
    pub chunks: Option<Chunks>,
}

impl BlobTable {
    /// The span that holds the uncompressed byte `uoff` (`uoff < ulen`).
    pub fn span_at(&self, uoff: u64) -> SpanIx {
        SpanIx(self.spans.partition_point(|s| s.uoff <= uoff).saturating_sub(1) as u32)
    }

    /// First byte and one past the last byte of a span in the uncompressed blob.
    pub fn bounds(&self, ix: SpanIx) -> std::ops::Range<u64> {
        let i = ix.0 as usize;
        self.spans[i].uoff..self.spans.get(i + 1).map_or(self.ulen, |s| s.uoff)
    }

    /// SHA-256 over all boundaries and span digests: two tables with the same root hold the same bytes span by span.
    pub fn root(&self) -> Digest {
        use sha2::Digest as _;
        let mut hash = sha2::Sha256::new();
        hash.update(b"clip-csi span root 1\n");
        hash.update(self.ulen.to_le_bytes());
        hash.update((self.spans.len() as u64).to_le_bytes());
        for span in &self.spans {
            hash.update(span.uoff.to_le_bytes());
            hash.update(span.digest.0);
        }
        Digest(hash.finalize().into())
    }

    /// The packed window of a span; empty where none is needed.
    pub fn window(&self, ix: SpanIx) -> &[u8] {
        let (pos, len) = self.spans[ix.0 as usize].window;
        &self.windows[pos as usize..][..len as usize]
    }

    /// What contradicts what, if anything.
    fn check(&self) -> Result<(), String> {
        if self.ulen > i64::MAX as u64 || self.clen > i64::MAX as u64 {
            return Err("a blob longer than any file".into());
        }
        if self.spans.first().map_or(self.ulen != 0, |first| first.uoff != 0) {
            return Err("the spans do not start at 0".into());
        }
        for (at, span) in self.spans.iter().enumerate() {
            let wrong = |detail: &str| Err(format!("span {at}: {detail}"));
            let end = self.spans.get(at + 1).map_or(self.ulen, |next| next.uoff);
            // A blob of no bytes may have one span of none.
            if end < span.uoff || (end == span.uoff && self.ulen != 0) {
                return wrong("its end is not behind its start");
            }
            if span.coff > span.cend || span.cend > self.clen {
                return wrong("its compressed bytes are out of order or beyond the blob");
            }
            if span.bits > 7 || (span.bits > 0 && span.coff == span.cend) {
                return wrong("a bit offset that no byte has");
            }
            if span.starts_stream && (span.bits > 0 || span.window.1 > 0) {
                return wrong("a stream's start with a window or within a byte");
            }
            let window_end = span.window.0.checked_add(span.window.1.into());
            if window_end.is_none_or(|end| end > self.windows.len() as u64) {
                return wrong("its window is beyond the windows");
            }
            if self.compression == Compression::None
                && (span.cend - span.coff != end - span.uoff || span.bits > 0 || span.window.1 > 0)
            {
                return wrong("stored bytes of another length than the span, or with a window");
            }
        }
        self.chunks.as_ref().map_or(Ok(()), |chunks| chunks.check(self))
    }
}

/// The tables of all blobs of an archive: one per layer (v2), or one for the data (v1).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeekTable {
    /// In the order of `OciStorage::layers`; a v1 archive has exactly one.
    pub blobs: Vec<BlobTable>,
}

/// Longest seek table that is read, in bytes; as for the index. That of a 10 GB image in 1 MiB spans takes about 50 MB.
pub const MAX_SEEK_TABLE_LEN: u64 = 256 << 20;

const MAGIC: [u8; 8] = *b"XClipSk\n";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
const SPANS: u32 = 1;
const WINDOWS: u32 = 2;
const CHUNKS: u32 = 5;
/// Section flag: a reader that does not know the section goes on without it.
const MAY_BE_IGNORED: u32 = 1;
const HEAD_LEN: usize = 16;
const SECTION_LEN: usize = 24;
/// A span takes at least its digest, four one-byte varints and its flags.
const MIN_SPAN_LEN: usize = 32 + 4;
const MIN_BLOB_LEN: usize = 2 * 32 + 5;
const STARTS_STREAM: u8 = 8;
const HAS_WINDOW: u8 = 16;

impl SeekTable {
    /// Reads a seek table; everything is bounds-checked (order, lengths, window positions).
    pub fn decode(bytes: &[u8]) -> Result<Self, ArchiveError> {
        if bytes.len() as u64 > MAX_SEEK_TABLE_LEN {
            let (value, limit) = (bytes.len() as u64, MAX_SEEK_TABLE_LEN);
            return Err(ArchiveError::TooLarge { what: "length of the seek table", value, limit });
        }
        let mut head = Reader(bytes);
        if head.take(MAGIC.len())? != MAGIC {
            return Err(corrupt("it does not start with its magic number"));
        }
        let (major, _minor, sections) = (head.u16()?, head.u16()?, head.u32()?);
        if major != MAJOR {
            return Err(ArchiveError::Unsupported { detail: format!("seek table version {major}, {MAJOR} is known") });
        }
        let (mut spans, mut windows, mut chunks) = (None, None, None);
        for _ in 0..sections {
            let (id, flags, offset, len) = (head.u32()?, head.u32()?, head.u64()?, head.u64()?);
            let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
            let section =
                range.and_then(|(offset, len)| bytes.get(offset..)?.get(..len)).ok_or(ArchiveError::Truncated {
                    what: "seek table",
                    need: offset.saturating_add(len),
                    have: bytes.len() as u64,
                })?;
            let slot = match id {
                SPANS => &mut spans,
                WINDOWS => &mut windows,
                CHUNKS => &mut chunks,
                _ if flags & MAY_BE_IGNORED != 0 => continue,
                _ => return Err(ArchiveError::Unsupported { detail: format!("seek table section {id} is not known") }),
            };
            if slot.replace(section).is_some() {
                return Err(corrupt(format!("section {id} is there twice")));
            }
        }
        let mut spans = Reader(spans.ok_or_else(|| corrupt("it has no spans"))?);
        let mut windows = Reader(windows.unwrap_or_default());
        let count = spans.count(MIN_BLOB_LEN)?;
        let mut chunks = chunks::Reader::new(Reader(chunks.unwrap_or_default()))?;
        let blobs = (0..count).map(|ix| {
            let mut blob = decode_blob(&mut spans, &mut windows)?;
            blob.chunks = chunks.of(ix)?;
            blob.check().map_err(|detail| corrupt(format!("blob {ix}: {detail}")))?;
            Ok(blob)
        });
        let blobs = blobs.collect::<Result<_, ArchiveError>>()?;
        if !spans.0.is_empty() || !windows.0.is_empty() || !chunks.is_at_end() {
            return Err(corrupt("bytes that belong to no blob"));
        }
        Ok(Self { blobs })
    }

    /// Writes it: the same bytes for the same table.
    pub fn encode(&self) -> Vec<u8> {
        let mut spans = Vec::new();
        varint(&mut spans, self.blobs.len() as u64);
        for blob in &self.blobs {
            encode_blob(&mut spans, blob);
        }
        let windows: u64 = self.blobs.iter().map(|blob| blob.windows.len() as u64).sum();
        let chunks = chunks::encode(&self.blobs);
        let mut sections = vec![(SPANS, spans.len() as u64), (WINDOWS, windows)];
        sections.extend((!chunks.is_empty()).then_some((CHUNKS, chunks.len() as u64)));
        let start = HEAD_LEN + sections.len() * SECTION_LEN;
        let mut out = Vec::with_capacity(start + spans.len() + windows as usize + chunks.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&MAJOR.to_le_bytes());
        out.extend_from_slice(&MINOR.to_le_bytes());
        out.extend_from_slice(&(sections.len() as u32).to_le_bytes());
        let mut offset = start as u64;
        for (id, len) in sections {
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&0u32.to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
            offset += len;
        }
        out.append(&mut spans);
        for blob in &self.blobs {
            out.extend_from_slice(&blob.windows);
        }
        out.extend_from_slice(&chunks);
        out
    }
}

/// `digest | diff id | compression | clen | ulen | bytes of windows | number of spans | spans`; a span is `bytes since the
/// last uoff | bytes since the last coff | compressed length | bits and flags | [window position | window length] | digest`.
fn encode_blob(out: &mut Vec<u8>, blob: &BlobTable) {
    out.extend_from_slice(&blob.digest.0);
    out.extend_from_slice(&blob.diff_id.0);
    out.push(match blob.compression {
        Compression::None => 0,
        Compression::Gzip => 1,
        Compression::Zstd => 2,
    });
    for value in [blob.clen, blob.ulen, blob.windows.len() as u64, blob.spans.len() as u64] {
        varint(out, value);
    }
    let (mut uoff, mut coff) = (0u64, 0u64);
    for span in &blob.spans {
        // A table that is out of order wraps here and is refused when it is read.
        varint(out, span.uoff.wrapping_sub(uoff));
        varint(out, span.coff.wrapping_sub(coff));
        varint(out, span.cend.wrapping_sub(span.coff));
        (uoff, coff) = (span.uoff, span.coff);
        let stream = if span.starts_stream { STARTS_STREAM } else { 0 };
        let window = if span.window == (0, 0) { 0 } else { HAS_WINDOW };
        out.push(span.bits & 7 | stream | window);
        if window != 0 {
            varint(out, span.window.0);
            varint(out, span.window.1.into());
        }
        out.extend_from_slice(&span.digest.0);
    }
}

fn decode_blob(from: &mut Reader<'_>, windows: &mut Reader<'_>) -> Result<BlobTable, ArchiveError> {
    let (digest, diff_id) = (from.digest()?, from.digest()?);
    let compression = match from.u8()? {
        0 => Compression::None,
        1 => Compression::Gzip,
        2 => Compression::Zstd,
        other => return Err(ArchiveError::Unsupported { detail: format!("compression {other} in the seek table") }),
    };
    let (clen, ulen) = (from.varint()?, from.varint()?);
    let windows_len = usize::try_from(from.varint()?).unwrap_or(usize::MAX);
    let count = from.count(MIN_SPAN_LEN)?;
    let windows = windows.take(windows_len)?.to_vec();
    let mut spans = Vec::with_capacity(count);
    let (mut uoff, mut coff) = (0u64, 0u64);
    let beyond = || corrupt("a span beyond any blob's end");
    for _ in 0..count {
        uoff = uoff.checked_add(from.varint()?).ok_or_else(beyond)?;
        coff = coff.checked_add(from.varint()?).ok_or_else(beyond)?;
        let cend = coff.checked_add(from.varint()?).ok_or_else(beyond)?;
        let flags = from.u8()?;
        if flags >= 2 * HAS_WINDOW {
            return Err(corrupt("a span with unknown flags"));
        }
        let window = match flags & HAS_WINDOW {
            0 => (0, 0),
            _ => {
                let (pos, len) = (from.varint()?, from.varint()?);
                (pos, u32::try_from(len).map_err(|_| corrupt("a window of more than 4 GiB"))?)
            }
        };
        let starts_stream = flags & STARTS_STREAM != 0;
        spans.push(Span { uoff, coff, cend, bits: flags & 7, starts_stream, window, digest: from.digest()? });
    }
    Ok(BlobTable { digest, compression, clen, ulen, diff_id, spans, windows, chunks: None })
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cold]
fn corrupt(detail: impl Into<String>) -> ArchiveError {
    ArchiveError::Corrupt { what: "seek table", detail: detail.into() }
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], ArchiveError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(ArchiveError::Truncated {
            what: "seek table",
            need: len as u64,
            have: self.0.len() as u64,
        })?;
        self.0 = rest;
        Ok(bytes)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ArchiveError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    fn u8(&mut self) -> Result<u8, ArchiveError> {
        self.array::<1>().map(|[byte]| byte)
    }
    fn u16(&mut self) -> Result<u16, ArchiveError> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, ArchiveError> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, ArchiveError> {
        self.array().map(u64::from_le_bytes)
    }
    fn digest(&mut self) -> Result<Digest, ArchiveError> {
        self.array().map(Digest)
    }
    fn varint(&mut self) -> Result<u64, ArchiveError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(corrupt("an integer of more than 64 bits"))
    }
    /// A number of records of at least `min` bytes: no more than there is room for.
    fn count(&mut self, min: usize) -> Result<usize, ArchiveError> {
        let count = self.varint()?;
        if count > (self.0.len() / min) as u64 {
            return Err(corrupt(format!("{count} records in {} bytes", self.0.len())));
        }
        Ok(count as usize)
    }
}

#[cfg(test)]
mod tests;
