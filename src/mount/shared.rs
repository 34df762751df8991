//! Shared mounts: opened and mounted for the first target, ended with the last, served again when they die.
//!
//! All of it under the lock of the mount that it is about: see `manager.rs`.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::build::provider::Pin;
use crate::fs::OpenError;
use crate::source::SourceError;
use crate::units::Digest;

use super::locks::KeyGuard;
use super::manager::{ArchiveId, Bound, Inner, blocking};
use super::serve::Served;
use super::target::{self, Origin};
use super::{MountError, MountKey, MountSpec, io_error, key};

/// A mount that dies is served again without being asked so often in a row; then only by the next publish.
const MAX_REVIVALS: u32 = 3;

/// A mount that lived so long did not die of being served again.
const HEALTHY: Duration = Duration::from_secs(60);

/// So many archives are remembered; then the memory starts anew. An entry is about 300 bytes.
const MAX_KNOWN: usize = 4096;

/// The scope of what anybody may read.
const PUBLIC: &str = "public";

/// One shared mount.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) key: MountKey,
    pub(super) name: String,
    fs_name: String,
    pub(super) mountpoint: PathBuf,
    pub(super) image: Arc<dyn Served>,
    _pin: Option<Arc<Pin>>,
    /// Deaths in a row that were answered by serving it again.
    revivals: AtomicU32,
    access: AtomicU8,
}

/// Nothing says that the mount's credentials don't do.
const UNQUESTIONED: u8 = 0;
/// It came back after a restart, and without the volume's credentials its data is refused.
const LOST: u8 = 1;
/// A publish of this process brought credentials, and they were admitted.
const BROUGHT: u8 = 2;

impl Shared {
    /// The credentials went with the process that had them, and the data can't be fetched without.
    pub(super) fn lost_credentials(&self) -> bool {
        self.access.load(Ordering::Relaxed) == LOST
    }

    /// Takes credentials of the mount's own scope that were admitted just now: they are newer than what it has.
    fn renew(&self, spec: &MountSpec) {
        let lent = spec.lent();
        if lent.identity.is_some() {
            self.image.renew(&lent);
            self.access.store(BROUGHT, Ordering::Relaxed);
        }
    }

    pub(super) fn origin(&self) -> Origin<'_> {
        Origin { mountpoint: &self.mountpoint, fs_name: &self.fs_name }
    }
}

impl Inner {
    /// The shared mount of a spec, mounted now if it is not yet, with its lock; true: others have it already.
    /// `expected`: the only archive that will do.
    pub(super) async fn acquire(
        &self,
        spec: &MountSpec,
        cancel: &CancellationToken,
        expected: Option<Digest>,
    ) -> Result<(Arc<Shared>, KeyGuard, bool), MountError> {
        let identity = cancellable(cancel, self.server.identity(spec)).await?;
        let id: ArchiveId = (spec.archive.clone(), identity, spec.root, spec.scope.clone());
        let _archive_lock = cancellable(cancel, async { Ok(self.archive_locks.lock(id.clone()).await) }).await?;
        let mut image = None;
        loop {
            let known = self.state().known.get(&id).copied();
            let (digest, bundle) = match known {
                Some(known) => known,
                None => {
                    let opened = cancellable(cancel, self.server.open(spec)).await?;
                    let known = (opened.digest(), opened.bundle());
                    image = Some(opened);
                    self.learn(&id, known);
                    known
                }
            };
            if let Some(expected) = expected.filter(|expected| *expected != digest) {
                let what = format!("the archive {:?}", spec.archive);
                return Err(io_error(what, format!("it has changed: published was {expected}, now there is {digest}")));
            }
            let key = MountKey::of(&digest, &spec.scope, bundle, spec.integrity, None);
            let name = key.name();
            let mount_lock = self.lock_mount(&name).await;
            let existing = self.state().mounts.get(&name).cloned();
            if let Some(shared) = existing {
                self.admit(&*shared.image, spec, cancel, expected).await?;
                shared.renew(spec);
                if !self.is_served(&shared).await? {
                    self.revive(&shared, &mount_lock).await?;
                }
                return Ok((shared, mount_lock, true));
            }
            let opened = match image.take() {
                Some(opened) => opened,
                None => cancellable(cancel, self.server.open(spec)).await?,
            };
            let found = (opened.digest(), opened.bundle());
            if found != (digest, bundle) {
                // The place said that nothing had changed, but it has: believe the bytes.
                self.learn(&id, found);
                image = Some(opened);
                continue;
            }
            self.admit(&*opened, spec, cancel, expected).await?;
            let shared = self.mount(key, opened, spec.pin.clone()).await?;
            return Ok((shared, mount_lock, false));
        }
    }

