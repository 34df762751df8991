//! The archive store: content-addressed archives, shared by nodes and controllers, in a directory, in S3 or in a registry.
//!
//! ```text
//! file, S3:        <store>/archives/<manifest digest>-<platform>-v<N>.clip     the archive, written once, never changed
//!                  <store>/uses/<the same>                                     written whenever a volume is made of it
//!                  <store>/doomed/<the same>                                   while it is being collected
//!                  <store>/volumes/<id>.json                                   one record per volume
//! oci://host/repo  tag <manifest digest>-<platform>-v<N>                       an artifact whose layer is the archive
//! referrer         an artifact in the image's own repository that refers to the image's manifest
//! ```
//! Nodes and controllers need no coordination beyond "create if absent"; see `shelf` for how archives go again.

mod collect;
mod facts;
mod objects;
mod records;
mod registry;
mod shelf;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::BuildError;
use crate::archive::Version;
use crate::source::{ArtifactRef, Credentials, ImageRef, Labels, Location, SourceError, Sources, split_oci};
use crate::units::{Digest, Platform};
pub use collect::Collected;
pub use facts::Facts;
use objects::Objects;
pub use records::{ObjectRecords, Records, VolumeRecord, is_volume_id};
use registry::Tags;
pub use registry::download;
use shelf::Shelf;

/// What the configuration calls the store beside each image.
const REFERRER: &str = "referrer";

/// Where archives are kept.
#[derive(Debug, Clone)]
enum Place {
    /// A directory or an S3 prefix.
    Objects(Location),
    /// Tags of one repository.
    Repository { registry: String, repository: String },
    /// Each beside its image.
    Referrer,
}

/// A shared store of archives and records. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ArchiveStore {
    place: Place,
    sources: Sources,
    records: Arc<dyn Records>,
}

impl ArchiveStore {
    /// `url`: `file:///dir`, `s3://bucket/prefix[?endpoint=URL&region=R&path-style=true]`, `oci://host/repository`, or
    /// `referrer`: beside each image, in the image's own repository. Touches nothing yet. A store in a registry keeps no
    /// records of volumes: see [`Self::with_records`].
    pub fn open(url: &str, sources: Sources) -> Result<Self, BuildError> {
        let sources = sources.trusted();
        let place = Place::parse(url)?;
        let records: Arc<dyn Records> = match &place {
            Place::Objects(root) => Arc::new(ObjectRecords::new(root.clone(), sources.clone())),
            Place::Repository { .. } | Place::Referrer => Arc::new(NoRecords),
        };
        Ok(Self { place, sources, records })
    }

    /// Checks what [`Self::open`] would be given.
    pub fn check(url: &str) -> Result<(), SourceError> {
        Place::parse(url).map(drop)
    }

    /// `<manifest digest>-<os>-<arch>[-<variant>]-v<N>.clip`: the file name of an archive, here and on nodes.
    pub fn file_name(manifest: &Digest, platform: &Platform, version: Version) -> String {
        let platform = platform.to_string().replace('/', "-");
        let version = match version {
            Version::V1 => 1,
            Version::V2 => 2,
        };
        format!("{}-{platform}-v{version}.clip", manifest.hex())
    }

    /// The name of an archive below the store: `archives/` and [`Self::file_name`].
    pub fn archive_name(manifest: &Digest, platform: &Platform, version: Version) -> String {
        format!("archives/{}", Self::file_name(manifest, platform, version))
    }

    /// The platform in an archive's name; `None`: no name of ours.
    pub fn platform_of(name: &str) -> Option<Platform> {
        manifest_of(name.rsplit('/').next().unwrap_or(name)).and_then(|(_, platform, _)| platform)
    }

    /// Where a name lies, whether it exists or not; `None` in a store beside images, where only the image says it.
    pub fn location(&self, name: &str) -> Option<Location> {
        match &self.place {
            Place::Objects(root) => Some(below(root, name)),
            Place::Repository { registry, repository } => Some(Location::Artifact {
                registry: registry.clone(),
                repository: repository.clone(),
                reference: ArtifactRef::Tag(tag_of(name).to_owned()),
            }),
            Place::Referrer => None,
        }
    }

