//! Doubles of [`BlobSource`] for tests: one in memory that counts, and one that makes any source fail by a script.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::Semaphore;

use super::{BlobSource, BlobStat, SourceError};
use crate::units::Digest;

/// Bytes per piece of a [`FakeSource`]'s stream.
const PIECE: usize = 64 << 10;

/// A blob in memory. Counts what is asked of it.
#[derive(Debug)]
pub struct FakeSource {
    name: String,
    data: Bytes,
    identity: String,
    stats: AtomicU64,
    ranges: Mutex<Vec<Range<u64>>>,
}

impl FakeSource {
    /// A blob of these bytes; its identity is their digest.
    pub fn new(name: &str, data: impl Into<Bytes>) -> Arc<Self> {
        let data = data.into();
        let identity = Digest::of(&data).to_string();
        Arc::new(Self { name: name.into(), data, identity, stats: AtomicU64::new(0), ranges: Mutex::default() })
    }

    /// Range reads and streams so far.
    pub fn requests(&self) -> u64 {
        self.ranges().len() as u64
    }

    /// Calls of `stat` so far.
    pub fn stats(&self) -> u64 {
        self.stats.load(Ordering::Relaxed)
    }

    /// Bytes asked for so far (a stream counts as the whole rest).
    pub fn bytes_read(&self) -> u64 {
        self.ranges().iter().map(|r| r.end - r.start).sum()
    }

    /// The ranges asked for so far, in order.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cut(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        let size = self.data.len() as u64;
        if range.start > range.end || range.end > size {
            let detail = format!("bytes {}..{} were asked for and it has {size}", range.start, range.end);
            return Err(SourceError::Corrupt { what: self.name.clone(), detail });
        }
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).push(range.clone());
        Ok(self.data.slice(range.start as usize..range.end as usize))
    }
}

#[async_trait]
impl BlobSource for FakeSource {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        self.cut(range)
    }

    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        let mut rest = self.cut(offset..self.data.len() as u64)?;
        let pieces = std::iter::from_fn(move || {
            let piece = rest.split_to(rest.len().min(PIECE));
            (!piece.is_empty()).then_some(Ok(piece))
        });
        Ok(futures::stream::iter(pieces).boxed())
    }

    async fn stat(&self) -> Result<BlobStat, SourceError> {
        self.stats.fetch_add(1, Ordering::Relaxed);
        Ok(BlobStat { size: self.data.len() as u64, identity: self.identity.clone() })
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}

/// Holds reads until the test lets them go.
#[derive(Debug, Clone)]
pub struct Gate {
    entered: Arc<Semaphore>,
    opened: Arc<Semaphore>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { entered: Arc::new(Semaphore::new(0)), opened: Arc::new(Semaphore::new(0)) }
    }
}

impl Gate {
    /// Waits until one more read stands at the gate.
    pub async fn entered(&self) {
        take(&self.entered).await;
    }

    /// Lets `reads` reads through, now or when they come.
    pub fn open(&self, reads: usize) {
        self.opened.add_permits(reads);
    }

    async fn pass(&self) {
        self.entered.add_permits(1);
        take(&self.opened).await;
    }
}

async fn take(semaphore: &Semaphore) {
    if let Ok(permit) = semaphore.acquire().await {
        permit.forget();
    }
}

/// What becomes of one request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing: it succeeds.
    None,
    /// It fails.
    Error(SourceError),
    /// That many bytes are missing at the end, without an error: a source that breaks its promise.
    Short(usize),
    /// All bits of one byte are flipped: the byte at this offset *of the blob*, if the request covers it.
    Flip(u64),
    /// The request waits at the gate, then succeeds.
    Wait(Gate),
    /// A stream breaks with the error after so many bytes. A range read fails.
    Break(u64, SourceError),
}

/// Wraps a source. Requests take their fault from the script, in order; when it is used up, from the standing fault.
#[derive(Debug)]
pub struct FaultySource {
    inner: Arc<dyn BlobSource>,
    script: Mutex<VecDeque<Fault>>,
    standing: Mutex<Fault>,
}

impl FaultySource {
    /// No standing fault.
    pub fn new(inner: Arc<dyn BlobSource>, script: impl IntoIterator<Item = Fault>) -> Arc<Self> {
        let script = Mutex::new(script.into_iter().collect());
        Arc::new(Self { inner, script, standing: Mutex::new(Fault::None) })
    }

    /// Appends to the script.
    pub fn push(&self, fault: Fault) {
        self.script.lock().unwrap_or_else(PoisonError::into_inner).push_back(fault);
    }

