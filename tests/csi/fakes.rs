//! Mounts, images and volumes that are only remembered.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use clip_csi::archive::Version;
use clip_csi::build::BuildError;
use clip_csi::build::provider::{Provided, Request};
use clip_csi::build::store::{ArchiveStore, Collected, VolumeRecord};
use clip_csi::csi::{Images, Mounts, Volumes};
use clip_csi::mount::{MountError, MountSpec, Published, Recovery, TargetSpec, VolumeStats};
use clip_csi::source::{ImageRef, Location, Scope, SourceError};
use clip_csi::units::Digest;
use tokio::sync::watch;

/// A gate that is open unless it was closed.
#[derive(Debug)]
pub struct Gate(watch::Sender<bool>);

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new(true))
    }
}

impl Gate {
    pub fn close(&self) {
        self.0.send_replace(false);
    }
    pub fn open(&self) {
        self.0.send_replace(true);
    }
    async fn pass(&self) {
        self.0.subscribe().wait_for(|open| *open).await.unwrap();
    }
}

/// Something happened that a test may wait for.
#[derive(Debug, Default)]
pub struct Happened(watch::Sender<()>);

impl Happened {
    fn tell(&self) {
        self.0.send_replace(());
    }

    /// Ready once `condition` holds. For a caller with a deadline.
    pub async fn until(&self, condition: impl Fn() -> bool) {
        let mut happened = self.0.subscribe();
        while !condition() {
            happened.changed().await.unwrap();
        }
    }
}

#[derive(Debug, Default)]
pub struct FakeMounts {
    pub happened: Happened,
    published: Mutex<HashMap<PathBuf, (MountSpec, TargetSpec)>>,
    pub publishing: Gate,
    pub recovering: Gate,
    recoveries: AtomicUsize,
    pub shut_down: AtomicBool,
    pub abnormal: Mutex<Option<String>>,
}

impl FakeMounts {
    pub fn recoveries(&self) -> usize {
        self.recoveries.load(Ordering::SeqCst)
    }
    pub fn at(&self, target: &str) -> Option<(MountSpec, TargetSpec)> {
        self.published.lock().unwrap().get(Path::new(target)).cloned()
    }
}

#[async_trait]
impl Mounts for FakeMounts {
    async fn publish(&self, spec: &MountSpec, target: &TargetSpec) -> Result<Published, MountError> {
        self.publishing.pass().await;
        let mut published = self.published.lock().unwrap();
        let before = published.insert(target.target.clone(), (spec.clone(), target.clone()));
        if let Some((_, there)) = &before
            && there.attributes != target.attributes
        {
            let path = target.target.clone();
            return Err(MountError::Conflict { path, detail: "image differs".into() });
        }
        drop(published);
        self.happened.tell();
        let detected_from = "storage info of type oci".into();
        Ok(Published { version: Version::V2, detected_from, already: before.is_some(), shared: false })
    }
    async fn unpublish(&self, target: &Path) -> Result<(), MountError> {
        self.published.lock().unwrap().remove(target);
        Ok(())
    }
    async fn stats(&self, target: &Path) -> Result<VolumeStats, MountError> {
        if !self.published.lock().unwrap().contains_key(target) {
            return Err(MountError::NotPublished { path: target.to_owned() });
        }
        Ok(VolumeStats { bytes: 4096, inodes: 7, abnormal: self.abnormal.lock().unwrap().clone() })
    }
    async fn recover(&self) -> Recovery {
        self.recoveries.fetch_add(1, Ordering::SeqCst);
        self.happened.tell();
        self.recovering.pass().await;
        Recovery::default()
    }
    async fn shutdown(&self) {
        self.shut_down.store(true, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
pub struct FakeImages {
    pub happened: Happened,
    pub building: Gate,
    pub requests: Mutex<Vec<Request>>,
    pub fails: Mutex<Option<SourceError>>,
    /// v2 can't be built: v1 is.
    pub falls_back: AtomicBool,
}

pub const MANIFEST: Digest = Digest([0xab; 32]);

impl FakeImages {
    pub fn asked(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn provide(&self, request: &Request) -> Result<Provided, BuildError> {
        self.requests.lock().unwrap().push(request.clone());
        self.happened.tell();
        self.building.pass().await;
        if let Some(error) = self.fails.lock().unwrap().clone() {
            return Err(error.into());
        }
        let version = if self.falls_back.load(Ordering::SeqCst) { Version::V1 } else { request.version };
        let file = ArchiveStore::file_name(&MANIFEST, &request.platform, version);
        Ok(Provided {
            location: Location::File(Path::new("/archives").join(file)),
            pin: None,
            manifest_digest: MANIFEST,
            scope: request.credentials.identity.map_or(Scope::Public, Scope::Private),
            from: "built",
        })
    }
    async fn content_bytes(&self, _: &Provided) -> Result<u64, BuildError> {
        Ok(123_456_789)
    }
    fn progress(&self, _: &ImageRef) -> Option<String> {
        Some("layer 2 of 5, 34 %".into())
    }
}

#[derive(Debug, Default)]
pub struct FakeVolumes {
    pub records: Mutex<BTreeMap<String, VolumeRecord>>,
    pub stored: Mutex<Vec<String>>,
}

#[async_trait]
impl Volumes for FakeVolumes {
    async fn create_record(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        let mut records = self.records.lock().unwrap();
        let there = records.get(&record.id).cloned();
        if there.is_none() {
            records.insert(record.id.clone(), record.clone());
        }
        Ok(there)
    }
    async fn record(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError> {
        Ok(self.records.lock().unwrap().get(id).cloned())
    }
    async fn delete_record(&self, id: &str) -> Result<(), BuildError> {
        self.records.lock().unwrap().remove(id);
        Ok(())
    }
    async fn collect(&self, _: SystemTime, _: Duration) -> Result<Collected, BuildError> {
        Ok(Collected::default())
    }
    async fn put(&self, name: &str, _: Option<&Path>, _: &ImageRef) -> Result<(), BuildError> {
        self.stored.lock().unwrap().push(name.to_owned());
        Ok(())
    }
    fn archive_url(&self, name: &str) -> String {
        format!("s3://store/{name}")
    }
}
