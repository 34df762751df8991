//! The filesystem tree in memory: one arena, children contiguous, names packed.
//!
//! The arena is in breadth-first order, siblings sorted by name bytes, so node numbers are a function of the tree
//! alone: a restarted server gives the kernel the same inode numbers.

use std::ops::Range;

pub use super::builder::{Entry, TreeBuilder};
use crate::units::Digest;

/// Index of a *name* in the arena; the root is 0. Several names of one hard-linked file have one [`Tree::inode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);
}

/// Index of a blob: the layer's position in `OciStorage::layers`, 0 for the data of a v1 archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobIx(pub u16);

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    File,
    Dir,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// Seconds and nanoseconds since the epoch. A tree keeps what ext4 can keep: 1901-12-13 to 2446-05-10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Timestamp {
    pub sec: i64,
    pub nsec: u32,
}

/// stat's view of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Attr {
    pub kind: Kind,
    /// Permission bits with setuid, setgid, sticky: `0o7777`; without the type.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes; for a symlink the length of its target.
    pub size: u64,
    /// Files: names of the inode. Directories: 2 + subdirectories.
    pub nlink: u32,
    /// Linux `dev_t` as `makedev` packs it (devices only).
    pub rdev: u32,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
}

/// A piece of a sparse file that holds data; what no extent covers reads as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in the uncompressed blob (v2) or in the archive file (v1).
    pub blob_offset: u64,
}

/// Where a file's bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data<'a> {
    /// Nothing to read: empty, or not a regular file.
    Empty,
    /// `size` bytes from `offset` of the uncompressed blob (v2) or of the archive file (v1).
    Contiguous {
        /// The blob.
        blob: BlobIx,
        /// Offset of the first byte.
        offset: u64,
    },
    /// A sparse file.
    Sparse {
        /// The blob.
        blob: BlobIx,
        /// Extents in file order, not overlapping.
        extents: &'a [Extent],
    },
}

/// A point in time in 8 bytes, as ext4's inodes hold it: 34 bits of seconds counted from -2^31, 30 bits of nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PackedTime(u64);

impl PackedTime {
    pub(super) const EPOCH: Self = Self((1 << 31) << 30);

    /// `None` where the time is out of range: Go's zero time (year 1) among others.
    pub(super) fn new(time: Timestamp) -> Option<Self> {
        let sec = u64::try_from(time.sec.checked_add(1 << 31)?).ok()?;
        (sec < 1 << 34 && time.nsec < 1_000_000_000).then(|| Self(sec << 30 | u64::from(time.nsec)))
    }

    fn get(self) -> Timestamp {
        Timestamp { sec: (self.0 >> 30) as i64 - (1 << 31), nsec: (self.0 & ((1 << 30) - 1)) as u32 }
    }
}

/// [`Node::flags`]: another name of the inode that `data` names.
pub(super) const LINK: u8 = 1;
/// [`Node::flags`]: `data` is an index in [`Tree::sparse`].
pub(super) const SPARSE: u8 = 2;
/// [`Node::flags`]: has an entry in [`Tree::xattr_of`].
pub(super) const XATTRS: u8 = 4;

/// One name: 64 bytes, one cache line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    /// Bytes of a file; length of a symlink's target; else 0.
    pub size: u64,
    /// Directory: first child, and in the high half their number. File: offset, or index in [`Tree::sparse`]. Symlink:
    /// offset in [`Tree::targets`]. Device: its number. [`LINK`]: the inode's node.
    pub data: u64,
    pub atime: PackedTime,
    pub mtime: PackedTime,
    pub ctime: PackedTime,
    /// Offset in [`Tree::names`].
    pub name: u32,
    pub parent: u32,
    pub nlink: u32,
    /// Index in [`Tree::owners`].
    pub owner: u32,
    /// Permission bits, and the [`Kind`] above them.
    pub mode: u16,
    pub blob: u16,
    pub name_len: u8,
    pub flags: u8,
}

impl Node {
    pub(super) fn pack_mode(kind: Kind, mode: u16) -> u16 {
        (kind as u16) << 12 | mode & 0o7777
    }

