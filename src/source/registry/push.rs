//! Writing to a repository: blobs in one request or in pieces that resume, manifests, deletions.

use std::sync::Mutex;
use std::sync::PoisonError;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, HeaderValue, Method};
use url::Url;

use super::super::SourceError;
use super::super::retry::{Failure, Label};
use super::auth::{DELETE, PUSH, Session};
use super::http as web;
use super::repository::Content;
use super::{Access, accept};
use crate::units::Digest;

/// Up to this size a blob goes in one request; above, in pieces of it. Azure takes at most 20 MB in one request.
const PIECE: u64 = 16 << 20;
/// Longest piece that a registry may ask for (`OCI-Chunk-Min-Length`): a piece is held in memory.
const MAX_PIECE: u64 = 256 << 20;
/// How often an upload that the registry has forgotten is begun anew.
const ROUNDS: u32 = 3;

/// An upload under way: where its next piece goes, how much the registry has.
#[derive(Debug)]
struct State {
    url: Url,
    at: u64,
    /// The last piece was answered by nothing, or by an error: the registry is asked how far it got.
    doubtful: bool,
}

/// How an upload ended that did not fail.
enum Outcome {
    Done,
    /// The registry knows it no more.
    Forgotten,
}

impl Access {
    /// Makes sure that the repository has a blob; `progress` counts its bytes as they are taken.
    pub(super) async fn push_blob(
        &self,
        content: &Content,
        digest: &Digest,
        size: u64,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), SourceError> {
        let session = self.origin(PUSH)?;
        let what = format!("{}@{digest}", self.name);
        if self.has_blob(&session, &what, digest).await? {
            progress(size);
            return Ok(());
        }
        if size <= PIECE {
            let bytes = content.read(0, size).await?;
            let whole = || async {
                let begun = begin(&session, &what).await?;
                finish(&session, &what, begun.url, digest, bytes.clone()).await
            };
            self.inner.retry.run(Label::Registry, &what, size, whole).await?;
            progress(size);
            return Ok(());
        }
        // Pieces that are sent twice count once.
        let told = Mutex::new(0);
        let count = |at: u64| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if at > *told {
                progress(at - *told);
                *told = at;
            }
        };
        for round in 1..=ROUNDS {
            match self.in_pieces(&session, &what, content, digest, size, &count).await? {
                Outcome::Done => return Ok(()),
                // The answer to the last request may be all that was lost.
                Outcome::Forgotten if self.has_blob(&session, &what, digest).await? => return Ok(()),
                Outcome::Forgotten => tracing::debug!(what, round, "the registry lost the upload: beginning anew"),
            }
        }
        let detail = "the registry loses uploads before they are complete".into();
        Err(SourceError::Unavailable { what, tries: ROUNDS, detail })
    }

    async fn in_pieces(
        &self,
        session: &Session,
        what: &str,
        content: &Content,
        digest: &Digest,
        size: u64,
        count: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Outcome, SourceError> {
        let retry = &self.inner.retry;
        let begun = retry.run(Label::Registry, what, 0, || begin(session, what)).await?;
        let piece = begun.piece;
        let state = tokio::sync::Mutex::new(State { url: begun.url, at: 0, doubtful: false });
        loop {
            let at = state.lock().await.at;
            count(at);
            if at == size {
                break;
            }
            let end = size.min(at + piece);
            let bytes = content.read(at, end - at).await?;
            let send = || async {
                let mut state = state.lock().await;
                if state.doubtful {
                    refresh(session, what, &mut state).await?;
                }
                if state.at >= end {
                    return Ok(());
                }
                // The registry may have kept the first half of what broke off.
                let rest = state.at.checked_sub(at).map(|kept| bytes.slice(kept as usize..));
                let Some(rest) = rest else { return Err(forgotten(what)) };
                state.doubtful = true;
                send_piece(session, what, &mut state, rest, end).await?;
                state.doubtful = false;
                Ok(())
            };
            match retry.run(Label::Registry, what, end - at, send).await {
                Ok(()) => {}
                Err(SourceError::NotFound { .. }) => return Ok(Outcome::Forgotten),
                Err(error) => return Err(error),
            }
        }
        let url = state.into_inner().url;
        match retry.run(Label::Registry, what, 0, || finish(session, what, url.clone(), digest, Bytes::new())).await {
            Ok(()) => Ok(Outcome::Done),
            Err(SourceError::NotFound { .. }) => Ok(Outcome::Forgotten),
            Err(error) => Err(error),
        }
    }

    async fn has_blob(&self, session: &Session, what: &str, digest: &Digest) -> Result<bool, SourceError> {
        let path = format!("blobs/{digest}");
        let head = || async {
            let response = session.send(what, Method::HEAD, &path, HeaderMap::new()).await?;
            match response.status().as_u16() {
                200 => Ok(true),
                404 => Ok(false),
                _ => Err(web::status_error(what, response).await),
            }
        };
        self.inner.retry.run(Label::Registry, what, 0, head).await
    }

    /// Writes a manifest under a tag or its digest. True: the registry says that it keeps the referrers of its subject.
    pub(super) async fn put_manifest(
        &self,
        reference: &str,
        media_type: &'static str,
        bytes: Bytes,
    ) -> Result<bool, SourceError> {
        let separator = if reference.starts_with("sha256:") { '@' } else { ':' };
        let what = format!("{}{separator}{reference}", self.name);
        let session = self.origin(PUSH)?;
        let url = session.url(&what, &format!("manifests/{reference}"))?;
        let put = || async {
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(media_type))]);
            let response = session.send_to(&what, Method::PUT, url.clone(), headers, Some(bytes.clone())).await?;
            if !response.status().is_success() {
                return Err(web::status_error(&what, response).await);
            }
            let said = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
            if let Some(said) = said.and_then(|text| text.parse::<Digest>().ok())
                && said != Digest::of(&bytes)
            {
                return Err(Failure::corrupt(&what, format!("the registry took the manifest for {said}")));
            }
            Ok(response.headers().contains_key("oci-subject"))
        };
        self.inner.retry.run(Label::Registry, &what, bytes.len() as u64, put).await
    }

    /// Deletes a manifest; absent is fine.
    pub(super) async fn delete_manifest(&self, digest: &Digest) -> Result<(), SourceError> {
        self.delete_reference(&digest.to_string()).await
    }

    /// Deletes a tag; absent is fine.
    pub(super) async fn delete_tag(&self, tag: &str) -> Result<(), SourceError> {
        self.delete_reference(tag).await
    }

    async fn delete_reference(&self, reference: &str) -> Result<(), SourceError> {
        let what = format!("{}, {reference}", self.name);
        let session = self.origin(DELETE)?;
        let path = format!("manifests/{reference}");
        let delete = || async {
            let response = session.send(&what, Method::DELETE, &path, accept()).await?;
            match response.status().as_u16() {
                200..=299 | 404 => Ok(()),
                400 | 405 => {
                    let detail = "the registry does not allow deletions; allow them, or set imageService.archiveGraceHours \
                                  to 0 and clean it up by its own means";
                    Err(SourceError::Invalid { what: what.clone(), detail: detail.into() }.into())
                }
                _ => Err(web::status_error(&what, response).await),
            }
        };
        self.inner.retry.run(Label::Registry, &what, 0, delete).await
    }
}

