//! How many bytes of indexes, storage infos and seek tables are fetched and decoded at a time in this process: what a few large archives, or
//! many at once, can make a node hold before anything is known of them.
//!
//! Small ones and large ones have room of their own: a place that sends a large one slowly keeps other large ones waiting, and nobody else.

use tokio::sync::{Semaphore, SemaphorePermit};

/// Up to so many KiB it is a small one: some 100,000 names.
const SMALL: u64 = 16 << 10;
/// KiB for all small ones, and for all large ones: one alone may fill it, which is what a header may say at most.
const ALL_SMALL: usize = 128 << 10;
const ALL_LARGE: usize = 256 << 10;

static FOR_SMALL: Semaphore = Semaphore::const_new(ALL_SMALL);
static FOR_LARGE: Semaphore = Semaphore::const_new(ALL_LARGE);

/// Waits for room for so many bytes, which is held until the answer is dropped.
pub(super) async fn take(bytes: u64) -> Option<SemaphorePermit<'static>> {
    let kib = bytes.div_ceil(1 << 10);
    let (room, all) = if kib <= SMALL { (&FOR_SMALL, ALL_SMALL) } else { (&FOR_LARGE, ALL_LARGE) };
    // Never closed.
    room.acquire_many(u32::try_from(kib.min(all as u64)).unwrap_or(u32::MAX)).await.ok()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_large_one_keeps_only_large_ones_waiting() {
        let whole = take(u64::MAX).await.unwrap();
        assert!(take(100 << 20).now_or_never().is_none());
        assert!(take(10 << 20).now_or_never().is_some());
        drop(whole);
        assert!(take(100 << 20).now_or_never().is_some());
    }
}
