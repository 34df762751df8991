//! Registries: references to manifests, blobs by range, credentials that stay with their host.
//!
//! The protocol is spoken here rather than through `oci-client`, as that one takes neither a resolver nor a redirect policy
//! (so a volume could reach the metadata service through it), keeps the first login per host for all of its callers, and
//! reads answers of any length.

pub mod artifact;
mod auth;
mod blob;
mod credentials;
mod http;
mod push;
mod referrers;
mod repository;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use ::http::header::ACCEPT;
use ::http::{HeaderMap, HeaderValue, Method};
use async_trait::async_trait;
use bytes::Bytes;
use url::Url;

use super::image::{self, CONFIG_LIMIT, DOCKER_HUB, ImagePlace, MANIFEST_LIMIT, is_repository};
use super::local::blocking;
use super::policy::SourceConfig;
use super::retry::{Failure, Label, RetryPolicy};
use super::{ArtifactRef, BlobSource, Credentials, ImageRef, ResolvedImage, Scope, SourceError};
use crate::units::{Digest, Platform};
use auth::{Endpoint, Session, Slot, Tokens};
use blob::RegistryBlob;
use credentials::{Login, canonical_host, login_for};
use http::Http;
pub use repository::Repository;

/// The manifests that are understood.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
/// How long it is believed that something can, or can't, be had anonymously, or with a login.
const SCOPE_LIFE: Duration = Duration::from_secs(300);
/// How long a mirror that could not be reached is passed over.
const MIRROR_PAUSE: Duration = Duration::from_secs(60);
/// Remembered answers and slots before those that ended are dropped.
const MANY: usize = 4096;

/// All registries, under one configuration. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Registries(Arc<Inner>);

/// What was asked of which registry and repository, by which login (`None`: nobody's).
type Asked = (String, String, Digest, Option<Digest>);
/// Identity, registry, repository.
type SlotKey = (Digest, String, String);

#[derive(Debug)]
struct Inner {
    trusted: bool,
    config: Arc<SourceConfig>,
    retry: RetryPolicy,
    http: Arc<Http>,
    tokens: Arc<Tokens>,
    slots: Mutex<HashMap<SlotKey, Weak<Slot>>>,
    /// Whether it could be had, and until when that is believed.
    answers: Mutex<HashMap<Asked, (bool, Instant)>>,
    mirrors_down: Mutex<HashMap<String, Instant>>,
    twin: OnceLock<Registries>,
}

/// A repository as one identity sees it: mirrors in order, then the origin.
#[derive(Debug, Clone)]
struct Access {
    inner: Arc<Inner>,
    sessions: Vec<Session>,
    /// The origin's name and the repository, as in `ghcr.io/a/b`.
    name: Arc<str>,
    authority: String,
    repository: String,
    /// Whose login the origin is shown; `None`: nobody's.
    identity: Option<Digest>,
}

impl Registries {
    pub(super) fn new(trusted: bool, config: Arc<SourceConfig>, retry: RetryPolicy) -> Self {
        let http = Arc::new(Http::new(trusted, &config));
        Self(Arc::new(Inner {
            trusted,
            config,
            retry,
            http,
            tokens: Arc::default(),
            slots: Mutex::default(),
            answers: Mutex::default(),
            mirrors_down: Mutex::default(),
            twin: OnceLock::new(),
        }))
    }

    /// The same configuration without the restrictions of volumes. Always the same twin, so that connections are shared.
    pub(super) fn trusted(&self) -> Self {
        if self.0.trusted {
            return self.clone();
        }
        self.0.twin.get_or_init(|| Self::new(true, self.0.config.clone(), self.0.retry.clone())).clone()
    }

    /// A blob. Asks the registry nothing yet.
    pub(super) async fn blob(
        &self,
        registry: &str,
        repository: &str,
        digest: &Digest,
        credentials: &Credentials,
    ) -> Result<Arc<dyn BlobSource>, SourceError> {
        let access = self.access(registry, repository, credentials).await?;
        Ok(Arc::new(RegistryBlob::new(access, *digest, None, self.0.retry.clone())))
    }

    /// A repository, to look for archives in it and to put some there.
    pub(super) async fn repository(
        &self,
        registry: &str,
        repository: &str,
        credentials: &Credentials,
    ) -> Result<Repository, SourceError> {
        let access = self.access(registry, repository, credentials).await?;
        Ok(Repository::new(self.clone(), access))
    }

