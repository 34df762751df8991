//! One record per published target, on disk: what a restarted plugin needs to publish it again. Never a secret.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::fs::{Integrity, RootView};
use crate::source::{ArtifactRef, Credentials, Location};
use crate::units::Digest;

use super::{MountError, MountSpec, TargetSpec, io_error};

/// Version of the records that this program writes. A record with a higher one is left alone.
const VERSION: u32 = 1;

/// Records over this size are not read: ours have a few kilobytes (attributes are bounded by the API server at 256 KiB).
const MAX_RECORD: u64 = 1 << 20;

/// Tokens of the pod that the kubelet may put among the attributes: kept nowhere, compared with nothing.
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// What is kept of one published target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    version: u32,
    /// Canonical path.
    pub target: PathBuf,
    pub volume_id: String,
    /// Normalised; `None`: the shown root.
    pub sub_path: Option<PathBuf>,
    pub attributes: BTreeMap<String, String>,
    archive: Place,
    /// The archive is one of the node's own store.
    pub pinned: bool,
    pub root: RootView,
    pub integrity: Integrity,
    pub scope: String,
    /// Of the archive that is shown.
    pub digest: Digest,
    /// The whole mount key.
    pub key: Digest,
    /// Seconds since the epoch.
    pub created: u64,
}

/// [`Location`], as it is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
enum Place {
    File {
        path: PathBuf,
    },
    S3 {
        endpoint: String,
        region: String,
        bucket: String,
        key: String,
        path_style: bool,
    },
    Registry {
        registry: String,
        repository: String,
        digest: Digest,
    },
    /// `reference` as in `oci://registry/repository@sha256:…`, with its separator.
    Artifact {
        registry: String,
        repository: String,
        reference: String,
    },
    Layout {
        dir: PathBuf,
        digest: Digest,
    },
}

impl From<&Location> for Place {
    fn from(location: &Location) -> Self {
        match location.clone() {
            Location::File(path) => Self::File { path },
            Location::S3 { endpoint, region, bucket, key, path_style } => {
                Self::S3 { endpoint, region, bucket, key, path_style }
            }
            Location::Registry { registry, repository, digest } => Self::Registry { registry, repository, digest },
            Location::Artifact { registry, repository, reference } => {
                Self::Artifact { registry, repository, reference: reference.to_string() }
            }
            Location::Layout { dir, digest } => Self::Layout { dir, digest },
        }
    }
}

impl From<&Place> for Location {
    fn from(place: &Place) -> Self {
        match place.clone() {
            Place::File { path } => Self::File(path),
            Place::S3 { endpoint, region, bucket, key, path_style } => {
                Self::S3 { endpoint, region, bucket, key, path_style }
            }
            Place::Registry { registry, repository, digest } => Self::Registry { registry, repository, digest },
            Place::Artifact { registry, repository, reference } => {
                let digest = reference.strip_prefix('@').and_then(|text| text.parse().ok());
                let reference = match digest {
                    Some(digest) => ArtifactRef::Digest(digest),
                    None => ArtifactRef::Tag(reference.trim_start_matches([':', '@']).to_owned()),
                };
                Self::Artifact { registry, repository, reference }
            }
            Place::Layout { dir, digest } => Self::Layout { dir, digest },
        }
    }
}

impl Record {
    /// The record of a publish; digest and key are zero until the archive is open ([`Self::opened`]).
    pub(super) fn new(spec: &MountSpec, request: &TargetSpec, target: PathBuf, sub_path: Option<PathBuf>) -> Self {
        let mut attributes = request.attributes.clone();
        attributes.remove(TOKENS);
        Self {
            version: VERSION,
            target,
            volume_id: request.volume_id.clone(),
            sub_path,
            attributes,
            archive: Place::from(&spec.archive),
            pinned: spec.pin.is_some(),
            root: spec.root,
            integrity: spec.integrity,
            scope: spec.scope.clone(),
            digest: Digest([0; 32]),
            key: Digest([0; 32]),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        }
    }

    /// Completes it with what is known once the archive is open.
    pub(super) fn opened(mut self, digest: Digest, key: Digest) -> Self {
        (self.digest, self.key) = (digest, key);
        self
    }

    /// The filesystem to show again: without a pin and without credentials, which no record holds.
    pub(super) fn spec(&self) -> MountSpec {
        MountSpec {
            archive: Location::from(&self.archive),
            pin: None,
            root: self.root,
            integrity: self.integrity,
            scope: self.scope.clone(),
            credentials: Credentials::default(),
        }
    }

