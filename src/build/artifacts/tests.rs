use super::*;
use crate::archive::{Extent, Span, Timestamp};
use crate::build::tar::EntryKind;
use crate::units::Compression;

fn entry(n: u64) -> TarEntry {
    TarEntry {
        path: format!("dir/file-{n}").into_bytes().into(),
        kind: EntryKind::File,
        mode: 0o4755,
        uid: 1000,
        gid: 7,
        mtime: Timestamp { sec: -1, nsec: 5 },
        atime: Timestamp { sec: -1, nsec: 5 },
        ctime: Timestamp { sec: 1 << 40, nsec: 999_999_999 },
        rdev: 0,
        link: (*b"").into(),
        xattrs: vec![(b"security.capability".to_vec(), vec![0, 255]), (b"user.x".to_vec(), Vec::new())],
        size: 5_000,
        offset: 512 + n,
        extents: n.is_multiple_of(2).then(|| vec![Extent { offset: 0, len: 512, blob_offset: 1024 }]),
    }
}

fn artifact(seed: u64, entries: u64) -> Artifact {
    let digest = Digest::of(&seed.to_le_bytes());
    let span = Span { uoff: 0, coff: 0, cend: 100, bits: 0, starts_stream: true, window: (0, 0), digest };
    let table = BlobTable {
        digest,
        compression: Compression::Gzip,
        clen: 100,
        ulen: 1000,
        diff_id: Digest::of(b"diff"),
        spans: vec![span],
        windows: Vec::new(),
        chunks: None,
    };
    let link = TarEntry { kind: EntryKind::Symlink, link: (*b"to\xff").into(), size: 0, extents: None, ..entry(1) };
    Artifact { entries: (0..entries).map(entry).chain([link]).collect(), table }
}

struct Place {
    _dir: tempfile::TempDir,
    artifacts: Artifacts,
}

fn place(max_bytes: u64) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let artifacts = Artifacts::new(dir.path().join("layers"), max_bytes);
    Place { _dir: dir, artifacts }
}

#[test]
fn what_was_found_comes_back_whole() {
    let place = place(1 << 20);
    let want = artifact(1, 10);
    let path = place.artifacts.path(&want.table.digest, 1 << 20, &Scope::Public);
    assert!(place.artifacts.load(&path, &want.table.digest).is_none(), "nothing was kept yet");
    place.artifacts.keep(&path, &want);
    assert_eq!(place.artifacts.load(&path, &want.table.digest), Some(want));
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));
}

#[test]
fn a_damaged_artifact_is_no_artifact_and_goes() {
    let place = place(1 << 20);
    let want = artifact(1, 3);
    let path = place.artifacts.path(&want.table.digest, 1 << 20, &Scope::Public);
    place.artifacts.keep(&path, &want);
    let good = fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, bad).unwrap();
        assert!(place.artifacts.load(&path, &want.table.digest).is_none(), "byte {at}");
        assert!(!path.exists());
        fs::write(&path, &good[..at]).unwrap();
        assert!(place.artifacts.load(&path, &want.table.digest).is_none(), "cut at {at}");
    }
    fs::write(&path, &good).unwrap();
    assert!(place.artifacts.load(&path, &Digest::of(b"another layer")).is_none());
}

#[test]
fn each_layer_span_size_and_scope_has_its_own() {
    let place = place(1 << 20);
    let (layer, other) = (Digest::of(b"1"), Digest::of(b"2"));
    let private = |who: &[u8]| Scope::Private(Digest::of(who));
    let paths = [
        place.artifacts.path(&layer, 1 << 20, &Scope::Public),
        place.artifacts.path(&other, 1 << 20, &Scope::Public),
        place.artifacts.path(&layer, 2 << 20, &Scope::Public),
        place.artifacts.path(&layer, 1 << 20, &private(b"a")),
        place.artifacts.path(&layer, 1 << 20, &private(b"b")),
    ];
    let distinct: std::collections::BTreeSet<_> = paths.iter().collect();
    assert_eq!(distinct.len(), paths.len());
}

#[test]
fn the_longest_unused_go_first_and_the_limit_holds() {
    let size = {
        let place = place(1 << 20);
        let path = place.artifacts.path(&Digest::of(b"x"), 1, &Scope::Public);
        place.artifacts.keep(&path, &artifact(0, 50));
        fs::metadata(&path).unwrap().len()
    };
    let place = place(size * 3 + size / 2);
    let made: Vec<_> = (0..3)
        .map(|seed| {
            let artifact = artifact(seed, 50);
            let path = place.artifacts.path(&artifact.table.digest, 1, &Scope::Public);
            place.artifacts.keep(&path, &artifact);
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(1000 - seed)).unwrap();
            (path, artifact.table.digest)
        })
        .collect();
    let stale = place.artifacts.dir.join(".layer-killed.tmp");
    File::create(&stale).unwrap().set_modified(SystemTime::now() - 2 * STALE).unwrap();
    assert!(place.artifacts.load(&made[0].0, &made[0].1).is_some(), "the oldest is of use again");
    let newest = artifact(9, 50);
    let path = place.artifacts.path(&newest.table.digest, 1, &Scope::Public);
    place.artifacts.keep(&path, &newest);
    let there = |n: usize| made[n].0.exists();
    assert_eq!((there(0), there(1), there(2), path.exists()), (true, false, true, true));
    assert!(!stale.exists());
}

#[test]
fn a_directory_that_others_can_write_to_is_not_used() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = place(1 << 20);
    let want = artifact(1, 3);
    let path = place.artifacts.path(&want.table.digest, 1, &Scope::Public);
    place.artifacts.keep(&path, &want);
    fs::set_permissions(&place.artifacts.dir, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(place.artifacts.load(&path, &want.table.digest).is_none());
    assert!(path.exists(), "and nothing in it is touched");
}
