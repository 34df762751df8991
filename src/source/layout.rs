//! OCI image layouts: a directory (`oci:DIR[:TAG]`) or an uncompressed tar of one (`oci-archive:FILE[:TAG]`).

mod tar_index;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex};

use super::image::{self, ImagePlace, ImageRef, MANIFEST_LIMIT, ResolvedImage, Scope};
use super::local::{LocalFile, Roots, blocking};
use super::{BlobSource, SourceError};
use crate::units::{Digest, Platform};
use tar_index::TarIndex;

/// The annotation that holds a manifest's tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation in which containerd and docker keep the whole name.
const IMAGE_NAME: &str = "io.containerd.image.name";

/// An OCI layout whose blobs can be opened. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Layout {
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    Dir { dir: PathBuf, roots: Roots },
    Archive { file: LocalFile, index: Arc<TarIndex> },
}

impl Layout {
    /// A layout directory. Touches nothing yet.
    pub fn dir(dir: &Path, roots: &Roots) -> Self {
        Self { form: Form::Dir { dir: dir.to_owned(), roots: roots.clone() } }
    }

    /// A layout in an uncompressed tar: reads its headers once (one small read per entry), never its data.
    pub async fn archive(file: &Path, roots: &Roots) -> Result<Self, SourceError> {
        let (path, roots) = (file.to_owned(), roots.clone());
        blocking(&file.display().to_string(), move || {
            let file = LocalFile::open_in(&path, &roots)?;
            let index = Arc::new(TarIndex::read(&file)?);
            Ok(Self { form: Form::Archive { file, index } })
        })
        .await
    }

    /// One blob, by digest. Its content is not checked here.
    pub async fn blob(&self, digest: &Digest) -> Result<LocalFile, SourceError> {
        let name = format!("blobs/sha256/{}", digest.hex());
        self.entry(&name).await.map_err(|error| match error {
            SourceError::NotFound { .. } => SourceError::NotFound {
                what: self.name(),
                detail: format!("blob {digest} is missing from the layout; export the image again"),
            },
            other => other,
        })
    }

    async fn entry(&self, name: &str) -> Result<LocalFile, SourceError> {
        match &self.form {
            Form::Dir { dir, roots } => {
                let (path, roots) = (dir.join(name), roots.clone());
                blocking(name, move || LocalFile::open_in(&path, &roots)).await
            }
            Form::Archive { file, index } => match index.get(name) {
                Some((start, len)) => file.part(start, len, name),
                None => {
                    let what = format!("{name} in {}", file.describe());
                    Err(SourceError::NotFound { what, detail: "the archive has no such entry".into() })
                }
            },
        }
    }

    async fn small(&self, file: LocalFile, limit: u64) -> Result<Bytes, SourceError> {
        if file.size() > limit {
            let detail = format!("has {} bytes, the limit is {limit}", file.size());
            return Err(SourceError::Invalid { what: file.describe(), detail });
        }
        file.read_range(0..file.size()).await
    }

    async fn index(&self) -> Result<ImageIndex, SourceError> {
        let file = match self.entry("index.json").await {
            Err(SourceError::NotFound { .. }) => {
                self.check_there().await?;
                let detail = "there is no index.json: not an OCI layout; make one with `skopeo copy … oci:DIR:TAG`";
                return Err(SourceError::Invalid { what: self.name(), detail: detail.into() });
            }
            other => other?,
        };
        let bytes = self.small(file, MANIFEST_LIMIT).await?;
        image::parse_json(&format!("index.json of {}", self.name()), &bytes)
    }

    /// A layout directory that is missing altogether is another mistake than one that is no layout.
    async fn check_there(&self) -> Result<(), SourceError> {
        let Form::Dir { dir, roots } = &self.form else { return Ok(()) };
        let (path, roots) = (dir.clone(), roots.clone());
        let opened = blocking("open", move || roots.open(&path).map(drop)).await;
        match opened {
            Err(SourceError::NotFound { .. }) => {
                let detail = "there is no such directory; check the path".into();
                Err(SourceError::NotFound { what: self.name(), detail })
            }
            // Opening it as a file fails for other reasons: it is there.
            _ => Ok(()),
        }
    }

