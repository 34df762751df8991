//! The configuration: each module's own section, composed; read from a file, the environment and flags, then validated.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::archive::Version;
use crate::build::provider::ImageServiceConfig;
use crate::build::store::ArchiveStore;
use crate::cache::CacheConfig;
use crate::csi::{CsiConfig, CsiError};
use crate::k8s::{KubeConfig, KubeError};
use crate::mount::MountConfig;
use crate::source::SourceError;
use crate::source::policy::SourceConfig;
use crate::telemetry::{self, TelemetryConfig};

/// The smallest cache: below it, a node would evict what it is about to read.
const MIN_CACHE_BYTES: u64 = 64 << 20;
const MIN_FILL_BYTES: u64 = 16 << 20;
/// The smallest archive directory: the index of one large image must fit.
const MIN_ARCHIVE_BYTES: u64 = 64 << 20;
/// Layers at a time that make sense; beyond, each CPU would hold dozens of half-read layers.
const INDEX_CONCURRENCY_MAX: usize = 256;
/// Distances in MiB of the checkpoints for the Go module.
const CHECKPOINT_MIB: std::ops::RangeInclusive<u64> = 1..=1024;

/// All of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// What is built from images, and where archives are kept.
    pub image_service: ImageServiceConfig,
    /// What may be reached, and with whose credentials.
    pub sources: SourceConfig,
    /// The node's cache of verified bytes.
    pub cache: CacheConfig,
    /// Where mounts and their records lie.
    pub mounts: MountConfig,
    /// The CSI services.
    pub csi: CsiConfig,
    /// The Kubernetes API.
    pub k8s: KubeConfig,
    /// Logs and the HTTP endpoint.
    pub telemetry: TelemetryConfig,
}

