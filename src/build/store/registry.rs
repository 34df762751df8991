//! Archives as artifacts: under the tags of one repository, or beside each image; and fetching one, verified.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::TryStreamExt as _;
use sha2::Digest as _;

use super::objects::{persist, temporary, vanished};
use super::shelf::{Seen, Shelf, Stored};
use super::{Facts, labels, manifest_of, tag_of};
use crate::build::BuildError;
use crate::source::{Artifact, ArtifactRef, Credentials, ImageRef, Repository, SourceError, Sources};
use crate::units::Digest;

/// The tag of a mark begins so.
const DOOMED: &str = "doomed-";
/// A use is written again when the last one is older than this: a use is a manifest that replaces another.
const USE_EVERY: Duration = Duration::from_secs(600);

/// The tags of one repository.
#[derive(Debug)]
pub(super) struct Tags {
    registry: String,
    repository: String,
    sources: Sources,
}

impl Tags {
    pub(super) fn new(registry: &str, repository: &str, sources: Sources) -> Self {
        Self { registry: registry.to_owned(), repository: repository.to_owned(), sources }
    }

    async fn repository(&self) -> Result<Repository, BuildError> {
        Ok(self.sources.repository(&self.registry, &self.repository, &Credentials::default()).await?)
    }
}

async fn under(repository: &Repository, tag: &str) -> Result<Option<Artifact>, BuildError> {
    match repository.artifact(&ArtifactRef::Tag(tag.to_owned())).await {
        Ok(artifact) => Ok(Some(artifact)),
        Err(SourceError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// An artifact that does not say when it was used counts as used now: it is none of ours.
fn used(artifact: &Artifact) -> SystemTime {
    artifact.created().unwrap_or_else(SystemTime::now)
}

#[async_trait]
impl Shelf for Tags {
    async fn list(&self) -> Result<Vec<Stored>, BuildError> {
        let tags = self.repository().await?.tags().await?;
        let name = |tag: String| manifest_of(&format!("{tag}.clip")).map(|_| format!("archives/{tag}.clip"));
        Ok(tags.into_iter().filter_map(name).map(|name| Stored { name, used: None }).collect())
    }

    async fn look(&self, name: &str) -> Result<Option<Seen>, BuildError> {
        let artifact = under(&self.repository().await?, tag_of(name)).await?;
        Ok(artifact.map(|artifact| Seen { used: used(&artifact), state: artifact.digest.to_string() }))
    }

    async fn put(&self, name: &str, file: Option<&Path>) -> Result<(), BuildError> {
        let (repository, tag) = (self.repository().await?, tag_of(name));
        let now = SystemTime::now();
        let there = under(&repository, tag).await?;
        if let Some(before) = there {
            if now.duration_since(used(&before)).is_ok_and(|age| age < USE_EVERY) {
                return Ok(());
            }
            let mut labels = labels(name, None);
            (labels.created, labels.span) = (Some(now), before.span());
            let after = repository.touch(&before, &labels, tag).await?;
            // The manifest of the last use has lost its tag. What can't be deleted costs some bytes.
            if after.digest != before.digest
                && let Err(error) = repository.delete(&before.digest).await
            {
                tracing::debug!(name, %error, "the manifest of an earlier use stays");
            }
            return Ok(());
        }
        let file = file.ok_or_else(|| vanished(name))?;
        let facts = Facts::of(file).await?;
        let mut labels = labels(name, Some(&facts));
        labels.created = Some(now);
        repository.push(file, facts.version, &labels, None, Some(tag), &|_| {}).await?;
        Ok(())
    }

    async fn mark(&self, name: &str) -> Result<bool, BuildError> {
        let repository = self.repository().await?;
        let tag = format!("{DOOMED}{}", tag_of(name));
        if under(&repository, &tag).await?.is_some() {
            return Ok(false);
        }
        let Some(archive) = under(&repository, tag_of(name)).await? else { return Ok(false) };
        // Unlike any other: two controllers that mark at once don't take away each other's mark. Should both go on, they
        // delete the same manifest by its digest, and never the one of a later use.
        let who = format!("being removed by {} {:?}", std::process::id(), SystemTime::now());
        let mut labels = labels(name, None);
        (labels.title, labels.created) = (who, Some(SystemTime::now()));
        repository.touch(&archive, &labels, &tag).await?;
        Ok(true)
    }

    async fn marked(&self, name: &str) -> Result<Option<SystemTime>, BuildError> {
        let mark = under(&self.repository().await?, &format!("{DOOMED}{}", tag_of(name))).await?;
        Ok(mark.map(|mark| used(&mark)))
    }

    async fn unmark(&self, name: &str) -> Result<(), BuildError> {
        let (repository, tag) = (self.repository().await?, format!("{DOOMED}{}", tag_of(name)));
        match under(&repository, &tag).await? {
            Some(mark) => Ok(repository.delete_tagged(&tag, &mark.digest).await?),
            None => Ok(()),
        }
    }

    async fn remove(&self, name: &str, seen: &Seen) -> Result<(), BuildError> {
        let digest: Digest = seen.state.parse().map_err(|_| vanished(name))?;
        Ok(self.repository().await?.delete_tagged(tag_of(name), &digest).await?)
    }
}

/// Pushes an archive beside its image, unless it is there.
pub(super) async fn put_beside(
    sources: &Sources,
    name: &str,
    file: Option<&Path>,
    image: &ImageRef,
) -> Result<(), BuildError> {
    let ImageRef::Registry { registry, repository, .. } = image else {
        let detail =
            "is in no registry, so nothing can be kept beside it; use an archive store in S3 or oci://host/repository";
        return Err(SourceError::Invalid { what: format!("image {image}"), detail: detail.into() }.into());
    };
    // Taken from beside the image: there it is.
    let Some(file) = file else { return Ok(()) };
    let Some((manifest, ..)) = manifest_of(name.rsplit('/').next().unwrap_or(name)) else { return Err(vanished(name)) };
    let repository = sources.repository(registry, repository, &Credentials::default()).await?;
    let facts = Facts::of(file).await?;
    let mut labels = labels(name, Some(&facts));
    labels.created = Some(SystemTime::now());
    let subject = repository.subject(&manifest).await?;
    repository.push(file, facts.version, &labels, Some(&subject), None, &|_| {}).await?;
    Ok(())
}

/// Fetches an archive to a local file (temporary + rename), checked against its digest before it is there.
pub async fn download(
    repository: &Repository,
    artifact: &Artifact,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), BuildError> {
    let mut stream = repository.blob(artifact).stream(0).await?;
    let (mut file, mut hasher, mut got) = (temporary(to)?, sha2::Sha256::new(), 0);
    while let Some(bytes) = stream.try_next().await? {
        got += bytes.len() as u64;
        if got > artifact.size {
            break;
        }
        hasher.update(&bytes);
        file.write_all(&bytes).map_err(|e| BuildError::io(format!("writing {}", to.display()), &e))?;
        progress(bytes.len() as u64);
    }
    let digest = Digest(hasher.finalize().into());
    if digest != artifact.blob || got != artifact.size {
        let what = format!("{}@{}", repository.name(), artifact.blob);
        let detail = format!("the archive has {got} bytes and the digest {digest}; push it again");
        return Err(SourceError::Corrupt { what, detail }.into());
    }
    persist(file, to)
}
