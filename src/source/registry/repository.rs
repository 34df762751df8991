//! One repository as a place for archives: what refers to an image, what lies under a tag, and putting something there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use sha2::Digest as _;

use super::super::image::check_digest;
use super::super::local::{Roots, blocking};
use super::super::{ArtifactRef, BlobSource, SourceError};
use super::artifact::{self, Artifact, EMPTY_BYTES, Labels, Referrer, Subject};
use super::blob::RegistryBlob;
use super::{Access, Registries};
use crate::archive::Version;
use crate::units::Digest;

/// Referrers whose manifests are looked at in one search, newest first.
const MAX_CANDIDATES: usize = 16;

/// A repository, as one identity sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Repository {
    registries: Registries,
    access: Access,
}

/// What is pushed.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Bytes(Bytes),
    File(Arc<File>, PathBuf),
}

impl Content {
    pub(super) async fn read(&self, start: u64, len: u64) -> Result<Bytes, SourceError> {
        let (file, path) = match self {
            Self::Bytes(bytes) => return Ok(bytes.slice(start as usize..(start + len) as usize)),
            Self::File(file, path) => (file.clone(), path.display().to_string()),
        };
        let what = path.clone();
        blocking(&what, move || {
            let mut buf = vec![0; len as usize];
            file.read_exact_at(&mut buf, start).map_err(|e| SourceError::of_io(&path, &e))?;
            Ok(buf.into())
        })
        .await
    }
}

impl Repository {
    pub(super) fn new(registries: Registries, access: Access) -> Self {
        Self { registries, access }
    }

    /// `host/repository`, for messages.
    pub fn name(&self) -> &str {
        &self.access.name
    }

    /// The archive under a tag or digest. An image there is an error that says so.
    pub async fn artifact(&self, reference: &ArtifactRef) -> Result<Artifact, SourceError> {
        let what = format!("{}{reference}", self.access.name);
        match self.manifest(reference).await? {
            (_, Some(artifact)) => Ok(artifact),
            (_, None) => {
                let detail =
                    "is no CLIP archive; name what `clip-csi push` has put there, or use it as an image".into();
                Err(SourceError::Invalid { what, detail })
            }
        }
    }

    /// The archive's bytes, by range.
    pub fn blob(&self, artifact: &Artifact) -> Arc<dyn BlobSource> {
        let retry = self.registries.0.retry.clone();
        Arc::new(RegistryBlob::new(self.access.clone(), artifact.blob, Some(artifact.size), retry))
    }

