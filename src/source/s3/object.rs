//! One object, read by range. Needs `s3:GetObject` on its key and nothing else: size and ETag come with the first answer.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, StreamExt};

use super::super::retry::{self, Body, Failure, Label, Restart, RetryPolicy};
use super::super::{BlobSource, BlobStat, SourceError};
use super::client;

/// Longest range that is read at once, in bytes.
const RANGE_LIMIT: u64 = 1 << 30;

/// An object in S3. One request per range; all after the first carry If-Match.
#[derive(Debug)]
pub(super) struct S3Object(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: Client,
    bucket: String,
    key: String,
    name: String,
    known: OnceLock<Known>,
    retry: RetryPolicy,
}

/// What the first answer said; every other one must say the same.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    size: u64,
    etag: Option<String>,
}

impl S3Object {
    pub(super) fn new(client: Client, bucket: &str, key: &str, name: String, retry: RetryPolicy) -> Self {
        let (bucket, key) = (bucket.to_owned(), key.to_owned());
        Self(Arc::new(Inner { client, bucket, key, name, known: OnceLock::new(), retry }))
    }
}

impl Inner {
    fn changed(&self) -> SourceError {
        let detail = "the object was changed while it was in use; keep archives under new keys".into();
        SourceError::Corrupt { what: self.name.clone(), detail }
    }

    fn learn(&self, size: u64, etag: Option<&str>) -> Result<(), Failure> {
        let now = Known { size, etag: etag.map(str::to_owned) };
        if *self.known.get_or_init(|| now.clone()) == now { Ok(()) } else { Err(self.changed().into()) }
    }

    /// One try. `range`: as the header has it; `None`: all of it.
    async fn get(&self, range: Option<String>) -> Result<GetObjectOutput, Failure> {
        Label::S3.count_request();
        let etag = self.known.get().and_then(|k| k.etag.clone());
        self.client
            .get_object()
            .bucket(&self.bucket)
            .key(&self.key)
            .set_range(range)
            .set_if_match(etag)
            .send()
            .await
            .map_err(|e| client::failure(&self.name, e))
    }

    /// A ranged answer's head must be exactly the range: first and last byte, length, and the size and ETag of before.
    fn judge(&self, out: &GetObjectOutput, start: u64, end: Option<u64>) -> Result<u64, Failure> {
        let wrong = |detail: String| Failure::corrupt(&self.name, detail);
        let said = out.content_range().unwrap_or("no Content-Range");
        let parsed = (|| {
            let (range, total) = said.strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = range.split_once('-')?;
            Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, total.parse::<u64>().ok()?))
        })();
        let Some((first, last, total)) = parsed else {
            return Err(wrong(format!("the store answered a range request with {said:?}; it must serve ranges")));
        };
        self.learn(total, out.e_tag())?;
        let end = end.unwrap_or(total);
        if first != start || last.checked_add(1) != Some(end) {
            return Err(wrong(format!("gave the bytes {first}-{last} instead of {start}-{}", end.saturating_sub(1))));
        }
        match out.content_length().and_then(|n| u64::try_from(n).ok()) {
            Some(length) if length != end - start => {
                Err(wrong(format!("announces {length} bytes for the {} asked for", end - start)))
            }
            _ => Ok(end - start),
        }
    }

    async fn read(&self, range: &Range<u64>) -> Result<Bytes, Failure> {
        let out = self.get(Some(format!("bytes={}-{}", range.start, range.end - 1))).await?;
        let len = self.judge(&out, range.start, Some(range.end))?;
        let mut body = out.body;
        let mut all = BytesMut::new();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|e| Failure::unavailable(&self.name, format!("the body broke off: {e}")))?;
            Label::S3.count_bytes(piece.len());
            if all.is_empty() && piece.len() as u64 == len {
                return Ok(piece);
            }
            if (all.len() + piece.len()) as u64 > len {
                return Err(Failure::corrupt(&self.name, format!("sent more than the {len} bytes asked for")));
            }
            if all.is_empty() {
                all.reserve(len as usize);
            }
            all.extend_from_slice(&piece);
        }
        if all.len() as u64 != len {
            return Err(Failure::corrupt(&self.name, format!("the body has {} bytes instead of {len}", all.len())));
        }
        Ok(all.freeze())
    }

    /// The whole object: its head tells the size even where no range can be asked for (an empty object).
    async fn open_whole(&self) -> Result<(u64, ByteStream), Failure> {
        let out = self.get(None).await?;
        let size = out.content_length().and_then(|n| u64::try_from(n).ok());
        let size = size.ok_or_else(|| Failure::corrupt(&self.name, "the answer does not say its length"))?;
        self.learn(size, out.e_tag())?;
        Ok((size, out.body))
    }
}

