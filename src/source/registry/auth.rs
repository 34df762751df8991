//! Tokens: a registry's challenge is answered with the login of its host, the token kept until it ends.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, HeaderValue, Method};
use url::Url;

use super::super::SourceError;
use super::super::policy::RegistryEntry;
use super::super::retry::Failure;
use super::credentials::{Login, canonical_host};
use super::http::{self as web, Http, Request};
use crate::units::Digest;

/// Longest answer of a token service, in bytes.
const TOKEN_LIMIT: u64 = 1 << 20;
/// What a token lives if its service doesn't say, as the token specification has it.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used in its last seconds: the request must still arrive.
const MARGIN: Duration = Duration::from_secs(10);
/// Tokens that are kept; beyond it, those that have ended are dropped.
const MANY_TOKENS: usize = 1024;
/// Token services on other domains than their registries.
const KNOWN_REALMS: &[(&str, &str)] =
    &[("registry.redhat.io", "sso.redhat.com"), ("registry.connect.redhat.com", "sso.redhat.com")];

/// One registry, mirror or origin.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// `host[:port]`, one spelling for all of Docker Hub's.
    pub(super) authority: String,
    /// `scheme://host:port/`.
    pub(super) base: Url,
    /// Asked before the origin.
    pub(super) mirror: bool,
    /// Its entry in the configuration; the default one if it has none.
    pub(super) entry: RegistryEntry,
}

/// The login that one identity has for one repository. Shared by all sources of that identity, so that a rotated secret
/// reaches mounts that live on, once the registry has taken it.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Option<Login>>);

impl Slot {
    pub(super) fn new(login: Option<Login>) -> Self {
        Self(Mutex::new(login))
    }

    pub(super) fn set(&self, login: Option<Login>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = login;
    }

    pub(super) fn get(&self) -> Option<Login> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    authority: String,
    repository: Arc<str>,
    login: Option<Digest>,
    actions: &'static str,
}

/// An Authorization header and its end.
#[derive(Clone)]
struct Token {
    header: HeaderValue,
    until: Option<Instant>,
}

type Flight = Shared<BoxFuture<'static, Result<Token, Failure>>>;

/// All tokens, and the requests for tokens that are under way.
#[derive(Default)]
pub(super) struct Tokens {
    known: Mutex<HashMap<Key, Token>>,
    flights: Mutex<HashMap<Key, Flight>>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens(…)")
    }
}

impl Tokens {
    fn get(&self, key: &Key) -> Option<HeaderValue> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(key).filter(|t| t.until.is_none_or(|until| Instant::now() < until)).map(|t| t.header.clone())
    }

    fn keep(&self, key: Key, token: Token) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MANY_TOKENS {
            let now = Instant::now();
            known.retain(|_, t| t.until.is_some_and(|until| now < until));
        }
        known.insert(key, token);
    }
}

/// One repository at one endpoint, as one identity sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) repository: Arc<str>,
    pub(super) slot: Arc<Slot>,
    /// Whose login that is.
    pub(super) whose: Option<Digest>,
    pub(super) http: Arc<Http>,
    pub(super) tokens: Arc<Tokens>,
    /// What a token is asked for: [`PULL`] and more.
    pub(super) actions: &'static str,
    /// For messages.
    pub(super) what: Arc<str>,
}

/// The actions of a token for reading.
pub(super) const PULL: &str = "pull";
/// And for writing.
pub(super) const PUSH: &str = "pull,push";
/// And for deleting.
pub(super) const DELETE: &str = "pull,push,delete";

impl Session {
    /// One request below `/v2/<repository>/`, with a token if the registry asks for one. A 401 of the registry itself renews
    /// the token once; what it answers then is the caller's to judge.
    pub(super) async fn send(
        &self,
        what: &str,
        method: Method,
        path: &str,
        headers: HeaderMap,
    ) -> Result<reqwest::Response, Failure> {
        let mut url = self.url(what, path)?;
        if let Some(origin) = self.namespace() {
            url.query_pairs_mut().append_pair("ns", &origin);
        }
        self.send_to(what, method, url, headers, None).await
    }

