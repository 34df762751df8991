//! What a filesystem tree shows, name by name: once as the demo's image must look, computed while it is made, and once as
//! it does look. Nothing of clip-csi's own merging, indexing or reading is used here.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// Everything that a reader can tell of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) what: What,
    /// Permission bits with setuid, setgid and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(super) mtime: (i64, u32),
}

/// Type and content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    Dir,
    /// Size, SHA-256, and the first name of the inode in path order: itself, where it has one name only.
    File {
        size: u64,
        sha256: [u8; 32],
        first: Vec<u8>,
        names: u64,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// A fifo, socket or device: the demo makes none, so one is a difference.
    Special,
}

/// All names below a root (itself is the empty name), as paths without a leading slash.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) names: BTreeMap<Vec<u8>, Record>,
}

impl Model {
    /// Forgets a name and, where it is a directory, everything below it.
    pub(super) fn remove(&mut self, path: &[u8]) {
        if self.names.remove(path).is_some_and(|record| record.what == What::Dir) {
            self.remove_below(path);
        }
    }

    /// Forgets everything below a directory.
    pub(super) fn remove_below(&mut self, dir: &[u8]) {
        let below: Vec<Vec<u8>> = self.below(dir).map(|(name, _)| name.clone()).collect();
        for name in below {
            self.names.remove(&name);
        }
    }

    /// Files of one name, with their sizes.
    pub(super) fn single_files(&self) -> impl Iterator<Item = (&Vec<u8>, u64)> {
        self.names.iter().filter_map(|(name, record)| match &record.what {
            What::File { size, names: 1, .. } => Some((name, *size)),
            _ => None,
        })
    }

    /// Names below a directory.
    pub(super) fn below(&self, dir: &[u8]) -> impl Iterator<Item = (&Vec<u8>, &Record)> {
        let prefix = [dir, b"/"].concat();
        self.names.range(prefix.clone()..).take_while(move |(name, _)| name.starts_with(&prefix))
    }

    /// Number of regular files.
    pub(super) fn files(&self) -> u64 {
        self.names.values().filter(|record| matches!(record.what, What::File { .. })).count() as u64
    }

    /// Sum of file sizes, each inode once.
    pub(super) fn content_bytes(&self) -> u64 {
        let sizes = self.names.iter().map(|(name, record)| match &record.what {
            What::File { size, first, .. } if first == name => *size,
            _ => 0,
        });
        sizes.sum()
    }

    /// One SHA-256 over names, types, modes, owners, times, link targets and contents.
    pub(super) fn digest(&self) -> crate::units::Digest {
        let mut sha = Sha256::new();
        let mut field = |bytes: &[u8]| {
            sha.update((bytes.len() as u64).to_le_bytes());
            sha.update(bytes);
        };
        for (name, record) in &self.names {
            field(name);
            field(format!("{:o} {} {} {:?}", record.mode, record.uid, record.gid, record.mtime).as_bytes());
            match &record.what {
                What::Dir => field(b"directory"),
                What::File { size, sha256, first, names } => {
                    field(format!("file {size} {names}").as_bytes());
                    field(sha256);
                    field(first);
                }
                What::Symlink { target } => {
                    field(b"symlink");
                    field(target);
                }
                What::Special => field(b"special"),
            }
        }
        crate::units::Digest(sha.finalize().into())
    }

    /// The first differences to `seen`, in words; empty: none.
    pub(super) fn differences(&self, seen: &Self, most: usize) -> Vec<String> {
        let show = |name: &[u8]| format!("/{}", crate::cli::human::escaped(name));
        let mine = self.names.iter().filter_map(|(name, record)| match seen.names.get(name) {
            None => Some(format!("{} is missing", show(name))),
            Some(other) if other != record => Some(format!("{}: {other:?}, expected {record:?}", show(name))),
            Some(_) => None,
        });
        let extra = seen.names.keys().filter(|name| !self.names.contains_key(*name));
        mine.chain(extra.map(|name| format!("{} should not be there", show(name)))).take(most).collect()
    }

