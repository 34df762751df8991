//! S3 and what speaks like it: whose keys serve which place, and the requests.

mod client;
mod location;
mod object;
mod upload;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_credential_types::provider::ProvideCredentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{
    IdentityCache, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedCredentialsProvider,
    StalledStreamProtectionConfig,
};

use super::address::Reach;
use super::policy::{S3Entry, SourceConfig, normal_endpoint};
use super::retry::{Label, RetryPolicy};
use super::{BlobSource, Credentials, Location, S3Keys, Scope, SourceError};
use crate::units::Digest;
use client::{Guard, KeySlot};
pub(super) use location::{format_url, parse_url};
use object::S3Object;
use upload::Upload;

/// The region where nobody names one; S3-compatible stores take any.
const DEFAULT_REGION: &str = "us-east-1";
/// Keys that are kept for identities before those of ended mounts are dropped.
const MANY: usize = 1024;

/// All S3 places, under one configuration. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Stores(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    trusted: bool,
    config: Arc<SourceConfig>,
    retry: RetryPolicy,
    guards: [Guard; 3],
    /// Loaded when the node's own credentials are first needed.
    chain: tokio::sync::OnceCell<Chain>,
    slots: Mutex<HashMap<Digest, Weak<KeySlot>>>,
    twin: OnceLock<Stores>,
}

/// The SDK's own way to credentials: environment, profile, web identity, container, instance, in this order. Loading it asks
/// nobody on the network; credentials are looked for with the first request.
#[derive(Debug)]
struct Chain {
    sdk: SdkConfig,
    /// The region that the environment or the profile names.
    named: Option<Region>,
    /// The instance's own, asked for only where nothing else names one.
    instance: tokio::sync::OnceCell<Option<Region>>,
    provider: ProviderConfig,
}

impl Chain {
    async fn load() -> Self {
        // The instance's metadata service is among the places asked: no guard.
        let http = aws_smithy_http_client::Builder::new().tls_provider(client::TLS);
        let http = http.tls_context(client::tls_context()).build_https();
        let provider = ProviderConfig::without_region().with_http_client(http.clone());
        let profile = ProfileFileRegionProvider::builder().configure(&provider).build();
        let named =
            RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new()).or_else(profile).region().await;
        // With a region given, the loader doesn't look for one. Only token services of roles use it.
        let region = named.clone().unwrap_or(Region::from_static(DEFAULT_REGION));
        let sdk = aws_config::defaults(BehaviorVersion::latest()).http_client(http).region(region).load().await;
        Self { sdk, named, instance: tokio::sync::OnceCell::new(), provider }
    }

    /// The region of a request that names none. Elsewhere than at AWS (`elsewhere`) the instance's says nothing.
    async fn region(&self, elsewhere: bool) -> Option<Region> {
        if self.named.is_some() || elsewhere || self.has_own_endpoint() {
            return self.named.clone();
        }
        let ask = || async { ImdsRegionProvider::builder().configure(&self.provider).build().region().await };
        self.instance.get_or_init(ask).await.clone()
    }

    fn has_own_endpoint(&self) -> bool {
        self.sdk.endpoint_url().is_some() || std::env::var_os("AWS_ENDPOINT_URL_S3").is_some_and(|url| !url.is_empty())
    }
}

/// A place that may be used, and by whom.
struct Access<'a> {
    client: Client,
    bucket: &'a str,
    key: &'a str,
    /// For messages: the URL without its query, and the endpoint's host.
    name: String,
    endpoint: String,
    identity: Digest,
}

impl Stores {
    pub(super) fn new(trusted: bool, config: Arc<SourceConfig>, retry: RetryPolicy) -> Self {
        Self(Arc::new(Inner {
            trusted,
            config,
            retry,
            guards: [Reach::Any, Reach::Configured, Reach::Volume].map(Guard::new),
            chain: tokio::sync::OnceCell::new(),
            slots: Mutex::default(),
            twin: OnceLock::new(),
        }))
    }

    /// The same configuration without the restrictions of volumes.
    pub(super) fn trusted(&self) -> Self {
        if self.0.trusted {
            return self.clone();
        }
        self.0.twin.get_or_init(|| Self::new(true, self.0.config.clone(), self.0.retry.clone())).clone()
    }

    /// An object. Asks the store nothing yet.
    pub(super) async fn object(
        &self,
        location: &Location,
        credentials: &Credentials,
    ) -> Result<Arc<dyn BlobSource>, SourceError> {
        let a = self.access(location, credentials).await?;
        Ok(Arc::new(S3Object::new(a.client, a.bucket, a.key, a.name, self.0.retry.clone())))
    }

    /// Private to whose keys serve it: objects are never asked for anonymously.
    pub(super) async fn scope(&self, location: &Location, credentials: &Credentials) -> Result<Scope, SourceError> {
        let a = self.access(location, credentials).await?;
        Ok(Scope::private(&a.endpoint, a.bucket, &a.identity))
    }

