//! Layers become one tree, by the OCI rules. Pure: entries in, names out.
//!
//! A layer is applied in two steps: first all of its whiteouts, then its entries in order. So a whiteout hides what *lower* layers
//! hold and never a sibling of its own layer, wherever it stands in the tar.
//!
//! Where the specification is silent, real unpackers decide (containerd and umoci agree, `tests/merge_oracle.rs` compares):
//! - A symlink in the *parent* part of a path is followed inside the image, whichever layer made it: `lib/x` over `lib -> usr/lib`
//!   lands in `usr/lib/x`. A symlink as the *last* part is replaced, also by a directory.
//! - A directory over a directory keeps the children and takes the new attributes; anything else over anything else replaces it with all
//!   that is below.
//! - A hard link names the file that its target names at that point of the stream, be it of this layer or a lower one; where there is none
//!   yet, the one at the end of the layer. Its own header's attributes are ignored, they are the file's. Replacing one
//!   name leaves the others.
//! - Names below `.wh..wh.` at the root are AUFS' bookkeeping: hard links may point there, nobody sees them.
//!
//! Two rules are ours, where unpackers depend on the order of entries or give up: a whiteout below a symlink that the layer itself replaces
//! hides nothing (the directory is new), and a file of a lower layer that is used as a parent gives way to a directory.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap, HashSet};

use super::tar::{EntryKind, MAX_PATH, TarEntry, show};
use crate::archive::{BlobIx, Entry, Extent, Kind, Timestamp};

/// Symlinks followed for one path, as in Linux.
const MAX_LINKS: u32 = 40;
/// Symlinks followed for a whole image: two for each of the entries that a layer may have.
const MAX_LINKS_TOTAL: u64 = 4_000_000;
/// Inodes of an image, those that upper layers hide included.
const MAX_INODES: usize = 4_000_000;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS: &[u8] = b".wh..wh.";
const WHITEOUT_DIR: &str = "a name that begins with .wh. can't be a directory";

/// A layer that contradicts itself or the layers below. Names the path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {detail}")]
pub struct MergeError {
    /// The entry, made printable, with a slash in front.
    pub path: String,
    /// What is wrong.
    pub detail: String,
}

fn error(path: &[u8], detail: impl Into<String>) -> MergeError {
    MergeError { path: format!("/{}", show(path)), detail: detail.into() }
}

type Children = BTreeMap<Box<[u8]>, Slot>;
type Ino = u32;
const ROOT: Ino = 0;

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
struct Slot {
    ino: Ino,
    /// The layer that wrote the name.
    layer: u32,
}

#[derive(Debug)]
struct Inode {
    attr: Attr,
    body: Body,
}

#[derive(Debug)]
struct Attr {
    mode: u16,
    uid: u32,
    gid: u32,
    rdev: u32,
    mtime: Timestamp,
    atime: Timestamp,
    ctime: Timestamp,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attr {
    /// Of a directory that no layer describes.
    fn implied(mtime: Timestamp) -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, rdev: 0, mtime, atime: mtime, ctime: mtime, xattrs: Vec::new() }
    }
}

#[derive(Debug)]
enum Body {
    Dir(Children),
    File {
        blob: BlobIx,
        size: u64,
        offset: u64,
        extents: Option<Vec<Extent>>,
    },
    Symlink(Box<[u8]>),
    Special(Kind),
    /// A hard link whose target has not come yet: its place in [`Merger::pending`].
    Pending(usize),
}

/// A hard link that waits for the end of its layer.
#[derive(Debug)]
struct Pending {
    path: Box<[u8]>,
    target: Box<[u8]>,
    ino: Ino,
    /// The directory that got its name: by the end of the layer the path may lead elsewhere.
    dir: Ino,
    /// What the target named before this layer's whiteouts.
    hidden: Option<Ino>,
}

/// A directory reached by a path.
#[derive(Debug, Clone, Copy)]
struct Place {
    dir: Ino,
    /// Length of its path with all symlinks resolved.
    len: usize,
}

/// The merged tree under construction. Memory: the live and the hidden inodes of all layers.
#[derive(Debug)]
pub struct Merger {
    inodes: Vec<Inode>,
    layer: u32,
    pending: Vec<Pending>,
    followed: u64,
    /// The parent of the last entry and where it led. Forgotten when a directory or symlink is unlinked.
    last: Option<(Vec<u8>, Place)>,
}

impl Default for Merger {
    fn default() -> Self {
        let root = Inode { attr: Attr::implied(Timestamp::default()), body: Body::Dir(Children::new()) };
        Self { inodes: vec![root], layer: 0, pending: Vec::new(), followed: 0, last: None }
    }
}

