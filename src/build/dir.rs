//! v1 of a directory.
//!
//! Nothing outside the directory can get in, whatever happens to the tree meanwhile: every open goes through `openat2` from the directory's
//! own descriptor, beneath it, without symlinks. What changes between its `stat` and the end of its reading is an error, not a guess.
//!
//! Other filesystems mounted below are archived with it. Devices, fifos and sockets are kept as metadata and never opened.
//! All that is left out: the output file itself (with a warning), and the attributes `security.selinux` (a label of this host's policy) and
//! `trusted.overlay.*` (overlayfs' bookkeeping).

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::data_region::DataRegion;
use super::layer::Bar;
use super::output::{Output, blocking, blocking_with_bar};
use super::progress::Progress;
use super::tar::{MAX_PATH, show};
use super::v1::{Name, content_size, seal, tree_of, write_files};
use super::{BuildError, BuildOptions, BuildReport, generator};
use crate::archive::{Entry, Extension, Kind, Timestamp};
use crate::metrics::metrics;

/// Bytes read at a time.
const COPY: usize = 1 << 20;
/// Linux' `XATTR_LIST_MAX` and `XATTR_SIZE_MAX`.
const XATTR_MAX: usize = 64 << 10;

/// Names and values, sorted by name.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Archives a directory. See [`super::archive_dir`].
pub(super) async fn archive_dir(
    dir: &Path,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    let (dir, out, span_size) = (dir.to_owned(), out.to_owned(), options.span_size);
    let (walk, out) = blocking(move || {
        let mut walk = Walk::open(&dir, &out)?;
        walk.run()?;
        Ok((walk, out))
    })
    .await?;
    let bar = Bar::begin(progress, "write the archive", content_size(&walk.names));
    let report = blocking_with_bar(&bar, move |work| {
        let Walk { tree, mut names, seen, warnings, .. } = walk;
        let output = Output::create(&out)?;
        let mut region = DataRegion::begin(&output, span_size);
        let mut buffer = vec![0; COPY];
        write_files(&mut names, &mut region, &mut |name, region| {
            let Some(stamp) = seen.get(&name.path) else { return Ok(()) };
            tree.copy(&name.path, stamp, region, &mut buffer)?;
            work.advance(stamp.size)
        })?;
        let (tail_pos, table) = region.finish()?;
        let tree = tree_of(names)?;
        let extension = Extension { generator: generator(), ..Extension::default() };
        let archive_bytes = seal(output, &tree, extension, table, tail_pos)?;
        let (nodes, content_bytes) = (tree.len() as u64, tree.total_size());
        Ok(BuildReport { archive_bytes, nodes, content_bytes, layer_bytes: 0, warnings })
    })
    .await?;
    metrics().v1_archive_bytes.inc_by(report.archive_bytes);
    Ok(report)
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
}

impl Stamp {
    fn of(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: Timestamp { sec: stat.st_mtime, nsec: stat.st_mtime_nsec as u32 },
            ctime: Timestamp { sec: stat.st_ctime, nsec: stat.st_ctime_nsec as u32 },
        }
    }
}

/// The directory, by its descriptor. Paths are absolute inside it.
#[derive(Debug)]
struct Source {
    root: OwnedFd,
    /// For messages.
    dir: String,
}

impl Source {
    fn error(&self, path: &[u8], operation: &str, error: Errno) -> BuildError {
        let what = format!("{operation} {}{}", self.dir, if path == b"/" { String::new() } else { show(path) });
        BuildError::Io { what, detail: error.to_string() }
    }

    fn changed(&self, path: &[u8], how: &str) -> BuildError {
        let what = format!("archive {}{}", self.dir, show(path));
        BuildError::Io { what, detail: format!("it {how} while it was archived; archive a tree that nobody writes to") }
    }

    /// Opens a path beneath the root, without symlinks, without touching access times where we may.
    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, BuildError> {
        let relative = path.strip_prefix(b"/").filter(|p| !p.is_empty()).unwrap_or(b".");
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |flags| rustix::fs::openat2(&self.root, relative, flags, Mode::empty(), resolve);
        open(flags | OFlags::NOATIME)
            .or_else(|error| if error == Errno::PERM { open(flags) } else { Err(error) })
            .map_err(|error| self.error(path, "open", error))
    }

