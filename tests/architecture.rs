//! The house rules that a compiler does not check: imports run downward, and what touches the world stays in its file.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A module may import those below it. `lib.rs` draws the same picture.
const ALLOWED: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("metrics", &[]),
    ("memory", &[]),
    ("archive", &["units"]),
    ("inflate", &["archive", "units", "metrics"]),
    ("source", &["inflate", "archive", "units", "metrics"]),
    ("cache", &["source", "inflate", "archive", "units", "metrics"]),
    ("build", &["cache", "source", "inflate", "archive", "units", "metrics", "memory"]),
    ("fs", &["cache", "source", "inflate", "archive", "units", "metrics"]),
    ("mount", &["fs", "build", "cache", "source", "inflate", "archive", "units", "metrics"]),
    ("k8s", &["build", "source", "archive", "units", "metrics"]),
    ("csi", &["mount", "k8s", "fs", "build", "cache", "source", "inflate", "archive", "units", "metrics"]),
    ("telemetry", &["metrics"]),
    ("config", &["csi", "telemetry", "mount", "k8s", "fs", "build", "cache", "source", "archive", "units"]),
    (
        "cli",
        &[
            "config",
            "telemetry",
            "csi",
            "mount",
            "k8s",
            "fs",
            "build",
            "cache",
            "source",
            "inflate",
            "archive",
            "units",
            "metrics",
            "memory",
        ],
    ),
];

/// Crates that only these files, or files below these directories, may name. Tests inside of a module count as its files.
const CONFINED: &[(&str, &[&str])] = &[
    ("fuser", &["fs/fuse.rs", "fs/fuse"]),
    ("tonic", &["csi"]),
    ("reqwest", &["source/registry.rs", "source/registry", "source/s3.rs", "source/s3"]),
    ("oci_client", &["source/registry.rs", "source/registry"]),
    ("aws_config", &["source/s3.rs", "source/s3"]),
    ("aws_credential_types", &["source/s3.rs", "source/s3"]),
    ("aws_sdk_s3", &["source/s3.rs", "source/s3"]),
    ("aws_smithy_http_client", &["source/s3.rs", "source/s3"]),
    ("aws_smithy_runtime_api", &["source/s3.rs", "source/s3"]),
    ("aws_smithy_types", &["source/s3.rs", "source/s3"]),
    ("kube", &["k8s"]),
    ("k8s_openapi", &["k8s"]),
    ("axum", &["telemetry.rs"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("libz_rs_sys", &["inflate"]),
    ("anyhow", &["main.rs"]),
];

/// Longer files, their tests not counted, are two things.
const MAX_LINES: usize = 700;

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// All files below src/: path relative to it, and text.
fn files() -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut open = vec![src()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(src()).unwrap().to_str().unwrap().to_owned();
                out.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    out.sort();
    out
}

/// Lines without comments (whole-line ones: `//` may stand in strings).
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn module(file: &str) -> &str {
    let first = file.split('/').next().unwrap_or(file);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// The top-level modules that a line names after `crate::`, also those of `use crate::{a, b::c}`.
fn named(line: &str) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for rest in line.split("crate::").skip(1) {
        let words = match rest.strip_prefix('{') {
            Some(list) => list.split(',').collect(),
            None => vec![rest],
        };
        for word in words {
            let name: String =
                word.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_' || c.is_ascii_digit()).collect();
            if !name.is_empty() {
                out.insert(name);
            }
        }
    }
    out
}

#[test]
fn imports_run_downward_only() {
    let known: BTreeSet<&str> = ALLOWED.iter().map(|(name, _)| *name).collect();
    let mut upward = Vec::new();
    for (file, text) in files() {
        let own = module(&file);
        if matches!(own, "lib" | "main") {
            continue;
        }
        let (_, below) =
            ALLOWED.iter().find(|(name, _)| *name == own).unwrap_or_else(|| panic!("{file}: add {own} to ALLOWED"));
        for (number, line) in code(&text) {
            for name in named(line) {
                if known.contains(name.as_str()) && name != own && !below.contains(&name.as_str()) {
                    upward.push(format!("src/{file}:{number}: {own} imports {name}: {}", line.trim()));
                }
            }
        }
    }
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

#[test]
fn the_table_of_imports_has_no_cycle() {
    let place = |name: &str| ALLOWED.iter().position(|(n, _)| *n == name);
    for (at, (name, below)) in ALLOWED.iter().enumerate() {
        for other in *below {
            assert!(place(other).is_some_and(|p| p < at), "{name} -> {other}");
        }
    }
}

#[test]
fn crates_that_touch_the_world_are_named_in_their_files_only() {
    let mut loose = Vec::new();
    for (file, text) in files() {
        for (number, line) in code(&text) {
            for (name, homes) in CONFINED {
                let home = homes.iter().any(|home| file == *home || file.starts_with(&format!("{home}/")));
                let named = line.match_indices(&format!("{name}::")).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    before.is_none_or(|c| !(c.is_alphanumeric() || c == '_' || c == ':'))
                });
                if named && !home {
                    loose.push(format!("src/{file}:{number}: {name} belongs to {homes:?}: {}", line.trim()));
                }
            }
        }
    }
    assert!(loose.is_empty(), "{}", loose.join("\n"));
}

#[test]
fn no_file_says_too_many_things() {
    let length = |text: &str| text.lines().take_while(|line| *line != "#[cfg(test)]").count();
    let is_tests = |file: &str| file.ends_with("tests.rs") || file.contains("/tests/");
    let long = files().into_iter().filter(|(file, text)| !is_tests(file) && length(text) > MAX_LINES);
    let long: Vec<_> = long.map(|(file, text)| format!("src/{file}: {} lines", length(&text))).collect();
    assert!(long.is_empty(), "split these: {}", long.join(", "));
}

#[test]
fn every_unsafe_says_why_it_is_safe() {
    let mut bare = Vec::new();
    for (file, text) in files() {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let line = line.trim_start();
            let is_unsafe = !line.starts_with("//") && (line.contains("unsafe {") || line.starts_with("unsafe impl"));
            let reasoned = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY"));
            if is_unsafe && !reasoned {
                bare.push(format!("src/{file}:{}", i + 1));
            }
        }
    }
    assert!(bare.is_empty(), "no SAFETY reason: {}", bare.join(", "));
}

#[test]
fn the_reader_of_lines_sees_what_is_named() {
    let names = |line| named(line).into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(names("use crate::source::{Location, Sources};"), "source");
    assert_eq!(names("use crate::{units, archive::Tree};"), "archive units");
    assert_eq!(names("fn f(x: crate::fs::Errno) -> crate::cache::CacheError {"), "cache fs");
    assert_eq!(names("pub(crate) fn f()"), "");
}
