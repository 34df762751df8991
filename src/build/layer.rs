//! One pass over one layer: download, inflate, hash and tar walk overlap.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use super::BuildError;
use super::artifacts::Artifact;
use super::indexing::{Share, TooMuch};
use super::output::{blocking, io_error};
use super::progress::Progress;
use super::tables::{self, Scanned};
use super::tar::{TarEntry, Walker};
use crate::archive::BlobTable;
use crate::inflate::Indexer;
use crate::source::{LayerSource, ResolvedImage, Scope};
use crate::units::{Compression, Digest};

/// Pieces of a layer that wait for the worker; a piece is what the source gives at once.
const QUEUE: usize = 8;
/// Layers of one image that are in work or wait for their turn; how many are in work is [`Share::turn`]'s to say.
const BEGUN: usize = 64;
/// Enough bytes to tell a gzip member and a zstd frame from a tar header.
const MAGIC_LEN: usize = 4;

/// Makes a file to keep an uncompressed layer in.
pub(super) type MakeSpool<'a> = &'a (dyn Fn() -> Result<File, BuildError> + Sync);

/// What one pass over a layer found. The layer's digest and diff ID have been checked, or its table of contents has.
#[derive(Debug)]
pub(super) struct Scan {
    /// Its entries in order.
    pub entries: Vec<TarEntry>,
    /// How to seek in it.
    pub table: BlobTable,
    /// The uncompressed layer, where one was asked for.
    pub spool: Option<File>,
}

impl Scan {
    fn weight(&self) -> u64 {
        self.entries.iter().map(weight).sum()
    }
}

/// Bytes of memory that an entry takes.
fn weight(entry: &TarEntry) -> u64 {
    size_of::<TarEntry>() as u64 + entry.held()
}

/// What a media type says of a layer's compression, and whether it is one that may not be distributed.
pub(super) fn media_type(media_type: &str) -> (Option<Compression>, bool) {
    let foreign = match media_type {
        "application/vnd.oci.image.layer.nondistributable.v1.tar" => Some(Compression::None),
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip" => Some(Compression::Gzip),
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => Some(Compression::Zstd),
        "application/vnd.docker.image.rootfs.foreign.diff.tar" => Some(Compression::None),
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Some(Compression::Gzip),
        _ => None,
    };
    (foreign.or(Compression::of_media_type(media_type)), foreign.is_some())
}

/// Scans all layers of an image, each distinct one once, the larger first as a rule. The scans of the distinct ones in the image's order, and
/// which of them each layer is. `tables`: a layer's own table of contents will do instead of a pass over it. `spool`: makes a file to
/// keep an uncompressed layer in; without it, a scan that was kept earlier will do.
pub(super) async fn scan_all(
    image: &ResolvedImage,
    diff_ids: &[Digest],
    span_size: u64,
    tables: bool,
    share: &Arc<Share>,
    spool: Option<MakeSpool<'_>>,
    progress: &dyn Progress,
) -> Result<(Vec<Scan>, Vec<usize>), BuildError> {
    let mut numbers: HashMap<Digest, usize> = HashMap::new();
    let mut distinct = Vec::new();
    let mut order = Vec::with_capacity(image.layers.len());
    for (layer, diff_id) in image.layers.iter().zip(diff_ids) {
        let number = *numbers.entry(layer.digest).or_insert_with(|| {
            distinct.push((layer.clone(), *diff_id));
            distinct.len() - 1
        });
        if distinct.get(number).is_some_and(|(_, first)| first != diff_id) {
            let detail = "the image's config gives it two different diff IDs".into();
            return Err(BuildError::BadLayer { layer: layer.digest, detail });
        }
        order.push(number);
    }
    let mut largest_first: Vec<usize> = (0..distinct.len()).collect();
    largest_first.sort_by_key(|number| Reverse(distinct[*number].0.size));
    let mut scans: Vec<Option<Scan>> = distinct.iter().map(|_| None).collect();
    let mut work = futures::stream::iter(largest_first)
        .map(|number| {
            let (layer, diff_id) = &distinct[number];
            async move {
                if tables {
                    let _turn = share.turn().await;
                    if let Some(Scanned { entries, table }) = tables::scan(layer, *diff_id, progress).await {
                        let scan = Scan { entries, table, spool: None };
                        share.hold(scan.weight()).map_err(|too_much| too_much.error(image))?;
                        return Ok((number, scan));
                    }
                }
                let bar = Bar::begin(progress, &format!("layer {}", &layer.digest.hex()[..12]), layer.size);
                let job = LayerJob { image, layer, diff_id: *diff_id, span_size, share, bar };
                let scan = match spool {
                    Some(spool) => job.scan(Some(spool)).await?,
                    None => job.kept_or_scan(&image.scope).await?,
                };
                Ok::<_, BuildError>((number, scan))
            }
        })
        .buffer_unordered(BEGUN);
    while let Some((number, scan)) = work.try_next().await? {
        scans[number] = Some(scan);
    }
    drop(work);
    let scans: Vec<Scan> = scans.into_iter().flatten().collect();
    // Merged as often as it comes.
    let mut seen = vec![false; scans.len()];
    for number in &order {
        if std::mem::replace(&mut seen[*number], true) {
            share.hold(scans[*number].weight()).map_err(|too_much| too_much.error(image))?;
        }
    }
    Ok((scans, order))
}

