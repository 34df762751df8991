//! A real API server: made ready with kubectl as its administrator, and asked with tokens of the chart's ServiceAccounts. What
//! only a real one can refuse is tested here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use clip_csi::build::store::Records as _;
use clip_csi::k8s::config::Enabled;
use clip_csi::k8s::{ConfigMapRecords, KubeApi, KubeConfig, KubeError, Taints, connect};
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::skip::{lacks, skipped};
use super::{DRIVER, OTHER, TAINT, in_time, record, taint};

const VARIABLE: &str = "CLIP_CSI_TEST_KUBECONFIG";
/// On everything of one test that lies in no namespace.
const LABEL: &str = "clip-csi-test";
const OF_THE_CLUSTER: &str = "validatingadmissionpolicybindings,validatingadmissionpolicies,clusterrolebindings,clusterroles,\
                              storageclasses,csinodes,nodes";
/// Between two looks at what tells nobody when it comes about.
const PAUSE: Duration = Duration::from_millis(100);

/// The output of a command that was given `stdin`, or its words of failure.
fn run(command: &mut Command, stdin: &str) -> Result<String, String> {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("it starts");
    child.stdin.take().expect("a pipe").write_all(stdin.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn kubectl(kubeconfig: &Path, args: &[&str], stdin: &str) -> Result<String, String> {
    let mut command = Command::new("kubectl");
    run(command.arg("--kubeconfig").arg(kubeconfig).arg("--request-timeout=30s").args(args), stdin)
}

/// What a test makes, under one name; deleted when it is dropped, however far the test came.
struct Made {
    admin: PathBuf,
    name: String,
}

impl Drop for Made {
    fn drop(&mut self) {
        let selector = format!("{LABEL}={}", self.name);
        for args in [
            &["delete", OF_THE_CLUSTER, "--selector", &selector, "--ignore-not-found", "--wait=false"][..],
            &["delete", "namespace", &self.name, "--ignore-not-found", "--wait=false"],
        ] {
            if let Err(why) = kubectl(&self.admin, args, "") {
                let _ = writeln!(std::io::stderr(), "{args:?}: {why}");
            }
        }
    }
}

/// A namespace, a node without a kubelet, and the chart's rights.
pub struct Real {
    made: Made,
    dir: tempfile::TempDir,
    node: Arc<dyn KubeApi>,
    controller: Arc<dyn KubeApi>,
    drivers: Mutex<Vec<Value>>,
}

impl Real {
    /// `None`: there is no cluster to test with, which is noted under the test's name.
    pub async fn start(test: &str) -> Option<Self> {
        let Some(admin) = std::env::var_os(VARIABLE) else {
            skipped(test, &format!("{VARIABLE} is not set"));
            return None;
        };
        if lacks(test, &["kubectl", "helm"]) {
            return None;
        }
        let _ = rustls::crypto::ring::default_provider().install_default();
        let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let made = Made { admin: admin.into(), name: format!("clip-test-{nanos:x}") };
        let name = &made.name;
        let labels = json!({ LABEL: name });
        for (version, kind) in [("v1", "Namespace"), ("v1", "Node")] {
            let object = json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name, "labels": labels } });
            kubectl(&made.admin, &["create", "-f", "-"], &object.to_string()).unwrap();
        }
        kubectl(&made.admin, &["apply", "-f", "-"], &rights(name)).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let token = |account: &str, bound: &[&str]| {
            let account = format!("{name}-{account}");
            let args = [&["--namespace", name, "create", "token", &account], bound].concat();
            kubectl(&made.admin, &args, "").unwrap().trim().to_owned()
        };
        // A pod's token names its node, too.
        let bound = ["--bound-object-kind", "Node", "--bound-object-name", name];
        for (user, token) in [
            ("node", token("node", &bound)),
            ("nowhere", token("node", &[])),
            ("controller", token("controller", &[])),
            ("stranger", "hunter2".to_owned()),
        ] {
            let config = kubeconfig(&made.admin, name, &token);
            std::fs::write(dir.path().join(user), config.to_string()).unwrap();
        }
        let node = api(&dir.path().join("node"), None).await;
        let controller = api(&dir.path().join("controller"), None).await;
        // Rights take effect a moment after they were given.
        in_time("the node's rights", allowed(async || node.taints(name).await.map(drop))).await;
        in_time("the controller's rights", allowed(async || controller.claim(name, "claim").await.map(drop))).await;
        in_time("rights on records", allowed(async || controller.config_map("none").await.map(drop))).await;
        Some(Self { node, controller, dir, made, drivers: Mutex::default() })
    }

    fn admin(&self, args: &[&str], stdin: &str) -> String {
        kubectl(&self.made.admin, args, stdin).unwrap_or_else(|why| panic!("{args:?}: {why}"))
    }

    fn create(&self, object: &Value) -> Value {
        let made = self.admin(&["apply", "-o", "json", "-f", "-"], &object.to_string());
        serde_json::from_str(&made).unwrap()
    }

    fn user(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// The chart's rights, with everything on that takes any.
fn rights(name: &str) -> String {
    let settings = format!(
        "fullnameOverride={name},commonLabels.{LABEL}={name},driverName={DRIVER},startupTaint.enabled=true,\
         startupTaint.key={TAINT},controller.enabled=true,config.imageService.archiveStore=oci://registry.example/clip/archives"
    );
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/clip-csi");
    let mut helm = Command::new("helm");
    helm.arg("template").arg(name).arg(chart).args(["--namespace", name, "--show-only", "templates/rbac.yaml"]);
    run(helm.args(["--set", &settings]), "").unwrap()
}

/// The administrator's, with another user: one who has this token.
fn kubeconfig(admin: &Path, namespace: &str, token: &str) -> Value {
    let text = std::fs::read_to_string(admin).unwrap();
    let config: Value = serde_yaml_ng::from_str(&text).unwrap();
    let named = |list: &str, name: &Value| {
        let found = config[list].as_array().into_iter().flatten().find(|item| item["name"] == *name);
        found.unwrap_or_else(|| panic!("{list} of {} has no {name}", admin.display())).clone()
    };
    let context = named("contexts", &config["current-context"]);
    let cluster = named("clusters", &context["context"]["cluster"]);
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{ "name": "test", "context": { "cluster": cluster["name"], "user": "test", "namespace": namespace } }],
        "clusters": [cluster],
        "users": [{ "name": "test", "user": { "token": token } }],
    })
}

