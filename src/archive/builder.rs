//! Collects names in any order and makes a [`Tree`] of them. What can't be shown by a kernel (`..`, NUL, a path that is
//! there twice, absurd lengths) is refused here, whoever the names come from; cycles are impossible, since a parent is
//! found by its path.

use std::collections::HashMap;

use super::ArchiveError;
use super::tree::{BlobIx, Extent, Kind, Node, PackedTime, SPARSE, Sparse, Timestamp, XATTRS, Xattr, XattrSet};
use crate::units::Digest;

/// Longest path in bytes: Linux's PATH_MAX without the final NUL. It bounds the depth too.
pub const MAX_PATH_LEN: usize = 4095;
/// Longest name in bytes: NAME_MAX of every Linux filesystem that images are made on.
pub const MAX_NAME_LEN: usize = 255;
/// Longest symlink target in bytes: the kernel's limit (one page, less a NUL).
pub const MAX_TARGET_LEN: usize = 4095;
/// Longest xattr value in bytes: XATTR_SIZE_MAX.
const MAX_XATTR_LEN: usize = 65536;

/// One name to insert into a [`TreeBuilder`].
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct Entry {
    pub kind: Kind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes (regular files only).
    pub size: u64,
    pub rdev: u32,
    /// Out of a tree's range (see [`Timestamp`]): the mtime is taken.
    pub atime: Timestamp,
    /// Out of range: the epoch is taken.
    pub mtime: Timestamp,
    /// Out of range: the mtime is taken.
    pub ctime: Timestamp,
    /// Symlinks.
    pub target: Vec<u8>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub content_hash: Option<Digest>,
    /// Data of a regular file of more than 0 bytes: blob, and either one offset or extents.
    pub blob: BlobIx,
    /// Of the first byte. Beside extents (v1 only): where the file lies whole, holes as zeros, for readers that know no
    /// extents; 0 if nowhere (the Go module then fails to read the file, rather than read something else).
    pub offset: u64,
    pub extents: Option<Vec<Extent>>,
    /// Files with the same non-zero group are names of one inode; the first name in path order gives the attributes.
    pub link_group: u64,
}

impl Entry {
    /// An entry of `kind` with permission bits `mode`; all else 0, empty or none.
    pub fn new(kind: Kind, mode: u16) -> Self {
        Self {
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            rdev: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            target: Vec::new(),
            xattrs: Vec::new(),
            content_hash: None,
            blob: BlobIx(0),
            offset: 0,
            extents: None,
            link_group: 0,
        }
    }
}

/// An [`Entry`] that borrows, so that decoding a node allocates nothing of its own.
pub(super) struct EntryRef<'a> {
    pub kind: Kind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub rdev: u32,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub target: &'a [u8],
    pub xattrs: &'a [(&'a [u8], &'a [u8])],
    pub content_hash: Option<Digest>,
    pub blob: BlobIx,
    pub offset: u64,
    pub extents: Option<&'a [Extent]>,
    pub link_group: u64,
}

/// A name as it waits for [`TreeBuilder::finish`].
#[derive(Debug)]
pub(super) struct Raw {
    /// Its path in [`TreeBuilder::paths`], without the root's slash: the root's is empty.
    pub path: u64,
    pub path_len: u16,
    /// Index in [`TreeBuilder::hashes`], or [`NONE`].
    pub hash: u32,
    /// Index in [`TreeBuilder::xattr_sets`], or [`NONE`].
    pub xattrs: u32,
    pub link_group: u64,
    /// `name`, `parent` and `nlink` are set by `finish`.
    pub node: Node,
}

pub(super) const NONE: u32 = u32::MAX;

/// Collects names in any order and makes a [`super::Tree`].
#[derive(Debug, Default)]
pub struct TreeBuilder {
    pub(super) paths: Vec<u8>,
    pub(super) raws: Vec<Raw>,
    pub(super) targets: Vec<u8>,
    pub(super) owners: Vec<(u32, u32)>,
    owner_ix: HashMap<(u32, u32), u32>,
    pub(super) sparse: Vec<Sparse>,
    pub(super) extents: Vec<Extent>,
    pub(super) hashes: Vec<Digest>,
    pub(super) xattr_sets: Vec<XattrSet>,
    xattr_ix: HashMap<XattrSet, u32>,
    /// Link groups come from an archive: believed only where kind, mode, owner, size and data location agree.
    pub(super) check_links: bool,
    /// Names below a non-directory are left out, not refused.
    pub(super) drop_orphans: bool,
    pub(super) error: Option<ArchiveError>,
}