    pub(super) async fn put(
        &self,
        dest: &Location,
        file: &Path,
        create_only: bool,
        credentials: &Credentials,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), SourceError> {
        let a = self.access(dest, credentials).await?;
        let upload = Upload {
            client: &a.client,
            bucket: a.bucket,
            key: a.key,
            name: &a.name,
            create_only,
            retry: &self.0.retry,
        };
        upload.run(file, progress).await
    }

    pub(super) async fn delete(&self, location: &Location, credentials: &Credentials) -> Result<(), SourceError> {
        let a = self.access(location, credentials).await?;
        let delete = || async {
            let sent = a.client.delete_object().bucket(a.bucket).key(a.key).send().await;
            sent.map(drop).map_err(|e| client::failure(&a.name, e))
        };
        match self.0.retry.run(Label::S3, &a.name, 0, delete).await {
            Err(SourceError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    pub(super) async fn list(
        &self,
        prefix: &Location,
        credentials: &Credentials,
    ) -> Result<Vec<(Location, SystemTime)>, SourceError> {
        let Location::S3 { endpoint, region, bucket, path_style, .. } = prefix else { return Ok(Vec::new()) };
        let a = self.access(prefix, credentials).await?;
        let (mut found, mut next) = (Vec::new(), None::<String>);
        loop {
            let page = || async {
                let request = a.client.list_objects_v2().bucket(a.bucket).prefix(a.key);
                let page = request.set_continuation_token(next.clone()).send().await;
                page.map_err(|e| client::failure(&a.name, e))
            };
            let page = self.0.retry.run(Label::S3, &a.name, 0, page).await?;
            found.extend(page.contents().iter().filter_map(|object| {
                let location = Location::S3 {
                    endpoint: endpoint.clone(),
                    region: region.clone(),
                    bucket: bucket.clone(),
                    key: object.key()?.to_owned(),
                    path_style: *path_style,
                };
                // One that does not say when counts as written now: the clean-up leaves it.
                let written = object.last_modified().and_then(|at| SystemTime::try_from(*at).ok());
                Some((location, written.unwrap_or_else(SystemTime::now)))
            }));
            next = page.next_continuation_token().map(str::to_owned);
            if next.is_none() || page.is_truncated() != Some(true) {
                return Ok(found);
            }
        }
    }

    /// Checks the policy and decides whose keys are used: the volume's, else (at the shell, or in a configured place) the
    /// node's own.
    async fn access<'a>(&self, location: &'a Location, credentials: &Credentials) -> Result<Access<'a>, SourceError> {
        let inner = &self.0;
        let Location::S3 { endpoint, region, bucket, key, path_style } = location else {
            return Err(SourceError::Invalid { what: location.to_string(), detail: "is not in S3".into() });
        };
        let place = normal_endpoint(endpoint).filter(|_| !endpoint.is_empty());
        let at = place.as_deref().map_or_else(String::new, |place| format!(" at {place}"));
        let name = format!("s3://{bucket}/{key}{at}");
        if let Some(why) = location::objection(bucket, key, !inner.trusted) {
            return Err(SourceError::Invalid { what: name, detail: format!("{why}; correct the location") });
        }
        if !endpoint.is_empty() && place.is_none() {
            let detail = "its endpoint is not a URL like https://host:port; correct the location".into();
            return Err(SourceError::Invalid { what: name, detail });
        }
        let entry = inner.config.s3.iter().find(|entry| entry.serves(endpoint, bucket, key));
        let guard = inner.guard(place.as_deref());
        let path_style = *path_style || entry.is_some_and(|e| e.path_style);
        let chosen = [region.as_str(), entry.map_or("", |e| &e.region)].into_iter().find(|r| !r.is_empty());
        let chosen = chosen.map(|r| Region::new(r.to_owned()));
        let (builder, region, identity) = match &credentials.s3 {
            Some(keys) => {
                let identity =
                    credentials.identity.unwrap_or_else(|| Digest::of(format!("key:{}", keys.access_key).as_bytes()));
                let slot: Arc<dyn ProvideCredentials> = inner.slot(credentials.identity, keys);
                let builder = aws_sdk_s3::Config::builder()
                    .behavior_version(BehaviorVersion::latest())
                    .credentials_provider(SharedCredentialsProvider::new(slot))
                    // The slot is the cache: rotated keys must show at once.
                    .identity_cache(IdentityCache::no_cache());
                (builder, chosen, identity)
            }
            None if inner.trusted || entry.is_some() => {
                let chain = inner.chain.get_or_init(Chain::load).await;
                let region = match chosen {
                    None => chain.region(!endpoint.is_empty()).await,
                    chosen => chosen,
                };
                (aws_sdk_s3::config::Builder::from(&chain.sdk), region, Digest::of(b"node"))
            }
            None => {
                let detail = "the node's own credentials do not serve it; give the volume a secret with S3 keys, or add the \
                              bucket to sources.s3";
                return Err(SourceError::Refused { what: name, detail: detail.into() });
            }
        };
        let mut builder = builder
            .region(region.unwrap_or(Region::from_static(DEFAULT_REGION)))
            .http_client(guard)
            .force_path_style(path_style)
            // Trying again is this crate's own policy's business.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .request_checksum_calculation(RequestChecksumCalculation::WhenSupported)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if !endpoint.is_empty() {
            builder = builder.endpoint_url(endpoint);
        } else if !inner.trusted {
            // The environment's endpoint is for the shell; a volume's location means what it says.
            builder.set_endpoint_url(None);
        }
        let client = Client::from_conf(builder.build());
        Ok(Access { client, bucket, key, name, endpoint: place.unwrap_or_default(), identity })
    }
}

