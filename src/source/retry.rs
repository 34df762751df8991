//! One policy for what is tried again: which failures, how often, how long; and streams that go on where they broke.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use tokio::time::{Instant, timeout, timeout_at};

use super::SourceError;
use crate::metrics::metrics;

/// How requests are tried again: exponential backoff with jitter, within deadlines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries, the first one included. Default 6.
    pub max_tries: u32,
    /// Shortest first pause; each pause is drawn between a value that doubles from here, and twice it. Default 100 ms.
    pub min_delay: Duration,
    /// Longest pause that the policy chooses. Default 5 s.
    pub max_delay: Duration,
    /// Time for one try, besides the time for its bytes (128 KiB a second are always allowed for). Default 20 s.
    pub attempt: Duration,
    /// Time for all tries together, besides the time for the bytes. Default 90 s.
    pub total: Duration,
    /// Longest Retry-After that is obeyed; a server that asks for more gets this. Default 20 s.
    pub max_retry_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_tries: 6,
            min_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(5),
            attempt: Duration::from_secs(20),
            total: Duration::from_secs(90),
            max_retry_after: Duration::from_secs(20),
        }
    }
}

/// Bytes a second below which a transfer counts as stuck.
const SLOWEST: u64 = 128 << 10;

/// A failed try.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// Trying again can't help.
    Final(SourceError),
    /// It may: the error to give when the tries are used up, and how long the server asked to wait.
    Again(SourceError, Option<Duration>),
}

impl Failure {
    /// Transient: the place can't be reached, or says so.
    pub(super) fn unavailable(what: &str, detail: impl Into<String>) -> Self {
        Self::Again(SourceError::Unavailable { what: what.into(), tries: 1, detail: detail.into() }, None)
    }

    /// Transient: the answer contradicts the request.
    pub(super) fn corrupt(what: &str, detail: impl Into<String>) -> Self {
        Self::Again(SourceError::Corrupt { what: what.into(), detail: detail.into() }, None)
    }

    pub(super) fn error(self) -> SourceError {
        match self {
            Self::Final(error) | Self::Again(error, _) => error,
        }
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self::Final(error)
    }
}

/// Which source is at work: the label of its metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Label {
    S3,
    Registry,
}

impl Label {
    fn as_str(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Registry => "registry",
        }
    }

    pub(super) fn count_request(self) {
        metrics().range_gets.with_label_values(&[self.as_str()]).inc();
    }

    pub(super) fn count_bytes(self, bytes: usize) {
        metrics().range_get_bytes.with_label_values(&[self.as_str()]).inc_by(bytes as u64);
    }

    fn count_retry(self) {
        metrics().fetch_retries.with_label_values(&[self.as_str()]).inc();
    }
}

impl RetryPolicy {
    fn pauses(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        ExponentialBuilder::default()
            .with_min_delay(self.min_delay)
            .with_max_delay(self.max_delay)
            .with_max_times(self.max_tries.saturating_sub(1) as usize)
            .with_jitter()
            .build()
    }

    /// Runs `attempt` until it succeeds, fails for good, or the tries or the time are used up. `bytes`: what it will transfer.
    pub(super) async fn run<T, F>(
        &self,
        label: Label,
        what: &str,
        bytes: u64,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let transfer = Duration::from_secs(bytes / SLOWEST);
        let deadline = Instant::now() + self.total + transfer;
        let mut pauses = self.pauses();
        let mut tries = 0;
        loop {
            tries += 1;
            let until = deadline.min(Instant::now() + self.attempt + transfer);
            let (error, asked) = match timeout_at(until, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Again(error, asked))) => (error, asked),
                Err(_) => {
                    let detail = format!("no whole answer within {} s", (self.attempt + transfer).as_secs());
                    (SourceError::Unavailable { what: what.into(), tries, detail }, None)
                }
            };
            let pause = pauses.next().map(|pause| asked.map_or(pause, |a| pause.max(a.min(self.max_retry_after))));
            let Some(pause) = pause.filter(|p| Instant::now() + *p < deadline) else {
                return Err(with_tries(error, tries));
            };
            tracing::debug!(what, tries, ?pause, %error, "trying again");
            label.count_retry();
            tokio::time::sleep(pause).await;
        }
    }
}

fn with_tries(error: SourceError, tries: u32) -> SourceError {
    match error {
        SourceError::Unavailable { what, detail, .. } => SourceError::Unavailable { what, tries, detail },
        other => other,
    }
}