/// A new upload.
struct Begun {
    url: Url,
    /// Bytes per piece.
    piece: u64,
}

async fn begin(session: &Session, what: &str) -> Result<Begun, Failure> {
    let url = session.url(what, "blobs/uploads/")?;
    let headers = HeaderMap::from_iter([(CONTENT_LENGTH, HeaderValue::from_static("0"))]);
    let response = session.send_to(what, Method::POST, url.clone(), headers, Some(Bytes::new())).await?;
    if response.status().as_u16() != 202 {
        return Err(web::status_error(what, response).await);
    }
    let least = response.headers().get("oci-chunk-min-length").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    let piece = PIECE.max(least.unwrap_or(0));
    if piece > MAX_PIECE {
        let detail = format!("the registry wants pieces of {piece} bytes, at most {MAX_PIECE} are sent");
        return Err(SourceError::Invalid { what: what.into(), detail }.into());
    }
    let location = location(what, &url, response.headers())?;
    Ok(Begun { url: location.ok_or_else(|| Failure::corrupt(what, "an upload was begun without a Location"))?, piece })
}

/// Sends the piece that ends at `end`.
async fn send_piece(session: &Session, what: &str, state: &mut State, piece: Bytes, end: u64) -> Result<(), Failure> {
    let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))]);
    if let Ok(range) = HeaderValue::try_from(format!("{}-{}", state.at, end - 1)) {
        headers.insert(CONTENT_RANGE, range);
    }
    let response = session.send_to(what, Method::PATCH, state.url.clone(), headers, Some(piece)).await?;
    match response.status().as_u16() {
        201 | 202 | 204 => {}
        // It has another idea of how far the upload is: asked at the next try.
        416 => return Err(Failure::unavailable(what, "the registry has another part of the upload than was sent")),
        404 => return Err(forgotten(what)),
        _ => return Err(web::status_error(what, response).await),
    }
    let at = received(response.headers()).unwrap_or(end);
    if at < state.at || at > end {
        return Err(Failure::corrupt(what, format!("the registry says it has {at} bytes of the {end} that were sent")));
    }
    state.at = at;
    if let Some(next) = location(what, &state.url, response.headers())? {
        state.url = next;
    }
    Ok(())
}

