//! Records of volumes: the truth about what was provisioned. One per volume, created once, never changed.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::Write as _;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{below, last_part};
use crate::build::BuildError;
use crate::source::{Credentials, Location, SourceError, Sources};
use crate::units::Digest;

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
    /// Bytes of the image's files, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_bytes: Option<u64>,
    /// The volume's attributes, where the claim had a say in them: it may say something else later, the volume does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attributes: Option<BTreeMap<String, String>>,
}

/// Where the records of volumes are kept: objects beside the archives, or something from outside for a store that can't
/// hold them (a registry).
#[async_trait]
pub trait Records: Send + Sync + Debug {
    /// Creates a record if there is none of that id, atomically among all that write; else the one that is there.
    async fn create(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError>;
    /// Reads a record; `None` where there is none, or where the id is none of ours.
    async fn get(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError>;
    /// Deletes a record; absent is fine.
    async fn delete(&self, id: &str) -> Result<(), BuildError>;
    /// All records. One that can't be read is an error: the clean-up must not take its archive for one that nobody names.
    async fn list(&self) -> Result<Vec<VolumeRecord>, BuildError>;
}

/// Records as objects `volumes/<id>.json` below a directory or an S3 prefix.
#[derive(Debug, Clone)]
pub struct ObjectRecords {
    root: Location,
    sources: Sources,
}

impl ObjectRecords {
    /// `root`: a directory or an S3 prefix; `sources` must be the configuration's own ([`Sources::trusted`]).
    pub fn new(root: Location, sources: Sources) -> Self {
        Self { root, sources }
    }

    async fn read(&self, location: &Location) -> Result<Option<VolumeRecord>, BuildError> {
        let read = async {
            let source = self.sources.open(location, &Credentials::default()).await?;
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
}

#[async_trait]
impl Records for ObjectRecords {
    async fn create(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        let io = |e: std::io::Error| BuildError::io("writing a volume record", &e);
        let mut file = tempfile::NamedTempFile::new().map_err(io)?;
        file.write_all(&serde_json::to_vec_pretty(record).map_err(std::io::Error::from).map_err(io)?).map_err(io)?;
        file.flush().map_err(io)?;
        let name = record_name(&record.id).ok_or_else(|| SourceError::Invalid {
            what: format!("volume id {:?}", record.id),
            detail: "an id is v1- and 32 hex digits".into(),
        })?;
        let location = below(&self.root, &name);
        // A deletion between the two steps makes room again: ask once more before giving up.
        for _ in 0..2 {
            match self.sources.put(&location, file.path(), true, &Credentials::default(), &|_| {}).await {
                Ok(()) => return Ok(None),
                Err(SourceError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(existing) = self.read(&location).await? {
                return Ok(Some(existing));
            }
        }
        let (what, detail) =
            (format!("volume record {}", record.id), "it is created and deleted by others; retry".into());
        Err(BuildError::Io { what, detail })
    }

    async fn get(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError> {
        let Some(name) = record_name(id) else { return Ok(None) };
        self.read(&below(&self.root, &name)).await
    }

    async fn delete(&self, id: &str) -> Result<(), BuildError> {
        let Some(name) = record_name(id) else { return Ok(()) };
        Ok(self.sources.delete(&below(&self.root, &name), &Credentials::default()).await?)
    }

    async fn list(&self) -> Result<Vec<VolumeRecord>, BuildError> {
        let mut records = Vec::new();
        for location in self.sources.list(&below(&self.root, "volumes/"), &Credentials::default()).await? {
            let id = last_part(&location).and_then(|name| name.strip_suffix(".json"));
            // Temporary files of a write under way, and whatever else people put there, are no records.
            if id.and_then(record_name).is_none() {
                continue;
            }
            // One that was deleted since the listing is no record any more.
            records.extend(self.read(&location).await?);
        }
        Ok(records)
    }
}

/// The name of a record. Ids come from callers: one that we can't have made names nothing, least of all another path.
pub(super) fn record_name(id: &str) -> Option<String> {
    is_volume_id(id).then(|| format!("volumes/{id}.json"))
}

/// Whether a volume id is one of ours: `v1-` and 32 lower-case hex digits.
pub fn is_volume_id(id: &str) -> bool {
    let digits = id.strip_prefix("v1-").unwrap_or_default();
    digits.len() == 32 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Policy;

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

    fn record(digit: char) -> VolumeRecord {
        VolumeRecord {
            id: format!("v1-{}", String::from(digit).repeat(32)),
            name: "pvc".into(),
            parameters: Digest::of(b"p"),
            image: None,
            manifest_digest: None,
            archive: Some("archives/a.clip".into()),
            created: 1,
            image_bytes: None,
            attributes: None,
        }
    }

    #[tokio::test]
    async fn records_are_created_once_listed_and_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(Policy { trusted: true, ..Policy::default() }).unwrap();
        let records = ObjectRecords::new(Location::File(dir.path().to_owned()), sources);
        assert_eq!(records.list().await.unwrap(), []);
        let (a, b) = (record('a'), record('b'));
        assert_eq!(records.create(&a).await.unwrap(), None);
        let other = VolumeRecord { name: "other".into(), ..a.clone() };
        assert_eq!(records.create(&other).await.unwrap(), Some(a.clone()));
        assert_eq!(records.create(&b).await.unwrap(), None);
        std::fs::write(dir.path().join("volumes/.clip-put-x"), b"half").unwrap();
        assert_eq!(records.list().await.unwrap(), [a.clone(), b.clone()]);
        records.delete(&a.id).await.unwrap();
        records.delete(&a.id).await.unwrap();
        assert_eq!(records.get(&a.id).await.unwrap(), None);
        assert_eq!(records.list().await.unwrap(), [b]);
    }

    #[tokio::test]
    async fn a_damaged_record_fails_the_listing_instead_of_hiding_what_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(Policy { trusted: true, ..Policy::default() }).unwrap();
        let records = ObjectRecords::new(Location::File(dir.path().to_owned()), sources);
        records.create(&record('a')).await.unwrap();
        std::fs::write(dir.path().join(record_name(&record('a').id).unwrap()), b"{").unwrap();
        assert!(records.list().await.is_err());
    }
}
