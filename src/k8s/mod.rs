//! The Kubernetes API, as far as this driver needs it: claims and their classes, records of volumes in ConfigMaps, Events,
//! and the taint that keeps pods off a node until the driver is registered there.
//!
//! [`KubeApi`] is the seam: [`connect`] gives the real one, [`fake`] has one in memory that fails on request. Everything
//! works without: no volume needs the API to be mounted.

pub mod config;
pub mod events;
pub mod fake;
mod real;
pub mod records;
pub mod release;
pub mod taint;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

pub use config::KubeConfig;
pub use events::{Object, Recorder};
pub use real::connect;
pub use records::ConfigMapRecords;

/// The prefix of every label, annotation and taint of ours.
pub const PREFIX: &str = "clip.csi.beam.cloud/";

/// Why a call to the API failed. No message holds an object's content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KubeError {
    /// 404.
    #[error("{what} does not exist in the Kubernetes API")]
    NotFound {
        /// Verb and object.
        what: String,
    },
    /// 401, 403.
    #[error("{what}: the Kubernetes API refuses it: {detail}; give the service account the rights of docs/security.md")]
    Denied {
        /// Verb and object.
        what: String,
        /// The server's words.
        detail: String,
    },
    /// 409: there already, or changed since it was read.
    #[error("{what}: it was changed by somebody else meanwhile; try again")]
    Conflict {
        /// Verb and object.
        what: String,
    },
    /// Out of reach, too slow, or overloaded.
    #[error("{what}: the Kubernetes API does not answer: {detail}")]
    Unavailable {
        /// Verb and object.
        what: String,
        /// What happened.
        detail: String,
    },
    /// Refused as invalid, or an answer that can't be understood.
    #[error("{what}: {detail}")]
    Invalid {
        /// Verb and object.
        what: String,
        /// The server's words.
        detail: String,
    },
    /// The configuration can't be used.
    #[error("k8s.{key}: {detail}")]
    Config {
        /// The key in the `k8s` section.
        key: &'static str,
        /// What is wrong, and the remedy.
        detail: String,
    },
}

impl KubeError {
    /// The label `kind` of `clip_kube_errors_total`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Denied { .. } => "denied",
            Self::Conflict { .. } => "conflict",
            Self::Unavailable { .. } => "unavailable",
            Self::Invalid { .. } | Self::Config { .. } => "invalid",
        }
    }
}

/// What is read of a PersistentVolumeClaim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// Its uid: Events name it.
    pub uid: String,
    /// All annotations.
    pub annotations: BTreeMap<String, String>,
    /// The name of its StorageClass.
    pub storage_class: Option<String>,
    /// `ReadOnlyMany`, `ReadWriteOnce`, …
    pub access_modes: Vec<String>,
}

/// A node's taints, as they were at one version of the node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Taints {
    /// The version: a change of the node since then is a [`KubeError::Conflict`].
    pub resource_version: String,
    /// The taints as the API has them, so that a field that we don't know is not lost.
    pub taints: Vec<Value>,
}

/// A ConfigMap of ours, in our own namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigMap {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its data.
    pub data: BTreeMap<String, String>,
}

/// The verbs that are used, and no others: docs/security.md lists the rights that they need. Every call ends within a
/// deadline of its own.
#[async_trait]
pub trait KubeApi: Send + Sync + Debug {
    /// Whether the API server answers at all; needs no right.
    async fn reachable(&self) -> Result<(), KubeError>;
    /// A claim; `None`: there is none of that name. `get persistentvolumeclaims`.
    async fn claim(&self, namespace: &str, name: &str) -> Result<Option<Claim>, KubeError>;
    /// The parameters of a StorageClass; `None`: there is none of that name. `get storageclasses`.
    async fn class_parameters(&self, name: &str) -> Result<Option<BTreeMap<String, String>>, KubeError>;
    /// The drivers that the kubelet of a node has registered; a node without CSINode has none. `get csinodes`.
    async fn node_drivers(&self, node: &str) -> Result<Vec<String>, KubeError>;
    /// The taints of a node. `get nodes`.
    async fn taints(&self, node: &str) -> Result<Taints, KubeError>;
    /// Replaces the taints of a node that is still as it was read. `patch nodes`.
    async fn set_taints(&self, node: &str, taints: &Taints) -> Result<(), KubeError>;
    /// Creates a ConfigMap; false: it exists. `create configmaps` in our namespace.
    async fn create_config_map(&self, map: &ConfigMap) -> Result<bool, KubeError>;
    /// Reads a ConfigMap; `None`: there is none. `get configmaps` in our namespace.
    async fn config_map(&self, name: &str) -> Result<Option<ConfigMap>, KubeError>;
    /// All ConfigMaps with a label of this value. `list configmaps` in our namespace.
    async fn config_maps(&self, label: &str, value: &str) -> Result<Vec<ConfigMap>, KubeError>;
    /// Deletes a ConfigMap; absent is fine. `delete configmaps` in our namespace.
    async fn delete_config_map(&self, name: &str) -> Result<(), KubeError>;
    /// Writes an Event into the namespace of its object. `create events`.
    async fn create_event(&self, event: &events::Event) -> Result<(), KubeError>;
}

/// What a service has of the Kubernetes API; the default: nothing.
#[derive(Debug, Clone, Default)]
pub struct Kubernetes {
    /// The API; `None`: off, or out of a cluster.
    pub api: Option<Arc<dyn KubeApi>>,
    /// Where Events go.
    pub events: Recorder,
    /// The key of the taint to be removed from the own node, where one is.
    pub startup_taint: Option<String>,
}

impl Kubernetes {
    /// From the `k8s` section. `component` and `instance` are what Events say of their origin: the driver's name, and the
    /// node's or the pod's. Needs a tokio runtime.
    pub async fn start(config: &KubeConfig, component: &str, instance: &str) -> Result<Self, KubeError> {
        let Some(api) = connect(config).await? else { return Ok(Self::default()) };
        let events =
            if config.events { Recorder::start(api.clone(), component, instance) } else { Recorder::default() };
        let startup_taint = config.remove_startup_taint.then(|| config.startup_taint.clone());
        Ok(Self { api: Some(api), events, startup_taint })
    }
}
