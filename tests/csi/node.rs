use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clip_csi::archive::Version;
use clip_csi::build::provider::PullPolicy;
use clip_csi::csi::Readiness;
use clip_csi::csi::proto::v1::node_service_capability::{Type, rpc};
use clip_csi::csi::proto::v1::volume_capability::{AccessType, BlockVolume, access_mode::Mode};
use clip_csi::csi::proto::v1::volume_usage::Unit;
use clip_csi::csi::proto::v1::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeExpandVolumeRequest, NodeGetCapabilitiesRequest,
    NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, ProbeRequest,
};
use clip_csi::fs::Integrity;
use clip_csi::source::SourceError;
use futures::FutureExt as _;
use tonic::Code;

use super::{Server, in_time, map, mount_capability};

const IMAGE: (&str, &str) = ("image", "registry.example/team/app:1");

fn unpublish(server: &Server, target: &str) -> NodeUnpublishVolumeRequest {
    NodeUnpublishVolumeRequest { volume_id: "csi-0123".into(), target_path: server.target(target) }
}

#[tokio::test]
async fn the_plugin_says_who_it_is_and_what_it_can() {
    let server = Server::node().await;
    let mut identity = server.identity_client().await;
    let info = identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.name.as_str(), info.vendor_version.as_str()), ("clip.csi.beam.cloud", env!("CARGO_PKG_VERSION")));
    let can = identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap().into_inner();
    assert!(can.capabilities.is_empty(), "a node plugin serves no controller");
    assert_eq!(identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));

    let mut node = server.node_client().await;
    let info = node.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node, info.accessible_topology), ("node-1", 0, None));
    let can = node.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap().into_inner();
    let types: Vec<i32> = can
        .capabilities
        .iter()
        .map(|c| match c.r#type.as_ref().unwrap() {
            Type::Rpc(rpc) => rpc.r#type,
        })
        .collect();
    assert_eq!(types, [rpc::Type::GetVolumeStats as i32, rpc::Type::VolumeCondition as i32]);
}

#[tokio::test]
async fn what_is_not_offered_is_unimplemented() {
    let server = Server::node().await;
    let mut node = server.node_client().await;
    let stage = node.node_stage_volume(NodeStageVolumeRequest::default()).await.unwrap_err();
    let expand = node.node_expand_volume(NodeExpandVolumeRequest::default()).await.unwrap_err();
    let mut controller = server.controller_client().await;
    let create = controller.create_volume(clip_csi::csi::proto::v1::CreateVolumeRequest::default()).await.unwrap_err();
    assert_eq!([stage.code(), expand.code(), create.code()], [Code::Unimplemented; 3]);
}

#[tokio::test]
async fn a_probe_tells_what_is_broken() {
    let broken = || async { Err("/dev/fuse can't be opened".to_owned()) }.boxed();
    let server = Server::node_with(|_| {}, Readiness::new(vec![("fuse", Box::new(broken))])).await;
    let status = server.identity_client().await.probe(ProbeRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status.message(), "not ready: fuse: /dev/fuse can't be opened");
}

#[tokio::test]
async fn attributes_reach_provider_and_mount_and_secrets_do_not_reach_the_journal() {
    let server = Server::node().await;
    let mut request = server.publish(
        "t",
        &[
            IMAGE,
            ("subPath", "usr/lib"),
            ("integrity", "strict"),
            ("pullPolicy", "Always"),
            ("csi.storage.k8s.io/pod.namespace", "team"),
            ("csi.storage.k8s.io/serviceAccount.tokens", "tok3n"),
        ],
    );
    request.secrets = map(&[("accessKeyId", "AK"), ("secretAccessKey", "s3cret")]);
    server.node_client().await.node_publish_volume(request).await.unwrap();

    let asked = server.images.requests.lock().unwrap().remove(0);
    assert_eq!((asked.image.to_string().as_str(), asked.version), (IMAGE.1, Version::V2));
    assert_eq!((asked.pull_policy, asked.credentials.s3.unwrap().secret_key.as_str()), (PullPolicy::Always, "s3cret"));
    let (spec, target) = server.mounts.at(&server.target("t")).unwrap();
    assert_eq!((spec.integrity, spec.scope.len()), (Integrity::Strict, 64));
    assert_eq!(target.sub_path.as_deref(), Some("usr/lib"));
    assert_eq!(target.volume_id, "csi-0123");
    assert_eq!(target.attributes.keys().collect::<Vec<_>>(), ["image", "integrity", "pullPolicy", "subPath"]);
}

#[tokio::test]
async fn an_archive_is_mounted_without_asking_for_an_image() {
    let server = Server::node().await;
    let request = server.publish("t", &[("archive", "s3://bucket/a.clip")]);
    server.node_client().await.node_publish_volume(request).await.unwrap();
    assert_eq!((server.images.asked(), server.mounts.at(&server.target("t")).unwrap().0.scope.as_str()), (0, "public"));
}

