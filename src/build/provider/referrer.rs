//! An index that somebody put beside the image, as an artifact that refers to its manifest: taken if it is about exactly
//! that manifest's layers, and never in the way of a publish that could go on without it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Provider;
use crate::archive::Version;
use crate::build::BuildError;
use crate::build::store::{ArchiveStore, Facts, download};
use crate::metrics::metrics;
use crate::source::{Artifact, Credentials, ImageRef, Repository, ResolvedImage};
use crate::units::Digest;

/// Largest index that is taken, in bytes. One of a million files has about 200 MB.
const MAX_BYTES: u64 = 512 << 20;
/// Time for the search, the download not counted: an image can be indexed without it.
const SEARCH: Duration = Duration::from_secs(20);
/// How long an image is believed to have none.
const MISS_LIFE: Duration = Duration::from_secs(60);
/// Remembered misses before those that ended are dropped.
const MANY: usize = 1024;

/// Images that had no index beside them a moment ago.
#[derive(Debug, Default)]
pub(super) struct Misses(Mutex<HashMap<(String, Digest), Instant>>);

impl Misses {
    fn has(&self, key: &(String, Digest)) -> bool {
        let misses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        misses.get(key).is_some_and(|until| Instant::now() < *until)
    }

    fn insert(&self, key: (String, Digest)) {
        let mut misses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if misses.len() >= MANY {
            misses.retain(|_, until| now < *until);
        }
        misses.insert(key, now + MISS_LIFE);
    }
}

impl Provider {
    /// Fetches the index beside an image into `archive_dir`. Whatever goes wrong is logged and counted: then one is built.
    pub(super) async fn beside_image(&self, image: &ResolvedImage, credentials: &Credentials) -> Option<PathBuf> {
        let ImageRef::Registry { registry, repository, .. } = &image.reference else { return None };
        if !self.inner.config.referrers {
            return None;
        }
        let key = (format!("{registry}/{repository}"), image.manifest_digest);
        if self.inner.referrers.has(&key) {
            return None;
        }
        let file = ArchiveStore::file_name(&image.manifest_digest, &image.platform, Version::V2);
        let path = self.inner.config.archive_dir.join(file);
        let (result, found) = match self.search(image, registry, repository, credentials, &path).await {
            Ok(Found::Taken(artifact)) => {
                info!(image = %image.reference, artifact = %artifact.digest, bytes = artifact.size, "found an index beside the image");
                ("found", Some(path))
            }
            Ok(Found::Rejected) => ("rejected", None),
            Ok(Found::Nothing) => ("none", None),
            Err(error) => {
                warn!(image = %image.reference, %error, "can't tell whether an index lies beside the image: going on without");
                ("error", None)
            }
        };
        metrics().referrer_lookups.with_label_values(&[result]).inc();
        if found.is_none() {
            self.inner.referrers.insert(key);
        }
        found
    }

    async fn search(
        &self,
        image: &ResolvedImage,
        registry: &str,
        repository: &str,
        credentials: &Credentials,
        path: &Path,
    ) -> Result<Found, BuildError> {
        let place = self.inner.sources.repository(registry, repository, credentials).await?;
        let search = place.archives_of(&image.manifest_digest, Version::V2);
        let candidates = tokio::time::timeout(SEARCH, search).await.map_err(|_| BuildError::Io {
            what: format!("the referrers of {}@{}", place.name(), image.manifest_digest),
            detail: format!("no answer within {} s", SEARCH.as_secs()),
        })??;
        let mut found = Found::Nothing;
        for artifact in candidates {
            match take(&place, &artifact, image, registry, repository, path).await {
                Ok(None) => return Ok(Found::Taken(artifact)),
                Ok(Some(why)) => {
                    warn!(image = %image.reference, artifact = %artifact.digest, why, "an index beside the image is not taken");
                    found = Found::Rejected;
                }
                // Damaged or gone: the next one may be whole.
                Err(error @ (BuildError::Archive(_) | BuildError::Source(_))) => {
                    warn!(image = %image.reference, artifact = %artifact.digest, %error, "an index beside the image can't be used");
                    found = Found::Rejected;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// How a search ended.
enum Found {
    Taken(Artifact),
    Rejected,
    Nothing,
}

/// Fetches one index and looks at it before it gets its name; why it is refused, else.
async fn take(
    place: &Repository,
    artifact: &Artifact,
    image: &ResolvedImage,
    registry: &str,
    repository: &str,
    path: &Path,
) -> Result<Option<String>, BuildError> {
    if artifact.size > MAX_BYTES {
        return Ok(Some(format!("it has {} bytes, the limit is {MAX_BYTES}", artifact.size)));
    }
    let io = |e: std::io::Error| BuildError::io(format!("writing {}", path.display()), &e);
    // Not a name that a clean-up or a mount would take for an archive.
    let dir = path.parent().unwrap_or(Path::new("/"));
    let fetched = tempfile::Builder::new().prefix(".referrer-").tempfile_in(dir).map_err(io)?.into_temp_path();
    download(place, artifact, &fetched, &|_| {}).await?;
    let facts = Facts::of(&fetched).await?;
    if let Some(why) = facts.objection(image, registry, repository) {
        return Ok(Some(why));
    }
    fetched.persist(path).map_err(|e| io(e.error))?;
    Ok(None)
}
