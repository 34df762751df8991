//! From an image to an archive that this node can mount: the node's own archives, the archive store, else a build.
//!
//! Whoever asks is checked against the registry first: a private image that another pod brought to the node is not
//! shown to one whose credentials the registry refuses. Builds belong to the process, not to the caller: a caller
//! that gives up loses nothing, the next one joins the same build.

mod progress;
mod referrer;
mod refs;
mod size;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::future::{BoxFuture, FutureExt, Shared};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::store::ArchiveStore;
use super::{Artifacts, BuildError, BuildOptions, DEFAULT_SPAN_KIB, Indexing, archive_image, index_image};
use crate::archive::Version;
use crate::memory;
use crate::metrics::metrics;
use crate::source::{Credentials, ImageRef, Location, ResolvedImage, Scope, SourceError, Sources};
use crate::units::{Digest, Platform};
use progress::BuildProgress;
use refs::{RefRecord, RefRecords};

/// The `imageService` section of the configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ImageServiceConfig {
    /// What is *built*: 0 or 1 = v1, 2 = v2 (index-only). Unset: v1. `B9_CLIP_VERSION` overrides it.
    pub clip_version: Option<u32>,
    /// Where archives that are built or fetched on this node lie. Default `/var/lib/clip-csi/archives`.
    pub archive_dir: PathBuf,
    /// Limit in bytes of `archive_dir`; the least recently used archives that no mount needs go first. Default 20 GiB.
    pub archive_max_bytes: u64,
    /// A store shared by nodes and controller: `file:///dir`, `s3://bucket/prefix[?endpoint=…]`, `oci://host/repository`, or
    /// `referrer` (beside each image). Default: none.
    pub archive_store: Option<String>,
    /// Uncompressed bytes per span, in KiB. Default [`DEFAULT_SPAN_KIB`].
    pub span_kib: u64,
    /// Distance in MiB of the checkpoints that the Go module reads. Default 2.
    pub checkpoint_mib: u64,
    /// Layers that are streamed at a time, over all builds: what bounds their memory. Default 0: one per CPU.
    pub index_concurrency: usize,
    /// Limit in bytes of what is kept of each indexed layer, in `archive_dir`/layers. 0: nothing is kept. Default 1 GiB.
    pub layer_cache_max_bytes: u64,
    /// Index layers that carry a table of contents (eStargz, zstd:chunked) by that alone. Default true.
    pub tables_of_contents: bool,
    /// Look for an index beside an image (a referrer in its repository) before one is built. Default true.
    pub referrers: bool,
    /// Hours for which an archive stays in the store that no volume names; 0: it is never removed. Default 24.
    pub archive_grace_hours: u64,
}

impl Default for ImageServiceConfig {
    fn default() -> Self {
        Self {
            clip_version: None,
            archive_dir: "/var/lib/clip-csi/archives".into(),
            archive_max_bytes: 20 << 30,
            archive_store: None,
            span_kib: DEFAULT_SPAN_KIB,
            checkpoint_mib: 2,
            index_concurrency: 0,
            layer_cache_max_bytes: 1 << 30,
            tables_of_contents: true,
            referrers: true,
            archive_grace_hours: 24,
        }
    }
}

/// Whether the registry is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum PullPolicy {
    /// Resolve the reference at the registry on every publish.
    Always,
    /// Use the node's archive of that reference where there is one; credentials are checked all the same.
    #[default]
    IfNotPresent,
    /// Never ask the registry: only what the node has, for those whose credentials it has seen accepted.
    Never,
}

/// What to provide.
#[derive(Debug, Clone)]
pub struct Request {
    /// The image.
    pub image: ImageRef,
    /// The platform.
    pub platform: Platform,
    /// What to build if nothing is found: the volume attribute, already merged with environment and file.
    pub version: Version,
    /// Pull policy.
    pub pull_policy: PullPolicy,
    /// Who asks.
    pub credentials: Credentials,
}

/// An archive that this node can mount.
#[derive(Debug, Clone)]
pub struct Provided {
    /// Where it lies: a file of this node, or (a v1 archive of the store, which is read by range) an object of the store.
    pub location: Location,
    /// Keeps a file of this node while it is held; `None` for an archive of the store.
    pub pin: Option<Arc<Pin>>,
    /// The image's manifest.
    pub manifest_digest: Digest,
    /// Who may share what is fetched through it.
    pub scope: Scope,
    /// Where it came from: "node", "store", "referrer", "built".
    pub from: &'static str,
}

/// Keeps an archive file on the node while it is held.
#[derive(Debug)]
pub struct Pin {
    path: PathBuf,
}

impl Pin {
    /// The file that is kept.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Provides archives of images; one per process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Provider {
    inner: Arc<Inner>,
}