    /// Who may share an archive: its manifest is asked for, anonymously and then with the login.
    pub(super) async fn scope_of_artifact(
        &self,
        registry: &str,
        repository: &str,
        reference: &ArtifactRef,
        credentials: &Credentials,
    ) -> Result<Scope, SourceError> {
        let access = self.access(registry, repository, credentials).await?;
        let digest = match reference {
            ArtifactRef::Digest(digest) => *digest,
            ArtifactRef::Tag(tag) => Digest::of(&access.manifest(tag, None).await?),
        };
        self.scope_by(access, digest, |access| async move { access.has_manifest(&digest).await }).await
    }

    /// Who may share a blob: the first byte is asked for, anonymously and then with the login.
    pub(super) async fn scope(
        &self,
        registry: &str,
        repository: &str,
        digest: &Digest,
        credentials: &Credentials,
    ) -> Result<Scope, SourceError> {
        let access = self.access(registry, repository, credentials).await?;
        let ask = |access: Access| {
            let blob = RegistryBlob::new(access, *digest, None, self.0.retry.clone());
            async move { blob.stat().await.map(|_| ()) }
        };
        self.scope_by(access, *digest, ask).await
    }

    /// Public if `ask` succeeds anonymously, private to the login if it does with that one.
    async fn scope_by<F: Future<Output = Result<(), SourceError>>>(
        &self,
        access: Access,
        digest: Digest,
        ask: impl Fn(Access) -> F,
    ) -> Result<Scope, SourceError> {
        let Some(identity) = access.identity else {
            return access.remembered(&digest, None, ask(access.clone())).await.map(|()| Scope::Public);
        };
        if access.remembered(&digest, None, ask(access.anonymous())).await.is_ok() {
            return Ok(Scope::Public);
        }
        let login = access.fingerprint();
        access.remembered(&digest, login, ask(access.clone())).await?;
        access.proven();
        Ok(Scope::private(&access.authority, &access.repository, &identity))
    }

    /// See [`super::Sources::resolve`].
    pub(super) async fn resolve(
        &self,
        image: &ImageRef,
        platform: &Platform,
        credentials: &Credentials,
    ) -> Result<ResolvedImage, SourceError> {
        let ImageRef::Registry { registry, repository, tag, digest } = image else {
            let detail = "is not in a registry".into();
            return Err(SourceError::Invalid { what: image.to_string(), detail });
        };
        let access = self.access(registry, repository, credentials).await?;
        let top = match (digest, tag) {
            (Some(digest), _) => ImagePlace::manifest(&access, digest).await?,
            (None, tag) => access.manifest(tag.as_deref().unwrap_or("latest"), None).await?,
        };
        let mut resolved = image::resolve(&access, image, top, platform, Scope::Public).await?;
        if let Some(identity) = access.identity {
            let digest = resolved.manifest_digest;
            let anonymous = access.anonymous();
            let asked = access.remembered(&digest, None, async move { anonymous.has_manifest(&digest).await }).await;
            if asked.is_err() {
                resolved.scope = Scope::private(&access.authority, &access.repository, &identity);
                access.proven();
            }
        }
        Ok(resolved)
    }

    /// Checks the policy and finds the logins.
    async fn access(&self, registry: &str, repository: &str, credentials: &Credentials) -> Result<Access, SourceError> {
        let inner = &self.0;
        let origin = inner.endpoint(registry, false)?;
        let name: Arc<str> = format!("{}/{repository}", origin.authority).into();
        if !is_repository(repository) {
            let detail = "is not a valid repository name; correct the reference".into();
            return Err(SourceError::Invalid { what: name.to_string(), detail });
        }
        let mut endpoints = Vec::new();
        for mirror in &origin.entry.mirrors {
            endpoints.push(inner.endpoint(mirror, true)?);
        }
        let authority = origin.authority.clone();
        endpoints.push(origin);
        // A mirror's login counts as the origin's does: what it opened is not there for all.
        let (mut sessions, mut identity) = (Vec::new(), None);
        for endpoint in endpoints {
            inner.http.check(&name, &endpoint.base)?;
            let found = inner.login(&endpoint, repository, credentials).await?;
            let (login, whose) = found.map_or((None, None), |(login, whose)| (Some(login), Some(whose)));
            identity = whose_word(identity, whose);
            let slot = inner.slot(whose, &endpoint.authority, repository, login);
            sessions.push(Session {
                endpoint: Arc::new(endpoint),
                repository: repository.into(),
                slot,
                whose,
                http: inner.http.clone(),
                tokens: inner.tokens.clone(),
                actions: auth::PULL,
                what: name.clone(),
            });
        }
        Ok(Access { inner: inner.clone(), sessions, name, authority, repository: repository.into(), identity })
    }
}