#[tokio::test]
async fn a_request_that_can_not_be_served_says_why_and_mounts_nothing() {
    let server = Server::node().await;
    let mut client = server.node_client().await;
    let good = || server.publish("t", &[IMAGE]);
    let block = || {
        let mut capability = mount_capability(Mode::SingleNodeWriter);
        capability.access_type = Some(AccessType::Block(BlockVolume {}));
        Some(capability)
    };
    let bad: Vec<(NodePublishVolumeRequest, &str)> = vec![
        (
            server.publish("t", &[IMAGE, ("subpath", "x")]),
            "unknown volume attribute \"subpath\" (did you mean subPath?)",
        ),
        (server.publish("t", &[IMAGE, ("archive", "s3://b/k")]), "both an image and an archive"),
        (server.publish("t", &[]), "names nothing to mount"),
        (server.publish("t", &[("image", "no spaces allowed")]), "volume attribute image"),
        (NodePublishVolumeRequest { volume_id: String::new(), ..good() }, "volume_id is missing"),
        (NodePublishVolumeRequest { target_path: String::new(), ..good() }, "target_path is missing"),
        (NodePublishVolumeRequest { target_path: "relative".into(), ..good() }, "not absolute"),
        (NodePublishVolumeRequest { volume_capability: None, ..good() }, "volume_capability is missing"),
        (NodePublishVolumeRequest { volume_capability: block(), ..good() }, "volumeMode: Filesystem"),
        (NodePublishVolumeRequest { secrets: map(&[(".dockercfg", "x")]), ..good() }, "kubernetes.io/dockerconfigjson"),
    ];
    for (request, words) in bad {
        let status = client.node_publish_volume(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(words), "{}", status.message());
    }
    assert_eq!((server.images.asked(), server.mounts.at(&server.target("t")).is_none()), (0, true));
}

#[tokio::test]
async fn the_providers_refusal_is_what_kubectl_describe_shows() {
    let server = Server::node().await;
    let denied =
        SourceError::Denied { what: "registry.example/team/app".into(), detail: "401; name a pull secret".into() };
    *server.images.fails.lock().unwrap() = Some(denied);
    let status = server.node_client().await.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(status.message(), "access to registry.example/team/app was denied: 401; name a pull secret");
}

#[tokio::test]
async fn a_publish_outlasts_its_callers_deadline_and_the_retry_joins_it() {
    let server = Server::node().await;
    let mut client = server.node_client().await;
    server.images.building.close();
    let mut request = tonic::Request::new(server.publish("t", &[IMAGE]));
    request.set_timeout(Duration::from_secs(5));
    let status = client.node_publish_volume(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "answered before the caller gave up: {status:?}");
    assert!(status.message().contains("layer 2 of 5, 34 %"), "{}", status.message());
    // Without a deadline of the caller's, the configured one holds.
    let retry = client.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap_err();
    assert_eq!((retry.code(), server.images.asked()), (Code::Aborted, 1), "joined, not begun again");
    server.images.building.open();
    client.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap();
    assert!(server.mounts.at(&server.target("t")).is_some());
}

#[tokio::test]
async fn another_publish_to_a_target_that_is_being_published_is_aborted() {
    let server = Server::node().await;
    let mut client = server.node_client().await;
    server.images.building.close();
    client.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap_err();
    let other =
        client.node_publish_volume(server.publish("t", &[("image", "registry.example/other:1")])).await.unwrap_err();
    assert_eq!(other.code(), Code::Aborted);
    // Another target is another matter.
    server.images.building.open();
    client.node_publish_volume(server.publish("u", &[IMAGE])).await.unwrap();
}

#[tokio::test]
async fn unpublish_ends_a_waiting_publish_and_nothing_is_mounted_afterwards() {
    let server = Server::node_with(|config| config.publish_wait_seconds = 60, Readiness::new(Vec::new())).await;
    let mut client = server.node_client().await;
    server.images.building.close();
    let waiting = tokio::spawn({
        let (mut client, request) = (client.clone(), server.publish("t", &[IMAGE]));
        async move { client.node_publish_volume(request).await }
    });
    in_time("the build", server.images.happened.until(|| server.images.asked() == 1)).await;
    client.node_unpublish_volume(unpublish(&server, "t")).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::Aborted);
    server.images.building.open();
    client.node_unpublish_volume(unpublish(&server, "t")).await.unwrap();
    assert!(server.mounts.at(&server.target("t")).is_none());
}

