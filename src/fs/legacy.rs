//! v1 archives without span digests, as the Go module writes them: what whole-file checks can prove.
//!
//! The archive file is cut into spans of about 1 MiB so that small files lie whole in one: each of them is checked
//! (SHA-256 of the index, else the CRC-64 behind its data) before the span enters the cache. A file that is larger than
//! a span can be checked only as a whole. Parts of it are served and counted, or, with [`Integrity::Strict`], the whole
//! file is fetched and checked before its first byte is served.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use sha2::Digest as _;
use tokio::sync::OnceCell;

use super::Integrity;
use super::blob::Blob;
use crate::archive::{Data, Kind, NodeId, SpanIx, Tree};
use crate::cache::{CacheError, Filled, SpanFiller};
use crate::metrics::metrics;
use crate::source::BlobSource;
use crate::units::Digest;

/// Aim of bytes per span: small enough that a read fetches little in vain, large enough that a request is worth it.
const SPAN: u64 = 1 << 20;

/// Spans of one archive at most (4 TiB): bounds the memory that an archive's claims can cost.
const MAX_SPANS: usize = 1 << 22;

/// Bytes of CRC-64 behind a file's data.
pub(super) const CRC_LEN: u64 = 8;

/// Spans of a large file that are fetched at once while it is being checked as a whole.
const CHECK_AHEAD: usize = 4;

/// A file's data in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileRange {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) node: NodeId,
}

impl FileRange {
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
    fn overlap(&self, other: &Range<u64>) -> u64 {
        let (start, end) = (self.offset.max(other.start), (self.offset + self.len).min(other.end));
        end.saturating_sub(start)
    }
}

/// How an archive is cut into spans, and which files can be checked where.
#[derive(Debug)]
pub(super) struct Geometry {
    /// n + 1 boundaries of n spans, from 0 to the length of the archive file.
    pub(super) bounds: Arc<[u64]>,
    /// Files that lie whole in one span, by offset.
    whole: Vec<FileRange>,
    /// Files that do not, by offset.
    pub(super) spread: Vec<FileRange>,
    /// Over the boundaries, the files and their hashes: archives that disagree about any of them share no cache file.
    pub(super) digest: Digest,
}

impl Geometry {
    /// O(n log n) in the files of the tree. Files that claim bytes beyond `len` are left out: their reads fail. Files that share bytes, but for
    /// several names of the very same, are refused: no archiver writes them, and each would have its bytes hashed again.
    pub(super) fn new(tree: &Tree, len: u64) -> Result<Self, CacheError> {
        let mut files: Vec<FileRange> = (0..tree.len() as u32)
            .map(NodeId)
            .filter(|id| tree.inode(*id) == *id)
            .filter_map(|node| {
                let attr = tree.attr(node);
                let Data::Contiguous { offset, .. } = tree.data(node) else { return None };
                let fits = offset.checked_add(attr.size).is_some_and(|end| end <= len);
                (attr.kind == Kind::File && attr.size > 0 && fits).then_some(FileRange { offset, len: attr.size, node })
            })
            .collect();
        files.sort_unstable_by_key(|f| (f.offset, f.len, f.node.0));
        let same = |a: &FileRange, b: &FileRange| {
            (a.offset, a.len, tree.content_hash(a.node)) == (b.offset, b.len, tree.content_hash(b.node))
        };
        files.dedup_by(|next, first| same(first, next));
        if let Some([a, b]) = files.array_windows().find(|[a, b]| a.range().end > b.offset) {
            let name = |file: &FileRange| String::from_utf8_lossy(tree.name(file.node)).into_owned();
            let detail = format!("the files {:?} and {:?} claim the same bytes", name(a), name(b));
            return Err(CacheError::Corrupt { what: "the v1 archive".into(), detail });
        }
        let bounds = cut(&files, len)?;
        let mut hash = sha2::Sha256::new();
        bounds.iter().for_each(|b| hash.update(b.to_le_bytes()));
        let (mut whole, mut spread) = (Vec::new(), Vec::new());
        for file in files {
            let content = tree.content_hash(file.node);
            hash.update(file.offset.to_le_bytes());
            hash.update(file.len.to_le_bytes());
            hash.update(content.map_or([0; 32], |d| d.0));
            let end = file.offset + file.len + if content.is_some() { 0 } else { CRC_LEN };
            let span_end = bounds.get(bounds.partition_point(|b| *b <= file.offset)).copied().unwrap_or(len);
            if end <= span_end { whole.push(file) } else { spread.push(file) }
        }
        Ok(Self { bounds: bounds.into(), whole, spread, digest: Digest(hash.finalize().into()) })
    }