/// One layer of an image that is being built.
struct LayerJob<'a> {
    image: &'a ResolvedImage,
    layer: &'a LayerSource,
    diff_id: Digest,
    span_size: u64,
    share: &'a Arc<Share>,
    bar: Bar<'a>,
}

impl LayerJob<'_> {
    /// What an earlier build found, else a pass over the layer whose result is kept.
    async fn kept_or_scan(&self, scope: &Scope) -> Result<Scan, BuildError> {
        let Self { layer, diff_id, span_size, share, .. } = *self;
        let Some(artifacts) = share.artifacts() else { return self.scan(None).await };
        let (own, public) =
            (artifacts.path(&layer.digest, span_size, scope), artifacts.path(&layer.digest, span_size, &Scope::Public));
        // Builds that want the same layer at the same time: one streams it, the others find what it has kept.
        let busy = artifacts.turn(&own);
        let _busy = busy.lock().await;
        // After that, so that nobody waits for another's layer while others could use the turn.
        let _turn = share.turn().await;
        let (from, layer_digest, path) = (artifacts.clone(), layer.digest, own.clone());
        let found = blocking(move || {
            let other = || if path == public { None } else { from.load(&public, &layer_digest) };
            Ok(from.load(&path, &layer_digest).or_else(other))
        });
        if let Some(Artifact { entries, table }) = found.await? {
            check(layer, &table, diff_id)?;
            self.bar.advance(layer.size);
            let scan = Scan { entries, table, spool: None };
            share.hold(scan.weight()).map_err(|too_much| too_much.error(self.image))?;
            return Ok(scan);
        }
        let Scan { entries, table, .. } = self.pass(None).await?;
        let to = artifacts.clone();
        blocking(move || {
            let artifact = Artifact { entries, table };
            to.keep(&own, &artifact);
            let Artifact { entries, table } = artifact;
            Ok(Scan { entries, table, spool: None })
        })
        .await
    }

    /// One pass over a layer, when its turn has come.
    async fn scan(&self, spool: Option<MakeSpool<'_>>) -> Result<Scan, BuildError> {
        let _turn = self.share.turn().await;
        self.pass(spool).await
    }

    /// One pass over a layer.
    async fn pass(&self, spool: Option<MakeSpool<'_>>) -> Result<Scan, BuildError> {
        let layer = self.layer;
        let bad = |detail: String| BuildError::BadLayer { layer: layer.digest, detail };
        let spool = spool.map(|make| make()).transpose()?;
        let (feed, inbox) = mpsc::channel(QUEUE);
        let worker = Worker::new(self.span_size, spool, Arc::clone(self.share));
        let worker = tokio::task::spawn_blocking(move || worker.run(inbox));
        let fed = feed_layer(layer, feed, &self.bar).await;
        let worked = worker.await.map_err(|error| BuildError::Io {
            what: format!("the worker for layer {}", layer.digest),
            detail: error.to_string(),
        })?;
        // A source that fails makes the worker fail too: the source's error is the cause.
        fed?;
        let scan = worked.map_err(|failure| match failure {
            Failure::Layer(detail) => bad(detail),
            Failure::Spool(error) => io_error("write a layer to a temporary file")(error),
            Failure::Metadata(too_much) => too_much.error(self.image),
            Failure::Abandoned => bad("the build was abandoned".into()),
        })?;
        check(layer, &scan.table, self.diff_id)?;
        Ok(scan)
    }
}

/// The layer is the one that the manifest names and the configuration describes.
fn check(layer: &LayerSource, table: &BlobTable, diff_id: Digest) -> Result<(), BuildError> {
    let bad = |detail: String| Err(BuildError::BadLayer { layer: layer.digest, detail });
    if table.digest != layer.digest {
        let found = table.digest;
        return bad(format!("{} serves bytes with the digest {found}; pull it again", layer.source.describe()));
    }
    if table.diff_id != diff_id {
        let found = table.diff_id;
        return bad(format!("uncompressed it has the digest {found}, the image's config says {diff_id}"));
    }
    Ok(())
}

