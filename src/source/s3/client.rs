//! The SDK's client as this driver needs it: addresses checked, credentials from one place, errors in our words.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use aws_credential_types::Credentials as SdkCredentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::Connector;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;

use super::super::address::{Reach, Refused, find_cause};
use super::super::retry::{self, Failure};
use super::super::{S3Keys, SourceError, tls};

/// TLS by ring, as everywhere in this driver.
pub(super) const TLS: Provider = Provider::Rustls(CryptoMode::Ring);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// The machine's CA certificates; none where there are none, which the SDK would not take for an error but a bug.
pub(super) fn tls_context() -> TlsContext {
    let store = TrustStore::empty().with_native_roots(tls::has_roots());
    // Only bad certificates given here would be an error.
    TlsContext::builder().with_trust_store(store).build().unwrap_or_default()
}

/// An HTTP client that reaches what its policy allows. Clones share their connections. Redirects are not followed: the SDK
/// makes errors of them.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    reach: Reach,
    connector: Arc<OnceLock<SharedHttpConnector>>,
}

impl Guard {
    pub(super) fn new(reach: Reach) -> Self {
        Self { reach, connector: Arc::default() }
    }
}

impl HttpClient for Guard {
    fn http_connector(&self, _: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let build = || {
            let settings = HttpConnectorSettings::builder().connect_timeout(CONNECT_TIMEOUT).build();
            let mut builder = Connector::builder()
                .connector_settings(settings)
                .proxy_config(ProxyConfig::from_env())
                .tls_provider(TLS)
                .tls_context(tls_context());
            builder.set_sleep_impl(components.sleep_impl());
            let inner = builder.build_with_resolver(Resolver(self.reach));
            SharedHttpConnector::new(Checked { reach: self.reach, inner })
        };
        self.connector.get_or_init(build).clone()
    }
}

/// Checks the host of every request, as the SDK composes it (a bucket may become part of the name).
#[derive(Debug)]
struct Checked {
    reach: Reach,
    inner: Connector,
}

impl HttpConnector for Checked {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let host = url::Url::parse(request.uri()).ok().and_then(|u| u.host_str().map(str::to_owned));
        match self.reach.check_host(host.as_deref().unwrap_or_default()) {
            Ok(()) => self.inner.call(request),
            Err(refused) => HttpConnectorFuture::ready(Err(ConnectorError::user(refused.into()))),
        }
    }
}

#[derive(Debug, Clone)]
struct Resolver(Reach);

impl ResolveDns for Resolver {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move {
            let addresses = self.0.lookup(name).await.map_err(ResolveDnsError::new)?;
            Ok(addresses.iter().map(std::net::SocketAddr::ip).collect())
        })
    }
}

/// The keys that one identity brought. Shared by its sources, so that rotated keys reach mounts that live on.
pub(super) struct KeySlot(Mutex<Arc<S3Keys>>);

impl std::fmt::Debug for KeySlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeySlot(…)")
    }
}

impl KeySlot {
    pub(super) fn new(keys: Arc<S3Keys>) -> Self {
        Self(Mutex::new(keys))
    }

    pub(super) fn set(&self, keys: Arc<S3Keys>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = keys;
    }
}

impl ProvideCredentials for KeySlot {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let token = keys.session_token.clone();
        future::ProvideCredentials::ready(Ok(SdkCredentials::new(
            &keys.access_key,
            &keys.secret_key,
            token,
            None,
            "the volume's secret",
        )))
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// What an SDK error means, and whether trying again may help.
pub(super) fn failure<E>(what: &str, error: SdkError<E, HttpResponse>) -> Failure
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    if let Some(refused) = find_cause::<Refused>(&error) {
        let detail = format!("{refused}; an endpoint on such an address must be configured under sources.s3");
        return SourceError::Refused { what: what.into(), detail }.into();
    }
    if let Some(credentials) = find_cause::<CredentialsError>(&error) {
        let detail =
            format!("there are no usable AWS credentials ({}); set AWS_ACCESS_KEY_ID or a role", cause(credentials));
        return SourceError::Denied { what: what.into(), detail }.into();
    }
    if let Some(rustls::Error::InvalidCertificate(why)) = find_cause::<rustls::Error>(&error) {
        let remedy = "add its authority to those of this machine, or name it in SSL_CERT_FILE";
        let detail = format!("the certificate of the endpoint is not trusted ({why}); {remedy}");
        let detail = tls::untrusted("the endpoint", detail);
        return SourceError::Unavailable { what: what.into(), tries: 1, detail }.into();
    }
    let SdkError::ServiceError(service) = &error else {
        return match &error {
            SdkError::ConstructionFailure(_) => {
                let detail = format!("the request can't be made: {}", cause(&error));
                SourceError::Invalid { what: what.into(), detail }.into()
            }
            SdkError::TimeoutError(_) => Failure::unavailable(what, "timed out"),
            SdkError::ResponseError(_) => {
                Failure::unavailable(what, format!("the answer is not S3's: {}", cause(&error)))
            }
            _ => Failure::unavailable(what, cause(&error)),
        };
    };
    let status = service.raw().status().as_u16();
    let code = service.err().code().unwrap_or_default();
    let after = service.raw().headers().get("retry-after").and_then(retry::retry_after);
    let said: String =
        service.err().message().unwrap_or_default().chars().filter(|c| !c.is_control()).take(200).collect();
    let detail = format!("{status} {code} {said}").trim().to_owned();
    let what = what.to_owned();
    match (status, code) {
        (404, _) => SourceError::NotFound { what, detail: format!("{detail}; check bucket and key") }.into(),
        (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => {
            SourceError::Denied { what, detail: format!("{detail}; renew the keys in the secret") }.into()
        }
        (401 | 403, _) => {
            let detail =
                format!("{detail}; check the keys and that they allow s3:GetObject on it (or it does not exist)");
            SourceError::Denied { what, detail }.into()
        }
        (301 | 307 | 308, _) | (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
            let region = service.raw().headers().get("x-amz-bucket-region").unwrap_or("another region");
            let detail = format!("{detail}; the bucket lies in {region}: set the region (or the endpoint)");
            SourceError::Invalid { what, detail }.into()
        }
        (412, _) => {
            let detail = "the object was changed while it was in use; keep archives under new keys".into();
            SourceError::Corrupt { what, detail }.into()
        }
        (416, _) => {
            SourceError::Corrupt { what, detail: format!("{detail}: the object is shorter than it should be") }.into()
        }
        (408 | 429 | 500..=599, _) | (400, "RequestTimeout" | "SlowDown") => {
            Failure::Again(SourceError::Unavailable { what, tries: 1, detail }, after)
        }
        _ => SourceError::Unavailable { what, tries: 1, detail }.into(),
    }
}
