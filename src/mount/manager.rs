//! The manager's state and its two verbs, publish and unpublish.
//!
//! Locks, taken in this order and never the other way round: the target's, then the archive's (while it is opened, so
//! that twenty pods decode one index once), then the mount's. Whoever mounts, binds or unmounts anything of a shared mount
//! holds that mount's lock, so the last unpublish and the next publish of one mount can't cross. The state itself is
//! behind a plain mutex that is never held across an await.
//!
//! Both verbs run as tasks of their own: a caller that gives up leaves nothing half done, and its retry joins the work by
//! waiting for the target's lock. Every system call runs on a blocking thread.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fs::RootView;
use crate::metrics::metrics;
use crate::source::Location;
use crate::units::Digest;

use super::journal::{Journal, Record};
use super::locks::{KeyGuard, KeyLocks};
use super::serve::{Place, Server};
use super::shared::Shared;
use super::target;
use super::{MountConfig, MountError, MountSpec, Published, TargetSpec, VolumeStats, io_error, key, sys};

/// How long our own filesystem may take to answer the lookups of one bind. They are answered from the index.
const BIND_DEADLINE: Duration = Duration::from_secs(10);

/// How long [`Inner::shutdown`] waits for work in flight.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

/// How long a failed read makes a volume's condition abnormal. The kubelet asks about once a minute.
const FAILURE_SHOWN: Duration = Duration::from_secs(300);

/// The condition of a volume that came back without the credentials that it was published with.
const LOST_CREDENTIALS: &str = "the plugin was restarted and no longer has this volume's credentials: files that this node \
    has not cached can't be read; restart the pod, or start another one of the same image and secret";

/// One content, seen through one view, for one scope.
pub(super) type ArchiveId = (Location, String, RootView, String);

/// Counts itself in a gauge while it exists.
#[derive(Debug)]
struct Counted(&'static prometheus::Gauge);

impl Counted {
    fn new(gauge: &'static prometheus::Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// One target, bound to a shared mount.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) shared: Arc<Shared>,
    pub(super) record: Record,
    _counted: Counted,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) closed: bool,
    /// By name.
    pub(super) mounts: HashMap<String, Arc<Shared>>,
    pub(super) targets: HashMap<PathBuf, Arc<Bound>>,
    /// Targets that recovery could not bring back, and why.
    failed: HashMap<PathBuf, String>,
    /// Digest of the archive, and whether `/rootfs` is shown.
    pub(super) known: HashMap<ArchiveId, (Digest, bool)>,
    /// Publishes that are fetching: cancelled by an unpublish of the same target.
    fetching: HashMap<PathBuf, CancellationToken>,
}

pub(super) struct Inner {
    pub(super) me: Weak<Self>,
    pub(super) server: Arc<dyn Server>,
    pub(super) journal: Arc<Journal>,
    pub(super) mounts_dir: PathBuf,
    pub(super) instance: String,
    state: Mutex<State>,
    target_locks: KeyLocks<PathBuf>,
    pub(super) archive_locks: KeyLocks<ArchiveId>,
    mount_locks: KeyLocks<String>,
    tasks: TaskTracker,
    _lock: File,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountManager").field("mounts_dir", &self.mounts_dir).finish_non_exhaustive()
    }
}

/// Runs `work` on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(io_error("a mount worker thread", e)))
}

fn private_dir(path: &Path) -> Result<PathBuf, MountError> {
    let make = || {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        path.canonicalize()
    };
    make().map_err(|e: std::io::Error| io_error(format!("creating {}", path.display()), e))
}

/// Removes the token of a fetch when the publish ends, however it ends.
pub(super) struct Fetching<'a> {
    inner: &'a Inner,
    target: &'a Path,
    token: CancellationToken,
}

impl Fetching<'_> {
    pub(super) fn token(&self) -> &CancellationToken {
        &self.token
    }
}

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        self.inner.state().fetching.remove(self.target);
    }
}

