//! A tree as the kernel shows it, to set two of them against each other. Independent of the product's own walks.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use clip_csi::units::Digest;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

/// Differences that are told; there may be as many as names.
const TOLD: usize = 40;

/// What a user can see of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub kind: &'static str,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub size: u64,
    pub nlink: u64,
    /// Of a device node, else 0.
    pub rdev: u64,
    pub target: Option<PathBuf>,
    /// Of a file; `None` where reading it fails with EIO.
    pub content: Option<Digest>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Everything below `root`, the root itself as "". Directory sizes and link counts differ between filesystems: left out.
pub fn walk(root: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut out = BTreeMap::new();
    visit(root, Path::new(""), &mut out);
    out
}

fn visit(root: &Path, path: &Path, out: &mut BTreeMap<PathBuf, Facts>) {
    // Joining "" would add a slash, and a slash follows a symlink.
    let full = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(path) };
    let meta = fs::symlink_metadata(&full).unwrap_or_else(|e| panic!("{}: {e}", full.display()));
    let kind = meta.file_type();
    let name = match () {
        () if kind.is_dir() => "dir",
        () if kind.is_file() => "file",
        () if kind.is_symlink() => "symlink",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () if kind.is_char_device() => "char device",
        () => "block device",
    };
    let facts = Facts {
        kind: name,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        size: if kind.is_dir() { 0 } else { meta.size() },
        nlink: if kind.is_dir() { 0 } else { meta.nlink() },
        rdev: if kind.is_char_device() || kind.is_block_device() { meta.rdev() } else { 0 },
        target: kind.is_symlink().then(|| fs::read_link(&full).unwrap()),
        content: if kind.is_file() { content(&full) } else { None },
        xattrs: xattrs(&full).unwrap_or_else(|e| panic!("xattrs of {}: {e}", full.display())),
    };
    out.insert(path.to_owned(), facts);
    if kind.is_dir() {
        for entry in fs::read_dir(&full).unwrap() {
            visit(root, &path.join(entry.unwrap().file_name()), out);
        }
    }
}

fn content(path: &Path) -> Option<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut file = fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Some(Digest(hash.finalize().into())),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.raw_os_error() == Some(libc::EIO) => return None,
            Err(e) => panic!("{}: {e}", path.display()),
        }
    }
}

/// All of them; none where the filesystem has no such thing.
fn xattrs(path: &Path) -> rustix::io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = [0; 8192];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(BTreeMap::new()),
        other => other?,
    };
    // The longest that the kernel allows.
    let mut value = vec![0; 64 << 10];
    let names = names[..len].split(|b| *b == 0).filter(|name| !name.is_empty());
    let each = names.map(|name| {
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        Ok((name.to_vec(), value[..len].to_vec()))
    });
    each.collect()
}

/// Fails with the names that differ and how.
pub fn assert_same(shown: &BTreeMap<PathBuf, Facts>, oracle: &BTreeMap<PathBuf, Facts>) {
    let mut differences = vec![];
    for path in shown.keys().chain(oracle.keys().filter(|path| !shown.contains_key(*path))) {
        let (ours, theirs) = (shown.get(path), oracle.get(path));
        if ours != theirs {
            differences.push(format!("{}\n  shown:  {ours:?}\n  oracle: {theirs:?}", path.display()));
        }
    }
    let told = &differences[..differences.len().min(TOLD)];
    assert!(differences.is_empty(), "{} names differ:\n{}", differences.len(), told.join("\n"));
    assert!(oracle.len() > 1, "the oracle is empty");
}
