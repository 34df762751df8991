//! The Node service: publishes, unpublishes, statistics.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::Span;

use super::controller::{fell_back, version_of};
use super::operations::{Call, Operations};
use super::proto::v1::node_server::Node;
use super::proto::v1::node_service_capability::{self, Rpc, rpc};
use super::proto::v1::volume_usage::Unit;
use super::proto::v1::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
    NodeServiceCapability, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, VolumeCondition, VolumeUsage,
};
use super::request::{self, RequestError};
use super::seam::{Images, Mounts, building, progress};
use super::secrets::credentials;
use super::status::aborted;
use super::volume_context::{AskedFor, Attributes, Requester, VolumeSource, archive_url};
use super::{ClipVersion, NodeContext};
use crate::archive::Version;
use crate::build::provider;
use crate::k8s::events::Severity;
use crate::k8s::{Object, Recorder};
use crate::metrics::metrics;
use crate::mount::{MountError, MountSpec, Published, TargetSpec};
use crate::source::{Credentials, Location, Scope};
use crate::units::{Digest, Platform};

/// Publishes volumes on this node.
#[derive(Debug, Clone)]
pub(super) struct NodeService {
    node_id: String,
    default_version: ClipVersion,
    wait: std::time::Duration,
    mounts: Arc<dyn Mounts>,
    images: Arc<dyn Images>,
    events: Recorder,
    /// Whose a target is, for Events about it. Of this process's publishes only: after a restart nobody is told.
    pods: Arc<Mutex<HashMap<PathBuf, Object>>>,
    operations: Operations<()>,
}

/// What Events about a pod name; `None` where the kubelet does not say (`podInfoOnMount: false`).
fn pod(requester: &Requester) -> Option<Object> {
    let Requester { namespace, name, uid } = requester.clone();
    Some(Object { kind: "Pod", namespace: namespace?, name: name?, uid: uid? })
}

/// A publish, checked and parsed.
#[derive(Debug)]
struct Publish {
    volume_id: String,
    target: PathBuf,
    attributes: Attributes,
    credentials: Credentials,
}

impl Publish {
    fn parse(request: NodePublishVolumeRequest) -> Result<Self, RequestError> {
        request::id("volume_id", &request.volume_id)?;
        let target = request::path("target_path", &request.target_path)?;
        request::capability("volume_capability", request.volume_capability.as_ref())?;
        let attributes = Attributes::parse(&request.volume_context, AskedFor::Pod)?;
        let credentials = credentials(&request.secrets, attributes.requester.namespace.as_deref())?;
        Ok(Self { volume_id: request.volume_id, target, attributes, credentials })
    }

    /// What makes a retry the same call. Not the tokens that the kubelet renews, nor the passwords.
    fn fingerprint(&self) -> Digest {
        let identity = self.credentials.identity.map(|digest| digest.hex());
        Digest::of(serde_json::json!([self.volume_id, self.attributes.given, identity]).to_string().as_bytes())
    }
}

impl NodeService {
    pub fn new(context: &NodeContext, node_id: String) -> Self {
        Self {
            node_id,
            default_version: context.clip_version,
            wait: context.config.publish_wait(),
            mounts: context.mounts.clone(),
            images: context.images.clone(),
            events: context.kubernetes.events.clone(),
            pods: Arc::default(),
            operations: Operations::default(),
        }
    }

    /// Lets what is under way end. False: something has not within `grace`.
    pub async fn drain(&self, grace: std::time::Duration) -> bool {
        self.operations.drain(grace).await
    }

    fn tell(&self, requester: &Requester, severity: Severity, reason: &'static str, message: &str) {
        if let Some(pod) = pod(requester) {
            self.events.tell(&pod, severity, reason, message);
        }
    }

    fn note_pod(&self, target: &Path, pod: Option<Object>) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        match pod {
            Some(pod) => pods.insert(target.to_owned(), pod),
            None => pods.remove(target),
        };
    }

    /// The whole way from attributes to a mounted target, as a task of its own.
    async fn publish(self, publish: Publish, cancel: CancellationToken) -> Result<(), Status> {
        let outcome = self.publish_counted(&publish, &cancel).await;
        let (result, version) = match &outcome {
            Ok(published) if published.version == Version::V1 => ("ok", "v1"),
            Ok(_) => ("ok", "v2"),
            Err(_) => ("error", "none"),
        };
        metrics().publishes.with_label_values(&[result, version]).inc();
        let published = outcome?;
        let Published { detected_from, already, shared, .. } = &published;
        self.note_pod(&publish.target, pod(&publish.attributes.requester));
        tracing::info!(version, detected_from, already, shared, source = %publish.attributes.source, "published");
        Ok(())
    }

    async fn publish_counted(&self, publish: &Publish, cancel: &CancellationToken) -> Result<Published, Status> {
        let Publish { volume_id, target, attributes, credentials } = publish;
        let (archive, pin, scope) = match &attributes.source {
            VolumeSource::Archive(location) => (location.clone(), None, archive_scope(location, credentials)),
            VolumeSource::Image(image) => {
                let (version, because) = self.default_version.resolve(attributes.clip_version);
                tracing::debug!(?version, because, "version to build where no archive is found");
                let request = provider::Request {
                    image: image.clone(),
                    platform: attributes.platform.clone().unwrap_or_else(Platform::host),
                    version,
                    pull_policy: attributes.pull_policy,
                    credentials: credentials.clone(),
                };
                let provided = tokio::select! {
                    biased;
                    () = cancel.cancelled() => return Err(cancelled()),
                    provided = self.images.provide(&request) => provided?,
                };
                let made = version_of(&provided.location, &provided.manifest_digest, &request.platform);
                if version == Version::V2 && made == Version::V1 && provided.from == "built" {
                    self.tell(&attributes.requester, Severity::Warning, "FellBackToV1", &fell_back(image));
                }
                tracing::info!(from = provided.from, manifest = %provided.manifest_digest, because, "archive provided");
                (provided.location, provided.pin, scope_name(provided.scope))
            }
        };
        // From here on it runs to its end: a mount that is half made would have no owner.
        if cancel.is_cancelled() {
            return Err(cancelled());
        }
        let spec = MountSpec {
            archive,
            pin,
            root: attributes.root,
            integrity: attributes.integrity,
            scope,
            credentials: credentials.clone(),
        };
        let target = TargetSpec {
            volume_id: volume_id.clone(),
            target: target.clone(),
            sub_path: attributes.sub_path.clone(),
            attributes: attributes.given.clone(),
        };
        Ok(self.mounts.publish(&spec, &target).await?)
    }
}