impl Inner {
    /// Where a registry is spoken to, and how.
    fn endpoint(&self, registry: &str, mirror: bool) -> Result<Endpoint, SourceError> {
        let (scheme, rest) = match registry.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest.trim_end_matches('/')),
            None => (None, registry.trim_end_matches('/')),
        };
        let invalid = |detail: &str| SourceError::Invalid {
            what: format!("registry {:?}", registry.chars().take(200).collect::<String>()),
            detail: detail.into(),
        };
        let authority = canonical_host(rest);
        let dialled = if authority == DOCKER_HUB { "registry-1.docker.io" } else { &authority };
        let url = |scheme: &str| Url::parse(&format!("{scheme}://{dialled}/")).ok();
        let parsed = url("https").filter(|u| u.path() == "/" && u.query().is_none() && u.username().is_empty());
        let host = parsed.as_ref().and_then(Url::host).ok_or_else(|| invalid("write it as host or host:port"))?;
        let entry = self.config.registries.iter().find(|(key, _)| canonical_host(key) == authority).map(|(_, e)| e);
        let entry = entry.cloned().unwrap_or_default();
        let loopback = match host {
            url::Host::Domain(name) => name == "localhost",
            url::Host::Ipv4(address) => address.is_loopback(),
            url::Host::Ipv6(address) => address.is_loopback(),
        };
        let scheme = match scheme {
            Some("https") => "https",
            // Who may write a location may not choose that credentials travel in the clear.
            Some("http") if self.trusted || entry.plain_http || loopback => "http",
            Some("http") => {
                let detail = format!(
                    "plain HTTP is spoken to configured registries only; set sources.registries.\"{authority}\".plainHttp"
                );
                return Err(SourceError::Refused { what: registry.into(), detail });
            }
            Some(_) => return Err(invalid("only http:// and https:// are spoken")),
            None if entry.plain_http || (loopback && entry.ca_file.is_none()) => "http",
            None => "https",
        };
        let base = url(scheme).ok_or_else(|| invalid("write it as host or host:port"))?;
        Ok(Endpoint { authority, base, mirror, entry })
    }

    /// The login for an endpoint and whose it is: the volume's own, else the configured one, else none.
    async fn login(
        &self,
        endpoint: &Endpoint,
        repository: &str,
        credentials: &Credentials,
    ) -> Result<Option<(Login, Digest)>, SourceError> {
        if let Some(json) = &credentials.docker_config {
            let what = "the docker config (pull secret)";
            if let Some(login) = login_for(json, &endpoint.authority, repository, self.trusted, what).await? {
                let identity = credentials.identity.unwrap_or_else(|| login.identity());
                return Ok(Some((login, identity)));
            }
        }
        let Some(file) = endpoint.entry.docker_config.clone() else { return Ok(None) };
        let what = file.display().to_string();
        let json = blocking(&what, move || read_config(&file)).await?;
        let login = login_for(&json, &endpoint.authority, repository, self.trusted, &what).await?;
        Ok(login.map(|login| (login, node_identity())))
    }

    /// The slot that all sources of one identity share, where it holds this login. Another login gets one of its own until it has proven
    /// good ([`Access::proven`]): a wrong one must not break what lives on.
    fn slot(&self, identity: Option<Digest>, authority: &str, repository: &str, login: Option<Login>) -> Arc<Slot> {
        let Some(identity) = identity else { return Arc::new(Slot::new(login)) };
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MANY {
            slots.retain(|_, slot| slot.strong_count() > 0);
        }
        let key = (identity, authority.to_owned(), repository.to_owned());
        match slots.get(&key).and_then(Weak::upgrade) {
            Some(slot) if slot.get() == login => slot,
            Some(_) => Arc::new(Slot::new(login)),
            None => {
                let slot = Arc::new(Slot::new(login));
                slots.insert(key, Arc::downgrade(&slot));
                slot
            }
        }
    }

    fn is_down(&self, mirror: &str) -> bool {
        let down = self.mirrors_down.lock().unwrap_or_else(PoisonError::into_inner);
        down.get(mirror).is_some_and(|until| Instant::now() < *until)
    }

    fn mark_down(&self, mirror: &str) {
        let until = Instant::now() + MIRROR_PAUSE;
        self.mirrors_down.lock().unwrap_or_else(PoisonError::into_inner).insert(mirror.to_owned(), until);
    }
}

