//! The CSI services (Identity, Node, Controller) and the kubelet's plugin registration, over unix sockets.
//!
//! [`serve_node`] and [`serve_controller`] run until they are told to stop. Errors become gRPC codes in `status.rs` only;
//! string maps become types in [`volume_context`] and `secrets.rs` only; work that outlives its call is `operations.rs`.

mod authority;
mod claim;
pub mod client;
mod controller;
mod identity;
mod node;
mod operations;
pub mod proto;
mod readiness;
mod registration;
mod request;
mod seam;
mod secrets;
mod server;
mod status;
pub mod volume_context;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use claim::ClaimError;
pub use readiness::Readiness;
pub use registration::unregister;
pub use request::RequestError;
pub use seam::{Images, Mounts, Volumes};

use crate::archive::Version;
use crate::k8s::Kubernetes;
use crate::k8s::taint::StartupTaint;
use identity::IdentityService;
use proto::v1::controller_server::ControllerServer;
use proto::v1::identity_server::IdentityServer;
use proto::v1::node_server::NodeServer;
use server::Services;

/// How long start-up waits for the mounts of an earlier run before it serves; they go on coming back after that.
const RECOVERY_WAIT: Duration = Duration::from_secs(10);

/// The `csi` section of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct CsiConfig {
    /// The driver's name. Default `clip.csi.beam.cloud`.
    pub driver_name: String,
    /// The kubelet's root directory, at the same path on the host. Default `/var/lib/kubelet`.
    pub kubelet_dir: PathBuf,
    /// Where the services listen: `unix:///path`. Default `<kubeletDir>/plugins/<driverName>/csi.sock`.
    pub endpoint: Option<String>,
    /// The Kubernetes node's name; needed by the node plugin.
    pub node_id: Option<String>,
    /// Register with the kubelet. Default true.
    pub register: bool,
    /// How long a call without a deadline of its own waits for work that goes on in the background, in seconds. Default 110
    /// (the kubelet gives 120, and says so).
    pub publish_wait_seconds: u64,
    /// How long calls in flight may take to end at shutdown, in seconds. Default 10.
    pub shutdown_seconds: u64,
}

impl Default for CsiConfig {
    fn default() -> Self {
        Self {
            driver_name: "clip.csi.beam.cloud".to_owned(),
            kubelet_dir: "/var/lib/kubelet".into(),
            endpoint: None,
            node_id: None,
            register: true,
            publish_wait_seconds: 110,
            shutdown_seconds: 10,
        }
    }
}

impl CsiConfig {
    /// Checks every value. Errors name the key.
    pub fn validate(&self) -> Result<(), CsiError> {
        let bad = |key: &'static str, detail: String| Err(CsiError::Config { key, detail });
        let name = self.driver_name.as_bytes();
        let edges = [name.first(), name.last()].iter().all(|b| b.is_some_and(u8::is_ascii_alphanumeric));
        let inner = name.iter().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(b));
        if name.len() > 63 || !edges || !inner {
            return bad("driverName", format!("{:?} is not a domain name of at most 63 characters", self.driver_name));
        }
        if !self.kubelet_dir.is_absolute() {
            return bad("kubeletDir", format!("{} is not an absolute path", self.kubelet_dir.display()));
        }
        if self.node_id.as_ref().is_some_and(|id| id.is_empty() || id.len() > 256) {
            return bad("nodeId", "it is empty or longer than 256 bytes; set it to the node's name".into());
        }
        if !(1..=3600).contains(&self.publish_wait_seconds) {
            return bad("publishWaitSeconds", format!("{} is not 1 to 3600", self.publish_wait_seconds));
        }
        if self.shutdown_seconds > 600 {
            return bad("shutdownSeconds", format!("{} is more than 600", self.shutdown_seconds));
        }
        self.socket_path().map(drop)
    }

    /// `<kubeletDir>/plugins/<driverName>`.
    pub fn plugin_dir(&self) -> PathBuf {
        self.kubelet_dir.join("plugins").join(&self.driver_name)
    }

    /// The socket that CSI is served on.
    pub fn socket_path(&self) -> Result<PathBuf, CsiError> {
        let Some(endpoint) = &self.endpoint else { return Ok(self.plugin_dir().join("csi.sock")) };
        let path = Path::new(endpoint.strip_prefix("unix://").unwrap_or(endpoint));
        if !path.is_absolute() || path.file_name().is_none() {
            let detail = format!("{endpoint:?} is not a unix socket; write unix:///path/to/csi.sock");
            return Err(CsiError::Config { key: "endpoint", detail });
        }
        Ok(path.to_owned())
    }

    fn publish_wait(&self) -> Duration {
        Duration::from_secs(self.publish_wait_seconds)
    }

    fn shutdown_grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_seconds)
    }
}

