//! Records of volumes as ConfigMaps in our own namespace, for an archive store that has no place for them.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;

use super::{ConfigMap, KubeApi, KubeError, PREFIX};
use crate::build::BuildError;
use crate::build::store::{Records, VolumeRecord, is_volume_id};
use crate::source::SourceError;

/// The key that holds the record.
const KEY: &str = "record.json";
/// A record is a few hundred bytes; anything larger was not written here.
const MAX_RECORD_BYTES: usize = 64 << 10;

/// One ConfigMap per volume: its name is the volume's id, its label `clip.csi.beam.cloud/volume-record` the driver's name.
#[derive(Debug, Clone)]
pub struct ConfigMapRecords {
    api: Arc<dyn KubeApi>,
    driver: String,
}

impl ConfigMapRecords {
    /// The records of one driver.
    pub fn new(api: Arc<dyn KubeApi>, driver: &str) -> Self {
        Self { api, driver: driver.to_owned() }
    }

    fn label() -> String {
        format!("{PREFIX}volume-record")
    }

    fn parse(map: &ConfigMap) -> Result<VolumeRecord, BuildError> {
        let corrupt = |detail: String| SourceError::Corrupt { what: format!("configmap {}", map.name), detail };
        let text = map.data.get(KEY).filter(|text| text.len() <= MAX_RECORD_BYTES);
        let text = text.ok_or_else(|| corrupt(format!("it holds no {KEY} of a volume record; delete it")))?;
        let record: VolumeRecord = serde_json::from_str(text).map_err(|error| corrupt(error.to_string()))?;
        if record.id != map.name {
            return Err(corrupt("it holds the record of another volume; delete it".into()).into());
        }
        Ok(record)
    }
}

/// Where a record can't be read or written, the kind of the failure stays; the code that a caller sees follows from it.
fn failed(error: KubeError) -> BuildError {
    let what = "volume records in the Kubernetes API".to_owned();
    let detail = error.to_string();
    let error = match error {
        KubeError::Denied { .. } => SourceError::Denied { what, detail },
        KubeError::Unavailable { .. } => SourceError::Unavailable { what, tries: 1, detail },
        _ => SourceError::Io { what, detail },
    };
    error.into()
}

#[async_trait]
impl Records for ConfigMapRecords {
    async fn create(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        let what = || format!("volume record {}", record.id);
        if !is_volume_id(&record.id) {
            let detail = "an id is v1- and 32 hex digits".into();
            return Err(SourceError::Invalid { what: what(), detail }.into());
        }
        let json = serde_json::to_string_pretty(record)
            .map_err(|error| BuildError::Io { what: what(), detail: error.to_string() })?;
        let managed = ("app.kubernetes.io/managed-by".to_owned(), "clip-csi".to_owned());
        let map = ConfigMap {
            name: record.id.clone(),
            labels: BTreeMap::from([(Self::label(), self.driver.clone()), managed]),
            data: BTreeMap::from([(KEY.to_owned(), json)]),
        };
        // A deletion between the two steps makes room again: ask once more before giving up.
        for _ in 0..2 {
            if self.api.create_config_map(&map).await.map_err(failed)? {
                return Ok(None);
            }
            if let Some(existing) = self.get(&record.id).await? {
                return Ok(Some(existing));
            }
        }
        Err(BuildError::Io { what: what(), detail: "it is created and deleted by others; retry".into() })
    }

    async fn get(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError> {
        if !is_volume_id(id) {
            return Ok(None);
        }
        self.api.config_map(id).await.map_err(failed)?.as_ref().map(Self::parse).transpose()
    }

    async fn delete(&self, id: &str) -> Result<(), BuildError> {
        if !is_volume_id(id) {
            return Ok(());
        }
        self.api.delete_config_map(id).await.map_err(failed)
    }

    async fn list(&self) -> Result<Vec<VolumeRecord>, BuildError> {
        let maps = self.api.config_maps(&Self::label(), &self.driver).await.map_err(failed)?;
        maps.iter().map(Self::parse).collect()
    }
}
