//! The clean-up of the archive store, beside the Controller service: archives that no volume names go after a grace period.
//! Never inside of DeleteVolume: another volume of the same image may be under way. Several controllers may do it at once.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::seam::Volumes;

/// Time between two clean-ups. Half of it passes before the first: a controller that restarts often still gets there.
const EVERY: Duration = Duration::from_secs(3600);

/// Cleans up for ever. A grace of zero: never.
pub(super) async fn clean_up(volumes: Option<Arc<dyn Volumes>>, grace: Duration) {
    clean_up_every(volumes, grace, EVERY).await;
}

async fn clean_up_every(volumes: Option<Arc<dyn Volumes>>, grace: Duration, every: Duration) {
    let Some(volumes) = volumes.filter(|_| !grace.is_zero()) else { return };
    let mut pause = every / 2;
    loop {
        tokio::time::sleep(jittered(pause)).await;
        pause = every;
        match volumes.collect(SystemTime::now(), grace).await {
            Ok(collected) => {
                let (archives, removed) = (collected.archives, collected.removed.len());
                tracing::debug!(archives, removed, failed = collected.failed.len(), "archive store cleaned up");
                for (archive, why) in &collected.failed {
                    tracing::warn!(archive, "an archive that no volume names can't be removed: {why}");
                }
            }
            Err(error) => tracing::warn!("the archive store can't be cleaned up; it is tried again: {error}"),
        }
    }
}

/// Nine to eleven tenths of it, so that controllers that started together part.
fn jittered(pause: Duration) -> Duration {
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    pause.mul_f64(0.9 + 0.2 * f64::from(nanos % 1000) / 1000.0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use async_trait::async_trait;
    use tokio::sync::mpsc;

    use super::*;
    use crate::build::BuildError;
    use crate::build::store::{Collected, VolumeRecord};
    use crate::source::{ImageRef, SourceError};

    /// Says when it is cleaned up, and fails every time.
    #[derive(Debug)]
    struct Store(mpsc::UnboundedSender<Duration>);

    #[async_trait]
    impl Volumes for Store {
        async fn create_record(&self, _: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
            Ok(None)
        }
        async fn record(&self, _: &str) -> Result<Option<VolumeRecord>, BuildError> {
            Ok(None)
        }
        async fn delete_record(&self, _: &str) -> Result<(), BuildError> {
            Ok(())
        }
        async fn put(&self, _: &str, _: Option<&Path>, _: &ImageRef) -> Result<(), BuildError> {
            Ok(())
        }
        async fn collect(&self, _: SystemTime, grace: Duration) -> Result<Collected, BuildError> {
            let _ = self.0.send(grace);
            Err(SourceError::Unavailable { what: "store".into(), tries: 1, detail: "timeout".into() }.into())
        }
        fn archive_url(&self, _: &str) -> String {
            String::new()
        }
    }

    #[tokio::test]
    async fn the_store_is_cleaned_up_again_and_again_also_after_a_failure() {
        let (tell, mut told) = mpsc::unbounded_channel();
        let grace = Duration::from_secs(86_400);
        let cleaning = tokio::spawn(clean_up_every(Some(Arc::new(Store(tell))), grace, Duration::from_millis(2)));
        for _ in 0..3 {
            let heard = tokio::time::timeout(Duration::from_secs(60), told.recv()).await.expect("a clean-up");
            assert_eq!(heard, Some(grace));
        }
        cleaning.abort();
    }

    #[tokio::test]
    async fn without_a_grace_period_nothing_is_removed() {
        let (tell, mut told) = mpsc::unbounded_channel();
        clean_up_every(Some(Arc::new(Store(tell))), Duration::ZERO, Duration::from_millis(1)).await;
        assert!(told.recv().await.is_none());
    }

    #[test]
    fn pauses_differ_a_little() {
        let pause = jittered(Duration::from_secs(100));
        assert!((90..=110).contains(&pause.as_secs()), "{pause:?}");
    }
}