/// What a job makes: the location, the file to pin if it is one of this node, where it came from.
#[derive(Debug, Clone)]
struct Made {
    location: Location,
    file: Option<PathBuf>,
    from: &'static str,
}

/// Of [`Provided::from`]: this process built it.
const BUILT: &str = "built";

type Job = Shared<BoxFuture<'static, Result<Made, Arc<BuildError>>>>;

#[derive(Debug)]
struct Inner {
    config: ImageServiceConfig,
    sources: Sources,
    store: Option<ArchiveStore>,
    refs: RefRecords,
    indexing: Arc<Indexing>,
    referrers: referrer::Misses,
    jobs: Mutex<HashMap<String, (Job, Arc<BuildProgress>)>>,
    pins: Mutex<HashMap<PathBuf, Weak<Pin>>>,
}

/// Both versions, the wanted one first: `clipVersion` says what is built, never what may be used.
fn preference(wanted: Version) -> [Version; 2] {
    match wanted {
        Version::V1 => [Version::V1, Version::V2],
        Version::V2 => [Version::V2, Version::V1],
    }
}

impl Provider {
    /// Uses (and creates, mode 0700) `config.archive_dir`.
    pub fn new(config: ImageServiceConfig, sources: Sources) -> Result<Self, BuildError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = &config.archive_dir;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for path in [dir.clone(), dir.join("refs")] {
            builder.create(&path).map_err(|e| BuildError::io(format!("creating {}", path.display()), &e))?;
        }
        let store = config.archive_store.as_deref().map(|url| ArchiveStore::open(url, sources.clone())).transpose()?;
        let refs = RefRecords::new(dir.join("refs"));
        let limit = config.layer_cache_max_bytes;
        let artifacts = (limit > 0).then(|| Artifacts::new(dir.join("layers"), limit));
        let inner = Inner {
            indexing: Arc::new(Indexing::new(config.index_concurrency, artifacts, Indexing::NODE_METADATA)),
            config,
            sources,
            store,
            refs,
            referrers: referrer::Misses::default(),
            jobs: Mutex::default(),
            pins: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The shared store, where one is configured.
    pub fn store(&self) -> Option<&ArchiveStore> {
        self.inner.store.as_ref()
    }

    /// Provides; waits for a build in flight. v2 falls back to v1 only on [`BuildError::V2Impossible`], with a warning and a metric.
    pub async fn provide(&self, request: &Request) -> Result<Provided, BuildError> {
        let key = RefRecords::key(&request.image, &request.platform);
        let known = self.inner.refs.load(&key);
        if let Some(provided) = self.without_registry(request, known.as_ref())? {
            return Ok(provided);
        }
        let resolving = self.inner.sources.resolve(&request.image, &request.platform, &request.credentials);
        let image = match resolving.await {
            Ok(image) => image,
            Err(error @ SourceError::Unavailable { .. }) => {
                // The registry is out of reach: those whom it let in before keep what the node has.
                let fallback = match (&known, request.pull_policy) {
                    (Some(record), PullPolicy::IfNotPresent) if record.admits(&request.credentials) => {
                        self.local(record, request)
                    }
                    _ => None,
                };
                return match fallback {
                    Some(provided) => {
                        warn!(image = %request.image, %error, "registry out of reach: using this node's archive");
                        Ok(provided)
                    }
                    None => Err(error.into()),
                };
            }
            Err(error) => return Err(error.into()),
        };
        let (manifest_digest, scope) = (image.manifest_digest, image.scope);
        let named = (manifest_digest, image.platform.clone());
        self.inner.refs.remember(&key, named, scope, &request.credentials);
        let made = self.job(image, request.version, request.credentials.clone()).await.map_err(BuildError::Shared)?;
        self.hand_out(made, manifest_digest, scope)
    }

    /// A pin for an archive that an earlier process provided (recovery); `None` if the file is gone.
    pub fn pin(&self, path: &Path) -> Option<Arc<Pin>> {
        if !path.starts_with(&self.inner.config.archive_dir) {
            return None;
        }
        // The lock is held across the check, so that a clean-up can't delete the file between check and pin.
        let mut pins = self.inner.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if !path.is_file() {
            return None;
        }
        if let Some(pin) = pins.get(path).and_then(Weak::upgrade) {
            return Some(pin);
        }
        let pin = Arc::new(Pin { path: path.to_owned() });
        pins.insert(path.to_owned(), Arc::downgrade(&pin));
        Some(pin)
    }

    /// How far the build of an image is, in words, while one runs: "fetching layer 2 of 5, 34 %".
    pub fn progress(&self, image: &ImageRef) -> Option<String> {
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.values().find(|(_, progress)| progress.image() == image).map(|(_, progress)| progress.to_string())
    }

    /// What can be answered without asking the registry; an error where it must not be asked.
    fn without_registry(&self, request: &Request, known: Option<&RefRecord>) -> Result<Option<Provided>, BuildError> {
        let local = || known.and_then(|record| self.local(record, request).map(|provided| (record, provided)));
        match request.pull_policy {
            PullPolicy::Always => Ok(None),
            PullPolicy::IfNotPresent => Ok(local().filter(|(record, _)| record.is_public()).map(|(_, p)| p)),
            PullPolicy::Never => {
                let what = request.image.to_string();
                let Some((record, provided)) = local() else {
                    let detail =
                        "this node has no archive of it and pullPolicy is Never; use IfNotPresent or build it first";
                    return Err(SourceError::NotFound { what, detail: detail.into() }.into());
                };
                if !record.admits(&request.credentials) {
                    let detail =
                        "this node has not seen these credentials accepted and pullPolicy Never forbids to ask";
                    return Err(SourceError::Denied { what, detail: detail.into() }.into());
                }
                Ok(Some(provided))
            }
        }
    }

    /// The node's own archive of a reference that was resolved before.
    fn local(&self, record: &RefRecord, request: &Request) -> Option<Provided> {
        let (path, pin) = self.find_local(&record.manifest_digest, &record.platform, request.version)?;
        let location = Location::File(path);
        let (manifest_digest, scope) = (record.manifest_digest, record.scope_for(&request.credentials));
        Some(Provided { location, pin: Some(pin), manifest_digest, scope, from: "node" })
    }

    fn find_local(&self, manifest: &Digest, platform: &Platform, wanted: Version) -> Option<(PathBuf, Arc<Pin>)> {
        preference(wanted).into_iter().find_map(|version| {
            let path = self.inner.config.archive_dir.join(ArchiveStore::file_name(manifest, platform, version));
            let pin = self.pin(&path)?;
            touch(&path);
            Some((path, pin))
        })
    }

    fn hand_out(&self, made: Made, manifest_digest: Digest, scope: Scope) -> Result<Provided, BuildError> {
        let pin = match &made.file {
            None => None,
            Some(path) => Some(self.pin(path).ok_or_else(|| BuildError::Io {
                what: format!("archive {}", path.display()),
                detail: "it vanished after it was made; retry".into(),
            })?),
        };
        Ok(Provided { location: made.location, pin, manifest_digest, scope, from: made.from })
    }

    /// The job that makes an archive of this manifest available; joined where it runs already.
    fn job(&self, image: ResolvedImage, wanted: Version, credentials: Credentials) -> Job {
        let name = ArchiveStore::file_name(&image.manifest_digest, &image.platform, wanted);
        let mut jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((job, _)) = jobs.get(&name) {
            return job.clone();
        }
        let progress = Arc::new(BuildProgress::new(image.reference.clone()));
        let (running, reporter) = (Running { provider: self.clone(), name: name.clone() }, progress.clone());
        let task = tokio::spawn(async move {
            let result = running.provider.make(&image, wanted, &credentials, &reporter).await.map_err(Arc::new);
            if !matches!(&result, Ok(made) if made.from != BUILT) {
                tokio::task::spawn_blocking(memory::give_back);
            }
            result
        });
        let job = async move {
            task.await.unwrap_or_else(|error| {
                Err(Arc::new(BuildError::Io { what: "archive build".into(), detail: error.to_string() }))
            })
        };
        let job = job.boxed().shared();
        // The task needs the lock to leave the list, so it can't have done so before this insert.
        jobs.insert(name, (job.clone(), progress));
        job
    }

    async fn make(
        &self,
        image: &ResolvedImage,
        wanted: Version,
        credentials: &Credentials,
        progress: &BuildProgress,
    ) -> Result<Made, BuildError> {
        let (manifest, platform) = (&image.manifest_digest, &image.platform);
        if let Some((path, _pin)) = self.find_local(manifest, platform, wanted) {
            return Ok(Made { location: Location::File(path.clone()), file: Some(path), from: "node" });
        }
        for version in preference(wanted) {
            match self.find_in_store(manifest, platform, version).await {
                Ok(Some(made)) => return Ok(made),
                Ok(None) => {}
                Err(error) => warn!(image = %image.reference, %error, "archive store is no help: building here"),
            }
        }
        if let Some(path) = self.beside_image(image, credentials).await {
            self.clean_up(&path);
            return Ok(Made { location: Location::File(path.clone()), file: Some(path), from: "referrer" });
        }
        let path = self.build(image, wanted, progress).await?;
        self.clean_up(&path);
        Ok(Made { location: Location::File(path.clone()), file: Some(path), from: BUILT })
    }

    /// A v2 archive is fetched (it is small); a v1 archive stays in the store and is read by range.
    async fn find_in_store(
        &self,
        manifest: &Digest,
        platform: &Platform,
        version: Version,
    ) -> Result<Option<Made>, BuildError> {
        let Some(store) = &self.inner.store else { return Ok(None) };
        let name = ArchiveStore::archive_name(manifest, platform, version);
        let Some(location) = store.find(&name).await? else { return Ok(None) };
        match version {
            Version::V1 => Ok(Some(Made { location, file: None, from: "store" })),
            Version::V2 => {
                let path = self.inner.config.archive_dir.join(ArchiveStore::file_name(manifest, platform, version));
                let made =
                    |path: PathBuf| Made { location: Location::File(path.clone()), file: Some(path), from: "store" };
                Ok(store.fetch(&location, &path).await?.then(|| made(path)))
            }
        }
    }

    /// Builds what is wanted into `archive_dir`; v1 where v2 can't be built.
    async fn build(
        &self,
        image: &ResolvedImage,
        wanted: Version,
        progress: &BuildProgress,
    ) -> Result<PathBuf, BuildError> {
        let config = &self.inner.config;
        let options = BuildOptions {
            span_size: config.span_kib << 10,
            checkpoint_mib: config.checkpoint_mib,
            indexing: self.inner.indexing.clone(),
            tables_of_contents: config.tables_of_contents,
            ..BuildOptions::default()
        };
        let target = |version| {
            config.archive_dir.join(ArchiveStore::file_name(&image.manifest_digest, &image.platform, version))
        };
        if wanted == Version::V2 {
            let path = target(Version::V2);
            match index_image(image, &path, &options, progress).await {
                Ok(report) => {
                    info!(image = %image.reference, bytes = report.archive_bytes, nodes = report.nodes, "built a v2 index");
                    return Ok(path);
                }
                Err(BuildError::V2Impossible { detail }) => {
                    metrics().build_fallbacks.inc();
                    warn!(image = %image.reference, reason = %detail, "no v2 index can be built: falling back to v1");
                }
                Err(error) => return Err(error),
            }
        }
        let path = target(Version::V1);
        let bytes: u64 = image.layers.iter().map(|layer| layer.size).sum();
        info!(image = %image.reference, bytes, "building a v1 archive: all layers are pulled (clipVersion 2 would not)");
        let report = archive_image(image, &path, &options, progress).await?;
        info!(image = %image.reference, bytes = report.archive_bytes, nodes = report.nodes, "built a v1 archive");
        Ok(path)
    }

    /// Deletes the least recently used archives that nothing pins while `archive_dir` is over its limit.
    fn clean_up(&self, keep: &Path) {
        let Ok(entries) = std::fs::read_dir(&self.inner.config.archive_dir) else { return };
        let mut files: Vec<_> = entries
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|e| e == "clip"))
            .filter_map(|entry| entry.metadata().ok().map(|meta| (meta.accessed().ok(), meta.len(), entry.path())))
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total <= self.inner.config.archive_max_bytes {
                return;
            }
            let mut pins = self.inner.pins.lock().unwrap_or_else(PoisonError::into_inner);
            pins.retain(|_, pin| pin.strong_count() > 0);
            if path == keep || pins.contains_key(&path) {
                continue;
            }
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    info!(archive = %path.display(), bytes = len, "removed an archive: archiveMaxBytes is exceeded");
                    total -= len;
                }
                Err(error) => warn!(archive = %path.display(), %error, "an archive can't be removed"),
            }
        }
    }
}

