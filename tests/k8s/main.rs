//! The Kubernetes API through `clip_csi::k8s`: one test body for the fake and for a real API server, where the driver has the
//! rights that the chart gives it and no others.
//!
//! `CLIP_CSI_TEST_KUBECONFIG` names the kubeconfig of an administrator (docs/testing.md); kubectl and helm are on the PATH.

mod cluster;
mod real;
#[path = "../common/skip.rs"]
mod skip;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use clip_csi::build::store::{Records as _, VolumeRecord};
use clip_csi::k8s::events::{Event, Severity};
use clip_csi::k8s::taint::StartupTaint;
use clip_csi::k8s::{ConfigMapRecords, KubeError, Object, Recorder, Taints};
use clip_csi::units::Digest;
use cluster::{Cluster, Fake};
use serde_json::{Value, json};

/// Nothing here takes longer unless it is broken.
const PATIENCE: Duration = Duration::from_secs(60);
const DRIVER: &str = "clip.csi.example.com";
/// What the chart is rendered with, and a key of somebody else's.
const TAINT: &str = "clip.csi.example.com/not-ready";
const OTHER: &str = "example.com/dedicated";

/// Each body for the fake, and for a real server where there is one.
macro_rules! on_every_cluster {
    ($($body:ident),+ $(,)?) => {
        mod the_fake {
            $(#[tokio::test]
            async fn $body() {
                super::$body(&super::Fake::default()).await;
            })+
        }
        mod a_real_server {
            $(#[tokio::test]
            async fn $body() {
                let Some(cluster) = super::real::Real::start(concat!("a_real_server::", stringify!($body))).await else { return };
                super::$body(&cluster).await;
            })+
        }
    };
}
on_every_cluster!(
    claims_and_classes_are_read_and_what_is_absent_is_no_error,
    a_record_is_created_once_however_many_race_and_listed_for_its_own_driver_only,
    an_event_is_found_by_the_object_that_it_is_about,
    only_our_taint_goes_and_only_once_the_kubelet_lists_the_driver,
    what_was_read_before_somebody_elses_change_is_not_written,
);

fn text(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{what} does not come about"))
}

async fn claims_and_classes_are_read_and_what_is_absent_is_no_error(cluster: &dyn Cluster) {
    let (api, namespace) = (cluster.controller(), cluster.namespace());
    api.reachable().await.unwrap();
    assert_eq!(api.claim(namespace, "claim").await.unwrap(), None);
    let class = cluster.unique("class");
    assert_eq!(api.class_parameters(&class).await.unwrap(), None);
    let annotations = text(&[("clip.csi.beam.cloud/image", "registry.example/team/app:1"), ("a/b", "c\n\"d\"")]);
    let parameters = text(&[("allowImageFromPVC", "true"), ("csi.storage.k8s.io/provisioner-secret-name", "s")]);
    cluster.put_class(&class, &parameters).await;
    let uid = cluster.put_claim("claim", &class, &annotations).await;
    let claim = api.claim(namespace, "claim").await.unwrap().unwrap();
    assert_eq!((claim.uid, claim.storage_class), (uid, Some(class.clone())));
    assert_eq!(claim.access_modes, ["ReadOnlyMany"]);
    for (name, value) in &annotations {
        assert_eq!(claim.annotations.get(name), Some(value), "others may add more");
    }
    assert_eq!(api.class_parameters(&class).await.unwrap(), Some(parameters));
}

fn record(name: &str) -> VolumeRecord {
    let hex = Digest::of(name.as_bytes()).hex();
    serde_json::from_value(json!({
        "id": format!("v1-{}", &hex[..32]),
        "name": name,
        "parameters": Digest::of(b"parameters"),
        "archive": "archives/a.clip",
        "created": 1,
    }))
    .unwrap()
}

async fn a_record_is_created_once_however_many_race_and_listed_for_its_own_driver_only(cluster: &dyn Cluster) {
    let records = ConfigMapRecords::new(cluster.controller(), DRIVER);
    let (a, b) = (record("a"), record("b"));
    assert_eq!(records.get(&a.id).await.unwrap(), None);
    assert_eq!(records.create(&a).await.unwrap(), None);
    let other = VolumeRecord { name: "other".into(), ..a.clone() };
    assert_eq!(records.create(&other).await.unwrap(), Some(a.clone()), "the first one holds");
    let racing: Vec<_> = (0..8).map(|n| VolumeRecord { created: n, ..b.clone() }).collect();
    let outcomes = futures::future::join_all(racing.iter().map(|record| records.create(record))).await;
    let outcomes: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
    let winners: Vec<_> = racing.iter().zip(&outcomes).filter(|(_, there)| there.is_none()).collect();
    assert_eq!(winners.len(), 1, "{outcomes:?}");
    let winner = winners[0].0.clone();
    assert!(outcomes.iter().flatten().all(|there| *there == winner), "all learn of the one that holds: {outcomes:?}");
    let mut listed = records.list().await.unwrap();
    listed.sort_by(|x, y| x.name.cmp(&y.name));
    assert_eq!(listed, [a.clone(), winner]);
    let others = ConfigMapRecords::new(cluster.controller(), "other.csi.example.com");
    assert_eq!(others.list().await.unwrap(), [], "another driver's are not ours");
    for id in [&a.id, &a.id, &b.id] {
        records.delete(id).await.unwrap();
    }
    assert_eq!((records.get(&a.id).await.unwrap(), records.list().await.unwrap()), (None, vec![]));
}

