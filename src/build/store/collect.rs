//! The clean-up: which archives nobody needs any more, and deleting them beside others that put and delete.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant, SystemTime};

use super::manifest_of;
use super::records::{Records, VolumeRecord};
use super::shelf::{ACT_WITHIN, Shelf, Stored, is_stale};
use crate::build::BuildError;
use crate::metrics::metrics;

/// What a clean-up did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Collected {
    /// Archives in the store before.
    pub archives: usize,
    /// Names of those that were removed.
    pub removed: Vec<String>,
    /// Names of those that could not be, and why.
    pub failed: Vec<(String, String)>,
}

/// The archives that no record names and that were not put for `grace`: what may go. One whose age the listing does not
/// tell is among them, to be looked at. Names that are not ours are never.
pub(super) fn unneeded<'a>(
    records: &[VolumeRecord],
    stored: &'a [Stored],
    now: SystemTime,
    grace: Duration,
) -> Vec<&'a Stored> {
    // By digest: with many volumes and archives, comparing each with each would take minutes.
    let mut by_digest = HashMap::<&str, BTreeSet<&str>>::new();
    for archive in records.iter().filter_map(|record| record.archive.as_deref()) {
        let words = archive.split(|c: char| !c.is_ascii_hexdigit()).filter(|word| word.len() == 64);
        for digest in words {
            by_digest.entry(digest).or_default().insert(archive);
        }
    }
    let named = |file: &str| {
        // A record may name the archive by its whole location as well, or as a tag, without the ending.
        let stem = file.strip_suffix(".clip").unwrap_or(file);
        let digest = stem.split('-').next().unwrap_or_default();
        by_digest.get(digest).is_some_and(|archives| archives.iter().any(|archive| archive.contains(stem)))
    };
    let free = |archive: &&Stored| {
        let file = archive.name.strip_prefix("archives/").unwrap_or_default();
        manifest_of(file).is_some() && archive.used.is_none_or(|used| is_older(used, now, grace)) && !named(file)
    };
    stored.iter().filter(free).collect()
}

/// A time in the future, by another clock, is young.
fn is_older(used: SystemTime, now: SystemTime, grace: Duration) -> bool {
    now.duration_since(used).is_ok_and(|age| age > grace)
}

/// See [`super::ArchiveStore::collect`].
pub(super) async fn collect(
    shelf: &dyn Shelf,
    records: &dyn Records,
    now: SystemTime,
    grace: Duration,
) -> Result<Collected, BuildError> {
    let stored = shelf.list().await?;
    let records = records.list().await?;
    let mut collected = Collected { archives: stored.len(), ..Collected::default() };
    for archive in unneeded(&records, &stored, now, grace) {
        let name = &archive.name;
        match remove(shelf, archive, now, grace).await {
            Ok(true) => {
                tracing::info!(archive = name, "removed an archive that no volume names");
                metrics().archives_collected.inc();
                collected.removed.push(name.clone());
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(archive = name, %error, "an archive that no volume names can't be removed");
                collected.failed.push((name.clone(), error.to_string()));
            }
        }
    }
    Ok(collected)
}

/// Removes one archive, unless it was used or somebody else is at it. A volume that is being made of it has put it since
/// the records were listed, which shows; so they need not be listed again.
async fn remove(shelf: &dyn Shelf, archive: &Stored, now: SystemTime, grace: Duration) -> Result<bool, BuildError> {
    let name = &archive.name;
    if archive.used.is_none() {
        // Looked at before a mark is written, which most would not need.
        match shelf.look(name).await? {
            Some(seen) if is_older(seen.used, now, grace) => {}
            _ => return Ok(false),
        }
    }
    let began = Instant::now();
    if !shelf.mark(name).await? {
        // Left for the next clean-up: by then its own mark is a new one, whoever else sees this one now.
        if shelf.marked(name).await?.is_some_and(|since| is_stale(since, SystemTime::now())) {
            shelf.unmark(name).await?;
        }
        return Ok(false);
    }
    let removed = async {
        match shelf.look(name).await? {
            Some(seen) if is_older(seen.used, now, grace) && began.elapsed() < ACT_WITHIN => {
                shelf.remove(name, &seen).await.map(|()| true)
            }
            _ => Ok(false),
        }
    };
    let removed = removed.await;
    let unmarked = shelf.unmark(name).await;
    let removed = removed?;
    unmarked.map(|()| removed)
}

#[cfg(test)]
mod tests;