    /// Checks the volume's credentials; not for what an earlier process had admitted before it ended (`expected`).
    async fn admit(
        &self,
        image: &dyn Served,
        spec: &MountSpec,
        cancel: &CancellationToken,
        expected: Option<Digest>,
    ) -> Result<(), MountError> {
        match expected {
            Some(_) => Ok(()),
            None => cancellable(cancel, self.server.admit(image, spec)).await,
        }
    }

    /// A published target is published again: where its mount lost the credentials, those of this call take their place, if
    /// they are the same volume's and do.
    pub(super) async fn give_back_credentials(&self, shared: &Shared, scope: &str, spec: &MountSpec) {
        if shared.lost_credentials() && scope == spec.scope && self.server.admit(&*shared.image, spec).await.is_ok() {
            shared.renew(spec);
        }
    }

    /// Finds out, beside the recovery, whether a private mount that came back can still fetch its data (the node may have
    /// credentials of its own). An answer that says neither yes nor no is left to the reads.
    pub(super) fn question_access(&self, shared: &Arc<Shared>, spec: &MountSpec) {
        if spec.scope == PUBLIC {
            return;
        }
        // Without the pin: that only says that the archive's own bytes are here.
        let (server, shared, spec) = (self.server.clone(), shared.clone(), MountSpec { pin: None, ..spec.clone() });
        tokio::spawn(async move {
            if let Err(MountError::Open(OpenError::Source(SourceError::Denied { .. } | SourceError::Refused { .. }))) =
                server.admit(&*shared.image, &spec).await
            {
                let _ = shared.access.compare_exchange(UNQUESTIONED, LOST, Ordering::Relaxed, Ordering::Relaxed);
            }
        });
    }

    fn learn(&self, id: &ArchiveId, known: (Digest, bool)) {
        let mut state = self.state();
        if state.known.len() >= MAX_KNOWN {
            state.known.clear();
        }
        state.known.insert(id.clone(), known);
    }

    /// Mounts an opened archive and enters it into the state. The mount's lock is held by the caller.
    async fn mount(
        &self,
        key: MountKey,
        image: Arc<dyn Served>,
        pin: Option<Arc<Pin>>,
    ) -> Result<Arc<Shared>, MountError> {
        let name = key.name();
        let shared = Arc::new(Shared {
            key,
            fs_name: key::fs_name(&self.instance, &name),
            mountpoint: self.mounts_dir.join(&name),
            name,
            image,
            _pin: pin,
            revivals: AtomicU32::new(0),
            access: AtomicU8::new(UNQUESTIONED),
        });
        self.serve(&shared).await?;
        self.state().mounts.insert(shared.name.clone(), shared.clone());
        Ok(shared)
    }

