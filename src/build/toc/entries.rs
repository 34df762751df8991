//! The JSON that both formats share: a list of tar entries, each file followed by its further chunks.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::super::tar::{EntryKind, MAX_PATH, TarEntry, clean, device, show};
use super::{MAX_JSON, TocError, broken};
use crate::archive::{BlobTable, Chunks, Span, Timestamp};
use crate::inflate::MAX_SPAN;
use crate::units::{Compression, Digest};

const WHAT: &str = "its table of contents";
/// Most entries of a table, chunks included: more than [`MAX_JSON`] honestly holds.
const MAX_ENTRIES: usize = 1_000_000;
/// Most bytes of a stream before a chunk.
const MAX_SKIP: u64 = crate::archive::seek_table::MAX_SKIP;
/// What encoders of JSON put where a name is not UTF-8.
const REPLACEMENT: char = '\u{fffd}';
/// Limits of Linux: of an attribute's name and value, in bytes.
const XATTR_LIMITS: (usize, usize) = (255, 64 << 10);

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Where its stream (gzip member, zstd frame) starts in the layer.
    pub coff: u64,
    /// One past the last byte of the layer that inflating it needs.
    pub cend: u64,
    /// Bytes that the stream yields before it.
    pub skip: u64,
    /// Its length in bytes, more than 0.
    pub len: u64,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// What a table says of a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The layer's entries in their order. `offset` is one in the chunks, put back to back.
    pub entries: Vec<TarEntry>,
    /// All chunks, ascending by place in the layer, those of a file without another's between them.
    pub chunks: Vec<Chunk>,
    /// Some name is not UTF-8, so that JSON could not hold it.
    pub lossy: bool,
    /// zstd:chunked: SHA-256 of the layer's tar-split data, as stored.
    pub tar_split: Option<Digest>,
}

impl Contents {
    /// The span table of the layer: a span per chunk. `diff_id` is believed.
    pub fn table(
        &self,
        digest: Digest,
        compression: Compression,
        clen: u64,
        diff_id: Digest,
    ) -> Result<BlobTable, TocError> {
        if self.chunks.len() >= u32::MAX as usize {
            return Err(broken(WHAT, "it has too many chunks"));
        }
        let mut spans = Vec::with_capacity(self.chunks.len());
        let mut skips = Vec::new();
        let mut uoff = 0;
        for (ix, chunk) in self.chunks.iter().enumerate() {
            let Chunk { coff, cend, skip, len, digest } = *chunk;
            spans.push(Span { uoff, coff, cend, bits: 0, starts_stream: true, window: (0, 0), digest });
            if skip > 0 {
                skips.push((ix as u32, skip));
            }
            uoff += len;
        }
        let chunks = Some(Chunks { skips });
        Ok(BlobTable { digest, compression, clen, ulen: uoff, diff_id, spans, windows: Vec::new(), chunks })
    }

    /// Adds a file of one chunk behind all others.
    pub fn push(&mut self, mut entry: TarEntry, chunk: Chunk) {
        entry.offset = self.chunks.iter().map(|chunk| chunk.len).sum();
        self.entries.push(entry);
        self.chunks.push(chunk);
    }
}

/// Reads a table. `data_end`: where the layer's data ends and its tables begin; no chunk reaches beyond. Costs one pass; allocates a
/// few times the table's length at most.
pub fn parse(json: &[u8], data_end: u64) -> Result<Contents, TocError> {
    if json.len() > MAX_JSON {
        return Err(TocError::TooLarge { what: WHAT, value: json.len() as u64, limit: MAX_JSON as u64 });
    }
    let mut builder = Builder { data_end, ..Builder::default() };
    let mut json = serde_json::Deserializer::from_slice(json);
    let read = Table(&mut builder).deserialize(&mut json).and_then(|()| json.end());
    if let Some(error) = builder.error.take() {
        return Err(error);
    }
    read.map_err(|error| broken(WHAT, error.to_string()))?;
    builder.finish()
}

/// An entry as it is written. What is not listed here means nothing to a mount.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Raw<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    link_name: Cow<'a, str>,
    mode: i64,
    size: i64,
    uid: i64,
    gid: i64,
    #[serde(borrow)]
    modtime: Option<Cow<'a, str>>,
    #[serde(borrow)]
    accesstime: Option<Cow<'a, str>>,
    #[serde(borrow)]
    changetime: Option<Cow<'a, str>>,
    dev_major: i64,
    dev_minor: i64,
    #[serde(borrow)]
    xattrs: Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
    #[serde(borrow)]
    digest: Cow<'a, str>,
    offset: i64,
    end_offset: i64,
    inner_offset: i64,
    chunk_offset: i64,
    chunk_size: i64,
    #[serde(borrow)]
    chunk_digest: Cow<'a, str>,
}

/// `{"version": 1, "entries": […], "tarSplitDigest": …}`
struct Table<'a>(&'a mut Builder);

