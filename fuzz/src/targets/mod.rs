//! What the fuzz targets do: each takes any bytes, and panics where a promise is broken.
//!
//! In two crates: the fuzzer's own (`fuzz/src/lib.rs`), and `tests/fuzz_cases.rs`, which replays seeds and cases. Both have the
//! modules that are named here as `crate::…`.

pub mod archive_decode;
pub mod gob;
pub mod header;
pub mod inflate;
pub mod memory;
pub mod merge;
pub mod model;
pub mod seek_table;
pub mod storage_info;
pub mod tar_walk;
#[path = "../../../src/build/testing.rs"]
pub mod testing;
pub mod tocs;
pub mod zstd;

/// Name and body of a target.
pub type Target = (&'static str, fn(&[u8]));

/// All of them, as `fuzz/Cargo.toml` has them.
pub const ALL: &[Target] = &[
    ("archive_decode", archive_decode::run),
    ("gob", gob::run),
    ("header", header::run),
    ("inflate", inflate::run),
    ("merge", merge::run),
    ("seek_table", seek_table::run),
    ("storage_info", storage_info::run),
    ("tar_walk", tar_walk::run),
    ("tocs", tocs::run),
    ("zstd", zstd::run),
];