    /// Copies a file's bytes; its holes are neither read nor written.
    fn copy(
        &self,
        path: &[u8],
        stamp: &Stamp,
        region: &mut DataRegion<'_>,
        buffer: &mut [u8],
    ) -> Result<(), BuildError> {
        // Should a fifo have taken the file's place, NONBLOCK keeps the open from waiting.
        let file = self.open(path, OFlags::NONBLOCK | OFlags::NOCTTY)?;
        let stat = rustix::fs::fstat(&file).map_err(|error| self.error(path, "stat", error))?;
        let unchanged =
            |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && Stamp::of(stat) == *stamp;
        if !unchanged(&stat) {
            return Err(self.changed(path, "changed"));
        }
        let size = stamp.size;
        let sparse = u64::try_from(stat.st_blocks).unwrap_or(u64::MAX).saturating_mul(512) < size;
        let mut at = 0;
        while at < size {
            let mut end = size;
            if sparse {
                let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
                    Ok(data) => data.min(size),
                    Err(Errno::NXIO) => size,
                    // A filesystem that knows no holes.
                    Err(_) => at,
                };
                region.hole(data.saturating_sub(at))?;
                at = at.max(data);
                end = rustix::fs::seek(&file, SeekFrom::Hole(at)).map_or(size, |hole| hole.min(size));
            }
            while at < end {
                let want = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
                let n = match rustix::io::pread(&file, &mut buffer[..want], at) {
                    Ok(0) => return Err(self.changed(path, "became shorter")),
                    Ok(n) => n,
                    Err(Errno::INTR) => continue,
                    Err(error) => return Err(self.error(path, "read", error)),
                };
                region.data(&buffer[..n])?;
                at += n as u64;
            }
        }
        let stat = rustix::fs::fstat(&file).map_err(|error| self.error(path, "stat", error))?;
        if !unchanged(&stat) {
            return Err(self.changed(path, "changed"));
        }
        Ok(())
    }
}

/// The walk, and what it found.
struct Walk {
    tree: Source,
    names: Vec<Name>,
    /// The state of every regular file, by path.
    seen: HashMap<Vec<u8>, Stamp>,
    /// Link groups of files with several names, by device and inode.
    groups: HashMap<(u64, u64), u64>,
    /// Device and inode of an output file of an earlier run.
    output: Option<(u64, u64)>,
    out: String,
    warnings: Vec<String>,
}

impl Walk {
    fn open(dir: &Path, out: &Path) -> Result<Self, BuildError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let name = dir.display().to_string();
        let root = rustix::fs::open(dir, flags, Mode::empty())
            .map_err(|error| BuildError::Io { what: format!("open {name}"), detail: error.to_string() })?;
        let tree = Source { root, dir: name.trim_end_matches('/').to_owned() };
        let output = rustix::fs::lstat(out).ok().map(|stat| (stat.st_dev, stat.st_ino));
        Ok(Self {
            tree,
            names: Vec::new(),
            seen: HashMap::new(),
            groups: HashMap::new(),
            output,
            out: out.display().to_string(),
            warnings: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<(), BuildError> {
        let root = self.tree.open(b"/", OFlags::DIRECTORY)?;
        let stat = rustix::fs::fstat(&root).map_err(|error| self.tree.error(b"/", "stat", error))?;
        let xattrs = self.xattrs(&root, b".", b"/")?;
        self.names.push(Name { path: b"/".to_vec(), entry: entry(&stat, Kind::Dir, xattrs) });
        let mut dirs = vec![(b"/".to_vec(), Stamp::of(&stat))];
        while let Some((path, stamp)) = dirs.pop() {
            self.directory(&path, &stamp, &mut dirs)?;
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], stamp: &Stamp, dirs: &mut Vec<(Vec<u8>, Stamp)>) -> Result<(), BuildError> {
        let dir = self.tree.open(path, OFlags::DIRECTORY)?;
        let stat = rustix::fs::fstat(&dir).map_err(|error| self.tree.error(path, "stat", error))?;
        if (stat.st_dev, stat.st_ino) != (stamp.dev, stamp.ino) {
            return Err(self.tree.changed(path, "was replaced"));
        }
        let mut children = Vec::new();
        let listing = rustix::fs::Dir::read_from(&dir).map_err(|error| self.tree.error(path, "list", error))?;
        for child in listing {
            let child = child.map_err(|error| self.tree.error(path, "list", error))?;
            let name = child.file_name().to_bytes();
            if name != b"." && name != b".." {
                children.push(name.to_vec());
            }
        }
        children.sort_unstable();
        for name in children {
            self.child(&dir, path, &name, dirs)?;
        }
        Ok(())
    }

    fn child(
        &mut self,
        dir: &OwnedFd,
        parent: &[u8],
        name: &[u8],
        dirs: &mut Vec<(Vec<u8>, Stamp)>,
    ) -> Result<(), BuildError> {
        let path = if parent == b"/" { [b"/", name].concat() } else { [parent, b"/", name].concat() };
        if path.len() > MAX_PATH {
            return Err(self.tree.error(&path, "archive", Errno::NAMETOOLONG));
        }
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.tree.error(&path, "stat", error))?;
        let id = (stat.st_dev, stat.st_ino);
        if self.output == Some(id) {
            self.warnings.push(format!("{} lies inside the directory and was left out", self.out));
            return Ok(());
        }
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Dir,
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice => Kind::CharDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            FileType::Unknown => {
                let what = format!("archive {}{}", self.tree.dir, show(&path));
                return Err(BuildError::Io { what, detail: "the system does not say what kind of file it is".into() });
            }
        };
        let xattrs = self.xattrs(dir, name, &path)?;
        let mut entry = entry(&stat, kind, xattrs);
        match kind {
            Kind::Dir => dirs.push((path.clone(), Stamp::of(&stat))),
            Kind::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new());
                entry.target = target.map_err(|error| self.tree.error(&path, "read the link", error))?.into_bytes();
            }
            Kind::File => {
                self.seen.insert(path.clone(), Stamp::of(&stat));
            }
            Kind::CharDevice | Kind::BlockDevice => {
                // The kernel hands out 32 bits, packed as `makedev` does.
                entry.rdev =
                    u32::try_from(stat.st_rdev).map_err(|_| self.tree.error(&path, "stat", Errno::OVERFLOW))?;
            }
            Kind::Fifo | Kind::Socket => {}
        }
        if kind != Kind::Dir && stat.st_nlink > 1 {
            let next = self.groups.len() as u64 + 1;
            entry.link_group = *self.groups.entry(id).or_insert(next);
        }
        self.names.push(Name { path, entry });
        Ok(())
    }

    /// Attributes of `name` in `dir`, sorted. The l-calls want a path; the one through our own descriptor can't be led astray.
    fn xattrs(&self, dir: &OwnedFd, name: &[u8], path: &[u8]) -> Result<Xattrs, BuildError> {
        let through = format!("/proc/self/fd/{}/", dir.as_raw_fd());
        let through = std::ffi::OsStr::from_bytes(&[through.as_bytes(), name].concat()).to_owned();
        let fail = |error| self.tree.error(path, "read the attributes of", error);
        match rustix::fs::llistxattr_query(&*through) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(fail(error)),
            Ok(_) => {}
        }
        let mut list = vec![0; XATTR_MAX];
        let len = rustix::fs::llistxattr(&*through, &mut list[..]).map_err(fail)?;
        let mut out = Vec::new();
        for key in list[..len].split(|b| *b == 0).filter(|key| !key.is_empty()) {
            if key == b"security.selinux" || key.starts_with(b"trusted.overlay.") {
                continue;
            }
            let mut value = vec![0; XATTR_MAX];
            match rustix::fs::lgetxattr(&*through, key, &mut value[..]) {
                Ok(len) => value.truncate(len),
                // Removed meanwhile.
                Err(Errno::NODATA) => continue,
                Err(error) => return Err(fail(error)),
            }
            value.shrink_to_fit();
            out.push((key.to_vec(), value));
        }
        out.sort();
        Ok(out)
    }
}