    /// First byte and one past the last of a span.
    fn span(&self, ix: u32) -> Option<Range<u64>> {
        Some(*self.bounds.get(ix as usize)?..*self.bounds.get(ix as usize + 1)?)
    }

    /// The spans that a range of bytes touches.
    fn spans_of(&self, range: &Range<u64>) -> Range<u32> {
        let at = |byte: u64| self.bounds.partition_point(|b| *b <= byte).saturating_sub(1) as u32;
        at(range.start)..at(range.end.saturating_sub(1)) + 1
    }

    /// Indices into `spread` of the files that share a byte with `range`.
    fn spread_in(&self, range: &Range<u64>) -> impl Iterator<Item = usize> + use<'_> {
        let range = range.clone();
        let last = self.spread.partition_point(|f| f.offset < range.end);
        // None of them shares a byte with another.
        (0..last).rev().take_while(move |i| self.spread.get(*i).is_some_and(|f| f.overlap(&range) > 0))
    }

    /// The files that lie whole in `range`.
    fn whole_in(&self, range: &Range<u64>) -> &[FileRange] {
        let from = self.whole.partition_point(|f| f.offset < range.start);
        let to = self.whole.partition_point(|f| f.offset < range.end);
        self.whole.get(from..to).unwrap_or_default()
    }
}

/// Boundaries such that the record (type byte, data, CRC) of every file that can be lies in one span.
fn cut(files: &[FileRange], len: u64) -> Result<Vec<u64>, CacheError> {
    let mut bounds = vec![0];
    let mut cut_to = |at: u64| -> Result<u64, CacheError> {
        let mut last = bounds.last().copied().unwrap_or(0);
        while last < at {
            last = at.min(last + SPAN);
            bounds.push(last);
            if bounds.len() > MAX_SPANS {
                let detail = format!("it has {len} bytes, the limit is {}", MAX_SPANS as u64 * SPAN);
                return Err(CacheError::Corrupt { what: "the v1 archive".into(), detail });
            }
        }
        Ok(last)
    };
    let mut start = 0;
    for file in files {
        let record = file.offset.saturating_sub(1)..(file.offset + file.len).saturating_add(CRC_LEN).min(len);
        if record.end - record.start > SPAN {
            cut_to(record.start)?;
            start = cut_to(record.end)?;
        } else if record.end.saturating_sub(start) > SPAN {
            start = cut_to(record.start)?;
        }
    }
    cut_to(len)?;
    Ok(bounds)
}

/// Bytes of the files of a tree that lie in more than one span.
pub(super) fn whole_file_only_bytes(tree: &Tree) -> u64 {
    let inodes = (0..tree.len() as u32).map(NodeId).filter(|id| tree.inode(*id) == *id);
    let sizes = inodes.map(|id| tree.attr(id)).filter(|attr| attr.kind == Kind::File).map(|attr| attr.size);
    sizes.filter(|size| size.saturating_add(1 + CRC_LEN) > SPAN).fold(0, u64::saturating_add)
}

/// Checks one whole file, fed piece by piece.
pub(super) enum FileCheck {
    Sha256(Box<sha2::Sha256>, Digest),
    Crc64(Box<crc_fast::Digest>),
}

impl FileCheck {
    /// By the content hash where the archive has one, else by the CRC behind the data.
    pub(super) fn new(content: Option<Digest>) -> Self {
        match content {
            Some(digest) => Self::Sha256(Box::default(), digest),
            None => Self::Crc64(Box::new(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64GoIso))),
        }
    }
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash, _) => hash.update(bytes),
            Self::Crc64(crc) => crc.update(bytes),
        }
    }
    /// What contradicts what, if anything. `crc`: the 8 bytes behind the data.
    pub(super) fn finish(self, crc: &[u8]) -> Result<(), String> {
        match self {
            Self::Sha256(hash, want) => {
                let have = Digest(hash.finalize().into());
                if have == want { Ok(()) } else { Err(format!("its content is {have}, the archive says {want}")) }
            }
            Self::Crc64(digest) => {
                let have = digest.finalize().to_be_bytes();
                if have == crc { Ok(()) } else { Err("its content does not match the CRC-64 behind it".into()) }
            }
        }
    }
}