/// Whose the configured logins are.
fn node_identity() -> Digest {
    Digest::of(b"node")
}

/// Of the identities of two endpoints' logins, the one that answers for both: a volume's own before the node's, else the later one, as
/// the origin comes last.
fn whose_word(before: Option<Digest>, after: Option<Digest>) -> Option<Digest> {
    match (before, after) {
        (Some(volume), Some(node)) if node == node_identity() => Some(volume),
        (before, after) => after.or(before),
    }
}

/// `host/repository:tag` and `host/repository@sha256:…`, with the host spelt out; `None` for a bare repository.
pub(super) fn parse_oci(text: &str) -> Result<Option<(String, String, ArtifactRef)>, String> {
    let (registry, repository, reference) = split_oci(text)?;
    Ok(reference.map(|reference| (registry, repository, reference)))
}

/// Host, repository, and tag or digest where one is named.
pub fn split_oci(text: &str) -> Result<(String, String, Option<ArtifactRef>), String> {
    let (host, path) = text.split_once('/').unwrap_or((text, ""));
    if !(host.contains(['.', ':']) || host == "localhost") || path.is_empty() {
        return Err("names no registry's host".into());
    }
    let image: ImageRef = text.parse().map_err(|e: SourceError| match e {
        SourceError::Invalid { detail, .. } => detail,
        other => other.to_string(),
    })?;
    let named = path.contains([':', '@']);
    match image {
        ImageRef::Registry { registry, repository, digest: Some(digest), .. } => {
            Ok((registry, repository, Some(ArtifactRef::Digest(digest))))
        }
        ImageRef::Registry { registry, repository, tag, .. } => {
            Ok((registry, repository, tag.filter(|_| named).map(ArtifactRef::Tag)))
        }
        _ => Err("names no registry".into()),
    }
}

fn read_config(file: &std::path::Path) -> Result<String, SourceError> {
    use std::io::Read;
    let mut text = String::new();
    let open = std::fs::File::open(file).map_err(|e| SourceError::of_io(file.display(), &e))?;
    open.take(credentials::CONFIG_LIMIT)
        .read_to_string(&mut text)
        .map_err(|e| SourceError::of_io(file.display(), &e))?;
    Ok(text)
}

impl Access {
    fn http(&self) -> &Http {
        &self.inner.http
    }

    /// The origin, without a login. Mirrors are left out: what they serve anonymously says nothing of the origin.
    fn anonymous(&self) -> Self {
        let mut sessions = self.sessions.clone();
        sessions.retain(|s| !s.endpoint.mirror);
        for session in &mut sessions {
            session.slot = Arc::default();
        }
        Self { sessions, identity: None, ..self.clone() }
    }

    /// The origin, for requests that change something there: mirrors are read only.
    fn origin(&self, actions: &'static str) -> Result<Session, SourceError> {
        let session = self.sessions.last().filter(|session| !session.endpoint.mirror).cloned();
        let session = session.ok_or_else(|| SourceError::Invalid {
            what: self.name.to_string(),
            detail: "no registry is configured for it".into(),
        })?;
        Ok(Session { actions, ..session })
    }

    /// The registry has taken these logins: from now on they are those of all sources of the same identities.
    fn proven(&self) {
        let mut slots = self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
        for session in &self.sessions {
            let (Some(identity), Some(login)) = (session.whose, session.slot.get()) else { continue };
            let key = (identity, session.endpoint.authority.clone(), session.repository.to_string());
            match slots.get(&key).and_then(Weak::upgrade) {
                Some(shared) => shared.set(Some(login)),
                None => drop(slots.insert(key, Arc::downgrade(&session.slot))),
            }
        }
    }

    /// Of all logins.
    fn fingerprint(&self) -> Option<Digest> {
        let logins = self.sessions.iter().filter_map(|session| session.slot.get());
        let all: Vec<u8> = logins.flat_map(|login| login.fingerprint().0).collect();
        (!all.is_empty()).then(|| Digest::of(&all))
    }