    /// In what a later publish of the same target differs; `None`: it is the same. What follows from the attributes may
    /// change between tries and does not count: the archive that an image resolves to (a tag may have moved; what is
    /// published stays), the scope, the credentials.
    pub(super) fn difference(&self, later: &Self) -> Option<String> {
        let changed: Vec<&str> = (self.attributes.keys().chain(later.attributes.keys()))
            .filter(|name| self.attributes.get(*name) != later.attributes.get(*name))
            .map(String::as_str)
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect();
        let fields = [
            ("the volume id", self.volume_id == later.volume_id),
            ("subPath", self.sub_path == later.sub_path),
            ("root", self.root == later.root),
            ("integrity", self.integrity == later.integrity),
            ("the archive", self.pinned || later.pinned || self.archive == later.archive),
        ];
        let fields: Vec<&str> = fields.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect();
        match (fields.is_empty(), changed.is_empty()) {
            (true, true) => None,
            (_, false) => Some(format!("volume attributes {}", changed.join(", "))),
            (false, true) => Some(fields.join(", ")),
        }
    }
}

/// What [`Journal::load`] found.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub records: Vec<Record>,
    /// Files that are no records of ours, with the reason. Where a target can be read, that is named instead of the file.
    pub unusable: Vec<(PathBuf, String)>,
}

/// The directory of records. All calls block.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn file(&self, target: &Path) -> PathBuf {
        self.dir.join(format!("{}.json", Digest::of(target.as_os_str().as_bytes()).hex()))
    }

    /// Writes the record of its target, whole or not at all: temporary file, fsync, rename. The directory is not synced: a
    /// crash of the *machine* ends the mounts as well, and the kubelet publishes again.
    pub(super) fn write(&self, record: &Record) -> Result<(), MountError> {
        let file = self.file(&record.target);
        let error = |detail: String| io_error(format!("writing {}", file.display()), detail);
        let bytes = serde_json::to_vec_pretty(record).map_err(|e| error(e.to_string()))?;
        let write = || {
            let mut temporary = tempfile::Builder::new().prefix(".new-").tempfile_in(&self.dir)?;
            temporary.write_all(&bytes)?;
            temporary.as_file().sync_all()?;
            temporary.persist(&file).map_err(|e| e.error)
        };
        write().map(drop).map_err(|e: std::io::Error| error(e.to_string()))
    }

    /// Removes the record of a target; none there: fine.
    pub(super) fn remove(&self, target: &Path) -> Result<(), MountError> {
        let file = self.file(target);
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(io_error(format!("removing {}", file.display()), e))
            }
            _ => Ok(()),
        }
    }

    /// Reads all records. One that can't be read is renamed to `….unreadable`, so that it is kept for whoever looks into
    /// it, and reported once; one of a newer version stays where it is, for the day that version is back.
    pub(super) fn load(&self) -> Result<Loaded, MountError> {
        let mut loaded = Loaded::default();
        let entries =
            std::fs::read_dir(&self.dir).map_err(|e| io_error(format!("reading {}", self.dir.display()), e))?;
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let name = name.as_bytes();
            if name.starts_with(b".new-") {
                // Of a process that ended while it wrote.
                let _ = std::fs::remove_file(&path);
            } else if name.ends_with(b".json") {
                match read(&path) {
                    Ok(record) if self.file(&record.target) == path => loaded.records.push(record),
                    Ok(record) => {
                        let detail = format!("its name does not belong to its target {}", record.target.display());
                        loaded.unusable.push(set_aside(&path, &detail));
                    }
                    Err(Unusable::Newer { target, version }) => {
                        let detail = format!("{} is of version {version}, newer than this program", path.display());
                        loaded.unusable.push((target.unwrap_or(path), detail));
                    }
                    Err(Unusable::Broken(detail)) => loaded.unusable.push(set_aside(&path, &detail)),
                }
            }
        }
        Ok(loaded)
    }
}

enum Unusable {
    Newer { target: Option<PathBuf>, version: u32 },
    Broken(String),
}

/// The part of a record that every version has.
#[derive(Deserialize)]
struct Frame {
    version: u32,
    target: Option<PathBuf>,
}

fn read(path: &Path) -> Result<Record, Unusable> {
    let broken = |e: &dyn std::fmt::Display| Unusable::Broken(e.to_string());
    let size = std::fs::symlink_metadata(path).map_err(|e| broken(&e))?.len();
    if size > MAX_RECORD {
        return Err(Unusable::Broken(format!("it has {size} bytes, the limit is {MAX_RECORD}")));
    }
    let bytes = std::fs::read(path).map_err(|e| broken(&e))?;
    let frame: Frame = serde_json::from_slice(&bytes).map_err(|e| broken(&e))?;
    if frame.version > VERSION {
        return Err(Unusable::Newer { target: frame.target, version: frame.version });
    }
    serde_json::from_slice(&bytes).map_err(|e| broken(&e))
}