/// The body of one request that runs to the end of a blob.
pub(super) struct Body {
    /// The blob's size, where the answer says it.
    pub(super) size: Option<u64>,
    /// The bytes from the offset that was asked for.
    pub(super) bytes: BoxStream<'static, Result<Bytes, Failure>>,
}

/// A blob whose rest can be asked for again from any offset.
#[async_trait]
pub(super) trait Restart: Send + Sync + 'static {
    /// One try.
    async fn open_at(&self, offset: u64) -> Result<Body, Failure>;
    /// For messages.
    fn name(&self) -> String;
    /// For metrics.
    fn label(&self) -> Label;
}

struct Resuming {
    policy: RetryPolicy,
    source: Arc<dyn Restart>,
    at: u64,
    size: Option<u64>,
    body: Option<BoxStream<'static, Result<Bytes, Failure>>>,
    /// Breaks since the last byte that came.
    breaks: u32,
}

/// All bytes from `offset`. A body that breaks is asked for again where it broke; [`RetryPolicy::max_tries`] breaks without
/// a byte between them end it.
pub(super) async fn stream(
    policy: &RetryPolicy,
    source: Arc<dyn Restart>,
    offset: u64,
) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
    let mut state = Resuming { policy: policy.clone(), source, at: offset, size: None, body: None, breaks: 0 };
    state.reopen().await?;
    Ok(futures::stream::try_unfold(
        state,
        |mut state| async move { Ok(state.next().await?.map(|piece| (piece, state))) },
    )
    .boxed())
}

impl Resuming {
    async fn reopen(&mut self) -> Result<(), SourceError> {
        let (source, at) = (self.source.clone(), self.at);
        let name = source.name();
        let body = self.policy.run(source.label(), &name, 0, || source.open_at(at)).await?;
        match (self.size, body.size) {
            (Some(before), Some(now)) if before != now => {
                let detail = format!("its size changed from {before} to {now} bytes while it was read; fetch it again");
                return Err(SourceError::Corrupt { what: name, detail });
            }
            (before, now) => self.size = before.or(now),
        }
        self.body = Some(body.bytes);
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            if self.size == Some(self.at) {
                return Ok(None);
            }
            if self.body.is_none() {
                self.reopen().await?;
            }
            let Some(body) = self.body.as_mut() else { continue };
            let failure = match timeout(self.policy.attempt, body.next()).await {
                Ok(Some(Ok(piece))) if piece.is_empty() => continue,
                Ok(Some(Ok(piece))) => {
                    self.breaks = 0;
                    self.at += piece.len() as u64;
                    if self.size.is_some_and(|size| self.at > size) {
                        let detail = "its body is longer than it was said to be".into();
                        return Err(SourceError::Corrupt { what: self.source.name(), detail });
                    }
                    self.source.label().count_bytes(piece.len());
                    return Ok(Some(piece));
                }
                // Nobody said how long it is: the end of the body is the end of the blob.
                Ok(None) if self.size.is_none() => return Ok(None),
                Ok(None) => {
                    let detail = format!("the body ended after {} of {} bytes", self.at, self.size.unwrap_or(self.at));
                    Failure::corrupt(&self.source.name(), detail)
                }
                Ok(Some(Err(failure))) => failure,
                Err(_) => {
                    let detail = format!("no byte came for {} s", self.policy.attempt.as_secs());
                    Failure::unavailable(&self.source.name(), detail)
                }
            };
            self.body = None;
            self.breaks += 1;
            let pause = self.policy.pauses().nth(self.breaks as usize - 1);
            match (failure, pause) {
                (Failure::Again(error, _), Some(pause)) => {
                    tracing::debug!(what = self.source.name(), at = self.at, %error, "the stream broke; resuming");
                    self.source.label().count_retry();
                    tokio::time::sleep(pause).await;
                }
                (failure, _) => return Err(with_tries(failure.error(), self.breaks)),
            }
        }
    }
}

