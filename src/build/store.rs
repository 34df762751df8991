//! The archive store: content-addressed archives and one record per volume, in a directory or in S3.
//!
//! ```text
//! <store>/archives/<manifest digest>-<platform>-v<N>.clip
//! <store>/volumes/<id>.json
//! ```
//! Objects are written once and never changed, so nodes and controllers need no coordination beyond "create if absent".

use std::io::Write as _;
use std::path::Path;

use futures::TryStreamExt as _;
use serde::{Deserialize, Serialize};

use super::BuildError;
use crate::archive::Version;
use crate::source::{Credentials, Location, SourceError, Sources};
use crate::units::{Digest, Platform};

/// A record is a few hundred bytes; anything larger was not written here.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// One record per provisioned volume: `volumes/<id>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeRecord {
    /// `v1-` and 32 hex digits.
    pub id: String,
    /// The name that CreateVolume was called with.
    pub name: String,
    /// SHA-256 over the parameters.
    pub parameters: Digest,
    /// The image as it was named, where it was an image.
    pub image: Option<String>,
    /// The manifest's digest, once known.
    pub manifest_digest: Option<Digest>,
    /// Location of the archive: a name below the store, or the archive as it was named.
    pub archive: Option<String>,
    /// Seconds since the epoch.
    pub created: u64,
}

/// A shared store of archives and records. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ArchiveStore {
    root: Location,
    sources: Sources,
}

impl ArchiveStore {
    /// `url`: `file:///dir` or `s3://bucket/prefix[?endpoint=URL&region=R&path-style=true]`. Touches nothing yet.
    pub fn open(url: &str, sources: Sources) -> Result<Self, BuildError> {
        let root = Location::parse_archive(url)?;
        match root {
            Location::File(_) | Location::S3 { .. } => Ok(Self { root, sources: sources.trusted() }),
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
        match &self.root {
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

    /// Creates a record if absent; the record that is there otherwise.
    pub async fn create_record(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        let io = |e: std::io::Error| BuildError::io("writing a volume record", &e);
        let mut file = tempfile::NamedTempFile::new().map_err(io)?;
        file.write_all(&serde_json::to_vec_pretty(record).map_err(std::io::Error::from).map_err(io)?).map_err(io)?;
        file.flush().map_err(io)?;
        let name = record_name(&record.id).ok_or_else(|| SourceError::Invalid {
            what: format!("volume id {:?}", record.id),
            detail: "an id is v1- and 32 hex digits".into(),
        })?;
        // A deletion between the two steps makes room again: ask once more before giving up.
        for _ in 0..2 {
            if self.create(&name, file.path()).await? {
                return Ok(None);
            }
            if let Some(existing) = self.record(&record.id).await? {
                return Ok(Some(existing));
            }
        }
        let (what, detail) =
            (format!("volume record {}", record.id), "it is created and deleted by others; retry".into());
        Err(BuildError::Io { what, detail })
    }

    /// Reads a record; `None` where there is none, or where the id is none of ours.
    pub async fn record(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError> {
        let Some(name) = record_name(id) else { return Ok(None) };
        let location = self.location(&name);
        let read = async {
            let source = self.sources.open(&location, &Credentials::default()).await?;
            let size = source.stat().await?.size;
            let what = source.describe();
            if size > MAX_RECORD_BYTES {
                let detail = format!("{size} bytes are no volume record; delete it or use another store");
                return Err(SourceError::Corrupt { what, detail });
            }
            let bytes = source.read_range(0..size).await?;
            serde_json::from_slice(&bytes).map_err(|e| SourceError::Corrupt { what, detail: e.to_string() })
        };
        match read.await {
            Ok(record) => Ok(Some(record)),
            Err(SourceError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes a record; absent is fine.
    pub async fn delete_record(&self, id: &str) -> Result<(), BuildError> {
        let Some(name) = record_name(id) else { return Ok(()) };
        Ok(self.sources.delete(&self.location(&name), &Credentials::default()).await?)
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

/// The name of a record. Ids come from callers: one that we can't have made names nothing, least of all another path.
fn record_name(id: &str) -> Option<String> {
    let digits = id.strip_prefix("v1-")?;
    let ours = digits.len() == 32 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    ours.then(|| format!("volumes/{id}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_volume_id_names_no_record() {
        assert_eq!(
            record_name(&format!("v1-{}", "0f".repeat(16))),
            Some(format!("volumes/v1-{}.json", "0f".repeat(16)))
        );
        for id in ["", "v1-", "v1-../../../../etc/passwd", "../v1-00", &format!("v1-{}", "0F".repeat(16))] {
            assert_eq!(record_name(id), None, "{id}");
        }
    }

    #[test]
    fn archive_names_tell_manifest_platform_and_version() {
        let digest = Digest([0xab; 32]);
        let platform: Platform = "linux/arm64/v8".parse().unwrap();
        let name = ArchiveStore::archive_name(&digest, &platform, Version::V2);
        assert_eq!(name, format!("archives/{}-linux-arm64-v8-v2.clip", "ab".repeat(32)));
    }
}