    /// Archives of a version that refer to this manifest, the newest first; at most 16 are looked at. Asks the referrers
    /// API, and where the registry has none, the tag that stands in for it.
    pub async fn archives_of(&self, subject: &Digest, version: Version) -> Result<Vec<Artifact>, SourceError> {
        let mut candidates = self.access.referrers(subject, artifact::artifact_type(version)).await?;
        candidates.retain(|referrer| referrer.may_be(version));
        // Those that say what they are come first, whatever others put beside them.
        let exact = |r: &Referrer| r.artifact_type.as_deref() == Some(artifact::artifact_type(version));
        candidates.sort_by(|a, b| (exact(b), &b.created, b.digest.0).cmp(&(exact(a), &a.created, a.digest.0)));
        candidates.dedup();
        let mut found = Vec::new();
        for referrer in candidates.into_iter().take(MAX_CANDIDATES) {
            match self.manifest(&ArtifactRef::Digest(referrer.digest)).await {
                Ok((_, Some(artifact))) if artifact.version == version && artifact.subject == Some(*subject) => {
                    found.push(artifact);
                }
                Ok(_) => {}
                // An entry of the stand-in tag may outlive what it names; a broken one must not hide a good one.
                Err(
                    error @ (SourceError::NotFound { .. } | SourceError::Corrupt { .. } | SourceError::Invalid { .. }),
                ) => {
                    tracing::debug!(repository = self.name(), digest = %referrer.digest, %error, "passing over a referrer");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The manifest that an artifact shall refer to, which must be there.
    pub async fn subject(&self, digest: &Digest) -> Result<Subject, SourceError> {
        let bytes = self.access.manifest(&digest.to_string(), Some(digest)).await?;
        /// Images of Docker and OCI say their type.
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Typed {
            media_type: Option<String>,
        }
        let typed: Typed = super::image::parse_json(self.name(), &bytes)?;
        let media_type = typed.media_type.unwrap_or_else(|| artifact::MANIFEST.to_owned());
        Ok(Subject { digest: *digest, size: bytes.len() as u64, media_type })
    }

    /// Pushes an archive: its bytes (unless they are there), then the manifest, under a tag where one is given; with a
    /// `subject` also the stand-in tag, where the registry does not answer that it keeps referrers itself.
    pub async fn push(
        &self,
        file: &Path,
        version: Version,
        labels: &Labels,
        subject: Option<&Subject>,
        tag: Option<&str>,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Artifact, SourceError> {
        self.writable()?;
        let path = file.to_owned();
        let what = path.display().to_string();
        let (content, blob, size) = blocking(&what, move || {
            let file = Roots::any().open(&path)?;
            let (digest, size) = digest_of_file(&file).map_err(|e| SourceError::of_io(path.display(), &e))?;
            Ok((Content::File(Arc::new(file), path), digest, size))
        })
        .await?;
        if let Some(subject) = subject {
            // The same archive, pushed again, is the same artifact, whenever that was.
            let there = self.archives_of(&subject.digest, version).await?;
            if let Some(there) = there.into_iter().find(|there| there.blob == blob).filter(|_| tag.is_none()) {
                progress(size);
                return Ok(there);
            }
        }
        let empty = Content::Bytes(Bytes::from_static(EMPTY_BYTES));
        self.access.push_blob(&empty, &Digest::of(EMPTY_BYTES), EMPTY_BYTES.len() as u64, &|_| {}).await?;
        self.access.push_blob(&content, &blob, size, progress).await?;
        let manifest = artifact::manifest(version, &blob, size, labels, subject);
        self.finish(version, Bytes::from(manifest), subject, tag).await
    }

    /// Puts the archive under its tag again, as used at `labels.created`. The bytes stay; the manifest is a new one, so that
    /// a clean-up that deletes the old one by its digest misses this.
    pub async fn touch(&self, artifact: &Artifact, labels: &Labels, tag: &str) -> Result<Artifact, SourceError> {
        self.writable()?;
        let manifest = artifact::manifest(artifact.version, &artifact.blob, artifact.size, labels, None);
        self.finish(artifact.version, Bytes::from(manifest), None, Some(tag)).await
    }

    async fn finish(
        &self,
        version: Version,
        manifest: Bytes,
        subject: Option<&Subject>,
        tag: Option<&str>,
    ) -> Result<Artifact, SourceError> {
        let digest = Digest::of(&manifest);
        let reference = tag.map_or_else(|| digest.to_string(), str::to_owned);
        let kept = self.access.put_manifest(&reference, artifact::MANIFEST, manifest.clone()).await?;
        if let Some(subject) = subject
            && !kept
        {
            self.access.add_to_fallback(&subject.digest, &manifest, version).await?;
        }
        let made = Artifact::parse(self.name(), digest, &manifest)?;
        made.ok_or_else(|| SourceError::Corrupt { what: self.name().into(), detail: "a manifest of our own".into() })
    }

    /// All tags; none where the repository does not exist.
    pub async fn tags(&self) -> Result<Vec<String>, SourceError> {
        self.writable()?;
        self.access.tags().await
    }

    /// Deletes a manifest by digest, with the tags that name it; absent is fine.
    pub async fn delete(&self, digest: &Digest) -> Result<(), SourceError> {
        self.writable()?;
        self.access.delete_manifest(digest).await
    }

    /// [`Self::delete`], and the tag where the registry keeps that; not if the tag names something else by now.
    pub async fn delete_tagged(&self, tag: &str, digest: &Digest) -> Result<(), SourceError> {
        self.delete(digest).await?;
        match self.access.manifest(tag, None).await {
            Ok(bytes) if Digest::of(&bytes) == *digest => self.access.delete_tag(tag).await,
            Ok(_) | Err(SourceError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn manifest(&self, reference: &ArtifactRef) -> Result<(Bytes, Option<Artifact>), SourceError> {
        let (text, wanted) = match reference {
            ArtifactRef::Tag(tag) => (tag.clone(), None),
            ArtifactRef::Digest(digest) => (digest.to_string(), Some(digest)),
        };
        let bytes = self.access.manifest(&text, wanted).await?;
        let digest = Digest::of(&bytes);
        if let Some(wanted) = wanted {
            check_digest(self.name(), "manifest", wanted, &bytes)?;
        }
        let artifact = Artifact::parse(&format!("{}@{digest}", self.name()), digest, &bytes)?;
        Ok((bytes, artifact))
    }

    /// What volumes name is read, never written.
    fn writable(&self) -> Result<(), SourceError> {
        if self.registries.0.trusted {
            return Ok(());
        }
        let detail = "volumes may only read; configure imageService.archiveStore to keep archives in a registry";
        Err(SourceError::Refused { what: self.name().into(), detail: detail.into() })
    }
}

/// SHA-256 and length of a whole file.
fn digest_of_file(file: &File) -> std::io::Result<(Digest, u64)> {
    let (mut hasher, mut buf, mut at) = (sha2::Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        match file.read_at(&mut buf, at)? {
            0 => return Ok((Digest(hasher.finalize().into()), at)),
            n => {
                hasher.update(buf.get(..n).unwrap_or_default());
                at += n as u64;
            }
        }
    }
}
