//! `clip-csi controller`: the controller plugin, beside the provisioner.

use std::sync::Arc;

use clap::Args;

use super::CliError;
use super::service::{ServiceArgs, serve, stopped};
use crate::build::provider::Provider;
use crate::config::ConfigError;
use crate::csi::{ClipVersion, ControllerContext, Readiness, Volumes, serve_controller};
use crate::k8s::Kubernetes;
use crate::source::{Policy, Sources};

/// Run the CSI controller plugin, for dynamically provisioned volumes
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  clip-csi controller --config /etc/clip-csi/config.yaml --endpoint unix:///csi/csi.sock

Needs imageService.archiveStore, where volumes have their records and nodes find the archives.")]
pub(super) struct ControllerArgs {
    #[command(flatten)]
    service: ServiceArgs,
}

impl ControllerArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let Some(config) = self.service.configure(|_| {})? else { return Ok(()) };
        let sources = Sources::new(Policy { trusted: false, config: config.sources.clone() })?;
        let provider = Provider::new(config.image_service.clone(), sources)?;
        let volumes = provider.store().map(|store| Arc::new(store.clone()) as Arc<dyn Volumes>);
        let pod = std::env::var("HOSTNAME").unwrap_or_default();
        let kubernetes =
            Kubernetes::start(&config.k8s, &config.csi.driver_name, &pod).await.map_err(ConfigError::from)?;
        let readiness = Readiness::controller(volumes.clone(), kubernetes.api.clone());
        let context = ControllerContext {
            config: config.csi.clone(),
            clip_version: ClipVersion::new(config.image_service.clip_version)?,
            images: Arc::new(provider),
            volumes,
            kubernetes,
            readiness: readiness.clone(),
        };
        serve(&config, readiness, serve_controller(context, stopped())).await
    }
}
