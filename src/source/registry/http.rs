//! HTTP as registries need it: redirects followed by hand, so that credentials and addresses can be checked at every hop.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use url::Url;

use super::super::SourceError;
use super::super::address::{Reach, Refused, find_cause};
use super::super::policy::SourceConfig;
use super::super::retry::{self, Failure};
use super::super::tls;
use super::credentials::canonical_host;

/// Redirects that are followed in one request: storage needs one, a CDN before it two.
const MAX_REDIRECTS: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// Longest error body that is looked at, in bytes.
const ERROR_LIMIT: u64 = 16 << 10;

/// Scheme, host and port: what a credential belongs to.
pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default()
}

/// The HTTP clients of one policy.
#[derive(Debug)]
pub(super) struct Http {
    trusted: bool,
    /// Authorities that the configuration names (registries, mirrors, token hosts).
    configured: BTreeSet<String>,
    /// CA files by authority.
    ca_files: HashMap<String, PathBuf>,
    clients: Mutex<HashMap<(Reach, Option<PathBuf>), reqwest::Client>>,
}

/// One request. The authorization goes to `origin` only, whatever redirects say.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Who may see the authorization, and the header.
    pub(super) authorization: Option<(&'a Url, HeaderValue)>,
    /// A form to post.
    pub(super) form: Option<Vec<(&'static str, String)>>,
    /// Bytes to send. A request that has some follows no redirect.
    pub(super) body: Option<Bytes>,
}

impl Http {
    pub(super) fn new(trusted: bool, config: &SourceConfig) -> Self {
        let mut configured = BTreeSet::new();
        let mut ca_files = HashMap::new();
        for (host, entry) in &config.registries {
            configured.insert(canonical_host(host));
            configured.extend(entry.mirrors.iter().chain(&entry.token_hosts).map(|h| canonical_host(h)));
            if let Some(file) = &entry.ca_file {
                ca_files.insert(canonical_host(host), file.clone());
            }
        }
        Self { trusted, configured, ca_files, clients: Mutex::default() }
    }

    pub(super) fn is_trusted(&self) -> bool {
        self.trusted
    }

    fn reach(&self, url: &Url) -> Reach {
        match authorities(url).iter().any(|a| self.configured.contains(a)) {
            _ if self.trusted => Reach::Any,
            true => Reach::Configured,
            false => Reach::Volume,
        }
    }

    fn client(&self, url: &Url) -> Result<reqwest::Client, SourceError> {
        let ca_file = authorities(url).iter().find_map(|a| self.ca_files.get(a)).cloned();
        let key = (self.reach(url), ca_file);
        let known = self.clients.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(client) = known {
            return Ok(client);
        }
        let client = build_client(key.0, key.1.as_deref())?;
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).insert(key, client.clone());
        Ok(client)
    }

    /// Scheme, credentials in the URL, and the address if it is a literal. Names are checked when they are resolved.
    pub(super) fn check(&self, what: &str, url: &Url) -> Result<(), SourceError> {
        let refuse = |detail: String| Err(SourceError::Refused { what: what.into(), detail });
        if !matches!(url.scheme(), "http" | "https") {
            return refuse(format!("{}:// is not spoken here", url.scheme()));
        }
        let Some(host) = url.host_str() else { return refuse("a URL without a host".into()) };
        if !url.username().is_empty() || url.password().is_some() {
            return refuse(format!("a URL of {host} holds credentials"));
        }
        self.reach(url).check_host(host).map_err(|e| refused(what, &e))
    }

    /// Sends a request and follows redirects. The answer's status is the caller's to judge.
    pub(super) async fn send(&self, what: &str, request: Request<'_>) -> Result<reqwest::Response, Failure> {
        let mut url = request.url;
        for _ in 0..=MAX_REDIRECTS {
            self.check(what, &url)?;
            let client = self.client(&url)?;
            let mut builder = client.request(request.method.clone(), url.clone()).headers(request.headers.clone());
            if let Some((origin, value)) = &request.authorization
                && same_origin(origin, &url)
            {
                builder = builder.header(AUTHORIZATION, value.clone());
            }
            if let Some(form) = &request.form {
                let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
                builder = builder.header(http::header::CONTENT_TYPE, "application/x-www-form-urlencoded").body(body);
            }
            if let Some(body) = &request.body {
                builder = builder.body(body.clone());
            }
            let response = builder.send().await.map_err(|e| send_error(what, &url, e))?;
            let bare = request.form.is_none() && request.body.is_none();
            let next = match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 if bare => response.headers().get(LOCATION),
                _ => return Ok(response),
            };
            url = next_hop(what, &url, next.and_then(|value| value.to_str().ok()))?;
        }
        Err(Failure::corrupt(what, format!("more than {MAX_REDIRECTS} redirects")))
    }
}