/// Hands the layer's bytes to the worker; ends early where the worker has.
async fn feed_layer(layer: &LayerSource, feed: mpsc::Sender<Feed>, bar: &Bar<'_>) -> Result<(), BuildError> {
    let bad = |detail: String| BuildError::BadLayer { layer: layer.digest, detail };
    let mut stream = layer.source.stream(0).await?;
    let mut length = 0_u64;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        length += piece.len() as u64;
        if length > layer.size {
            return Err(bad(format!("it is longer than the {} bytes of its descriptor", layer.size)));
        }
        bar.advance(piece.len() as u64);
        if feed.send(Feed::Piece(piece)).await.is_err() {
            return Ok(());
        }
    }
    if length < layer.size {
        return Err(bad(format!(
            "it ends after {length} of the {} bytes of its descriptor; pull it again",
            layer.size
        )));
    }
    // A worker that is gone says why itself.
    let _ = feed.send(Feed::End).await;
    Ok(())
}

/// A progress bar that ends when dropped.
pub(super) struct Bar<'a> {
    progress: &'a dyn Progress,
    id: u64,
}

impl<'a> Bar<'a> {
    pub(super) fn begin(progress: &'a dyn Progress, what: &str, total: u64) -> Self {
        Self { progress, id: progress.begin(what, Some(total)) }
    }
    pub(super) fn advance(&self, bytes: u64) {
        self.progress.advance(self.id, bytes);
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.progress.end(self.id);
    }
}

/// What the worker is fed with. A queue that closes without an end means that the build is given up.
enum Feed {
    Piece(Bytes),
    End,
}

enum Failure {
    Layer(String),
    Spool(std::io::Error),
    Metadata(TooMuch),
    Abandoned,
}

/// Inflates and walks, on a thread of its own.
struct Worker {
    span_size: u64,
    sink: Sink,
}

/// Takes the uncompressed bytes.
struct Sink {
    walker: Walker,
    entries: Vec<TarEntry>,
    share: Arc<Share>,
    spool: Option<File>,
    failure: Option<Failure>,
}

impl Sink {
    fn take(&mut self, bytes: &[u8]) {
        if self.failure.is_some() {
            return;
        }
        let (entries, mut taken) = (&mut self.entries, 0);
        let mut keep = |entry: TarEntry| {
            taken += weight(&entry);
            entries.push(entry);
        };
        if let Err(error) = self.walker.push(bytes, &mut keep) {
            self.failure = Some(Failure::Layer(error.to_string()));
        } else if let Err(too_much) = self.share.hold(taken) {
            self.failure = Some(Failure::Metadata(too_much));
        } else if let Some(spool) = &mut self.spool
            && let Err(error) = spool.write_all(bytes)
        {
            self.failure = Some(Failure::Spool(error));
        }
    }
}

impl Worker {
    fn new(span_size: u64, spool: Option<File>, share: Arc<Share>) -> Self {
        let sink = Sink { walker: Walker::new(), entries: Vec::new(), share, spool, failure: None };
        Self { span_size, sink }
    }

    fn run(mut self, mut inbox: mpsc::Receiver<Feed>) -> Result<Scan, Failure> {
        let mut head: Vec<u8> = Vec::new();
        let mut indexer = None;
        loop {
            let (piece, last) = match inbox.blocking_recv() {
                Some(Feed::Piece(piece)) => (piece, false),
                Some(Feed::End) => (Bytes::new(), true),
                None => return Err(Failure::Abandoned),
            };
            if let Some(indexer) = &mut indexer {
                self.push(indexer, &piece)?;
            } else {
                head.extend_from_slice(&piece);
                if head.len() >= MAGIC_LEN || last {
                    // The bytes decide, as in every other unpacker: builders are known to mislabel layers.
                    let indexer = indexer.insert(Indexer::new(sniff(&head), self.span_size));
                    self.push(indexer, &std::mem::take(&mut head))?;
                }
            }
            if last {
                break;
            }
        }
        let Some(indexer) = indexer else { return Err(Failure::Abandoned) };
        let sink = &mut self.sink;
        let table = indexer.finish(&mut |bytes| sink.take(bytes)).map_err(|e| Failure::Layer(e.to_string()))?;
        if let Some(failure) = self.sink.failure.take() {
            return Err(failure);
        }
        self.sink.walker.finish().map_err(|error| Failure::Layer(error.to_string()))?;
        Ok(Scan { entries: self.sink.entries, table, spool: self.sink.spool })
    }

    fn push(&mut self, indexer: &mut Indexer, piece: &[u8]) -> Result<(), Failure> {
        let sink = &mut self.sink;
        let pushed = indexer.push(piece, &mut |bytes| sink.take(bytes));
        // What the walker met lies before what stopped the inflater.
        if let Some(failure) = self.sink.failure.take() {
            return Err(failure);
        }
        pushed.map_err(|error| Failure::Layer(error.to_string()))
    }
}

/// The compression that a layer's first bytes show.
fn sniff(head: &[u8]) -> Compression {
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        // A frame, or a skippable one as zstd:chunked and pzstd write.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}