impl Inner {
    pub(super) fn new(config: &MountConfig, server: Arc<dyn Server>) -> Result<Arc<Self>, MountError> {
        let mounts_dir = private_dir(&config.mounts_dir)?;
        let state_dir = private_dir(&config.state_dir)?;
        let what = || format!("locking {}", state_dir.display());
        let lock = sys::lock_dir(&state_dir).map_err(|e| io_error(what(), e))?.ok_or_else(|| {
            io_error(what(), "another clip-csi node plugin uses it; stop that one, or set mount.stateDir")
        })?;
        Ok(Arc::new_cyclic(|me| Self {
            me: me.clone(),
            server,
            journal: Arc::new(Journal::new(state_dir)),
            instance: key::instance(&mounts_dir),
            mounts_dir,
            state: Mutex::default(),
            target_locks: KeyLocks::default(),
            archive_locks: KeyLocks::default(),
            mount_locks: KeyLocks::default(),
            tasks: TaskTracker::new(),
            _lock: lock,
        }))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one verb to its end, whatever becomes of the caller.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        verb: impl Future<Output = Result<T, MountError>> + Send + 'static,
    ) -> Result<T, MountError> {
        let task = {
            let state = self.state();
            if state.closed {
                return Err(io_error("the mount manager", "the plugin is being stopped; try again"));
            }
            self.tasks.spawn(verb)
        };
        task.await.unwrap_or_else(|e| Err(io_error("a mount task", e)))
    }

    pub(super) async fn lock_target(&self, target: &Path) -> KeyGuard {
        self.target_locks.lock(target.to_owned()).await
    }

    pub(super) async fn lock_mount(&self, name: &str) -> KeyGuard {
        self.mount_locks.lock(name.to_owned()).await
    }

    pub(super) fn bound(&self, target: &Path) -> Option<Arc<Bound>> {
        self.state().targets.get(target).cloned()
    }

    pub(super) fn has_mount(&self, name: &str) -> bool {
        self.state().mounts.contains_key(name)
    }

    pub(super) fn note_failed(&self, target: &Path, why: &str) {
        self.state().failed.insert(target.to_owned(), why.to_owned());
    }

    /// The canonical target, checked: absolute, with a parent that exists, and none of our own directories.
    async fn target(&self, target: &Path) -> Result<PathBuf, MountError> {
        let path = target.to_owned();
        let canonical = blocking(move || target::canonical(&path)).await?;
        self.not_our_own(&canonical)?;
        Ok(canonical)
    }

    fn not_our_own(&self, target: &Path) -> Result<(), MountError> {
        if target.starts_with(&self.mounts_dir) {
            let detail = "the driver keeps its own mounts there; name a directory of the pod".into();
            return Err(MountError::Busy { path: target.to_owned(), detail });
        }
        Ok(())
    }

    pub(super) async fn publish(&self, spec: &MountSpec, request: &TargetSpec) -> Result<Published, MountError> {
        let sub_path = request.sub_path.as_deref().map(target::sub_path).transpose()?.flatten();
        let path = self.target(&request.target).await?;
        let _target_lock = self.lock_target(&path).await;
        let record = Record::new(spec, request, path.clone(), sub_path);

        if let Some(bound) = self.bound(&path) {
            if let Some(detail) = bound.record.difference(&record) {
                let detail = format!("{detail} differ from the first publish; unpublish it first");
                return Err(MountError::Conflict { path, detail });
            }
            let mount_lock = self.lock_mount(&bound.shared.name).await;
            self.ensure(&bound, &mount_lock).await?;
            self.give_back_credentials(&bound.shared, &bound.record.scope, spec).await;
            let shared = self.targets_of(&bound.shared).len() > 1;
            return Ok(published(&bound.shared, true, shared));
        }

        // Nothing is known of the target: an own mount there is one that was left, anything else is somebody's. What was left
        // stays until the new one takes its place, so that no container ever finds the empty directory beneath.
        let (checked, instance) = (path.clone(), self.instance.clone());
        blocking(move || target::thin(&checked, &instance).map(drop)).await?;
        let result = self.publish_new(spec, record).await;
        if result.is_err() {
            let instance = self.instance.clone();
            let cleared = blocking(move || target::clear_own(&path, &instance));
            cleared.await.unwrap_or_else(|e| tracing::warn!(error = %e, "a failed publish left a mount of before"));
        }
        result
    }

    async fn publish_new(&self, spec: &MountSpec, record: Record) -> Result<Published, MountError> {
        let target = record.target.clone();
        let fetching = self.fetching(&target);
        let (shared, mount_lock, joined) = self.acquire(spec, &fetching.token, None).await?;
        drop(fetching);
        match self.bind_new(&shared, record, &mount_lock).await {
            Ok(()) => Ok(published(&shared, false, joined)),
            Err(error) => {
                if let Err(e) = self.end_if_unused(&shared, &mount_lock).await {
                    tracing::warn!(mount = %shared.mountpoint.display(), error = %e, "an unused mount can't be ended");
                }
                Err(error)
            }
        }
    }

