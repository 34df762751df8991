//! What the services need of the rest of the driver, as traits, so that they are tested without mounts and networks.

use std::fmt::Debug;
use std::path::Path;

use async_trait::async_trait;

use super::volume_context::{VolumeSource, archive_url};
use crate::build::BuildError;
use crate::build::provider::{Provided, Provider, Request};
#[cfg(doc)]
use crate::build::store::Records;
use crate::build::store::{ArchiveStore, VolumeRecord};
use crate::mount::{MountError, MountManager, MountSpec, Published, Recovery, TargetSpec, VolumeStats};
use crate::source::ImageRef;

/// Mounts and targets: [`MountManager`], or a fake.
#[async_trait]
pub trait Mounts: Send + Sync + Debug {
    /// See [`MountManager::publish`].
    async fn publish(&self, spec: &MountSpec, target: &TargetSpec) -> Result<Published, MountError>;
    /// See [`MountManager::unpublish`].
    async fn unpublish(&self, target: &Path) -> Result<(), MountError>;
    /// See [`MountManager::stats`].
    async fn stats(&self, target: &Path) -> Result<VolumeStats, MountError>;
    /// See [`MountManager::recover`].
    async fn recover(&self) -> Recovery;
    /// See [`MountManager::shutdown`].
    async fn shutdown(&self);
}

#[async_trait]
impl Mounts for MountManager {
    async fn publish(&self, spec: &MountSpec, target: &TargetSpec) -> Result<Published, MountError> {
        self.publish(spec, target).await
    }
    async fn unpublish(&self, target: &Path) -> Result<(), MountError> {
        self.unpublish(target).await
    }
    async fn stats(&self, target: &Path) -> Result<VolumeStats, MountError> {
        self.stats(target).await
    }
    async fn recover(&self) -> Recovery {
        self.recover().await
    }
    async fn shutdown(&self) {
        self.shutdown().await;
    }
}

/// Archives of images: [`Provider`], or a fake.
#[async_trait]
pub trait Images: Send + Sync + Debug {
    /// See [`Provider::provide`]. Dropping the future loses nothing.
    async fn provide(&self, request: &Request) -> Result<Provided, BuildError>;
    /// See [`Provider::content_bytes`].
    async fn content_bytes(&self, provided: &Provided) -> Result<u64, BuildError>;
    /// See [`Provider::progress`].
    fn progress(&self, image: &ImageRef) -> Option<String>;
}

/// How far a build is, where the volume is an image and one runs.
pub(super) fn progress(images: &dyn Images, source: &VolumeSource) -> Option<String> {
    match source {
        VolumeSource::Image(image) => images.progress(image),
        VolumeSource::Archive(_) => None,
    }
}

/// The message of the Event `ArchiveBuilding`, where a call gave up waiting for a build that goes on.
pub(super) fn building(status: &tonic::Status, images: &dyn Images, source: &VolumeSource) -> Option<String> {
    let running = progress(images, source).filter(|_| status.code() == tonic::Code::Aborted)?;
    Some(format!("the archive of {source} is being built: {running}; the volume follows when that is done"))
}

#[async_trait]
impl Images for Provider {
    async fn provide(&self, request: &Request) -> Result<Provided, BuildError> {
        self.provide(request).await
    }
    async fn content_bytes(&self, provided: &Provided) -> Result<u64, BuildError> {
        self.content_bytes(provided).await
    }
    fn progress(&self, image: &ImageRef) -> Option<String> {
        self.progress(image)
    }
}

/// Records of volumes and the archives that they name: [`ArchiveStore`], or a fake.
#[async_trait]
pub trait Volumes: Send + Sync + Debug {
    /// See [`Records::create`].
    async fn create_record(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError>;
    /// See [`Records::get`].
    async fn record(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError>;
    /// See [`Records::delete`].
    async fn delete_record(&self, id: &str) -> Result<(), BuildError>;
    /// See [`ArchiveStore::put`].
    async fn put(&self, name: &str, file: Option<&Path>, image: &ImageRef) -> Result<(), BuildError>;
    /// The archive's location as the attribute `archive` names it; empty in a store beside images, where it has none.
    fn archive_url(&self, name: &str) -> String;
}

#[async_trait]
impl Volumes for ArchiveStore {
    async fn create_record(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        self.records().create(record).await
    }
    async fn record(&self, id: &str) -> Result<Option<VolumeRecord>, BuildError> {
        self.records().get(id).await
    }
    async fn delete_record(&self, id: &str) -> Result<(), BuildError> {
        self.records().delete(id).await
    }
    async fn put(&self, name: &str, file: Option<&Path>, image: &ImageRef) -> Result<(), BuildError> {
        self.put(name, file, image).await
    }
    fn archive_url(&self, name: &str) -> String {
        self.location(name).map(|location| archive_url(&location)).unwrap_or_default()
    }
}
