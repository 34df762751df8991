//! One blob of a repository, read by range.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, StreamExt};
use http::header::{ACCEPT_ENCODING, CONTENT_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Method};
use url::Url;

use super::super::retry::{self, Body, Failure, Label, Restart, RetryPolicy};
use super::super::{BlobSource, BlobStat, SourceError};
use super::http::{self as web, Request};
use super::{Access, Session};
use crate::units::Digest;

/// How long the storage URL behind a redirect is used again. Signatures live for ten minutes and more.
const STORAGE_LIFE: Duration = Duration::from_secs(240);
/// A whole blob is taken as the answer to a range request only up to this size.
const WHOLE_LIMIT: u64 = 1 << 20;
/// Longest range that is read at once, in bytes.
const RANGE_LIMIT: u64 = 1 << 30;

/// A blob in a registry. Costs one round trip per range, two where the registry redirects and the storage's address is not
/// known any more.
#[derive(Debug)]
pub(super) struct RegistryBlob(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    access: Access,
    digest: Digest,
    name: String,
    /// What the manifest says: an answer that contradicts it is wrong.
    size: Option<u64>,
    /// What the last answer said. Hearsay: a blob that was cut short may have been restored since, so it refuses nothing.
    told: Mutex<Option<u64>>,
    storage: Mutex<Option<(Url, Instant)>>,
    retry: RetryPolicy,
}

/// What a request asks for.
#[derive(Debug, Clone)]
enum Want {
    Range(Range<u64>),
    From(u64),
}

impl RegistryBlob {
    /// `size`: where a manifest says it.
    pub(super) fn new(access: Access, digest: Digest, size: Option<u64>, retry: RetryPolicy) -> Self {
        let name = format!("{}@{digest}", access.name);
        let (told, storage) = (Mutex::new(None), Mutex::new(None));
        Self(Arc::new(Inner { access, digest, name, size, told, storage, retry }))
    }

    /// The whole blob, at most `limit` bytes.
    pub(super) async fn whole(&self, limit: u64) -> Result<Bytes, SourceError> {
        let inner = &self.0;
        inner
            .retry
            .run(Label::Registry, &inner.name, limit, || async {
                let response = inner.get(&Want::From(0)).await?;
                let bytes = web::body(response, &inner.name, limit).await?;
                inner.check_length(bytes.len() as u64, inner.known_size().unwrap_or(bytes.len() as u64))?;
                Label::Registry.count_bytes(bytes.len());
                Ok(bytes)
            })
            .await
    }
}

impl Inner {
    fn storage(&self) -> Option<Url> {
        let storage = self.storage.lock().unwrap_or_else(PoisonError::into_inner);
        storage.as_ref().filter(|(_, until)| Instant::now() < *until).map(|(url, _)| url.clone())
    }

    fn remember_storage(&self, url: Option<Url>) {
        let until = Instant::now() + STORAGE_LIFE;
        *self.storage.lock().unwrap_or_else(PoisonError::into_inner) = url.map(|url| (url, until));
    }

    fn learn_size(&self, size: u64) -> Result<(), Failure> {
        if let Some(known) = self.size.filter(|known| *known != size) {
            let detail = format!("the registry says it has {size} bytes, its descriptor {known}; push the image again");
            return Err(SourceError::Corrupt { what: self.name.clone(), detail }.into());
        }
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
        Ok(())
    }