    /// Registers a fetch for a target whose lock is held: an unpublish of it cancels the fetch.
    pub(super) fn fetching<'a>(&'a self, target: &'a Path) -> Fetching<'a> {
        let token = CancellationToken::new();
        self.state().fetching.insert(target.to_owned(), token.clone());
        Fetching { inner: self, target, token }
    }

    /// A published target that shows what it should, served by a living mount; else it is made so.
    async fn ensure(&self, bound: &Arc<Bound>, lock: &KeyGuard) -> Result<(), MountError> {
        if !self.is_served(&bound.shared).await? {
            self.revive(&bound.shared, lock).await?;
        }
        let checked = bound.clone();
        let place = self.place(&bound.shared, bound.record.sub_path.as_deref())?;
        let shown = blocking(move || checked.shared.origin().shows(&checked.record.target, place.path.as_deref()));
        if shown.await? { Ok(()) } else { self.rebind(&bound.shared, &bound.record, lock).await }
    }

    /// Binds a journaled target again, in the place of what is left there of our own. Its record stays, whatever comes of it.
    pub(super) async fn rebind(
        &self,
        shared: &Arc<Shared>,
        record: &Record,
        lock: &KeyGuard,
    ) -> Result<(), MountError> {
        let place = self.place(shared, record.sub_path.as_deref())?;
        self.bind(shared, &record.target, place, lock).await
    }

    fn place(&self, shared: &Shared, sub_path: Option<&Path>) -> Result<Place, MountError> {
        let Some(sub_path) = sub_path else { return Ok(Place { path: None, is_dir: true }) };
        let refused = |detail| MountError::SubPath { sub_path: sub_path.display().to_string(), detail };
        shared.image.resolve(sub_path).map_err(refused)
    }

    /// Journals and binds a target, and enters it into the state; a failure leaves neither mount, nor directory, nor record.
    async fn bind_new(&self, shared: &Arc<Shared>, record: Record, lock: &KeyGuard) -> Result<(), MountError> {
        let record = record.opened(shared.image.digest(), shared.key.0);
        let place = self.place(shared, record.sub_path.as_deref())?;
        let (target, is_dir, instance) = (record.target.clone(), place.is_dir, self.instance.clone());
        let created = blocking(move || match target::thin(&target, &instance)? {
            Some(_) => Ok(false),
            None => target::prepare(&target, is_dir),
        });
        let created = created.await?;

        let (journal, written) = (self.journal.clone(), record.clone());
        let mut result = blocking(move || journal.write(&written)).await;
        if result.is_ok() {
            result = self.bind(shared, &record.target, place, lock).await;
        }
        if result.is_ok() {
            self.enter(shared, record);
            return result;
        }
        let journal = self.journal.clone();
        let undone = blocking(move || {
            if created {
                target::remove(&record.target)?;
            }
            journal.remove(&record.target)
        });
        if let Err(error) = undone.await {
            tracing::warn!(%error, "a failed publish could not be undone");
        }
        result
    }

    /// Enters a bound target into the state.
    pub(super) fn enter(&self, shared: &Arc<Shared>, record: Record) {
        let target = record.target.clone();
        let bound = Bound { shared: shared.clone(), record, _counted: Counted::new(&metrics().bound_targets) };
        let mut state = self.state();
        state.failed.remove(&target);
        state.targets.insert(target, Arc::new(bound));
    }

    /// Binds, in the place of an own mount that was left there, and verifies; what can't be verified is taken away again.
    async fn bind(&self, shared: &Arc<Shared>, target: &Path, place: Place, _: &KeyGuard) -> Result<(), MountError> {
        let what = || format!("binding {} to {}", shared.mountpoint.display(), target.display());
        // The lookups in here are answered by our own threads. Should they hang, the copy that comes too late is dropped
        // with its result: nothing of it was ever attached.
        let (mountpoint, inside) = (shared.mountpoint.clone(), place.path.clone());
        let copy = tokio::task::spawn_blocking(move || sys::clone_tree(&mountpoint, inside.as_deref()));
        let tree = match tokio::time::timeout(BIND_DEADLINE, copy).await {
            Ok(Ok(Ok(tree))) => tree,
            Ok(Ok(Err(e))) => return Err(io_error(what(), e)),
            Ok(Err(e)) => return Err(io_error(what(), e)),
            Err(_) => return Err(io_error(what(), "the mount did not answer within 10 s; look at the plugin's log")),
        };
        let (target, shared, instance, swap) =
            (target.to_owned(), shared.clone(), self.instance.clone(), self.server.swap());
        blocking(move || {
            target::replace(&tree, &target, place.is_dir, &instance, swap)?;
            let verified = shared.origin().verify(&target, place.path.as_deref());
            if verified.is_err() {
                target::clear(&target).unwrap_or_else(|e| tracing::warn!(error = %e, "a failed bind is left over"));
            }
            verified
        })
        .await
    }

