//! A small CSI client: what a kubelet asks of a node plugin, for `clip-csi demo` and for tests.

use std::collections::HashMap;
use std::path::Path;

use tonic::transport::{Channel, Endpoint};

use super::proto::v1;
use v1::identity_client::IdentityClient;
use v1::node_client::NodeClient;

/// A call that failed: the method, and the gRPC code with its message.
#[derive(Debug, thiserror::Error)]
#[error("{method}: {detail}")]
pub struct ClientError {
    /// The CSI method, or `connect`.
    pub method: &'static str,
    /// The plugin's words.
    pub detail: String,
}

/// What NodeGetVolumeStats says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in the volume.
    pub bytes: i64,
    /// Inodes in the volume.
    pub inodes: i64,
    /// What is wrong, where something is.
    pub abnormal: Option<String>,
}

/// A connection to a plugin. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CsiClient {
    identity: IdentityClient<Channel>,
    node: NodeClient<Channel>,
}

impl CsiClient {
    /// Connects to a unix socket. Errors: nobody listens there.
    pub async fn connect(socket: &Path) -> Result<Self, ClientError> {
        let failed = |e: tonic::transport::Error| ClientError {
            method: "connect",
            detail: format!("{}: {}", socket.display(), chain(&e)),
        };
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).map_err(failed)?;
        let channel = endpoint.connect().await.map_err(failed)?;
        Ok(Self { identity: IdentityClient::new(channel.clone()), node: NodeClient::new(channel) })
    }

    /// GetPluginInfo: name and version.
    pub async fn plugin_info(&mut self) -> Result<(String, String), ClientError> {
        let answer = self.identity.get_plugin_info(v1::GetPluginInfoRequest {}).await;
        let answer = answer.map_err(status("GetPluginInfo"))?.into_inner();
        Ok((answer.name, answer.vendor_version))
    }

    /// Probe: whether it is ready (one that does not say is).
    pub async fn probe(&mut self) -> Result<bool, ClientError> {
        let answer = self.identity.probe(v1::ProbeRequest {}).await.map_err(status("Probe"))?;
        Ok(answer.into_inner().ready.is_none_or(|ready| ready))
    }

    /// NodeGetInfo: the node's id.
    pub async fn node_id(&mut self) -> Result<String, ClientError> {
        let answer = self.node.node_get_info(v1::NodeGetInfoRequest {}).await.map_err(status("NodeGetInfo"))?;
        Ok(answer.into_inner().node_id)
    }

    /// NodePublishVolume of an inline volume, read-only, as the kubelet asks for it.
    pub async fn publish(
        &mut self,
        volume_id: &str,
        target: &Path,
        attributes: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let capability = v1::VolumeCapability {
            access_type: Some(v1::volume_capability::AccessType::Mount(Default::default())),
            access_mode: Some(v1::volume_capability::AccessMode {
                mode: v1::volume_capability::access_mode::Mode::SingleNodeWriter.into(),
            }),
        };
        let request = v1::NodePublishVolumeRequest {
            volume_id: volume_id.into(),
            target_path: target.display().to_string(),
            volume_capability: Some(capability),
            readonly: true,
            volume_context: attributes,
            ..Default::default()
        };
        self.node.node_publish_volume(request).await.map_err(status("NodePublishVolume")).map(|_| ())
    }

    /// NodeGetVolumeStats.
    pub async fn stats(&mut self, volume_id: &str, target: &Path) -> Result<Usage, ClientError> {
        let request = v1::NodeGetVolumeStatsRequest {
            volume_id: volume_id.into(),
            volume_path: target.display().to_string(),
            ..Default::default()
        };
        let answer = self.node.node_get_volume_stats(request).await;
        let answer = answer.map_err(status("NodeGetVolumeStats"))?.into_inner();
        let of = |unit: v1::volume_usage::Unit| {
            answer.usage.iter().find(|usage| usage.unit == i32::from(unit)).map_or(0, |usage| usage.total)
        };
        Ok(Usage {
            bytes: of(v1::volume_usage::Unit::Bytes),
            inodes: of(v1::volume_usage::Unit::Inodes),
            abnormal: answer.volume_condition.filter(|c| c.abnormal).map(|c| c.message),
        })
    }

    /// NodeUnpublishVolume.
    pub async fn unpublish(&mut self, volume_id: &str, target: &Path) -> Result<(), ClientError> {
        let request =
            v1::NodeUnpublishVolumeRequest { volume_id: volume_id.into(), target_path: target.display().to_string() };
        self.node.node_unpublish_volume(request).await.map_err(status("NodeUnpublishVolume")).map(|_| ())
    }
}

fn status(method: &'static str) -> impl Fn(tonic::Status) -> ClientError {
    move |status| ClientError { method, detail: format!("{:?}: {}", status.code(), status.message()) }
}

/// The causes of a transport error: its own words say only that there was one.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
