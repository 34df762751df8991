//! Paths that things are mounted at: checked, prepared, cleared. All of it blocks; nothing in here asks a mounted
//! filesystem of ours anything, so a dead or hung one can't hold it up.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use super::{MountError, io_error, key, sys};
use crate::fs::mountinfo::{Mount, MountTable};

/// Mounts stacked on one path that are cleared in one go. Each publish of a confused caller can add one.
const MAX_STACK: usize = 256;

/// mountinfo is read again so often before a mount counts as missing: kernels before 5.8 can leave lines out while
/// other mounts change.
const READS: usize = 3;

fn read_table() -> Result<MountTable, MountError> {
    MountTable::read().map_err(|e| io_error("reading /proc/self/mountinfo", e))
}

fn split(target: &Path) -> Result<(&Path, &std::ffi::OsStr), MountError> {
    match (target.is_absolute(), target.parent(), target.file_name()) {
        (true, Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(io_error(format!("target path {}", target.display()), "it is not an absolute path of a directory")),
    }
}

/// The target with all symlinks of its *parent* resolved. The parent must exist; the target need not.
pub(super) fn canonical(target: &Path) -> Result<PathBuf, MountError> {
    let (parent, name) = split(target)?;
    let found = parent.canonicalize().map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            MountError::NoParent { path: target.to_owned(), detail: format!("its parent {}: {e}", parent.display()) }
        }
        _ => io_error(format!("parent directory {} of the target path", parent.display()), e),
    })?;
    if !found.is_dir() {
        let detail = format!("its parent {}: not a directory", parent.display());
        return Err(MountError::NoParent { path: target.to_owned(), detail });
    }
    Ok(found.join(name))
}

/// As [`canonical`]; where parents are gone, of what is left of them.
pub(super) fn canonical_or_gone(target: &Path) -> Result<PathBuf, MountError> {
    let (parent, name) = split(target)?;
    for ancestor in parent.ancestors() {
        match (ancestor.canonicalize(), parent.strip_prefix(ancestor)) {
            (Ok(found), Ok(gone)) => return Ok(found.join(gone).join(name)),
            (Err(e), _) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(io_error(format!("parent directory {} of the target path", parent.display()), e));
            }
            _ => {}
        }
    }
    Ok(target.to_owned())
}

/// A subPath as a user writes it, normalised: `None` is the shown root. Absolute paths and `..` are refused.
pub(super) fn sub_path(text: &str) -> Result<Option<PathBuf>, MountError> {
    let refused = |detail: &str| MountError::SubPath { sub_path: text.to_owned(), detail: detail.to_owned() };
    if text.contains('\0') {
        return Err(refused("it holds a NUL byte"));
    }
    let mut path = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir => return Err(refused("\"..\" is not allowed; name the directory itself")),
            Component::RootDir | Component::Prefix(_) => {
                return Err(refused(
                    "it is absolute; write it relative to the image's root, without the leading slash",
                ));
            }
        }
    }
    Ok((!path.as_os_str().is_empty()).then_some(path))
}

/// Makes sure that there is an empty directory (or file) to mount on; true: it was made, so it is ours to remove.
pub(super) fn prepare(target: &Path, is_dir: bool) -> Result<bool, MountError> {
    let busy = |detail: &str| MountError::Busy { path: target.to_owned(), detail: detail.to_owned() };
    let what = || format!("preparing the target path {}", target.display());
    match std::fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => {
            let mut entries = std::fs::read_dir(target).map_err(|e| io_error(what(), e))?;
            if entries.next().is_some() {
                return Err(busy("the directory is not empty, mounting would hide its content; move that away"));
            }
            if is_dir {
                return Ok(false);
            }
            // The volume is a file: an empty directory in its place is of no use to anybody.
            std::fs::remove_dir(target).map_err(|e| io_error(what(), e))?;
        }
        Ok(found) if found.is_file() => {
            if found.len() > 0 {
                return Err(busy("a file with content lies there; move it away"));
            }
            if !is_dir {
                return Ok(false);
            }
            std::fs::remove_file(target).map_err(|e| io_error(what(), e))?;
        }
        Ok(found) if found.is_symlink() => return Err(busy("it is a symbolic link; remove it")),
        Ok(_) => return Err(busy("it is neither a directory nor a file; remove it")),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(io_error(what(), e)),
    }
    let made = if is_dir {
        std::fs::DirBuilder::new().mode(0o750).create(target)
    } else {
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(target).map(drop)
    };
    made.map_err(|e| io_error(what(), e))?;
    Ok(true)
}

