//! Where the world begins: ranges of blobs from local files, OCI layouts, S3 and registries.
//!
//! [`BlobSource`] is the one trait everything above reads through; [`fake`] has an in-memory one and a fault injector.
//! [`Sources`] turns a [`Location`] into a source, under a [`Policy`]: on a node, locations found inside archives and
//! volume attributes are untrusted; at the shell they are the user's own.

mod address;
mod error;
pub mod fake;
pub mod image;
pub mod layout;
pub mod local;
pub mod policy;
pub mod registry;
pub mod retry;
pub mod s3;
pub(crate) mod tls;

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

use layout::Layout;
use local::{LocalFile, Roots};

pub use error::SourceError;
pub use image::{ImageRef, LayerSource, ResolvedImage, Scope};
pub use policy::Policy;
pub use registry::artifact::{Artifact, ArtifactRef, Labels, Subject};
pub use registry::{Repository, split_oci};
pub use retry::RetryPolicy;

use crate::units::{Digest, Platform};

/// One immutable blob that can be read by range.
#[async_trait]
pub trait BlobSource: Send + Sync + Debug {
    /// Exactly the bytes of `range` (never fewer, never others): anything else is an error. An empty range is empty bytes.
    async fn read_range(&self, range: std::ops::Range<u64>) -> Result<Bytes, SourceError>;

    /// All bytes from `offset` to the end, resuming where the connection broke.
    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError>;

    /// Size and identity. One request at most, remembered.
    async fn stat(&self) -> Result<BlobStat, SourceError>;

    /// What it is, for messages: a URL without secrets, or a path.
    fn describe(&self) -> String;

    /// Where it lies: sources of one place are slow, or out of reach, together. A registry's host, a bucket; by default the source alone.
    fn place(&self) -> String {
        self.describe()
    }
}

/// What is known of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobStat {
    /// Bytes.
    pub size: u64,
    /// Says which content it is, as strong as the place allows: a digest, an ETag, device+inode+size+mtime.
    pub identity: String,
}

/// Where a blob lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Location {
    /// A local file.
    File(PathBuf),
    /// An object; empty region or endpoint: the SDK's default.
    S3 { endpoint: String, region: String, bucket: String, key: String, path_style: bool },
    /// A blob of a repository, by digest. `registry` is a host, with port, with `http://` or `https://` where the archive says so.
    Registry { registry: String, repository: String, digest: Digest },
    /// An archive that was pushed to a registry: the one layer of an artifact's manifest. `registry` is a host, with port.
    Artifact { registry: String, repository: String, reference: ArtifactRef },
    /// A blob of an OCI layout directory.
    Layout { dir: PathBuf, digest: Digest },
}

impl Location {
    /// Reads `path`, `file://path`, `s3://bucket/key[?endpoint=URL&region=R&path-style=true]`, `oci://host/repository:tag` and
    /// `oci://host/repository@sha256:…`.
    ///
    /// A path is taken as it is, colons and all; only a leading `file://` or `s3://` means something. In `s3://` the key is
    /// percent-decoded; in `file://` nothing is.
    pub fn parse_archive(text: &str) -> Result<Self, SourceError> {
        let invalid = |detail: &str| SourceError::Invalid {
            what: format!("archive {:?}", text.chars().take(200).collect::<String>()),
            detail: format!("{detail}; write a path, file:///path, s3://bucket/key or oci://host/repository@sha256:…"),
        };
        if let Some(path) = text.strip_prefix("file://") {
            return match path.strip_prefix("localhost/").map(|p| format!("/{p}")).unwrap_or(path.to_owned()) {
                path if path.starts_with('/') => Ok(Self::File(path.into())),
                _ => Err(invalid("file:// needs an absolute path")),
            };
        }
        if text.starts_with("s3://") {
            return s3::parse_url(text).map_err(|e| invalid(&e));
        }
        if let Some(rest) = text.strip_prefix("oci://") {
            let Some((registry, repository, reference)) = registry::parse_oci(rest).map_err(|e| invalid(&e))? else {
                return Err(invalid("names a repository, not an archive in it"));
            };
            return Ok(Self::Artifact { registry, repository, reference });
        }
        match text.split_once("://") {
            _ if text.is_empty() => Err(invalid("is empty")),
            Some((scheme, _)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => {
                Err(invalid(&format!("{scheme}:// is not known")))
            }
            _ => Ok(Self::File(text.into())),
        }
    }
}

impl std::fmt::Display for Location {
    /// As [`Location::parse_archive`] reads it, where it can; never with a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::S3 { endpoint, region, bucket, key, path_style } => {
                f.write_str(&s3::format_url(endpoint, region, bucket, key, *path_style))
            }
            Self::Registry { registry, repository, digest } => write!(f, "{registry}/{repository}@{digest}"),
            Self::Artifact { registry, repository, reference } => write!(f, "oci://{registry}/{repository}{reference}"),
            Self::Layout { dir, digest } => write!(f, "oci:{}@{digest}", dir.display()),
        }
    }
}