/// Whether the layer at hand writes a path itself.
type Own<'a> = &'a dyn Fn(&[u8]) -> bool;

/// What a whiteout's name says.
enum Whiteout<'a> {
    Hide(&'a [u8]),
    Opaque,
}

/// Parent and last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Is the entry a whiteout? Refuses names that could be neither a whiteout nor a file.
fn whiteout(path: &[u8]) -> Result<Option<Whiteout<'_>>, MergeError> {
    let (parent, name) = split(path);
    if name == OPAQUE {
        return Ok(Some(Whiteout::Opaque));
    }
    if path.starts_with(AUFS) {
        return Ok(None);
    }
    if parent.split(|b| *b == b'/').any(|part| part.starts_with(WHITEOUT)) {
        return Err(error(path, WHITEOUT_DIR));
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(None),
        Some(b"" | b"." | b"..") => Err(error(path, "a whiteout must name what it hides")),
        Some(hidden) => Ok(Some(Whiteout::Hide(hidden))),
    }
}

impl Merger {
    /// An empty image: a root of mode 0755 owned by 0:0, dated at the epoch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies the next layer. `blob` is what its files' offsets refer to. After an error the merger is not to be used again.
    pub fn apply(&mut self, blob: BlobIx, mut entries: Vec<TarEntry>) -> Result<(), MergeError> {
        self.layer += 1;
        let mut refused = None;
        let is_whiteout = |entry: &mut TarEntry| match whiteout(&entry.path) {
            Ok(found) => found.is_some(),
            Err(error) => {
                refused.get_or_insert(error);
                false
            }
        };
        let whiteouts: Vec<TarEntry> = entries.extract_if(.., is_whiteout).collect();
        if let Some(error) = refused {
            return Err(error);
        }
        let hidden = self.apply_whiteouts(&whiteouts, &entries)?;
        for (i, entry) in entries.into_iter().enumerate() {
            self.add(blob, entry, hidden.get(&i).copied())?;
        }
        self.settle_links()?;
        self.drop_aufs();
        Ok(())
    }

    /// Hides what the whiteouts name; answers what the hard links (by position) named before.
    fn apply_whiteouts(
        &mut self,
        whiteouts: &[TarEntry],
        plain: &[TarEntry],
    ) -> Result<HashMap<usize, Ino>, MergeError> {
        let mut hidden = HashMap::new();
        if whiteouts.is_empty() {
            return Ok(hidden);
        }
        for (i, entry) in plain.iter().enumerate().filter(|(_, e)| e.kind == EntryKind::HardLink) {
            if let Some(ino) = self.lookup(&entry.link)? {
                hidden.insert(i, ino);
            }
        }
        // Made once a symlink is on the way of a whiteout, which is rare.
        let paths: OnceCell<HashSet<&[u8]>> = OnceCell::new();
        let own = |path: &[u8]| paths.get_or_init(|| plain.iter().map(|e| &*e.path).collect()).contains(path);
        for TarEntry { path, .. } in whiteouts {
            let (parent, _) = split(path);
            let Some(place) = self.walk(path, parent, None, Some(&own))? else { continue };
            match whiteout(path)? {
                Some(Whiteout::Hide(name)) => self.unlink(place.dir, name),
                Some(Whiteout::Opaque) => {
                    self.last = None;
                    if let Some(children) = self.children_mut(place.dir) {
                        children.clear();
                    }
                }
                None => {}
            }
        }
        Ok(hidden)
    }

    fn add(&mut self, blob: BlobIx, entry: TarEntry, hidden: Option<Ino>) -> Result<(), MergeError> {
        let TarEntry { path, kind, mode, uid, gid, mtime, atime, ctime, rdev, link, xattrs, size, offset, extents } =
            entry;
        let attr = Attr { mode, uid, gid, rdev, mtime, atime, ctime, xattrs };
        if path.is_empty() {
            if kind != EntryKind::Dir {
                return Err(error(&path, "the root of the image must be a directory"));
            }
            self.inodes[ROOT as usize].attr = attr;
            return Ok(());
        }
        let (parent, name) = split(&path);
        let dir = self.parent(&path, parent, name, mtime)?;
        let body = match kind {
            EntryKind::Dir => {
                if let Some(slot) = self.child(dir, name) {
                    let old = &mut self.inodes[slot.ino as usize];
                    if let Body::Dir(_) = old.body {
                        old.attr = attr;
                        return Ok(());
                    }
                }
                Body::Dir(Children::new())
            }
            EntryKind::HardLink => {
                if let Some(ino) = self.lookup(&link)?
                    && !matches!(self.inodes[ino as usize].body, Body::Pending(_))
                {
                    self.check_linkable(&path, &link, ino)?;
                    self.link(dir, name, ino);
                    return Ok(());
                }
                let ino = self.inode(&path, attr, Body::Pending(self.pending.len()))?;
                self.link(dir, name, ino);
                self.pending.push(Pending { path, target: link, ino, dir, hidden });
                return Ok(());
            }
            EntryKind::File => Body::File { blob, size, offset, extents },
            EntryKind::Symlink => Body::Symlink(link),
            EntryKind::Fifo => Body::Special(Kind::Fifo),
            EntryKind::CharDevice => Body::Special(Kind::CharDevice),
            EntryKind::BlockDevice => Body::Special(Kind::BlockDevice),
        };
        let ino = self.inode(&path, attr, body)?;
        self.link(dir, name, ino);
        Ok(())
    }