fn pieces(name: String, body: ByteStream) -> BoxStream<'static, Result<Bytes, Failure>> {
    futures::stream::try_unfold((name, body), |(name, mut body)| async move {
        match body.next().await {
            Some(Ok(piece)) => Ok(Some((piece, (name, body)))),
            Some(Err(e)) => Err(Failure::unavailable(&name, format!("the body broke off: {e}"))),
            None => Ok(None),
        }
    })
    .boxed()
}

#[async_trait]
impl Restart for Inner {
    async fn open_at(&self, offset: u64) -> Result<Body, Failure> {
        let known = self.known.get().map(|k| k.size);
        if known == Some(offset) {
            return Ok(Body { size: known, bytes: futures::stream::empty().boxed() });
        }
        let body = if offset == 0 {
            self.open_whole().await?.1
        } else {
            let out = self.get(Some(format!("bytes={offset}-"))).await?;
            self.judge(&out, offset, None)?;
            out.body
        };
        Ok(Body { size: self.known.get().map(|k| k.size), bytes: pieces(self.name.clone(), body) })
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn label(&self) -> Label {
        Label::S3
    }
}

#[async_trait]
impl BlobSource for S3Object {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        let inner = &self.0;
        let known = inner.known.get().map(|k| k.size);
        if range.start > range.end || known.is_some_and(|size| range.end > size) {
            let has = known.map_or_else(String::new, |size| format!(" and it has {size}"));
            let detail = format!("bytes {}..{} were asked for{has}", range.start, range.end);
            return Err(SourceError::Corrupt { what: inner.name.clone(), detail });
        }
        let len = range.end - range.start;
        if len > RANGE_LIMIT {
            let detail = format!("{len} bytes were asked for at once, the limit is {RANGE_LIMIT}");
            return Err(SourceError::Invalid { what: inner.name.clone(), detail });
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        inner.retry.run(Label::S3, &inner.name, len, || inner.read(&range)).await
    }

    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        if let Some(known) = self.0.known.get().filter(|k| offset > k.size) {
            let detail = format!("bytes from {offset} on were asked for and it has {}", known.size);
            return Err(SourceError::Corrupt { what: self.0.name.clone(), detail });
        }
        retry::stream(&self.0.retry, self.0.clone(), offset).await
    }

    async fn stat(&self) -> Result<BlobStat, SourceError> {
        let inner = &self.0;
        if inner.known.get().is_none() {
            // An empty object has no first byte: then the whole of it is asked for.
            match self.read_range(0..1).await {
                Err(SourceError::Corrupt { .. }) if inner.known.get().is_none() => {
                    inner.retry.run(Label::S3, &inner.name, 0, || inner.open_whole()).await?;
                }
                Err(error) if inner.known.get().is_none() => return Err(error),
                _ => {}
            }
        }
        match inner.known.get() {
            Some(Known { size, etag: Some(etag) }) => Ok(BlobStat { size: *size, identity: format!("etag={etag}") }),
            // Without an ETag nothing says which content it is, but its size.
            Some(Known { size, etag: None }) => Ok(BlobStat { size: *size, identity: format!("size={size}") }),
            None => Err(inner.changed()),
        }
    }

    fn describe(&self) -> String {
        self.0.name.clone()
    }
    fn place(&self) -> String {
        format!("s3://{}", self.0.bucket)
    }
}