    /// Finds the manifest that `tag` and `platform` mean. `reference` is only carried into the result.
    pub(super) async fn resolve(
        &self,
        reference: &ImageRef,
        tag: Option<&str>,
        platform: &Platform,
    ) -> Result<ResolvedImage, SourceError> {
        let index = self.index().await?;
        let top = select(&self.name(), index.manifests(), tag, platform)?;
        let digest = image::digest_of(&self.name(), top)?;
        let bytes = self.manifest(&digest).await?;
        image::resolve(self, reference, bytes, platform, Scope::Public).await
    }
}

#[async_trait]
impl ImagePlace for Layout {
    fn name(&self) -> String {
        match &self.form {
            Form::Dir { dir, .. } => format!("oci:{}", dir.display()),
            Form::Archive { file, .. } => format!("oci-archive:{}", file.describe()),
        }
    }

    async fn manifest(&self, digest: &Digest) -> Result<Bytes, SourceError> {
        let bytes = self.small(self.blob(digest).await?, MANIFEST_LIMIT).await?;
        image::check_digest(&self.name(), "manifest", digest, &bytes)?;
        Ok(bytes)
    }

    async fn config(&self, digest: &Digest, _size: u64) -> Result<Bytes, SourceError> {
        let bytes = self.small(self.blob(digest).await?, image::CONFIG_LIMIT).await?;
        image::check_digest(&self.name(), "config", digest, &bytes)?;
        Ok(bytes)
    }

    async fn layer(&self, digest: &Digest, size: u64) -> Result<Arc<dyn BlobSource>, SourceError> {
        let file = self.blob(digest).await?;
        if file.size() != size {
            let detail =
                format!("layer {digest} has {} bytes, its manifest says {size}; export the image again", file.size());
            return Err(SourceError::Corrupt { what: self.name(), detail });
        }
        Ok(Arc::new(file))
    }
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str)
}

/// The tag of `name` (`host:5000/a/b:tag`), where it has one.
fn tag_of(name: &str) -> Option<&str> {
    name.rsplit_once(':').map(|(_, tag)| tag).filter(|tag| !tag.contains('/'))
}

/// The descriptor that a tag (or no tag) means: by the layout's rule the tag is the reference name, but some tools put the
/// whole image name there, or into an annotation of their own.
fn select<'a>(
    what: &str,
    descriptors: &'a [Descriptor],
    tag: Option<&str>,
    platform: &Platform,
) -> Result<&'a Descriptor, SourceError> {
    let images: Vec<&Descriptor> = descriptors.iter().filter(|d| !image::is_attestation(d)).collect();
    let named = |d: &&&Descriptor, wanted: &str| {
        [REF_NAME, IMAGE_NAME]
            .iter()
            .filter_map(|key| annotation(d, key))
            .any(|name| name == wanted || tag_of(name) == Some(wanted))
    };
    let candidates: Vec<&Descriptor> = match tag {
        Some(tag) => images.iter().filter(|d| named(d, tag)).copied().collect(),
        None => images.clone(),
    };
    if let [one] = candidates[..] {
        return Ok(one);
    }
    let one_name = candidates.windows(2).all(|w| annotation(w[0], REF_NAME) == annotation(w[1], REF_NAME));
    if one_name && !candidates.is_empty() {
        return image::choose(what, candidates, platform);
    }
    let mut tags: Vec<&str> = images.iter().filter_map(|d| annotation(d, REF_NAME)).collect();
    tags.sort_unstable();
    tags.dedup();
    let listed = if tags.is_empty() { "none has a tag".to_owned() } else { format!("tags: {}", tags.join(", ")) };
    Err(match tag {
        Some(tag) => {
            SourceError::NotFound { what: what.into(), detail: format!("no image has the tag {tag:?}; {listed}") }
        }
        None if images.is_empty() => {
            SourceError::NotFound { what: what.into(), detail: "the layout holds no image; copy one into it".into() }
        }
        None => SourceError::Invalid {
            what: what.into(),
            detail: format!("the layout holds {} images, say which: {what}:TAG ({listed})", images.len()),
        },
    })
}

#[cfg(test)]
mod tests;