#[tokio::test]
async fn unpublish_waits_for_a_mount_that_is_being_made() {
    let server = Server::node().await;
    let mut client = server.node_client().await;
    server.mounts.publishing.close();
    assert_eq!(client.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap_err().code(), Code::Aborted);
    let early = client.node_unpublish_volume(unpublish(&server, "t")).await.unwrap_err();
    assert_eq!(early.code(), Code::Aborted, "a mount that is half made is not torn down");
    server.mounts.publishing.open();
    client.node_unpublish_volume(unpublish(&server, "t")).await.unwrap();
    assert!(server.mounts.at(&server.target("t")).is_none(), "the last word was unpublish");
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_a_whole_mount_or_none() {
    let server = Server::node().await;
    let client = server.node_client().await;
    server.mounts.publishing.close();
    let caller = tokio::spawn({
        let (mut client, request) = (client.clone(), server.publish("t", &[IMAGE]));
        async move { client.node_publish_volume(request).await }
    });
    in_time("the build", server.images.happened.until(|| server.images.asked() == 1)).await;
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    server.mounts.publishing.open();
    let made = || server.mounts.at(&server.target("t")).is_some();
    in_time("the mount", server.mounts.happened.until(made)).await;
}

#[tokio::test]
async fn publish_and_unpublish_are_idempotent_and_other_parameters_a_conflict() {
    let server = Server::node().await;
    let mut client = server.node_client().await;
    for _ in 0..2 {
        client.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap();
    }
    let other = client.node_publish_volume(server.publish("t", &[IMAGE, ("root", "archive")])).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists);
    for _ in 0..2 {
        client.node_unpublish_volume(unpublish(&server, "t")).await.unwrap();
    }
    for bad in [
        NodeUnpublishVolumeRequest { volume_id: String::new(), ..unpublish(&server, "t") },
        NodeUnpublishVolumeRequest { target_path: String::new(), ..unpublish(&server, "t") },
    ] {
        assert_eq!(client.node_unpublish_volume(bad).await.unwrap_err().code(), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn statistics_are_those_of_a_full_volume_and_not_found_where_none_is() {
    let server = Server::node().await;
    let mut client = server.node_client().await;
    let stats = NodeGetVolumeStatsRequest {
        volume_id: "csi-0123".into(),
        volume_path: server.target("t"),
        ..Default::default()
    };
    assert_eq!(client.node_get_volume_stats(stats.clone()).await.unwrap_err().code(), Code::NotFound);
    client.node_publish_volume(server.publish("t", &[IMAGE])).await.unwrap();
    let answer = client.node_get_volume_stats(stats.clone()).await.unwrap().into_inner();
    let usage: Vec<_> = answer.usage.iter().map(|u| (u.unit(), u.total, u.used, u.available)).collect();
    assert_eq!(usage, [(Unit::Bytes, 4096, 4096, 0), (Unit::Inodes, 7, 7, 0)]);
    assert!(!answer.volume_condition.unwrap().abnormal);
    let nowhere = NodeGetVolumeStatsRequest { volume_path: "some/path".into(), ..stats.clone() };
    assert_eq!(client.node_get_volume_stats(nowhere).await.unwrap_err().code(), Code::NotFound);
    let nameless = NodeGetVolumeStatsRequest { volume_id: String::new(), ..stats };
    assert_eq!(client.node_get_volume_stats(nameless).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn stopping_answers_who_waits_lets_go_of_the_mounts_and_unlinks_nothing() {
    let mut server = Server::node_with(|config| config.publish_wait_seconds = 60, Readiness::new(Vec::new())).await;
    let client = server.node_client().await;
    server.images.building.close();
    let waiting = tokio::spawn({
        let (mut client, request) = (client.clone(), server.publish("t", &[IMAGE]));
        async move { client.node_publish_volume(request).await }
    });
    in_time("the build", server.images.happened.until(|| server.images.asked() == 1)).await;
    server.stop().await.unwrap();
    let status = waiting.await.unwrap().unwrap_err();
    assert!(status.code() == Code::Aborted && status.message().contains("stopping"), "{status:?}");
    assert!(server.mounts.shut_down.load(Ordering::SeqCst));
    assert!(server.socket().exists());
}

/// Log lines, as they would be written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn logs_and_metrics_tell_the_call_and_never_a_secret() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // The runtime of a test is this one thread.
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = Server::node().await;
    let mut request = server.publish("t", &[IMAGE, ("csi.storage.k8s.io/serviceAccount.tokens", "t0ken-value")]);
    request.secrets = map(&[("accessKeyId", "AK"), ("secretAccessKey", "s3cret-value")]);
    server.node_client().await.node_publish_volume(request).await.unwrap();

    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    // What HTTP/2 itself says at this level is about frames, not about us.
    let ours: String = text.lines().filter(|line| line.contains("clip_csi::")).collect::<Vec<_>>().join("\n");
    let line = ours.lines().find(|line| line.contains("published")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("NodePublishVolume") && line.contains("csi-0123"), "{line}");
    assert!(line.contains(&server.target("t")), "{line}");
    assert!(!ours.contains("s3cret-value") && !ours.contains("t0ken-value"), "{ours}");
    let metrics = String::from_utf8(clip_csi::metrics::render().unwrap()).unwrap();
    assert!(metrics.contains("clip_rpc_seconds_count{code=\"OK\",method=\"NodePublishVolume\"}"), "{metrics}");
    assert!(metrics.contains("clip_publishes_total{result=\"ok\",version=\"v2\"}"), "{metrics}");
}
