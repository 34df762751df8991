//! The servers that the tests talk to: all on 127.0.0.1, on ports that the kernel chooses, gone with their guards.

// Each test binary uses some of it.
#![allow(dead_code)]

pub mod appear;
pub mod gateway;
pub mod http_fault;
pub mod image;
pub mod layers;
pub mod node;
pub mod proxy;
pub mod registry;
pub mod s3;
pub mod skip;
pub mod tree;
pub mod usage;

use std::ffi::OsString;
use std::time::Duration;

use clip_csi::source::policy::{RegistryEntry, SourceConfig};
use clip_csi::source::{Credentials, Policy, RetryPolicy, Sources};
use clip_csi::units::Digest;

/// The command under test: that of this build, or what `CLIP_CSI_TEST_BINARY` names (an optimised one, say).
pub fn binary() -> OsString {
    std::env::var_os("CLIP_CSI_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_clip-csi").into())
}

/// The default policy with pauses of milliseconds.
pub fn quick_retry() -> RetryPolicy {
    RetryPolicy {
        min_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(4),
        max_retry_after: Duration::from_millis(300),
        ..Default::default()
    }
}

/// Sources as a node has them: volumes are not trusted; these registries (`127.0.0.1:port`) are configured.
pub fn node_sources(registries: &[&str]) -> Sources {
    let entry = |host: &&str| ((*host).to_owned(), RegistryEntry { plain_http: true, ..Default::default() });
    let config = SourceConfig { registries: registries.iter().map(entry).collect(), ..Default::default() };
    sources(false, config)
}

/// Sources under a configuration.
pub fn sources(trusted: bool, config: SourceConfig) -> Sources {
    Sources::with_retry(Policy { trusted, config }, quick_retry()).expect("the configuration is valid")
}

/// A docker config with one login, brought by the identity `who`.
pub fn login(host: &str, user: &str, password: &str, who: &str) -> Credentials {
    let json = serde_json::json!({ "auths": { host: { "username": user, "password": password } } });
    Credentials {
        docker_config: Some(json.to_string().into()),
        identity: Some(Digest::of(who.as_bytes())),
        ..Default::default()
    }
}

/// Bytes that do not compress and differ everywhere.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