    /// The URL of something below `/v2/<repository>/`.
    pub(super) fn url(&self, what: &str, path: &str) -> Result<Url, SourceError> {
        let url = self.endpoint.base.join(&format!("v2/{}/{path}", self.repository));
        url.map_err(|e| SourceError::Invalid { what: what.into(), detail: e.to_string() })
    }

    /// [`Self::send`] to a URL that the registry named, which may lie elsewhere: the token goes to the registry only.
    pub(super) async fn send_to(
        &self,
        what: &str,
        method: Method,
        url: Url,
        headers: HeaderMap,
        body: Option<Bytes>,
    ) -> Result<reqwest::Response, Failure> {
        let base = &self.endpoint.base;
        let login = self.slot.get();
        let key = Key {
            authority: self.endpoint.authority.clone(),
            repository: self.repository.clone(),
            login: login.as_ref().map(Login::fingerprint),
            actions: self.actions,
        };
        let mut renewed = false;
        loop {
            let used = self.tokens.get(&key);
            let request = Request {
                method: method.clone(),
                url: url.clone(),
                headers: headers.clone(),
                authorization: used.clone().map(|header| (base, header)),
                form: None,
                body: body.clone(),
            };
            let response = self.http.send(what, request).await?;
            let asks = response.status().as_u16() == 401 && web::same_origin(response.url(), base);
            if !asks || renewed {
                return Ok(response);
            }
            renewed = true;
            let challenge = Challenge::read(response.headers());
            drop(response);
            if self.tokens.get(&key) == used {
                self.renew(key.clone(), login.clone(), challenge).await?;
            }
        }
    }

    /// What a mirror is told of the registry that it stands for.
    fn namespace(&self) -> Option<String> {
        self.endpoint.mirror.then(|| self.what.split('/').next().unwrap_or_default().to_owned())
    }

    /// Gets a token; requests of equal key join the one that is under way.
    async fn renew(&self, key: Key, login: Option<Login>, challenge: Challenge) -> Result<(), Failure> {
        let flight = {
            let mut flights = self.tokens.flights.lock().unwrap_or_else(PoisonError::into_inner);
            // A flight whose every waiter gave up would never move: it is dropped with its last handle here.
            flights.retain(|_, flight| flight.peek().is_none() && flight.strong_count().unwrap_or(0) > 1);
            let new = || {
                let this = self.clone();
                async move { this.authenticate(login, challenge).await }.boxed().shared()
            };
            flights.entry(key.clone()).or_insert_with(new).clone()
        };
        let token = flight.await;
        self.tokens.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.tokens.keep(key, token?);
        Ok(())
    }

    async fn authenticate(&self, login: Option<Login>, challenge: Challenge) -> Result<Token, Failure> {
        let host = &self.endpoint.authority;
        let denied = |detail: String| SourceError::Denied { what: self.what.to_string(), detail };
        let header = |text: String| {
            let mut header = HeaderValue::try_from(text)
                .map_err(|_| denied(format!("the credentials for {host} hold characters that HTTP forbids")))?;
            header.set_sensitive(true);
            Ok::<_, Failure>(header)
        };
        match (challenge, login) {
            (_, Some(Login::Bearer(token))) => Ok(Token { header: header(format!("Bearer {token}"))?, until: None }),
            (Challenge::Bearer { realm, service }, login) => self.fetch_token(login, &realm, service).await,
            (Challenge::Basic, Some(Login::Password { user, password })) => {
                Ok(Token { header: header(basic(&user, &password))?, until: None })
            }
            (Challenge::Basic, Some(Login::Refresh(_))) => {
                Err(denied(format!("{host} wants user and password, the docker config holds an identity token")).into())
            }
            (Challenge::Basic, None) => {
                Err(denied(format!("{host} asks for credentials; add a pull secret (or docker login) for it")).into())
            }
            (Challenge::None, _) => {
                Err(denied(format!("{host} answered 401 without saying which credentials it wants")).into())
            }
        }
    }