async fn api(kubeconfig: &Path, namespace: Option<&str>) -> Arc<dyn KubeApi> {
    let config = KubeConfig {
        enabled: Enabled::Yes,
        kubeconfig: Some(kubeconfig.to_owned()),
        namespace: namespace.map(str::to_owned),
        ..KubeConfig::default()
    };
    connect(&config).await.unwrap().unwrap()
}

async fn allowed(call: impl AsyncFn() -> Result<(), KubeError>) {
    while let Err(KubeError::Denied { .. }) = call().await {
        tokio::time::sleep(PAUSE).await;
    }
}

#[async_trait]
impl Cluster for Real {
    fn node(&self) -> Arc<dyn KubeApi> {
        self.node.clone()
    }
    fn controller(&self) -> Arc<dyn KubeApi> {
        self.controller.clone()
    }
    fn namespace(&self) -> &str {
        &self.made.name
    }
    fn node_name(&self) -> &str {
        &self.made.name
    }
    fn unique(&self, name: &str) -> String {
        format!("{}-{name}", self.made.name)
    }
    async fn put_class(&self, name: &str, parameters: &BTreeMap<String, String>) {
        self.create(&json!({
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": { "name": name, "labels": { LABEL: self.made.name } },
            "provisioner": DRIVER,
            "parameters": parameters,
        }));
    }
    async fn put_claim(&self, name: &str, class: &str, annotations: &BTreeMap<String, String>) -> String {
        let claim = self.create(&json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": { "name": name, "namespace": self.namespace(), "annotations": annotations },
            "spec": {
                "storageClassName": class,
                "accessModes": ["ReadOnlyMany"],
                "resources": { "requests": { "storage": "1Gi" } },
            },
        }));
        claim["metadata"]["uid"].as_str().unwrap().to_owned()
    }
    async fn put_taints(&self, taints: &[Value]) {
        let patch = json!({ "spec": { "taints": taints } }).to_string();
        self.admin(&["patch", "node", self.node_name(), "--type=merge", "--patch", &patch], "");
    }
    async fn register(&self, driver: &str) {
        let drivers = {
            let mut drivers = self.drivers.lock().unwrap();
            drivers.push(json!({ "name": driver, "nodeID": self.node_name(), "topologyKeys": null }));
            drivers.clone()
        };
        self.create(&json!({
            "apiVersion": "storage.k8s.io/v1",
            "kind": "CSINode",
            "metadata": { "name": self.node_name(), "labels": { LABEL: self.made.name } },
            "spec": { "drivers": drivers },
        }));
    }
    async fn events_of(&self, name: &str) -> Vec<Value> {
        let field = format!("involvedObject.name={name}");
        loop {
            let args = ["--namespace", self.namespace(), "get", "events", "--field-selector", &field, "-o", "json"];
            let events: Value = serde_json::from_str(&self.admin(&args, "")).unwrap();
            // A claim without a provisioner has Events of others.
            let ours = |event: &&Value| event["source"]["component"] == DRIVER;
            let events: Vec<_> = events["items"].as_array().unwrap().iter().filter(ours).cloned().collect();
            if !events.is_empty() {
                return events;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[tokio::test]
async fn a_right_that_is_missing_is_told_with_verb_object_and_remedy() {
    let Some(cluster) = Real::start("real::a_right_that_is_missing_is_told_with_verb_object_and_remedy").await else {
        return;
    };
    let name = cluster.namespace();
    let (node, controller) = (cluster.node(), cluster.controller());
    let refusals = [
        (node.claim(name, "claim").await.unwrap_err(), "get persistentvolumeclaim claim", "node"),
        (node.class_parameters("class").await.unwrap_err(), "get storageclass class", "node"),
        (node.config_maps("a", "b").await.unwrap_err(), "list configmaps", "node"),
        (controller.taints(name).await.unwrap_err(), "get node", "controller"),
        (controller.set_taints(name, &Taints::default()).await.unwrap_err(), "patch node", "controller"),
        (controller.node_drivers(name).await.unwrap_err(), "get csinode", "controller"),
    ];
    for (error, what, who) in refusals {
        assert!(matches!(error, KubeError::Denied { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with(what) && text.contains("docs/security.md") && !text.contains('\n'), "{text}");
        assert!(text.contains(&format!("system:serviceaccount:{name}:{name}-{who}")), "{text}");
    }
    // What a user reads on the claim.
    let elsewhere = api(&cluster.user("controller"), Some("default")).await;
    let error = ConfigMapRecords::new(elsewhere, DRIVER).create(&record("a")).await.unwrap_err().to_string();
    assert!(error.contains("create configmap default/v1-") && error.contains("docs/security.md"), "{error}");
    assert!(!error.contains("policy"), "no rule of ours is at work: {error}");
}

#[tokio::test]
async fn a_token_that_is_not_accepted_is_denied_and_never_repeated() {
    let Some(cluster) = Real::start("real::a_token_that_is_not_accepted_is_denied_and_never_repeated").await else {
        return;
    };
    let error = api(&cluster.user("stranger"), None).await.claim("default", "claim").await.unwrap_err();
    assert!(matches!(error, KubeError::Denied { .. }), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
}

/// As docs/security.md has them.
#[tokio::test]
async fn the_chart_gives_these_rights_and_no_others() {
    let Some(cluster) = Real::start("real::the_chart_gives_these_rights_and_no_others").await else { return };
    let name = cluster.namespace();
    let rights_in = |user: &str, namespace: &str| {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": { "namespace": namespace },
        });
        let args = ["create", "--validate=false", "-o", "json", "-f", "-"];
        let review: Value =
            serde_json::from_str(&kubectl(&cluster.user(user), &args, &review.to_string()).unwrap()).unwrap();
        let mut rights = BTreeSet::new();
        let texts = |value: &Value| {
            let texts = value.as_array().into_iter().flatten();
            texts.map(|text| text.as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        for rule in review["status"]["resourceRules"].as_array().unwrap() {
            // Everybody may ask who he is and what he may.
            if texts(&rule["apiGroups"]).iter().all(|group| group.starts_with("auth")) {
                continue;
            }
            let names = texts(&rule["resourceNames"]).iter().map(|name| format!(" {name}")).collect::<String>();
            for resource in texts(&rule["resources"]) {
                rights.extend(texts(&rule["verbs"]).iter().map(|verb| format!("{verb} {resource}{names}")));
            }
        }
        rights
    };
    let set = |rights: &[&str]| rights.iter().map(|right| (*right).to_owned()).collect::<BTreeSet<String>>();
    let anywhere = ["create events", "get csinodes", "get nodes", "patch nodes"];
    assert_eq!(rights_in("node", "default"), set(&anywhere));
    let daemon_set = format!("get daemonsets {name}-node");
    assert_eq!(rights_in("node", name), set(&[&anywhere[..], &[&daemon_set]].concat()));
    // csi-provisioner runs under the controller's account: most of these are for it.
    let anywhere = [
        "create events",
        "create persistentvolumes",
        "delete persistentvolumes",
        "get persistentvolumeclaims",
        "get storageclasses",
        "list persistentvolumeclaims",
        "list persistentvolumes",
        "list storageclasses",
        "patch events",
        "patch persistentvolumes",
        "update events",
        "update persistentvolumeclaims",
        "watch persistentvolumeclaims",
        "watch persistentvolumes",
        "watch storageclasses",
    ];
    assert_eq!(rights_in("controller", "default"), set(&anywhere));
    let own = ["create", "get", "update"].map(|verb| format!("{verb} leases"));
    let own = own.into_iter().chain(["create", "delete", "get", "list"].map(|verb| format!("{verb} configmaps")));
    assert_eq!(rights_in("controller", name), set(&anywhere).into_iter().chain(own).collect());
}

/// RBAC can't say "your own node" nor "this taint": the chart's ValidatingAdmissionPolicy does.
#[tokio::test]
async fn the_node_plugin_can_take_our_taint_off_its_own_node_and_do_nothing_else_to_nodes() {
    let test = "real::the_node_plugin_can_take_our_taint_off_its_own_node_and_do_nothing_else_to_nodes";
    let Some(cluster) = Real::start(test).await else { return };
    let (own, other) = (cluster.node_name().to_owned(), cluster.unique("other"));
    let labels = json!({ LABEL: own });
    let taints = [taint(TAINT, "", "NoSchedule"), taint(OTHER, "gpu", "NoSchedule")];
    cluster.put_taints(&taints).await;
    let of_other = json!({ "name": other, "labels": labels });
    cluster.create(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": of_other, "spec": { "taints": taints } }));
    let there = cluster.node().taints(&own).await.unwrap().taints;
    let without = |key: &str| there.iter().filter(|taint| taint["key"] != key).cloned().collect::<Vec<_>>();
    let changed: Vec<_> = there
        .iter()
        .map(|taint| match taint["key"] == OTHER {
            true => json!({ "key": OTHER, "value": "cpu", "effect": "NoSchedule" }),
            false => taint.clone(),
        })
        .collect();
    let more = [there.clone(), vec![taint("example.com/new", "", "NoExecute")]].concat();
    // Nothing of it is done, only decided on.
    let patch = |user: &str, node: &str, patch: &Value| {
        let patch = patch.to_string();
        let args = ["patch", "node", node, "--type=merge", "--dry-run=server", "--patch", &patch];
        kubectl(&cluster.user(user), &args, "").map(drop)
    };
    let spec = |taints: &[Value]| json!({ "spec": { "taints": taints } });
    let in_effect = async {
        while patch("node", &own, &spec(&without(OTHER))).is_ok() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    in_time("the policy's effect", in_effect).await;
    let (only_ours, only_taints, only_own) =
        ("may only remove the taint clip.csi.example.com/not-ready", "may change taints only", "its own node only");
    let owner = json!([{ "apiVersion": "v1", "kind": "Namespace", "name": "x", "uid": "x" }]);
    let refused = [
        ("node", &own, spec(&without(OTHER)), only_ours),
        ("node", &own, spec(&[]), only_ours),
        ("node", &own, spec(&changed), only_ours),
        ("node", &own, spec(&more), only_ours),
        ("node", &own, json!({ "metadata": { "labels": { "a": "b" } } }), only_taints),
        ("node", &own, json!({ "metadata": { "annotations": { "a": "b" } } }), only_taints),
        ("node", &own, json!({ "metadata": { "finalizers": ["a/b"] } }), only_taints),
        ("node", &own, json!({ "metadata": { "ownerReferences": owner } }), only_taints),
        ("node", &own, json!({ "spec": { "unschedulable": true } }), only_taints),
        ("node", &own, json!({ "spec": { "providerID": "a://b" } }), only_taints),
        ("node", &other, spec(&without(TAINT)), only_own),
        ("nowhere", &own, spec(&without(TAINT)), only_own),
    ];
    for (user, node, change, why) in &refused {
        let said = patch(user, node, change).expect_err(&format!("{user} may {change} on {node}"));
        assert!(said.contains(why), "{change}: {said}");
    }
    patch("node", &own, &spec(&without(TAINT))).unwrap();
    // The driver's own call, refused, says by whom and why.
    let read = cluster.node().taints(&own).await.unwrap();
    let error = cluster.node().set_taints(&own, &Taints { taints: without(OTHER), ..read }).await.unwrap_err();
    assert!(error.to_string().contains(only_ours) && error.to_string().starts_with("patch node"), "{error}");

    // The API server found nothing to warn of in the policy's expressions.
    let checked = async {
        loop {
            let policy = cluster.admin(&["get", "validatingadmissionpolicy", &format!("{own}-node"), "-o", "json"], "");
            let policy: Value = serde_json::from_str(&policy).unwrap();
            if policy["status"]["observedGeneration"] == policy["metadata"]["generation"] {
                break policy["status"]["typeChecking"].clone();
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    let checked = in_time("the policy's type check", checked).await;
    assert!(checked["expressionWarnings"].as_array().is_none_or(Vec::is_empty), "{checked}");
}
