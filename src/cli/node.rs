//! `clip-csi node`: the node plugin.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::CliError;
use super::service::{ServiceArgs, serve, stopped};
use crate::build::provider::Provider;
use crate::cache::Cache;
use crate::config::ConfigError;
use crate::csi::{ClipVersion, CsiConfig, NodeContext, Readiness, serve_node, unregister};
use crate::k8s::Kubernetes;
use crate::k8s::release::{Release, ReleaseError};
use crate::mount::MountManager;
use crate::source::{Policy, Sources};

/// Run the CSI node plugin: one per node, as root
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi node --config /etc/clip-csi/config.yaml --node-id $(hostname)
  clip-csi node --node-id me --kubelet-dir /tmp/kubelet --no-register --http-listen 127.0.0.1:9810

Mounts of an earlier run are brought back before it serves. SIGTERM ends calls in flight and unmounts nothing.")]
pub(super) struct NodeArgs {
    #[command(flatten)]
    service: ServiceArgs,
    /// csi.nodeId: the Kubernetes node's name
    #[arg(long, value_name = "NAME", help_heading = "Configuration")]
    node_id: Option<String>,
    /// csi.kubeletDir
    #[arg(long, value_name = "DIR", help_heading = "Configuration")]
    kubelet_dir: Option<PathBuf>,
    /// csi.register=false: serve, but do not register with the kubelet
    #[arg(long, help_heading = "Configuration")]
    no_register: bool,
    /// The DaemonSet that runs this plugin; where it is gone at SIGTERM, so is the registration with the kubelet
    #[arg(long, value_name = "NAMESPACE/NAME", env = "CLIP_CSI_DAEMON_SET")]
    daemon_set: Option<String>,
}

impl NodeArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let configured = self.service.configure(|config| {
            if self.node_id.is_some() {
                config.csi.node_id.clone_from(&self.node_id);
            }
            if let Some(dir) = &self.kubelet_dir {
                config.csi.kubelet_dir.clone_from(dir);
            }
            config.csi.register &= !self.no_register;
        })?;
        let Some(config) = configured else { return Ok(()) };
        // Beside everything else: nothing waits for the API server.
        let release = self.daemon_set.map(|name| tokio::spawn(async move { Release::find(&name).await }));
        let sources = Sources::new(Policy { trusted: false, config: config.sources.clone() })?;
        let cache = Cache::open(&config.cache)?;
        let provider = Provider::new(config.image_service.clone(), sources.clone())?;
        let mounts = MountManager::new(config.mounts.clone(), sources, cache, provider.clone())?;
        let node = config.csi.node_id.clone().unwrap_or_default();
        let kubernetes =
            Kubernetes::start(&config.k8s, &config.csi.driver_name, &node).await.map_err(ConfigError::from)?;
        let readiness = Readiness::node(config.mounts.mounts_dir.clone(), config.cache.dir.clone());
        let context = NodeContext {
            config: config.csi.clone(),
            clip_version: ClipVersion::new(config.image_service.clip_version)?,
            mounts: Arc::new(mounts),
            images: Arc::new(provider),
            kubernetes,
            readiness: readiness.clone(),
        };
        let csi = config.csi.clone();
        let stop = async move {
            stopped().await;
            // While the sockets are still ours: a plugin that comes after us finds no link and makes it again.
            if let Some(release) = release.filter(|_| csi.register) {
                leave(release.await, &csi).await;
            }
        };
        serve(&config, readiness, serve_node(context, stop)).await
    }
}

/// Takes the registration with the kubelet back where the driver is being uninstalled.
async fn leave(release: Result<Result<Release, ReleaseError>, tokio::task::JoinError>, csi: &CsiConfig) {
    let release = match release {
        Ok(Ok(release)) => release,
        Ok(Err(error)) => return tracing::warn!("whether this is an uninstallation is not known: {error}"),
        Err(error) => return tracing::warn!("whether this is an uninstallation is not known: {error}"),
    };
    if release.is_ending().await {
        match unregister(csi) {
            Ok(removed) => tracing::info!(removed, "the driver is being uninstalled: the kubelet forgets it"),
            Err(error) => tracing::warn!("the driver is being uninstalled, but {error}"),
        }
    }
}