    /// Where an archive lies, if the store holds it. A store beside images holds none by name: whoever has the image looks
    /// for what refers to it.
    pub async fn find(&self, name: &str) -> Result<Option<Location>, BuildError> {
        let Some(location) = self.location(name) else { return Ok(None) };
        let stat = async { self.sources.open(&location, &Credentials::default()).await?.stat().await };
        match stat.await {
            Ok(_) => Ok(Some(location)),
            Err(SourceError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Fetches an archive to a local file (temporary + rename); false: not there.
    pub async fn fetch(&self, location: &Location, to: &Path) -> Result<bool, BuildError> {
        let fetched = match location {
            Location::Artifact { registry, repository, reference } => {
                let fetch = async {
                    let repository = self.sources.repository(registry, repository, &Credentials::default()).await?;
                    let artifact = repository.artifact(reference).await?;
                    download(&repository, &artifact, to, &|_| {}).await
                };
                fetch.await
            }
            other => objects::fetch(&self.sources, other, to).await,
        };
        match fetched {
            Ok(()) => Ok(true),
            Err(BuildError::Source(SourceError::NotFound { .. })) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes sure that the store holds an archive, and keeps it from being collected until a record names it: there already
    /// is fine, names are content addresses. `file`: where this machine has it. `image`: what it was made of.
    pub async fn put(&self, name: &str, file: Option<&Path>, image: &ImageRef) -> Result<(), BuildError> {
        match self.shelf() {
            Some(shelf) => shelf::put(shelf.as_ref(), name, file).await,
            None => registry::put_beside(&self.sources, name, file, image).await,
        }
    }

    /// Collects archives that no record names and that were last put more than `grace` before `now`. Safe beside other
    /// controllers that put, record and collect. Does nothing in a store beside images: archives there go with the image.
    pub async fn collect(&self, now: SystemTime, grace: Duration) -> Result<Collected, BuildError> {
        match self.shelf() {
            Some(shelf) => collect::collect(shelf.as_ref(), self.records.as_ref(), now, grace).await,
            None => Ok(Collected::default()),
        }
    }

    fn shelf(&self) -> Option<Box<dyn Shelf>> {
        match &self.place {
            Place::Objects(root) => Some(Box::new(Objects::new(root.clone(), self.sources.clone()))),
            Place::Repository { registry, repository } => {
                Some(Box::new(Tags::new(registry, repository, self.sources.clone())))
            }
            Place::Referrer => None,
        }
    }

    /// Whether records of volumes must be kept elsewhere: in a registry there is no place for them.
    pub fn needs_records(&self) -> bool {
        !matches!(self.place, Place::Objects(_))
    }

    /// Whether it keeps records of volumes itself, as a directory and S3 do; a registry has no place for them.
    pub fn keeps_records(&self) -> bool {
        matches!(self.place, Place::Objects(_))
    }

    /// Keeps the records of volumes elsewhere than beside the archives.
    #[must_use]
    pub fn with_records(self, records: Arc<dyn Records>) -> Self {
        Self { records, ..self }
    }

    /// The records of volumes.
    pub fn records(&self) -> &dyn Records {
        self.records.as_ref()
    }
}

impl Place {
    fn parse(url: &str) -> Result<Self, SourceError> {
        let invalid = |detail: &str| SourceError::Invalid {
            what: format!("archive store {:?}", url.chars().take(200).collect::<String>()),
            detail: format!("{detail}; write file:///dir, s3://bucket/prefix, oci://host/repository or {REFERRER}"),
        };
        if url == REFERRER {
            return Ok(Self::Referrer);
        }
        if let Some(rest) = url.strip_prefix("oci://") {
            return match split_oci(rest).map_err(|e| invalid(&e))? {
                (registry, repository, None) => Ok(Self::Repository { registry, repository }),
                (.., Some(_)) => Err(invalid("names one artifact, a store is a repository")),
            };
        }
        if !url.contains("://") {
            return Err(invalid("is no URL"));
        }
        match Location::parse_archive(url).map_err(|_| invalid("is not known"))? {
            root @ (Location::File(_) | Location::S3 { .. }) => Ok(Self::Objects(root)),
            Location::Registry { .. } | Location::Artifact { .. } | Location::Layout { .. } => {
                Err(invalid("is no place for archives"))
            }
        }
    }
}

/// What an archive's manifest says in a registry, as far as its name and the archive tell.
fn labels(name: &str, facts: Option<&Facts>) -> Labels {
    let title = name.rsplit('/').next().unwrap_or(name).to_owned();
    let named = manifest_of(&title).map(|(digest, platform, _)| (digest, platform));
    let (image, platform) = named.unzip();
    Labels { title, platform: platform.flatten(), image, span: facts.and_then(|facts| facts.span), created: None }
}

/// Manifest, platform and version of an archive's file name; `None`: no name of ours.
fn manifest_of(file_name: &str) -> Option<(Digest, Option<Platform>, Version)> {
    let stem = file_name.strip_suffix(".clip")?;
    let (stem, version) = match stem.rsplit_once("-v")? {
        (stem, "1") => (stem, Version::V1),
        (stem, "2") => (stem, Version::V2),
        _ => return None,
    };
    let (hex, platform) = stem.split_once('-')?;
    let ours = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let digest = format!("sha256:{hex}").parse().ok().filter(|_| ours)?;
    Some((digest, platform.replacen('-', "/", 2).parse().ok(), version))
}

/// The tag of a name: the file's name, without its ending.
fn tag_of(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.strip_suffix(".clip").unwrap_or(file)
}

/// A name below a directory or an S3 prefix.
fn below(root: &Location, name: &str) -> Location {
    match root {
        Location::S3 { endpoint, region, bucket, key, path_style } => Location::S3 {
            endpoint: endpoint.clone(),
            region: region.clone(),
            bucket: bucket.clone(),
            key: match key.trim_end_matches('/') {
                "" => name.to_owned(),
                prefix => format!("{prefix}/{name}"),
            },
            path_style: *path_style,
        },
        Location::File(dir) | Location::Layout { dir, .. } => Location::File(dir.join(name)),
        // `Place` admits no other.
        Location::Registry { .. } | Location::Artifact { .. } => Location::File(name.into()),
    }
}

/// The last part of a location's path or key.
fn last_part(location: &Location) -> Option<&str> {
    match location {
        Location::File(path) => path.file_name()?.to_str(),
        Location::S3 { key, .. } => key.rsplit('/').next(),
        Location::Registry { .. } | Location::Artifact { .. } | Location::Layout { .. } => None,
    }
}

/// A registry has no place for records.
#[derive(Debug)]
struct NoRecords;

fn no_records<T>() -> Result<T, BuildError> {
    Err(BuildError::Io {
        what: "records of volumes".into(),
        detail: "an archive store in a registry keeps none; run the controller in a cluster, where it keeps them in \
                 ConfigMaps, or use a store in S3"
            .into(),
    })
}

#[async_trait]
impl Records for NoRecords {
    async fn create(&self, _: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        no_records()
    }
    async fn get(&self, _: &str) -> Result<Option<VolumeRecord>, BuildError> {
        no_records()
    }
    async fn delete(&self, _: &str) -> Result<(), BuildError> {
        no_records()
    }
    async fn list(&self) -> Result<Vec<VolumeRecord>, BuildError> {
        no_records()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_names_tell_manifest_platform_and_version() {
        let digest = Digest([0xab; 32]);
        let platform: Platform = "linux/arm64/v8".parse().unwrap();
        let name = ArchiveStore::archive_name(&digest, &platform, Version::V2);
        assert_eq!(name, format!("archives/{}-linux-arm64-v8-v2.clip", "ab".repeat(32)));
        assert_eq!(tag_of(&name), format!("{}-linux-arm64-v8-v2", "ab".repeat(32)));
        let file = ArchiveStore::file_name(&digest, &platform, Version::V2);
        assert_eq!(manifest_of(&file), Some((digest, Some(platform), Version::V2)));
        let plain: Platform = "linux/amd64".parse().unwrap();
        let file = ArchiveStore::file_name(&digest, &plain, Version::V1);
        assert_eq!(manifest_of(&file), Some((digest, Some(plain), Version::V1)));
        for foreign in ["python.clip", "latest", "ab-linux-amd64-v2.clip", &file.to_uppercase(), &file[..70]] {
            assert_eq!(manifest_of(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_store_is_a_place_not_an_archive() {
        for good in
            ["file:///srv/clip", "s3://b/p", "s3://b", "oci://ghcr.io/a/b", "oci://127.0.0.1:5000/a", "referrer"]
        {
            ArchiveStore::check(good).unwrap();
        }
        for bad in ["", "/srv", "oci://ghcr.io/a/b:t", "oci://a/b", "oci:dir", "https://h/a", "referrers", "s3:///k"] {
            let error = ArchiveStore::check(bad).unwrap_err().to_string();
            assert!(error.contains("oci://host/repository"), "{bad}: {error}");
        }
    }
}
