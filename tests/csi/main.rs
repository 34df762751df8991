//! The CSI services over real unix sockets, with fakes behind them: no mounts, no network.

#[path = "../common/appear.rs"]
#[allow(dead_code)]
mod appear;
mod controller;
mod fakes;
mod kube;
mod node;
mod registration;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clip_csi::csi::proto::v1::controller_client::ControllerClient;
use clip_csi::csi::proto::v1::identity_client::IdentityClient;
use clip_csi::csi::proto::v1::node_client::NodeClient;
use clip_csi::csi::proto::v1::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use clip_csi::csi::proto::v1::{NodePublishVolumeRequest, VolumeCapability};
use clip_csi::csi::{
    ClipVersion, ControllerContext, CsiConfig, CsiError, NodeContext, Readiness, serve_controller, serve_node,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

use clip_csi::k8s::fake::FakeKube;
use clip_csi::k8s::{Kubernetes, Recorder};
use fakes::{FakeImages, FakeMounts, FakeVolumes};

/// Nothing here takes longer unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running server; dropped, it is told to stop.
struct Server {
    dir: Arc<tempfile::TempDir>,
    config: CsiConfig,
    mounts: Arc<FakeMounts>,
    images: Arc<FakeImages>,
    volumes: Arc<FakeVolumes>,
    kube: Arc<FakeKube>,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), CsiError>>,
}

fn config(dir: &Path) -> CsiConfig {
    CsiConfig {
        kubelet_dir: dir.to_owned(),
        node_id: Some("node-1".into()),
        register: false,
        publish_wait_seconds: 1,
        shutdown_seconds: 5,
        ..CsiConfig::default()
    }
}

impl Server {
    async fn node() -> Self {
        Self::node_with(|_| {}, Readiness::new(Vec::new())).await
    }

    /// A node that talks to `kube`, and whose startup taint is of this key.
    async fn node_of(kube: Arc<FakeKube>, taint: &str) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let config = config(dir.path());
        let kubernetes = Kubernetes { startup_taint: Some(taint.into()), ..kubernetes(&kube) };
        Self::launch_node(dir, config, Arc::default(), Readiness::new(Vec::new()), kube, kubernetes).await
    }

    async fn node_with(change: impl FnOnce(&mut CsiConfig), readiness: Readiness) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let mut config = config(dir.path());
        change(&mut config);
        Self::start_node(dir, config, Arc::default(), readiness).await
    }

    async fn start_node(
        dir: Arc<tempfile::TempDir>,
        config: CsiConfig,
        mounts: Arc<FakeMounts>,
        readiness: Readiness,
    ) -> Self {
        let kube = Arc::<FakeKube>::default();
        let kubernetes = kubernetes(&kube);
        Self::launch_node(dir, config, mounts, readiness, kube, kubernetes).await
    }

    async fn launch_node(
        dir: Arc<tempfile::TempDir>,
        config: CsiConfig,
        mounts: Arc<FakeMounts>,
        readiness: Readiness,
        kube: Arc<FakeKube>,
        kubernetes: Kubernetes,
    ) -> Self {
        let images = Arc::<FakeImages>::default();
        let context = NodeContext {
            config: config.clone(),
            clip_version: ClipVersion::new(Some(2)).unwrap(),
            mounts: mounts.clone(),
            images: images.clone(),
            kubernetes,
            readiness,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let mut serving = tokio::spawn(serve_node(context, async { drop(stopped.await) }));
        // Recovery begins once the socket is bound, and never where that fails.
        let begun = async {
            tokio::select! {
                () = mounts.happened.until(|| mounts.recoveries() > 0) => {}
                ended = &mut serving => serving = tokio::spawn(async { ended.unwrap() }),
            }
        };
        in_time("recovery", begun).await;
        Self { dir, config, mounts, images, volumes: Arc::default(), kube, stop: Some(stop), serving }
    }

    async fn controller(store: bool) -> Self {
        Self::controller_over(store.then(Arc::default), Arc::default(), true).await
    }

    /// A controller over these volumes (none: no store), with or without the API.
    async fn controller_over(store: Option<Arc<FakeVolumes>>, kube: Arc<FakeKube>, api: bool) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let config = config(dir.path());
        let images = Arc::<FakeImages>::default();
        let volumes = store.clone().unwrap_or_default();
        let kubernetes = if api { kubernetes(&kube) } else { Kubernetes::default() };
        let context = ControllerContext {
            config: config.clone(),
            clip_version: ClipVersion::new(Some(2)).unwrap(),
            images: images.clone(),
            volumes: store.clone().map(|volumes| volumes as _),
            archive_grace: Duration::ZERO,
            readiness: Readiness::controller(store.map(|volumes| volumes as _), kubernetes.api.clone()),
            kubernetes,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(serve_controller(context, async { drop(stopped.await) }));
        let socket = config.socket_path().unwrap();
        in_time("the socket", appear::appears(&socket)).await;
        Self { dir, config, mounts: Arc::default(), images, volumes, kube, stop: Some(stop), serving }
    }

    fn socket(&self) -> PathBuf {
        self.config.socket_path().unwrap()
    }

    async fn channel(&self) -> Channel {
        dial(&self.socket()).await
    }

    async fn node_client(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel().await)
    }

    async fn identity_client(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel().await)
    }

    async fn controller_client(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel().await)
    }

    /// SIGTERM, as it were.
    async fn stop(&mut self) -> Result<(), CsiError> {
        drop(self.stop.take());
        tokio::time::timeout(PATIENCE, &mut self.serving).await.expect("it stops").unwrap()
    }

    fn target(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A publish as the kubelet makes it for an inline volume.
    fn publish(&self, target: &str, attributes: &[(&str, &str)]) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: "csi-0123".into(),
            target_path: self.target(target),
            volume_capability: Some(mount_capability(Mode::SingleNodeWriter)),
            volume_context: map(attributes),
            ..Default::default()
        }
    }
}

fn kubernetes(kube: &Arc<FakeKube>) -> Kubernetes {
    let events = Recorder::start(kube.clone(), "clip.csi.beam.cloud", "node-1");
    Kubernetes { api: Some(kube.clone()), events, startup_taint: None }
}

async fn dial(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    tokio::time::timeout(PATIENCE, endpoint.connect()).await.expect("it answers").unwrap()
}

fn mount_capability(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Waits, but not for ever.
async fn in_time(what: &str, event: impl Future<Output = ()>) {
    tokio::time::timeout(PATIENCE, event).await.unwrap_or_else(|_| panic!("{what} did not come about"));
}