/// Why the services can't be served. (What goes wrong in a call becomes a gRPC status instead.)
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CsiError {
    /// A value of the configuration.
    #[error("csi.{key}: {detail}")]
    Config {
        /// The key in the `csi` section.
        key: &'static str,
        /// What is wrong, and the remedy.
        detail: String,
    },
    /// Somebody answers there.
    #[error("another process serves {path}; stop it first, two plugins can't share a node")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket was bound but a call to it was not answered.
    #[error("our own socket {path} does not answer: {detail}")]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What happened.
        detail: String,
    },
    /// A system call.
    #[error("{what}: {detail}")]
    Io {
        /// Operation and path.
        what: String,
        /// The system's words.
        detail: String,
    },
}

/// What `clipVersion` is configured to: what a volume gets that does not say it itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClipVersion(Option<Version>);

impl ClipVersion {
    /// From the configuration, environment already merged: 0 and 1 are v1, 2 is v2, `None` is unset.
    pub fn new(configured: Option<u32>) -> Result<Self, CsiError> {
        match configured {
            None => Ok(Self(None)),
            Some(0 | 1) => Ok(Self(Some(Version::V1))),
            Some(2) => Ok(Self(Some(Version::V2))),
            Some(other) => {
                let detail = format!("{other} is not 0, 1 (both v1) or 2 (v2)");
                Err(CsiError::Config { key: "clipVersion", detail })
            }
        }
    }

    /// The version to build, and why, for the log.
    fn resolve(self, attribute: Option<Version>) -> (Version, &'static str) {
        match (attribute, self.0) {
            (Some(version), _) => (version, "the volume's clipVersion"),
            (None, Some(version)) => (version, "the configured clipVersion"),
            (None, None) => (Version::V1, "clipVersion is unset, which means v1: the whole image is pulled"),
        }
    }
}

/// Everything that a node plugin serves with.
#[derive(Debug, Clone)]
pub struct NodeContext {
    /// The `csi` section.
    pub config: CsiConfig,
    /// What to build for volumes that don't say.
    pub clip_version: ClipVersion,
    /// Mounts.
    pub mounts: Arc<dyn Mounts>,
    /// Archives of images.
    pub images: Arc<dyn Images>,
    /// The Kubernetes API, where there is one.
    pub kubernetes: Kubernetes,
    /// For Probe, and for `/readyz`.
    pub readiness: Readiness,
}

/// Everything that a controller serves with.
#[derive(Debug, Clone)]
pub struct ControllerContext {
    /// The `csi` section.
    pub config: CsiConfig,
    /// What to build for volumes that don't say.
    pub clip_version: ClipVersion,
    /// Archives of images.
    pub images: Arc<dyn Images>,
    /// Records and archives; `None`: `imageService.archiveStore` is not set, and CreateVolume says so.
    pub volumes: Option<Arc<dyn Volumes>>,
    /// The Kubernetes API, where there is one.
    pub kubernetes: Kubernetes,
    /// For Probe, and for `/readyz`.
    pub readiness: Readiness,
}

