//! What refers to a manifest: the referrers API of OCI 1.1, and the tag that stands in for it; and the lists of tags.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, LINK};
use http::{HeaderMap, HeaderValue, Method};
use oci_spec::image::ImageIndex;
use url::Url;

use super::super::SourceError;
use super::super::image::{self, MANIFEST_LIMIT};
use super::super::retry::{Failure, Label};
use super::Access;
use super::artifact::{self, INDEX, Referrer};
use super::auth::Session;
use super::http as web;
use crate::archive::Version;
use crate::units::Digest;

/// Pages of one listing that are read.
const MAX_PAGES: usize = 32;
/// Entries of one listing that are kept.
const MAX_ENTRIES: usize = 4096;
/// Tags of one repository that are kept: a store with more archives than this is cleaned up in parts.
const MAX_TAGS: usize = 100_000;
/// How often the stand-in tag is read where others write it at the same time.
const FALLBACK_ROUNDS: u32 = 40;
/// Least time after which what was written to it is believed to stay.
const SETTLE: Duration = Duration::from_millis(200);

/// What the referrers API answered.
enum Answer {
    /// The entries of one page, and where the next one is.
    Page(Vec<Referrer>, Option<Url>),
    /// The registry has no such route.
    Unknown,
}

impl Access {
    /// Everything that refers to `subject`; the registry may have filtered it by `artifact_type`, or not.
    pub(super) async fn referrers(&self, subject: &Digest, artifact_type: &str) -> Result<Vec<Referrer>, SourceError> {
        let what = format!("the referrers of {}@{subject}", self.name);
        let path = format!("referrers/{subject}?artifactType={artifact_type}");
        let first = |session: Session| {
            let (what, path) = (&what, &path);
            async move {
                let url = session.url(what, path)?;
                page(&session, what, url).await
            }
        };
        let answer = self.inner.retry.run(Label::Registry, &what, 0, || self.each(first)).await?;
        let Answer::Page(mut found, mut next) = answer else {
            return self.fallback(subject).await;
        };
        for _ in 1..MAX_PAGES {
            let Some(url) = next.filter(|_| found.len() < MAX_ENTRIES) else { break };
            let session = self.session_of(&url)?;
            let more = || async { page(&session, &what, url.clone()).await };
            match self.inner.retry.run(Label::Registry, &what, 0, more).await? {
                Answer::Page(entries, after) => {
                    found.extend(entries);
                    next = after;
                }
                Answer::Unknown => break,
            }
        }
        found.truncate(MAX_ENTRIES);
        Ok(found)
    }

    /// The session whose registry a URL belongs to.
    fn session_of(&self, url: &Url) -> Result<Session, SourceError> {
        let session = self.sessions.iter().find(|session| web::same_origin(&session.endpoint.base, url)).cloned();
        session.ok_or_else(|| SourceError::Refused {
            what: self.name.to_string(),
            detail: format!("its listing goes on at {}, another host", web::host_of(url)),
        })
    }

