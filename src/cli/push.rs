//! `clip-csi push`: an archive to S3, to a file, or to a registry.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::args::SourceArgs;
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::archive::S3Storage;
use crate::build::progress::Progress;
use crate::build::store::Facts;
use crate::build::{BuildError, write_remote_index};
use crate::source::{ArtifactRef, Credentials, Labels, Location, Repository, SourceError, Sources, split_oci};

/// Store an archive in S3 or in a registry
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi push app.clip s3://bucket/images/app.clip
  clip-csi push app.clip s3://bucket/images/ --create-only
  clip-csi push app.clip 's3://bucket/app.clip?endpoint=http://127.0.0.1:9000&path-style=true'
  clip-csi push rootfs.clip s3://bucket/images/ --rclip
  clip-csi push app.clip ghcr.io/acme/app              beside the image, where nodes find it
  clip-csi push rootfs.clip ghcr.io/acme/rootfs:v1     under a tag

Credentials for S3 are found as the AWS SDK finds them: environment, ~/.aws, web identity, instance role; for a registry
in ~/.docker/config.json. An upload to S3 that was interrupted goes on where it broke off.

In a registry an archive is an OCI artifact. One that was made of an image refers to the image's manifest, which must be
in the same repository: whoever mounts that image finds it through the registry. A repository without a tag is enough then.")]
pub(super) struct PushArgs {
    /// The archive file
    archive: PathBuf,
    /// s3://bucket/key, file://PATH or a path (one that ends with / gets the archive's file name), registry/repository[:tag]
    /// or oci://registry/repository[:tag]
    dest: String,
    /// Fail where the destination exists already
    #[arg(long)]
    create_only: bool,
    /// For a v1 archive in S3: write the index that refers to it beside it, as NAME.rclip
    #[arg(long)]
    rclip: bool,
    /// In a registry: do not refer to the image that the archive was made of
    #[arg(long)]
    no_subject: bool,
    #[command(flatten)]
    sources: SourceArgs,
}