/// Brings spans of such an archive and checks the files in them.
#[derive(Debug)]
pub(super) struct WholeFileFiller {
    pub(super) geometry: Geometry,
    pub(super) tree: Arc<Tree>,
    pub(super) source: Arc<dyn BlobSource>,
    /// Digests of spans of large files that were checked as a whole: what is fetched again must be the same.
    learned: RwLock<HashMap<u32, Digest>>,
}

impl WholeFileFiller {
    pub(super) fn new(tree: Arc<Tree>, source: Arc<dyn BlobSource>, len: u64) -> Result<Self, CacheError> {
        Ok(Self { geometry: Geometry::new(&tree, len)?, tree, source, learned: RwLock::default() })
    }

    /// The file, as messages name it.
    pub(super) fn name(&self, file: &FileRange) -> String {
        format!("{} in {}", String::from_utf8_lossy(&self.tree.path(file.node)), self.source.describe())
    }

    /// Checks all that can be checked in the bytes of span `ix`.
    fn check(&self, ix: u32, bytes: Bytes) -> Result<Filled, CacheError> {
        let span = self.geometry.span(ix).unwrap_or_default();
        let want = self.learned.read().unwrap_or_else(PoisonError::into_inner).get(&ix).copied();
        if let Some(want) = want {
            if Digest::of(&bytes) == want {
                return Ok(Filled { bytes, verified: true });
            }
            let detail = format!("bytes {}..{} are not those that were checked before", span.start, span.end);
            return Err(CacheError::Corrupt { what: self.source.describe(), detail });
        }
        for file in self.geometry.whole_in(&span) {
            let at = (file.offset - span.start) as usize;
            self.check_record(file, bytes.get(at..).unwrap_or_default())?;
        }
        let verified = self.geometry.spread_in(&span).next().is_none();
        Ok(Filled { bytes, verified })
    }

    /// Checks a file; `bytes` begin with its data, its CRC follows where it is needed.
    fn check_record(&self, file: &FileRange, bytes: &[u8]) -> Result<(), CacheError> {
        let (data, rest) = bytes.split_at_checked(file.len as usize).unwrap_or((bytes, &[]));
        let mut check = FileCheck::new(self.tree.content_hash(file.node));
        check.update(data);
        check
            .finish(rest.get(..CRC_LEN as usize).unwrap_or(rest))
            .map_err(|detail| CacheError::Corrupt { what: self.name(file), detail })
    }
}

#[async_trait]
impl SpanFiller for WholeFileFiller {
    async fn fill(&self, spans: Range<u32>) -> Result<Vec<Filled>, CacheError> {
        let ranges: Vec<(u32, Range<u64>)> =
            spans.filter_map(|ix| self.geometry.span(ix).map(|range| (ix, range))).collect();
        let (Some((_, first)), Some((_, last))) = (ranges.first(), ranges.last()) else { return Ok(Vec::new()) };
        let mut bytes = self.source.read_range(first.start..last.end).await?;
        // About 1 ms of SHA-256 a span: short enough for the runtime's threads.
        let part = |(ix, range): (u32, Range<u64>)| {
            let len = ((range.end - range.start) as usize).min(bytes.len());
            self.check(ix, bytes.split_to(len))
        };
        ranges.into_iter().map(part).collect()
    }

    fn cost(&self, span: SpanIx) -> u64 {
        self.geometry.span(span.0).map_or(0, |range| range.end - range.start)
    }

    fn describe(&self) -> String {
        self.source.describe()
    }

    fn place(&self) -> String {
        self.source.place()
    }
}

/// The archive file as a blob.
#[derive(Debug)]
pub(super) struct LegacyBlob {
    /// The cached view of the file, filled by `filler`.
    pub(super) cached: Arc<dyn Blob>,
    filler: Arc<WholeFileFiller>,
    integrity: Integrity,
    /// Large files that were checked as a whole, by index in `spread`.
    proven: Mutex<HashMap<usize, Arc<OnceCell<()>>>>,
}

impl LegacyBlob {
    pub(super) fn new(cached: Arc<dyn Blob>, filler: Arc<WholeFileFiller>, integrity: Integrity) -> Self {
        Self { cached, filler, integrity, proven: Mutex::default() }
    }