/// Where a redirect leads: never from TLS to plain HTTP.
pub(super) fn next_hop(what: &str, from: &Url, location: Option<&str>) -> Result<Url, Failure> {
    let next = location
        .and_then(|text| from.join(text).ok())
        .ok_or_else(|| Failure::corrupt(what, format!("a redirect of {} leads nowhere", host_of(from))))?;
    if from.scheme() == "https" && next.scheme() != "https" {
        let detail = format!("{} redirects to {}://{}, away from HTTPS", host_of(from), next.scheme(), host_of(&next));
        return Err(SourceError::Refused { what: what.into(), detail }.into());
    }
    Ok(next)
}

/// The names under which the configuration may know a URL's host.
fn authorities(url: &Url) -> Vec<String> {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => vec![canonical_host(&format!("{host}:{port}"))],
        None => {
            let port = url.port_or_known_default().unwrap_or_default();
            vec![canonical_host(host), canonical_host(&format!("{host}:{port}"))]
        }
    }
}

/// `host:port` of a URL, for messages: never its path or query, which may hold a signature.
pub(super) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or("?");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

pub(super) fn refused(what: &str, refused: &Refused) -> SourceError {
    let detail = format!(
        "{refused}; a registry on such an address must be configured under sources.registries, metadata services never are"
    );
    SourceError::Refused { what: what.into(), detail }
}

/// Installs ring as the process's TLS provider, once; another one that is there already is kept.
fn install_tls() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

struct Resolver {
    reach: Reach,
    /// Hosts of the environment's proxies: the administrator's, not the volume's.
    proxies: Vec<String>,
}

