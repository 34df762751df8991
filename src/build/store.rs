//! The archive store: content-addressed archives and one record per volume, in a directory or in S3.
//!
//! ```text
//! <store>/archives/<manifest digest>-<platform>-v<N>.clip
//! <store>/volumes/<id>.json
//! ```
//! Objects are written once and never changed, so nodes and controllers need no coordination beyond "create if absent".

mod records;

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use super::BuildError;
use crate::archive::Version;
use crate::source::{Credentials, Location, SourceError, Sources};
use crate::units::{Digest, Platform};
use futures::TryStreamExt as _;
pub use records::{ObjectRecords, Records, VolumeRecord, is_volume_id};

/// A shared store of archives and records. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ArchiveStore {
    root: Location,
    sources: Sources,
    records: Arc<dyn Records>,
}

impl ArchiveStore {
    /// `url`: `file:///dir` or `s3://bucket/prefix[?endpoint=URL&region=R&path-style=true]`. Touches nothing yet.
    pub fn open(url: &str, sources: Sources) -> Result<Self, BuildError> {
        let root = Location::parse_archive(url)?;
        match root {
            Location::File(_) | Location::S3 { .. } => {
                let sources = sources.trusted();
                let records = Arc::new(ObjectRecords::new(root.clone(), sources.clone()));
                Ok(Self { root, sources, records })
            }
            Location::Registry { .. } | Location::Layout { .. } => {
                let detail = "an archive store is file:///dir or s3://bucket/prefix".into();
                Err(SourceError::Invalid { what: format!("archive store {url}"), detail }.into())
            }
        }
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

    /// The location of a name below the store, whether it exists or not.
    pub fn location(&self, name: &str) -> Location {
        below(&self.root, name)
    }

    /// Whether the store holds something under this name.
    pub async fn contains(&self, name: &str) -> Result<bool, BuildError> {
        let stat = async { self.sources.open(&self.location(name), &Credentials::default()).await?.stat().await };
        match stat.await {
            Ok(_) => Ok(true),
            Err(SourceError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Fetches an archive to a local file (temporary + rename); false: not there.
    pub async fn fetch(&self, name: &str, to: &Path) -> Result<bool, BuildError> {
        let stream = async {
            let source = self.sources.open(&self.location(name), &Credentials::default()).await?;
            source.stat().await?;
            source.stream(0).await
        };
        let mut stream = match stream.await {
            Ok(stream) => stream,
            Err(SourceError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let dir = to.parent().unwrap_or(Path::new("/"));
        let io = |e: std::io::Error| BuildError::io(format!("writing {}", to.display()), &e);
        let mut file = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
        while let Some(bytes) = stream.try_next().await? {
            file.write_all(&bytes).map_err(io)?;
        }
        file.as_file().sync_all().map_err(io)?;
        file.persist(to).map_err(|e| io(e.error))?;
        Ok(true)
    }

    /// Stores an archive under its name; there already: fine, names are content addresses.
    pub async fn put(&self, name: &str, file: &Path) -> Result<(), BuildError> {
        self.create(name, file).await.map(drop)
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

    /// Creates an object; false: it exists.
    async fn create(&self, name: &str, file: &Path) -> Result<bool, BuildError> {
        match self.sources.put(&self.location(name), file, true, &Credentials::default(), &|_| {}).await {
            Ok(()) => Ok(true),
            Err(SourceError::Exists { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
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
        // `open` admits no registry.
        Location::Registry { .. } => Location::File(name.into()),
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
    }
}