    /// Links that waited: each gets the file at the end of its chain of targets.
    fn settle_links(&mut self) -> Result<(), MergeError> {
        let pending = std::mem::take(&mut self.pending);
        let missing = |link: &Pending| {
            let target = show(&link.target);
            error(&link.path, format!("a hard link to /{target}, which is in no layer up to this one"))
        };
        let mut settled: Vec<Option<Ino>> = vec![None; pending.len()];
        let mut dangling = false;
        for first in 0..pending.len() {
            // Follow until something real; every link on the way gets it, so each is followed once.
            let (mut chain, mut at) = (Vec::new(), first);
            let found = loop {
                if let Some(ino) = settled[at] {
                    break ino;
                }
                chain.push(at);
                let link = &pending[at];
                if chain.len() > pending.len() {
                    return Err(missing(link));
                }
                match self.lookup(&link.target)?.or(link.hidden) {
                    None => {
                        dangling = true;
                        break link.ino;
                    }
                    Some(ino) => match self.inodes[ino as usize].body {
                        Body::Pending(next) => at = next,
                        _ => {
                            self.check_linkable(&link.path, &link.target, ino)?;
                            break ino;
                        }
                    },
                }
            };
            for at in chain {
                settled[at] = Some(found);
            }
        }
        for (link, found) in pending.iter().zip(settled) {
            let (_, name) = split(&link.path);
            if self.child(link.dir, name).is_some_and(|slot| slot.ino == link.ino) {
                self.link(link.dir, name, found.unwrap_or(link.ino));
            }
        }
        // Where the link's own name has been replaced since, nobody misses the target.
        match if dangling { self.first_pending() } else { None } {
            Some(at) => Err(missing(&pending[at])),
            None => Ok(()),
        }
    }

    /// Some hard link without its file that still has a name. Looks at all of the tree.
    fn first_pending(&self) -> Option<usize> {
        let mut dirs = vec![ROOT];
        while let Some(dir) = dirs.pop() {
            let Body::Dir(children) = &self.inodes[dir as usize].body else { continue };
            for slot in children.values() {
                match self.inodes[slot.ino as usize].body {
                    Body::Dir(_) => dirs.push(slot.ino),
                    Body::Pending(at) => return Some(at),
                    _ => {}
                }
            }
        }
        None
    }

    fn check_linkable(&self, path: &[u8], target: &[u8], ino: Ino) -> Result<(), MergeError> {
        match self.inodes[ino as usize].body {
            Body::Dir(_) => Err(error(path, format!("a hard link to /{}, which is a directory", show(target)))),
            _ => Ok(()),
        }
    }

    fn drop_aufs(&mut self) {
        let names: Vec<Box<[u8]>> = match &self.inodes[ROOT as usize].body {
            Body::Dir(children) => children.keys().filter(|name| name.starts_with(AUFS)).cloned().collect(),
            _ => return,
        };
        names.iter().for_each(|name| self.unlink(ROOT, name));
    }

    /// The directory that is to hold an entry; what is missing of its path is made.
    fn parent(&mut self, path: &[u8], parent: &[u8], name: &[u8], mtime: Timestamp) -> Result<Ino, MergeError> {
        let place = match &self.last {
            Some((last, place)) if last == parent => *place,
            _ => {
                let place = self.walk(path, parent, Some(mtime), None)?;
                let place = place.ok_or_else(|| error(path, "its parent can't be made"))?;
                self.last = Some((parent.to_vec(), place));
                place
            }
        };
        if place.len + 1 + name.len() > MAX_PATH {
            return Err(error(path, format!("with its symlinks resolved, its path is over {MAX_PATH} bytes")));
        }
        Ok(place.dir)
    }