    pub(super) fn kind(&self) -> Kind {
        match self.mode >> 12 {
            0 => Kind::File,
            1 => Kind::Dir,
            2 => Kind::Symlink,
            3 => Kind::Fifo,
            4 => Kind::Socket,
            5 => Kind::CharDevice,
            _ => Kind::BlockDevice,
        }
    }
}

/// A sparse file's run in [`Tree::extents`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Sparse {
    pub first: u32,
    pub count: u32,
    /// Where a reader that knows no extents finds the whole file, holes as zeros; 0: nowhere.
    pub image: u64,
}

/// Content hashes of those nodes that have one: a bitmap, its running count, and the hashes.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    bits: Vec<u64>,
    before: Vec<u32>,
    hashes: Vec<Digest>,
}

impl Hashes {
    pub(super) fn collect(nodes: usize, of: impl Fn(usize) -> Option<Digest>) -> Self {
        let count = (0..nodes).filter(|&i| of(i).is_some()).count();
        if count == 0 {
            return Self::default();
        }
        let words = nodes.div_ceil(64);
        let mut out = Self { bits: vec![0; words], before: vec![0; words], hashes: Vec::with_capacity(count) };
        for i in 0..nodes {
            if i % 64 == 0 {
                out.before[i / 64] = out.hashes.len() as u32;
            }
            if let Some(hash) = of(i) {
                out.bits[i / 64] |= 1 << (i % 64);
                out.hashes.push(hash);
            }
        }
        out
    }

    fn get(&self, i: usize) -> Option<Digest> {
        let word = *self.bits.get(i / 64)?;
        let bit = 1u64 << (i % 64);
        if word & bit == 0 {
            return None;
        }
        self.hashes.get((self.before[i / 64] + (word & (bit - 1)).count_ones()) as usize).copied()
    }
}

/// An extended attribute: name and value.
pub type Xattr = (Box<[u8]>, Box<[u8]>);
/// The extended attributes of one inode, sorted by name.
pub(super) type XattrSet = Box<[Xattr]>;

/// The tree; immutable once built. About 64 bytes a name, and 32 more where there is a content hash, beside the names
/// themselves; equal names (nearly all of them), owners and xattr sets are kept once.
///
/// Methods that take a [`NodeId`] panic on one that is not of this tree: check numbers from outside with [`Self::get`].
#[derive(Debug)]
pub struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) names: Vec<u8>,
    pub(super) targets: Vec<u8>,
    pub(super) owners: Vec<(u32, u32)>,
    pub(super) sparse: Vec<Sparse>,
    pub(super) extents: Vec<Extent>,
    pub(super) hashes: Hashes,
    pub(super) xattr_sets: Vec<XattrSet>,
    /// (node, index in `xattr_sets`), sorted.
    pub(super) xattr_of: Vec<(u32, u32)>,
    pub(super) inodes: usize,
    pub(super) total_size: u64,
}

/// Symlinks followed before [`ResolveError::Loop`]: Linux's own limit (path_resolution(7)).
const MAX_SYMLINKS: usize = 40;

