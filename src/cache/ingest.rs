//! Layers of archives that bring no span table of ours: streamed once, unserved until their digest is right.
//!
//! The uncompressed bytes go to a file under `incoming/`, and the table is made on the way. Only when the
//! *compressed* bytes match the layer's digest is the file adopted under its key with all its marks, and the table
//! kept for the next start. Without room for the bytes the table is made all the same: reads then fetch their spans
//! one by one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{mpsc, watch};

use super::fill::TableFiller;
use super::space::Space;
use super::store::{self, lock};
use super::{CacheError, CacheKey};
use crate::archive::{BlobTable, SeekTable};
use crate::inflate::{Indexer, InflateError};
use crate::source::BlobSource;
use crate::units::{Compression, Digest};

/// First bytes of a kept table; SHA-256 of the rest and the rest follow.
const MAGIC: &[u8; 8] = b"CLIPTAB\x01";
/// Largest kept table that is read: a layer of about 200 GB.
const TABLE_MAX: u64 = 512 << 20;
/// Pieces between the network and inflate.
const QUEUE: usize = 8;

type Outcome = Option<Result<Arc<BlobTable>, CacheError>>;

/// Ingests under way, one per layer.
pub(super) type Ingests = Mutex<HashMap<Digest, watch::Receiver<Outcome>>>;

/// The table of `layer`: kept from an earlier time, or made by streaming the layer. Callers of the same layer share
/// one run, which goes on when they are gone.
pub(super) async fn ingest(
    space: &Arc<Space>,
    layer: Digest,
    compression: Compression,
    source: Arc<dyn BlobSource>,
    span_size: u64,
) -> Result<Arc<BlobTable>, CacheError> {
    let mut outcome = {
        let mut ingests = lock(&space.ingests);
        match ingests.get(&layer) {
            Some(outcome) => outcome.clone(),
            None => {
                let sender = watch::Sender::new(None);
                let outcome = sender.subscribe();
                ingests.insert(layer, sender.subscribe());
                space.flying.send_modify(|n| *n += 1);
                space.urgent.send_modify(|n| *n += 1);
                let run = Run { space: space.clone(), layer, sender };
                tokio::spawn(async move {
                    let result = run.table(compression, source, span_size).await;
                    run.sender.send_replace(Some(result));
                });
                outcome
            }
        }
    };
    let result = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
    result.unwrap_or_else(|| Err(super::flight::abandoned()))
}

/// One ingest; it leaves the list however it ends.
struct Run {
    space: Arc<Space>,
    layer: Digest,
    sender: watch::Sender<Outcome>,
}

impl Drop for Run {
    fn drop(&mut self) {
        lock(&self.space.ingests).remove(&self.layer);
        self.space.urgent.send_modify(|n| *n -= 1);
        self.space.flying.send_modify(|n| *n -= 1);
    }
}

impl Run {
    async fn table(
        &self,
        compression: Compression,
        source: Arc<dyn BlobSource>,
        span_size: u64,
    ) -> Result<Arc<BlobTable>, CacheError> {
        let what = source.describe();
        let broken_off = || super::flight::abandoned();
        let (path, layer) = (table_path(&self.space.dir, &self.layer), self.layer);
        let kept = tokio::task::spawn_blocking(move || load(&path, &layer)).await.map_err(|_| broken_off())?;
        if let Some(table) = kept {
            return Ok(Arc::new(table));
        }
        // The semaphore is never closed.
        let _turn = self.space.ingesting.acquire().await;
        let (sender, inbox) = mpsc::channel(QUEUE);
        let (space, name) = (self.space.clone(), what.clone());
        let work = tokio::task::spawn_blocking(move || index(&space, layer, compression, span_size, inbox, &name));
        let mut stream = source.stream(0).await?;
        while let Some(piece) = stream.next().await {
            let piece = piece?;
            // The receiver is gone where the bytes are wrong: it says why.
            if !piece.is_empty() && sender.send(piece).await.is_err() {
                break;
            }
        }
        // An error above leaves this out, so that a broken stream is not taken for a whole one: see `index`.
        let _ = sender.send(Bytes::new()).await;
        drop(sender);
        work.await.map_err(|_| broken_off())?.map(Arc::new)
    }
}