    /// The inode that a path names; a symlink as its last component is not followed.
    fn lookup(&mut self, path: &[u8]) -> Result<Option<Ino>, MergeError> {
        if path.is_empty() {
            return Ok(Some(ROOT));
        }
        let (parent, name) = split(path);
        let place = match &self.last {
            Some((last, place)) if last == parent => Some(*place),
            _ => self.walk(path, parent, None, None)?,
        };
        Ok(place.and_then(|place| self.child(place.dir, name)).map(|slot| slot.ino))
    }

    /// Goes to a directory, following symlinks inside the image. `make`: missing directories are made, with that time; else
    /// `None` says that there is no such directory. `own`: a symlink at a path of the layer at hand
    /// will be gone, so there is nothing behind it. `path` is for messages.
    fn walk(
        &mut self,
        path: &[u8],
        dir: &[u8],
        make: Option<Timestamp>,
        own: Option<Own<'_>>,
    ) -> Result<Option<Place>, MergeError> {
        let mut rest = std::borrow::Cow::Borrowed(dir);
        let mut at = 0;
        let mut links = 0;
        // The directories from the root to here, with the lengths of their paths, and the path itself.
        let mut trail: Vec<(Ino, usize)> = Vec::with_capacity(16);
        let mut here: Vec<u8> = Vec::with_capacity(dir.len());
        let mut dir = ROOT;
        while at < rest.len() {
            let end = rest[at..].iter().position(|b| *b == b'/').map_or(rest.len(), |n| at + n);
            let part = &rest[at..end];
            let next = (end + 1).min(rest.len());
            match part {
                b"" | b"." => {
                    at = next;
                    continue;
                }
                b".." => {
                    if let Some((parent, len)) = trail.pop() {
                        dir = parent;
                        here.truncate(len);
                    }
                    at = next;
                    continue;
                }
                _ => {}
            }
            let slot = self.child(dir, part);
            let ino = match slot.map(|slot| (slot, &self.inodes[slot.ino as usize].body)) {
                Some((slot, Body::Dir(_))) => slot.ino,
                Some((_, Body::Symlink(target))) => {
                    // Names are not looked at there: they must not come to lie anywhere else.
                    if make.is_some() && path.starts_with(AUFS) {
                        return Err(error(path, "AUFS' bookkeeping behind a symlink"));
                    }
                    links += 1;
                    self.followed += 1;
                    if links > MAX_LINKS {
                        return Err(error(path, format!("over {MAX_LINKS} symlinks on its way")));
                    }
                    if self.followed > MAX_LINKS_TOTAL {
                        return Err(error(path, format!("over {MAX_LINKS_TOTAL} symlinks on the way of all entries")));
                    }
                    if let Some(own) = own {
                        let slash = if here.is_empty() { &b""[..] } else { b"/" };
                        let at = [&here[..], slash, part].concat();
                        if own(&at) {
                            return Ok(None);
                        }
                    }
                    if target.first() == Some(&b'/') {
                        trail.clear();
                        here.clear();
                        dir = ROOT;
                    }
                    rest = [target, &b"/"[..], &rest[next..]].concat().into();
                    if rest.len() > 2 * MAX_PATH {
                        return Err(error(path, "the symlinks on its way make its path too long"));
                    }
                    at = 0;
                    continue;
                }
                Some((slot, _)) => {
                    let Some(mtime) = make else { return Ok(None) };
                    if slot.layer == self.layer {
                        let parent = show(part);
                        return Err(error(path, format!("its parent {parent} is no directory in the same layer")));
                    }
                    self.make_dir(path, dir, part, mtime)?
                }
                None => {
                    let Some(mtime) = make else { return Ok(None) };
                    // The path itself was checked: this came out of a symlink. AUFS' own names are dropped in the end.
                    let aufs = path.starts_with(AUFS) || (dir == ROOT && part.starts_with(AUFS));
                    if part.starts_with(WHITEOUT) && !aufs {
                        return Err(error(path, WHITEOUT_DIR));
                    }
                    self.make_dir(path, dir, part, mtime)?
                }
            };
            trail.push((dir, here.len()));
            if !here.is_empty() {
                here.push(b'/');
            }
            here.extend_from_slice(&rest[at..end]);
            if here.len() > MAX_PATH {
                return Err(error(path, format!("with its symlinks resolved, its path is over {MAX_PATH} bytes")));
            }
            dir = ino;
            at = next;
        }
        Ok(Some(Place { dir, len: here.len() }))
    }

