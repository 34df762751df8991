//! One digest for a whole tree, so that a published mount can be compared with what it should be.
//!
//! SHA-256 over the line `clip-tree 1\n` and one record per name. Names are taken depth-first, a directory before its
//! children, siblings sorted by the bytes of their names; the root comes first, as `/`. A record is ten fields, each
//! followed by a NUL byte, then a newline:
//!
//! 1. type: one of `f d l p s c b` (regular file, directory, symlink, fifo, socket, character and block device)
//! 2. the path from the root, beginning with `/`
//! 3. permission bits with setuid, setgid and sticky, octal: `755`
//! 4. owner, 5. group: decimal
//! 6. modification time: seconds, a dot, nine digits of nanoseconds; seconds are negative before 1970 (as in `timespec`)
//! 7. `f`: size in bytes; `l`: the link's target; `c` and `b`: `major:minor`; else empty
//! 8. hard links: the path that this inode was first met under, if that was another one; else empty
//! 9. `f` with an empty field 8: SHA-256 of the content, hex; else empty
//! 10. extended attributes in `user.` and `security.capability`, sorted by name, `hex(name)=hex(value)`, comma-separated
//!
//! Not in it: access and change times, link counts, sizes of directories, inode numbers. None of the fields can hold a
//! NUL byte, so a record reads in one way only, whatever bytes a name has.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use sha2::Digest as _;

use super::ImageFs;
use crate::archive::{Kind, NodeId};
use crate::cache::CacheError;
use crate::units::Digest;

/// Bytes that are read at once from a file.
const CHUNK: usize = 1 << 20;

/// The digest of a tree, and what it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeDigest {
    /// The digest.
    pub digest: Digest,
    /// Names, the root included.
    pub names: u64,
    /// Bytes of file content, hard-linked files once.
    pub bytes: u64,
}

/// One name, before it is hashed.
struct Record<'a> {
    kind: Kind,
    path: &'a [u8],
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    detail: Vec<u8>,
    first_path: &'a [u8],
    content: Option<Digest>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

struct TreeHasher {
    hash: sha2::Sha256,
    names: u64,
    bytes: u64,
}

impl TreeHasher {
    fn new() -> Self {
        let mut hash = sha2::Sha256::new();
        hash.update(b"clip-tree 1\n");
        Self { hash, names: 0, bytes: 0 }
    }

    fn add(&mut self, record: Record<'_>) {
        let letter: &[u8] = match record.kind {
            Kind::File => b"f",
            Kind::Dir => b"d",
            Kind::Symlink => b"l",
            Kind::Fifo => b"p",
            Kind::Socket => b"s",
            Kind::CharDevice => b"c",
            Kind::BlockDevice => b"b",
        };
        let mut xattrs = record.xattrs;
        xattrs.sort();
        let xattrs: Vec<String> =
            xattrs.iter().map(|(name, value)| format!("{}={}", hex::encode(name), hex::encode(value))).collect();
        let fields: [Vec<u8>; 10] = [
            letter.to_vec(),
            record.path.to_vec(),
            format!("{:o}", record.mode & 0o7777).into_bytes(),
            record.uid.to_string().into_bytes(),
            record.gid.to_string().into_bytes(),
            format!("{}.{:09}", record.mtime.0, record.mtime.1).into_bytes(),
            record.detail,
            record.first_path.to_vec(),
            record.content.map(|d| d.hex()).unwrap_or_default().into_bytes(),
            xattrs.join(",").into_bytes(),
        ];
        for field in fields {
            self.hash.update(field);
            self.hash.update([0]);
        }
        self.hash.update(b"\n");
        self.names += 1;
    }

    fn finish(self) -> TreeDigest {
        TreeDigest { digest: Digest(self.hash.finalize().into()), names: self.names, bytes: self.bytes }
    }
}

/// Whether an extended attribute belongs to the image rather than to the host that shows it (SELinux labels, ACLs).
fn counts(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability"
}