/// Indexes what comes in; an empty piece is its end.
fn index(
    space: &Arc<Space>,
    layer: Digest,
    compression: Compression,
    span_size: u64,
    mut inbox: mpsc::Receiver<Bytes>,
    what: &str,
) -> Result<BlobTable, CacheError> {
    let corrupt = |detail: String| CacheError::Corrupt { what: format!("{what} (layer {layer})"), detail };
    let wrong = |error: InflateError| corrupt(error.to_string());
    let mut incoming = Incoming::new(space.clone(), &layer);
    let mut indexer = Indexer::new(compression, span_size);
    loop {
        match inbox.blocking_recv() {
            None => return Err(super::flight::abandoned()),
            Some(piece) if piece.is_empty() => break,
            Some(piece) => indexer.push(&piece, &mut |bytes| incoming.write(bytes)).map_err(wrong)?,
        }
    }
    let table = indexer.finish(&mut |bytes| incoming.write(bytes)).map_err(wrong)?;
    if table.digest != layer {
        return Err(corrupt(format!("its SHA-256 is {}", table.digest)));
    }
    incoming.adopt(&table);
    if let Err(error) = keep(&space.dir, &table) {
        space.write_failed(&error);
    }
    Ok(table)
}

/// The hidden file. It goes with its bytes unless it is adopted.
struct Incoming {
    space: Arc<Space>,
    path: PathBuf,
    /// `None`: there is no room, the bytes are not kept.
    file: Option<File>,
    counted: u64,
}

impl Incoming {
    fn new(space: Arc<Space>, layer: &Digest) -> Self {
        let path = space.dir.join("incoming").join(layer.hex());
        let file = create(&path).map_err(|error| space.write_failed(&error)).ok();
        Self { space, path, file, counted: 0 }
    }

    fn write(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let written = if self.space.room_for(bytes.len() as u64) {
            file.write_all(bytes).map_err(|error| self.space.write_failed(&error)).is_ok()
        } else {
            false
        };
        if written {
            self.counted += bytes.len() as u64;
            self.space.account(bytes.len() as i64);
        } else {
            self.discard();
        }
    }

    fn discard(&mut self) {
        if self.file.take().is_some() {
            crate::metrics::metrics().cache_uncached_reads.inc();
            let _ = std::fs::remove_file(&self.path);
        }
        self.space.account(-(self.counted as i64));
        self.counted = 0;
    }

    /// Moves the file to its place, marks after data.
    fn adopt(&mut self, table: &BlobTable) {
        let Some(file) = self.file.take() else { return };
        let bounds = TableFiller::bounds(table);
        let map = self.path.with_extension("map");
        let blocks = (|| -> io::Result<u64> {
            file.sync_data()?;
            // A whole layer went through the page cache; of it, what is read will be read again.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            let mut marks = create(&map)?;
            marks.write_all(&store::full_map(&bounds))?;
            marks.sync_all()?;
            Ok((file.metadata()?.blocks() + marks.metadata()?.blocks()) * 512)
        })();
        let adopted = match blocks {
            Ok(blocks) => {
                let key = CacheKey::table(&table.digest, &table.root());
                let adopted = self.space.adopt(key, &self.path, &map, blocks);
                if adopted {
                    self.space.account(blocks as i64 - self.counted as i64);
                    self.counted = 0;
                }
                adopted
            }
            Err(error) => {
                self.space.write_failed(&error);
                false
            }
        };
        if !adopted {
            let _ = std::fs::remove_file(&map);
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
        self.space.account(-(self.counted as i64));
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().write(true).read(true).create(true).truncate(true).mode(0o600).open(path)
}

fn table_path(dir: &Path, layer: &Digest) -> PathBuf {
    dir.join("tables").join(layer.hex())
}

/// Keeps a table: temporary file, sync, rename.
fn keep(dir: &Path, table: &BlobTable) -> io::Result<()> {
    let body = SeekTable { blobs: vec![table.clone()] }.encode();
    let path = dir.join("incoming").join(format!("{}.table", table.digest.hex()));
    let written = create(&path).and_then(|mut file| {
        file.write_all(MAGIC)?;
        file.write_all(&Digest::of(&body).0)?;
        file.write_all(&body)?;
        file.sync_all()
    });
    written.and_then(|()| std::fs::rename(&path, table_path(dir, &table.digest))).inspect_err(|_| {
        let _ = std::fs::remove_file(&path);
    })
}

/// A kept table, if it is whole and of this layer. One that is not is deleted.
fn load(path: &Path, layer: &Digest) -> Option<BlobTable> {
    if std::fs::metadata(path).ok()?.len() > TABLE_MAX {
        return None;
    }
    let bytes = std::fs::read(path).ok()?;
    let table = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(32)).and_then(|(sum, body)| {
        let whole = Digest::of(body).0 == *sum;
        let mut table = whole.then(|| SeekTable::decode(body).ok()).flatten()?;
        table.blobs.pop().filter(|table| table.digest == *layer && table.spans.len() < u32::MAX as usize)
    });
    match &table {
        // Its age is the time since it was last asked for.
        Some(_) => {
            drop(File::options().write(true).open(path).and_then(|f| f.set_modified(std::time::SystemTime::now())))
        }
        None => drop(std::fs::remove_file(path)),
    }
    table
}
