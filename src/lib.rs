//! clip-csi: a container image as a read-only volume, of which only the bytes that are read are fetched.
//!
//! The modules, from the top down. Imports run downward only (`tests/architecture.rs` holds us to it):
//!
//! ```text
//! main -> cli -> config -> csi -> {mount, k8s} -> {fs, build} -> {cache, source} -> inflate -> archive -> {units, metrics, memory}
//! telemetry stands beside csi and is used by cli only
//! ```
//!
//! | module | says |
//! |---|---|
//! | [`units`] | digests, offsets, platforms, image references: the words everything else is written in |
//! | [`archive`] | the bytes of a CLIP archive, v1 and v2, and the tree they describe; no I/O |
//! | [`inflate`] | random access into compressed layers; no I/O |
//! | [`source`] | reading ranges of blobs: local files, OCI layouts, S3, registries |
//! | [`cache`] | the node's verified span cache |
//! | [`build`] | making archives: v1 from a directory or image, v2 from an image; the archive store |
//! | [`fs`] | the read-only filesystem over an opened archive, and its kernel adapter |
//! | [`mount`] | shared mounts, bind mounts, journal and recovery |
//! | [`k8s`] | the Kubernetes API: claims, volume records, Events, the startup taint |
//! | [`csi`] | the CSI and registration services |
//! | [`memory`] | what is asked of the allocator |
//! | [`telemetry`], [`metrics`] | logs, spans, `/metrics`, `/healthz`, `/readyz` |
//! | [`config`] | file, environment and flags, composed and validated |
//! | [`cli`] | the `clip-csi` command |

pub mod archive;
pub mod build;
pub mod cache;
pub mod cli;
pub mod config;
pub mod csi;
pub mod fs;
pub mod inflate;
pub mod k8s;
pub mod memory;
pub mod metrics;
pub mod mount;
pub mod source;
pub mod telemetry;
pub mod units;

// The one list of what was skipped, for the tests in here too.
#[cfg(test)]
#[path = "../tests/common/skip.rs"]
mod skip;