    /// Mounts at the mountpoint, after whatever an earlier process left there is gone; a failure leaves nothing behind.
    async fn serve(&self, shared: &Arc<Shared>) -> Result<(), MountError> {
        let (served, runtime, instance) = (shared.clone(), tokio::runtime::Handle::current(), self.instance.clone());
        blocking(move || {
            let shared = served;
            let at = shared.mountpoint.as_path();
            let what = || format!("mounting {}", at.display());
            target::clear_own(at, &instance)?;
            match std::fs::DirBuilder::new().mode(0o700).create(at) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io_error(what(), e)),
                _ => {}
            }
            let mounted = (shared.image.mount(at, &shared.fs_name, runtime))
                .map_err(|e| io_error(what(), e))
                .and_then(|()| shared.origin().verify(at, None));
            if mounted.is_err() {
                stop(&shared, &instance).unwrap_or_else(|e| tracing::warn!(error = %e, "a failed mount is left over"));
            }
            mounted
        })
        .await?;
        self.watch(shared);
        Ok(())
    }

    /// Serves the mount again should its session end by itself: containers that restart find their volume well.
    fn watch(&self, shared: &Arc<Shared>) {
        let (inner, weak, born) = (self.me.clone(), Arc::downgrade(shared), Instant::now());
        let ended = shared.image.ended();
        tokio::spawn(async move {
            ended.await;
            let (Some(inner), Some(shared)) = (inner.upgrade(), weak.upgrade()) else { return };
            let (worker, lived) = (inner.clone(), born.elapsed());
            let revived = inner.run(async move { worker.died(&shared, lived).await });
            if let Err(error) = revived.await {
                tracing::warn!(%error, "a mount that died can't be served again");
            }
        });
    }

    async fn died(&self, shared: &Arc<Shared>, lived: Duration) -> Result<(), MountError> {
        let lock = self.lock_mount(&shared.name).await;
        let current = self.state().mounts.get(&shared.name).is_some_and(|mount| Arc::ptr_eq(mount, shared));
        if !current || self.is_served(shared).await? {
            // It was ended on purpose, or a publish was quicker.
            return Ok(());
        }
        if lived >= HEALTHY {
            shared.revivals.store(0, Ordering::Relaxed);
        }
        if shared.revivals.fetch_add(1, Ordering::Relaxed) >= MAX_REVIVALS {
            return Err(io_error(
                format!("serving {}", shared.mountpoint.display()),
                format!("it died again after {MAX_REVIVALS} revivals; the next publish tries once more"),
            ));
        }
        self.revive(shared, &lock).await
    }

    /// Is the shared mount there, and answering?
    pub(super) async fn is_served(&self, shared: &Arc<Shared>) -> Result<bool, MountError> {
        let shared = shared.clone();
        blocking(move || Ok(shared.image.is_alive() && shared.origin().shows(&shared.mountpoint, None)?)).await
    }

    pub(super) fn targets_of(&self, shared: &Shared) -> Vec<Arc<Bound>> {
        self.state().targets.values().filter(|bound| bound.shared.name == shared.name).cloned().collect()
    }

    /// Serves a mount again that has died, and binds all its targets again.
    pub(super) async fn revive(&self, shared: &Arc<Shared>, lock: &KeyGuard) -> Result<(), MountError> {
        tracing::warn!(mount = %shared.mountpoint.display(), "a mount has died and is served again");
        let (dead, instance) = (shared.clone(), self.instance.clone());
        blocking(move || stop(&dead, &instance)).await?;
        self.serve(shared).await?;
        for bound in self.targets_of(shared) {
            if let Err(error) = self.rebind(&bound.shared, &bound.record, lock).await {
                tracing::warn!(target_path = %bound.record.target.display(), %error, "a target can't be bound again");
            }
        }
        Ok(())
    }

    /// Ends a shared mount that no target is bound to.
    pub(super) async fn end_if_unused(&self, shared: &Arc<Shared>, _: &KeyGuard) -> Result<(), MountError> {
        if !self.targets_of(shared).is_empty() {
            return Ok(());
        }
        let (ended, instance) = (shared.clone(), self.instance.clone());
        blocking(move || stop(&ended, &instance)).await?;
        self.state().mounts.remove(&shared.name);
        Ok(())
    }
}

/// Ends serving and makes sure that nothing is left at the mountpoint, nor the directory itself. Blocks.
fn stop(shared: &Shared, instance: &str) -> Result<(), MountError> {
    if let Err(error) = shared.image.unmount() {
        tracing::warn!(mount = %shared.mountpoint.display(), %error, "unmounting failed, the mount is detached");
    }
    target::clear_own(&shared.mountpoint, instance)?;
    target::remove(&shared.mountpoint)
}

/// Waits for `fetch`, or until an unpublish of the same target (or the end of the plugin) makes it pointless.
async fn cancellable<T>(
    cancel: &CancellationToken,
    fetch: impl Future<Output = Result<T, MountError>>,
) -> Result<T, MountError> {
    cancel.run_until_cancelled(fetch).await.unwrap_or_else(|| {
        Err(io_error("opening the archive", "given up: the target was unpublished, or the plugin stops"))
    })
}
