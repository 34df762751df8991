//! What may be reached from where, and with whose credentials.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::SourceError;

/// The `sources` section of the configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct SourceConfig {
    /// Directories below which `file://` archives and OCI layouts may be used by volumes. Absolute. Default: none.
    pub archive_roots: Vec<PathBuf>,
    /// S3 places that the node's own credentials serve.
    pub s3: Vec<S3Entry>,
    /// Per registry host (`host` or `host:port`; `index.docker.io` is Docker Hub): plain HTTP, CA, mirrors, credentials.
    pub registries: BTreeMap<String, RegistryEntry>,
}

/// One place in S3 that the node's own credentials may be used for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct S3Entry {
    /// Endpoint URL; empty: AWS.
    pub endpoint: String,
    /// Bucket.
    pub bucket: String,
    /// Key prefix, in whole path components: `images` serves `images/a.clip`, not `images-2/a.clip`. Empty: all of the bucket.
    pub prefix: String,
    /// Region; empty: the SDK's default.
    pub region: String,
    /// `https://host/bucket/key` instead of `https://bucket.host/key`.
    pub path_style: bool,
}

/// How one registry is spoken to. A registry that has an entry may lie on a loopback address; link-local and metadata
/// addresses are refused to volumes all the same.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct RegistryEntry {
    /// Speak plain HTTP.
    pub plain_http: bool,
    /// PEM file with CA certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Hosts (`host` or `host:port`) to ask first, in order. Each may have an entry of its own.
    pub mirrors: Vec<String>,
    /// A docker config JSON with credentials for this registry. They serve *every* volume of the node that brings none of its own.
    pub docker_config: Option<PathBuf>,
    /// Further hosts that may be given this registry's credentials in exchange for a token. The registry's own host, its
    /// parent domain's hosts and the token services of Docker Hub and Red Hat need no entry.
    pub token_hosts: Vec<String>,
}

/// Where a request comes from, and the configuration.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// True at the shell: the user's own files, credentials and network.
    pub trusted: bool,
    /// The configuration.
    pub config: SourceConfig,
}

impl SourceConfig {
    /// Checks what can be checked without touching a file or the network. The error names the key.
    pub fn validate(&self) -> Result<(), SourceError> {
        let bad = |key: String, detail: &str| Err(SourceError::Invalid { what: key, detail: detail.into() });
        for (i, root) in self.archive_roots.iter().enumerate() {
            if !is_plain_absolute(root) {
                return bad(format!("sources.archiveRoots[{i}]"), "write an absolute path without `..`");
            }
        }
        for (i, entry) in self.s3.iter().enumerate() {
            if entry.bucket.is_empty() {
                return bad(format!("sources.s3[{i}].bucket"), "is empty; name the bucket");
            }
            if !entry.endpoint.is_empty() && normal_endpoint(&entry.endpoint).is_none() {
                return bad(format!("sources.s3[{i}].endpoint"), "write a URL like https://host:port");
            }
        }
        for (host, entry) in &self.registries {
            for name in std::iter::once(host).chain(&entry.mirrors).chain(&entry.token_hosts) {
                if name.is_empty() || name.contains('/') {
                    return bad(format!("sources.registries.{host}"), "write hosts as `host` or `host:port`");
                }
            }
        }
        Ok(())
    }
}

/// An absolute path whose components are all names.
pub(super) fn is_plain_absolute(path: &Path) -> bool {
    use std::path::Component;
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir) && parts.all(|c| matches!(c, Component::Normal(_)))
}

/// `scheme://host:port` of an endpoint with the port spelt out, so that two spellings of one place are equal.
pub(super) fn normal_endpoint(endpoint: &str) -> Option<String> {
    let url = url::Url::parse(endpoint).ok()?;
    let host = url.host_str()?;
    if !matches!(url.scheme(), "http" | "https") || !url.username().is_empty() || url.password().is_some() {
        return None;
    }
    let path = url.path().trim_end_matches('/');
    Some(format!("{}://{host}:{}{path}", url.scheme(), url.port_or_known_default()?))
}

impl S3Entry {
    /// Whether the node's credentials serve this object.
    pub(super) fn serves(&self, endpoint: &str, bucket: &str, key: &str) -> bool {
        let same_place = match (self.endpoint.is_empty(), endpoint.is_empty()) {
            (true, true) => true,
            (false, false) => normal_endpoint(&self.endpoint).is_some_and(|e| Some(e) == normal_endpoint(endpoint)),
            _ => false,
        };
        let prefix = self.prefix.trim_end_matches('/');
        let below = prefix.is_empty() || key.strip_prefix(prefix).is_some_and(|r| r.is_empty() || r.starts_with('/'));
        same_place && self.bucket == bucket && below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_serves_whole_components_only() {
        let entry = S3Entry { bucket: "b".into(), prefix: "images/".into(), ..Default::default() };
        assert!(entry.serves("", "b", "images/a.clip"));
        assert!(!entry.serves("", "b", "images-2/a.clip"));
        assert!(!entry.serves("", "c", "images/a.clip"));
        assert!(!entry.serves("https://elsewhere", "b", "images/a.clip"));
    }

    #[test]
    fn endpoints_are_compared_as_places_not_as_text() {
        let entry = S3Entry { endpoint: "https://S3.example:443/".into(), bucket: "b".into(), ..Default::default() };
        assert!(entry.serves("https://s3.example", "b", "k"));
        assert!(!entry.serves("http://s3.example", "b", "k"));
        assert!(!entry.serves("https://s3.example:444", "b", "k"));
        assert!(!entry.serves("", "b", "k"));
    }

    #[test]
    fn validation_names_the_key() {
        let config = SourceConfig { archive_roots: vec!["/srv/../etc".into()], ..Default::default() };
        assert!(config.validate().unwrap_err().to_string().contains("sources.archiveRoots[0]"));
        let config = SourceConfig { s3: vec![S3Entry::default()], ..Default::default() };
        assert!(config.validate().unwrap_err().to_string().contains("sources.s3[0].bucket"));
    }
}
