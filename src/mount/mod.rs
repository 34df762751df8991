//! Shared mounts, bind mounts, the journal of publishes, and recovery after a restart.
//!
//! One FUSE mount per [`MountKey`] and node, below `mounts_dir`; each target is a bind mount of it, or of a subPath of it.
//! The source column of all of them in mountinfo is `clip-csi:<installation>:<key>`: that is how they are known again.
//! `serve.rs` is the seam to the kernel filesystem, `sys.rs` the one to the mount system calls.

mod journal;
mod key;
mod locks;
mod manager;
mod recovery;
mod serve;
mod shared;
mod sys;
mod target;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::archive::Version;
use crate::build::provider::{Pin, Provider};
use crate::cache::Cache;
use crate::fs::{Integrity, OpenError, RootView};
use crate::source::{Credentials, Location, Sources};
use crate::units::Digest;

use manager::Inner;
use serve::{FuseServers, Server};

/// The `mounts` section of the configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct MountConfig {
    /// Where the shared mounts lie: `<kubeletDir>/plugins/<driver>/mounts`.
    pub mounts_dir: PathBuf,
    /// Where the journal of publishes lies. Default `/var/lib/clip-csi/volumes`.
    pub state_dir: PathBuf,
}

impl Default for MountConfig {
    fn default() -> Self {
        Self {
            mounts_dir: "/var/lib/kubelet/plugins/clip.csi.beam.cloud/mounts".into(),
            state_dir: "/var/lib/clip-csi/volumes".into(),
        }
    }
}

/// What can go wrong between an archive and a target path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The archive can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Something else is mounted at, or lies in, the target path.
    #[error("target path {path} is busy: {detail}")]
    Busy {
        /// The target.
        path: PathBuf,
        /// What is there, and the remedy.
        detail: String,
    },
    /// The directory that the target lies in is missing: making it is the caller's part.
    #[error("target path {path} can't be made: {detail}; create the parent directory and publish again")]
    NoParent {
        /// The target.
        path: PathBuf,
        /// The parent, and the system's words.
        detail: String,
    },
    /// The target is published already, from other parameters.
    #[error("target path {path} is published with other parameters: {detail}")]
    Conflict {
        /// The target.
        path: PathBuf,
        /// Which differ.
        detail: String,
    },
    /// The subPath does not lead to a directory or file of the image.
    #[error("subPath {sub_path:?}: {detail}")]
    SubPath {
        /// As given.
        sub_path: String,
        /// Why, and the remedy.
        detail: String,
    },
    /// The target is not published.
    #[error("{path} is not published by this driver")]
    NotPublished {
        /// The target.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{what}: {detail}")]
    Io {
        /// Operation and path.
        what: String,
        /// The system's words.
        detail: String,
    },
}

/// SHA-256 of (archive digest, credential scope, root view, integrity, SELinux context): see [`MountKey::of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MountKey(pub Digest);

/// Which filesystem to show.
#[derive(Debug, Clone)]
pub struct MountSpec {
    /// The archive. An archive of this node's own store is a `Location::File` with `pin` set.
    pub archive: Location,
    /// Set: the file was provided by [`Provider`] and is opened without asking the policy.
    pub pin: Option<Arc<Pin>>,
    /// Root view.
    pub root: RootView,
    /// Integrity.
    pub integrity: Integrity,
    /// Credential scope: "public" or a digest.
    pub scope: String,
    /// Credentials of the volume, for what has to be fetched later.
    pub credentials: Credentials,
}

impl MountSpec {
    /// The credentials that fetch the data, for all who share the mount. An image that everybody may pull is pulled as nobody: one pod's
    /// login is not spent on others, nor does its end take the data from them.
    fn lent(&self) -> Credentials {
        match self.pin {
            Some(_) if self.scope == "public" => Credentials::default(),
            _ => self.credentials.clone(),
        }
    }
}

/// Where to show it.
#[derive(Debug, Clone)]
pub struct TargetSpec {
    /// The CSI volume id.
    pub volume_id: String,
    /// The target path; missing: created (its parent must exist).
    pub target: PathBuf,
    /// Relative to the shown root; `None`: the root itself.
    pub sub_path: Option<String>,
    /// The volume's attributes as they were given, without secrets and tokens: kept in the journal, compared on a retry.
    pub attributes: BTreeMap<String, String>,
}