    async fn fetch_token(&self, login: Option<Login>, realm: &str, service: Option<String>) -> Result<Token, Failure> {
        let host = &self.endpoint.authority;
        let what = format!("a token for {}", self.what);
        let mut url = Url::parse(realm).map_err(|e| SourceError::Corrupt {
            what: what.clone(),
            detail: format!("{host} names no valid token service: {e}"),
        })?;
        self.http.check(&what, &url)?;
        if login.is_some() {
            self.check_realm(&what, &url)?;
        }
        let scope = format!("repository:{}:{}", self.repository, self.actions);
        let mut fields: Vec<(&'static str, String)> = vec![("scope", scope)];
        fields.extend(service.map(|service| ("service", service)));
        let mut request = Request {
            method: Method::GET,
            url: url.clone(),
            headers: HeaderMap::new(),
            authorization: None,
            form: None,
            body: None,
        };
        match login {
            Some(Login::Refresh(token)) => {
                fields.extend([
                    ("grant_type", "refresh_token".into()),
                    ("client_id", "clip-csi".into()),
                    ("refresh_token", token),
                ]);
                request.method = Method::POST;
                request.form = Some(fields);
            }
            login => {
                url.query_pairs_mut().extend_pairs(&fields);
                request.url = url.clone();
                if let Some(Login::Password { user, password }) = login
                    && let Ok(mut header) = HeaderValue::try_from(basic(&user, &password))
                {
                    header.set_sensitive(true);
                    request.authorization = Some((&url, header));
                }
            }
        }
        let response = self.http.send(&what, request).await?;
        if !response.status().is_success() {
            let status = response.status();
            return Err(match web::status_error(&what, response).await {
                // A service that refuses a login may answer 400 or 404 just as well.
                Failure::Final(_) => SourceError::Denied {
                    what: self.what.to_string(),
                    detail: format!(
                        "the token service {} answered {status}; check the pull secret (or docker login) for {host}",
                        web::host_of(&url)
                    ),
                }
                .into(),
                again => again,
            });
        }
        /// The answer of a token service.
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<f64>,
        }
        let bytes = web::body(response, &what, TOKEN_LIMIT).await?;
        let bad = |detail: &str| Failure::corrupt(&what, format!("{}: {detail}", web::host_of(&url)));
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| bad("the answer is not a token"))?;
        let token =
            answer.token.or(answer.access_token).filter(|t| !t.is_empty()).ok_or_else(|| bad("holds no token"))?;
        let life = answer.expires_in.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(DEFAULT_LIFE);
        let life = life.min(Duration::from_secs(24 * 3600));
        let mut header = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| bad("the token is not valid"))?;
        header.set_sensitive(true);
        Ok(Token { header, until: Some(Instant::now() + life.saturating_sub(MARGIN.min(life / 2))) })
    }

    /// Whether this registry's login may go to its token service. The registry names the service, so its word is trusted as
    /// far as the login reaches anyway: its own host and domain. At the shell, as with docker, any HTTPS service it names.
    fn check_realm(&self, what: &str, realm: &Url) -> Result<(), SourceError> {
        let base = &self.endpoint.base;
        let (registry, service) = (base.host_str().unwrap_or_default(), realm.host_str().unwrap_or_default());
        let downgrade = base.scheme() == "https" && realm.scheme() != "https";
        let parent =
            registry.split_once('.').map(|(_, parent)| parent).filter(|p| p.contains('.') && base.domain().is_some());
        let related = service == registry
            || parent.is_some_and(|p| service == p || service.strip_suffix(p).is_some_and(|rest| rest.ends_with('.')))
            || KNOWN_REALMS.contains(&(registry, service))
            || self.endpoint.entry.token_hosts.iter().any(|h| {
                let named = canonical_host(h);
                named == service || named == web::host_of(realm)
            });
        if !downgrade && (related || (self.http.is_trusted() && realm.scheme() == "https")) {
            return Ok(());
        }
        let host = &self.endpoint.authority;
        let detail = format!(
            "{host} names {}://{} as its token service, which may not see the credentials for {host}; if it is right, add it to \
             sources.registries.\"{host}\".tokenHosts",
            realm.scheme(),
            web::host_of(realm)
        );
        Err(SourceError::Refused { what: what.into(), detail })
    }
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