/// Asks the registry how far an upload is. One that can't tell has forgotten it.
async fn refresh(session: &Session, what: &str, state: &mut State) -> Result<(), Failure> {
    let response = session.send_to(what, Method::GET, state.url.clone(), HeaderMap::new(), None).await?;
    let status = response.status();
    if status.is_server_error() || status.as_u16() == 429 {
        return Err(web::status_error(what, response).await);
    }
    if !status.is_success() {
        return Err(forgotten(what));
    }
    let Some(at) = received(response.headers()) else { return Err(forgotten(what)) };
    if let Some(next) = location(what, &state.url, response.headers())? {
        state.url = next;
    }
    (state.at, state.doubtful) = (at, false);
    Ok(())
}

/// Ends an upload: the registry compares what it has with the digest.
async fn finish(session: &Session, what: &str, mut url: Url, digest: &Digest, bytes: Bytes) -> Result<(), Failure> {
    url.query_pairs_mut().append_pair("digest", &digest.to_string());
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))]);
    let response = session.send_to(what, Method::PUT, url, headers, Some(bytes)).await?;
    match response.status().as_u16() {
        200..=299 => Ok(()),
        404 => Err(forgotten(what)),
        _ => Err(web::status_error(what, response).await),
    }
}

fn forgotten(what: &str) -> Failure {
    SourceError::NotFound { what: what.into(), detail: "the registry has forgotten the upload; push again".into() }
        .into()
}

/// How many bytes of an upload the registry has: `Range: 0-9` is ten, `0-0` is how an empty one is told.
fn received(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(RANGE)?.to_str().ok()?;
    let (first, last) = text.strip_prefix("bytes=").unwrap_or(text).split_once('-')?;
    match (first, last.parse::<u64>().ok()?) {
        ("0", 0) => Some(0),
        ("0", last) => last.checked_add(1),
        _ => None,
    }
}

/// Where the registry wants the next request of an upload; it may lie on another host, never off TLS.
fn location(what: &str, from: &Url, headers: &HeaderMap) -> Result<Option<Url>, Failure> {
    let Some(value) = headers.get(LOCATION) else { return Ok(None) };
    web::next_hop(what, from, value.to_str().ok()).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_has_received_is_read_strictly() {
        let read = |text: &'static str| received(&HeaderMap::from_iter([(RANGE, HeaderValue::from_static(text))]));
        assert_eq!((read("0-0"), read("0-9"), read("bytes=0-9")), (Some(0), Some(10), Some(10)));
        for bad in ["", "0", "1-9", "0-", "0--1", "0-18446744073709551615"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