    pub(super) async fn unpublish(&self, target: &Path) -> Result<(), MountError> {
        let path = target.to_owned();
        let path = blocking(move || target::canonical_or_gone(&path)).await?;
        self.not_our_own(&path)?;
        let fetching = self.state().fetching.get(&path).cloned();
        if let Some(fetching) = fetching {
            fetching.cancel();
        }
        let _target_lock = self.lock_target(&path).await;
        let bound = self.bound(&path);
        let mount_lock = match &bound {
            Some(bound) => Some(self.lock_mount(&bound.shared.name).await),
            None => None,
        };
        let (journal, cleared) = (self.journal.clone(), path.clone());
        blocking(move || {
            target::clear(&cleared)?;
            target::remove(&cleared)?;
            journal.remove(&cleared)
        })
        .await?;
        {
            let mut state = self.state();
            state.targets.remove(&path);
            state.failed.remove(&path);
        }
        match (bound, mount_lock) {
            (Some(bound), Some(lock)) => self.end_if_unused(&bound.shared, &lock).await,
            _ => Ok(()),
        }
    }

    pub(super) async fn stats(&self, target: &Path) -> Result<VolumeStats, MountError> {
        let path = target.to_owned();
        let path = blocking(move || target::canonical_or_gone(&path)).await?;
        let (bound, failed) = {
            let state = self.state();
            (state.targets.get(&path).cloned(), state.failed.get(&path).cloned())
        };
        let Some(bound) = bound else {
            // Published once, and not to be had after a restart: the volume exists, and is ill.
            return match failed {
                Some(why) => Ok(VolumeStats { bytes: 0, inodes: 0, abnormal: Some(why) }),
                None => Err(MountError::NotPublished { path }),
            };
        };
        let (bytes, inodes) = bound.shared.image.size();
        let shown = blocking(move || bound.shared.origin().is_at(&bound.record.target).map(|shown| (shown, bound)));
        let (shown, bound) = shown.await?;
        let abnormal = if !bound.shared.image.is_alive() {
            Some("the filesystem is no longer being served: reads fail; restart the pod".to_owned())
        } else if !shown {
            Some(format!("nothing of this driver is mounted at {}; restart the pod", path.display()))
        } else if let Some((ago, why)) = bound.shared.image.last_failure().filter(|(ago, _)| *ago < FAILURE_SHOWN) {
            Some(format!("a read failed {} s ago: {why}", ago.as_secs()))
        } else if bound.shared.lost_credentials() {
            Some(LOST_CREDENTIALS.to_owned())
        } else {
            None
        };
        Ok(VolumeStats { bytes, inodes, abnormal })
    }

    /// Refuses new work, waits (bounded) for what is in flight, and ends serving. Nothing is unmounted.
    pub(super) async fn shutdown(&self) {
        let fetching: Vec<_> = {
            let mut state = self.state();
            state.closed = true;
            state.fetching.values().cloned().collect()
        };
        fetching.iter().for_each(CancellationToken::cancel);
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_DEADLINE, self.tasks.wait()).await.is_err() {
            tracing::warn!("mounts are still being made or ended after 10 s; the next start clears them up");
        }
        let mounts: Vec<_> = {
            let mut state = self.state();
            state.targets.clear();
            state.mounts.drain().map(|(_, shared)| shared).collect()
        };
        let ended = blocking(move || {
            mounts.iter().for_each(|shared| shared.image.abandon());
            Ok(())
        });
        if let Err(error) = ended.await {
            tracing::warn!(%error, "serving did not end in good order");
        }
    }
}

fn published(shared: &Shared, already: bool, joined: bool) -> Published {
    Published { version: shared.image.version(), detected_from: shared.image.detected_from(), already, shared: joined }
}
