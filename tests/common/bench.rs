//! A place to open archives in through the library: a directory, sources that are trusted, an empty cache.

use std::path::PathBuf;
use std::sync::Arc;

use clip_csi::cache::{Cache, CacheConfig};
use clip_csi::source::policy::SourceConfig;
use clip_csi::source::{Policy, Sources};

/// All of it is gone with this guard.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub sources: Sources,
    pub cache: Arc<Cache>,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::new(Policy { trusted: true, config: SourceConfig::default() }).unwrap();
        let cache = Cache::open(&CacheConfig { dir: dir.path().join("cache"), ..CacheConfig::default() }).unwrap();
        Self { dir, sources, cache }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