/// The pause that a Retry-After header asks for: seconds, or a date.
pub(super) fn retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let format = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let when = time::PrimitiveDateTime::parse(value.trim(), &format).ok()?.assume_utc();
    Some((when - time::OffsetDateTime::now_utc()).try_into().unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// The default in milliseconds instead of seconds.
    fn quick() -> RetryPolicy {
        let ms = Duration::from_millis;
        RetryPolicy {
            max_tries: 6,
            min_delay: ms(1),
            max_delay: ms(5),
            attempt: ms(40),
            total: ms(150),
            max_retry_after: ms(60),
        }
    }

    fn again(after: Option<Duration>) -> Failure {
        Failure::Again(SourceError::Unavailable { what: "x".into(), tries: 1, detail: "503".into() }, after)
    }

    #[tokio::test]
    async fn transient_failures_are_tried_again_up_to_the_limit() {
        let policy = quick();
        let mut left = 3;
        let result = policy.run(Label::S3, "x", 0, || {
            left -= 1;
            let answer = if left > 0 { Err(again(None)) } else { Ok(7) };
            async move { answer }
        });
        assert_eq!(result.await.unwrap(), 7);
        let result: Result<(), _> = policy.run(Label::S3, "x", 0, || async { Err(again(None)) }).await;
        assert!(matches!(result, Err(SourceError::Unavailable { tries: 6, .. })), "{result:?}");
    }

    #[tokio::test]
    async fn final_failures_are_not_tried_again() {
        let mut tries = 0;
        let error = SourceError::NotFound { what: "x".into(), detail: "gone".into() };
        let result: Result<(), _> = quick()
            .run(Label::S3, "x", 0, || {
                tries += 1;
                let error = error.clone();
                async { Err(error.into()) }
            })
            .await;
        assert_eq!((result.unwrap_err().kind(), tries), ("not_found", 1));
    }

    #[tokio::test]
    async fn retry_after_is_obeyed_but_bounded() {
        let policy = RetryPolicy { max_tries: 2, ..quick() };
        for (asked, at_least) in [(20, 20), (3_600_000, 60)] {
            let start = Instant::now();
            let answer = || async move { Err::<(), _>(again(Some(Duration::from_millis(asked)))) };
            assert!(policy.run(Label::S3, "x", 0, answer).await.is_err());
            let took = start.elapsed();
            assert!(took >= Duration::from_millis(at_least) && took < Duration::from_secs(60), "{took:?}");
        }
        assert_eq!(retry_after(" 12 "), Some(Duration::from_secs(12)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
    }

    #[tokio::test]
    async fn a_try_that_hangs_ends_at_its_deadline_and_all_of_them_at_theirs() {
        let policy = RetryPolicy { max_tries: 100, ..quick() };
        let start = Instant::now();
        let result: Result<(), _> = policy.run(Label::S3, "x", 0, std::future::pending).await;
        assert!(matches!(result, Err(SourceError::Unavailable { tries: 2..100, .. })), "{result:?}");
        assert!(start.elapsed() < policy.total + policy.attempt * 10, "{:?}", start.elapsed());
        let start = Instant::now();
        let one = RetryPolicy { max_tries: 1, ..quick() };
        let result: Result<(), _> = one.run(Label::S3, "x", SLOWEST, std::future::pending).await;
        assert!(result.is_err() && start.elapsed() >= one.attempt + Duration::from_secs(1));
    }

    /// Serves 100 bytes in bodies that end after `cut` bytes.
    struct Cutting {
        cut: u64,
        size: Option<u64>,
        opened: Mutex<Vec<u64>>,
    }

    #[async_trait]
    impl Restart for Cutting {
        async fn open_at(&self, offset: u64) -> Result<Body, Failure> {
            self.opened.lock().unwrap().push(offset);
            let end = 100.min(offset + self.cut);
            let pieces = (offset..end).map(|b| Ok(Bytes::from(vec![b as u8])));
            let broken = (end < 100).then(|| Err(again(None)));
            Ok(Body { size: self.size, bytes: futures::stream::iter(pieces.chain(broken)).boxed() })
        }
        fn name(&self) -> String {
            "x".into()
        }
        fn label(&self) -> Label {
            Label::S3
        }
    }

    #[tokio::test]
    async fn a_stream_resumes_where_it_broke_as_long_as_bytes_come() {
        let source = Arc::new(Cutting { cut: 9, size: Some(100), opened: Mutex::default() });
        let pieces: Vec<_> = stream(&quick(), source.clone(), 1).await.unwrap().collect().await;
        let bytes: Vec<u8> = pieces.into_iter().flat_map(|p| p.unwrap()).collect();
        assert_eq!(bytes, (1..100).collect::<Vec<u8>>());
        assert_eq!(source.opened.lock().unwrap().len(), 11);
    }

    #[tokio::test]
    async fn a_stream_without_progress_ends() {
        let source = Arc::new(Cutting { cut: 0, size: Some(100), opened: Mutex::default() });
        let pieces: Vec<_> = stream(&quick(), source.clone(), 0).await.unwrap().collect().await;
        assert!(matches!(&pieces[..], [Err(SourceError::Unavailable { tries: 6, .. })]), "{pieces:?}");
        assert_eq!(source.opened.lock().unwrap().len(), 6);
    }
}
