//! values.yaml, its schema and its documentation say the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use clip_csi::config::Config;
use serde_json::Value;

use crate::{derived, read};

/// One value: its path, the default as JSON, the comment above it.
struct Entry {
    path: String,
    default: Value,
    comment: String,
}

/// Keys in the order of the file, each with its comment. What has no comment of its own but documented keys below is a heading.
fn entries() -> Vec<Entry> {
    let text = read("charts/clip-csi/values.yaml");
    let tree: Value = serde_yaml_ng::from_str(&text).unwrap();
    let (mut out, mut stack, mut comment) = (Vec::new(), Vec::<(usize, String)>::new(), String::new());
    for line in text.lines() {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        if let Some(words) = bare.strip_prefix('#') {
            if !comment.is_empty() {
                comment.push(' ');
            }
            comment.push_str(words.trim());
            continue;
        }
        let Some((key, _)) = bare.split_once(':').filter(|_| !bare.starts_with('-')) else {
            comment.clear();
            continue;
        };
        // Deeper than a list's item: a part of the item.
        stack.retain(|(depth, _)| *depth < indent);
        stack.push((indent, key.to_owned()));
        let path: Vec<&str> = stack.iter().map(|(_, key)| key.as_str()).collect();
        let default = path.iter().fold(&tree, |value, key| &value[*key]);
        out.push(Entry { path: path.join("."), default: default.clone(), comment: std::mem::take(&mut comment) });
    }
    out
}

/// A value that is set as a whole: everything but an object that has keys of the chart.
fn is_leaf(schema: &Value, entry: &Entry) -> bool {
    properties(schema, &entry.path).is_none()
}

/// The properties that the schema gives an object at a path; `None`: it is no object, or one with free keys.
fn properties(schema: &Value, path: &str) -> Option<Vec<String>> {
    let node = schema_at(schema, path);
    let keys = node["properties"].as_object()?;
    Some(keys.keys().cloned().collect())
}

fn resolve<'a>(schema: &'a Value, node: &'a Value) -> &'a Value {
    match node["$ref"].as_str() {
        Some(reference) => &schema["definitions"][reference.trim_start_matches("#/definitions/")],
        None => node,
    }
}

fn schema_at<'a>(schema: &'a Value, path: &str) -> &'a Value {
    let keys = path.split('.').filter(|key| !key.is_empty());
    keys.fold(schema, |node, key| resolve(schema, &node["properties"][key]))
}

fn schema() -> Value {
    serde_json::from_str(&read("charts/clip-csi/values.schema.json")).unwrap()
}

/// Objects of which the schema knows the keys but values.yaml has only some, or none.
const PARTIAL: &[&str] = &["node.resources", "controller.resources", "controller.provisioner.resources"];

#[test]
fn the_schema_knows_exactly_the_values_that_exist() {
    let (schema, values) = (schema(), serde_yaml_ng::from_str::<Value>(&read("charts/clip-csi/values.yaml")).unwrap());
    fn walk(schema: &Value, values: &Value, path: &str) {
        let node = schema_at(schema, path);
        let Some(known) = node["properties"].as_object() else { return };
        assert_eq!(node["additionalProperties"], false, "{path:?} lets typos through");
        if PARTIAL.contains(&path) {
            return;
        }
        let mut known: Vec<&String> = known.keys().filter(|key| !(path.is_empty() && *key == "global")).collect();
        let mut given: Vec<&String> = values.as_object().unwrap_or_else(|| panic!("{path}")).keys().collect();
        known.sort();
        given.sort();
        assert_eq!(known, given, "keys of {path:?} in schema and in values.yaml");
        for (key, value) in values.as_object().unwrap() {
            walk(schema, value, &if path.is_empty() { key.clone() } else { format!("{path}.{key}") });
        }
    }
    walk(&schema, &values, "");
}

/// Keys of the configuration that the chart sets from other values, or leaves at their defaults.
const OF_THE_CHART: &[&str] = &[
    "cache.dir",
    "cache.fillBytes",
    "cache.maxBytes",
    "csi.driverName",
    "csi.endpoint",
    "csi.kubeletDir",
    "csi.nodeId",
    "csi.register",
    "imageService.archiveDir",
    "imageService.archiveMaxBytes",
    "imageService.indexConcurrency",
    "imageService.layerCacheMaxBytes",
    "k8s.enabled",
    "k8s.kubeconfig",
    "k8s.namespace",
    "k8s.removeStartupTaint",
    "k8s.startupTaint",
    "mounts.mountsDir",
    "mounts.stateDir",
    "telemetry.httpListen",
];

#[test]
fn every_key_of_the_configuration_is_a_value_or_set_by_the_chart() {
    let (schema, config) = (schema(), serde_json::to_value(Config::default()).unwrap());
    let mut missing = Vec::new();
    let mut keys = BTreeMap::new();
    for (section, of_section) in config.as_object().unwrap() {
        for key in of_section.as_object().unwrap().keys() {
            let name = format!("{section}.{key}");
            let in_schema = !schema_at(&schema, &format!("config.{name}")).is_null();
            if in_schema == OF_THE_CHART.contains(&name.as_str()) {
                missing.push(name.clone());
            }
            keys.insert(name, ());
        }
    }
    assert!(missing.is_empty(), "neither or both of config.* in values.schema.json and OF_THE_CHART: {missing:?}");
    for section in properties(&schema, "config").unwrap() {
        for key in properties(&schema, &format!("config.{section}")).unwrap() {
            assert!(
                keys.contains_key(&format!("{section}.{key}")),
                "config.{section}.{key}: the driver does not know it"
            );
        }
    }
}

#[test]
fn every_value_is_documented() {
    let (schema, entries) = (schema(), entries());
    let mut out = String::from(
        "# Values of the Helm chart\n\nMade from [values.yaml](../charts/clip-csi/values.yaml) by `make manifests`. A value that is not here, \
         or of another shape, fails `helm install` and is named.\n\n| value | default | meaning |\n|---|---|---|\n",
    );
    let mut known: Vec<&str> = Vec::new();
    for entry in &entries {
        let below_leaf = known.iter().any(|leaf| entry.path.starts_with(&format!("{leaf}.")));
        if below_leaf || !(is_leaf(&schema, entry) || PARTIAL.contains(&entry.path.as_str())) {
            continue;
        }
        known.push(&entry.path);
        assert!(!entry.comment.is_empty(), "values.yaml: {} has no comment above it", entry.path);
        let default = match &entry.default {
            Value::String(text) if text.is_empty() => "empty".to_owned(),
            Value::String(text) => format!("`{text}`"),
            other => format!("`{}`", other.to_string().replace('"', "").replace(',', ", ").replace(':', ": ")),
        };
        writeln!(out, "| `{}` | {default} | {} |", entry.path, entry.comment.replace('|', "\\|")).unwrap();
    }
    assert!(known.len() > 60, "{known:?}");
    derived("docs/helm-values.md", &out);
}
