//! Can this process do its work? One answer for CSI's Probe and for `/readyz`.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::seam::Volumes;
use crate::k8s::KubeApi;

/// How long an answer serves. Probes come every few seconds, from two sides.
const KEEP: Duration = Duration::from_secs(5);
/// How long one check may take: less than the kubelet's patience with a probe.
const LIMIT: Duration = Duration::from_secs(5);

type Check = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

struct Inner {
    keep: Duration,
    limit: Duration,
    checks: Vec<(&'static str, Check)>,
    last: Mutex<Option<(Instant, Result<(), String>)>>,
    started: std::sync::atomic::AtomicBool,
}

/// Cheap to clone. Answers are kept for 5 s.
#[derive(Clone)]
pub struct Readiness(Arc<Inner>);

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.checks.iter().map(|(name, _)| name)).finish()
    }
}

impl Readiness {
    /// Of named checks. A check says what is wrong and the remedy.
    pub fn new(checks: Vec<(&'static str, Check)>) -> Self {
        Self::with_times(checks, KEEP, LIMIT)
    }

    fn with_times(checks: Vec<(&'static str, Check)>, keep: Duration, limit: Duration) -> Self {
        Self(Arc::new(Inner { keep, limit, checks, last: Mutex::new(None), started: false.into() }))
    }

    /// Of a node plugin: FUSE can be opened, mounts and cache can be written to.
    pub fn node(mounts_dir: PathBuf, cache_dir: PathBuf) -> Self {
        Self::new(vec![
            ("fuse", on_disk(|| fuse("/dev/fuse".into()))),
            ("mounts", on_disk(move || writable(mounts_dir.clone()))),
            ("cache", on_disk(move || writable(cache_dir.clone()))),
        ])
    }

    /// Of a controller: its store answers, and the Kubernetes API where it is used. Without a store CreateVolume says so
    /// itself, to the one who asked for a volume.
    pub fn controller(volumes: Option<Arc<dyn Volumes>>, kubernetes: Option<Arc<dyn KubeApi>>) -> Self {
        let check = |volumes: Arc<dyn Volumes>| -> Check {
            Box::new(move || {
                let volumes = volumes.clone();
                async move {
                    // A record that can't exist: a digest of nothing.
                    let answer = volumes.record(&format!("v1-{}", "0".repeat(32))).await;
                    answer.map(drop).map_err(|error| error.to_string())
                }
                .boxed()
            })
        };
        let api = |api: Arc<dyn KubeApi>| -> Check {
            Box::new(move || {
                let api = api.clone();
                async move { api.reachable().await.map_err(|error| error.to_string()) }.boxed()
            })
        };
        let store = volumes.into_iter().map(|volumes| ("store", check(volumes)));
        Self::new(store.chain(kubernetes.into_iter().map(|given| ("kubernetes", api(given)))).collect())
    }

    /// Start-up is over: until then nothing is ready.
    pub(super) fn start(&self) {
        self.0.started.store(true, std::sync::atomic::Ordering::Release);
    }

    /// False while mounts of an earlier run are being brought back.
    pub fn is_started(&self) -> bool {
        self.0.started.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Ready, or one line that says what is not, why, and what to do.
    pub async fn check(&self) -> Result<(), String> {
        if !self.is_started() {
            return Err("starting: the mounts of an earlier run are being brought back".to_owned());
        }
        let last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, answer)) = last
            && at.elapsed() < self.0.keep
        {
            return answer;
        }
        let one = |(name, check): &(&'static str, Check)| {
            let (name, answer, limit) = (*name, check(), self.0.limit);
            async move {
                let in_time = tokio::time::timeout(limit, answer).await;
                in_time
                    .unwrap_or_else(|_| Err(format!("no answer within {} s", limit.as_secs())))
                    .map_err(|why| format!("{name}: {why}"))
            }
        };
        let failed: Vec<String> = futures::future::join_all(self.0.checks.iter().map(one))
            .await
            .into_iter()
            .filter_map(Result::err)
            .collect();
        let answer = if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) };
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// A check that does system calls.
fn on_disk(check: impl Fn() -> Result<(), String> + Send + Sync + Clone + 'static) -> Check {
    Box::new(move || {
        let check = check.clone();
        async move { tokio::task::spawn_blocking(check).await.unwrap_or_else(|error| Err(error.to_string())) }.boxed()
    })
}

fn fuse(device: PathBuf) -> Result<(), String> {
    let opened = std::fs::File::options().read(true).write(true).open(&device);
    opened.map(drop).map_err(|error| {
        format!(
            "{} can't be opened ({error}); load the kernel module fuse and run the plugin privileged",
            device.display()
        )
    })
}

/// Makes a file without a name, which leaves nothing behind. Never looks into mounts below.
fn writable(dir: PathBuf) -> Result<(), String> {
    tempfile::tempfile_in(&dir).map(drop).map_err(|error| {
        format!("{} can't be written to ({error}); check its volume, owner and free space", dir.display())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(writable(dir.path().to_owned()), Ok(()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = writable(dir.path().join("absent")).unwrap_err();
        assert!(missing.contains("absent") && missing.contains("check its volume"), "{missing}");
        let missing = fuse(dir.path().join("fuse")).unwrap_err();
        assert!(missing.contains("/fuse can't be opened") && missing.contains("privileged"), "{missing}");
    }

    fn broken_once(asked: &Arc<AtomicUsize>) -> Vec<(&'static str, Check)> {
        let count = asked.clone();
        let check: Check = Box::new(move || {
            let n = count.fetch_add(1, Ordering::SeqCst);
            async move { if n == 0 { Err("broken".into()) } else { Ok(()) } }.boxed()
        });
        vec![("thing", check)]
    }

    #[tokio::test]
    async fn an_answer_is_kept_for_its_time_and_then_asked_for_again() {
        let asked = Arc::new(AtomicUsize::new(0));
        let kept = Readiness::with_times(broken_once(&asked), Duration::from_secs(3600), LIMIT);
        assert!(kept.check().await.unwrap_err().starts_with("starting"));
        kept.start();
        assert_eq!(kept.check().await, Err("thing: broken".into()));
        assert_eq!(kept.check().await, Err("thing: broken".into()));
        assert_eq!(asked.swap(0, Ordering::SeqCst), 1);
        let fresh = Readiness::with_times(broken_once(&asked), Duration::ZERO, LIMIT);
        fresh.start();
        assert_eq!(fresh.check().await, Err("thing: broken".into()));
        assert_eq!(fresh.check().await, Ok(()));
    }

    #[tokio::test]
    async fn a_check_that_hangs_is_not_ready() {
        let hangs: Check = Box::new(|| std::future::pending().boxed());
        let readiness = Readiness::with_times(vec![("thing", hangs)], KEEP, Duration::ZERO);
        readiness.start();
        assert_eq!(readiness.check().await, Err("thing: no answer within 0 s".into()));
    }
}