fn entry(stat: &Stat, kind: Kind, xattrs: Xattrs) -> Entry {
    let Stamp { size, mtime, ctime, .. } = Stamp::of(stat);
    Entry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if kind == Kind::File { size } else { 0 },
        atime: Timestamp { sec: stat.st_atime, nsec: stat.st_atime_nsec as u32 },
        mtime,
        ctime,
        xattrs,
        ..Entry::new(kind, (stat.st_mode & 0o7777) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks a directory with one file, lets `change` happen, and copies the file.
    fn copy_after(change: impl FnOnce(&Path)) -> Result<(), BuildError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "content").unwrap();
        let out = tempfile::tempdir().unwrap();
        let mut walk = Walk::open(dir.path(), &out.path().join("out")).unwrap();
        walk.run().unwrap();
        change(&file);
        let output = Output::create(&out.path().join("out")).unwrap();
        let mut region = DataRegion::begin(&output, 1 << 20);
        region.begin_file().unwrap();
        walk.tree.copy(b"/file", &walk.seen[&b"/file"[..]], &mut region, &mut [0; 4])
    }

    fn refused(change: impl FnOnce(&Path)) {
        let error = copy_after(change).unwrap_err().to_string();
        assert!(error.contains("/file"), "{error}");
    }

    #[test]
    fn a_file_that_changes_while_it_is_archived_is_an_error_that_names_it() {
        copy_after(|_| {}).unwrap();
        refused(|file| std::fs::write(file, "longer content").unwrap());
        refused(|file| std::fs::write(file, "short").unwrap());
        refused(|file| std::fs::remove_file(file).unwrap());
    }

    #[test]
    fn what_takes_a_files_place_is_neither_followed_nor_waited_for() {
        refused(|file| {
            std::fs::remove_file(file).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", file).unwrap();
        });
        refused(|file| {
            std::fs::remove_file(file).unwrap();
            rustix::fs::mknodat(rustix::fs::CWD, file, FileType::Fifo, 0o600.into(), 0).unwrap();
        });
    }

    #[test]
    fn a_directory_that_becomes_a_symlink_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        let mut walk = Walk::open(dir.path(), Path::new("/nonexistent")).unwrap();
        let stamp = Stamp::of(&rustix::fs::stat(dir.path().join("d")).unwrap());
        std::fs::remove_dir(dir.path().join("d")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("d")).unwrap();
        assert!(walk.directory(b"/d", &stamp, &mut Vec::new()).is_err());
        assert!(walk.names.is_empty());
    }
}
