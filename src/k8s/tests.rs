//! What is made of the API, over the fake. The API itself, fake and real, is tested by tests/k8s.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::events::Severity;
use super::fake::FakeKube;
use super::taint::StartupTaint;
use super::*;
use crate::build::BuildError;
use crate::build::store::{Records, VolumeRecord};
use crate::source::SourceError;
use crate::units::Digest;

const PATIENCE: Duration = Duration::from_secs(60);
const TAINT: &str = "clip.csi.beam.cloud/agent-not-ready";

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("it comes about")
}

fn record(seed: &str) -> VolumeRecord {
    let hex = Digest::of(seed.as_bytes()).hex();
    serde_json::from_value(serde_json::json!({
        "id": format!("v1-{}", &hex[..32]),
        "name": seed,
        "parameters": Digest::of(b"p"),
        "archive": "archives/a.clip",
        "created": 1,
    }))
    .unwrap()
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error_within_the_deadline_and_no_secret_is_told() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: k, user: u}}}}], \
         clusters: [{{name: k, cluster: {{server: 'http://127.0.0.1:{port}'}}}}], users: [{{name: u, user: {{token: hunter2}}}}]}}"
    );
    std::fs::write(&file, text).unwrap();
    let config = KubeConfig { kubeconfig: Some(file), ..KubeConfig::default() };
    let api = connect(&config).await.unwrap().unwrap();
    let error = in_time(api.claim("default", "claim")).await.unwrap_err();
    assert!(matches!(error, KubeError::Unavailable { .. }), "{error:?}");
    assert!(!format!("{error} {error:?} {api:?}").contains("hunter2"), "{error}");
    let error = api.claim("default", "../secrets/s").await.unwrap_err();
    assert!(matches!(error, KubeError::Invalid { .. }), "a name is no path: {error}");
}

#[tokio::test]
async fn without_a_cluster_auto_is_off_and_true_says_what_to_do() {
    assert!(std::env::var_os("KUBERNETES_SERVICE_HOST").is_none(), "this test does not run in a pod");
    let auto = connect(&KubeConfig::default()).await.unwrap();
    assert!(auto.is_none());
    let forced = KubeConfig { enabled: config::Enabled::Yes, ..KubeConfig::default() };
    let error = connect(&forced).await.unwrap_err().to_string();
    assert!(error.starts_with("k8s.enabled") && error.contains("k8s.kubeconfig"), "{error}");
    let missing = KubeConfig { kubeconfig: Some("/nowhere/kubeconfig".into()), ..KubeConfig::default() };
    assert!(connect(&missing).await.unwrap_err().to_string().contains("/nowhere/kubeconfig"));
}

#[tokio::test]
async fn a_record_that_can_not_be_read_fails_the_listing_and_the_cause_keeps_its_kind() {
    let api = Arc::new(FakeKube::default());
    let records = ConfigMapRecords::new(api.clone(), "d");
    let labels = BTreeMap::from([(format!("{PREFIX}volume-record"), "d".to_owned())]);
    let name = record("x").id;
    api.create_config_map(&ConfigMap { name: name.clone(), labels, data: BTreeMap::new() }).await.unwrap();
    assert!(records.list().await.is_err() && records.get(&name).await.is_err());
    let what = || "list configmaps".to_owned();
    api.fail("config_maps", KubeError::Unavailable { what: what(), detail: "timeout".into() });
    let error = records.list().await.unwrap_err();
    assert!(matches!(error, BuildError::Source(SourceError::Unavailable { .. })), "{error}");
    api.fail("config_maps", KubeError::Denied { what: what(), detail: "forbidden".into() });
    let error = records.list().await.unwrap_err();
    assert!(matches!(error, BuildError::Source(SourceError::Denied { .. })), "{error}");
}

fn startup_taint(api: &Arc<FakeKube>) -> StartupTaint {
    StartupTaint { api: api.clone(), node: "n".into(), driver: "d".into(), key: TAINT.into() }
}

async fn remove(api: &Arc<FakeKube>) {
    in_time(startup_taint(api).remove_pausing(Duration::from_millis(1), Duration::from_millis(5))).await;
}

