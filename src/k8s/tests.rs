//! The API, one test body for the fake and for a real server; and what is made of it, over the fake.

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

/// What holds of every API. Everything that it makes has a name of its own and is deleted again.
async fn behaves(api: Arc<dyn KubeApi>, salt: &str) {
    api.reachable().await.unwrap();
    assert_eq!(api.claim("default", &format!("no-claim-{salt}")).await.unwrap(), None);
    assert_eq!(api.class_parameters(&format!("no-class-{salt}")).await.unwrap(), None);
    assert_eq!(api.node_drivers(&format!("no-node-{salt}")).await.unwrap(), Vec::<String>::new());
    let gone = api.taints(&format!("no-node-{salt}")).await.unwrap_err();
    assert!(matches!(gone, KubeError::NotFound { .. }), "{gone}");

    let records = ConfigMapRecords::new(api.clone(), &format!("d-{salt}"));
    let (a, b) = (record(&format!("a-{salt}")), record(&format!("b-{salt}")));
    assert_eq!(records.create(&a).await.unwrap(), None);
    let other = VolumeRecord { name: "other".into(), ..a.clone() };
    assert_eq!(records.create(&other).await.unwrap(), Some(a.clone()), "the first one holds");
    assert_eq!(records.create(&b).await.unwrap(), None);
    let mut listed = records.list().await.unwrap();
    listed.sort_by(|x, y| x.name.cmp(&y.name));
    assert_eq!(listed, [a.clone(), b.clone()]);
    assert_eq!(
        ConfigMapRecords::new(api.clone(), "another").list().await.unwrap(),
        [],
        "another driver's are not ours"
    );
    for id in [&a.id, &a.id, &b.id] {
        records.delete(id).await.unwrap();
    }
    assert_eq!(records.get(&a.id).await.unwrap(), None);
    assert_eq!(records.list().await.unwrap(), []);

    let pod = Object { kind: "Pod", namespace: "default".into(), name: format!("p-{salt}"), uid: salt.into() };
    let event = events::Event {
        name: format!("p-{salt}.1"),
        object: pod,
        severity: Severity::Normal,
        reason: "ForTest",
        message: "nothing happened".into(),
        component: "clip-csi-test".into(),
        instance: "here".into(),
        at: std::time::SystemTime::now(),
    };
    api.create_event(&event).await.unwrap();
}

/// Two controllers create the same record at once: one of them wins, both learn of the winner.
async fn one_wins(api: Arc<dyn KubeApi>, salt: &str) {
    let records = ConfigMapRecords::new(api, &format!("d-{salt}"));
    let one = record(&format!("race-{salt}"));
    let other = VolumeRecord { name: "other".into(), ..one.clone() };
    let (first, second) = tokio::join!(records.create(&one), records.create(&other));
    let outcome = (first.unwrap(), second.unwrap());
    assert!(outcome == (None, Some(one.clone())) || outcome == (Some(other), None), "{outcome:?}");
    records.delete(&one.id).await.unwrap();
}

#[tokio::test]
async fn the_fake_behaves_as_an_api_server() {
    behaves(Arc::new(FakeKube::default()), "fake").await;
    one_wins(Arc::new(FakeKube::default()), "fake").await;
}

/// Needs a cluster: `CLIP_CSI_TEST_KUBECONFIG` names the kubeconfig of an administrator.
#[tokio::test]
async fn a_real_api_server_behaves_as_the_fake() {
    let Some(path) = std::env::var_os("CLIP_CSI_TEST_KUBECONFIG") else {
        skipped("k8s::tests::a_real_api_server_behaves_as_the_fake", "CLIP_CSI_TEST_KUBECONFIG is not set");
        return;
    };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config =
        KubeConfig { kubeconfig: Some(path.into()), namespace: Some("default".into()), ..KubeConfig::default() };
    let api = connect(&config).await.unwrap().unwrap();
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let salt = format!("{nanos:x}");
    behaves(api.clone(), &salt).await;
    one_wins(api.clone(), &salt).await;
    // The taint, on whatever node there is: CSINode lists a driver that we name.
    if let Some(node) = std::env::var_os("CLIP_CSI_TEST_NODE") {
        let node = node.to_str().unwrap();
        let before = api.taints(node).await.unwrap();
        let mut with = before.clone();
        with.taints.push(serde_json::json!({ "key": format!("{TAINT}-{salt}"), "effect": "PreferNoSchedule" }));
        api.set_taints(node, &with).await.unwrap();
        let stale = api.set_taints(node, &before).await.unwrap_err();
        assert!(matches!(stale, KubeError::Conflict { .. }), "what was read before a change is refused: {stale}");
        let driver = api.node_drivers(node).await.unwrap().into_iter().next();
        if let Some(driver) = driver {
            let taint = StartupTaint { api: api.clone(), node: node.into(), driver, key: format!("{TAINT}-{salt}") };
            in_time(taint.remove()).await;
            assert_eq!(api.taints(node).await.unwrap().taints, before.taints);
        } else {
            let now = api.taints(node).await.unwrap();
            api.set_taints(node, &Taints { taints: before.taints, ..now }).await.unwrap();
        }
    }
}

/// As tests/common/skip.rs has it, which a test inside of the library can't reach.
fn skipped(test: &str, reason: &str) {
    use std::io::Write as _;
    let line = format!("SKIPPED: {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    let Some(file) = std::env::var_os("CLIP_TEST_SKIPS") else { return };
    std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap().write_all(line.as_bytes()).unwrap();
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
    assert!(matches!(error, BuildError::Source(SourceError::Refused { .. })), "{error}");
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
