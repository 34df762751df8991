//! How far a build in the background is: log lines now and then, and a word for those who wait.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::info;

use crate::build::progress::Progress;
use crate::source::ImageRef;

/// Time between two log lines of one build.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Counts the bytes of one build.
#[derive(Debug)]
pub(super) struct BuildProgress {
    image: ImageRef,
    done: AtomicU64,
    total: AtomicU64,
    logged: Mutex<Instant>,
}

impl BuildProgress {
    pub(super) fn new(image: ImageRef) -> Self {
        Self { image, done: AtomicU64::new(0), total: AtomicU64::new(0), logged: Mutex::new(Instant::now()) }
    }

    pub(super) fn image(&self) -> &ImageRef {
        &self.image
    }
}

impl Progress for BuildProgress {
    fn begin(&self, _what: &str, total: Option<u64>) -> u64 {
        self.total.fetch_add(total.unwrap_or(0), Relaxed);
        0
    }

    fn advance(&self, _: u64, bytes: u64) {
        self.done.fetch_add(bytes, Relaxed);
        // Whoever finds the lock taken leaves the line to its holder.
        let Ok(mut logged) = self.logged.try_lock() else { return };
        if logged.elapsed() >= LOG_EVERY {
            *logged = Instant::now();
            info!(image = %self.image, progress = %self, "building an archive");
        }
    }

    fn end(&self, _: u64) {
        *self.logged.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

impl fmt::Display for BuildProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, total) = (self.done.load(Relaxed), self.total.load(Relaxed));
        match (done * 100).checked_div(total) {
            Some(percent) => write!(f, "{} of {} MB, {} %", done / 1_000_000, total / 1_000_000, percent.min(100)),
            None => write!(f, "{} MB so far", done / 1_000_000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_how_much_of_how_much() {
        let progress = BuildProgress::new(ImageRef::Layout { dir: "/x".into(), tag: None });
        assert_eq!(progress.to_string(), "0 MB so far");
        let id = progress.begin("layer", Some(10_000_000));
        progress.advance(id, 2_500_000);
        assert_eq!(progress.to_string(), "2 of 10 MB, 25 %");
    }
}