    /// Tries each endpoint in order; the origin's failure is the one that counts.
    async fn each<T, F: Future<Output = Result<T, Failure>>>(&self, ask: impl Fn(Session) -> F) -> Result<T, Failure> {
        let mut last = Failure::unavailable(&self.name, "no registry is configured for it");
        for session in &self.sessions {
            let endpoint = session.endpoint.clone();
            if endpoint.mirror && self.inner.is_down(&endpoint.authority) {
                continue;
            }
            last = match ask(session.clone()).await {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if endpoint.mirror {
                if matches!(last, Failure::Again(SourceError::Unavailable { .. }, _)) {
                    self.inner.mark_down(&endpoint.authority);
                }
                tracing::debug!(mirror = endpoint.authority, what = %self.name, failure = ?last, "the mirror failed; going on");
            }
        }
        Err(last)
    }

    /// A manifest by tag or digest, at most [`MANIFEST_LIMIT`], checked against `wanted` and against the registry's own word.
    async fn manifest(&self, reference: &str, wanted: Option<&Digest>) -> Result<Bytes, SourceError> {
        let what = match wanted {
            Some(digest) => format!("{}@{digest}", self.name),
            None => format!("{}:{reference}", self.name),
        };
        let path = format!("manifests/{reference}");
        let get = |session: Session| {
            let (what, path) = (&what, &path);
            async move {
                let response = session.send(what, Method::GET, path, accept()).await?;
                if response.status().as_u16() != 200 {
                    return Err(http::status_error(what, response).await);
                }
                let said = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
                let said = said.and_then(|text| text.parse::<Digest>().ok());
                let bytes = http::body(response, what, MANIFEST_LIMIT).await?;
                for digest in said.iter().chain(wanted) {
                    // A damaged answer may come right the next time.
                    image::check_digest(what, "manifest", digest, &bytes).map_err(|e| Failure::Again(e, None))?;
                }
                Ok(bytes)
            }
        };
        self.inner.retry.run(Label::Registry, &what, MANIFEST_LIMIT, || self.each(get)).await
    }

    /// Whether a manifest can be had.
    async fn has_manifest(&self, digest: &Digest) -> Result<(), SourceError> {
        let what = format!("{}@{digest}", self.name);
        let path = format!("manifests/{digest}");
        let head = |session: Session| {
            let (what, path) = (&what, &path);
            async move {
                let response = session.send(what, Method::HEAD, path, accept()).await?;
                match response.status().as_u16() {
                    200 => Ok(()),
                    _ => Err(http::status_error(what, response).await),
                }
            }
        };
        self.inner.retry.run(Label::Registry, &what, 0, || self.each(head)).await
    }

    /// The outcome of `ask` (for nobody's or somebody's login), or what it was within the last minutes. Only clear answers
    /// are remembered: had, not there, denied.
    async fn remembered(
        &self,
        digest: &Digest,
        login: Option<Digest>,
        ask: impl Future<Output = Result<(), SourceError>>,
    ) -> Result<(), SourceError> {
        let key: Asked = (self.authority.clone(), self.repository.clone(), *digest, login);
        let lock = || self.inner.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().get(&key).filter(|(_, until)| Instant::now() < *until).map(|(had, _)| *had);
        match known {
            Some(true) => return Ok(()),
            // A refusal is asked for again where it would become somebody's error: the message is fresh then.
            Some(false) if self.identity.is_some() && login.is_none() => {
                let what = format!("{}@{digest}", self.name);
                return Err(SourceError::Denied { what, detail: "it can't be had anonymously".into() });
            }
            _ => {}
        }
        let outcome = ask.await;
        let had = match &outcome {
            Ok(()) => true,
            Err(SourceError::Denied { .. } | SourceError::NotFound { .. }) => false,
            Err(_) => return outcome,
        };
        let mut answers = lock();
        if answers.len() >= MANY {
            let now = Instant::now();
            answers.retain(|_, (_, until)| now < *until);
        }
        answers.insert(key, (had, Instant::now() + SCOPE_LIFE));
        outcome
    }
}

fn accept() -> HeaderMap {
    HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES))])
}

#[async_trait]
impl ImagePlace for Access {
    fn name(&self) -> String {
        self.name.to_string()
    }

    async fn manifest(&self, digest: &Digest) -> Result<Bytes, SourceError> {
        self.manifest(&digest.to_string(), Some(digest)).await
    }