impl<'de> DeserializeSeed<'de> for Table<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut version = None;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match &*key {
                "version" => version = Some(map.next_value::<i64>()?),
                "entries" => map.next_value_seed(List(self.0))?,
                "tarSplitDigest" => {
                    let text = map.next_value::<Cow<'de, str>>()?;
                    self.0.out.tar_split = Some(text.parse().map_err(A::Error::custom)?);
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        match version {
            Some(1) => Ok(()),
            Some(other) => Err(A::Error::custom(format!("version {other}, 1 is known"))),
            None => Err(A::Error::custom("no version")),
        }
    }
}

struct List<'a>(&'a mut Builder);

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(raw) = list.next_element::<Raw<'de>>()? {
            if let Err(error) = self.0.add(&raw) {
                self.0.error = Some(error);
                return Err(A::Error::custom("an entry is wrong"));
            }
        }
        Ok(())
    }
}

/// The file whose chunks are coming.
#[derive(Debug)]
struct Open {
    name: String,
    size: u64,
    /// Digest of the whole file.
    digest: Option<Digest>,
    /// One past its last chunk in the layer, where that is said.
    end: Option<u64>,
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    coff: u64,
    skip: u64,
    /// In the file.
    at: u64,
    /// 0: up to the next one.
    len: u64,
    digest: Option<Digest>,
}

#[derive(Debug, Default)]
struct Builder {
    data_end: u64,
    count: usize,
    /// Bytes of all chunks so far.
    len: u64,
    open: Option<Open>,
    out: Contents,
    error: Option<TocError>,
}

impl Builder {
    fn add(&mut self, raw: &Raw<'_>) -> Result<(), TocError> {
        self.count += 1;
        if self.count > MAX_ENTRIES {
            return Err(broken(WHAT, format!("it has over {MAX_ENTRIES} entries")));
        }
        let wrong = |detail: String| broken(WHAT, format!("{}: {detail}", show(raw.name.as_bytes())));
        if raw.kind == "chunk" {
            let Some(open) = self.open.as_mut().filter(|open| raw.name.is_empty() || open.name == raw.name) else {
                return Err(wrong("a chunk that follows no chunk of its file".into()));
            };
            open.pieces.push(piece(raw).map_err(wrong)?);
            return Ok(());
        }
        self.close()?;
        let entry = entry(raw, self.len).map_err(wrong)?;
        self.out.lossy |= raw.name.contains(REPLACEMENT) || raw.link_name.contains(REPLACEMENT);
        self.out.lossy |= raw.xattrs.iter().flatten().any(|(name, _)| name.contains(REPLACEMENT));
        if entry.kind == EntryKind::File && entry.size > 0 {
            self.open = Some(Open {
                name: raw.name.clone().into_owned(),
                size: entry.size,
                digest: digest(&raw.digest).map_err(wrong)?,
                end: (raw.end_offset > 0).then_some(raw.end_offset as u64),
                pieces: vec![piece(raw).map_err(wrong)?],
            });
        }
        self.out.entries.push(entry);
        Ok(())
    }

    /// The chunks of the open file are all there: do they make up the file?
    fn close(&mut self) -> Result<(), TocError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let wrong = |detail: String| broken(WHAT, format!("{}: {detail}", show(open.name.as_bytes())));
        let single = open.pieces.len() == 1;
        let ends = open.pieces.iter().skip(1).map(|piece| piece.at).chain([open.size]);
        let mut at = 0;
        for (piece, end) in open.pieces.iter().zip(ends) {
            let len = end.checked_sub(piece.at).filter(|len| *len > 0 && piece.at == at);
            let len = len.filter(|len| piece.len == 0 || piece.len == *len);
            let Some(len) = len else {
                return Err(wrong(format!("its chunks do not make up its {} bytes", open.size)));
            };
            at = end;
            if len > MAX_SPAN {
                return Err(TocError::Lacking(format!(
                    "{}: a chunk of {len} bytes, up to {MAX_SPAN} are fetched as one",
                    show(open.name.as_bytes())
                )));
            }
            let digest = match (piece.digest, open.digest.filter(|_| single)) {
                (Some(chunk), Some(file)) if chunk != file => return Err(wrong("its two digests differ".into())),
                (Some(digest), _) | (None, Some(digest)) => digest,
                (None, None) => {
                    let name = show(open.name.as_bytes());
                    return Err(TocError::Lacking(format!("{name}: a chunk without a digest can't be verified")));
                }
            };
            let before = self.out.chunks.last().map(|last| (last.coff, last.skip + last.len));
            let in_order = match before {
                Some((coff, end)) if coff == piece.coff => piece.skip >= end,
                Some((coff, _)) => piece.coff > coff,
                // A header comes before any data.
                None => piece.coff > 0 || piece.skip > 0,
            };
            if !in_order {
                return Err(wrong("its chunks are out of order".into()));
            }
            // The end is known when the next stream's start is, unless the file names it.
            let cend = open.end.filter(|_| end == open.size).unwrap_or(0);
            self.out.chunks.push(Chunk { coff: piece.coff, cend, skip: piece.skip, len, digest });
            self.len += len;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Contents, TocError> {
        self.close()?;
        // From the end: each stream ends where the next one starts, or before.
        let (mut here, mut after) = (self.data_end, self.data_end);
        for chunk in self.out.chunks.iter_mut().rev() {
            if chunk.coff != here {
                (here, after) = (chunk.coff, here);
            }
            if chunk.coff >= after || chunk.cend > after || (chunk.cend > 0 && chunk.cend <= chunk.coff) {
                let detail = format!("a chunk from {} to {} where {after} is the end", chunk.coff, chunk.cend);
                return Err(broken(WHAT, detail));
            }
            if chunk.cend == 0 {
                chunk.cend = after;
            }
        }
        Ok(self.out)
    }
}

fn unsigned(what: &str, value: i64) -> Result<u64, String> {
    u64::try_from(value).map_err(|_| format!("{what} is {value}"))
}

fn digest(text: &str) -> Result<Option<Digest>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|error: crate::units::ParseError| error.to_string())
}