    /// What is known of the size: from the manifest, else from the last answer.
    fn known_size(&self) -> Option<u64> {
        self.size.or_else(|| *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn check_length(&self, got: u64, want: u64) -> Result<(), Failure> {
        if got == want {
            return Ok(());
        }
        Err(Failure::corrupt(&self.name, format!("the body has {got} bytes instead of {want}")))
    }

    fn headers(want: &Want) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let range = match want {
            Want::Range(range) => format!("bytes={}-{}", range.start, range.end.saturating_sub(1)),
            Want::From(0) => return headers,
            Want::From(offset) => format!("bytes={offset}-"),
        };
        if let Ok(value) = HeaderValue::try_from(range) {
            headers.insert(RANGE, value);
        }
        headers
    }

    /// One try: an answer whose head is right for `want`.
    async fn get(&self, want: &Want) -> Result<reqwest::Response, Failure> {
        Label::Registry.count_request();
        if let Some(url) = self.storage() {
            let request = Request {
                method: Method::GET,
                url,
                headers: Self::headers(want),
                authorization: None,
                form: None,
                body: None,
            };
            match self.access.http().send(&self.name, request).await {
                Ok(response) if web::is_success(response.status()) => {
                    self.judge(&response, want)?;
                    return Ok(response);
                }
                // The signature ended, or that server went: the registry gives another.
                Ok(_) | Err(Failure::Again(..)) => self.remember_storage(None),
                Err(failure) => return Err(failure),
            }
        }
        self.access.each(|session| self.get_from(session, want)).await
    }

    async fn get_from(&self, session: Session, want: &Want) -> Result<reqwest::Response, Failure> {
        let path = format!("blobs/{}", self.digest);
        let response = session.send(&self.name, Method::GET, &path, Self::headers(want)).await?;
        if !web::is_success(response.status()) {
            // An empty blob has no byte to ask for.
            let empty = response.headers().get(CONTENT_RANGE).is_some_and(|v| v == "bytes */0");
            if response.status().as_u16() == 416 && empty {
                self.learn_size(0)?;
            }
            return Err(web::status_error(&self.name, response).await);
        }
        self.judge(&response, want)?;
        if !web::same_origin(response.url(), &session.endpoint.base) {
            self.remember_storage(Some(response.url().clone()));
        }
        Ok(response)
    }

    /// Whether the head of a 200 or 206 is the answer to `want`, exactly.
    fn judge(&self, response: &reqwest::Response, want: &Want) -> Result<(), Failure> {
        let headers = response.headers();
        web::check_encoding(&self.name, headers)?;
        let host = web::host_of(response.url());
        let length = web::content_length(headers);
        let wrong = |detail: String| Err(Failure::corrupt(&self.name, format!("{host} {detail}")));
        let (start, end) = match want {
            Want::Range(range) => (range.start, Some(range.end)),
            Want::From(offset) => (*offset, self.size),
        };
        if response.status().as_u16() == 200 {
            if let Some(length) = length {
                self.learn_size(length)?;
            }
            return match (want, length) {
                (Want::From(0), _) => Ok(()),
                (Want::Range(range), Some(length)) if length <= WHOLE_LIMIT && range.end <= length => Ok(()),
                _ => wrong("ignores range requests: lazy reads need a registry (or proxy) that serves them".into()),
            };
        }
        let Some((first, last, total)) = web::content_range(headers) else {
            return wrong("answered 206 without a valid Content-Range".into());
        };
        if let Some(total) = total {
            self.learn_size(total)?;
        }
        let end = end.or(total).unwrap_or(last.saturating_add(1));
        if first != start || last.checked_add(1) != Some(end) {
            return wrong(format!("gave the bytes {first}-{last} instead of {start}-{}", end.saturating_sub(1)));
        }
        match length {
            Some(length) if length != end - start => wrong(format!("announces {length} bytes for {start}-{last}")),
            _ => Ok(()),
        }
    }

    async fn read(&self, range: &Range<u64>) -> Result<Bytes, Failure> {
        let response = self.get(&Want::Range(range.clone())).await?;
        let len = range.end - range.start;
        if response.status().as_u16() == 200 {
            let whole = web::body(response, &self.name, WHOLE_LIMIT).await?;
            self.check_length(whole.len() as u64, self.known_size().unwrap_or(range.end))?;
            Label::Registry.count_bytes(whole.len());
            return Ok(whole.slice(range.start as usize..range.end as usize));
        }
        let host = web::host_of(response.url());
        let mut stream = response.bytes_stream();
        let mut all = BytesMut::new();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| web::body_error(&self.name, &host, e))?;
            Label::Registry.count_bytes(piece.len());
            if all.is_empty() && piece.len() as u64 == len {
                return Ok(piece);
            }
            if (all.len() + piece.len()) as u64 > len {
                return Err(Failure::corrupt(&self.name, format!("{host} sent more than the {len} bytes asked for")));
            }
            if all.is_empty() {
                all.reserve(len as usize);
            }
            all.extend_from_slice(&piece);
        }
        self.check_length(all.len() as u64, len)?;
        Ok(all.freeze())
    }
}

#[async_trait]
impl Restart for Inner {
    async fn open_at(&self, offset: u64) -> Result<Body, Failure> {
        if self.known_size() == Some(offset) {
            return Ok(Body { size: Some(offset), bytes: futures::stream::empty().boxed() });
        }
        let response = self.get(&Want::From(offset)).await?;
        let (name, host) = (self.name.clone(), web::host_of(response.url()));
        let bytes = response.bytes_stream().map(move |piece| piece.map_err(|e| web::body_error(&name, &host, e)));
        Ok(Body { size: self.known_size(), bytes: bytes.boxed() })
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn label(&self) -> Label {
        Label::Registry
    }
}

#[async_trait]
impl BlobSource for RegistryBlob {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        let inner = &self.0;
        let known = inner.size;
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
        inner.retry.run(Label::Registry, &inner.name, len, || inner.read(&range)).await
    }

    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        if let Some(size) = self.0.size.filter(|size| offset > *size) {
            let detail = format!("bytes from {offset} on were asked for and it has {size}");
            return Err(SourceError::Corrupt { what: self.0.name.clone(), detail });
        }
        retry::stream(&self.0.retry, self.0.clone(), offset).await
    }

    async fn stat(&self) -> Result<BlobStat, SourceError> {
        let identity = self.0.digest.to_string();
        if let Some(size) = self.0.known_size() {
            return Ok(BlobStat { size, identity });
        }
        let first = self.read_range(0..1).await;
        match (self.0.known_size(), first) {
            (Some(size), _) => Ok(BlobStat { size, identity }),
            (None, Err(error)) => Err(error),
            (None, Ok(_)) => {
                let detail = "the registry does not say how long it is".into();
                Err(SourceError::Corrupt { what: self.0.name.clone(), detail })
            }
        }
    }

    fn describe(&self) -> String {
        self.0.name.clone()
    }
    fn place(&self) -> String {
        self.0.access.authority.clone()
    }
}
