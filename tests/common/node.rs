//! The node plugin as its own process, spoken to as the kubelet does.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clip_csi::csi::proto::v1;
use clip_csi::csi::proto::v1::identity_client::IdentityClient;
use clip_csi::csi::proto::v1::node_client::NodeClient;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

/// Longest wait for the plugin to answer. It takes milliseconds; a loaded machine may take seconds.
const START: Duration = Duration::from_secs(30);

/// A node plugin with its own directories; everything is unmounted and ended with this guard.
pub struct Node {
    child: Child,
    dir: tempfile::TempDir,
    http: String,
    channel: Channel,
}

impl Node {
    /// Starts `clip-csi node`. `config` is merged into a configuration whose directories are temporary.
    pub async fn start(config: serde_json::Value) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), config).await
    }

    /// The same, over what an earlier run left in `dir`.
    pub async fn start_in(dir: tempfile::TempDir, mut config: serde_json::Value) -> Self {
        let at = |name: &str| dir.path().join(name);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let http = format!("127.0.0.1:{port}");
        let mut set = |section: &str, key: &str, value: serde_json::Value| {
            config[section][key] = value;
        };
        set("imageService", "archiveDir", at("archives").to_str().into());
        set("cache", "dir", at("cache").to_str().into());
        set("mounts", "mountsDir", at("kubelet/plugins/mounts").to_str().into());
        set("mounts", "stateDir", at("volumes").to_str().into());
        set("csi", "kubeletDir", at("kubelet").to_str().into());
        set("csi", "endpoint", format!("unix://{}", at("csi.sock").display()).into());
        set("telemetry", "httpListen", http.clone().into());
        let file = at("config.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        std::fs::create_dir_all(at("kubelet/pods")).unwrap();
        let mut child = Command::new(super::binary())
            .args(["node", "--node-id", "test-node", "--no-register", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let channel = connect(&at("csi.sock"), &mut child).await;
        Self { child, dir, http, channel }
    }

    pub fn client(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// Where a volume of this name would be published; its parent exists.
    pub fn target(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join("kubelet/pods").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir.join("mount")
    }

    /// A publish as the kubelet sends it for an inline volume.
    pub fn request(&self, name: &str, attributes: &[(&str, &str)]) -> v1::NodePublishVolumeRequest {
        let context: HashMap<_, _> = attributes
            .iter()
            .chain(&[
                ("csi.storage.k8s.io/ephemeral", "true"),
                ("csi.storage.k8s.io/pod.name", "pod"),
                ("csi.storage.k8s.io/pod.namespace", "default"),
            ])
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        v1::NodePublishVolumeRequest {
            volume_id: format!("csi-{name}"),
            target_path: self.target(name).to_str().unwrap().to_owned(),
            volume_capability: Some(v1::VolumeCapability {
                access_mode: Some(v1::volume_capability::AccessMode {
                    mode: v1::volume_capability::access_mode::Mode::MultiNodeReaderOnly.into(),
                }),
                access_type: Some(v1::volume_capability::AccessType::Mount(Default::default())),
            }),
            readonly: true,
            volume_context: context,
            ..Default::default()
        }
    }

    /// Publishes and gives the target.
    pub async fn publish(&self, name: &str, attributes: &[(&str, &str)]) -> Result<PathBuf, tonic::Status> {
        self.send(self.request(name, attributes)).await
    }

    /// Sends a publish, with retries where the plugin says that work goes on, as the kubelet does.
    pub async fn send(&self, request: v1::NodePublishVolumeRequest) -> Result<PathBuf, tonic::Status> {
        let target = PathBuf::from(&request.target_path);
        let give_up = Instant::now() + Duration::from_secs(120);
        loop {
            match self.client().node_publish_volume(request.clone()).await {
                Ok(_) => return Ok(target),
                Err(status) if status.code() == tonic::Code::Aborted && Instant::now() < give_up => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(status) => return Err(status),
            }
        }
    }

    pub async fn unpublish(&self, name: &str) -> Result<(), tonic::Status> {
        let request = v1::NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{name}"),
            target_path: self.target(name).to_str().unwrap().to_owned(),
        };
        self.client().node_unpublish_volume(request).await.map(drop)
    }

    /// The value of a metric, all its series added up.
    pub async fn metric(&self, name: &str) -> f64 {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let text = reqwest::get(format!("http://{}/metrics", self.http)).await.unwrap().text().await.unwrap();
        let series = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' ')));
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// The process, for /proc.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once, as a crash would, and keeps what it leaves behind.
    pub fn kill(mut self) -> tempfile::TempDir {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // `Drop` must not unmount what the next one is to find.
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    /// Mounts below this node's directories.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(self.dir.path())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        unmount_below(self.dir.path());
    }
}

/// Mount points at or below `dir`, innermost first.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<_> = points.filter(|point| point.starts_with(dir)).collect();
    points.reverse();
    points
}

/// Detaches everything below `dir`; for guards.
pub fn unmount_below(dir: &Path) {
    for point in mounts_below(dir) {
        let _ = rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH);
    }
}

async fn connect(socket: &Path, child: &mut Child) -> Channel {
    let give_up = Instant::now() + START;
    loop {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
        });
        if let Ok(channel) = Endpoint::from_static("http://plugin").connect_with_connector(connector).await
            && IdentityClient::new(channel.clone()).probe(v1::ProbeRequest {}).await.is_ok()
        {
            return channel;
        }
        if let Some(status) = child.try_wait().unwrap() {
            panic!("the node plugin ended at once: {status}");
        }
        assert!(Instant::now() < give_up, "the node plugin does not answer within {START:?}");
        // Nothing tells when a socket that is not there yet will be.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