/// Credentials that a volume (or a user) brings, beside those that the configuration holds.
#[derive(Clone, Default)]
pub struct Credentials {
    /// A docker config JSON (`auths`), of a secret or `~/.docker/config.json`.
    pub docker_config: Option<Arc<str>>,
    /// S3 access key, secret key, optional session token.
    pub s3: Option<Arc<S3Keys>>,
    /// Who brought them: SHA-256 over namespace and secret name and uid; `None`: nobody, anonymous.
    pub identity: Option<Digest>,
}

impl Credentials {
    /// Tells whether these are the ones that a place has accepted: SHA-256 over who brought them and the secrets themselves. A short password
    /// can be guessed from it, so it is kept where nobody else reads.
    pub(crate) fn fingerprint(&self) -> Digest {
        let s3 = self.s3.as_ref().map(|keys| (&keys.access_key, &keys.secret_key, &keys.session_token));
        Digest::of(
            serde_json::json!([self.identity.map(|who| who.hex()), self.docker_config, s3]).to_string().as_bytes(),
        )
    }
}

impl Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Keys for S3. Never printed.
#[derive(Clone)]
#[allow(missing_docs)]
pub struct S3Keys {
    pub access_key: String,
    pub secret_key: String,
    pub session_token: Option<String>,
}

impl Debug for S3Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Keys").finish_non_exhaustive()
    }
}

/// Makes sources. Cheap to clone: clones share connections, tokens and what was learnt.
#[derive(Clone, Debug)]
pub struct Sources {
    trusted: bool,
    roots: Roots,
    registry: registry::Registries,
    s3: s3::Stores,
}

impl Sources {
    /// `policy` decides what may be reached and with whose credentials. Touches neither files nor the network.
    pub fn new(policy: Policy) -> Result<Self, SourceError> {
        Self::with_retry(policy, RetryPolicy::default())
    }

    /// [`Sources::new`] with another patience than the default.
    pub fn with_retry(policy: Policy, retry: RetryPolicy) -> Result<Self, SourceError> {
        policy.config.validate()?;
        let config = Arc::new(policy.config);
        let roots = if policy.trusted { Roots::any() } else { Roots::below(&config.archive_roots) };
        let registry = registry::Registries::new(policy.trusted, config.clone(), retry.clone());
        let s3 = s3::Stores::new(policy.trusted, config, retry);
        Ok(Self { trusted: policy.trusted, roots, registry, s3 })
    }

    /// The same configuration, for places that the configuration itself names (the archive store, the node's own archives):
    /// never for a location that came out of an archive or a volume attribute.
    pub fn trusted(&self) -> Self {
        Self { trusted: true, roots: Roots::any(), registry: self.registry.trusted(), s3: self.s3.trusted() }
    }

    /// A source for one blob. Checks the policy first; touches the network only as far as credentials need.
    pub async fn open(
        &self,
        location: &Location,
        credentials: &Credentials,
    ) -> Result<Arc<dyn BlobSource>, SourceError> {
        match location {
            Location::File(path) => {
                let (path, roots) = (path.clone(), self.roots.clone());
                let file = local::blocking("open", move || LocalFile::open_in(&path, &roots)).await?;
                Ok(Arc::new(file))
            }
            Location::Layout { dir, digest } => Ok(Arc::new(Layout::dir(dir, &self.roots).blob(digest).await?)),
            Location::Registry { registry, repository, digest } => {
                self.registry.blob(registry, repository, digest, credentials).await
            }
            Location::Artifact { registry, repository, reference } => {
                let repository = self.repository(registry, repository, credentials).await?;
                Ok(repository.blob(&repository.artifact(reference).await?))
            }
            Location::S3 { .. } => self.s3.object(location, credentials).await,
        }
    }

    /// A repository of a registry, to look for archives in it, and (where these sources are trusted) to put some there.
    /// Checks the policy; asks the registry nothing yet.
    pub async fn repository(
        &self,
        registry: &str,
        repository: &str,
        credentials: &Credentials,
    ) -> Result<Repository, SourceError> {
        self.registry.repository(registry, repository, credentials).await
    }