    async fn config(&self, digest: &Digest, size: u64) -> Result<Bytes, SourceError> {
        let blob = RegistryBlob::new(self.clone(), *digest, Some(size), self.inner.retry.clone());
        let bytes = blob.whole(CONFIG_LIMIT).await?;
        image::check_digest(&self.name, "config", digest, &bytes)?;
        Ok(bytes)
    }

    async fn layer(&self, digest: &Digest, size: u64) -> Result<Arc<dyn BlobSource>, SourceError> {
        Ok(Arc::new(RegistryBlob::new(self.clone(), *digest, Some(size), self.inner.retry.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::RegistryEntry;
    use super::*;

    fn endpoint(registry: &str, trusted: bool, entries: &[(&str, RegistryEntry)]) -> Result<String, &'static str> {
        let registries = entries.iter().map(|(k, e)| ((*k).to_owned(), e.clone())).collect();
        let config = SourceConfig { registries, ..Default::default() };
        let registries = Registries::new(trusted, Arc::new(config), RetryPolicy::default());
        registries.0.endpoint(registry, false).map(|e| e.base.to_string()).map_err(|e| e.kind())
    }

    #[test]
    fn plain_http_is_for_loopback_and_configured_registries() {
        let plain = RegistryEntry { plain_http: true, ..Default::default() };
        assert_eq!(endpoint("index.docker.io", false, &[]).unwrap(), "https://registry-1.docker.io/");
        assert_eq!(endpoint("ghcr.io", false, &[]).unwrap(), "https://ghcr.io/");
        assert_eq!(endpoint("localhost:5000", true, &[]).unwrap(), "http://localhost:5000/");
        assert_eq!(endpoint("127.3.2.1:5000", true, &[]).unwrap(), "http://127.3.2.1:5000/");
        assert_eq!(endpoint("[::1]:5000", true, &[]).unwrap(), "http://[::1]:5000/");
        assert_eq!(endpoint("https://localhost:5000/", true, &[]).unwrap(), "https://localhost:5000/");
        assert_eq!(endpoint("in.house:5000", false, &[("in.house:5000", plain)]).unwrap(), "http://in.house:5000/");
        assert_eq!(endpoint("http://in.house", true, &[]).unwrap(), "http://in.house/");
        assert_eq!(endpoint("http://in.house", false, &[]), Err("refused"));
        for bad in ["", "a/b", "user@host", "ftp://h", "h?x", "h:port"] {
            assert_eq!(endpoint(bad, true, &[]), Err("invalid"), "{bad}");
        }
    }

    #[tokio::test]
    async fn locations_of_an_archive_can_not_steer_the_request() {
        let registries = Registries::new(false, Arc::default(), RetryPolicy::default());
        let none = Credentials::default();
        let digest = Digest::of(b"");
        for (registry, repository, kind) in [
            ("169.254.169.254", "latest", "refused"),
            ("127.0.0.1:22", "a", "refused"),
            ("localhost", "a", "refused"),
            ("ghcr.io", "../../token", "invalid"),
            ("ghcr.io", "a?x=y", "invalid"),
            ("ghcr.io", "", "invalid"),
        ] {
            let error = registries.blob(registry, repository, &digest, &none).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{registry}/{repository}");
        }
    }

    #[tokio::test]
    async fn a_rotated_secret_reaches_the_sources_that_live_on() {
        let registries = Registries::new(false, Arc::default(), RetryPolicy::default());
        let credentials = |password: &str| Credentials {
            docker_config: Some(format!(r#"{{"auths":{{"h":{{"username":"u","password":"{password}"}}}}}}"#).into()),
            identity: Some(Digest::of(b"secret of the namespace")),
            ..Default::default()
        };
        let old = registries.access("h", "a", &credentials("old")).await.unwrap();
        let before = old.fingerprint();
        let new = registries.access("h", "a", &credentials("new")).await.unwrap();
        assert_eq!(old.fingerprint(), before, "nobody has taken the new one yet");
        assert_ne!(new.fingerprint(), before);
        new.proven();
        assert_ne!(old.fingerprint(), before);
        assert_eq!(old.fingerprint(), new.fingerprint());
        let other = Credentials { identity: Some(Digest::of(b"another")), ..credentials("other") };
        assert_ne!(registries.access("h", "a", &other).await.unwrap().fingerprint(), new.fingerprint());
        assert_eq!(old.fingerprint(), new.fingerprint());
    }
}
