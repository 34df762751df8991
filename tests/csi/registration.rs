use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clip_csi::csi::proto::pluginregistration::registration_client::RegistrationClient;
use clip_csi::csi::proto::pluginregistration::{InfoRequest, RegistrationStatus};
use clip_csi::csi::proto::v1::ProbeRequest;
use clip_csi::csi::{CsiError, Readiness, unregister};

use super::fakes::FakeMounts;
use super::{Server, appear, config, dial, in_time};

fn link(server: &Server) -> PathBuf {
    server.dir.path().join("plugins_registry/clip.csi.beam.cloud-reg.sock")
}

fn registering(dir: &Path) -> clip_csi::csi::CsiConfig {
    clip_csi::csi::CsiConfig { register: true, ..config(dir) }
}

async fn start(dir: &Arc<tempfile::TempDir>, mounts: &Arc<FakeMounts>) -> Server {
    Server::start_node(dir.clone(), registering(dir.path()), mounts.clone(), Readiness::new(Vec::new())).await
}

#[tokio::test]
async fn the_kubelet_finds_the_link_only_once_the_csi_socket_answers() {
    let (dir, mounts) = (Arc::new(tempfile::tempdir().unwrap()), Arc::<FakeMounts>::default());
    mounts.recovering.close();
    let server = start(&dir, &mounts).await;
    assert!(server.socket().exists() && link(&server).symlink_metadata().is_err(), "bound, but nobody answers yet");
    mounts.recovering.open();
    in_time("the link", appear::appears(&link(&server))).await;
    // As the kubelet does: through the link, then to the endpoint that it is told.
    let mut kubelet = RegistrationClient::new(dial(&link(&server)).await);
    let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "clip.csi.beam.cloud"));
    assert_eq!(
        (info.endpoint.as_str(), info.supported_versions),
        (server.socket().to_str().unwrap(), vec!["1.0.0".into()])
    );
    server.identity_client().await.probe(ProbeRequest {}).await.unwrap();
    for plugin_registered in [true, false] {
        let told = RegistrationStatus { plugin_registered, error: "why".into() };
        kubelet.notify_registration_status(told).await.unwrap();
    }
    let mode = std::fs::metadata(link(&server)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "reg.sock");
}

#[tokio::test]
async fn a_restart_keeps_the_links_inode_and_the_sockets_names() {
    let (dir, mounts) = (Arc::new(tempfile::tempdir().unwrap()), Arc::<FakeMounts>::default());
    let mut first = start(&dir, &mounts).await;
    in_time("the link", appear::appears(&link(&first))).await;
    let inode = link(&first).symlink_metadata().unwrap().ino();
    first.stop().await.unwrap();
    assert!(link(&first).symlink_metadata().is_ok() && first.socket().exists(), "stopping unlinks nothing");
    let mut second = start(&dir, &mounts).await;
    let mut kubelet = loop {
        // The name leads to the dead socket until the new one takes its place.
        if let Ok(stream) = tokio::net::UnixStream::connect(link(&second)).await {
            drop(stream);
            break RegistrationClient::new(dial(&link(&second)).await);
        }
        tokio::task::yield_now().await;
    };
    kubelet.get_info(InfoRequest {}).await.unwrap();
    assert_eq!(link(&second).symlink_metadata().unwrap().ino(), inode);
    second.stop().await.unwrap();
    assert!(unregister(&second.config).unwrap());
    assert!(link(&second).symlink_metadata().is_err());
}

#[tokio::test]
async fn a_second_instance_is_refused_before_it_touches_any_mount() {
    let (dir, mounts) = (Arc::new(tempfile::tempdir().unwrap()), Arc::<FakeMounts>::default());
    let first = start(&dir, &mounts).await;
    let others = Arc::<FakeMounts>::default();
    let mut second = start(&dir, &others).await;
    assert!(matches!(second.stop().await, Err(CsiError::InUse { .. })));
    assert_eq!(others.recoveries(), 0);
    first.identity_client().await.probe(ProbeRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_node_plugin_without_a_node_id_says_which_setting_is_missing() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let config = clip_csi::csi::CsiConfig { node_id: None, ..config(dir.path()) };
    let mut server = Server::start_node(dir, config, Arc::default(), Readiness::new(Vec::new())).await;
    assert!(server.stop().await.unwrap_err().to_string().contains("csi.nodeId"));
}
