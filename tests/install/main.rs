//! What a user installs: the chart, the plain manifests, the container image, and what the documentation says of them.
//!
//! Run with `CLIP_UPDATE=1` (`make manifests`) to write what is derived from the chart instead of comparing it.

#[path = "../common/skip.rs"]
mod skip;

mod docs;
mod helm;
mod image;
mod relations;
mod values;

use std::path::{Path, PathBuf};

/// The checkout.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn read(name: &str) -> String {
    let path = root().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Compares a derived file, or writes it where that is asked for.
fn derived(name: &str, expected: &str) {
    let path = root().join(name);
    if std::env::var_os("CLIP_UPDATE").is_some() {
        std::fs::write(&path, expected).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    if found != expected {
        let differs = found.lines().zip(expected.lines()).position(|(a, b)| a != b);
        let line = differs.unwrap_or_else(|| found.lines().count().min(expected.lines().count()));
        panic!(
            "{name} is not what the chart says, from line {} on: {:?} should be {:?}; run `make manifests`",
            line + 1,
            found.lines().nth(line).unwrap_or_default(),
            expected.lines().nth(line).unwrap_or_default()
        );
    }
}