impl TreeBuilder {
    /// A builder for names read from an archive: a link group is believed only where kind, mode, owner, size and data
    /// location agree.
    pub(super) fn of_archive() -> Self {
        Self { check_links: true, ..Self::default() }
    }

    /// From now on names below a non-directory are left out rather than refused: the Go module leaves them in its indexes
    /// where an upper layer replaces a directory, and never shows them.
    pub(super) fn drop_orphans(&mut self) {
        self.drop_orphans = true;
    }

    /// Makes room for `names` more.
    pub(super) fn reserve(&mut self, names: usize) {
        self.raws.reserve(names);
    }

    /// Adds one name. `path` is absolute, `/`-separated, normalised by the caller's rules; `.`/`..`/empty components, NUL and a
    /// duplicate are errors of [`Self::finish`]. Missing parents are implied (mode 0755, root-owned, the mtime of the child).
    pub fn insert(&mut self, path: &[u8], entry: Entry) {
        let xattrs: Vec<_> = entry.xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())).collect();
        self.insert_ref(
            path,
            &EntryRef {
                kind: entry.kind,
                mode: entry.mode,
                uid: entry.uid,
                gid: entry.gid,
                size: entry.size,
                rdev: entry.rdev,
                atime: entry.atime,
                mtime: entry.mtime,
                ctime: entry.ctime,
                target: &entry.target,
                xattrs: &xattrs,
                content_hash: entry.content_hash,
                blob: entry.blob,
                offset: entry.offset,
                extents: entry.extents.as_deref(),
                link_group: entry.link_group,
            },
        );
    }

    /// [`Self::insert`] without ownership. Allocates only where the builder's own tables grow.
    pub(super) fn insert_ref(&mut self, path: &[u8], entry: &EntryRef<'_>) {
        if self.error.is_some() {
            return;
        }
        if let Err(detail) = self.try_insert(path, entry) {
            self.error = Some(corrupt(path, &detail));
        }
    }

    fn try_insert(&mut self, path: &[u8], entry: &EntryRef<'_>) -> Result<(), String> {
        check_path(path)?;
        let path = if path == b"/" { &[] } else { path };
        if path.is_empty() && entry.kind != Kind::Dir {
            return Err("the root is not a directory".into());
        }
        let mtime = PackedTime::new(entry.mtime).unwrap_or(PackedTime::EPOCH);
        let mut node = Node {
            size: 0,
            data: 0,
            atime: PackedTime::new(entry.atime).unwrap_or(mtime),
            mtime,
            ctime: PackedTime::new(entry.ctime).unwrap_or(mtime),
            name: 0,
            parent: 0,
            nlink: 1,
            owner: self.owner(entry.uid, entry.gid),
            mode: Node::pack_mode(entry.kind, entry.mode),
            blob: 0,
            name_len: 0,
            flags: 0,
        };
        match entry.kind {
            Kind::File if entry.size > 0 => self.place_data(&mut node, entry)?,
            Kind::Symlink => {
                if entry.target.len() > MAX_TARGET_LEN || entry.target.contains(&0) {
                    return Err(format!("its target has a NUL or is longer than {MAX_TARGET_LEN} bytes"));
                }
                node.data = self.targets.len() as u64;
                node.size = entry.target.len() as u64;
                self.targets.extend_from_slice(entry.target);
            }
            Kind::CharDevice | Kind::BlockDevice => node.data = entry.rdev.into(),
            _ => {}
        }
        let hash = match entry.content_hash {
            Some(hash) if entry.kind == Kind::File => {
                self.hashes.push(hash);
                (self.hashes.len() - 1) as u32
            }
            _ => NONE,
        };
        let xattrs = if entry.xattrs.is_empty() { NONE } else { self.xattr_set(entry.xattrs)? };
        if xattrs != NONE {
            node.flags |= XATTRS;
        }
        let link_group = if entry.kind == Kind::Dir { 0 } else { entry.link_group };
        self.raws.push(Raw {
            path: self.paths.len() as u64,
            path_len: path.len() as u16,
            hash,
            xattrs,
            link_group,
            node,
        });
        self.paths.extend_from_slice(path);
        Ok(())
    }

    /// Sets size and location of a file of more than 0 bytes.
    fn place_data(&mut self, node: &mut Node, entry: &EntryRef<'_>) -> Result<(), String> {
        let end_fits = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
        if !end_fits(entry.offset, entry.size) {
            return Err(format!("{} bytes at offset {} are beyond any file's end", entry.size, entry.offset));
        }
        node.size = entry.size;
        node.blob = entry.blob.0;
        let Some(extents) = entry.extents else {
            node.data = entry.offset;
            return Ok(());
        };
        let mut end = 0;
        for extent in extents {
            if extent.len == 0 || extent.offset < end || !end_fits(extent.blob_offset, extent.len) {
                return Err("its extents are empty, out of order, overlapping or beyond any blob's end".into());
            }
            end = extent.offset.checked_add(extent.len).filter(|&end| end <= entry.size).ok_or_else(|| {
                format!("an extent of {} bytes at {} ends behind its {} bytes", extent.len, extent.offset, entry.size)
            })?;
        }
        node.flags |= SPARSE;
        node.data = self.sparse.len() as u64;
        let first = u32::try_from(self.extents.len()).map_err(|_| "more than 2^32 extents in all")?;
        self.sparse.push(Sparse { first, count: extents.len() as u32, image: entry.offset });
        self.extents.extend_from_slice(extents);
        Ok(())
    }

    fn owner(&mut self, uid: u32, gid: u32) -> u32 {
        // Nearly all names belong to the same few owners, one after the other.
        if let Some(last) = self.raws.last()
            && self.owners[last.node.owner as usize] == (uid, gid)
        {
            return last.node.owner;
        }
        *self.owner_ix.entry((uid, gid)).or_insert_with(|| {
            self.owners.push((uid, gid));
            (self.owners.len() - 1) as u32
        })
    }

    fn xattr_set(&mut self, xattrs: &[(&[u8], &[u8])]) -> Result<u32, String> {
        let mut set: Vec<Xattr> = xattrs.iter().map(|&(name, value)| (name.into(), value.into())).collect();
        set.sort_unstable();
        for (at, (name, value)) in set.iter().enumerate() {
            let shown = show(name);
            if name.is_empty() || name.len() > MAX_NAME_LEN || name.contains(&0) || value.len() > MAX_XATTR_LEN {
                return Err(format!("the xattr {shown} has no proper name or is over {MAX_XATTR_LEN} bytes"));
            }
            if at > 0 && set[at - 1].0 == *name {
                return Err(format!("the xattr {shown} is there twice"));
            }
        }
        let set = set.into_boxed_slice();
        if let Some(&ix) = self.xattr_ix.get(&set) {
            return Ok(ix);
        }
        let ix = self.xattr_sets.len() as u32;
        self.xattr_ix.insert(set.clone(), ix);
        self.xattr_sets.push(set);
        Ok(ix)
    }
}

fn check_path(path: &[u8]) -> Result<(), String> {
    if path == b"/" {
        return Ok(());
    }
    if path.len() > MAX_PATH_LEN {
        return Err(format!("a path of {} bytes, the limit is {MAX_PATH_LEN}", path.len()));
    }
    if path.contains(&0) {
        return Err("a path with a NUL byte".into());
    }
    let Some(relative) = path.strip_prefix(b"/") else {
        return Err("a path that does not start with a slash".into());
    };
    for name in relative.split(|&b| b == b'/') {
        match name {
            b"" => return Err("a path with an empty component".into()),
            b"." | b".." => return Err("a path with a . or .. component".into()),
            _ if name.len() > MAX_NAME_LEN => {
                return Err(format!("a name of {} bytes, the limit is {MAX_NAME_LEN}", name.len()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A path or name from outside, on one line and cut to 200 characters.
pub(super) fn show(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(800)]);
    format!("{:?}", text.chars().take(200).collect::<String>())
}

/// The error that names `path`.
pub(super) fn corrupt(path: &[u8], detail: &str) -> ArchiveError {
    let path = if path.is_empty() { b"/" } else { path };
    ArchiveError::Corrupt { what: "index", detail: format!("{}: {detail}", show(path)) }
}
