//! The digest of a blob as it is stored, computed on the way of a reader that takes it in pieces.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use sha2::{Digest as _, Sha256};

use crate::source::{BlobSource, BlobStat, SourceError};
use crate::units::Digest;

/// Bytes that are read at once where no reader was.
const PIECE: u64 = 1 << 20;

/// Passes reads on and hashes what they bring, each byte once and in order. A reader that goes forward in small steps and calls
/// [`Stored::fill_gaps`] after each of them has little more than one step in memory.
#[derive(Debug)]
pub(super) struct Stored {
    source: Arc<dyn BlobSource>,
    len: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    hash: Sha256,
    /// Bytes hashed so far.
    at: u64,
    /// Pieces that came before those in front of them, by offset.
    ahead: BTreeMap<u64, Bytes>,
}

impl State {
    fn take(&mut self, offset: u64, bytes: &Bytes) {
        // Of two pieces that begin together the longer one holds both.
        let longer = self.ahead.get(&offset).is_none_or(|have| have.len() < bytes.len());
        if longer && offset + bytes.len() as u64 > self.at {
            self.ahead.insert(offset, bytes.clone());
        }
        while let Some(first) = self.ahead.first_entry().filter(|first| *first.key() <= self.at) {
            let (offset, bytes) = first.remove_entry();
            let new = usize::try_from(self.at - offset).ok().and_then(|known| bytes.get(known..)).unwrap_or_default();
            self.hash.update(new);
            self.at += new.len() as u64;
        }
    }
}

impl Stored {
    /// Of a blob of `len` bytes.
    pub(super) fn new(source: Arc<dyn BlobSource>, len: u64) -> Arc<Self> {
        Arc::new(Self { source, len, state: Mutex::default() })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what lies before the pieces that came.
    pub(super) async fn fill_gaps(&self) -> Result<(), SourceError> {
        loop {
            let gap = {
                let state = self.state();
                state.ahead.first_key_value().map(|(next, _)| state.at..*next)
            };
            let Some(gap) = gap else { return Ok(()) };
            self.read(gap).await?;
        }
    }

    async fn read(&self, range: Range<u64>) -> Result<(), SourceError> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + PIECE);
            self.read_range(at..end).await?;
            at = end;
        }
        Ok(())
    }

    /// Reads the rest; the digest of the whole, `None` if the blob has another length.
    pub(super) async fn finish(&self) -> Result<Option<Digest>, SourceError> {
        self.fill_gaps().await?;
        let at = self.state().at;
        self.read(at..self.len).await?;
        if self.source.stat().await?.size != self.len {
            return Ok(None);
        }
        let hash = std::mem::take(&mut self.state().hash);
        Ok(Some(Digest(hash.finalize().into())))
    }
}

#[async_trait]
impl BlobSource for Stored {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        let offset = range.start;
        let bytes = self.source.read_range(range).await?;
        self.state().take(offset, &bytes);
        Ok(bytes)
    }
    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        self.source.stream(offset).await
    }
    async fn stat(&self) -> Result<BlobStat, SourceError> {
        self.source.stat().await
    }
    fn describe(&self) -> String {
        self.source.describe()
    }
    fn place(&self) -> String {
        self.source.place()
    }
}