/// What a registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Challenge {
    Bearer { realm: String, service: Option<String> },
    Basic,
    None,
}

impl Challenge {
    /// Tokens are preferred; schemes that are not known are passed over.
    fn read(headers: &HeaderMap) -> Self {
        let mut found = Self::None;
        for value in headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok()) {
            for challenge in http_auth::parser::ChallengeParser::new(value).map_while(Result::ok) {
                let param = |name: &str| {
                    challenge.params.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v.to_unescaped())
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = param("realm")
                {
                    return Self::Bearer { realm, service: param("service") };
                }
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    found = Self::Basic;
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::policy::SourceConfig;
    use super::*;

    fn challenge(values: &[&str]) -> Challenge {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        Challenge::read(&headers)
    }

    #[test]
    fn bearer_challenges_are_preferred_over_basic_ones() {
        let bearer = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="a,b""#;
        let want = Challenge::Bearer {
            realm: "https://auth.docker.io/token".into(),
            service: Some("registry.docker.io".into()),
        };
        assert_eq!(challenge(&[bearer]), want);
        assert_eq!(challenge(&[r#"Basic realm="x""#, bearer]), want);
        assert_eq!(challenge(&[&format!(r#"Basic realm="x", {bearer}"#)]), want);
        assert_eq!(challenge(&[r#"BASIC realm="x""#]), Challenge::Basic);
        assert_eq!(challenge(&["Negotiate", "Bearer scope=\"x\""]), Challenge::None);
        assert_eq!(challenge(&["\"", ",,", "Bearer realm"]), Challenge::None);
    }

    fn may_see(registry: &str, realm: &str, trusted: bool, token_hosts: &[&str]) -> bool {
        let base = Url::parse(registry).unwrap();
        let entry =
            RegistryEntry { token_hosts: token_hosts.iter().map(|h| (*h).into()).collect(), ..Default::default() };
        let endpoint =
            Endpoint { authority: base.host_str().unwrap().into(), base: base.clone(), mirror: false, entry };
        let session = Session {
            endpoint: Arc::new(endpoint),
            repository: "r".into(),
            slot: Arc::default(),
            whose: None,
            http: Arc::new(Http::new(trusted, &SourceConfig::default())),
            tokens: Arc::default(),
            actions: PULL,
            what: "x".into(),
        };
        session.check_realm("x", &Url::parse(realm).unwrap()).is_ok()
    }

    #[test]
    fn a_login_goes_to_the_registrys_own_token_service_only() {
        for (registry, realm) in [
            ("https://ghcr.io", "https://ghcr.io/token"),
            ("https://registry-1.docker.io", "https://auth.docker.io/token"),
            ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth"),
            ("https://registry.corp.example", "https://gitlab.corp.example/jwt"),
            ("https://registry.redhat.io", "https://sso.redhat.com/auth"),
            ("http://127.0.0.1:5000", "http://127.0.0.1:5001/token"),
        ] {
            assert!(may_see(registry, realm, false, &[]), "{registry} {realm}");
        }
        for (registry, realm) in [
            ("https://ghcr.io", "https://evil.io/token"),
            ("https://ghcr.io", "https://ghcr.io.evil.example/token"),
            ("https://ghcr.io", "http://ghcr.io/token"),
            ("https://registry.gitlab.com", "https://notgitlab.com/jwt"),
            ("https://example.com", "https://evil.com/"),
            ("http://127.0.0.1:5000", "http://10.0.0.1/token"),
        ] {
            assert!(!may_see(registry, realm, false, &[]), "{registry} {realm}");
        }
        assert!(may_see("https://ghcr.io", "https://tokens.example/", false, &["tokens.example"]));
        assert!(may_see("https://ghcr.io", "https://tokens.example/", true, &[]));
        assert!(!may_see("https://ghcr.io", "http://tokens.example/", true, &["tokens.example"]));
    }
}