    /// Who may share what is fetched from a location with these credentials; checks them on the way. For a registry's blob:
    /// [`Scope::Public`] if it can be had anonymously. Answers are remembered for five minutes.
    pub async fn scope(&self, location: &Location, credentials: &Credentials) -> Result<Scope, SourceError> {
        match location {
            Location::File(_) | Location::Layout { .. } => Ok(Scope::Public),
            Location::Registry { registry, repository, digest } => {
                self.registry.scope(registry, repository, digest, credentials).await
            }
            Location::Artifact { registry, repository, reference } => {
                self.registry.scope_of_artifact(registry, repository, reference, credentials).await
            }
            Location::S3 { .. } => self.s3.scope(location, credentials).await,
        }
    }

    /// Resolves an image reference to one manifest, with its config and layers. For registries: checks the credentials
    /// against the registry (the manifest is asked for), and finds out whether an anonymous pull would do ([`Scope`]).
    pub async fn resolve(
        &self,
        image: &ImageRef,
        platform: &Platform,
        credentials: &Credentials,
    ) -> Result<ResolvedImage, SourceError> {
        match image {
            ImageRef::Registry { .. } => self.registry.resolve(image, platform, credentials).await,
            ImageRef::Layout { dir, tag } => {
                Layout::dir(dir, &self.roots).resolve(image, tag.as_deref(), platform).await
            }
            ImageRef::LayoutArchive { file, tag } => {
                let layout = Layout::archive(file, &self.roots).await?;
                layout.resolve(image, tag.as_deref(), platform).await
            }
        }
    }

    /// Writes a local file to `dest` (S3: multipart where large, If-None-Match where `create_only`; file: temporary + rename).
    pub async fn put(
        &self,
        dest: &Location,
        file: &std::path::Path,
        create_only: bool,
        credentials: &Credentials,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), SourceError> {
        self.writable(dest)?;
        match dest {
            Location::File(path) => {
                let copy = || local::put(path, file, create_only, progress);
                // `progress` is borrowed, so the copy can't move to the blocking pool; the pool's other work moves away instead.
                match tokio::runtime::Handle::current().runtime_flavor() {
                    tokio::runtime::RuntimeFlavor::MultiThread => tokio::task::block_in_place(copy),
                    _ => copy(),
                }
            }
            Location::S3 { .. } => self.s3.put(dest, file, create_only, credentials, progress).await,
            _ => Err(not_a_place(dest)),
        }
    }

    /// Deletes an object or file; absent is fine.
    pub async fn delete(&self, location: &Location, credentials: &Credentials) -> Result<(), SourceError> {
        self.writable(location)?;
        match location {
            Location::File(path) => {
                let path = path.clone();
                local::blocking("delete", move || local::delete(&path)).await
            }
            Location::S3 { .. } => self.s3.delete(location, credentials).await,
            _ => Err(not_a_place(location)),
        }
    }

    /// Keys (S3) or paths (file) below a prefix; `location` names the prefix.
    pub async fn list(&self, prefix: &Location, credentials: &Credentials) -> Result<Vec<Location>, SourceError> {
        Ok(self.list_with_times(prefix, credentials).await?.into_iter().map(|(location, _)| location).collect())
    }

    /// [`Self::list`], with when each was last written, by the place's clock.
    pub async fn list_with_times(
        &self,
        prefix: &Location,
        credentials: &Credentials,
    ) -> Result<Vec<(Location, SystemTime)>, SourceError> {
        self.writable(prefix)?;
        match prefix {
            Location::File(path) => {
                let path = path.clone();
                let found = local::blocking("list", move || local::list(&path)).await?;
                Ok(found.into_iter().map(|(path, written)| (Location::File(path), written)).collect())
            }
            Location::S3 { .. } => self.s3.list(prefix, credentials).await,
            _ => Err(not_a_place(prefix)),
        }
    }

    /// When a file or an object was last written, by the place's clock; `None`: it is not there.
    pub async fn written(
        &self,
        location: &Location,
        credentials: &Credentials,
    ) -> Result<Option<SystemTime>, SourceError> {
        self.writable(location)?;
        match location {
            Location::File(path) => {
                let path = path.clone();
                local::blocking("stat", move || local::written(&path)).await
            }
            Location::S3 { .. } => {
                let listed = self.s3.list(location, credentials).await?;
                Ok(listed.into_iter().find(|(found, _)| found == location).map(|(_, written)| written))
            }
            _ => Err(not_a_place(location)),
        }
    }

    /// What volumes name is read, never written or listed.
    fn writable(&self, location: &Location) -> Result<(), SourceError> {
        if self.trusted {
            return Ok(());
        }
        let detail = "volumes may only read; configure imageService.archiveStore to keep archives in a shared place";
        Err(SourceError::Refused { what: location.to_string(), detail: detail.into() })
    }
}

fn not_a_place(location: &Location) -> SourceError {
    let detail = "archives can be kept in files and in S3; write a path or s3://bucket/key".into();
    SourceError::Invalid { what: location.to_string(), detail }
}

#[cfg(test)]
mod tests;
