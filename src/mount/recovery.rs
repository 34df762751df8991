//! What a plugin does at its start with the mounts and records of the one before it.
//!
//! The lock on the state directory says that the earlier process has ended, so none of this installation's mounts has a
//! server that will stay. Each target with a record is bound again to a mount that is served again; a dead mount without
//! one is detached. Containers that were running keep their own copy of the dead mount (ENOTCONN) until they restart.
//!
//! What can't be brought back keeps its record and its dead mount: reads that fail are the truth, an empty directory
//! would not be. The next publish of that target, which brings credentials, does it anew; its unpublish clears it up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

use super::journal::Record;
use super::manager::{Inner, blocking};
use super::sys::Liveness;
use super::{MountError, Recovery, io_error, key, target};
use crate::fs::mountinfo::{Mount, MountTable};

/// Targets that are brought back at a time.
const PARALLEL: usize = 8;

/// How long a mount may take to say that it is alive.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);

/// What became of one record.
enum Outcome {
    Rebound,
    /// The target is no longer wanted: the record is gone too.
    Dropped,
    /// It was bound already.
    Untouched,
}

pub(super) async fn recover(inner: &Arc<Inner>) -> Recovery {
    let mut recovery = Recovery::default();
    let journal = inner.journal.clone();
    let loaded = match blocking(move || journal.load()).await {
        Ok(loaded) => loaded,
        Err(error) => {
            // Without the records nobody knows which mounts are still wanted, so none is taken away.
            recovery.failed.push((inner.mounts_dir.clone(), error.to_string()));
            return recovery;
        }
    };
    let mut recorded: Vec<PathBuf> = loaded.records.iter().map(|record| record.target.clone()).collect();
    recorded.extend(loaded.unusable.iter().map(|(path, _)| path.clone()));
    recovery.failed = loaded.unusable;

    let mut outcomes = futures::stream::iter(loaded.records)
        .map(|record| {
            let inner = inner.clone();
            async move {
                let target = record.target.clone();
                let worker = inner.clone();
                let outcome = inner.run(async move { restore(&worker, record).await }).await;
                (target, outcome)
            }
        })
        .buffer_unordered(PARALLEL);
    while let Some((target, outcome)) = outcomes.next().await {
        match outcome {
            Ok(Outcome::Rebound) => recovery.rebound.push(target),
            Ok(Outcome::Dropped | Outcome::Untouched) => {}
            Err(error) => {
                tracing::warn!(target_path = %target.display(), %error, "a published target can't be brought back");
                inner.note_failed(&target, &format!("not recovered after the plugin's restart: {error}"));
                recovery.failed.push((target, error.to_string()));
            }
        }
    }
    drop(outcomes);

    if let Err(error) = sweep(inner, &recorded, &mut recovery).await {
        recovery.failed.push((inner.mounts_dir.clone(), error.to_string()));
    }
    recovery.rebound.sort();
    recovery.detached.sort();
    recovery
}

async fn restore(inner: &Arc<Inner>, record: Record) -> Result<Outcome, MountError> {
    let _target_lock = inner.lock_target(&record.target).await;
    if inner.bound(&record.target).is_some() {
        return Ok(Outcome::Untouched);
    }
    let (journal, path) = (inner.journal.clone(), record.target.clone());
    let wanted = blocking(move || {
        let wanted = is_wanted(&path)?;
        if !wanted {
            journal.remove(&path)?;
        }
        Ok(wanted)
    });
    if !wanted.await? {
        return Ok(Outcome::Dropped);
    }
    let mut spec = record.spec();
    if record.pinned {
        inner.server.pin(&mut spec)?;
    }
    let fetching = inner.fetching(&record.target);
    let (shared, mount_lock, _) = match inner.acquire(&spec, fetching.token(), Some(record.digest)).await {
        Ok(acquired) => acquired,
        // Unpublished meanwhile: that waits for our lock, and takes the record away.
        Err(_) if fetching.token().is_cancelled() => return Ok(Outcome::Dropped),
        Err(error) => return Err(error),
    };
    drop(fetching);
    match inner.rebind(&shared, &record, &mount_lock).await {
        Ok(()) => {
            inner.enter(&shared, record);
            inner.question_access(&shared, &spec);
            Ok(Outcome::Rebound)
        }
        Err(error) => {
            inner.end_if_unused(&shared, &mount_lock).await?;
            Err(error)
        }
    }
}

/// Is there still something to bind to? mountinfo is asked first: a dead mount on the target would fail a stat.
fn is_wanted(target: &Path) -> Result<bool, MountError> {
    let table = MountTable::read().map_err(|e| io_error("reading /proc/self/mountinfo", e))?;
    if table.top(target).is_some() {
        return Ok(true);
    }
    match std::fs::symlink_metadata(target) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(io_error(format!("looking at the target path {}", target.display()), e)),
    }
}

/// Detaches dead mounts of this installation that no record and no state names, and removes the mount points left over.
async fn sweep(inner: &Arc<Inner>, recorded: &[PathBuf], recovery: &mut Recovery) -> Result<(), MountError> {
    let worker = inner.clone();
    let points = blocking(move || own_points(&worker)).await?;
    for point in points {
        // Whoever makes a mount there holds its lock until it is in the state.
        let name = name_below(&inner.mounts_dir, &point);
        let _lock = match &name {
            Some(name) => inner.lock_mount(name).await,
            None => inner.lock_target(&point).await,
        };
        let used = match &name {
            Some(name) => inner.has_mount(name),
            None => inner.bound(&point).is_some() || recorded.contains(&point),
        };
        if used {
            continue;
        }
        let (worker, path) = (inner.clone(), point.clone());
        let swept = blocking(move || {
            if worker.server.probe(&path, PROBE_DEADLINE) == Liveness::Alive {
                return Err(io_error("a mount without a record", "it is still alive: its server has not ended"));
            }
            target::clear_own(&path, &worker.instance)
        });
        match swept.await {
            Ok(()) => recovery.detached.push(point),
            Err(error) => recovery.failed.push((point, error.to_string())),
        }
    }
    remove_leftovers(inner).await
}

/// Where mounts of this installation are.
fn own_points(inner: &Inner) -> Result<Vec<PathBuf>, MountError> {
    let table = MountTable::read().map_err(|e| io_error("reading /proc/self/mountinfo", e))?;
    let own = |mount: &&Mount| key::ours(mount).is_some_and(|(instance, _)| instance == inner.instance);
    let mut points: Vec<PathBuf> = table.iter().filter(own).map(|mount| mount.point.clone()).collect();
    points.sort();
    points.dedup();
    Ok(points)
}

fn name_below(mounts_dir: &Path, point: &Path) -> Option<String> {
    Some(point.strip_prefix(mounts_dir).ok()?.to_string_lossy().into_owned())
}

/// Removes directories below `mounts_dir` that no mount is at. One that holds anything refuses to go.
async fn remove_leftovers(inner: &Arc<Inner>) -> Result<(), MountError> {
    let dir = inner.mounts_dir.clone();
    let names = blocking(move || {
        let entries = std::fs::read_dir(&dir).map_err(|e| io_error(format!("reading {}", dir.display()), e))?;
        Ok(entries.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>())
    });
    for name in names.await? {
        let name = name.to_string_lossy().into_owned();
        let _lock = inner.lock_mount(&name).await;
        if !inner.has_mount(&name) {
            let path = inner.mounts_dir.join(&name);
            // rmdir asks nothing of what may be mounted there: it is refused (EBUSY), as it is for a file (ENOTDIR).
            let _ = blocking(move || Ok(std::fs::remove_dir(path))).await?;
        }
    }
    Ok(())
}
