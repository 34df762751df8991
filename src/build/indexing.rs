//! What the builds of one process share: how many layers are in work, how much their names may take, and what was found in earlier ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::BuildError;
use super::artifacts::Artifacts;
use super::image_config::bad_image;
use crate::source::{ResolvedImage, SourceError};

/// Shared by builds: clone the [`Arc`] that it lies in.
#[derive(Debug)]
pub struct Indexing {
    permits: Semaphore,
    artifacts: Option<Arc<Artifacts>>,
    /// Bytes of names and attributes that all builds may hold, and that they do hold.
    metadata: u64,
    held: AtomicU64,
}

impl Indexing {
    /// What a node allows for `metadata`: 256 MiB, about a million names. A build takes some three times that at its height.
    pub const NODE_METADATA: u64 = 256 << 20;

    /// At most `layers` layers (0: one per CPU) are looked at at a time, over all builds. This is what bounds a build's memory besides `metadata`:
    /// a layer in work holds some 8 MiB, or, in zstd, as much as its frames' window asks for, 128 MiB at most.
    /// `artifacts`: where what is found is kept. `metadata`: bytes of names, attributes and sparse maps that all builds may hold at a time;
    /// an image with more can't be built.
    pub fn new(layers: usize, artifacts: Option<Artifacts>, metadata: u64) -> Self {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
        let layers = if layers == 0 { cpus() } else { layers };
        let permits = Semaphore::new(layers.min(Semaphore::MAX_PERMITS));
        Self { permits, artifacts: artifacts.map(Arc::new), metadata, held: AtomicU64::new(0) }
    }
}

impl Default for Indexing {
    fn default() -> Self {
        Self::new(0, None, u64::MAX)
    }
}

/// One build among those that share.
#[derive(Debug)]
pub(super) struct Share {
    indexing: Arc<Indexing>,
    held: AtomicU64,
}

/// Names and attributes take more than they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TooMuch {
    /// Those of this image alone.
    Alone(u64),
    /// Those of this and of other images that are being built.
    Together(u64),
}

impl TooMuch {
    pub(super) fn error(self, image: &ResolvedImage) -> BuildError {
        match self {
            Self::Alone(limit) => bad_image(
                image,
                format!(
                    "its names and attributes take over {} MiB; index it with `clip-csi index`, which may take more, and \
                     push the archive",
                    limit >> 20
                ),
            ),
            Self::Together(limit) => SourceError::Unavailable {
                what: image.reference.to_string(),
                tries: 1,
                detail: format!(
                    "the names of all images that are being indexed take over {} MiB; it goes on when others are done",
                    limit >> 20
                ),
            }
            .into(),
        }
    }
}

impl Share {
    pub(super) fn new(indexing: &Arc<Indexing>) -> Arc<Self> {
        Arc::new(Self { indexing: Arc::clone(indexing), held: AtomicU64::new(0) })
    }

    pub(super) fn artifacts(&self) -> Option<&Arc<Artifacts>> {
        self.indexing.artifacts.as_ref()
    }

    /// Waits for a layer's turn, which ends when the answer is dropped.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.indexing.permits.acquire().await.ok()
    }

    /// Holds so many bytes more until the build ends.
    pub(super) fn hold(&self, bytes: u64) -> Result<(), TooMuch> {
        let limit = self.indexing.metadata;
        let own = self.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        let all = self.indexing.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        match (own > limit, all > limit) {
            (true, _) => Err(TooMuch::Alone(limit)),
            (_, true) => Err(TooMuch::Together(limit)),
            _ => Ok(()),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.indexing.held.fetch_sub(*self.held.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_builds_hold_counts_together_and_is_given_back() {
        let indexing = Arc::new(Indexing::new(0, None, 100));
        let (first, second) = (Share::new(&indexing), Share::new(&indexing));
        assert_eq!(first.hold(60), Ok(()));
        assert_eq!(second.hold(60), Err(TooMuch::Together(100)));
        drop(second);
        assert_eq!(first.hold(40), Ok(()));
        assert_eq!(first.hold(1), Err(TooMuch::Alone(100)));
        drop(first);
        assert_eq!(Share::new(&indexing).hold(100), Ok(()));
    }
}