impl reqwest::dns::Resolve for Resolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let reach = if self.proxies.iter().any(|p| p == name.as_str()) { Reach::Any } else { self.reach };
        Box::pin(async move {
            let addresses = reach.lookup(name.as_str()).await?;
            Ok(Box::new(addresses.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

fn proxy_hosts() -> Vec<String> {
    ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .filter_map(|value| Url::parse(&value).or_else(|_| Url::parse(&format!("http://{value}"))).ok())
        .filter_map(|url| url.host_str().map(str::to_owned))
        .collect()
}

fn build_client(reach: Reach, ca_file: Option<&Path>) -> Result<reqwest::Client, SourceError> {
    install_tls();
    let mut builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .dns_resolver(std::sync::Arc::new(Resolver { reach, proxies: proxy_hosts() }))
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_keepalive(Duration::from_secs(30))
        .pool_idle_timeout(Duration::from_secs(60))
        .user_agent(concat!("clip-csi/", env!("CARGO_PKG_VERSION")));
    if let Some(file) = ca_file {
        let pem = std::fs::read(file).map_err(|e| SourceError::of_io(file.display(), &e))?;
        let invalid = |why: &str| SourceError::Invalid {
            what: file.display().to_string(),
            detail: format!("holds no CA certificates in PEM form{why}"),
        };
        let certificates =
            reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| invalid(&format!(": {}", cause(&e))))?;
        if certificates.is_empty() {
            return Err(invalid(""));
        }
        builder = builder.tls_certs_merge(certificates);
    }
    if ca_file.is_none() && !tls::has_roots() {
        // Plain HTTP can still be spoken; TLS fails at the first certificate.
        let none = rustls::ClientConfig::builder().with_root_certificates(rustls::RootCertStore::empty());
        builder = builder.tls_backend_preconfigured(none.with_no_client_auth());
    }
    builder.build().map_err(|error| {
        let what = ca_file.map_or_else(|| "the HTTP client".to_owned(), |file| file.display().to_string());
        SourceError::Invalid { what, detail: cause(&error) }
    })
}

/// The innermost cause: the outer ones only say that a request failed.
fn cause(error: &reqwest::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

fn send_error(what: &str, url: &Url, error: reqwest::Error) -> Failure {
    let error = error.without_url();
    if let Some(found) = find_cause::<Refused>(&error) {
        return refused(what, found).into();
    }
    let host = host_of(url);
    let detail = match find_cause::<rustls::Error>(&error) {
        Some(rustls::Error::InvalidCertificate(why)) => {
            let set =
                format!("the certificate of {host} is not trusted ({why}); set sources.registries.\"{host}\".caFile");
            Some(tls::untrusted(&host, set))
        }
        Some(rustls::Error::InvalidMessage(_)) => Some(format!(
            "{host} does not speak TLS; if it speaks plain HTTP, set sources.registries.\"{host}\".plainHttp"
        )),
        _ => None,
    };
    if let Some(detail) = detail {
        return SourceError::Unavailable { what: what.into(), tries: 1, detail }.into();
    }
    if error.is_builder() {
        return SourceError::Invalid { what: what.into(), detail: cause(&error) }.into();
    }
    let kind = match () {
        () if error.is_timeout() => "timed out",
        () if error.is_connect() => "connection failed",
        () => "request failed",
    };
    Failure::unavailable(what, format!("{host}: {kind}: {}", cause(&error)))
}

/// What an answer that is not a success means. Reads a little of its body for the registry's own words.
pub(super) async fn status_error(what: &str, response: reqwest::Response) -> Failure {
    let (status, host) = (response.status(), host_of(response.url()));
    let after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).and_then(retry::retry_after);
    let said = said(response).await;
    let detail = format!("{host} answered {status}{said}");
    let what = what.to_owned();
    match status.as_u16() {
        404 | 410 => {
            let detail = format!("{detail}; check the name, and whether it needs credentials");
            SourceError::NotFound { what, detail }.into()
        }
        401 | 403 => {
            let detail = format!("{detail}; check the pull secret (or docker login) for {host}");
            SourceError::Denied { what, detail }.into()
        }
        408 | 425 | 429 | 500..=599 => Failure::Again(SourceError::Unavailable { what, tries: 1, detail }, after),
        416 => SourceError::Corrupt { what, detail: format!("{detail}: it is shorter than it should be") }.into(),
        _ => SourceError::Unavailable { what, tries: 1, detail }.into(),
    }
}

/// `: CODE message` of a registry's error envelope, shortened and on one line; empty if there is none.
async fn said(response: reqwest::Response) -> String {
    /// The envelope of the distribution specification.
    #[derive(serde::Deserialize)]
    struct Envelope {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let body = tokio::time::timeout(Duration::from_secs(5), body(response, "", ERROR_LIMIT)).await;
    let Ok(Ok(body)) = body else { return String::new() };
    let Some(one) = serde_json::from_slice::<Envelope>(&body).ok().and_then(|e| e.errors.into_iter().next()) else {
        return String::new();
    };
    let text: String = format!("{} {}", one.code, one.message).chars().filter(|c| !c.is_control()).take(200).collect();
    format!(": {}", text.trim())
}

/// The whole body, if it is no longer than `limit`.
pub(super) async fn body(response: reqwest::Response, what: &str, limit: u64) -> Result<Bytes, Failure> {
    let host = host_of(response.url());
    let too_long =
        || SourceError::Invalid { what: what.into(), detail: format!("{host} sends more than {limit} bytes") };
    if response.content_length().is_some_and(|n| n > limit) {
        return Err(too_long().into());
    }
    let mut whole = BytesMut::new();
    let mut stream = response.bytes_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|e| body_error(what, &host, e))?;
        if (whole.len() + piece.len()) as u64 > limit {
            return Err(too_long().into());
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.freeze())
}

/// A body that broke.
pub(super) fn body_error(what: &str, host: &str, error: reqwest::Error) -> Failure {
    let error = error.without_url();
    let timeout = if error.is_timeout() { "timed out: " } else { "" };
    Failure::unavailable(what, format!("the body from {host} broke off: {timeout}{}", cause(&error)))
}

/// An answer that was encoded on the way can't be read by range.
pub(super) fn check_encoding(what: &str, headers: &HeaderMap) -> Result<(), Failure> {
    match headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity" | b"") => Ok(()),
        Some(_) => Err(Failure::corrupt(what, "the answer has a Content-Encoding that was not asked for")),
    }
}

/// First and last byte and the total of `bytes 0-9/100`; total `None` for `*`.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(u64, u64, Option<u64>)> {
    let text = headers.get(http::header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, total) = text.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, total))
}

pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

pub(super) fn is_success(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 206)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_differ_in_scheme_host_and_port() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(same_origin(&url("https://h/a"), &url("https://h:443/b?c")));
        for other in ["http://h/", "https://h:444/", "https://h.evil/", "https://evil/h"] {
            assert!(!same_origin(&url("https://h/"), &url(other)), "{other}");
        }
    }

    #[test]
    fn redirects_never_leave_tls() {
        let from = Url::parse("https://h/v2/a").unwrap();
        let kind = |to| next_hop("x", &from, to).map(|u| u.to_string()).map_err(|f| f.error().kind());
        assert_eq!(kind(Some("/b?c")).unwrap(), "https://h/b?c");
        assert_eq!(kind(Some("//other/b")).unwrap(), "https://other/b");
        assert_eq!(kind(Some("http://h/b")), Err("refused"));
        assert_eq!(kind(Some("ftp://h/b")), Err("refused"));
        assert_eq!(kind(None), Err("corrupt"));
        assert_eq!(kind(Some("https://[")), Err("corrupt"));
    }

    #[test]
    fn content_ranges_are_read_strictly() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(http::header::CONTENT_RANGE, HeaderValue::from_static(text));
            content_range(&headers)
        };
        assert_eq!(read("bytes 3-9/10"), Some((3, 9, Some(10))));
        assert_eq!(read("bytes 3-9/*"), Some((3, 9, None)));
        for bad in ["bytes */10", "bytes 3-/10", "3-9/10", "bytes 3-9", "bytes -1-9/10", ""] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn volumes_may_not_name_schemes_credentials_or_metadata() {
        let node = Http::new(false, &SourceConfig::default());
        let shell = Http::new(true, &SourceConfig::default());
        for bad in ["http://169.254.169.254/", "http://[fd00:ec2::254]/", "http://127.0.0.1:80/", "http://localhost/"] {
            assert_eq!(node.check("x", &Url::parse(bad).unwrap()).unwrap_err().kind(), "refused", "{bad}");
            assert!(shell.check("x", &Url::parse(bad).unwrap()).is_ok(), "{bad}");
        }
        // The URL parser reads every spelling of an IPv4 address.
        for bad in
            ["http://0xa9fea9fe/", "http://2852039166/", "http://0251.0376.0251.0376/", "ftp://h/", "http://u:p@h/"]
        {
            assert!(node.check("x", &Url::parse(bad).unwrap()).is_err(), "{bad}");
        }
        assert!(node.check("x", &Url::parse("https://ghcr.io/v2/").unwrap()).is_ok());
    }

    #[test]
    fn a_configured_loopback_registry_is_that_port_only() {
        let config = SourceConfig {
            registries: [("127.0.0.1:5000".to_owned(), Default::default())].into(),
            ..Default::default()
        };
        let node = Http::new(false, &config);
        assert!(node.check("x", &Url::parse("http://127.0.0.1:5000/").unwrap()).is_ok());
        assert!(node.check("x", &Url::parse("http://127.0.0.1:22/").unwrap()).is_err());
        assert!(node.check("x", &Url::parse("http://127.0.0.1/").unwrap()).is_err());
    }
}