/// Removes what [`prepare`] made, or found: an empty directory or an empty file. Anything else stays, with a warning:
/// what is in there is not ours.
pub(super) fn remove(target: &Path) -> Result<(), MountError> {
    let removed = match std::fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => std::fs::remove_dir(target),
        Ok(found) if found.is_file() && found.len() == 0 => std::fs::remove_file(target),
        Ok(_) => Err(ErrorKind::DirectoryNotEmpty.into()),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {
            tracing::warn!(path = %target.display(), "the target path is not empty after its unmount, so it stays");
            Ok(())
        }
        Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(io_error(format!("removing the target path {}", target.display()), e))
        }
        _ => Ok(()),
    }
}

fn foreign(path: &Path, mount: &Mount) -> MountError {
    let detail =
        format!("{} ({}) is mounted there, not by this plugin; unmount it", mount.source.display(), mount.fs_type);
    MountError::Busy { path: path.to_owned(), detail }
}

fn detach(path: &Path) -> Result<(), MountError> {
    sys::detach(path).map_err(|e| io_error(format!("unmounting {}", path.display()), e))
}

fn too_many(path: &Path) -> MountError {
    io_error(format!("unmounting {}", path.display()), format!("there are still mounts after {MAX_STACK} unmounts"))
}

fn clear_if(path: &Path, may: impl Fn(&Mount) -> bool) -> Result<(), MountError> {
    for _ in 0..MAX_STACK {
        let table = read_table()?;
        let Some(mount) = table.top(path) else { return Ok(()) };
        if !may(mount) {
            return Err(foreign(path, mount));
        }
        detach(path)?;
    }
    Err(too_many(path))
}

fn is_own(mount: &Mount, own: &str) -> bool {
    key::ours(mount).is_some_and(|(instance, _)| instance == own)
}

/// Takes away all mounts of this installation at a path but the lowest, and returns that one. Something else there: busy.
pub(super) fn thin(path: &Path, own: &str) -> Result<Option<Mount>, MountError> {
    for _ in 0..MAX_STACK {
        let table = read_table()?;
        let Some(top) = table.top(path) else { return Ok(None) };
        for mount in [Some(top), table.below(top)].into_iter().flatten() {
            if !is_own(mount, own) {
                return Err(foreign(path, mount));
            }
        }
        if table.below(top).is_none() {
            return Ok(Some(top.clone()));
        }
        detach(path)?;
    }
    Err(too_many(path))
}

/// How a mount takes the place of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swap {
    /// Beneath it, and then the other one is detached. Needs Linux 6.5.
    Beneath,
    /// On top of it. The other one stays below, one at most, until the target is unpublished.
    Above,
}

/// Puts a mount where one of an earlier session may lie. A container that starts meanwhile sees one or the other, the dead
/// one or the new one, but never the empty directory beneath.
pub(super) fn replace(tree: &OwnedFd, path: &Path, is_dir: bool, own: &str, swap: Swap) -> Result<(), MountError> {
    let attaching = |e| io_error(format!("mounting {}", path.display()), e);
    let Some(old) = thin(path, own)? else {
        prepare(path, is_dir)?;
        return sys::attach(tree, path).map_err(attaching);
    };
    // Whatever the reason for which it can't go beneath: above it can.
    if swap == Swap::Above || sys::attach_beneath(tree, path).is_err() {
        return sys::attach(tree, path).map_err(attaching);
    }
    match read_table()?.top(path) {
        Some(top) if top.id == old.id => detach(path),
        Some(top) => Err(foreign(path, top)),
        None => Ok(()),
    }
}

/// Detaches all clip-csi mounts at a path, whoever made them, until mountinfo shows none. Something else there: busy, untouched.
pub(super) fn clear(path: &Path) -> Result<(), MountError> {
    clear_if(path, |mount| key::ours(mount).is_some())
}

/// As [`clear`], but only the mounts of this installation.
pub(super) fn clear_own(path: &Path, own: &str) -> Result<(), MountError> {
    clear_if(path, |mount| is_own(mount, own))
}

/// How a shared mount is found in mountinfo.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin<'a> {
    /// Where it lies.
    pub mountpoint: &'a Path,
    /// Its source column.
    pub fs_name: &'a str,
}

