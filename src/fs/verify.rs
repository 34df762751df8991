//! Checking an archive: that its tree names bytes that exist, and, with `data`, that every byte is what a digest says.
//!
//! Reads past the cache: what is checked is what the sources hold now.

mod spans;
mod stored;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use futures::TryStreamExt as _;

use self::spans::check_spans;
use self::stored::Stored;
use super::legacy::{CRC_LEN, FileCheck, FileRange, WholeFileFiller};
use super::parts::{Part, Proof};
use super::{OpenError, Opened};
use crate::archive::{BlobTable, Data, HEADER_LEN, Kind, NodeId, Storage};
use crate::cache::CacheError;
use crate::inflate::Indexer;
use crate::source::BlobSource;
use crate::units::{Compression, Digest};

/// Problems that are told in full; more are counted.
const MAX_PROBLEMS: usize = 100;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Names in the tree.
    pub names: u64,
    /// Blobs (layers, or the one data region).
    pub blobs: u64,
    /// Bytes that a digest or checksum covers and that match it. 0 unless data was asked for.
    pub verified_bytes: u64,
    /// Bytes of files that nothing covers.
    pub unverifiable_bytes: u64,
    /// Problems in all.
    pub problem_count: u64,
    /// The first hundred of them, a line each.
    pub problems: Vec<String>,
}

impl Verified {
    /// Nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.problem_count == 0
    }

    fn problem(&mut self, text: String) {
        self.problem_count += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text);
        }
    }
}

/// Verifies an opened archive. Without `data`: the structure (fetches the seek table, no file data). With it: every byte of
/// every blob against its span digests, or its own digest, and every file that carries a content hash against that; goes
/// on after an error. `progress` hears of uncompressed bytes as they are checked. An `Err` is what made the check itself
/// impossible, such as a source that can't be reached; everything wrong with the archive is a problem in the answer.
pub async fn verify(
    opened: &Opened,
    data: bool,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Verified, OpenError> {
    let tree = opened.fs.tree();
    let mut out = Verified { names: tree.len() as u64, blobs: opened.parts.len() as u64, ..Verified::default() };
    let mut files: HashMap<usize, Vec<FileRange>> = HashMap::new();
    let mut ends = vec![(0u64, NodeId::ROOT); opened.parts.len()];
    for node in (0..tree.len() as u32).map(NodeId).filter(|id| tree.inode(*id) == *id) {
        let attr = tree.attr(node);
        let (blob, end) = match tree.data(node) {
            Data::Empty => continue,
            Data::Contiguous { blob, offset } => {
                files.entry(blob.0.into()).or_default().push(FileRange { offset, len: attr.size, node });
                (blob, offset.checked_add(attr.size))
            }
            Data::Sparse { blob, extents } => {
                (blob, extents.iter().try_fold(0, |max, e| Some(e.blob_offset.checked_add(e.len)?.max(max))))
            }
        };
        match (ends.get_mut(usize::from(blob.0)), end) {
            (Some(max), Some(end)) => *max = (*max).max((end, node)),
            (None, _) => out.problem(format!("{}: names blob {}, which is not there", show(opened, node), blob.0)),
            (_, None) => out.problem(format!("{}: its data ends beyond 2^64", show(opened, node))),
        }
    }
    for (ix, part) in opened.parts.iter().enumerate() {
        let files = files.remove(&ix).unwrap_or_default();
        let (end, last) = ends.get(ix).copied().unwrap_or((0, NodeId::ROOT));
        let checked = check_part(opened, part, files, (end, last), data, progress, &mut out).await;
        if let Err(error) = checked {
            match error {
                CacheError::Corrupt { .. } | CacheError::Unverifiable { .. } => out.problem(error.to_string()),
                other => return Err(other.into()),
            }
        }
    }
    Ok(out)
}

fn show(opened: &Opened, node: NodeId) -> String {
    String::from_utf8_lossy(&opened.fs.tree().path(node)).into_owned()
}

async fn check_part(
    opened: &Opened,
    part: &Part,
    files: Vec<FileRange>,
    (end, last): (u64, NodeId),
    data: bool,
    progress: &(dyn Fn(u64) + Send + Sync),
    out: &mut Verified,
) -> Result<(), CacheError> {
    let mut fits = |len: u64| {
        if end > len {
            let what = part.source.describe();
            out.problem(format!("{}: its data ends at {end}, but {what} at {len}", show(opened, last)));
        }
    };
    match part.proof().await? {
        Proof::Table(table) => {
            fits(table.ulen);
            if data {
                let checks = FileChecks::new(opened, files, false);
                // Spans say nothing of the bytes of a layer around them (headers, checksums, padding): its digest does.
                let stored = matches!(opened.archive.storage, Storage::Oci(_))
                    .then(|| Stored::new(Arc::clone(&part.source), table.clen));
                check_spans(&table, &part.source, stored, checks, progress, out).await?;
            }
        }
        Proof::Layer(digest, compression) => {
            if data {
                let checks = FileChecks::new(opened, files, false);
                let (table, checks) = stream_layer(part.source.as_ref(), compression, checks, progress).await?;
                fits(table.ulen);
                checks.report(out);
                out.verified_bytes += table.ulen;
                if table.digest != digest {
                    out.problem(format!("{}: its content is {}", part.source.describe(), table.digest));
                }
                check_claim(opened, digest, table.diff_id, out);
            }
        }
        Proof::Files => {
            let size = part.source.stat().await?.size;
            fits(size);
            if data {
                let checks = FileChecks::new(opened, files, true);
                check_files(opened, part, size, checks, progress, out).await?;
            }
        }
    }
    Ok(())
}

/// What the archive says of a layer's uncompressed content (the Go module writes that).
fn check_claim(opened: &Opened, layer: Digest, diff_id: Digest, out: &mut Verified) {
    if let Storage::Oci(oci) = &opened.archive.storage
        && let Some(claim) = oci.decompressed_hash.get(&layer.to_string())
        && *claim != diff_id.hex()
    {
        out.problem(format!("layer {layer}: its uncompressed content is {diff_id}, the archive says {claim}"));
    }
}

async fn stream_layer<'a>(
    source: &dyn BlobSource,
    compression: Compression,
    mut checks: FileChecks<'a>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(BlobTable, FileChecks<'a>), CacheError> {
    let corrupt =
        |e: crate::inflate::InflateError| CacheError::Corrupt { what: source.describe(), detail: e.to_string() };
    let mut indexer = Indexer::new(compression, 1 << 20);
    let mut stream = source.stream(0).await?;
    let mut sink = |bytes: &[u8]| {
        checks.push(bytes);
        progress(bytes.len() as u64);
    };
    while let Some(bytes) = stream.try_next().await? {
        indexer.push(&bytes, &mut sink).map_err(corrupt)?;
    }
    let table = indexer.finish(&mut sink).map_err(corrupt)?;
    Ok((table, checks))
}

