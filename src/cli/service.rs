//! What both services share: flags over the configuration, telemetry, the end by a signal.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::CliError;
use super::error::signal;
use crate::config::Config;
use crate::csi::Readiness;
use crate::telemetry::{self, HttpServer};

/// The log line that says where `/metrics` is; its field `http` is the address.
pub(super) const HTTP: &str = "metrics and health are served";

/// Flags that win over file and environment.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Configuration")]
pub(super) struct ServiceArgs {
    /// Configuration file; every key has a default
    #[arg(long, value_name = "FILE", env = "CLIP_CSI_CONFIG")]
    config: Option<PathBuf>,
    /// csi.endpoint: where CSI is served
    #[arg(long, value_name = "unix:///PATH")]
    endpoint: Option<String>,
    /// csi.driverName
    #[arg(long, value_name = "NAME")]
    driver_name: Option<String>,
    /// telemetry.httpListen: /metrics, /healthz and /readyz
    #[arg(long, value_name = "ADDRESS:PORT")]
    http_listen: Option<String>,
    /// telemetry.logLevel
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// imageService.clipVersion: 0 or 1 builds v1, 2 builds v2
    #[arg(long, value_name = "N")]
    clip_version: Option<u32>,
    /// Check the configuration, print what file, environment and flags make of it, and end
    #[arg(long)]
    print_config: bool,
}

impl ServiceArgs {
    /// File, environment, flags, then `more`; validated; logging is on. `None`: it was to be printed only.
    pub(super) fn configure(&self, more: impl FnOnce(&mut Config)) -> Result<Option<Config>, CliError> {
        let mut config = Config::load(self.config.as_deref())?;
        let set = |key: &mut String, flag: &Option<String>| {
            if let Some(value) = flag {
                key.clone_from(value);
            }
        };
        set(&mut config.csi.driver_name, &self.driver_name);
        set(&mut config.telemetry.http_listen, &self.http_listen);
        set(&mut config.telemetry.log_level, &self.log_level);
        if self.endpoint.is_some() {
            config.csi.endpoint.clone_from(&self.endpoint);
        }
        if self.clip_version.is_some() {
            config.image_service.clip_version = self.clip_version;
        }
        more(&mut config);
        config.follow_kubelet_dir();
        config.validate()?;
        if self.print_config {
            let text = serde_yaml_ng::to_string(&config).map_err(|e| CliError::Failed(e.to_string()))?;
            std::io::stdout().write_all(text.as_bytes()).map_err(|e| CliError::output(&e))?;
            return Ok(None);
        }
        telemetry::init_service(&config.telemetry)?;
        Ok(Some(config))
    }
}

/// Runs a service beside the HTTP endpoint.
pub(super) async fn serve(
    config: &Config,
    readiness: Readiness,
    service: impl Future<Output = Result<(), crate::csi::CsiError>>,
) -> Result<(), CliError> {
    let ready: telemetry::Readiness = Arc::new(move || {
        let readiness = readiness.clone();
        Box::pin(async move {
            if readiness.is_started() { readiness.check().await } else { Err("start-up is not over".to_owned()) }
        })
    });
    let http = match config.http_listen()? {
        Some(addr) => Some(HttpServer::start(addr, ready).await?),
        None => None,
    };
    if let Some(http) = &http {
        tracing::info!(http = %http.addr(), "{HTTP}");
    }
    let outcome = service.await;
    if let Some(http) = http {
        http.stop().await;
    }
    match &outcome {
        Ok(()) => tracing::info!("stopped"),
        Err(error) => tracing::error!("{error}"),
    }
    Ok(outcome?)
}

/// Ready at SIGINT or SIGTERM.
pub(super) async fn stopped() {
    match signal().await {
        Ok(signal) => tracing::info!(signal, "stopping"),
        Err(error) => tracing::error!("{error}"),
    }
}