impl PushArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let what = self.archive.display().to_string();
        let size = tokio::fs::metadata(&self.archive).await.map_err(|e| CliError::io(what.clone(), &e))?.len();
        let facts = Facts::of(&self.archive).await.map_err(|error| match error {
            BuildError::Archive(source) => CliError::Archive { what: what.clone(), source },
            other => other.into(),
        })?;
        let sources = self.sources.sources()?;
        let credentials = self.sources.credentials()?;
        let bars = Bars::new(global);
        let text = match repository_of(&self.dest) {
            Some(text) => {
                if self.rclip {
                    return Err(CliError::Usage("--rclip is for S3; a registry shows a v1 archive as it is".into()));
                }
                self.to_registry(text, &facts, &sources, &credentials, &bars).await?
            }
            None => self.to_store(&facts, size, &sources, &credentials, &bars).await?,
        };
        drop(bars);
        println!("{what} -> {text}: {} in {}", human::bytes(size), human::duration(started.elapsed()));
        Ok(())
    }

    /// To S3 or a file; where it went.
    async fn to_store(
        &self,
        facts: &Facts,
        size: u64,
        sources: &Sources,
        credentials: &Credentials,
        bars: &Bars,
    ) -> Result<String, CliError> {
        let what = self.archive.display().to_string();
        let mut text = self.dest.clone();
        if text.ends_with('/') {
            let name = self.archive.file_name().and_then(|n| n.to_str());
            text +=
                name.ok_or_else(|| CliError::Usage(format!("{what} has no file name; name the destination in full")))?;
        }
        let dest = self.sources.location(&text)?;
        if !matches!(dest, Location::S3 { .. } | Location::File(_)) {
            return Err(CliError::Usage(format!("{text} is no place for an archive; write s3://bucket/key or a path")));
        }
        // Before anything is sent.
        let twin = match (self.rclip, &dest) {
            (false, _) => None,
            (true, Location::S3 { .. }) if facts.local => Some(self.twin(&dest).await?),
            (true, Location::S3 { .. }) => {
                return Err(CliError::Usage(format!("{what} does not carry its data; --rclip is for v1 archives")));
            }
            (true, _) => return Err(CliError::Usage(format!("{text} is not in S3, where --rclip belongs"))),
        };
        let id = bars.begin(&what, Some(size));
        let advance = |bytes| bars.advance(id, bytes);
        sources.put(&dest, &self.archive, self.create_only, credentials, &advance).await?;
        bars.end(id);
        let Some((location, file)) = twin else { return Ok(text) };
        // The index last: whoever finds it finds the archive too.
        sources.put(&location, file.path(), self.create_only, credentials, &|_| {}).await?;
        Ok(format!("{text} and its index {location}"))
    }

    /// The index of an archive that will lie at `dest`, and where it belongs: in the same bucket, beside it.
    async fn twin(&self, dest: &Location) -> Result<(Location, tempfile::NamedTempFile), CliError> {
        let Location::S3 { endpoint, region, bucket, key, path_style } = dest else {
            return Err(CliError::Usage(format!("{dest} is not in S3")));
        };
        let storage = S3Storage {
            bucket: bucket.clone(),
            region: region.clone(),
            key: key.clone(),
            endpoint: endpoint.clone(),
            force_path_style: *path_style,
        };
        let file = tempfile::NamedTempFile::new().map_err(|e| CliError::io("making a temporary file", &e))?;
        write_remote_index(&self.archive, storage, file.path()).await?;
        let location = Location::S3 {
            endpoint: endpoint.clone(),
            region: region.clone(),
            bucket: bucket.clone(),
            key: format!("{}.rclip", key.strip_suffix(".clip").unwrap_or(key)),
            path_style: *path_style,
        };
        Ok((location, file))
    }

    /// To a registry; where it went.
    async fn to_registry(
        &self,
        text: &str,
        facts: &Facts,
        sources: &Sources,
        credentials: &Credentials,
        bars: &Bars,
    ) -> Result<String, CliError> {
        let what = self.archive.display().to_string();
        let (registry, repository, reference) =
            split_oci(text).map_err(|why| CliError::Usage(format!("{}: {why}", self.dest)))?;
        let place = sources.repository(&registry, &repository, credentials).await?;
        let subject = match facts.manifest.filter(|_| !self.no_subject) {
            None => None,
            Some(manifest) => match place.subject(&manifest).await {
                Ok(subject) => Some(subject),
                Err(SourceError::NotFound { .. }) => {
                    return Err(CliError::NotFound(format!(
                        "{}@{manifest}, the image that {what} was made of, is not there; push the image first, or \
                         give --no-subject and a tag",
                        place.name()
                    )));
                }
                Err(error) => return Err(error.into()),
            },
        };
        let tag = match reference {
            Some(ArtifactRef::Digest(digest)) if subject.as_ref().is_some_and(|s| s.digest == digest) => None,
            Some(ArtifactRef::Digest(digest)) => {
                return Err(CliError::Usage(format!(
                    "{what} was not made of the image {digest}; name the repository, or a tag"
                )));
            }
            Some(ArtifactRef::Tag(tag)) => self.free_tag(&place, tag, subject.is_some()).await?,
            None => None,
        };
        if tag.is_none() && subject.is_none() {
            return Err(CliError::Usage(format!("{what} refers to no image; name it by a tag: {}:TAG", place.name())));
        }
        if let (Some(_), Some((host, path, _))) = (&subject, &facts.layers) {
            let bare = host.trim_start_matches("https://").trim_start_matches("http://");
            if (bare, path.as_str()) != (registry.as_str(), repository.as_str()) {
                eprintln!(
                    "clip-csi: warning: {what} fetches its layers from {bare}/{path}: nodes take an index only beside the \
                     image that it was made of there; index the image in {}",
                    place.name()
                );
            }
        }
        let modified = tokio::fs::metadata(&self.archive).await.and_then(|meta| meta.modified());
        let labels = Labels {
            title: self.archive.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            platform: facts.platform.clone(),
            image: facts.manifest,
            span: facts.span,
            // The file's own time, so that pushing it twice makes one artifact.
            created: modified.ok(),
        };
        let size = tokio::fs::metadata(&self.archive).await.map(|meta| meta.len()).ok();
        let id = bars.begin(&what, size);
        let advance = |bytes| bars.advance(id, bytes);
        let pushed =
            place.push(&self.archive, facts.version, &labels, subject.as_ref(), tag.as_deref(), &advance).await?;
        bars.end(id);
        let beside = subject.map(|subject| format!(", beside the image {}", subject.digest)).unwrap_or_default();
        Ok(format!("oci://{}@{}{beside}", place.name(), pushed.digest))
    }

    /// The tag, if an archive may have it. A tag that names an image stays with the image: the archive is found beside it.
    async fn free_tag(&self, place: &Repository, tag: String, beside: bool) -> Result<Option<String>, CliError> {
        let named = format!("{}:{tag}", place.name());
        match place.artifact(&ArtifactRef::Tag(tag.clone())).await {
            Ok(_) if self.create_only => Err(SourceError::Exists { what: named }.into()),
            Ok(_) | Err(SourceError::NotFound { .. }) => Ok(Some(tag)),
            Err(SourceError::Invalid { .. }) if beside => Ok(None),
            Err(SourceError::Invalid { .. }) => {
                Err(CliError::Usage(format!("{named} is not an archive and is not replaced; choose another tag")))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// `registry/repository…` without the `oci://` that may stand before it; `None`: S3 or a path. Without `oci://` what
/// begins with a host's name is a registry, unless it can only be a path or is one that exists.
fn repository_of(dest: &str) -> Option<&str> {
    if let Some(rest) = dest.strip_prefix("oci://") {
        return Some(rest);
    }
    let (host, rest) = dest.split_once('/')?;
    let like_a_host = host == "localhost" || host.trim_matches('.').contains(['.', ':']);
    let like_a_path = rest.is_empty() || dest.ends_with(['/']) || dest.ends_with(".clip") || dest.contains("://");
    (like_a_host && !like_a_path && !host.starts_with('.') && !std::path::Path::new(host).exists()).then_some(dest)
}

#[cfg(test)]
mod tests {
    use super::repository_of;

    #[test]
    fn a_registry_is_told_from_a_path() {
        for (dest, want) in [
            ("oci://ghcr.io/a/b", Some("ghcr.io/a/b")),
            ("ghcr.io/a/b:t", Some("ghcr.io/a/b:t")),
            ("localhost/a", Some("localhost/a")),
            ("127.0.0.1:5000/a/b", Some("127.0.0.1:5000/a/b")),
            ("[::1]:5000/a", Some("[::1]:5000/a")),
            ("s3://b.c/k", None),
            ("file:///a.b/c", None),
            ("./a.b/c", None),
            ("../a", None),
            ("/a.b/c", None),
            ("a.b/c.clip", None),
            ("a.b/", None),
            ("a/b", None),
            ("a.clip", None),
        ] {
            assert_eq!(repository_of(dest), want, "{dest}");
        }
    }
}