/// Serves Identity and Node until `shutdown` completes: binds, brings the mounts of an earlier run back, serves, and
/// registers with the kubelet once the socket answers. Then ends calls in flight (bounded) and unlinks nothing.
pub async fn serve_node(context: NodeContext, shutdown: impl Future<Output = ()> + Send) -> Result<(), CsiError> {
    let config = &context.config;
    config.validate()?;
    let Some(node_id) = config.node_id.clone() else {
        let detail = "it is not set; set it to the node's name (in a pod: fieldRef spec.nodeName)".to_owned();
        return Err(CsiError::Config { key: "nodeId", detail });
    };
    let socket = config.socket_path()?;
    // Before anything is mounted: another live instance would lose its mounts to us.
    let listener = server::bind(&socket).await?;
    let taint = startup_taint(&context, &node_id);
    let node = node::NodeService::new(&context, node_id);
    let services = Services {
        identity: Some(IdentityServer::new(identity(config, &context.readiness, false))),
        node: Some(NodeServer::new(node.clone())),
        ..Services::default()
    };
    let start = async {
        recover(&context).await;
        Ok(())
    };
    let serving = async move {
        if let Some(taint) = taint {
            taint.remove().await;
        }
    };
    let outcome = run(config, &socket, listener, services, start, config.register, serving, shutdown, async |grace| {
        node.drain(grace).await
    });
    let outcome = outcome.await;
    if tokio::time::timeout(config.shutdown_grace(), context.mounts.shutdown()).await.is_err() {
        tracing::warn!("the mounts were not let go in time");
    }
    outcome
}

/// Serves Identity and Controller until `shutdown` completes.
pub async fn serve_controller(
    context: ControllerContext,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), CsiError> {
    let config = &context.config;
    config.validate()?;
    let socket = config.socket_path()?;
    let listener = server::bind(&socket).await?;
    let controller = controller::ControllerService::new(&context);
    let services = Services {
        identity: Some(IdentityServer::new(identity(config, &context.readiness, true))),
        controller: Some(ControllerServer::new(controller.clone())),
        ..Services::default()
    };
    context.readiness.start();
    let start = async { Ok(()) };
    let serving = std::future::ready(());
    run(config, &socket, listener, services, start, false, serving, shutdown, async |grace| {
        controller.drain(grace).await
    })
    .await
}

/// What is to be done about the own node's startup taint.
fn startup_taint(context: &NodeContext, node_id: &str) -> Option<StartupTaint> {
    let (api, key) = (context.kubernetes.api.clone()?, context.kubernetes.startup_taint.clone()?);
    Some(StartupTaint { api, node: node_id.to_owned(), driver: context.config.driver_name.clone(), key })
}

fn identity(config: &CsiConfig, readiness: &Readiness, controller: bool) -> IdentityService {
    IdentityService { driver_name: config.driver_name.clone(), controller, readiness: readiness.clone() }
}

/// Brings mounts back; what takes longer than [`RECOVERY_WAIT`] goes on while we serve.
async fn recover(context: &NodeContext) {
    let (mounts, readiness) = (context.mounts.clone(), context.readiness.clone());
    let recovering = tokio::spawn(async move {
        let recovery = mounts.recover().await;
        for (target, why) in &recovery.failed {
            tracing::error!(target = %target.display(), "could not be mounted again: {why}");
        }
        let (rebound, detached) = (recovery.rebound.len(), recovery.detached.len());
        if rebound + detached + recovery.failed.len() > 0 {
            tracing::info!(rebound, detached, failed = recovery.failed.len(), "mounts of an earlier run");
        }
        readiness.start();
    });
    if tokio::time::timeout(RECOVERY_WAIT, recovering).await.is_err() {
        tracing::warn!("mounts of an earlier run are still coming back; serving meanwhile");
    }
}

