//! Fetching the tables of a layer that has some. What is read out of them: [`super::toc`].

use std::ops::Range;

use bytes::Bytes;

use super::layer::Bar;
use super::progress::Progress;
use super::tar::TarEntry;
use super::toc::{TocError, broken, estargz, zstd_chunked};
use crate::archive::BlobTable;
use crate::source::{LayerSource, SourceError};
use crate::units::{Compression, Digest};

/// Most bytes of a layer's end that are fetched with an eStargz footer, in the hope that the table is among them …
const TAIL: u64 = 256 << 10;
/// … and at most this part of the layer, so that what was in vain does not count.
const TAIL_PART: u64 = 200;

/// What the tables of a layer say: as much as a pass over it would.
#[derive(Debug)]
pub(super) struct Scanned {
    /// Its entries in order.
    pub entries: Vec<TarEntry>,
    /// How to seek in it.
    pub table: BlobTable,
}

/// Why the tables were not used. It is logged, and the layer streamed: where the source is at fault, that says so.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Toc(#[from] TocError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("reading it was broken off")]
    Abandoned,
}

/// Where a layer's tables are, by its annotations.
enum Kind {
    EStargz(Digest),
    ZstdChunked(zstd_chunked::Positions),
}

fn kind(layer: &LayerSource) -> Option<Result<Kind, TocError>> {
    if let Some(positions) = zstd_chunked::positions(&layer.annotations, layer.size) {
        return Some(positions.map(Kind::ZstdChunked));
    }
    let digest = layer.annotations.get(estargz::ANNOTATION)?;
    Some(digest.parse().map(Kind::EStargz).map_err(|_| broken("its digest of a table of contents", "it is none")))
}

/// Reads a layer's tables. `None`: it has none that the manifest vouches for, or they can't be used; the log says why.
/// `diff_id` can't be checked without the layer, and is taken as the image's config has it.
pub(super) async fn scan(layer: &LayerSource, diff_id: Digest, progress: &dyn Progress) -> Option<Scanned> {
    match read(layer, kind(layer)?, diff_id, progress).await {
        Ok(scanned) => {
            tracing::debug!(layer = %layer.digest, files = scanned.entries.len(), "indexed by its own table of contents");
            Some(scanned)
        }
        Err(error) => {
            tracing::warn!(layer = %layer.digest, reason = %error, "its table of contents is not used: streaming the layer");
            None
        }
    }
}

async fn read(
    layer: &LayerSource,
    kind: Result<Kind, TocError>,
    diff_id: Digest,
    progress: &dyn Progress,
) -> Result<Scanned, Failure> {
    let (digest, size) = (layer.digest, layer.size);
    let what = format!("tables of layer {}", &digest.hex()[..12]);
    let (contents, compression) = match kind? {
        Kind::EStargz(toc) => {
            let tail = size.min((size / TAIL_PART).clamp(estargz::FOOTER_LEN as u64, TAIL));
            let end = layer.source.read_range(size - tail..size).await?;
            let footer = estargz::footer(&end, size)?;
            let bar = Bar::begin(progress, &what, footer.start - footer.toc);
            let member = with_tail(layer, footer.toc..footer.start, &end).await?;
            let (contents, (entry, chunk)) = aside(move || estargz::open(&member, footer, &toc)).await?;
            let stream = with_tail(layer, estargz::last_stream(&contents, footer)?, &end).await?;
            bar.advance(footer.start - footer.toc);
            let with_table = move || {
                let mut contents = contents;
                if estargz::is_in_the_tar(&contents, &stream)? {
                    contents.push(entry, chunk);
                }
                Ok(contents)
            };
            (aside(with_table).await?, Compression::Gzip)
        }
        Kind::ZstdChunked(positions) => {
            let split = positions.tar_split.map(|piece| piece.range());
            let total = positions.table.stored + positions.tar_split.map_or(0, |piece| piece.stored);
            let bar = Bar::begin(progress, &what, total);
            let table = layer.source.read_range(positions.table.range());
            let split = async {
                match split {
                    Some(range) => layer.source.read_range(range).await.map(Some),
                    None => Ok(None),
                }
            };
            let (table, split) = futures::future::try_join(table, split).await?;
            bar.advance(total);
            (aside(move || zstd_chunked::open(&positions, &table, split.as_deref())).await?, Compression::Zstd)
        }
    };
    let table = contents.table(digest, compression, size, diff_id)?;
    Ok(Scanned { entries: contents.entries, table })
}

/// Parses off the runtime's threads: there may be 64 MiB of JSON.
async fn aside<T: Send + 'static>(parse: impl FnOnce() -> Result<T, TocError> + Send + 'static) -> Result<T, Failure> {
    Ok(tokio::task::spawn_blocking(parse).await.map_err(|_| Failure::Abandoned)??)
}

/// The bytes of `range` of a layer, the last bytes of which are here.
async fn with_tail(layer: &LayerSource, range: Range<u64>, tail: &Bytes) -> Result<Bytes, SourceError> {
    let start = layer.size - tail.len() as u64;
    let here = range.start.max(start) - start..range.end.max(start) - start;
    let here = tail.slice(here.start as usize..here.end as usize);
    if range.start >= start {
        return Ok(here);
    }
    let head = layer.source.read_range(range.start..range.end.min(start)).await?;
    Ok(if here.is_empty() { head } else { [&head[..], &here[..]].concat().into() })
}