    fn make_dir(&mut self, path: &[u8], dir: Ino, name: &[u8], mtime: Timestamp) -> Result<Ino, MergeError> {
        let ino = self.inode(path, Attr::implied(mtime), Body::Dir(Children::new()))?;
        self.link(dir, name, ino);
        Ok(ino)
    }

    fn inode(&mut self, path: &[u8], attr: Attr, body: Body) -> Result<Ino, MergeError> {
        if self.inodes.len() >= MAX_INODES {
            return Err(error(path, format!("the image has over {MAX_INODES} files and directories")));
        }
        self.inodes.push(Inode { attr, body });
        // MAX_INODES fits.
        Ok((self.inodes.len() - 1) as Ino)
    }

    fn child(&self, dir: Ino, name: &[u8]) -> Option<Slot> {
        match &self.inodes[dir as usize].body {
            Body::Dir(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children_mut(&mut self, dir: Ino) -> Option<&mut Children> {
        match &mut self.inodes[dir as usize].body {
            Body::Dir(children) => Some(children),
            _ => None,
        }
    }

    /// Gives `ino` a name, in place of what had it.
    fn link(&mut self, dir: Ino, name: &[u8], ino: Ino) {
        let slot = Slot { ino, layer: self.layer };
        let old = self.children_mut(dir).and_then(|children| children.insert(name.into(), slot));
        self.forget(old);
    }

    fn unlink(&mut self, dir: Ino, name: &[u8]) {
        let old = self.children_mut(dir).and_then(|children| children.remove(name));
        self.forget(old);
    }

    /// A name is gone: does the remembered parent still lead where it led?
    fn forget(&mut self, old: Option<Slot>) {
        if let Some(slot) = old
            && matches!(self.inodes[slot.ino as usize].body, Body::Dir(_) | Body::Symlink(_))
        {
            self.last = None;
        }
    }

    /// Every name, the root first, each directory before what it holds. Paths are absolute, with `prefix` (`""`, or like
    /// `/rootfs`) in front; the root of an image without prefix is `/`. Names of one file share a non-zero `link_group`.
    pub fn finish(mut self, prefix: &str, sink: &mut dyn FnMut(Vec<u8>, Entry)) {
        let mut names = vec![0_u32; self.inodes.len()];
        let mut stack: Vec<(Vec<u8>, Ino)> = vec![(prefix.as_bytes().to_vec(), ROOT)];
        let mut dirs = vec![ROOT];
        while let Some(dir) = dirs.pop() {
            if let Body::Dir(children) = &self.inodes[dir as usize].body {
                for slot in children.values() {
                    names[slot.ino as usize] += 1;
                    if let Body::Dir(_) = self.inodes[slot.ino as usize].body {
                        dirs.push(slot.ino);
                    }
                }
            }
        }
        while let Some((path, ino)) = stack.pop() {
            let shared = names[ino as usize] > 1;
            let inode = &mut self.inodes[ino as usize];
            let children = match &mut inode.body {
                Body::Dir(children) => std::mem::take(children),
                _ => Children::new(),
            };
            let entry = inode.entry(if shared { u64::from(ino) } else { 0 });
            for (name, slot) in children.into_iter().rev() {
                stack.push(([&path[..], b"/", &name].concat(), slot.ino));
            }
            sink(if path.is_empty() { b"/".to_vec() } else { path }, entry);
        }
    }
}

impl Inode {
    /// The archive's view. An inode of one name is emptied, one of several is copied.
    fn entry(&mut self, link_group: u64) -> Entry {
        let attr = &mut self.attr;
        let xattrs = if link_group == 0 { std::mem::take(&mut attr.xattrs) } else { attr.xattrs.clone() };
        let mut entry = Entry {
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            atime: attr.atime,
            mtime: attr.mtime,
            ctime: attr.ctime,
            xattrs,
            link_group,
            ..Entry::new(Kind::File, attr.mode)
        };
        match &mut self.body {
            Body::Dir(_) => entry.kind = Kind::Dir,
            Body::Symlink(target) => {
                entry.kind = Kind::Symlink;
                // Whatever a tar says: no filesystem here keeps another.
                entry.mode = 0o777;
                entry.target = target.to_vec();
            }
            Body::Special(kind) => entry.kind = *kind,
            Body::File { blob, size, offset, extents } => {
                (entry.blob, entry.size, entry.offset) = (*blob, *size, *offset);
                entry.extents = if link_group == 0 { extents.take() } else { extents.clone() };
            }
            // `settle_links` leaves none that has a name.
            Body::Pending(_) => {}
        }
        entry
    }
}

#[cfg(test)]
mod tests;