/// v1 without span digests: one pass over the archive file, every file by its own hash or checksum.
async fn check_files(
    opened: &Opened,
    part: &Part,
    size: u64,
    mut checks: FileChecks<'_>,
    progress: &(dyn Fn(u64) + Send + Sync),
    out: &mut Verified,
) -> Result<(), CacheError> {
    // The same spans that a mount would use: what is read here is what is read there.
    let filler = WholeFileFiller::new(Arc::clone(opened.fs.tree()), Arc::clone(&part.source), size)?;
    let mut at = HEADER_LEN as u64;
    checks.skip(at);
    let end = checks.end().min(size);
    for bound in filler.geometry.bounds.iter().copied().filter(|bound| *bound > at).collect::<Vec<_>>() {
        if at >= end {
            break;
        }
        let bytes = part.source.read_range(at..bound).await?;
        checks.push(&bytes);
        progress(bytes.len() as u64);
        at = bound;
    }
    out.verified_bytes += checks.matched_bytes;
    out.unverifiable_bytes += checks.uncovered_bytes;
    checks.report(out);
    Ok(())
}

/// Bytes of a block's type before the data of its file, in v1 archives; that of a file is 0.
const TYPE_LEN: u64 = 1;

/// Checks files by their content hashes while the bytes of their blob go by in order.
struct FileChecks<'a> {
    opened: &'a Opened,
    /// By offset.
    files: Vec<(FileRange, Option<Digest>)>,
    next: usize,
    active: Vec<Active>,
    at: u64,
    /// Files lie in blocks: a type, the data, a CRC-64.
    blocks: bool,
    matched_bytes: u64,
    uncovered_bytes: u64,
    problems: Vec<String>,
}

struct Active {
    file: FileRange,
    content: Option<FileCheck>,
    block: Option<Block>,
}

