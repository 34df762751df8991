//! How the kubelet comes to know us.
//!
//! The kubelet watches `plugins_registry` for sockets, and follows symlinks there. Each remove or re-create event of an
//! entry makes it forget the driver for a moment, so the entry is a relative symlink that is made once and stays, through
//! restarts and upgrades, while the socket that it leads to is replaced by rename in a directory that nobody watches.
//! Only uninstalling removes it ([`unregister`]).

use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::proto::pluginregistration::registration_server::{Registration, RegistrationServer};
use super::proto::pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use super::server::{self, Services};
use super::{CsiConfig, CsiError};

/// The name of our socket in the plugin directory.
const SOCKET: &str = "reg.sock";

/// The version of CSI as the kubelet's registration compares it: its major version has been 1 since 2018.
const CSI_VERSION: &str = "1.0.0";

/// Answers the kubelet.
#[derive(Debug, Clone)]
pub(super) struct RegistrationService {
    info: PluginInfo,
}

#[async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        if plugin_registered {
            tracing::info!("the kubelet has registered the driver");
        } else {
            // It tries again by itself.
            tracing::error!("the kubelet could not register the driver: {}", super::request::cut(&error));
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// `<kubeletDir>/plugins_registry/<driverName>-reg.sock`.
fn link(config: &CsiConfig) -> PathBuf {
    config.kubelet_dir.join("plugins_registry").join(format!("{}-{SOCKET}", config.driver_name))
}

fn io(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> CsiError {
    let what = format!("{what} {}", path.display());
    move |error| CsiError::Io { what, detail: error.to_string() }
}

/// Listens on reg.sock and makes the link. To be called once the CSI socket answers; gives the server to be run.
pub(super) async fn start(
    config: &CsiConfig,
    csi_socket: &Path,
    stop: CancellationToken,
) -> Result<impl Future<Output = Result<(), CsiError>> + Send + 'static + use<>, CsiError> {
    let listener = server::bind(&config.plugin_dir().join(SOCKET)).await?;
    let info = PluginInfo {
        r#type: "CSIPlugin".to_owned(),
        name: config.driver_name.clone(),
        endpoint: csi_socket.display().to_string(),
        supported_versions: vec![CSI_VERSION.to_owned()],
    };
    let registration = Some(RegistrationServer::new(RegistrationService { info }));
    let serving = server::serve(listener, Services { registration, ..Services::default() }, stop);
    make_link(config)?;
    Ok(serving)
}

/// The link as it should be is left alone, down to its inode. Anything else there (the socket of a registrar sidecar, a
/// link to another place) is replaced in one step.
fn make_link(config: &CsiConfig) -> Result<(), CsiError> {
    let link = link(config);
    let target = Path::new("../plugins").join(&config.driver_name).join(SOCKET);
    if std::fs::read_link(&link).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let registry = link.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(registry)
        .map_err(io("create directory", registry))?;
    // The kubelet's watcher ignores names that begin with a dot.
    let temporary = registry.join(format!(".{}-{SOCKET}", config.driver_name));
    let _ = std::fs::remove_file(&temporary);
    symlink(&target, &temporary).map_err(io("make link", &temporary))?;
    std::fs::rename(&temporary, &link).map_err(io("make link", &link))
}

/// Removes the link: the kubelet forgets the driver. For uninstalling only; false: it was not there.
pub fn unregister(config: &CsiConfig) -> Result<bool, CsiError> {
    let link = link(config);
    match std::fs::remove_file(&link) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("remove", &link)(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn config(dir: &Path) -> CsiConfig {
        CsiConfig { kubelet_dir: dir.to_owned(), ..CsiConfig::default() }
    }

    #[test]
    fn the_link_is_relative_and_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        make_link(&config).unwrap();
        let link = dir.path().join("plugins_registry/clip.csi.beam.cloud-reg.sock");
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../plugins/clip.csi.beam.cloud/reg.sock"));
        let inode = std::fs::symlink_metadata(&link).unwrap().ino();
        make_link(&config).unwrap();
        assert_eq!(std::fs::symlink_metadata(&link).unwrap().ino(), inode);
        assert_eq!(std::fs::read_dir(link.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_another_registrar_left_is_replaced_and_unregister_removes_only_the_link() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let link = link(&config);
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::fs::write(&link, "").unwrap();
        make_link(&config).unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(unregister(&config).unwrap());
        assert!(!unregister(&config).unwrap());
        assert!(std::fs::symlink_metadata(&link).is_err());
    }
}
