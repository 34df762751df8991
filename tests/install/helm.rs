//! The chart through helm itself.

use std::process::{Command, Output};

use serde_yaml_ng::Value;

use crate::skip::needs;
use crate::{derived, read, root};

/// Files below tests/install/values: what the chart is rendered with.
pub const SETS: &[&str] = &["default", "provisioning", "registry", "everything"];

fn helm(args: &[&str]) -> Output {
    let mut command = Command::new("helm");
    // Nothing of the user's own helm.
    let home = std::env::temp_dir().join("clip-csi-test-helm");
    command.env("HELM_CACHE_HOME", home.join("cache")).env("HELM_CONFIG_HOME", home.join("config"));
    command.env("HELM_DATA_HOME", home.join("data")).current_dir(root()).args(args);
    command.output().expect("helm runs")
}

fn template(args: &[&str]) -> Output {
    helm(&[&["template", "clip-csi", "charts/clip-csi", "--namespace", "clip-csi"], args].concat())
}

/// What helm says when it refuses.
fn refusal(args: &[&str]) -> String {
    let output = template(args);
    assert!(!output.status.success(), "helm accepts {args:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn rendered(set: &str) -> String {
    let output = template(&["--values", &format!("tests/install/values/{set}.yaml")]);
    assert!(output.status.success(), "{set}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn objects(yaml: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(yaml);
    let parse = |d| <Value as serde::Deserialize>::deserialize(d).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
    documents.map(parse).filter(|v| !v.is_null()).collect()
}

/// The value at a path like `spec/template/spec`; a number is an index.
pub fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('/').fold(value, |value, key| match key.parse::<usize>() {
        Ok(index) => &value[index],
        Err(_) => &value[key],
    })
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|o| o["kind"] == kind && at(o, "metadata/name") == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Helm's output as a file for people who don't use helm.
fn plain(yaml: &str) -> String {
    let head = "# Made from charts/clip-csi by `make manifests`; change the chart instead.\n";
    let of_helm = ["# Source: ", "helm.sh/chart: ", "app.kubernetes.io/managed-by: Helm"];
    let lines = yaml.lines().filter(|line| !of_helm.iter().any(|of_helm| line.trim_start().starts_with(of_helm)));
    let mut out = head.to_owned();
    for line in lines.filter(|line| !line.is_empty()) {
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[test]
fn the_chart_passes_helms_own_strict_lint_with_every_set_of_values() {
    needs!("helm");
    for set in SETS {
        let output = helm(&["lint", "--strict", "charts/clip-csi", "-f", &format!("tests/install/values/{set}.yaml")]);
        assert!(output.status.success(), "{set}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn the_manifests_are_what_the_chart_renders() {
    needs!("helm");
    derived("manifests/base/clip-csi.yaml", &plain(&rendered("default")));
    derived("manifests/provisioning/clip-csi.yaml", &plain(&rendered("provisioning")));
}

#[test]
fn kustomize_builds_the_manifests_with_their_namespace() {
    needs!("kubectl");
    for (dir, kind) in [("base", "DaemonSet"), ("provisioning", "Deployment")] {
        let mut kubectl = Command::new("kubectl");
        let output = kubectl.arg("kustomize").arg(root().join("manifests").join(dir)).output().expect("kubectl runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let objects = objects(&String::from_utf8(output.stdout).unwrap());
        let namespace = find(&objects, "Namespace", "clip-csi");
        assert_eq!(at(namespace, "metadata/labels")["pod-security.kubernetes.io/enforce"], "privileged");
        assert!(objects.iter().any(|o| o["kind"] == kind), "{dir} has no {kind}");
    }
}

#[test]
fn a_typo_or_a_value_of_another_shape_fails_the_installation_and_is_named() {
    needs!("helm");
    let digest = "image.digest=sha256:abc";
    let cases: &[(&str, &[&str])] = &[
        ("fullnameOverride=a-name-of-forty-five-characters-is-one-too-long", &["/fullnameOverride"]),
        ("nodes.hostNetwork=true", &["nodes"]),
        ("node.hostnetwork=true", &["/node", "hostnetwork"]),
        ("node.hostNetwork=yes", &["/node/hostNetwork"]),
        ("node.cache.size=20GB", &["/node/cache/size"]),
        ("node.cache.size=20", &["/node/cache/size"]),
        ("node.cache.hostPath=cache", &["/node/cache/hostPath"]),
        ("node.stateDir=/var/lib/clip-csi/", &["/node/stateDir"]),
        ("node.updateStrategy.type=Recreate", &["/node/updateStrategy/type"]),
        ("node.updateStrategy.rollingUpdate.maxUnavailable=0", &["/node/updateStrategy/rollingUpdate/maxUnavailable"]),
        ("node.dnsPolicy=Cluster", &["/node/dnsPolicy"]),
        ("node.resources.limit.memory=1Gi", &["/node/resources", "limit"]),
        ("node.resources.limits.memory=1GB", &["/node/resources/limits/memory"]),
        ("node.tolerations[0].operater=Exists", &["/node/tolerations/0", "operater"]),
        ("kubeletDir=var/lib/kubelet", &["/kubeletDir"]),
        ("driverName=Clip_CSI", &["/driverName"]),
        (digest, &["/image/digest"]),
        ("image.pullPolicy=always", &["/image/pullPolicy"]),
        ("image.name=x", &["/image", "name"]),
        ("config.imageService.clipVersion=3", &["/config/imageService/clipVersion"]),
        ("config.imageService.clipversion=2", &["/config/imageService", "clipversion"]),
        ("config.imageService.archiveStore=https://x/y", &["/config/imageService/archiveStore"]),
        ("config.imageService.spanKib=1000", &["/config/imageService/spanKib"]),
        ("config.sources.archiveRoots[0]=srv", &["/config/sources/archiveRoots/0"]),
        ("config.sources.s3[0].prefix=x", &["/config/sources/s3/0", "bucket"]),
        ("config.sources.s3[0].bucket=b,config.sources.s3[0].pathstyle=true", &["/config/sources/s3/0", "pathstyle"]),
        ("config.sources.registries.host.plainHTTP=true", &["/config/sources/registries/host", "plainHTTP"]),
        ("config.cache.maxBytes=1", &["/config/cache", "maxBytes"]),
        ("config.cache.highWatermark=101", &["/config/cache/highWatermark"]),
        ("config.telemetry.logFormat=xml", &["/config/telemetry/logFormat"]),
        ("config.csi.driverName=x", &["/config/csi", "driverName"]),
        ("metrics.port=0", &["/metrics/port"]),
        ("metrics.port=http", &["/metrics/port"]),
        ("metrics.address=localhost", &["/metrics/address"]),
        ("metrics.serviceMonitor.enable=true", &["/metrics/serviceMonitor", "enable"]),
        ("startupTaint.key=a b", &["/startupTaint/key"]),
        ("controller.replicas=0", &["/controller/replicas"]),
        ("controller.provisioner.timeout=120", &["/controller/provisioner/timeout"]),
        ("controller.secretNamespaces[0]=Team", &["/controller/secretNamespaces/0"]),
        ("storageClasses[0].name=x", &["/storageClasses/0", "parameters"]),
        ("storageClasses[0].name=x,storageClasses[0].parameters.clipVersion=2", &["/storageClasses/0/parameters"]),
        ("storageClasses[0].name=X,storageClasses[0].parameters.image=i", &["/storageClasses/0/name"]),
    ];
    for (value, named) in cases {
        let said = refusal(&["--set", value]);
        assert!(named.iter().all(|name| said.contains(name)), "--set {value}: {said}");
    }
}

#[test]
fn a_controller_without_a_store_is_refused_with_the_remedy() {
    needs!("helm");
    let said = refusal(&["--set", "controller.enabled=true"]);
    assert!(said.contains("config.imageService.archiveStore") && said.contains("s3://bucket/prefix"), "{said}");
}

#[test]
fn the_driver_accepts_every_configuration_that_the_chart_writes_and_takes_every_key_of_it() {
    needs!("helm");
    for set in SETS {
        let objects = objects(&rendered(set));
        let configs: Vec<_> = objects.iter().filter_map(|o| Some((o, at(o, "data/config.yaml").as_str()?))).collect();
        assert!(!configs.is_empty(), "{set}");
        for (object, text) in configs {
            let name = at(object, "metadata/name").as_str().unwrap();
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            let service = if name.ends_with("controller") { "controller" } else { "node" };
            let mut command = Command::new(env!("CARGO_BIN_EXE_clip-csi"));
            command.args([service, "--print-config", "--config"]).arg(file.path()).env_clear();
            let output = command.output().unwrap();
            assert!(output.status.success(), "{set} {name}: {}", String::from_utf8_lossy(&output.stderr));
            let taken: Value = serde_yaml_ng::from_slice(&output.stdout).unwrap();
            within(&serde_yaml_ng::from_str(text).unwrap(), &taken, name);
        }
    }
}

/// Every value that was given is there in what was taken.
fn within(given: &Value, taken: &Value, path: &str) {
    match given {
        Value::Mapping(map) => map.iter().for_each(|(key, value)| {
            within(value, &taken[key], &format!("{path}.{}", key.as_str().unwrap_or_default()));
        }),
        Value::Sequence(list) => {
            list.iter().enumerate().for_each(|(i, value)| within(value, &taken[i], &format!("{path}[{i}]")));
        }
        _ => assert_eq!(given, taken, "{path}"),
    }
}

#[test]
fn the_shipped_configuration_says_clip_version_2_in_plain_sight() {
    needs!("helm");
    assert!(rendered("default").contains("\n      clipVersion: 2\n"));
    assert!(read("charts/clip-csi/values.yaml").contains("\n    clipVersion: 2\n"));
}

#[test]
fn rights_are_no_more_than_what_is_used() {
    needs!("helm");
    let grants = |set: &str, name: &str| -> Vec<String> {
        let objects = objects(&rendered(set));
        let mut out = Vec::new();
        for rule in find(&objects, "ClusterRole", name)["rules"].as_sequence().unwrap() {
            for resource in rule["resources"].as_sequence().unwrap() {
                for verb in rule["verbs"].as_sequence().unwrap() {
                    out.push(format!("{} {}", verb.as_str().unwrap(), resource.as_str().unwrap()));
                }
            }
        }
        out
    };
    assert_eq!(grants("default", "clip-csi-node"), ["create events"]);
    let with_taint = grants("everything", "images-node");
    assert_eq!(with_taint, ["create events", "get csinodes", "get nodes", "patch nodes"]);
    let controller = grants("provisioning", "clip-csi-controller");
    for never in ["secrets", "nodes", "pods"] {
        assert!(!controller.iter().any(|grant| grant.ends_with(never)), "{controller:?}");
    }
    // ConfigMaps are for the records of volumes where the store is a registry, and only there.
    let configmaps = |set: &str| rendered(set).contains("resources: [configmaps]");
    assert!(configmaps("registry") && !configmaps("provisioning"));
    let objects = objects(&rendered("everything"));
    let policy = find(&objects, "ValidatingAdmissionPolicy", "images-node");
    let text = serde_yaml_ng::to_string(policy).unwrap();
    assert!(
        text.contains("system:serviceaccount:clip-csi:images-node") && text.contains("images.example.com/not-ready")
    );
}

#[test]
fn only_the_node_plugin_is_privileged_and_nobody_can_write_to_a_root() {
    needs!("helm");
    for set in SETS {
        for object in objects(&rendered(set)) {
            let pod = at(&object, "spec/template/spec");
            let Some(containers) = pod["containers"].as_sequence() else { continue };
            for container in containers {
                let security = &container["securityContext"];
                assert_eq!(security["readOnlyRootFilesystem"], true, "{set}");
                let node = object["kind"] == "DaemonSet";
                assert_eq!(security["privileged"].as_bool().unwrap_or_default(), node, "{set}");
                assert_eq!(at(pod, "securityContext/runAsNonRoot").as_bool().unwrap_or_default(), !node, "{set}");
            }
        }
    }
}

/// Of a Service: a DNS label.
#[test]
fn names_fit_however_long_the_release_is_called() {
    needs!("helm");
    let long = "r".repeat(53);
    let values = "tests/install/values/everything.yaml";
    let args = ["template", &long, "charts/clip-csi", "--values", values, "--set", "fullnameOverride="];
    let output = helm(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for object in objects(&String::from_utf8(output.stdout).unwrap()) {
        let name = at(&object, "metadata/name").as_str().unwrap();
        assert!(name.len() <= 63 && !name.ends_with('-'), "{} {name}", object["kind"].as_str().unwrap());
    }
}

#[test]
fn another_version_of_the_chart_alone_does_not_replace_running_plugins() {
    needs!("helm");
    let objects = objects(&rendered("default"));
    let template = &find(&objects, "DaemonSet", "clip-csi-node")["spec"]["template"];
    let labels = serde_yaml_ng::to_string(at(template, "metadata/labels")).unwrap();
    assert!(!labels.contains("helm.sh/chart") && !labels.contains("version"), "{labels}");
}

#[test]
fn chart_and_crate_have_one_version() {
    let chart: Value = serde_yaml_ng::from_str(&read("charts/clip-csi/Chart.yaml")).unwrap();
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_notes_tell_the_names_of_this_release() {
    needs!("helm");
    let args = ["install", "mine", "charts/clip-csi", "--dry-run=client", "--namespace", "storage"];
    let output = helm(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let notes = text.split("NOTES:").nth(1).expect("notes");
    for word in ["daemonset/mine-clip-csi-node", "-n storage", "driver: clip.csi.beam.cloud", "kubectl describe pod"] {
        assert!(notes.contains(word), "{word}: {notes}");
    }
}

#[test]
fn examples_name_the_driver_and_are_changed_in_one_way() {
    for entry in std::fs::read_dir(root().join("manifests/examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(
            objects(&std::fs::read_to_string(&path).unwrap()).len() > usize::from(name.starts_with("02")),
            "{name}"
        );
        let args = ["--image", "r.example:5000/py:1", "--busybox", "r.example:5000/bb:1", "--s3-key", "ID:KEY/+&"];
        let place = ["--s3", "s3://mine/sub/?endpoint=http://s3:9000&path-style=true"];
        let mut render = Command::new("manifests/examples/render");
        let output = render.args(args).args(place).arg(&path).current_dir(root()).output().unwrap();
        assert!(output.status.success(), "{name}");
        let text = String::from_utf8(output.stdout).unwrap();
        let objects = objects(&text);
        let all = objects.iter().map(|o| serde_yaml_ng::to_string(o).unwrap()).collect::<String>();
        assert!(all.contains("clip.csi.beam.cloud") && all.contains("image: r.example:5000/bb:1"), "{name}: {all}");
        for left in ["docker.io", "example-bucket", "CHANGE-ME"] {
            assert!(!all.contains(left), "{name}: {left}");
        }
        if name.starts_with("02") {
            let url = "s3://mine/sub/images/python-v1.clip?endpoint=http://s3:9000&path-style=true";
            assert!(all.contains(url) && all.contains("KEY/+&"), "{all}");
        }
    }
}