fn set_aside(path: &Path, detail: &str) -> (PathBuf, String) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".unreadable");
    let kept = match std::fs::rename(path, &aside) {
        Ok(()) => format!("kept as {}", Path::new(&aside).display()),
        Err(e) => format!("and can't be set aside: {e}"),
    };
    (path.to_owned(), format!("not a usable record ({detail}), {kept}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str) -> Record {
        let spec = MountSpec {
            archive: Location::S3 {
                endpoint: "http://127.0.0.1:9".into(),
                region: String::new(),
                bucket: "b".into(),
                key: "k.clip".into(),
                path_style: true,
            },
            pin: None,
            root: RootView::Auto,
            integrity: Integrity::Strict,
            scope: "public".into(),
            credentials: Credentials { docker_config: Some("hunter2".into()), ..Credentials::default() },
        };
        let request = TargetSpec {
            volume_id: "v".into(),
            target: target.into(),
            sub_path: None,
            attributes: [("archive", "s3://b/k.clip"), (TOKENS, "eyJhbGciOi")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
        };
        Record::new(&spec, &request, target.into(), Some("usr/bin".into()))
    }

    #[test]
    fn a_record_comes_back_as_it_was_and_without_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path().to_owned());
        let wrote = record("/a b").opened(Digest::of(b"archive"), Digest::of(b"key"));
        journal.write(&wrote).unwrap();
        journal.write(&wrote).unwrap();
        let loaded = journal.load().unwrap();
        assert_eq!(loaded.records, std::slice::from_ref(&wrote));
        assert!(loaded.unusable.is_empty());
        assert_eq!(loaded.records[0].spec().archive, Location::from(&wrote.archive));
        let text = std::fs::read_to_string(journal.file(Path::new("/a b"))).unwrap();
        assert!(!text.contains("hunter2") && !text.contains("eyJ") && text.contains("k.clip"), "{text}");
        journal.remove(Path::new("/a b")).unwrap();
        journal.remove(Path::new("/a b")).unwrap();
        assert!(journal.load().unwrap().records.is_empty());
    }

    #[test]
    fn corrupt_newer_and_misnamed_records_are_reported_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path().to_owned());
        journal.write(&record("/good")).unwrap();
        std::fs::write(dir.path().join("corrupt.json"), b"{\"version\":1,").unwrap();
        std::fs::write(dir.path().join("newer.json"), b"{\"version\":9,\"target\":\"/newer\",\"x\":[]}").unwrap();
        std::fs::copy(journal.file(Path::new("/good")), dir.path().join("misnamed.json")).unwrap();
        std::fs::write(dir.path().join(".new-abc"), b"half").unwrap();
        std::fs::write(dir.path().join("lock"), b"").unwrap();

        let loaded = journal.load().unwrap();
        assert_eq!(loaded.records.len(), 1);
        let mut named: Vec<_> = loaded.unusable.iter().map(|(path, _)| path.clone()).collect();
        named.sort();
        let mut wanted = [dir.path().join("corrupt.json"), dir.path().join("misnamed.json"), "/newer".into()];
        wanted.sort();
        assert_eq!(named, wanted);
        assert!(dir.path().join("corrupt.json.unreadable").exists());
        assert!(dir.path().join("newer.json").exists());
        assert!(!dir.path().join(".new-abc").exists());
        // Reported once; the newer one each time.
        assert_eq!(journal.load().unwrap().unusable.len(), 1);
    }

    #[test]
    fn an_oversized_record_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path().to_owned());
        let file = std::fs::File::create(dir.path().join("big.json")).unwrap();
        file.set_len(MAX_RECORD + 1).unwrap();
        let loaded = journal.load().unwrap();
        assert!(loaded.unusable[0].1.contains("limit"), "{:?}", loaded.unusable);
    }

    #[test]
    fn only_what_was_asked_for_makes_a_conflict() {
        let first = record("/t");
        assert_eq!(first.difference(&record("/t")), None);
        let mut tokens = record("/t");
        tokens.scope = "other".into();
        assert_eq!(first.difference(&tokens), None);
        let mut other = record("/t");
        other.attributes.insert("platform".into(), "linux/arm64".into());
        assert!(first.difference(&other).unwrap().contains("platform"));
        let mut other = record("/t");
        other.sub_path = None;
        assert_eq!(first.difference(&other).unwrap(), "subPath");
        let mut other = record("/t");
        other.archive = Place::File { path: "/x.clip".into() };
        assert_eq!(first.difference(&other).unwrap(), "the archive");
        other.pinned = true;
        assert_eq!(first.difference(&other), None);
    }
}