fn device(rdev: u64) -> Vec<u8> {
    format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)).into_bytes()
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let dir = if dir == b"/" { &[][..] } else { dir };
    [dir, b"/", name].concat()
}

/// Digest of a directory as the kernel shows it: a published volume, or an unpacked image. Blocks; follows no symlink.
/// `progress` hears of the bytes of content as they are read. Fails with the path that can't be read.
pub fn digest_dir(root: &Path, progress: &(dyn Fn(u64) + Send + Sync)) -> io::Result<TreeDigest> {
    let mut hasher = TreeHasher::new();
    let mut first_paths: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut buf = vec![0; CHUNK];
    // Depth-first without recursion: names may be nested deeper than a stack.
    let mut todo = vec![b"/".to_vec()];
    while let Some(path) = todo.pop() {
        let relative = OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(&path));
        let host = if relative.is_empty() { root.to_path_buf() } else { root.join(relative) };
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", host.display()));
        let meta = host.symlink_metadata().map_err(named)?;
        let kind = match meta.file_type() {
            t if t.is_file() => Kind::File,
            t if t.is_dir() => Kind::Dir,
            t if t.is_symlink() => Kind::Symlink,
            t if t.is_fifo() => Kind::Fifo,
            t if t.is_socket() => Kind::Socket,
            t if t.is_char_device() => Kind::CharDevice,
            _ => Kind::BlockDevice,
        };
        let first = if kind != Kind::Dir && meta.nlink() > 1 {
            let met = first_paths.entry((meta.dev(), meta.ino())).or_insert_with(|| path.clone());
            if *met == path { Vec::new() } else { met.clone() }
        } else {
            Vec::new()
        };
        let detail = match kind {
            Kind::File => meta.len().to_string().into_bytes(),
            Kind::Symlink => std::fs::read_link(&host).map_err(named)?.into_os_string().into_vec(),
            Kind::CharDevice | Kind::BlockDevice => device(meta.rdev()),
            _ => Vec::new(),
        };
        let content = if kind == Kind::File && first.is_empty() {
            let mut file = std::fs::File::open(&host).map_err(named)?;
            let mut hash = sha2::Sha256::new();
            loop {
                let n = match file.read(&mut buf) {
                    Ok(0) => break,
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => return Err(named(e)),
                };
                hash.update(buf.get(..n).unwrap_or_default());
                hasher.bytes += n as u64;
                progress(n as u64);
            }
            Some(Digest(hash.finalize().into()))
        } else {
            None
        };
        hasher.add(Record {
            kind,
            path: &path,
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            detail,
            first_path: &first,
            content,
            xattrs: host_xattrs(&host).map_err(named)?,
        });
        if kind == Kind::Dir {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&host).map_err(named)? {
                names.push(entry.map_err(named)?.file_name().into_vec());
            }
            names.sort_unstable();
            todo.extend(names.into_iter().rev().map(|name| join(&path, &name)));
        }
    }
    Ok(hasher.finish())
}

fn host_xattrs(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    use rustix::io::Errno;
    // The kernel's limit on a list of names and on one value.
    const LIMIT: usize = 65536;
    let mut list = Vec::with_capacity(LIMIT);
    match rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut list)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    }
    let mut out = Vec::new();
    for name in list.split(|b| *b == 0).filter(|name| counts(name)) {
        let mut value = Vec::with_capacity(LIMIT);
        match rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value)) {
            Ok(_) => out.push((name.to_vec(), value)),
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(out)
}