    /// The fault of every request that the script does not cover.
    pub fn always(&self, fault: Fault) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    fn next(&self) -> Fault {
        let scripted = self.script.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        scripted.unwrap_or_else(|| self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// `bytes`, which begin at `at`, with the byte at `target` flipped.
fn flip(bytes: Bytes, at: u64, target: u64) -> Bytes {
    let mut changed = bytes.to_vec();
    if let Some(byte) = target.checked_sub(at).and_then(|i| changed.get_mut(i as usize)) {
        *byte = !*byte;
    }
    changed.into()
}

#[async_trait]
impl BlobSource for FaultySource {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        let (fault, start) = (self.next(), range.start);
        match &fault {
            Fault::Error(error) | Fault::Break(_, error) => return Err(error.clone()),
            Fault::Wait(gate) => gate.pass().await,
            _ => {}
        }
        let mut bytes = self.inner.read_range(range).await?;
        match fault {
            Fault::Short(missing) => bytes.truncate(bytes.len().saturating_sub(missing)),
            Fault::Flip(target) => bytes = flip(bytes, start, target),
            _ => {}
        }
        Ok(bytes)
    }

    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        let fault = self.next();
        match &fault {
            Fault::Error(error) => return Err(error.clone()),
            Fault::Wait(gate) => gate.pass().await,
            _ => {}
        }
        let size = self.inner.stat().await?.size;
        let end = match &fault {
            Fault::Short(missing) => size.saturating_sub(*missing as u64),
            Fault::Break(after, _) => offset.saturating_add(*after),
            _ => size,
        };
        let error = match &fault {
            Fault::Break(_, error) => Some(error.clone()),
            _ => None,
        };
        let target = match fault {
            Fault::Flip(target) => Some(target),
            _ => None,
        };
        let mut at = offset;
        let body = self.inner.stream(offset).await?.map(move |piece| {
            let mut piece = piece?;
            let start = at;
            at += piece.len() as u64;
            piece.truncate(end.saturating_sub(start) as usize);
            Ok(match target {
                Some(target) => flip(piece, start, target),
                None => piece,
            })
        });
        let body = body.filter(|piece| std::future::ready(!matches!(piece, Ok(p) if p.is_empty())));
        Ok(body.chain(futures::stream::iter(error.map(Err))).boxed())
    }

    async fn stat(&self) -> Result<BlobStat, SourceError> {
        self.inner.stat().await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> SourceError {
        SourceError::Unavailable { what: "x".into(), tries: 1, detail: "lost".into() }
    }

    async fn collect(source: &dyn BlobSource, offset: u64) -> (Vec<u8>, Option<SourceError>) {
        let mut all = Vec::new();
        let mut stream = source.stream(offset).await.unwrap();
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => all.extend_from_slice(&piece),
                Err(error) => return (all, Some(error)),
            }
        }
        (all, None)
    }

    #[tokio::test]
    async fn the_fake_counts_requests_and_bytes() {
        let data: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        let fake = FakeSource::new("fake", data.clone());
        assert_eq!(fake.read_range(5..10).await.unwrap(), data[5..10]);
        assert_eq!(collect(&*fake, 199_990).await.0, data[199_990..]);
        assert!(fake.read_range(0..200_001).await.is_err());
        assert_eq!((fake.requests(), fake.bytes_read()), (2, 15));
        assert_eq!(collect(&*fake, 0).await.0, data);
        assert_eq!(fake.stat().await.unwrap().size, 200_000);
        assert_eq!(fake.stats(), 1);
    }

    #[tokio::test]
    async fn faults_come_in_the_order_of_the_script() {
        let fake = FakeSource::new("fake", vec![1u8; 100]);
        let faulty = FaultySource::new(fake, [Fault::Error(lost()), Fault::Short(3), Fault::Flip(12), Fault::None]);
        assert_eq!(faulty.read_range(10..20).await.unwrap_err().kind(), "unavailable");
        assert_eq!(faulty.read_range(10..20).await.unwrap().len(), 7);
        assert_eq!(faulty.read_range(10..20).await.unwrap()[2], !1);
        assert_eq!(faulty.read_range(10..20).await.unwrap(), vec![1u8; 10]);
        faulty.always(Fault::Error(lost()));
        faulty.push(Fault::None);
        assert!(faulty.read_range(0..1).await.is_ok());
        assert!(faulty.read_range(0..1).await.is_err());
    }

    #[tokio::test]
    async fn streams_break_and_flip_where_the_script_says() {
        let fake = FakeSource::new("fake", vec![1u8; 200_000]);
        let faulty = FaultySource::new(fake, [Fault::Break(70_000, lost()), Fault::Flip(100_000), Fault::Short(10)]);
        let (got, error) = collect(&*faulty, 10).await;
        assert_eq!((got.len(), error.map(|e| e.kind())), (70_000, Some("unavailable")));
        let (got, error) = collect(&*faulty, 10).await;
        assert_eq!((got[99_990], got.len(), error.is_none()), (!1, 199_990, true));
        assert_eq!(collect(&*faulty, 10).await.0.len(), 199_980);
    }

    #[tokio::test]
    async fn a_gate_holds_a_read_until_it_is_opened() {
        let gate = Gate::default();
        let faulty = FaultySource::new(FakeSource::new("fake", vec![1u8; 9]), [Fault::Wait(gate.clone())]);
        let read = tokio::spawn(async move { faulty.read_range(0..9).await });
        gate.entered().await;
        assert!(!read.is_finished());
        gate.open(1);
        assert_eq!(read.await.unwrap().unwrap().len(), 9);
    }
}