async fn an_event_is_found_by_the_object_that_it_is_about(cluster: &dyn Cluster) {
    let namespace = cluster.namespace().to_owned();
    // The longest name that a pod can have: an Event's own name is made of it.
    let pod = Object { kind: "Pod", namespace: namespace.clone(), name: "p".repeat(253), uid: "uid-of-pod".into() };
    let recorder = Recorder::start(cluster.node(), DRIVER, cluster.node_name());
    recorder.tell(&pod, Severity::Warning, "FellBackToV1", &"é\n".repeat(2000));
    let told = in_time("the pod's event", cluster.events_of(&pod.name)).await;
    let [event] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!((event["type"].as_str(), event["reason"].as_str()), (Some("Warning"), Some("FellBackToV1")));
    assert_eq!(event["involvedObject"]["uid"], "uid-of-pod");
    assert_eq!(event["source"], json!({ "component": DRIVER, "host": cluster.node_name() }));
    let message = event["message"].as_str().unwrap();
    assert!(message.starts_with("é é") && message.len() <= 1024 && !message.contains('\n'), "{message}");
    let claim = Object { kind: "PersistentVolumeClaim", namespace, name: "claim".into(), uid: "uid-of-claim".into() };
    let event = Event {
        name: "claim.1".into(),
        object: claim,
        severity: Severity::Normal,
        reason: "ReadOnlyVolume",
        message: "it is".into(),
        component: DRIVER.into(),
        instance: "controller-0".into(),
        at: SystemTime::now(),
    };
    cluster.controller().create_event(&event).await.unwrap();
    assert_eq!(in_time("the claim's event", cluster.events_of("claim")).await.len(), 1);
}

fn taint(key: &str, value: &str, effect: &str) -> Value {
    json!({ "key": key, "value": value, "effect": effect })
}

/// Of the taints that this test makes, key and value of those that are left: a cluster adds its own to a node without a kubelet.
async fn left(cluster: &dyn Cluster) -> Vec<(String, String)> {
    let taints = cluster.node().taints(cluster.node_name()).await.unwrap().taints;
    let pair = |taint: &Value| {
        let text = |key: &str| taint[key].as_str().unwrap_or_default().to_owned();
        (text("key"), text("value"))
    };
    let mut pairs: Vec<_> = taints.iter().map(pair).filter(|(key, _)| [TAINT, OTHER].contains(&key.as_str())).collect();
    pairs.sort();
    pairs
}

async fn only_our_taint_goes_and_only_once_the_kubelet_lists_the_driver(cluster: &dyn Cluster) {
    let (api, node) = (cluster.node(), cluster.node_name());
    let absent = cluster.unique("absent");
    let gone = api.taints(&absent).await.unwrap_err();
    assert!(matches!(gone, KubeError::NotFound { .. }), "{gone}");
    assert_eq!(api.node_drivers(&absent).await.unwrap(), Vec::<String>::new());

    let other = taint(OTHER, "gpu", "NoSchedule");
    cluster.put_taints(&[taint(TAINT, "", "NoSchedule"), other, taint(TAINT, "x", "NoExecute")]).await;
    cluster.register("another.csi.example.com").await;
    let taint = StartupTaint { api: api.clone(), node: node.into(), driver: DRIVER.into(), key: TAINT.into() };
    // Long enough for two looks at CSINode.
    let early = tokio::time::timeout(Duration::from_millis(2500), taint.remove()).await;
    assert!(early.is_err() && left(cluster).await.len() == 3, "the driver is not listed yet");
    cluster.register(DRIVER).await;
    in_time("the taint's removal", taint.remove()).await;
    assert_eq!(left(cluster).await, [(OTHER.to_owned(), "gpu".to_owned())]);
    in_time("a removal of nothing", taint.remove()).await;
}

async fn what_was_read_before_somebody_elses_change_is_not_written(cluster: &dyn Cluster) {
    let (api, node) = (cluster.node(), cluster.node_name());
    cluster.put_taints(&[taint(TAINT, "", "NoSchedule")]).await;
    let read = api.taints(node).await.unwrap();
    cluster.put_taints(&[taint(TAINT, "", "NoSchedule"), taint(OTHER, "late", "NoSchedule")]).await;
    let none = Taints { taints: Vec::new(), ..read };
    let stale = api.set_taints(node, &none).await.unwrap_err();
    assert!(matches!(stale, KubeError::Conflict { .. }), "{stale}");
    assert_eq!(left(cluster).await.len(), 2);
}