impl Inner {
    fn guard(&self, place: Option<&str>) -> Guard {
        let named = |entry: &S3Entry| place.is_some() && normal_endpoint(&entry.endpoint).as_deref() == place;
        let [any, configured, volume] = &self.guards;
        match self.config.s3.iter().any(named) {
            _ if self.trusted => any.clone(),
            true => configured.clone(),
            false => volume.clone(),
        }
    }

    fn slot(&self, identity: Option<Digest>, keys: &Arc<S3Keys>) -> Arc<KeySlot> {
        let Some(identity) = identity else { return Arc::new(KeySlot::new(keys.clone())) };
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MANY {
            slots.retain(|_, slot| slot.strong_count() > 0);
        }
        if let Some(slot) = slots.get(&identity).and_then(Weak::upgrade) {
            slot.set(keys.clone());
            return slot;
        }
        let slot = Arc::new(KeySlot::new(keys.clone()));
        slots.insert(identity, Arc::downgrade(&slot));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(endpoint: &str, bucket: &str, key: &str) -> Location {
        Location::S3 {
            endpoint: endpoint.into(),
            region: String::new(),
            bucket: bucket.into(),
            key: key.into(),
            path_style: true,
        }
    }

    fn keys() -> Credentials {
        let keys = S3Keys { access_key: "A".into(), secret_key: "S".into(), session_token: None };
        Credentials { s3: Some(Arc::new(keys)), ..Default::default() }
    }

    #[tokio::test]
    async fn the_nodes_credentials_serve_configured_places_only() {
        let entry = S3Entry {
            endpoint: "http://127.0.0.1:9000".into(),
            bucket: "archives".into(),
            prefix: "public".into(),
            ..Default::default()
        };
        let config = SourceConfig { s3: vec![entry], ..Default::default() };
        let stores = Stores::new(false, Arc::new(config), RetryPolicy::default());
        let none = Credentials::default();
        let kind = async |location: Location, credentials: &Credentials| {
            stores.object(&location, credentials).await.map(|_| "ok").unwrap_or_else(|e| e.kind())
        };
        assert_eq!(kind(place("http://127.0.0.1:9000", "archives", "public/a.clip"), &none).await, "ok");
        for (endpoint, bucket, key) in [
            ("http://127.0.0.1:9000", "archives", "private/a.clip"),
            ("http://127.0.0.1:9000", "archives", "public-2/a.clip"),
            ("http://127.0.0.1:9000", "others", "public/a.clip"),
            ("http://127.0.0.1:9001", "archives", "public/a.clip"),
            ("", "archives", "public/a.clip"),
        ] {
            assert_eq!(kind(place(endpoint, bucket, key), &none).await, "refused", "{endpoint} {bucket} {key}");
            assert_eq!(kind(place(endpoint, bucket, key), &keys()).await, "ok", "{endpoint} {bucket} {key}");
        }
        assert_eq!(kind(place("http://127.0.0.1:9000", "archives", "public/../private/a"), &none).await, "invalid");
        let error = stores.object(&place("", "archives", "x"), &none).await.unwrap_err().to_string();
        assert!(error.contains("sources.s3") && error.contains("secret"), "{error}");
    }

    #[tokio::test]
    async fn keys_that_a_volume_brings_start_no_search_for_credentials() {
        let stores = Stores::new(true, Arc::default(), RetryPolicy::default());
        for endpoint in ["", "http://127.0.0.1:1"] {
            stores.object(&place(endpoint, "archives", "a"), &keys()).await.unwrap();
        }
        assert!(stores.0.chain.get().is_none());
    }

    #[tokio::test]
    async fn volumes_reach_no_metadata_service_through_an_endpoint_or_a_bucket() {
        let stores = Stores::new(false, Arc::default(), RetryPolicy::default());
        for (endpoint, bucket, path_style) in [
            ("http://169.254.169.254", "latest", true),
            ("http://[fd00:ec2::254]", "latest", true),
            ("http://127.0.0.1:1", "bucket", true),
            ("http://localhost:1", "bucket", true),
            ("http://localhost:1", "bucket", false),
            ("http://2852039166", "latest", true),
            ("http://169.254.169.254.", "latest", true),
        ] {
            let location = Location::S3 {
                endpoint: endpoint.into(),
                region: String::new(),
                bucket: bucket.into(),
                key: "meta-data".into(),
                path_style,
            };
            let source = stores.object(&location, &keys()).await.unwrap();
            let error = source.read_range(0..1).await.unwrap_err();
            assert_eq!(error.kind(), "refused", "{endpoint}: {error}");
        }
    }
}