/// What is around the data of a file, as far as it went by.
struct Block {
    kind: Vec<u8>,
    check: FileCheck,
    crc: Vec<u8>,
}

impl Active {
    /// All of what is checked.
    fn range(&self) -> Range<u64> {
        let Range { start, end } = self.file.range();
        match self.block {
            Some(_) => start.saturating_sub(TYPE_LEN)..end + CRC_LEN,
            None => start..end,
        }
    }

    /// `part` gives what went by of a range.
    fn update<'b>(&mut self, part: impl Fn(Range<u64>) -> &'b [u8]) {
        let data = self.file.range();
        if let Some(content) = &mut self.content {
            content.update(part(data.clone()));
        }
        if let Some(block) = &mut self.block {
            block.kind.extend_from_slice(part(data.start.saturating_sub(TYPE_LEN)..data.start));
            block.check.update(part(data.clone()));
            block.crc.extend_from_slice(part(data.end..data.end + CRC_LEN));
        }
    }

    fn finish(self) -> Result<(), String> {
        self.content.map_or(Ok(()), |content| content.finish(&[]))?;
        let Some(Block { kind, check, crc }) = self.block else { return Ok(()) };
        match kind[..] {
            [0] => check.finish(&crc),
            [kind, ..] => Err(format!("the type before its content is {kind}, that of files is 0")),
            [] => Err("there is no type before its content".into()),
        }
    }
}

impl<'a> FileChecks<'a> {
    fn new(opened: &'a Opened, files: Vec<FileRange>, blocks: bool) -> Self {
        let tree = opened.fs.tree();
        let mut files: Vec<_> = files
            .into_iter()
            .filter(|file| tree.attr(file.node).kind == Kind::File)
            .map(|file| (file, tree.content_hash(file.node)))
            .filter(|(file, hash)| {
                (blocks || hash.is_some()) && file.offset.checked_add(file.len.saturating_add(CRC_LEN)).is_some()
            })
            .collect();
        files.sort_unstable_by_key(|(file, _)| (file.offset, file.node));
        Self {
            opened,
            files,
            next: 0,
            active: Vec::new(),
            at: 0,
            blocks,
            matched_bytes: 0,
            uncovered_bytes: 0,
            problems: Vec::new(),
        }
    }

    /// Where the last check ends.
    fn end(&self) -> u64 {
        self.files.iter().map(|(file, _)| file.range().end + CRC_LEN).max().unwrap_or(0)
    }

    fn push(&mut self, bytes: &[u8]) {
        let (start, end) = (self.at, self.at + bytes.len() as u64);
        let lead = if self.blocks { TYPE_LEN } else { 0 };
        while let Some((file, hash)) =
            self.files.get(self.next).filter(|(file, _)| file.offset.saturating_sub(lead) < end)
        {
            let block = self.blocks.then(|| Block { kind: Vec::new(), check: FileCheck::new(None), crc: Vec::new() });
            let active = Active { file: *file, content: hash.map(|hash| FileCheck::new(Some(hash))), block };
            // One that begins in bytes that were skipped can't be checked any more.
            if active.range().start >= start {
                self.active.push(active);
            } else {
                self.uncovered_bytes += file.len;
            }
            self.next += 1;
        }
        let part = |range: Range<u64>| {
            let from = range.start.clamp(start, end) - start;
            let to = range.end.clamp(start, end) - start;
            bytes.get(from as usize..(to as usize).max(from as usize)).unwrap_or_default()
        };
        let mut still = Vec::new();
        for mut active in std::mem::take(&mut self.active) {
            active.update(part);
            if end < active.range().end {
                still.push(active);
                continue;
            }
            let file = active.file;
            match active.finish() {
                Ok(()) => self.matched_bytes += file.len,
                Err(detail) => self.problems.push(format!("{}: {detail}", show(self.opened, file.node))),
            }
        }
        self.active = still;
        self.at = end;
    }

    /// `len` bytes can't be had, or hold no file: files that lie in them are not checked.
    fn skip(&mut self, len: u64) {
        self.at = self.at.saturating_add(len);
        self.uncovered_bytes += self.active.drain(..).map(|active| active.file.len).sum::<u64>();
    }

    fn report(self, out: &mut Verified) {
        self.problems.into_iter().for_each(|problem| out.problem(problem));
        for cut in self.active.iter().filter(|active| active.block.is_some()) {
            out.problem(format!("{}: the archive ends before its checksum does", show(self.opened, cut.file.node)));
        }
    }
}