impl Tree {
    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }
    fn inode_node(&self, id: NodeId) -> &Node {
        self.node(self.inode(id))
    }
    fn children_of(node: &Node) -> Range<u32> {
        if node.kind() != Kind::Dir {
            return 0..0;
        }
        let first = node.data as u32;
        first..first + (node.data >> 32) as u32
    }
    fn name_of(&self, node: &Node) -> &[u8] {
        &self.names[node.name as usize..][..usize::from(node.name_len)]
    }

    /// Number of names, the root included: never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }
    /// The node with this number, if the tree has it.
    pub fn get(&self, number: u32) -> Option<NodeId> {
        ((number as usize) < self.nodes.len()).then_some(NodeId(number))
    }
    /// All names, in the arena's order (breadth first).
    pub fn ids(&self) -> impl ExactSizeIterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }
    /// Number of distinct inodes.
    pub fn inodes(&self) -> usize {
        self.inodes
    }
    /// Sum of the sizes of all regular files, each inode once.
    pub fn total_size(&self) -> u64 {
        self.total_size
    }
    /// Bytes of memory that the tree holds, names included.
    pub fn memory(&self) -> usize {
        use std::mem::size_of;
        fn of<T>(v: &Vec<T>) -> usize {
            v.capacity() * size_of::<T>()
        }
        let xattrs: usize = self
            .xattr_sets
            .iter()
            .flat_map(|set| set.iter())
            .map(|(name, value)| name.len() + value.len() + size_of::<Xattr>())
            .sum();
        size_of::<Self>()
            + of(&self.nodes)
            + of(&self.names)
            + of(&self.targets)
            + of(&self.owners)
            + of(&self.sparse)
            + of(&self.extents)
            + of(&self.hashes.bits)
            + of(&self.hashes.before)
            + of(&self.hashes.hashes)
            + of(&self.xattr_sets)
            + of(&self.xattr_of)
            + xattrs
    }
    /// The child of `dir` called `name`. O(log children).
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        let Range { start, end } = self.children(dir);
        let children = &self.nodes[start as usize..end as usize];
        let at = children.binary_search_by(|child| self.name_of(child).cmp(name)).ok()?;
        Some(NodeId(start + at as u32))
    }
    /// The children of a directory, sorted by name: a contiguous run of node ids (empty for anything else).
    pub fn children(&self, dir: NodeId) -> Range<u32> {
        Self::children_of(self.node(dir))
    }
    /// A node's own name (empty for the root).
    pub fn name(&self, id: NodeId) -> &[u8] {
        self.name_of(self.node(id))
    }
    /// The directory that holds the name (the root's is the root).
    pub fn parent(&self, id: NodeId) -> NodeId {
        NodeId(self.node(id).parent)
    }
    /// The node that stands for the inode: the first name in path order of a hard-linked file, else the node itself.
    pub fn inode(&self, id: NodeId) -> NodeId {
        let node = self.node(id);
        if node.flags & LINK != 0 { NodeId(node.data as u32) } else { id }
    }
    /// The kind, without unpacking the rest of [`Self::attr`].
    pub fn kind(&self, id: NodeId) -> Kind {
        // Names of one inode are of one kind: the builder sees to it.
        self.node(id).kind()
    }
    /// stat's view (of the inode).
    pub fn attr(&self, id: NodeId) -> Attr {
        let node = self.inode_node(id);
        let kind = node.kind();
        let (uid, gid) = self.owners[node.owner as usize];
        Attr {
            kind,
            mode: node.mode & 0o7777,
            uid,
            gid,
            size: node.size,
            nlink: node.nlink,
            rdev: if matches!(kind, Kind::CharDevice | Kind::BlockDevice) { node.data as u32 } else { 0 },
            atime: node.atime.get(),
            mtime: node.mtime.get(),
            ctime: node.ctime.get(),
        }
    }
    /// Where the bytes lie (of the inode).
    pub fn data(&self, id: NodeId) -> Data<'_> {
        let node = self.inode_node(id);
        if node.kind() != Kind::File || node.size == 0 {
            return Data::Empty;
        }
        let blob = BlobIx(node.blob);
        if node.flags & SPARSE == 0 {
            return Data::Contiguous { blob, offset: node.data };
        }
        let Sparse { first, count, .. } = self.sparse[node.data as usize];
        Data::Sparse { blob, extents: &self.extents[first as usize..][..count as usize] }
    }
    /// Where the Go module finds the whole of a sparse file of a v1 archive, holes as zeros; `None`: nowhere.
    pub(super) fn sparse_image(&self, id: NodeId) -> Option<u64> {
        let node = self.inode_node(id);
        let image = (node.flags & SPARSE != 0).then(|| self.sparse[node.data as usize].image)?;
        (image != 0).then_some(image)
    }
    /// The target of a symlink; empty for anything else.
    pub fn target(&self, id: NodeId) -> &[u8] {
        let node = self.inode_node(id);
        match node.kind() {
            Kind::Symlink => &self.targets[node.data as usize..][..node.size as usize],
            _ => &[],
        }
    }
    /// Extended attributes sorted by name: `(name, value)`.
    pub fn xattrs(&self, id: NodeId) -> &[Xattr] {
        let inode = self.inode(id);
        if self.node(inode).flags & XATTRS == 0 {
            return &[];
        }
        let set = self.xattr_of.binary_search_by_key(&inode.0, |&(node, _)| node);
        set.map_or(&[], |at| &self.xattr_sets[self.xattr_of[at].1 as usize])
    }
    /// SHA-256 of the whole content, where the archive has one.
    pub fn content_hash(&self, id: NodeId) -> Option<Digest> {
        self.hashes.get(self.inode(id).0 as usize)
    }
    /// The absolute path, `/` for the root.
    pub fn path(&self, id: NodeId) -> Vec<u8> {
        let mut out = Vec::new();
        self.push_path(id, &mut out);
        out
    }
    /// Appends the absolute path to `out`. Allocates nothing but `out`'s growth.
    pub fn push_path(&self, id: NodeId, out: &mut Vec<u8>) {
        if id == NodeId::ROOT {
            out.push(b'/');
            return;
        }
        let from = out.len();
        let mut len = 0;
        let mut at = id;
        while at != NodeId::ROOT {
            len += 1 + self.name(at).len();
            at = self.parent(at);
        }
        out.resize(from + len, b'/');
        let mut end = from + len;
        at = id;
        while at != NodeId::ROOT {
            let name = self.name(at);
            out[end - name.len()..end].copy_from_slice(name);
            end -= name.len() + 1;
            at = self.parent(at);
        }
    }
    /// Resolves a path inside the tree as a chroot at `root` would: `..` stops at `root`, absolute symlinks start there;
    /// at most 40 symlinks. `follow_last`: follow a symlink in the last component too.
    pub fn resolve(&self, root: NodeId, path: &[u8], follow_last: bool) -> Result<NodeId, ResolveError> {
        let mut todo: Vec<&[u8]> = path.split(|&b| b == b'/').rev().collect();
        let mut at = root;
        let mut symlinks = 0;
        while let Some(component) = todo.pop() {
            if self.kind(at) != Kind::Dir {
                return Err(ResolveError::NotADirectory);
            }
            match component {
                // Two slashes, or one at the end: no step, but what precedes it must be a directory.
                b"" | b"." => continue,
                b".." if at == root => continue,
                b".." => {
                    at = self.parent(at);
                    continue;
                }
                _ => {}
            }
            let child = self.lookup(at, component).ok_or(ResolveError::NotFound)?;
            if self.kind(child) != Kind::Symlink || (todo.is_empty() && !follow_last) {
                at = child;
                continue;
            }
            symlinks += 1;
            if symlinks > MAX_SYMLINKS {
                return Err(ResolveError::Loop);
            }
            let target = self.target(child);
            if target.is_empty() {
                return Err(ResolveError::NotFound);
            }
            if target[0] == b'/' {
                at = root;
            }
            todo.extend(target.split(|&b| b == b'/').rev());
        }
        Ok(at)
    }
}

/// Equal if they show the same: names, inodes, attributes, data locations, targets, xattrs, content hashes.
impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len()
            && self.ids().all(|id| {
                self.name(id) == other.name(id)
                    && self.parent(id) == other.parent(id)
                    && self.inode(id) == other.inode(id)
                    && self.attr(id) == other.attr(id)
                    && self.data(id) == other.data(id)
                    && self.target(id) == other.target(id)
                    && self.xattrs(id) == other.xattrs(id)
                    && self.content_hash(id) == other.content_hash(id)
            })
    }
}

/// Why a path inside the tree leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum ResolveError {
    #[error("no such file or directory")]
    NotFound,
    #[error("not a directory")]
    NotADirectory,
    #[error("too many symbolic links")]
    Loop,
}

#[cfg(test)]
mod tests;