/// The same digest, of what a filesystem shows, without a kernel: the other side of the comparison, and what an
/// unprivileged machine can check. `progress` hears of the bytes of content as they are read.
pub async fn digest_fs(fs: &ImageFs, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<TreeDigest, CacheError> {
    let tree = fs.tree();
    let mut hasher = TreeHasher::new();
    let mut first_paths: HashMap<NodeId, Vec<u8>> = HashMap::new();
    let mut todo = vec![(fs.root(), b"/".to_vec())];
    while let Some((node, path)) = todo.pop() {
        let attr = tree.attr(node);
        let first = if attr.kind != Kind::Dir && attr.nlink > 1 {
            let met = first_paths.entry(tree.inode(node)).or_insert_with(|| path.clone());
            if *met == path { Vec::new() } else { met.clone() }
        } else {
            Vec::new()
        };
        let detail = match attr.kind {
            Kind::File => attr.size.to_string().into_bytes(),
            Kind::Symlink => tree.target(node).to_vec(),
            Kind::CharDevice | Kind::BlockDevice => device(u64::from(attr.rdev)),
            _ => Vec::new(),
        };
        let content = if attr.kind == Kind::File && first.is_empty() {
            let mut hash = sha2::Sha256::new();
            let mut off = 0;
            while off < attr.size {
                let bytes = fs.fetch(node, off, CHUNK).await?;
                if bytes.is_empty() {
                    break;
                }
                hash.update(&bytes);
                off += bytes.len() as u64;
                progress(bytes.len() as u64);
            }
            hasher.bytes += off;
            Some(Digest(hash.finalize().into()))
        } else {
            None
        };
        let xattrs = tree.xattrs(node).iter().filter(|(name, _)| counts(name));
        hasher.add(Record {
            kind: attr.kind,
            path: &path,
            mode: u32::from(attr.mode),
            uid: attr.uid,
            gid: attr.gid,
            mtime: (attr.mtime.sec, attr.mtime.nsec),
            detail,
            first_path: &first,
            content,
            xattrs: xattrs.map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
        });
        // The arena keeps siblings sorted by name.
        todo.extend(tree.children(node).rev().map(NodeId).map(|id| (id, join(&path, tree.name(id)))));
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format is what other programs compute too: a change of it must be deliberate.
    #[test]
    fn format_is_pinned() {
        let mut hasher = TreeHasher::new();
        hasher.add(Record {
            kind: Kind::File,
            path: b"/a\nb",
            mode: 0o104755,
            uid: 1,
            gid: 2,
            mtime: (-1, 5),
            detail: b"3".to_vec(),
            first_path: b"",
            content: Some(Digest::of(b"abc")),
            xattrs: vec![(b"user.y".to_vec(), b"2".to_vec()), (b"user.x".to_vec(), b"\0".to_vec())],
        });
        let text = format!(
            "clip-tree 1\nf\0/a\nb\x004755\x001\x002\x00-1.000000005\x003\0\0{}\0{}=00,{}=32\0\n",
            Digest::of(b"abc").hex(),
            hex::encode("user.x"),
            hex::encode("user.y"),
        );
        assert_eq!(hasher.finish().digest, Digest::of(text.as_bytes()));
    }

    #[test]
    fn every_field_changes_the_digest() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let old = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
            last_modification: rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 123 },
        };
        let set_time = |path: &Path, times| {
            rustix::fs::utimensat(rustix::fs::CWD, path, times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
        };
        let digest = || {
            set_time(dir.path(), &old);
            digest_dir(dir.path(), &|_| {}).unwrap().digest
        };
        std::fs::write(&file, "content").unwrap();
        set_time(&file, &old);
        let mut seen = vec![digest()];
        let mut differs = |what: &str| {
            let now = digest();
            assert!(!seen.contains(&now), "{what} is not in the digest");
            seen.push(now);
        };
        std::fs::write(&file, "contenu").unwrap();
        set_time(&file, &old);
        differs("content");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o4711)).unwrap();
        differs("mode");
        let mut new = old.clone();
        new.last_modification.tv_nsec = 124;
        set_time(&file, &new);
        differs("mtime");
        std::fs::hard_link(&file, dir.path().join("link")).unwrap();
        differs("hard link");
        std::fs::remove_file(dir.path().join("link")).unwrap();
        std::fs::copy(&file, dir.path().join("link")).unwrap();
        set_time(&dir.path().join("link"), &new);
        differs("link group");
        std::fs::remove_file(dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        set_time(&dir.path().join("link"), &new);
        differs("type");
    }
}
