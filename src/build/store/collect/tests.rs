use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use proptest::prelude::*;

use super::super::shelf::{self, Seen};
use super::*;
use crate::units::Digest;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn name(digit: char) -> String {
    format!("archives/{}-linux-amd64-v2.clip", String::from(digit).repeat(64))
}

fn at(hours: u64) -> SystemTime {
    UNIX_EPOCH + HOUR * hours as u32
}

fn record(archive: &str) -> VolumeRecord {
    VolumeRecord {
        id: format!("v1-{}", "0".repeat(32)),
        name: "pvc".into(),
        parameters: Digest::of(b""),
        image: None,
        manifest_digest: None,
        archive: Some(archive.into()),
        created: 0,
        image_bytes: None,
        attributes: None,
    }
}

#[test]
fn only_what_no_record_names_goes_and_only_after_the_grace() {
    let stored = |name: String, hours| Stored { name, used: Some(at(hours)) };
    let all = [
        stored(name('a'), 0),
        stored(name('b'), 0),
        stored(name('c'), 0),
        stored(name('d'), 77),
        stored(name('e'), 500),
        stored("archives/python.clip".into(), 0),
        stored(name('f').replace("archives/", "elsewhere/"), 0),
        Stored { name: name('9'), used: None },
    ];
    let records = [
        record(&name('a')),
        // As a StorageClass may name it, and as a tag.
        record(&format!("s3://bucket/prefix/{}?region=eu", name('b'))),
        record(&format!("oci://h/r:{}", super::super::tag_of(&name('c')))),
        VolumeRecord { archive: None, ..record("") },
    ];
    let names = |found: Vec<&Stored>| found.into_iter().map(|s| s.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(unneeded(&records[..1], &all, at(100), DAY)), [name('b'), name('c'), name('9')]);
    assert_eq!(names(unneeded(&records, &all, at(100), DAY)), [name('9')]);
    assert_eq!(names(unneeded(&records, &all, at(102), DAY)), [name('d'), name('9')]);
}

/// A store and records in memory, of which each step is seen by a schedule.
#[derive(Debug, Clone, Default)]
struct World {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    archives: BTreeMap<String, SystemTime>,
    marks: BTreeMap<String, SystemTime>,
    records: Vec<VolumeRecord>,
}

/// One who works in that world: every access lets the others go first if the schedule says so.
#[derive(Debug, Clone)]
struct Actor {
    world: World,
    turns: Arc<Mutex<std::vec::IntoIter<bool>>>,
}

impl Actor {
    async fn turn(&self) -> std::sync::MutexGuard<'_, State> {
        while self.turns.lock().unwrap().next().unwrap_or(false) {
            tokio::task::yield_now().await;
        }
        self.world.state.lock().unwrap()
    }
}

#[async_trait]
impl Shelf for Actor {
    async fn list(&self) -> Result<Vec<Stored>, BuildError> {
        let state = self.turn().await;
        Ok(state.archives.iter().map(|(name, used)| Stored { name: name.clone(), used: Some(*used) }).collect())
    }
    async fn look(&self, name: &str) -> Result<Option<Seen>, BuildError> {
        let state = self.turn().await;
        Ok(state.archives.get(name).map(|used| Seen { used: *used, state: String::new() }))
    }
    async fn put(&self, name: &str, _: Option<&Path>) -> Result<(), BuildError> {
        // The use, then the archive, as the objects do: an absent archive has no use to find.
        if let Some(used) = self.turn().await.archives.get_mut(name) {
            *used = SystemTime::now();
        }
        self.turn().await.archives.entry(name.to_owned()).or_insert_with(SystemTime::now);
        Ok(())
    }
    async fn mark(&self, name: &str) -> Result<bool, BuildError> {
        let mut state = self.turn().await;
        let free = !state.marks.contains_key(name);
        if free {
            state.marks.insert(name.to_owned(), SystemTime::now());
        }
        Ok(free)
    }
    async fn marked(&self, name: &str) -> Result<Option<SystemTime>, BuildError> {
        Ok(self.turn().await.marks.get(name).copied())
    }
    async fn unmark(&self, name: &str) -> Result<(), BuildError> {
        self.turn().await.marks.remove(name);
        Ok(())
    }
    async fn remove(&self, name: &str, _: &Seen) -> Result<(), BuildError> {
        self.turn().await.archives.remove(name);
        Ok(())
    }
}

#[async_trait]
impl Records for Actor {
    async fn create(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        self.turn().await.records.push(record.clone());
        Ok(None)
    }
    async fn get(&self, _: &str) -> Result<Option<VolumeRecord>, BuildError> {
        Ok(None)
    }
    async fn delete(&self, _: &str) -> Result<(), BuildError> {
        Ok(())
    }
    async fn list(&self) -> Result<Vec<VolumeRecord>, BuildError> {
        Ok(self.turn().await.records.clone())
    }
}

impl World {
    fn actor(&self, turns: &[bool]) -> Actor {
        Actor { world: self.clone(), turns: Arc::new(Mutex::new(Vec::from(turns).into_iter())) }
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_never_names_an_archive_that_a_race_has_deleted(
        turns in prop::array::uniform3(prop::collection::vec(any::<bool>(), 0..40)),
        there in any::<bool>(),
    ) {
        let world = World::default();
        if there {
            world.state.lock().unwrap().archives.insert(name('a'), at(0));
        }
        let [maker, one, other] = turns.map(|turns| world.actor(&turns));
        let now = SystemTime::now();
        run(async {
            let make = async {
                shelf::put(&maker, &name('a'), Some(Path::new("/archive"))).await.unwrap();
                maker.create(&record(&name('a'))).await.unwrap();
            };
            let (_, a, b) = tokio::join!(make, collect(&one, &one, now, DAY), collect(&other, &other, now, DAY));
            assert!(a.unwrap().failed.is_empty() && b.unwrap().failed.is_empty());
        });
        let state = world.state.lock().unwrap();
        prop_assert!(state.archives.contains_key(&name('a')), "{state:?}");
        prop_assert!(state.marks.is_empty(), "{state:?}");
    }
}

#[test]
fn what_a_dead_clean_up_marked_is_freed_first_and_removed_the_next_time() {
    let world = World::default();
    let actor = world.actor(&[]);
    let old = at(0);
    {
        let mut state = world.state.lock().unwrap();
        state.archives.insert(name('a'), old);
        state.marks.insert(name('a'), old);
    }
    let now = SystemTime::now();
    assert_eq!(run(collect(&actor, &actor, now, DAY)).unwrap().removed, Vec::<String>::new());
    assert_eq!(run(collect(&actor, &actor, now, DAY)).unwrap().removed, [name('a')]);
    assert!(world.state.lock().unwrap().archives.is_empty());
}

#[test]
fn a_put_waits_for_no_dead_clean_up() {
    let world = World::default();
    let actor = world.actor(&[]);
    world.state.lock().unwrap().marks.insert(name('a'), at(0));
    run(shelf::put(&actor, &name('a'), Some(Path::new("/archive")))).unwrap();
    let state = world.state.lock().unwrap();
    assert!(state.archives.contains_key(&name('a')) && state.marks.is_empty());
}