/// A job in the list of those that run; leaves it however it ends, in a panic too.
struct Running {
    provider: Provider,
    name: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.provider.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// Marks an archive as used now; its order in the clean-up is all that hangs on it. By the time of access: that of the last
/// change says, to those who are reading the archive, whether it is still the same.
fn touch(path: &Path) {
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.set_times(std::fs::FileTimes::new().set_accessed(std::time::SystemTime::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Policy;

    #[test]
    fn a_job_that_panics_leaves_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let config = ImageServiceConfig { archive_dir: dir.path().to_owned(), ..Default::default() };
        let sources = Sources::new(Policy { trusted: true, config: Default::default() }).unwrap();
        let provider = Provider::new(config, sources).unwrap();
        let failed = BuildError::Io { what: "archive build".into(), detail: "of a test".into() };
        let job: Job = futures::future::ready(Err(Arc::new(failed))).boxed().shared();
        let progress = Arc::new(BuildProgress::new("registry.test/x:latest".parse().unwrap()));
        let jobs = || provider.inner.jobs.lock().unwrap();
        jobs().insert("x".into(), (job, progress));
        let running = Running { provider: provider.clone(), name: "x".into() };
        let panicked = std::thread::spawn(move || {
            let _running = running;
            panic!("in a build");
        });
        assert!(panicked.join().is_err());
        assert!(jobs().is_empty());
    }
}
