//! What the chart's objects say of each other and to Kubernetes: a label that does not match or a port that nobody listens
//! on installs without a complaint.

use serde_yaml_ng::Value;

use crate::helm::{SETS, at, objects, rendered};
use crate::skip::needs;

/// Every label that `selector` asks for is on the pods of `workload`.
fn selects(selector: &Value, workload: &Value) -> bool {
    let labels = at(workload, "spec/template/metadata/labels");
    let wanted = selector.as_mapping().expect("a selector is a mapping");
    !wanted.is_empty() && wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn names(containers: &Value) -> Vec<&str> {
    containers.as_sequence().unwrap().iter().map(|container| container["name"].as_str().unwrap()).collect()
}

#[test]
fn kubelet_and_scheduler_are_told_what_the_driver_is() {
    needs!("helm");
    for set in SETS {
        let objects = objects(&rendered(set));
        let [driver] = of_kind(&objects, "CSIDriver")[..] else { panic!("{set}: one CSIDriver") };
        let spec = &driver["spec"];
        assert_eq!((&spec["attachRequired"], &spec["podInfoOnMount"]), (&false.into(), &true.into()), "{set}");
        assert_eq!(spec["fsGroupPolicy"], "None", "{set}");
        assert_eq!(spec["volumeLifecycleModes"], Value::from(vec!["Persistent", "Ephemeral"]), "{set}");
        let profile = &at(driver, "metadata/labels")["security.kubernetes.io/csi-ephemeral-volume-profile"];
        assert_eq!(profile, "restricted", "{set}");
    }
}

#[test]
fn the_node_plugin_is_one_container_whose_mounts_reach_pods_and_which_is_the_last_to_be_evicted() {
    needs!("helm");
    for set in SETS {
        let objects = objects(&rendered(set));
        let [workload] = of_kind(&objects, "DaemonSet")[..] else { panic!("{set}: one DaemonSet") };
        let pod = at(workload, "spec/template/spec");
        assert_eq!(names(&pod["containers"]), ["clip-csi"], "{set}");
        assert_eq!(pod["priorityClassName"], "system-node-critical", "{set}");
        let mounts = at(pod, "containers/0/volumeMounts").as_sequence().unwrap();
        let mut propagated: Vec<_> =
            mounts.iter().filter(|mount| mount["mountPropagation"] == "Bidirectional").map(|m| &m["name"]).collect();
        propagated.sort_by_key(|name| name.as_str());
        assert_eq!(propagated, ["plugin", "pods"], "{set}");
        let strategy = &workload["spec"]["updateStrategy"];
        assert!(strategy["type"] == "OnDelete" || !at(strategy, "rollingUpdate/maxUnavailable").is_null(), "{set}");
    }
    let objects = objects(&rendered("default"));
    let tolerations = at(of_kind(&objects, "DaemonSet")[0], "spec/template/spec/tolerations");
    assert_eq!(tolerations, &serde_yaml_ng::from_str::<Value>("[{operator: Exists}]").unwrap(), "on every node");
}

#[test]
fn probes_ask_a_port_that_the_plugin_listens_on() {
    needs!("helm");
    for set in SETS {
        let objects = objects(&rendered(set));
        for workload in [of_kind(&objects, "DaemonSet"), of_kind(&objects, "Deployment")].concat() {
            let container = at(workload, "spec/template/spec/containers/0");
            let config = at(workload, "metadata/name").as_str().unwrap();
            let config = of_kind(&objects, "ConfigMap").into_iter().find(|map| at(map, "metadata/name") == config);
            let config = config.unwrap_or_else(|| panic!("{set}: no configuration"))["data"]["config.yaml"].as_str();
            let config: Value = serde_yaml_ng::from_str(config.unwrap()).unwrap();
            let listen = at(&config, "telemetry/httpListen").as_str().expect("a listener for probes");
            let port = at(container, "ports/0/containerPort").as_u64().unwrap();
            assert!(listen.ends_with(&format!(":{port}")), "{set}: {listen}, and a port {port}");
            assert_eq!(at(container, "ports/0/name"), "http");
            for (probe, path) in [("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")] {
                let get = &container[format!("{probe}Probe").as_str()]["httpGet"];
                assert_eq!((&get["path"], &get["port"]), (&path.into(), &"http".into()), "{set}: {probe}");
            }
        }
    }
}

#[test]
fn the_controller_elects_a_leader_and_a_budget_keeps_one_of_several_running() {
    needs!("helm");
    for (set, budgets) in [("default", 0), ("provisioning", 1), ("registry", 0), ("everything", 1)] {
        let objects = objects(&rendered(set));
        for controller in of_kind(&objects, "Deployment") {
            let pod = at(controller, "spec/template/spec");
            assert_eq!(pod["priorityClassName"], "system-cluster-critical", "{set}");
            assert_eq!(names(&pod["containers"]), ["clip-csi", "csi-provisioner"], "{set}");
            let args = at(pod, "containers/1/args").as_sequence().unwrap();
            for arg in ["--leader-election", "--extra-create-metadata"] {
                assert!(args.contains(&arg.into()), "{set}: {arg}");
            }
        }
        let found = of_kind(&objects, "PodDisruptionBudget");
        assert_eq!(found.len(), budgets, "{set}: a budget for one replica would stop every drain");
        for budget in found {
            let selector = at(budget, "spec/selector/matchLabels");
            assert!(selects(selector, of_kind(&objects, "Deployment")[0]), "{set}");
            assert!(!selects(selector, of_kind(&objects, "DaemonSet")[0]), "{set}");
            assert_eq!(budget["spec"]["maxUnavailable"], 1, "{set}");
        }
    }
}

#[test]
fn the_service_monitor_finds_the_services_and_they_find_the_pods() {
    needs!("helm");
    let objects = objects(&rendered("everything"));
    let [monitor] = of_kind(&objects, "ServiceMonitor")[..] else { panic!("one ServiceMonitor") };
    let wanted = at(monitor, "spec/selector/matchLabels").as_mapping().unwrap();
    let services = of_kind(&objects, "Service");
    assert_eq!(services.len(), 2, "node and controller");
    let workloads = [of_kind(&objects, "DaemonSet"), of_kind(&objects, "Deployment")].concat();
    for service in services {
        let labels = at(service, "metadata/labels");
        assert!(wanted.iter().all(|(key, value)| labels.get(key) == Some(value)), "{labels:?}");
        assert_eq!(at(monitor, "spec/namespaceSelector/matchNames/0"), at(service, "metadata/namespace"));
        assert_eq!(at(monitor, "spec/endpoints/0/port"), at(service, "spec/ports/0/name"));
        let pods: Vec<_> =
            workloads.iter().filter(|workload| selects(at(service, "spec/selector"), workload)).collect();
        assert_eq!(pods.len(), 1, "{service:?}");
        let ports = at(pods[0], "spec/template/spec/containers/0/ports/0");
        assert_eq!(at(service, "spec/ports/0/targetPort"), &ports["name"]);
        assert_eq!(at(service, "spec/ports/0/port"), &ports["containerPort"]);
    }
}
