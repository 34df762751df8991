//! What the services do with the Kubernetes API: claims that choose their image, Events, the startup taint, readiness.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clip_csi::csi::Readiness;
use clip_csi::csi::proto::v1::volume_capability::access_mode::Mode;
use clip_csi::csi::proto::v1::{CreateVolumeRequest, NodeGetVolumeStatsRequest, ProbeRequest, Volume};
use clip_csi::k8s::events::Event;
use clip_csi::k8s::fake::FakeKube;
use clip_csi::k8s::{Claim, KubeApi as _, KubeError};
use clip_csi::source::{Scope, SourceError};
use tonic::{Code, Status};

use super::fakes::{FakeVolumes, MANIFEST};
use super::{PATIENCE, Server, map, mount_capability};

const IMAGE: &str = "registry.example/team/app:1";
const TAINT: &str = "clip.csi.beam.cloud/agent-not-ready";
const ALLOW: (&str, &str) = ("allowImageFromPVC", "true");
/// In every secret of these tests; nothing that anybody can read may hold it.
const PASSWORD: &str = "hunter2";

/// A CreateVolume for the claim team/claim, as a provisioner with `--extra-create-metadata` sends it.
fn create(name: &str, parameters: &[(&str, &str)]) -> CreateVolumeRequest {
    let metadata = [("csi.storage.k8s.io/pvc/namespace", "team"), ("csi.storage.k8s.io/pvc/name", "claim")];
    CreateVolumeRequest {
        name: name.into(),
        parameters: map(&[parameters, &metadata].concat()),
        volume_capabilities: vec![mount_capability(Mode::MultiNodeReaderOnly)],
        ..Default::default()
    }
}