fn piece(raw: &Raw<'_>) -> Result<Piece, String> {
    let skip = unsigned("innerOffset", raw.inner_offset)?;
    if skip > MAX_SKIP {
        return Err(format!("a chunk {skip} bytes into its stream, up to {MAX_SKIP} are inflated in vain"));
    }
    Ok(Piece {
        coff: unsigned("offset", raw.offset)?,
        skip,
        at: unsigned("chunkOffset", raw.chunk_offset)?,
        len: unsigned("chunkSize", raw.chunk_size)?,
        digest: digest(&raw.chunk_digest)?,
    })
}

fn timestamp(text: Option<&str>) -> Result<Option<Timestamp>, String> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| format!("{:?} is no time", show(text.as_bytes())))?;
    Ok(Some(Timestamp { sec: time.unix_timestamp(), nsec: time.nanosecond() }))
}

/// Names and values.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn xattrs(raw: &Raw<'_>) -> Result<Xattrs, String> {
    let mut out = Vec::new();
    for (name, value) in raw.xattrs.iter().flatten() {
        let value = base64::engine::general_purpose::STANDARD.decode(&**value);
        let value = value.map_err(|_| format!("its attribute {} is not base64", show(name.as_bytes())))?;
        if name.is_empty() || name.contains('\0') || name.len() > XATTR_LIMITS.0 || value.len() > XATTR_LIMITS.1 {
            return Err(format!("its attribute {} is beyond Linux' limits", show(name.as_bytes())));
        }
        // As in a tar header: overlayfs' own bookkeeping is never part of an image.
        if !name.starts_with("trusted.overlay.") {
            out.push((name.as_bytes().to_vec(), value));
        }
    }
    Ok(out)
}

/// An entry, with its data at `offset` of the chunks.
fn entry(raw: &Raw<'_>, offset: u64) -> Result<TarEntry, String> {
    let kind = match &*raw.kind {
        "reg" => EntryKind::File,
        "dir" => EntryKind::Dir,
        "symlink" => EntryKind::Symlink,
        "hardlink" => EntryKind::HardLink,
        "fifo" => EntryKind::Fifo,
        "char" => EntryKind::CharDevice,
        "block" => EntryKind::BlockDevice,
        other => return Err(format!("entries of type {:?} are not known", show(other.as_bytes()))),
    };
    let link = match kind {
        EntryKind::HardLink => clean(raw.link_name.as_bytes())?,
        EntryKind::Symlink => {
            let target = raw.link_name.as_bytes();
            if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
                return Err(format!("a symlink's target must have 1 to {MAX_PATH} bytes, none of them NUL"));
            }
            target.into()
        }
        _ => Box::default(),
    };
    let device_number = matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice);
    let id =
        |what: &str, value: i64| u32::try_from(value).map_err(|_| format!("{what} {value} is not a 32-bit number"));
    let mtime = timestamp(raw.modtime.as_deref())?.unwrap_or_default();
    let size = if kind == EntryKind::File { unsigned("size", raw.size)? } else { 0 };
    if size > 1 << 62 {
        return Err(format!("a size of {size} bytes is absurd"));
    }
    Ok(TarEntry {
        path: clean(raw.name.as_bytes())?,
        kind,
        mode: (raw.mode & 0o7777) as u16,
        uid: id("owner", raw.uid)?,
        gid: id("group", raw.gid)?,
        mtime,
        atime: timestamp(raw.accesstime.as_deref())?.unwrap_or(mtime),
        ctime: timestamp(raw.changetime.as_deref())?.unwrap_or(mtime),
        rdev: if device_number { device(raw.dev_major, raw.dev_minor)? } else { 0 },
        link,
        xattrs: xattrs(raw)?,
        size,
        offset: if size > 0 { offset } else { 0 },
        extents: None,
    })
}