/// The outcome of a publish.
#[derive(Debug, Clone)]
pub struct Published {
    /// v1 or v2.
    pub version: Version,
    /// How that was told.
    pub detected_from: String,
    /// It was there already.
    pub already: bool,
    /// Another target shared the mount.
    pub shared: bool,
}

/// NodeGetVolumeStats. Taken from the index, never from the mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStats {
    /// Sum of file sizes in bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// `None`: healthy; else what is wrong, in words for `kubectl describe`.
    pub abnormal: Option<String>,
}

/// What recovery did at start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Targets bound again.
    pub rebound: Vec<PathBuf>,
    /// Dead mounts without a record, detached.
    pub detached: Vec<PathBuf>,
    /// Targets that could not be brought back, and why.
    pub failed: Vec<(PathBuf, String)>,
}

/// Owns all mounts of one node plugin. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MountManager(Arc<Inner>);

impl MountManager {
    /// Creates the directories (0700) and takes `state_dir` for this process. Mounts nothing.
    pub fn new(
        config: MountConfig,
        sources: Sources,
        cache: Arc<Cache>,
        provider: Provider,
    ) -> Result<Self, MountError> {
        Self::with_server(&config, Arc::new(FuseServers::new(sources, cache, provider)?))
    }

    fn with_server(config: &MountConfig, server: Arc<dyn Server>) -> Result<Self, MountError> {
        Ok(Self(Inner::new(config, server)?))
    }

    /// Publishes; idempotent; verified in mountinfo before and after; on failure nothing is left mounted.
    ///
    /// A target that is published already, from the same parameters, is checked and, should its mount have died, served
    /// and bound again. Runs to its end also when the caller gives up; a second call waits for the first.
    ///
    /// A mount's later fetches use the credentials of the last publish that joined it, after they were checked against the
    /// archive's place: a rotated secret reaches the mount with the next pod.
    pub async fn publish(&self, spec: &MountSpec, target: &TargetSpec) -> Result<Published, MountError> {
        let (inner, spec, target) = (self.0.clone(), spec.clone(), target.clone());
        self.0.run(async move { inner.publish(&spec, &target).await }).await
    }

    /// Unpublishes: target unmounted and removed, shared mount ended with its last target. Not published: Ok.
    ///
    /// Dead mounts, mounts of an earlier process and mounts without a record are detached as well; what other software
    /// has mounted on the target is [`MountError::Busy`] and stays. Cancels a publish that is still fetching.
    pub async fn unpublish(&self, target: &Path) -> Result<(), MountError> {
        let (inner, target) = (self.0.clone(), target.to_owned());
        self.0.run(async move { inner.unpublish(&target).await }).await
    }

    /// Statistics and condition of a published target, from the index and mountinfo: the mount itself is not asked.
    pub async fn stats(&self, target: &Path) -> Result<VolumeStats, MountError> {
        self.0.stats(target).await
    }

    /// Dead mounts of an earlier process: mounted again from the journal and rebound, or detached where no record is.
    ///
    /// Records hold no credentials: what comes back of a private image serves what the cache has and what the node's own
    /// credentials can fetch. May be called again, to try once more what failed; what is bound is left alone.
    pub async fn recover(&self) -> Recovery {
        recovery::recover(&self.0).await
    }

    /// For a plugin that is being stopped: refuses new work, gives up fetches, waits (at most 10 s) for mounts and unmounts in
    /// flight, and ends serving. Unpublishes nothing: pods outlive the plugin, so their targets stay bound and journaled. Until
    /// the next start they answer ENOTCONN; then [`Self::recover`] binds them again.
    pub async fn shutdown(&self) {
        self.0.shutdown().await;
    }
}

/// An [`MountError::Io`].
fn io_error(what: impl Into<String>, detail: impl std::fmt::Display) -> MountError {
    MountError::Io { what: what.into(), detail: detail.to_string() }
}