impl Origin<'_> {
    /// The mount at the top of `path`, if it is the shared mount or a bind of it. A bind of an earlier, dead session has
    /// the same name but another device.
    fn at<'t>(&self, table: &'t MountTable, path: &Path) -> Option<&'t Mount> {
        let shared = table.top(self.mountpoint).filter(|mount| mount.source == self.fs_name)?;
        table.top(path).filter(|mount| mount.source == self.fs_name && mount.device == shared.device)
    }

    /// Does mountinfo show the shared mount, or any part of it, at the top of `path`?
    pub(super) fn is_at(&self, path: &Path) -> Result<bool, MountError> {
        Ok(self.at(&read_table()?, path).is_some())
    }

    /// Does mountinfo show the shared mount, or the path `inside` it, at the top of `path`?
    pub(super) fn shows(&self, path: &Path, inside: Option<&Path>) -> Result<bool, MountError> {
        Ok(self.at(&read_table()?, path).is_some_and(|mount| is_root(mount, inside)))
    }

    /// As [`Self::shows`], for a mount that was made just now: an error says what is there instead, or which flag it lacks.
    pub(super) fn verify(&self, path: &Path, inside: Option<&Path>) -> Result<(), MountError> {
        let failed = |detail: String| Err(io_error(format!("mounting {}", path.display()), detail));
        let mut found = String::new();
        for _ in 0..READS {
            let table = read_table()?;
            match self.at(&table, path) {
                Some(mount) if is_root(mount, inside) => {
                    let lacks: Vec<_> =
                        ["ro", "nosuid", "nodev"].into_iter().filter(|o| !mount.has_option(o)).collect();
                    return if lacks.is_empty() {
                        Ok(())
                    } else {
                        failed(format!("the mount lacks {}", lacks.join(", ")))
                    };
                }
                _ => {
                    found = table.top(path).map_or_else(
                        || "nothing".to_owned(),
                        |mount| format!("{} of {}", mount.root.display(), mount.source.display()),
                    );
                }
            }
        }
        failed(format!("mountinfo shows {found} there, not {}", self.fs_name))
    }
}

fn is_root(mount: &Mount, inside: Option<&Path>) -> bool {
    mount.root == Path::new("/").join(inside.unwrap_or(Path::new("")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_paths_are_normalised_and_kept_inside() {
        assert_eq!(sub_path("usr//bin/./x/").unwrap(), Some("usr/bin/x".into()));
        assert_eq!(sub_path("").unwrap(), None);
        assert_eq!(sub_path("./").unwrap(), None);
        for refused in ["..", "a/../b", "/etc", "a/..", "a\0b"] {
            assert!(matches!(sub_path(refused), Err(MountError::SubPath { .. })), "{refused}");
        }
    }

    #[test]
    fn targets_are_named_by_their_real_parent() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("pods")).unwrap();
        std::os::unix::fs::symlink("pods", real.join("link")).unwrap();
        assert_eq!(canonical(&real.join("link/t")).unwrap(), real.join("pods/t"));
        assert_eq!(canonical_or_gone(&real.join("link/gone/too/t")).unwrap(), real.join("pods/gone/too/t"));
        std::fs::write(real.join("file"), "").unwrap();
        for parent in ["absent", "file", "absent/too"] {
            let error = canonical(&real.join(parent).join("t")).unwrap_err();
            assert!(matches!(error, MountError::NoParent { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(parent) && text.contains("create the parent directory"), "{text}");
        }
        for bad in ["t", "/", "/a/.."] {
            assert!(canonical(Path::new(bad)).is_err(), "{bad}");
            assert!(canonical_or_gone(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_ours_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let full = dir.path().join("full");
        std::fs::create_dir(&full).unwrap();
        std::fs::write(full.join("data"), b"x").unwrap();
        remove(&full).unwrap();
        remove(&full.join("data")).unwrap();
        remove(&full.join("data/below")).unwrap();
        assert_eq!(std::fs::read(full.join("data")).unwrap(), b"x");
        assert!(matches!(prepare(&full, true), Err(MountError::Busy { .. })));
        assert!(matches!(prepare(&full.join("data"), false), Err(MountError::Busy { .. })));
        std::os::unix::fs::symlink("full", dir.path().join("link")).unwrap();
        assert!(matches!(prepare(&dir.path().join("link"), true), Err(MountError::Busy { .. })));
    }

    #[test]
    fn a_target_of_the_wrong_kind_is_replaced_only_while_empty() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t");
        assert!(prepare(&target, true).unwrap());
        assert!(!prepare(&target, true).unwrap());
        assert!(prepare(&target, false).unwrap());
        assert!(target.is_file());
        remove(&target).unwrap();
        assert!(!target.exists());
    }
}