    /// The entries under the stand-in tag.
    async fn fallback(&self, subject: &Digest) -> Result<Vec<Referrer>, SourceError> {
        match self.manifest(&artifact::fallback_tag(subject), None).await {
            Ok(bytes) => entries(&self.name, &bytes),
            Err(SourceError::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Adds a manifest to the stand-in tag. Registries have no conditional write, so what was written is read again after a
    /// while, and where another writer's index has replaced it, it is merged into that one. That is as good as it gets: a
    /// writer that takes much longer than this one may still take the entry away.
    pub(super) async fn add_to_fallback(
        &self,
        subject: &Digest,
        manifest: &Bytes,
        version: Version,
    ) -> Result<(), SourceError> {
        let tag = artifact::fallback_tag(subject);
        let what = format!("{}:{tag}", self.name);
        // Mirrors may lag behind what is written at the origin.
        let origin = Self { sessions: vec![self.origin(super::auth::PUSH)?], ..self.clone() };
        let spread = Duration::from_millis(u64::from(Digest::of(manifest).0[0]));
        // After a write: how long to wait before it is believed to stay.
        let mut settle = None;
        for _ in 0..FALLBACK_ROUNDS {
            let began = Instant::now();
            let before = match origin.manifest(&tag, None).await {
                Ok(bytes) => Some(bytes),
                Err(SourceError::NotFound { .. }) => None,
                Err(error) => return Err(error),
            };
            match (artifact::with_entry(&what, before.as_deref(), manifest, version)?, settle.take()) {
                (None, None) => return Ok(()),
                (None, Some(wait)) => tokio::time::sleep(wait).await,
                (Some(index), collided) => {
                    if index.len() as u64 > MANIFEST_LIMIT {
                        let detail =
                            format!("has no room for another entry ({MANIFEST_LIMIT} bytes); delete old referrers");
                        return Err(SourceError::Invalid { what, detail });
                    }
                    if collided.is_some() {
                        // Those who collide come back at different times; the index is read again then.
                        tokio::time::sleep(spread).await;
                        continue;
                    }
                    self.put_manifest(&tag, INDEX, index.into()).await?;
                    // One who read before this was written may still overwrite it: the time that reading and writing
                    // took here is a measure of how long that takes.
                    settle = Some(began.elapsed() * 3 + SETTLE + spread);
                }
            }
        }
        let detail = "others write the tag that stands in for the referrers API all the time; retry".into();
        Err(SourceError::Unavailable { what, tries: FALLBACK_ROUNDS, detail })
    }

    /// All tags of the repository.
    pub(super) async fn tags(&self) -> Result<Vec<String>, SourceError> {
        /// The answer.
        #[derive(serde::Deserialize)]
        struct Tags {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let what = format!("the tags of {}", self.name);
        let session = self.origin(super::auth::PULL)?;
        let (mut found, mut next) = (Vec::new(), Some(session.url(&what, "tags/list?n=1000")?));
        while let Some(url) = next.take().filter(|_| found.len() < MAX_TAGS) {
            let page = || async {
                let response = session.send_to(&what, Method::GET, url.clone(), HeaderMap::new(), None).await?;
                if response.status().as_u16() != 200 {
                    return Err(web::status_error(&what, response).await);
                }
                let next = next_page(&what, &session, &url, response.headers())?;
                let bytes = web::body(response, &what, MANIFEST_LIMIT).await?;
                let tags: Tags = image::parse_json(&what, &bytes)?;
                Ok((tags.tags.unwrap_or_default(), next))
            };
            match self.inner.retry.run(Label::Registry, &what, 0, page).await {
                Ok((tags, after)) => {
                    // A page that brings nothing would come for ever.
                    next = after.filter(|after| !tags.is_empty() && *after != url);
                    found.extend(tags);
                }
                Err(SourceError::NotFound { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// One page of the referrers API.
async fn page(session: &Session, what: &str, url: Url) -> Result<Answer, Failure> {
    let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(INDEX))]);
    let response = session.send_to(what, Method::GET, url.clone(), headers, None).await?;
    match response.status().as_u16() {
        200 => {}
        // What registries answer to a route that they don't know.
        400 | 404 | 405 | 406 | 501 => return Ok(Answer::Unknown),
        _ => return Err(web::status_error(what, response).await),
    }
    // A site that answers every path with a page of its own is no registry with referrers.
    let typed = response.headers().get(http::header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    if typed.is_some_and(|typed| typed.trim_start().starts_with("text/html")) {
        return Ok(Answer::Unknown);
    }
    let next = next_page(what, session, &url, response.headers())?;
    let bytes = web::body(response, what, MANIFEST_LIMIT).await?;
    Ok(Answer::Page(entries(what, &bytes)?, next))
}

/// The entries of an index; those without a digest that we can check are left out.
fn entries(what: &str, bytes: &[u8]) -> Result<Vec<Referrer>, SourceError> {
    let index: ImageIndex = image::parse_json(what, bytes)?;
    Ok(index.manifests().iter().take(MAX_ENTRIES).filter_map(Referrer::of).collect())
}

/// The target of `Link: <…>; rel="next"`, which must lie at the same registry and below the same repository.
fn next_page(what: &str, session: &Session, at: &Url, headers: &HeaderMap) -> Result<Option<Url>, SourceError> {
    let Some(text) = headers.get_all(LINK).iter().filter_map(|v| v.to_str().ok()).find_map(next_link) else {
        return Ok(None);
    };
    let below = format!("{}v2/{}/", session.endpoint.base.path(), session.repository);
    let next = at.join(&text).ok().filter(|url| web::same_origin(url, at) && url.path().starts_with(&below));
    let detail = "its listing goes on at another place than its own repository".to_owned();
    next.map(Some).ok_or_else(|| SourceError::Refused { what: what.into(), detail })
}

/// The URL of the link whose relation is `next`.
fn next_link(header: &str) -> Option<String> {
    header.split(',').find_map(|link| {
        let (url, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let next = parameters.split(';').any(|p| {
            let (name, value) = p.trim().split_once('=').unwrap_or_default();
            name.trim().eq_ignore_ascii_case("rel") && value.trim().trim_matches('"').eq_ignore_ascii_case("next")
        });
        next.then(|| url.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::next_link;

    #[test]
    fn the_next_page_is_read_from_the_link_header() {
        for (header, want) in [
            (r#"</v2/a/tags/list?n=1&last=b>; rel="next""#, Some("/v2/a/tags/list?n=1&last=b")),
            (r#"</x>; rel=prev, </y>; foo=bar; REL=Next"#, Some("/y")),
            (r#"</x>; rel="prev""#, None),
            ("/x; rel=next", None),
            ("", None),
        ] {
            assert_eq!(next_link(header).as_deref(), want, "{header}");
        }
    }
}