    fn proof(&self, file: usize) -> Arc<OnceCell<()>> {
        let mut proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(proven.entry(file).or_default())
    }

    fn is_proven(&self, file: usize) -> bool {
        let proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
        proven.get(&file).is_some_and(|cell| cell.initialized())
    }

    /// Counts the bytes of a read that nothing has verified.
    fn count(&self, range: &Range<u64>) {
        let geometry = &self.filler.geometry;
        let bytes: u64 = geometry
            .spread_in(range)
            .filter(|file| !self.is_proven(*file))
            .filter_map(|file| geometry.spread.get(file).map(|f| f.overlap(range)))
            .sum();
        if bytes > 0 {
            metrics().unverified_read_bytes.inc_by(bytes);
        }
    }

    /// Fetches and checks a whole large file; later fills of its spans are held to what was checked.
    async fn prove(&self, index: usize) -> Result<(), CacheError> {
        let filler = &self.filler;
        let Some(file) = filler.geometry.spread.get(index) else { return Ok(()) };
        let end = filler.geometry.bounds.last().copied().unwrap_or(0);
        let content = filler.tree.content_hash(file.node);
        let crc = file.range().end..file.range().end.saturating_add(CRC_LEN);
        if content.is_none() && crc.end > end {
            return Err(CacheError::Unverifiable { what: filler.name(file) });
        }
        let mut check = FileCheck::new(content);
        let mut learned = Vec::new();
        let spans = filler.geometry.spans_of(&file.range());
        let mut parts = futures::stream::iter(spans.filter_map(|ix| Some((ix, filler.geometry.span(ix)?))))
            .map(|(ix, span)| async move {
                let bytes = self.cached.read(span.start, (span.end - span.start) as usize).await?;
                Ok::<_, CacheError>((ix, span, bytes))
            })
            .buffered(CHECK_AHEAD);
        while let Some((ix, span, bytes)) = parts.try_next().await? {
            let from = file.offset.saturating_sub(span.start) as usize;
            let to = (file.range().end.min(span.end) - span.start) as usize;
            check.update(bytes.get(from..to).unwrap_or_default());
            learned.push((ix, Digest::of(&bytes)));
        }
        let crc = match content {
            Some(_) => Bytes::new(),
            None => self.cached.read(crc.start, CRC_LEN as usize).await?,
        };
        check.finish(&crc).map_err(|detail| CacheError::Corrupt { what: filler.name(file), detail })?;
        filler.learned.write().unwrap_or_else(PoisonError::into_inner).extend(learned);
        Ok(())
    }

    /// One damaged file makes its whole span unusable. Its neighbours are intact: read the file that is asked for alone,
    /// check it, and serve it uncached.
    async fn read_alone(&self, range: &Range<u64>, error: CacheError) -> Result<Bytes, CacheError> {
        let filler = &self.filler;
        let last = filler.geometry.whole.partition_point(|f| f.offset <= range.start);
        let file = last.checked_sub(1).and_then(|i| filler.geometry.whole.get(i));
        let Some(file) = file.filter(|f| f.overlap(range) == range.end - range.start) else { return Err(error) };
        let crc = if filler.tree.content_hash(file.node).is_some() { 0 } else { CRC_LEN };
        let bytes = filler.source.read_range(file.offset..file.range().end + crc).await?;
        filler.check_record(file, &bytes)?;
        let at = (range.start - file.offset) as usize;
        let to = (range.end - file.offset) as usize;
        if to <= bytes.len() { Ok(bytes.slice(at..to)) } else { Err(error) }
    }
}

#[async_trait]
impl Blob for LegacyBlob {
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        let range = off..off.saturating_add(buf.len() as u64);
        if self.integrity == Integrity::Strict && !self.filler.geometry.spread_in(&range).all(|f| self.is_proven(f)) {
            return false;
        }
        let hit = self.cached.try_read(off, buf);
        if hit {
            self.count(&range);
        }
        hit
    }

    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        let range = off..off.saturating_add(len as u64);
        if self.integrity == Integrity::Strict {
            let files: Vec<usize> = self.filler.geometry.spread_in(&range).collect();
            for file in files {
                self.proof(file).get_or_try_init(|| self.prove(file)).await?;
            }
        }
        let bytes = match self.cached.read(off, len).await {
            Err(error @ CacheError::Corrupt { .. }) => self.read_alone(&range, error).await?,
            other => other?,
        };
        self.count(&range);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