#[tokio::test]
async fn the_startup_taint_goes_once_the_driver_is_listed_and_not_before() {
    let api = Arc::new(FakeKube::default());
    for (key, effect) in [("other", "NoSchedule"), (TAINT, "NoSchedule"), (TAINT, "NoExecute")] {
        api.taint("n", key, effect);
    }
    let removing = tokio::spawn({
        let api = api.clone();
        async move { remove(&api).await }
    });
    in_time(api.until(|api| api.calls("node_drivers") > 3)).await;
    assert_eq!((api.calls("taints"), api.taint_keys("n").len()), (0, 3), "not listed yet");
    api.register("n", "d");
    in_time(removing).await.unwrap();
    assert_eq!(api.taint_keys("n"), ["other"]);
}

#[tokio::test]
async fn a_taint_that_somebody_adds_meanwhile_is_not_lost() {
    let api = Arc::new(FakeKube::default());
    api.taint("n", TAINT, "NoExecute");
    api.register("n", "d");
    api.race_taint("n", "node.kubernetes.io/disk-pressure", "NoSchedule");
    remove(&api).await;
    assert_eq!(api.taint_keys("n"), ["node.kubernetes.io/disk-pressure"]);
    assert_eq!(api.calls("set_taints"), 2);
}

#[tokio::test]
async fn removing_the_taint_outlasts_faults_and_a_node_without_it_is_not_written_to() {
    let api = Arc::new(FakeKube::default());
    api.taint("n", "other", "NoSchedule");
    api.register("n", "d");
    let what = || "n".to_owned();
    api.fail("node_drivers", KubeError::Unavailable { what: what(), detail: "timeout".into() });
    api.fail("taints", KubeError::Denied { what: what(), detail: "forbidden".into() });
    remove(&api).await;
    assert_eq!((api.calls("set_taints"), api.taint_keys("n")), (0, vec!["other".to_owned()]));
}

fn pod(name: &str) -> Object {
    Object { kind: "Pod", namespace: "team".into(), name: name.into(), uid: format!("uid-{name}") }
}

#[tokio::test]
async fn an_event_is_told_once_in_a_while_for_each_object_and_reason() {
    let api = Arc::new(FakeKube::default());
    let recorder = Recorder::start(api.clone(), "d", "n");
    for message in ["10 %", "20 %"] {
        recorder.tell(&pod("a"), Severity::Normal, "ArchiveBuilding", message);
    }
    recorder.tell(&pod("a"), Severity::Warning, "FellBackToV1", "x");
    recorder.tell(&pod("b"), Severity::Normal, "ArchiveBuilding", "x");
    recorder.tell(&Object { name: String::new(), ..pod("c") }, Severity::Normal, "ArchiveBuilding", "nobody's");
    in_time(api.until(|api| api.events().len() >= 3)).await;
    let told: Vec<_> = api.events().into_iter().map(|event| (event.object.name, event.reason, event.message)).collect();
    let expected = [("a", "ArchiveBuilding", "10 %"), ("a", "FellBackToV1", "x"), ("b", "ArchiveBuilding", "x")];
    assert_eq!(told, expected.map(|(name, reason, message)| (name.to_owned(), reason, message.to_owned())));
}

#[tokio::test]
async fn an_api_that_hangs_or_fails_holds_nobody_up() {
    let api = Arc::new(FakeKube::default());
    let recorder = Recorder::start(api.clone(), "d", "n");
    api.gate(false);
    let dropped = crate::metrics::metrics().events.with_label_values(&["dropped"]);
    let before = dropped.get();
    for n in 0..200 {
        recorder.tell(&pod(&format!("p{n}")), Severity::Normal, "ArchiveBuilding", "x");
    }
    assert!(dropped.get() > before, "the queue is bounded");
    api.fail("create_event", KubeError::Denied { what: "create event".into(), detail: "forbidden".into() });
    api.gate(true);
    in_time(api.until(|api| !api.events().is_empty())).await;
    assert!(api.calls("create_event") >= 2, "what could not be written is forgotten, the next one is written");
}