fn cancelled() -> Status {
    aborted("the publish was given up: the volume is being unpublished, or the plugin is stopping")
}

fn scope_name(scope: Scope) -> String {
    match scope {
        Scope::Public => "public".to_owned(),
        Scope::Private(digest) => digest.hex(),
    }
}

/// Without a secret an archive is read with what the node may read for anybody; with one, only its owners share it.
fn archive_scope(location: &Location, credentials: &Credentials) -> String {
    match credentials.identity {
        None => scope_name(Scope::Public),
        Some(identity) => {
            let text = serde_json::json!(["archive", archive_url(location), identity.hex()]).to_string();
            scope_name(Scope::Private(Digest::of(text.as_bytes())))
        }
    }
}

/// Puts what the request is about into the span of its RPC. Ids and paths only.
pub(super) fn note(volume_id: &str, target: &str) {
    let span = Span::current();
    span.record("volume_id", request::cut(volume_id));
    if !target.is_empty() {
        span.record("target", target.chars().take(300).collect::<String>());
    }
}

#[async_trait]
impl Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let deadline = request::deadline(&request, self.wait);
        let request = request.into_inner();
        note(&request.volume_id, &request.target_path);
        let publish = Publish::parse(request).inspect_err(|_| {
            metrics().publishes.with_label_values(&["error", "none"]).inc();
        })?;
        let key = publish.target.to_string_lossy().into_owned();
        let source = publish.attributes.source.clone();
        let call = Call {
            key: &key,
            kind: "publish",
            fingerprint: publish.fingerprint(),
            deadline,
            what: format!("publishing {source}"),
            progress: &|| progress(self.images.as_ref(), &source),
            preempts: None,
        };
        let requester = publish.attributes.requester.clone();
        self.operations.run(call, |cancel| self.clone().publish(publish, cancel)).await.inspect_err(|status| {
            if let Some(message) = building(status, self.images.as_ref(), &source) {
                self.tell(&requester, Severity::Normal, "ArchiveBuilding", &message);
            }
        })?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let deadline = request::deadline(&request, self.wait);
        let request = request.into_inner();
        note(&request.volume_id, &request.target_path);
        request::id("volume_id", &request.volume_id)?;
        let target = request::path("target_path", &request.target_path)?;
        let key = target.to_string_lossy().into_owned();
        let call = Call {
            key: &key,
            kind: "unpublish",
            fingerprint: Digest::of(request.volume_id.as_bytes()),
            deadline,
            what: format!("unpublishing {}", target.display()),
            progress: &|| None,
            preempts: Some("publish"),
        };
        let this = self.clone();
        let unpublish = |_| async move {
            this.mounts.unpublish(&target).await?;
            this.note_pod(&target, None);
            Ok(())
        };
        self.operations.run(call, unpublish).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        note(&request.volume_id, &request.volume_path);
        request::id("volume_id", &request.volume_id)?;
        let target = match request::path("volume_path", &request.volume_path) {
            // Nothing can be published at a path that none is accepted for: not there, rather than not valid.
            Err(RequestError::Unusable { .. }) => {
                return Err(MountError::NotPublished { path: request::cut(&request.volume_path).into() }.into());
            }
            path => path?,
        };
        let stats = self.mounts.stats(&target).await?;
        // The kubelet asks about once a minute and shows a condition in its metrics only: the pod's user sees an Event.
        if let Some(why) = &stats.abnormal {
            let pod = self.pods.lock().unwrap_or_else(PoisonError::into_inner).get(&target).cloned();
            if let Some(pod) = pod {
                self.events.tell(&pod, Severity::Warning, "VolumeUnhealthy", why);
            }
        }
        // A read-only volume is full: what there is is used.
        let usage = |unit: Unit, amount: u64| {
            let amount = i64::try_from(amount).unwrap_or(i64::MAX);
            VolumeUsage { available: 0, total: amount, used: amount, unit: unit.into() }
        };
        let condition = VolumeCondition {
            abnormal: stats.abnormal.is_some(),
            message: stats.abnormal.unwrap_or_else(|| "mounted and served".to_owned()),
        };
        Ok(Response::new(NodeGetVolumeStatsResponse {
            usage: vec![usage(Unit::Bytes, stats.bytes), usage(Unit::Inodes, stats.inodes)],
            volume_condition: Some(condition),
        }))
    }

    /// What we offer. Not SINGLE_NODE_MULTI_WRITER: it promises to tell one writer from several, and there is none.
    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc { r#type: kind.into() })),
        };
        let capabilities = [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition].map(capability).to_vec();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node_id = self.node_id.clone();
        Ok(Response::new(NodeGetInfoResponse { node_id, max_volumes_per_node: 0, accessible_topology: None }))
    }
}