    /// Reads a directory with ordinary system calls.
    pub(super) fn of_dir(root: &Path) -> io::Result<Self> {
        let mut model = Self::default();
        let mut inodes = Inodes::default();
        let mut open = vec![Vec::new()];
        while let Some(name) = open.pop() {
            let path = if name.is_empty() { root.to_owned() } else { root.join(std::ffi::OsStr::from_bytes(&name)) };
            let meta = fs::symlink_metadata(&path).map_err(|e| at(&path, &e))?;
            let kind = meta.file_type();
            let what = if kind.is_dir() {
                for child in fs::read_dir(&path).map_err(|e| at(&path, &e))? {
                    let child = child.map_err(|e| at(&path, &e))?.file_name().into_vec();
                    open.push(join(&name, &child));
                }
                What::Dir
            } else if kind.is_symlink() {
                What::Symlink { target: fs::read_link(&path).map_err(|e| at(&path, &e))?.into_os_string().into_vec() }
            } else if kind.is_file() {
                inodes.note(meta.ino(), &name);
                let (size, sha256) = hash_file(&path).map_err(|e| at(&path, &e))?;
                What::File { size, sha256, first: name.clone(), names: meta.nlink() }
            } else {
                debug_assert!(kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device());
                What::Special
            };
            let mtime = (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0));
            model
                .names
                .insert(name, Record { what, mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid(), mtime });
        }
        inodes.first_names(&mut model);
        Ok(model)
    }
}

/// Which names share an inode.
#[derive(Debug, Default)]
pub(super) struct Inodes(HashMap<u64, Vec<Vec<u8>>>);

impl Inodes {
    pub(super) fn note(&mut self, inode: u64, name: &[u8]) {
        self.0.entry(inode).or_default().push(name.to_vec());
    }

    /// Writes into every file the first name of its inode.
    pub(super) fn first_names(&self, model: &mut Model) {
        self.each(model, |what, group| {
            if let (What::File { first, .. }, Some(lowest)) = (what, group.iter().min()) {
                first.clone_from(lowest);
            }
        });
    }

    /// Writes into every file how many names its inode has.
    pub(super) fn count_names(&self, model: &mut Model) {
        self.each(model, |what, group| {
            if let What::File { names, .. } = what {
                *names = group.len() as u64;
            }
        });
    }

    fn each(&self, model: &mut Model, set: impl Fn(&mut What, &[Vec<u8>])) {
        for group in self.0.values() {
            for name in group {
                if let Some(record) = model.names.get_mut(name) {
                    set(&mut record.what, group);
                }
            }
        }
    }
}

/// `dir/name`; the root is empty.
pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

fn hash_file(path: &Path) -> io::Result<(u64, [u8; 32])> {
    let mut file = File::open(path)?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((size, sha.finalize().into()));
        }
        sha.update(&buffer[..n]);
        size += n as u64;
    }
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/a"), "one").unwrap();
        fs::hard_link(dir.path().join("d/a"), dir.path().join("b")).unwrap();
        symlink("d/a", dir.path().join("s")).unwrap();
        dir
    }

    #[test]
    fn a_directory_is_read_with_its_links_and_contents() {
        let dir = tree();
        let model = Model::of_dir(dir.path()).unwrap();
        let names: Vec<_> = model.names.keys().map(|n| String::from_utf8_lossy(n).into_owned()).collect();
        assert_eq!(names, ["", "b", "d", "d/a", "s"]);
        let What::File { first, names, size, .. } = &model.names[b"d/a".as_slice()].what else { panic!("no file") };
        assert_eq!((first.as_slice(), *names, *size), (b"b".as_slice(), 2, 3));
        assert_eq!(model.content_bytes(), 3, "one inode");
    }

    #[test]
    fn every_kind_of_change_changes_the_digest_and_is_named() {
        let dir = tree();
        let before = Model::of_dir(dir.path()).unwrap();
        let path = |name| dir.path().join(name);
        let check = |name: &str| {
            let after = Model::of_dir(dir.path()).unwrap();
            assert_ne!(before.digest(), after.digest(), "{name}");
            let all = before.differences(&after, 9).join("\n");
            assert!(all.contains(&format!("/{name}")), "{name}: {all}");
        };
        let mtime = fs::metadata(path("d/a")).unwrap().modified().unwrap();
        let reset = || File::options().write(true).open(path("d/a")).unwrap().set_modified(mtime).unwrap();
        fs::write(path("d/a"), "two").unwrap();
        reset();
        check("d/a");
        fs::write(path("d/a"), "one").unwrap();
        reset();
        let again = Model::of_dir(dir.path()).unwrap();
        assert_eq!((again.digest(), again.differences(&before, 9)), (before.digest(), vec![]), "back to what it was");
        fs::set_permissions(path("b"), fs::Permissions::from_mode(0o4711)).unwrap();
        check("b");
        fs::remove_file(path("s")).unwrap();
        symlink("d/b", path("s")).unwrap();
        check("s");
        fs::write(path("d/new"), "").unwrap();
        check("d/new");
    }
}