/// Why a configuration can't be used. Each names the key (or variable), the value and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file can't be read.
    #[error("config file {path}: {source}; give an existing file with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// The file can't be understood.
    #[error("config file {path}: {key}: {detail}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The key's path, like `imageService.clipVersion`; `.` for the file as a whole.
        key: String,
        /// The parser's words, with line and column.
        detail: String,
    },
    /// A value that can't work.
    #[error("{key} is {value}: {remedy}")]
    Invalid {
        /// The key's path, or the variable and the key that it sets.
        key: String,
        /// The value as given.
        value: String,
        /// What would be accepted.
        remedy: String,
    },
    /// A value of the `csi` section.
    #[error(transparent)]
    Csi(#[from] CsiError),
    /// A value of the `k8s` section.
    #[error(transparent)]
    Kubernetes(#[from] KubeError),
    /// A value of the `sources` section.
    #[error(transparent)]
    Sources(#[from] SourceError),
}

/// An environment variable that overrides a key of the file. An empty one counts as unset.
#[derive(Debug, Clone, Copy)]
pub struct EnvOverride {
    /// The variable.
    pub name: &'static str,
    /// The key that it sets.
    pub key: &'static str,
    set: fn(&mut Config, &str) -> Result<(), &'static str>,
}

/// Every variable that is read, in the order of the sections.
pub const ENVIRONMENT: &[EnvOverride] = &[
    EnvOverride {
        name: "B9_CLIP_VERSION",
        key: "imageService.clipVersion",
        set: |c, v| {
            v.parse().map(|n| c.image_service.clip_version = Some(n)).map_err(|_| "write 0 or 1 for v1, 2 for v2")
        },
    },
    EnvOverride {
        name: "CLIP_CSI_ARCHIVE_DIR",
        key: "imageService.archiveDir",
        set: |c, v| {
            c.image_service.archive_dir = v.into();
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_ARCHIVE_STORE",
        key: "imageService.archiveStore",
        set: |c, v| {
            c.image_service.archive_store = Some(v.into());
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_CACHE_DIR",
        key: "cache.dir",
        set: |c, v| {
            c.cache.dir = v.into();
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_CACHE_MAX_BYTES",
        key: "cache.maxBytes",
        set: |c, v| v.parse().map(|n| c.cache.max_bytes = n).map_err(|_| "write a number of bytes"),
    },
    EnvOverride {
        name: "CLIP_CSI_DRIVER_NAME",
        key: "csi.driverName",
        set: |c, v| {
            c.csi.driver_name = v.into();
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_KUBELET_DIR",
        key: "csi.kubeletDir",
        set: |c, v| {
            c.csi.kubelet_dir = v.into();
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_ENDPOINT",
        key: "csi.endpoint",
        set: |c, v| {
            c.csi.endpoint = Some(v.into());
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_NODE_ID",
        key: "csi.nodeId",
        set: |c, v| {
            c.csi.node_id = Some(v.into());
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_K8S_ENABLED",
        key: "k8s.enabled",
        set: |c, v| v.parse().map(|enabled| c.k8s.enabled = enabled),
    },
    EnvOverride {
        name: "CLIP_CSI_KUBECONFIG",
        key: "k8s.kubeconfig",
        set: |c, v| {
            c.k8s.kubeconfig = Some(v.into());
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_LOG_LEVEL",
        key: "telemetry.logLevel",
        set: |c, v| {
            c.telemetry.log_level = v.into();
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_LOG_FORMAT",
        key: "telemetry.logFormat",
        set: |c, v| {
            c.telemetry.log_format = match v {
                "text" => telemetry::LogFormat::Text,
                "json" => telemetry::LogFormat::Json,
                _ => return Err("write text or json"),
            };
            Ok(())
        },
    },
    EnvOverride {
        name: "CLIP_CSI_HTTP_LISTEN",
        key: "telemetry.httpListen",
        set: |c, v| {
            c.telemetry.http_listen = v.into();
            Ok(())
        },
    },
];

impl Config {
    /// The file (defaults where there is none), then the environment. Flags and [`Config::validate`] are the caller's.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = file.map_or_else(|| Ok(Self::default()), Self::read)?;
        config.apply_environment(|name| std::env::var(name).ok())?;
        Ok(config)
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Reads YAML; `path` is named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        // A file of comments only holds no document; it means the defaults.
        if text.lines().all(|line| matches!(line.trim(), "" | "---") || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        serde_path_to_error::deserialize(serde_yaml_ng::Deserializer::from_str(text)).map_err(|error| {
            let key = error.path().to_string();
            let detail = error.into_inner().to_string();
            // Some of the parser's messages begin with the path already.
            let detail = detail.strip_prefix(&format!("{key}: ")).unwrap_or(&detail).to_owned();
            ConfigError::Parse { path: path.into(), key, detail }
        })
    }

    /// Applies [`ENVIRONMENT`]; `get` gives a variable's value.
    pub fn apply_environment(&mut self, get: impl Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        for var in ENVIRONMENT {
            let Some(value) = get(var.name).filter(|v| !v.is_empty()) else { continue };
            (var.set)(self, value.trim()).map_err(|remedy| ConfigError::Invalid {
                key: format!("{} (environment, sets {})", var.name, var.key),
                value: format!("{value:?}"),
                remedy: remedy.into(),
            })?;
        }
        Ok(())
    }

    /// What is built where a volume does not say: [`ImageServiceConfig::clip_version`] 2 is v2, all else v1.
    pub fn build_version(&self) -> Version {
        if self.image_service.clip_version == Some(2) { Version::V2 } else { Version::V1 }
    }

    /// Shared mounts lie below the driver's own directory: where `mounts.mountsDir` is left at its default, it follows
    /// `csi.kubeletDir` and `csi.driverName`.
    pub fn follow_kubelet_dir(&mut self) {
        if self.mounts.mounts_dir == MountConfig::default().mounts_dir {
            self.mounts.mounts_dir = self.csi.plugin_dir().join("mounts");
        }
    }

    /// Checks every value. The first one that can't work is the error.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_images()?;
        self.sources.validate()?;
        self.validate_cache()?;
        absolute("mounts.mountsDir", &self.mounts.mounts_dir)?;
        absolute("mounts.stateDir", &self.mounts.state_dir)?;
        self.csi.validate()?;
        self.k8s.validate()?;
        self.validate_telemetry()
    }

    fn validate_images(&self) -> Result<(), ConfigError> {
        let images = &self.image_service;
        if let Some(version) = images.clip_version.filter(|v| *v > 2) {
            return invalid("imageService.clipVersion", version, "write 0 or 1 for v1, 2 for v2");
        }
        absolute("imageService.archiveDir", &images.archive_dir)?;
        if images.archive_max_bytes < MIN_ARCHIVE_BYTES {
            return invalid(
                "imageService.archiveMaxBytes",
                images.archive_max_bytes,
                "write at least 67108864 (64 MiB)",
            );
        }
        if let Some(store) = &images.archive_store {
            let good = match Url::parse(store) {
                Ok(url) if url.scheme() == "s3" => url.host_str().is_some_and(|bucket| !bucket.is_empty()),
                Ok(url) if url.scheme() == "file" => url.to_file_path().is_ok(),
                _ => ArchiveStore::check(store).is_ok(),
            };
            if !good {
                let remedy = "write s3://bucket/prefix, file:///directory, oci://host/repository or referrer";
                return invalid("imageService.archiveStore", store, remedy);
            }
        }
        if !crate::build::is_span_kib(images.span_kib) {
            return invalid("imageService.spanKib", images.span_kib, "write a multiple of 64 from 64 to 16384");
        }
        if images.index_concurrency > INDEX_CONCURRENCY_MAX {
            let remedy = "write a number from 1 to 256, or 0 for one layer per CPU";
            return invalid("imageService.indexConcurrency", images.index_concurrency as u64, remedy);
        }
        if !CHECKPOINT_MIB.contains(&images.checkpoint_mib) {
            return invalid("imageService.checkpointMib", images.checkpoint_mib, "write a number from 1 to 1024");
        }
        Ok(())
    }

    fn validate_cache(&self) -> Result<(), ConfigError> {
        let cache = &self.cache;
        absolute("cache.dir", &cache.dir)?;
        if cache.max_bytes < MIN_CACHE_BYTES {
            return invalid("cache.maxBytes", cache.max_bytes, "write at least 67108864 (64 MiB)");
        }
        if cache.fill_bytes < MIN_FILL_BYTES {
            return invalid("cache.fillBytes", cache.fill_bytes, "write at least 16777216 (16 MiB)");
        }
        if !(1..=100).contains(&cache.high_watermark) {
            return invalid("cache.highWatermark", cache.high_watermark, "write a percentage from 1 to 100");
        }
        if cache.low_watermark >= cache.high_watermark {
            let remedy = format!("write a percentage below cache.highWatermark, which is {}", cache.high_watermark);
            return invalid("cache.lowWatermark", cache.low_watermark, remedy);
        }
        Ok(())
    }

    fn validate_telemetry(&self) -> Result<(), ConfigError> {
        let telemetry = &self.telemetry;
        if telemetry::filter(&telemetry.log_level).is_err() {
            let remedy = "write a level (error, warn, info, debug, trace) or target=level,…";
            return invalid("telemetry.logLevel", format!("{:?}", telemetry.log_level), remedy);
        }
        self.http_listen().map(|_| ())
    }

    /// Where the HTTP endpoint listens; `None`: nowhere.
    pub fn http_listen(&self) -> Result<Option<std::net::SocketAddr>, ConfigError> {
        let text = &self.telemetry.http_listen;
        if text.is_empty() {
            return Ok(None);
        }
        match text.parse() {
            Ok(addr) => Ok(Some(addr)),
            Err(_) => invalid(
                "telemetry.httpListen",
                format!("{text:?}"),
                "write an address and a port, like 0.0.0.0:9810, or nothing to turn it off",
            ),
        }
    }
}

fn invalid<T>(key: &str, value: impl ToString, remedy: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid { key: key.into(), value: value.to_string(), remedy: remedy.into() })
}

fn absolute(key: &str, path: &Path) -> Result<(), ConfigError> {
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain {
        return Ok(());
    }
    invalid(key, format!("{:?}", path.display().to_string()), "write an absolute path without . and ..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/clip-csi/config.yaml"))
    }

    #[test]
    fn an_empty_file_means_the_defaults_and_they_are_valid() {
        for text in ["", "# nothing\n---\n\n", "{}"] {
            let config = parse(text).unwrap();
            config.validate().unwrap();
            assert_eq!(config.build_version(), Version::V1, "unset means v1");
        }
    }

    #[test]
    fn clip_version_0_and_1_are_v1_and_2_is_v2() {
        for (text, version) in [("0", Version::V1), ("1", Version::V1), ("2", Version::V2)] {
            let config = parse(&format!("imageService: {{ clipVersion: {text} }}")).unwrap();
            config.validate().unwrap();
            assert_eq!(config.build_version(), version, "clipVersion {text}");
        }
    }

    #[test]
    fn the_environment_overrides_the_file_and_an_empty_variable_does_not() {
        let mut config = parse("imageService: { clipVersion: 1 }").unwrap();
        config.apply_environment(|name| (name == "B9_CLIP_VERSION").then(|| "2".into())).unwrap();
        assert_eq!(config.build_version(), Version::V2);
        config.apply_environment(|name| (name == "B9_CLIP_VERSION").then(String::new)).unwrap();
        assert_eq!(config.build_version(), Version::V2, "empty is unset");
        let error = config.apply_environment(|name| (name == "B9_CLIP_VERSION").then(|| "v2".into())).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("B9_CLIP_VERSION") && error.contains("imageService.clipVersion"), "{error}");
        assert!(error.contains("\"v2\"") && error.contains("2 for v2"), "{error}");
    }

    #[test]
    fn every_variable_sets_the_key_it_names() {
        for var in ENVIRONMENT {
            let value = match var.key {
                "imageService.clipVersion" => "2",
                "cache.maxBytes" => "99000000",
                "telemetry.logFormat" => "text",
                "telemetry.logLevel" => "debug",
                "telemetry.httpListen" => "127.0.0.1:1",
                "imageService.archiveStore" => "s3://b/p",
                "csi.driverName" => "other.example",
                "csi.endpoint" => "unix:///csi.sock",
                "csi.nodeId" => "node-1",
                "k8s.enabled" => "false",
                _ => "/elsewhere",
            };
            let mut config = Config::default();
            config.apply_environment(|name| (name == var.name).then(|| value.into())).unwrap();
            config.validate().unwrap();
            let yaml = serde_json::to_value(&config).unwrap();
            let pointer = format!("/{}", var.key.replace('.', "/"));
            let set = yaml.pointer(&pointer).unwrap_or_else(|| panic!("no key {}", var.key));
            assert_eq!(set.to_string().trim_matches('"'), value, "{}", var.name);
        }
    }

    #[test]
    fn a_file_that_does_not_parse_names_itself_the_key_and_the_line() {
        for (text, key) in [
            ("imageService:\n  clipVersion: two\n", "imageService.clipVersion"),
            ("cache:\n  maxBites: 1\n", "cache.maxBites"),
            ("sources:\n  s3:\n  - bucket: b\n    pathStyle: perhaps\n", "sources.s3[0].pathStyle"),
            ("telemetry:\n  logFormat: xml\n", "telemetry.logFormat"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("config file /etc/clip-csi/config.yaml: {key}: ")), "{error}");
            assert!(error.contains("line "), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn every_invalid_value_is_named_with_its_key_and_a_remedy() {
        for (text, key, value) in [
            ("imageService: { clipVersion: 3 }", "imageService.clipVersion", "3"),
            ("imageService: { archiveDir: archives }", "imageService.archiveDir", "archives"),
            ("imageService: { archiveMaxBytes: 5 }", "imageService.archiveMaxBytes", "5"),
            ("imageService: { archiveStore: 'https://x/y' }", "imageService.archiveStore", "https://x/y"),
            ("imageService: { archiveStore: 's3:///y' }", "imageService.archiveStore", "s3:///y"),
            ("imageService: { spanKib: 1000 }", "imageService.spanKib", "1000"),
            ("imageService: { spanKib: 32 }", "imageService.spanKib", "32"),
            ("imageService: { checkpointMib: 0 }", "imageService.checkpointMib", "0"),
            ("imageService: { indexConcurrency: 300 }", "imageService.indexConcurrency", "300"),
            ("cache: { dir: /a/../b }", "cache.dir", "/a/../b"),
            ("cache: { maxBytes: 1000 }", "cache.maxBytes", "1000"),
            ("cache: { fillBytes: 1048576 }", "cache.fillBytes", "1048576"),
            ("cache: { highWatermark: 101 }", "cache.highWatermark", "101"),
            ("cache: { lowWatermark: 90 }", "cache.lowWatermark", "90"),
            ("mounts: { mountsDir: x }", "mounts.mountsDir", "x"),
            ("mounts: { stateDir: x }", "mounts.stateDir", "x"),
            ("telemetry: { logLevel: 'clip_csi=loud' }", "telemetry.logLevel", "clip_csi=loud"),
            ("telemetry: { httpListen: ':9810' }", "telemetry.httpListen", ":9810"),
        ] {
            let error = parse(text).unwrap().validate().unwrap_err().to_string();
            assert!(error.starts_with(key) && error.contains(value), "{text}: {error}");
            assert!(error.contains(": write "), "a remedy: {error}");
        }
    }

    #[test]
    fn sections_that_check_themselves_name_their_keys_too() {
        for (text, key, remedy) in [
            ("csi: { endpoint: 'tcp://x' }", "csi.endpoint", "unix:///"),
            ("k8s: { namespace: 'a/b' }", "k8s.namespace", "write its name"),
            ("sources: { archiveRoots: [/a, ../b] }", "sources.archiveRoots[1]", "absolute path"),
            ("sources: { s3: [ { endpoint: 'http://x' } ] }", "sources.s3[0].bucket", "name the bucket"),
            ("sources: { s3: [ { bucket: b, endpoint: x.example } ] }", "sources.s3[0].endpoint", "https://"),
            (
                "sources: { registries: { 'https://r.example': {} } }",
                "sources.registries.https://r.example",
                "host:port",
            ),
        ] {
            let error = parse(text).unwrap().validate().unwrap_err().to_string();
            assert!(error.starts_with(key) && error.contains(remedy), "{text}: {error}");
        }
    }

    #[test]
    fn shared_mounts_follow_the_kubelet_directory_unless_they_are_placed() {
        let mut config = parse("csi: { kubeletDir: /k, driverName: d.example }").unwrap();
        config.follow_kubelet_dir();
        assert_eq!(config.mounts.mounts_dir, Path::new("/k/plugins/d.example/mounts"));
        let mut config = parse("{ csi: { kubeletDir: /k }, mounts: { mountsDir: /m } }").unwrap();
        config.follow_kubelet_dir();
        assert_eq!(config.mounts.mounts_dir, Path::new("/m"));
    }

    #[test]
    fn the_example_file_is_valid_and_builds_v2() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/config.example.yaml");
        let config = Config::read(&path).unwrap();
        config.validate().unwrap();
        assert_eq!(config.build_version(), Version::V2);
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains("\n  clipVersion: 2"), "in plain sight");
    }

    #[test]
    fn every_key_and_variable_is_documented() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
        let docs = std::fs::read_to_string(docs).unwrap();
        for var in ENVIRONMENT {
            let row = format!("| `{}` | `{}`", var.name, var.key);
            assert!(docs.contains(&row), "docs/configuration.md does not say {row}");
        }
        let value = serde_json::to_value(Config::default()).unwrap();
        for (section, keys) in value.as_object().unwrap() {
            for key in keys.as_object().unwrap().keys() {
                let name = format!("`{section}.{key}`");
                assert!(docs.contains(&name), "docs/configuration.md does not name {name}");
            }
        }
    }
}