fn text(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The claim team/claim with these annotations, of a class with these parameters.
fn put(kube: &FakeKube, annotations: &[(&str, &str)], class: &[(&str, &str)]) {
    kube.put_class("images", text(class));
    let claim = Claim {
        uid: "uid-of-claim".into(),
        annotations: text(annotations),
        storage_class: Some("images".into()),
        access_modes: vec!["ReadOnlyMany".into()],
    };
    kube.put_claim("team", "claim", claim);
}

async fn send(server: &Server, request: CreateVolumeRequest) -> Result<Volume, Status> {
    let answer = server.controller_client().await.create_volume(request).await?;
    Ok(answer.into_inner().volume.unwrap())
}

async fn refused(server: &Server, request: CreateVolumeRequest, code: Code, words: &[&str]) {
    let status = send(server, request).await.unwrap_err();
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(words.iter().all(|word| status.message().contains(word)), "{}", status.message());
}

async fn events(kube: &FakeKube, count: usize) -> Vec<Event> {
    let told = kube.until(|kube| kube.events().len() >= count);
    tokio::time::timeout(PATIENCE, told).await.expect("an event");
    kube.events()
}

#[tokio::test]
async fn a_claim_chooses_its_image_where_the_class_lets_it() {
    let server = Server::controller(true).await;
    put(
        &server.kube,
        &[("clip.csi.beam.cloud/image", IMAGE), ("clip.csi.beam.cloud/subPath", "usr"), ("a/b", "c")],
        &[ALLOW],
    );
    let volume = send(&server, create("pvc-1", &[ALLOW])).await.unwrap();
    assert_eq!(volume.volume_context["image"], format!("registry.example/team/app@{MANIFEST}"));
    assert_eq!(volume.volume_context["subPath"], "usr");
    assert_eq!(volume.volume_context["clip.csi.beam.cloud/image-bytes"], "123456789");
    assert!(!volume.volume_context.contains_key("allowImageFromPVC"), "nodes need not know");
    let record = server.volumes.records.lock().unwrap()[&volume.volume_id].clone();
    assert_eq!(record.image_bytes, Some(123_456_789));
}

#[tokio::test]
async fn annotations_are_not_even_read_where_the_class_does_not_let_them() {
    let server = Server::controller(true).await;
    put(&server.kube, &[("clip.csi.beam.cloud/image", IMAGE)], &[]);
    for parameters in [&[][..], &[("allowImageFromPVC", "false")]] {
        refused(&server, create("pvc-1", parameters), Code::InvalidArgument, &["names nothing to mount"]).await;
    }
    refused(&server, create("p", &[("allowImageFromPVC", "yes")]), Code::InvalidArgument, &["\"true\" or \"false\""])
        .await;
    assert_eq!(server.kube.calls("claim"), 0);
}

#[tokio::test]
async fn a_volume_stays_what_it_was_created_as_when_its_claim_changes() {
    let kube = Arc::<FakeKube>::default();
    let store = Arc::<FakeVolumes>::default();
    let one = Server::controller_over(Some(store.clone()), kube.clone(), true).await;
    put(&kube, &[("clip.csi.beam.cloud/image", IMAGE)], &[ALLOW]);
    let first = send(&one, create("pvc-1", &[ALLOW])).await.unwrap();
    put(&kube, &[("clip.csi.beam.cloud/image", "registry.example/other:2")], &[ALLOW]);
    assert_eq!(send(&one, create("pvc-1", &[ALLOW])).await.unwrap(), first);
    // Another controller, the claim gone and the API away: the record is enough.
    kube.fail("claim", KubeError::Unavailable { what: "get".into(), detail: "timeout".into() });
    let other = Server::controller_over(Some(store), kube, true).await;
    assert_eq!(send(&other, create("pvc-1", &[ALLOW])).await.unwrap(), first);
    assert_eq!(other.images.asked(), 0);
    let taken = create("pvc-1", &[("image", IMAGE)]);
    refused(&other, taken, Code::AlreadyExists, &["other parameters"]).await;
}

#[tokio::test]
async fn a_claim_that_was_made_anew_has_no_say_in_its_predecessors_volume() {
    let server = Server::controller(true).await;
    let (old, new) = ("0a1b2c3d-0000-4000-8000-00000000000a", "0a1b2c3d-0000-4000-8000-00000000000b");
    put(&server.kube, &[("clip.csi.beam.cloud/image", IMAGE)], &[ALLOW]);
    let claim = server.kube.claim("team", "claim").await.unwrap().unwrap();
    server.kube.put_claim("team", "claim", Claim { uid: new.into(), ..claim });
    let words = ["team/claim", "made anew"];
    refused(&server, create(&format!("pvc-{old}"), &[ALLOW]), Code::NotFound, &words).await;
    send(&server, create(&format!("pvc-{new}"), &[ALLOW])).await.unwrap();
}

#[tokio::test]
async fn two_controllers_that_race_make_one_volume() {
    let kube = Arc::<FakeKube>::default();
    let store = Arc::<FakeVolumes>::default();
    put(&kube, &[("clip.csi.beam.cloud/image", IMAGE)], &[ALLOW]);
    let one = Server::controller_over(Some(store.clone()), kube.clone(), true).await;
    let two = Server::controller_over(Some(store.clone()), kube, true).await;
    let (a, b) = tokio::join!(send(&one, create("pvc-1", &[ALLOW])), send(&two, create("pvc-1", &[ALLOW])));
    assert_eq!(a.unwrap(), b.unwrap());
    assert_eq!(store.records.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn the_slower_of_two_controllers_gives_the_volume_that_the_faster_one_recorded() {
    let kube = Arc::<FakeKube>::default();
    let store = Arc::<FakeVolumes>::default();
    let slow = Server::controller_over(Some(store.clone()), kube.clone(), true).await;
    let fast = Server::controller_over(Some(store), kube.clone(), true).await;
    slow.images.building.close();
    put(&kube, &[("clip.csi.beam.cloud/image", IMAGE), ("clip.csi.beam.cloud/subPath", "usr")], &[ALLOW]);
    assert_eq!(send(&slow, create("pvc-1", &[ALLOW])).await.unwrap_err().code(), Code::Aborted);
    put(&kube, &[("clip.csi.beam.cloud/image", "registry.example/other:2")], &[ALLOW]);
    let first = send(&fast, create("pvc-1", &[ALLOW])).await.unwrap();
    assert!(first.volume_context["image"].starts_with("registry.example/other@"));
    slow.images.building.open();
    // Until the slow one has ended, what it began and what the record says are two calls on one volume.
    let give_up = tokio::time::Instant::now() + PATIENCE;
    let second = loop {
        match send(&slow, create("pvc-1", &[ALLOW])).await {
            Ok(volume) => break volume,
            Err(status) => {
                assert!(status.code() == Code::Aborted && tokio::time::Instant::now() < give_up, "{status:?}")
            }
        }
    };
    assert_eq!(second, first);
}

#[tokio::test]
async fn what_the_class_fixes_a_claim_can_not_change() {
    let server = Server::controller(true).await;
    let fixed = [("image", "registry.example/fixed:1"), ("integrity", "strict"), ALLOW];
    for (annotation, value) in [
        ("clip.csi.beam.cloud/image", IMAGE),
        ("clip.csi.beam.cloud/archive", "s3://bucket/a.clip"),
        ("clip.csi.beam.cloud/integrity", "digest"),
    ] {
        put(&server.kube, &[(annotation, value)], &fixed);
        refused(&server, create("pvc-1", &fixed), Code::InvalidArgument, &["team/claim", "the StorageClass fixes"])
            .await;
    }
    put(&server.kube, &[("clip.csi.beam.cloud/subPath", "usr")], &fixed);
    let volume = send(&server, create("pvc-1", &fixed)).await.unwrap();
    assert!(volume.volume_context["image"].starts_with("registry.example/fixed@"), "what is left open may be said");
}

#[tokio::test]
async fn a_claim_that_can_not_be_heeded_says_why() {
    let server = Server::controller(true).await;
    let said =
        |name: &str, value: &str| put(&server.kube, &[(&format!("clip.csi.beam.cloud/{name}"), value)], &[ALLOW]);
    refused(&server, create("pvc-1", &[ALLOW]), Code::NotFound, &["claim team/claim does not exist"]).await;
    said("imgae", IMAGE);
    refused(&server, create("pvc-1", &[ALLOW]), Code::InvalidArgument, &["did you mean image?"]).await;
    for local in ["oci:/images/app", "oci-archive:/images/app.tar"] {
        said("image", local);
        refused(&server, create("pvc-1", &[ALLOW]), Code::InvalidArgument, &["no local layout"]).await;
    }
    said("subPath", "usr");
    refused(&server, create("pvc-1", &[ALLOW]), Code::InvalidArgument, &["names nothing to mount"]).await;
    let nameless = CreateVolumeRequest { parameters: map(&[ALLOW]), ..create("pvc-1", &[]) };
    refused(&server, nameless, Code::FailedPrecondition, &["--extra-create-metadata"]).await;
    let denied = || KubeError::Denied { what: "get persistentvolumeclaim claim".into(), detail: "forbidden".into() };
    server.kube.fail("claim", denied());
    refused(&server, create("pvc-1", &[ALLOW]), Code::FailedPrecondition, &["forbidden", "docs/security.md"]).await;
    server.kube.fail("claim", KubeError::Unavailable { what: "get".into(), detail: "timeout".into() });
    refused(&server, create("pvc-1", &[ALLOW]), Code::Unavailable, &["timeout"]).await;
    assert!(server.volumes.records.lock().unwrap().is_empty());
    let bare = Server::controller_over(Some(Arc::default()), Arc::default(), false).await;
    refused(&bare, create("pvc-1", &[ALLOW]), Code::FailedPrecondition, &["k8s.enabled"]).await;
}

#[tokio::test]
async fn a_claim_never_spends_a_secret_of_another_namespace() {
    let server = Server::controller(true).await;
    let image = [("clip.csi.beam.cloud/image", IMAGE)];
    for key in ["provisioner-secret-namespace", "node-publish-secret-namespace", "secret-namespace"] {
        let key = format!("csi.storage.k8s.io/{key}");
        for foreign in ["kube-system", "${pv.name}", "${pvc.namespace}x"] {
            put(&server.kube, &image, &[ALLOW, (&key, foreign)]);
            refused(&server, create("pvc-1", &[ALLOW]), Code::PermissionDenied, &[&key, "${pvc.namespace}"]).await;
        }
        for own in ["${pvc.namespace}", "team"] {
            put(&server.kube, &image, &[ALLOW, (&key, own)]);
            send(&server, create(&format!("pvc-{key}-{own}")[..60.min(4 + key.len() + 1 + own.len())], &[ALLOW]))
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn the_class_that_is_looked_at_is_the_one_whose_secret_is_spent() {
    let server = Server::controller(true).await;
    let beta = [("clip.csi.beam.cloud/image", IMAGE), ("volume.beta.kubernetes.io/storage-class", "lender")];
    put(&server.kube, &beta, &[ALLOW]);
    let secret = ("csi.storage.k8s.io/provisioner-secret-namespace", "kube-system");
    server.kube.put_class("lender", text(&[ALLOW, secret]));
    refused(&server, create("pvc-1", &[ALLOW]), Code::PermissionDenied, &["lender", "kube-system"]).await;
    // A class that says something else is not the one that the call was made of.
    put(&server.kube, &beta[..1], &[ALLOW, ("clipVersion", "2")]);
    refused(&server, create("pvc-1", &[ALLOW]), Code::FailedPrecondition, &["says something else"]).await;
}

#[tokio::test]
async fn a_fallback_a_long_build_and_a_read_only_volume_are_told_on_the_claim() {
    let server = Server::controller(true).await;
    put(&server.kube, &[], &[]);
    server.images.falls_back.store(true, Ordering::SeqCst);
    server.images.building.close();
    let request = || CreateVolumeRequest {
        volume_capabilities: vec![mount_capability(Mode::SingleNodeWriter)],
        ..create("pvc-1", &[("image", IMAGE), ("clipVersion", "2")])
    };
    assert_eq!(send(&server, request()).await.unwrap_err().code(), Code::Aborted);
    let told = events(&server.kube, 1).await;
    assert_eq!((told[0].reason, told[0].object.uid.as_str()), ("ArchiveBuilding", "uid-of-claim"));
    assert!(told[0].message.contains(IMAGE) && told[0].message.contains("34 %"), "{}", told[0].message);
    server.images.building.open();
    send(&server, request()).await.unwrap();
    let mut reasons: Vec<_> = events(&server.kube, 3).await.into_iter().map(|event| event.reason).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, ["ArchiveBuilding", "FellBackToV1", "ReadOnlyVolume"]);
}

const POD: [(&str, &str); 3] = [
    ("csi.storage.k8s.io/pod.namespace", "team"),
    ("csi.storage.k8s.io/pod.name", "pod-1"),
    ("csi.storage.k8s.io/pod.uid", "uid-of-pod"),
];

#[tokio::test]
async fn a_fallback_and_a_volume_that_falls_ill_are_told_on_the_pod() {
    let server = Server::node().await;
    server.images.falls_back.store(true, Ordering::SeqCst);
    let attributes = [&[("image", IMAGE)][..], &POD].concat();
    let mut client = server.node_client().await;
    client.node_publish_volume(server.publish("t", &attributes)).await.unwrap();
    let told = events(&server.kube, 1).await;
    assert_eq!(
        (told[0].reason, told[0].object.kind, told[0].object.uid.as_str()),
        ("FellBackToV1", "Pod", "uid-of-pod")
    );
    *server.mounts.abnormal.lock().unwrap() = Some("a read failed 1 s ago: no digest covers it".into());
    let ask = NodeGetVolumeStatsRequest {
        volume_id: "csi-0123".into(),
        volume_path: server.target("t"),
        ..Default::default()
    };
    client.node_get_volume_stats(ask).await.unwrap();
    let told = events(&server.kube, 2).await;
    assert_eq!((told[1].reason, told[1].object.name.as_str()), ("VolumeUnhealthy", "pod-1"));
    assert!(told[1].message.contains("no digest covers it"), "{}", told[1].message);
}

#[tokio::test]
async fn a_build_that_outlasts_the_call_is_told_on_the_pod_and_an_api_that_hangs_holds_nothing_up() {
    let server = Server::node().await;
    server.kube.gate(false);
    server.images.building.close();
    let attributes = [&[("image", IMAGE)][..], &POD].concat();
    let mut client = server.node_client().await;
    let status = client.node_publish_volume(server.publish("t", &attributes)).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    server.images.building.open();
    client.node_publish_volume(server.publish("t", &attributes)).await.unwrap();
    assert_eq!(server.kube.events(), []);
    server.kube.gate(true);
    let told = events(&server.kube, 1).await;
    assert_eq!(told[0].reason, "ArchiveBuilding");
    assert!(told[0].message.contains("34 %"), "{}", told[0].message);
}

#[tokio::test]
async fn the_startup_taint_goes_when_calls_are_answered_and_the_kubelet_lists_the_driver() {
    let kube = Arc::<FakeKube>::default();
    kube.taint("node-1", TAINT, "NoExecute");
    kube.taint("node-1", "other", "NoSchedule");
    let server = Server::node_of(kube.clone(), TAINT).await;
    let within = |condition: fn(&FakeKube) -> bool| tokio::time::timeout(PATIENCE, kube.until(condition));
    within(|kube| kube.calls("node_drivers") > 0).await.unwrap();
    assert_eq!(kube.taint_keys("node-1").len(), 2, "not listed yet");
    kube.register("node-1", "clip.csi.beam.cloud");
    within(|kube| kube.taint_keys("node-1") == ["other"]).await.unwrap();
    drop(server);
}

#[tokio::test]
async fn a_node_that_is_starting_keeps_its_taint() {
    let kube = Arc::<FakeKube>::default();
    kube.taint("node-1", TAINT, "NoExecute");
    kube.register("node-1", "clip.csi.beam.cloud");
    let mounts = Arc::<super::FakeMounts>::default();
    mounts.recovering.close();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let config = super::config(dir.path());
    let kubernetes = clip_csi::k8s::Kubernetes { startup_taint: Some(TAINT.into()), ..super::kubernetes(&kube) };
    let readiness = Readiness::new(Vec::new());
    let server = Server::launch_node(dir, config, mounts.clone(), readiness, kube.clone(), kubernetes).await;
    assert_eq!((kube.calls("node_drivers"), kube.taint_keys("node-1").len()), (0, 1), "CSINode outlives a restart");
    mounts.recovering.open();
    tokio::time::timeout(PATIENCE, kube.until(|kube| kube.taint_keys("node-1").is_empty())).await.unwrap();
    drop(server);
}

#[tokio::test]
async fn a_controller_is_ready_when_store_and_api_answer() {
    let well = Server::controller(true).await;
    well.identity_client().await.probe(ProbeRequest {}).await.unwrap();
    // From the start: an answer is kept for some seconds.
    let (kube, what) = (Arc::<FakeKube>::default(), "get /version".to_owned());
    kube.fail("reachable", KubeError::Unavailable { what, detail: "timeout".into() });
    let ill = Server::controller_over(Some(Arc::default()), kube, true).await;
    let status = ill.identity_client().await.probe(ProbeRequest {}).await.unwrap_err();
    assert!(status.message().contains("kubernetes: ") && status.message().contains("timeout"), "{}", status.message());
}

/// Everything that a person can read after volumes with secrets were made, published and refused.
#[tokio::test]
async fn no_secret_is_in_an_answer_a_record_an_event_a_metric_or_a_message() {
    let auth = format!("{{\"auths\":{{\"registry.example\":{{\"username\":\"bob\",\"password\":\"{PASSWORD}\"}}}}}}");
    let secrets = [(".dockerconfigjson", auth.as_str()), ("accessKeyId", "AK"), ("secretAccessKey", PASSWORD)];
    let mut read = Vec::new();

    let server = Server::controller(true).await;
    put(&server.kube, &[("clip.csi.beam.cloud/image", IMAGE)], &[ALLOW, ("clipVersion", "2")]);
    server.images.falls_back.store(true, Ordering::SeqCst);
    let request = |name: &str| CreateVolumeRequest {
        secrets: map(&secrets),
        volume_capabilities: vec![mount_capability(Mode::SingleNodeWriter)],
        ..create(name, &[ALLOW, ("clipVersion", "2")])
    };
    let volume = send(&server, request("pvc-1")).await.unwrap();
    read.push(format!("{volume:?} {:?}", server.volumes.records.lock().unwrap()));
    read.push(format!("{:?}", events(&server.kube, 2).await));
    assert!(server.images.requests.lock().unwrap()[0].credentials.docker_config.is_some(), "they were used");
    let what = "registry.example/team/app".to_owned();
    *server.images.fails.lock().unwrap() = Some(SourceError::Denied { what, detail: "401".into() });
    read.push(format!("{:?}", send(&server, request("pvc-2")).await.unwrap_err()));
    let broken = CreateVolumeRequest { secrets: map(&[("token", PASSWORD)]), ..request("pvc-3") };
    read.push(format!("{:?}", send(&server, broken).await.unwrap_err()));

    let node = Server::node().await;
    node.images.falls_back.store(true, Ordering::SeqCst);
    let mut publish = node.publish("t", &[&[("image", IMAGE)][..], &POD].concat());
    publish.secrets = map(&secrets);
    node.node_client().await.node_publish_volume(publish).await.unwrap();
    read.push(format!("{:?}", events(&node.kube, 1).await));
    let (spec, target) = node.mounts.at(&node.target("t")).unwrap();
    assert!(spec.credentials.docker_config.is_some() && spec.scope != format!("{:?}", Scope::Public));
    read.push(format!("{:?} {} {:?}", spec.credentials, spec.scope, target));

    read.push(String::from_utf8(clip_csi::metrics::render().unwrap()).unwrap());
    for text in &read {
        assert!(!text.contains(PASSWORD), "{text}");
    }
}
