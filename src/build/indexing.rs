//! What the builds of one process share: how many layers are in work, and what was found in earlier ones.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::artifacts::Artifacts;

/// Shared by builds: clone the [`Arc`] that it lies in.
#[derive(Debug)]
pub struct Indexing {
    pub(super) permits: Semaphore,
    pub(super) artifacts: Option<Arc<Artifacts>>,
}

impl Indexing {
    /// At most `layers` layers (0: one per CPU) are streamed at a time, over all builds. This is what bounds a build's memory: a layer in
    /// work holds some 8 MiB besides its entries and table, or, in zstd, as much as its frames' window asks for, 128 MiB at most.
    /// `artifacts`: where what is found is kept.
    pub fn new(layers: usize, artifacts: Option<Artifacts>) -> Self {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
        let layers = if layers == 0 { cpus() } else { layers };
        let permits = Semaphore::new(layers.min(Semaphore::MAX_PERMITS));
        Self { permits, artifacts: artifacts.map(Arc::new) }
    }
}

impl Default for Indexing {
    fn default() -> Self {
        Self::new(0, None)
    }
}
