//! What the documentation quotes is there.

use std::collections::BTreeSet;
use std::path::Path;

use clip_csi::config::Config;
use clip_csi::metrics::TABLE;
use serde_json::Value;

use crate::{read, root};

fn files(dir: &Path, extension: &str, out: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, extension, out);
        } else if path.extension().is_some_and(|e| e == extension) {
            out.push(path.to_str().unwrap().to_owned());
        }
    }
}

#[test]
fn the_dashboard_asks_for_metrics_that_exist() {
    let text = read("charts/clip-csi/dashboards/clip-csi.json");
    let known: BTreeSet<&str> = TABLE.iter().map(|(name, _)| *name).collect();
    let mut asked = BTreeSet::new();
    for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| word.starts_with("clip_"))
    {
        let base = ["_bucket", "_count", "_sum"].iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
        let name = if known.contains(word) { word } else { base };
        assert!(known.contains(name), "{word}: no such metric in src/metrics.rs");
        asked.insert(name);
    }
    assert!(asked.len() > 15, "{asked:?}");
    serde_json::from_str::<serde_json::Value>(&text).unwrap();
}

/// How docs/configuration.md writes a default.
fn written(default: &Value) -> Vec<String> {
    let nothing = || ["none", "unset", "off", "the pod's own"].map(String::from).to_vec();
    let size = |bytes: u64| match bytes {
        1.. if bytes.is_multiple_of(1 << 30) => Some(format!("{} GiB", bytes >> 30)),
        1.. if bytes.is_multiple_of(1 << 20) => Some(format!("{} MiB", bytes >> 20)),
        _ => None,
    };
    match default {
        // What nothing means differs: a file, a place, a server.
        Value::Null => nothing(),
        Value::String(text) if text.is_empty() => nothing(),
        Value::Array(list) if list.is_empty() => vec!["none".into()],
        Value::Object(map) if map.is_empty() => vec!["none".into()],
        Value::Number(number) => vec![number.as_u64().and_then(size).unwrap_or_else(|| number.to_string())],
        Value::String(text) => vec![format!("`{text}`")],
        other => vec![other.to_string()],
    }
}

/// The other direction is a test of src/config.rs.
#[test]
fn every_documented_key_of_the_configuration_exists_with_its_default() {
    let config = serde_json::to_value(Config::default()).unwrap();
    let docs = read("docs/configuration.md");
    let mut seen = 0;
    for line in docs.lines().filter_map(|line| line.strip_prefix("| `")) {
        let Some((key, _)) = line.split_once('`') else { continue };
        let Some((section, name)) = key.split_once('.') else { continue };
        let default = config[section].get(name).unwrap_or_else(|| panic!("docs/configuration.md: {key} is no key"));
        let told = line.split(" | ").nth(1).unwrap_or_default().trim();
        // Of a place that follows from others, how is told.
        let follows = told.starts_with("`<kubeletDir>/");
        assert!(
            follows || written(default).iter().any(|word| word == told),
            "{key}: {told} is documented, {default} is it"
        );
        seen += 1;
    }
    assert!(seen > 20, "{seen}");
}

/// Code as its messages read: strings that go on in the next line are joined, escaped quotes are quotes.
fn code() -> String {
    let mut names = Vec::new();
    files(&root().join("src"), "rs", &mut names);
    let mut out = String::new();
    for name in names {
        let text = std::fs::read_to_string(name).unwrap();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("\\\n") {
            out.push_str(before);
            rest = after.trim_start();
        }
        out.push_str(rest);
    }
    out.replace("\\\"", "\"")
}

/// Headings of docs/troubleshooting.md quote messages, with … for what differs. Those that others write say whose they are.
#[test]
fn every_message_that_troubleshooting_quotes_is_in_the_code() {
    let (code, docs) = (code(), read("docs/troubleshooting.md"));
    let mut ours = 0;
    for line in docs.lines().filter_map(|line| line.strip_prefix("### `")) {
        let (message, whose) = line.rsplit_once('`').expect("a closing quote");
        if !whose.is_empty() {
            assert!(whose.starts_with(" (") && whose.ends_with(')'), "{line}");
            continue;
        }
        ours += 1;
        let parts: Vec<&str> = message.split('…').map(str::trim).filter(|part| part.len() > 2).collect();
        assert!(parts.iter().any(|part| part.len() >= 10), "{message:?} says too little");
        for part in parts {
            assert!(code.contains(part), "docs/troubleshooting.md quotes {part:?}, which no message says");
        }
    }
    assert!(ours > 20, "{ours}");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut names = Vec::new();
    files(&root().join("docs"), "md", &mut names);
    files(&root().join("manifests"), "md", &mut names);
    names.extend(
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root().join(name).to_str().unwrap().to_owned()),
    );
    for name in names {
        let text = std::fs::read_to_string(&name).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || target.contains("://") {
                continue;
            }
            let path = Path::new(&name).parent().unwrap().join(file);
            assert!(path.exists(), "{name}: {target} does not exist");
        }
    }
}