/// Starts, serves, registers, stops. `beside` runs once calls are answered, until it or the serving ends.
#[expect(clippy::too_many_arguments, reason = "the two servers differ in just these")]
async fn run(
    config: &CsiConfig,
    socket: &Path,
    listener: UnixListener,
    services: Services,
    start: impl Future<Output = Result<(), CsiError>>,
    register: bool,
    beside: impl Future<Output = ()> + Send,
    shutdown: impl Future<Output = ()> + Send,
    drain: impl AsyncFnOnce(Duration) -> bool,
) -> Result<(), CsiError> {
    let stop = CancellationToken::new();
    let mut serving = JoinSet::new();
    let serve = async {
        start.await?;
        serving.spawn(server::serve(listener, services, stop.clone()));
        server::answers(socket).await?;
        tracing::info!(socket = %socket.display(), driver = config.driver_name, "serving");
        if register {
            serving.spawn(registration::start(config, socket, stop.clone()).await?);
        }
        let beside = async {
            beside.await;
            std::future::pending::<()>().await;
        };
        // A server ends only when it is told to, or when it fails.
        let ended = tokio::select! {
            ended = serving.join_next() => ended,
            () = beside => None,
        };
        match ended {
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => Err(CsiError::Io { what: "a server ended".into(), detail: error.to_string() }),
            None => Ok(()),
        }
    };
    let outcome = tokio::select! {
        outcome = serve => outcome,
        () = shutdown => Ok(()),
    };
    tracing::info!("stopping: no new calls, those in flight end");
    stop.cancel();
    let grace = config.shutdown_grace();
    let servers = tokio::time::timeout(grace, async { while serving.join_next().await.is_some() {} });
    let (servers, operations) = tokio::join!(servers, drain(grace));
    if servers.is_err() || !operations {
        tracing::warn!(seconds = grace.as_secs(), "calls in flight did not end in time");
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_from_driver_and_kubelet_directory() {
        let config = CsiConfig { kubelet_dir: "/k".into(), ..CsiConfig::default() };
        assert_eq!(config.socket_path().unwrap(), Path::new("/k/plugins/clip.csi.beam.cloud/csi.sock"));
        for endpoint in ["unix:///tmp/csi.sock", "/tmp/csi.sock"] {
            let config = CsiConfig { endpoint: Some(endpoint.into()), ..CsiConfig::default() };
            assert_eq!(config.socket_path().unwrap(), Path::new("/tmp/csi.sock"));
        }
    }

    #[test]
    fn a_bad_value_is_named_by_its_key() {
        let bad: [(&str, CsiConfig); 5] = [
            ("csi.driverName", CsiConfig { driver_name: "-x".into(), ..CsiConfig::default() }),
            ("csi.kubeletDir", CsiConfig { kubelet_dir: "kubelet".into(), ..CsiConfig::default() }),
            ("csi.endpoint", CsiConfig { endpoint: Some("tcp://127.0.0.1:1".into()), ..CsiConfig::default() }),
            ("csi.nodeId", CsiConfig { node_id: Some(String::new()), ..CsiConfig::default() }),
            ("csi.publishWaitSeconds", CsiConfig { publish_wait_seconds: 0, ..CsiConfig::default() }),
        ];
        for (key, config) in bad {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(key), "{error}");
        }
        CsiConfig::default().validate().unwrap();
    }

    #[test]
    fn the_attribute_wins_over_the_configuration_and_unset_means_v1() {
        let configured = ClipVersion::new(Some(2)).unwrap();
        assert_eq!(configured.resolve(Some(Version::V1)).0, Version::V1);
        assert_eq!(configured.resolve(None).0, Version::V2);
        assert_eq!(ClipVersion::new(Some(0)).unwrap().resolve(None).0, Version::V1);
        let (version, because) = ClipVersion::default().resolve(None);
        assert!(version == Version::V1 && because.contains("unset"));
        assert!(ClipVersion::new(Some(3)).is_err());
    }
}
