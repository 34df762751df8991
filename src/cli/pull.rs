//! `clip-csi pull`: an archive out of a registry, by its own name or as what refers to an image.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::args::SourceArgs;
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::archive::Version;
use crate::build::BuildError;
use crate::build::progress::Progress;
use crate::build::store::{Facts, download};
use crate::source::{Artifact, ArtifactRef, ImageRef, Repository, ResolvedImage, SourceError};
use crate::units::Platform;

/// Fetch an archive from a registry
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi pull ghcr.io/acme/app:v3 -o app.clip        the index beside that image
  clip-csi pull ghcr.io/acme/rootfs:v1 -o rootfs.clip  an archive under a tag
  clip-csi pull oci://ghcr.io/acme/app@sha256:… -o app.clip

An index is taken if it was made of exactly that image; of several the newest. What is fetched is checked against its digest.")]
pub(super) struct PullArgs {
    /// An image, or an archive in a registry: registry/repository:tag or registry/repository@sha256:…
    #[arg(value_name = "REF|IMAGE")]
    reference: String,
    /// Write the archive here
    #[arg(short, long, value_name = "OUT.clip")]
    output: PathBuf,
    /// The platform, where the image has several [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    #[command(flatten)]
    sources: SourceArgs,
}

impl PullArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let image: ImageRef = self.reference.strip_prefix("oci://").unwrap_or(&self.reference).parse()?;
        let ImageRef::Registry { registry, repository, tag, digest } = &image else {
            let detail = "is in no registry; name registry/repository:tag or registry/repository@sha256:…";
            return Err(CliError::Usage(format!("{} {detail}", self.reference)));
        };
        let sources = self.sources.sources()?;
        let credentials = self.sources.credentials()?;
        let place = sources.repository(registry, repository, &credentials).await?;
        let reference = match digest {
            Some(digest) => ArtifactRef::Digest(*digest),
            None => ArtifactRef::Tag(tag.clone().unwrap_or_else(|| "latest".into())),
        };
        let bars = Bars::new(global);
        let artifact = match place.artifact(&reference).await {
            Ok(artifact) => {
                fetch(&place, &artifact, &self.output, &bars).await?;
                artifact
            }
            // Not an archive: an image, then, or an index of images.
            Err(SourceError::Invalid { .. }) => {
                let platform = self.platform.clone().unwrap_or_else(Platform::host);
                let image = sources.resolve(&image, &platform, &credentials).await?;
                beside(&place, &image, (registry.as_str(), repository.as_str()), &self.output, &bars).await?
            }
            Err(error) => return Err(error.into()),
        };
        drop(bars);
        let version = match artifact.version {
            Version::V1 => "v1",
            Version::V2 => "v2",
        };
        let (out, size) = (self.output.display(), human::bytes(artifact.size));
        let from = format!("oci://{}@{}", place.name(), artifact.digest);
        println!("{from} -> {out}: {version}, {size} in {}", human::duration(started.elapsed()));
        Ok(())
    }
}

async fn fetch(place: &Repository, artifact: &Artifact, out: &Path, bars: &Bars) -> Result<(), BuildError> {
    let id = bars.begin(&format!("{}@{}", place.name(), artifact.blob), Some(artifact.size));
    let fetched = download(place, artifact, out, &|bytes| bars.advance(id, bytes)).await;
    bars.end(id);
    fetched
}

/// The newest archive beside an image that is what it says: an index first, else an archive with its data.
async fn beside(
    place: &Repository,
    image: &ResolvedImage,
    (registry, repository): (&str, &str),
    out: &Path,
    bars: &Bars,
) -> Result<Artifact, CliError> {
    for version in [Version::V2, Version::V1] {
        for artifact in place.archives_of(&image.manifest_digest, version).await? {
            let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let io = |e: std::io::Error| CliError::io(format!("writing {}", out.display()), &e);
            let fetched = tempfile::Builder::new().prefix(".clip-pull-").tempfile_in(dir).map_err(io)?.into_temp_path();
            let looked_at = async {
                fetch(place, &artifact, &fetched, bars).await?;
                let facts = Facts::of(&fetched).await?;
                Ok(match version {
                    Version::V2 => facts.objection(image, registry, repository),
                    Version::V1 if facts.manifest == Some(image.manifest_digest) => None,
                    Version::V1 => Some("it was made of another manifest".into()),
                })
            };
            let objection = match looked_at.await {
                Ok(objection) => objection,
                // Damaged or gone: the next one may be whole. Anybody who may push can put one there.
                Err(
                    error @ (BuildError::Archive(_)
                    | BuildError::Source(
                        SourceError::NotFound { .. } | SourceError::Corrupt { .. } | SourceError::Invalid { .. },
                    )),
                ) => Some(error.to_string()),
                Err(error) => return Err(error.into()),
            };
            match objection {
                Some(why) => eprintln!("clip-csi: warning: {}@{} is not taken: {why}", place.name(), artifact.digest),
                None => {
                    fetched.persist(out).map_err(|e| io(e.error))?;
                    return Ok(artifact);
                }
            }
        }
    }
    Err(CliError::NotFound(format!(
        "no archive lies beside {}@{}; make one with `clip-csi index` and push it there",
        place.name(),
        image.manifest_digest
    )))
}
