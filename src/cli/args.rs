//! Arguments that several commands share: where archives and images are read from, and how they are opened.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::CliError;
use crate::cache::{Cache, CacheConfig};
use crate::config::Config;
use crate::fs::{Integrity, OpenOptions, Opened, RootView, open};
use crate::source::policy::RegistryEntry;
use crate::source::{BlobSource, Credentials, ImageRef, Location, Policy, Sources};

/// A docker config is some lines; a larger file is something else.
const MAX_DOCKER_CONFIG: u64 = 1 << 20;

/// Where images and archives are read from, and with whose credentials.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Source options")]
pub(super) struct SourceArgs {
    /// S3 endpoint, where it is not AWS and the URL does not say it
    #[arg(long, value_name = "URL")]
    s3_endpoint: Option<String>,
    /// S3 region, where the URL does not say it
    #[arg(long, value_name = "REGION")]
    s3_region: Option<String>,
    /// Address buckets as http://host/bucket/key
    #[arg(long)]
    s3_path_style: bool,
    /// Speak plain HTTP to this registry (localhost always is); may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    plain_http: Vec<String>,
    /// Registry credentials [default: $DOCKER_CONFIG/config.json, ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
    /// Configuration file whose `sources` section applies (mirrors, CA files)
    #[arg(long, value_name = "FILE", env = "CLIP_CSI_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
}

impl SourceArgs {
    /// Sources for the user's own files, network and credentials.
    pub(super) fn sources(&self) -> Result<Sources, CliError> {
        let mut config = match &self.config {
            Some(file) => {
                let config = Config::load(Some(file))?;
                config.validate()?;
                config.sources
            }
            None => Default::default(),
        };
        for host in &self.plain_http {
            let entry: &mut RegistryEntry = config.registries.entry(host.clone()).or_default();
            entry.plain_http = true;
        }
        Ok(Sources::new(Policy { trusted: true, config })?)
    }

    /// The user's registry credentials; S3 keys come from the SDK's chain.
    pub(super) fn credentials(&self) -> Result<Credentials, CliError> {
        let file = match &self.docker_config {
            Some(file) => Some(file.clone()),
            None => default_docker_config(),
        };
        let docker_config = file.map(|file| read_text(&file, MAX_DOCKER_CONFIG)).transpose()?.map(Arc::from);
        Ok(Credentials { docker_config, ..Default::default() })
    }

    /// The location that `text` names; for S3 completed by the flags.
    pub(super) fn location(&self, text: &str) -> Result<Location, CliError> {
        let mut location = Location::parse_archive(text)?;
        if let Location::S3 { endpoint, region, path_style, .. } = &mut location {
            let complete = |field: &mut String, flag: &Option<String>| {
                if let (true, Some(value)) = (field.is_empty(), flag) {
                    field.clone_from(value);
                }
            };
            complete(endpoint, &self.s3_endpoint);
            complete(region, &self.s3_region);
            *path_style |= self.s3_path_style;
        }
        Ok(location)
    }
}

fn default_docker_config() -> Option<PathBuf> {
    let dirs = [
        std::env::var_os("DOCKER_CONFIG").map(PathBuf::from),
        std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker")),
    ];
    dirs.into_iter().flatten().map(|dir| dir.join("config.json")).find(|file| file.is_file())
}

fn read_text(file: &Path, max: u64) -> Result<String, CliError> {
    let what = || format!("reading {}", file.display());
    let open = std::fs::File::open(file).map_err(|e| CliError::io(what(), &e))?;
    let mut text = String::new();
    open.take(max + 1).read_to_string(&mut text).map_err(|e| CliError::io(what(), &e))?;
    if text.len() as u64 > max {
        return Err(CliError::Usage(format!("{} is larger than {max} bytes: no docker config", file.display())));
    }
    Ok(text)
}

/// Parses an image reference.
pub(super) fn image(text: &str) -> Result<ImageRef, String> {
    text.parse().map_err(|e: crate::source::SourceError| e.to_string())
}

fn root_view(text: &str) -> Result<RootView, String> {
    match text {
        "auto" => Ok(RootView::Auto),
        "bundle" => Ok(RootView::Bundle),
        "archive" => Ok(RootView::Archive),
        _ => Err("write auto, bundle or archive".into()),
    }
}

fn integrity(text: &str) -> Result<Integrity, String> {
    match text {
        "digest" => Ok(Integrity::Digest),
        "strict" => Ok(Integrity::Strict),
        _ => Err("write digest or strict".into()),
    }
}

/// An archive, and how it is opened.
#[derive(Debug, Clone, Args)]
pub(super) struct OpenArgs {
    /// The archive: a path, file://PATH, s3://bucket/key or oci://registry/repository@sha256:…
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: String,
    /// What is shown as the root: `bundle` is /rootfs of an OCI bundle, `archive` all of it, `auto` chooses
    #[arg(long, value_name = "VIEW", default_value = "auto", value_parser = root_view)]
    root: RootView,
    /// `strict` refuses bytes that no digest covers
    #[arg(long, value_name = "MODE", default_value = "digest", value_parser = integrity)]
    integrity: Integrity,
    /// Keep what is fetched here [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) sources: SourceArgs,
}

/// An opened archive with what keeps it open.
#[derive(Debug)]
pub(super) struct OpenArchive {
    pub(super) opened: Opened,
    pub(super) source: Arc<dyn BlobSource>,
    pub(super) sources: Sources,
    pub(super) credentials: Credentials,
    _temporary: Option<tempfile::TempDir>,
}

impl OpenArgs {
    /// Fetches header, index and storage info; no file data.
    pub(super) async fn open(&self) -> Result<OpenArchive, CliError> {
        let sources = self.sources.sources()?;
        let credentials = self.sources.credentials()?;
        let source = sources.open(&self.sources.location(&self.archive)?, &credentials).await?;
        let temporary = match self.cache_dir {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new()
                    .prefix("clip-csi-")
                    .tempdir()
                    .map_err(|e| CliError::io("making a temporary directory", &e))?,
            ),
        };
        let dir = match (&self.cache_dir, &temporary) {
            (Some(dir), _) => std::path::absolute(dir).map_err(|e| CliError::io(dir.display().to_string(), &e))?,
            (None, Some(temporary)) => temporary.path().to_owned(),
            (None, None) => return Err(CliError::Failed("no cache directory".into())),
        };
        let cache = Cache::open(&CacheConfig { dir, ..Default::default() })?;
        let options = OpenOptions {
            root: self.root,
            integrity: self.integrity,
            credentials: credentials.clone(),
            scope: "public".into(),
        };
        let opened = open(source.clone(), &sources, &cache, &options).await?;
        Ok(OpenArchive { opened, source, sources, credentials, _temporary: temporary })
    }
}
