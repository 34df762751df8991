//! How archives come and go while several controllers put and collect, without a lock and without a leader.
//!
//! Whoever puts an archive writes first that it is used, and looks then whether somebody is about to delete it. Whoever
//! deletes one writes first that it is doomed, and looks then whether it was used. Each writes before it reads, so of two
//! that meet at least one sees the other: the deleter gives up, or the putter waits until the mark is gone and then makes
//! sure that the archive is there. A deleter that takes longer than [`ACT_WITHIN`] gives up; a mark that is older than
//! [`STALE`] was left by one that died.

use std::fmt::Debug;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;

use crate::build::BuildError;
use crate::source::SourceError;

/// Time from the mark to the deletion, at most.
pub(super) const ACT_WITHIN: Duration = Duration::from_secs(60);
/// The age from which a mark is believed to be a dead deleter's.
pub(super) const STALE: Duration = Duration::from_secs(15 * 60);
/// How long a put waits for a deletion to end. It takes three requests.
const WAIT: Duration = Duration::from_secs(30);
/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 200 });
/// How often an archive may be deleted under a put's hands.
const ROUNDS: usize = 3;

/// One archive, as a listing tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    /// Below the store: `archives/…`.
    pub(super) name: String,
    /// When it was last put, where the listing tells.
    pub(super) used: Option<SystemTime>,
}

/// One archive, looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// When it was last put.
    pub(super) used: SystemTime,
    /// What tells this state of it from a later one, where the place has such a thing.
    pub(super) state: String,
}

/// A place for archives that are named by what they are.
#[async_trait]
pub(super) trait Shelf: Send + Sync + Debug {
    /// All archives with names of ours.
    async fn list(&self) -> Result<Vec<Stored>, BuildError>;
    /// One of them; `None`: not there.
    async fn look(&self, name: &str) -> Result<Option<Seen>, BuildError>;
    /// Writes that it is used now, and the archive if it is absent; not there and no file: an error.
    async fn put(&self, name: &str, file: Option<&Path>) -> Result<(), BuildError>;
    /// Marks it as doomed; false: somebody else has.
    async fn mark(&self, name: &str) -> Result<bool, BuildError>;
    /// Since when it is doomed.
    async fn marked(&self, name: &str) -> Result<Option<SystemTime>, BuildError>;
    /// Takes the mark away.
    async fn unmark(&self, name: &str) -> Result<(), BuildError>;
    /// Deletes it, as it was seen.
    async fn remove(&self, name: &str, seen: &Seen) -> Result<(), BuildError>;
}

/// See [`super::ArchiveStore::put`].
pub(super) async fn put(shelf: &dyn Shelf, name: &str, file: Option<&Path>) -> Result<(), BuildError> {
    for _ in 0..ROUNDS {
        shelf.put(name, file).await?;
        wait(shelf, name).await?;
        if shelf.look(name).await?.is_some() {
            return Ok(());
        }
    }
    let detail = "it is deleted as often as it is put there; is another program cleaning up the archive store?".into();
    Err(SourceError::Unavailable { what: format!("archive {name}"), tries: ROUNDS as u32, detail }.into())
}

/// Waits until nobody is about to delete it.
async fn wait(shelf: &dyn Shelf, name: &str) -> Result<(), BuildError> {
    let give_up = Instant::now() + WAIT;
    while let Some(since) = shelf.marked(name).await? {
        if is_stale(since, SystemTime::now()) {
            tracing::info!(name, "removing the mark of a clean-up that did not end");
            return shelf.unmark(name).await;
        }
        if Instant::now() > give_up {
            let detail = "it is being removed from the archive store; retry in some minutes".into();
            return Err(SourceError::Unavailable { what: format!("archive {name}"), tries: 1, detail }.into());
        }
        // Nobody tells when a mark goes.
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

pub(super) fn is_stale(since: SystemTime, now: SystemTime) -> bool {
    now.duration_since(since).is_ok_and(|age| age > STALE)
}
