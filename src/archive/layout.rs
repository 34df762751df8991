//! From the names that a [`TreeBuilder`] holds to the arena: sorted, linked, numbered, packed.

use std::cmp::Ordering;

use super::ArchiveError;
use super::builder::{NONE, TreeBuilder, corrupt, show};
use super::tree::{Hashes, Kind, LINK, Node, PackedTime, SPARSE, Tree};

impl TreeBuilder {
    fn path(&self, raw: u32) -> &[u8] {
        let raw = &self.raws[raw as usize];
        &self.paths[raw.path as usize..][..usize::from(raw.path_len)]
    }

    /// Sorts, links, numbers and packs. Errors name the path. O(n log n) in the names, O(n) where they come sorted.
    pub fn finish(mut self) -> Result<Tree, ArchiveError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let skeleton = Skeleton::of(&self)?;
        let links = self.links(&skeleton)?;
        self.pack(&skeleton, &links)
    }

    /// For each raw the raw that is its inode, and for an inode of several names their number; empty if there are no links.
    fn links(&mut self, skeleton: &Skeleton) -> Result<Vec<(u32, u32)>, ArchiveError> {
        let mut grouped: Vec<(u64, u32)> = (0..self.raws.len() as u32)
            .map(|ix| (self.raws[ix as usize].link_group, ix))
            .filter(|&(group, ix)| group != 0 && skeleton.node_of_raw[ix as usize] != NONE)
            .collect();
        grouped.sort_unstable();
        let mut out = Vec::new();
        for group in grouped.chunk_by(|a, b| a.0 == b.0).filter(|group| group.len() > 1) {
            if out.is_empty() {
                out = (0..self.raws.len() as u32).map(|ix| (ix, 1)).collect();
            }
            let mut names: Vec<u32> = group.iter().map(|&(_, ix)| ix).collect();
            // Sorted so that names that agree are neighbours, the first path leading.
            names.sort_by(|&a, &b| self.agreement(a, b).then_with(|| self.path(a).cmp(self.path(b))));
            let runs: Vec<usize> = names.chunk_by(|&a, &b| self.agreement(a, b).is_eq()).map(<[u32]>::len).collect();
            let mut names = names.as_slice();
            for len in runs {
                let (same, rest) = names.split_at(len);
                self.unite(same, &mut out)?;
                names = rest;
            }
        }
        Ok(out)
    }

    /// Equal if two names of one link group may be one inode.
    fn agreement(&self, a: u32, b: u32) -> Ordering {
        if !self.check_links {
            return Ordering::Equal;
        }
        let (a, b) = (&self.raws[a as usize].node, &self.raws[b as usize].node);
        let symlink = |node: &Node| node.kind() == Kind::Symlink;
        let key = |node: &Node| (node.mode, self.owners[node.owner as usize], node.flags & SPARSE, node.blob);
        key(a).cmp(&key(b)).then_with(|| match (symlink(a), a.flags & SPARSE != 0) {
            // The Go module writes a hard link to a symlink without its target: the group alone decides.
            (true, _) => Ordering::Equal,
            (_, true) => {
                let extents = |node: &Node| {
                    let sparse = self.sparse[node.data as usize];
                    let run = &self.extents[sparse.first as usize..][..sparse.count as usize];
                    (node.size, sparse.image, run.iter().map(|e| (e.offset, e.len, e.blob_offset)).collect::<Vec<_>>())
                };
                extents(a).cmp(&extents(b))
            }
            _ => (a.size, a.data).cmp(&(b.size, b.data)),
        })
    }

    /// Makes the names of `same`, sorted by path, one inode.
    fn unite(&mut self, same: &[u32], out: &mut [(u32, u32)]) -> Result<(), ArchiveError> {
        let inode = same[0];
        let kind = self.raws[inode as usize].node.kind();
        for &name in same {
            let node = self.raws[name as usize].node;
            if node.kind() != kind {
                let first = show(self.path(inode));
                return Err(corrupt(self.path(name), &format!("is a hard link of {first}, which is of another type")));
            }
            if kind == Kind::Symlink && node.size > 0 {
                let first = &mut self.raws[inode as usize].node;
                if first.size == 0 {
                    (first.data, first.size) = (node.data, node.size);
                }
            }
        }
        for &name in same {
            out[name as usize] = (inode, 1);
        }
        out[inode as usize] = (inode, same.len() as u32);
        Ok(())
    }

    fn pack(self, skeleton: &Skeleton, links: &[(u32, u32)]) -> Result<Tree, ArchiveError> {
        let count = skeleton.dfs.len();
        let (order, numbers) = skeleton.breadth_first();
        let mut interner = Interner::new(count);
        let mut nodes: Vec<Node> = Vec::with_capacity(count);
        let mut xattr_of = Vec::new();
        let mut owners = self.owners;
        let root_owner = owners.iter().position(|&owner| owner == (0, 0)).unwrap_or_else(|| {
            owners.push((0, 0));
            owners.len() - 1
        });
        let mut next_child = 1;
        let (mut inodes, mut total_size) = (0, 0u64);
        for (number, &dfs) in order.iter().enumerate() {
            let place = &skeleton.dfs[dfs as usize];
            let raw = (place.raw != NONE).then(|| &self.raws[place.raw as usize]);
            let mut node = match raw {
                Some(raw) => raw.node,
                None => implied_directory(place.mtime, root_owner as u32),
            };
            let name = &self.paths[place.name as usize..][..usize::from(place.name_len)];
            node.name = interner.intern(name)?;
            node.name_len = place.name_len;
            node.parent = numbers[place.parent as usize];
            let inode = links.get(place.raw as usize).map_or(place.raw, |&(inode, _)| inode);
            if node.kind() == Kind::Dir {
                node.data = u64::from(next_child) | u64::from(place.children) << 32;
                node.nlink = place.subdirs.saturating_add(2);
                next_child += place.children;
            } else if inode != place.raw {
                node.flags = LINK;
                node.size = 0;
                node.data = numbers[skeleton.node_of_raw[inode as usize] as usize].into();
            } else if let Some(&(_, names)) = links.get(place.raw as usize) {
                node.nlink = names;
            }
            if node.flags & LINK == 0 {
                inodes += 1;
                if node.kind() == Kind::File {
                    total_size = total_size.saturating_add(node.size);
                }
                if let Some(raw) = raw.filter(|raw| raw.xattrs != NONE) {
                    xattr_of.push((number as u32, raw.xattrs));
                }
            }
            nodes.push(node);
        }
        let hashes = Hashes::collect(count, |number| {
            let raw = skeleton.dfs[order[number] as usize].raw;
            let raw = (raw != NONE && nodes[number].flags & LINK == 0).then(|| &self.raws[raw as usize])?;
            self.hashes.get(raw.hash as usize).copied()
        });
        let mut tree = Tree {
            nodes,
            names: interner.names,
            targets: self.targets,
            owners,
            sparse: self.sparse,
            extents: self.extents,
            hashes,
            xattr_sets: self.xattr_sets,
            xattr_of,
            inodes,
            total_size,
        };
        if u32::try_from(tree.targets.len()).is_err() {
            return Err(ArchiveError::TooLarge {
                what: "bytes of all symlink targets",
                value: tree.targets.len() as u64,
                limit: u32::MAX.into(),
            });
        }
        tree.names.shrink_to_fit();
        tree.targets.shrink_to_fit();
        tree.owners.shrink_to_fit();
        tree.sparse.shrink_to_fit();
        tree.extents.shrink_to_fit();
        tree.xattr_sets.shrink_to_fit();
        tree.xattr_of.shrink_to_fit();
        Ok(tree)
    }
}

/// A node before it has its number: parents precede children, siblings come sorted by name.
struct Place {
    raw: u32,
    parent: u32,
    children: u32,
    subdirs: u32,
    /// Offset of the name in the builder's paths.
    name: u64,
    name_len: u8,
    /// Of an implied directory.
    mtime: PackedTime,
}

/// The shape of the tree, depth first.
struct Skeleton {
    dfs: Vec<Place>,
    /// Index in `dfs` of each raw; [`NONE`] if it was left out.
    node_of_raw: Vec<u32>,
}

impl Skeleton {
    fn of(builder: &TreeBuilder) -> Result<Self, ArchiveError> {
        let too_many =
            |value: u64| ArchiveError::TooLarge { what: "number of names", value, limit: u64::from(NONE) - 1 };
        if builder.raws.len() >= NONE as usize {
            return Err(too_many(builder.raws.len() as u64));
        }
        let mut order: Vec<u32> = (0..builder.raws.len() as u32).collect();
        order.sort_by(|&a, &b| path_cmp(builder.path(a), builder.path(b)));
        let mut out =
            Self { dfs: Vec::with_capacity(builder.raws.len() + 1), node_of_raw: vec![NONE; builder.raws.len()] };
        // Directories (or the last non-directory) that enclose the previous name: (index in dfs, length of its path).
        let mut open: Vec<(u32, usize)> = Vec::new();
        let mut before: &[u8] = &[];
        for (at, &raw_ix) in order.iter().enumerate() {
            let raw = &builder.raws[raw_ix as usize];
            let path = builder.path(raw_ix);
            if at > 0 && path == before {
                return Err(corrupt(path, "is there twice"));
            }
            if at == 0 && !path.is_empty() {
                out.push(NONE, NONE, 0, 0, raw.node.mtime, true);
                open.push((0, 0));
            }
            let shared = common(before, path);
            while open.last().is_some_and(|&(_, len)| len > shared || path.get(len).is_some_and(|&b| b != b'/')) {
                open.pop();
            }
            before = path;
            let Some(&(mut parent, mut parent_len)) = open.last() else {
                out.node_of_raw[raw_ix as usize] = out.push(raw_ix, NONE, 0, 0, raw.node.mtime, true);
                open.push((0, 0));
                continue;
            };
            if builder.raws.get(out.dfs[parent as usize].raw as usize).is_some_and(|raw| raw.node.kind() != Kind::Dir) {
                if builder.drop_orphans {
                    continue;
                }
                let above = show(&path[..parent_len]);
                return Err(corrupt(path, &format!("lies below {above}, which is not a directory")));
            }
            loop {
                let start = parent_len + 1;
                let end = path[start..].iter().position(|&b| b == b'/').map_or(path.len(), |len| start + len);
                let last = end == path.len();
                let (of, is_dir) = if last { (raw_ix, raw.node.kind() == Kind::Dir) } else { (NONE, true) };
                if out.dfs.len() >= NONE as usize {
                    return Err(too_many(out.dfs.len() as u64 + 1));
                }
                // A name is at most 255 bytes: `check_path`.
                let id = out.push(of, parent, raw.path + start as u64, (end - start) as u8, raw.node.mtime, is_dir);
                open.push((id, end));
                if last {
                    out.node_of_raw[raw_ix as usize] = id;
                    break;
                }
                (parent, parent_len) = (id, end);
            }
        }
        if out.dfs.is_empty() {
            out.push(NONE, NONE, 0, 0, PackedTime::EPOCH, true);
        }
        Ok(out)
    }

    fn push(&mut self, raw: u32, parent: u32, name: u64, name_len: u8, mtime: PackedTime, is_dir: bool) -> u32 {
        let id = self.dfs.len() as u32;
        let parent = if let Some(above) = self.dfs.get_mut(parent as usize) {
            above.children += 1;
            above.subdirs += u32::from(is_dir);
            parent
        } else {
            id
        };
        self.dfs.push(Place { raw, parent, children: 0, subdirs: 0, name, name_len, mtime });
        id
    }

    /// The numbering: (indices in `dfs` by number, numbers by index in `dfs`).
    fn breadth_first(&self) -> (Vec<u32>, Vec<u32>) {
        let count = self.dfs.len();
        // Children of each node, back to back; a node's run starts where the runs before it end.
        let mut starts = Vec::with_capacity(count);
        let mut end = 0;
        for place in &self.dfs {
            starts.push(end);
            end += place.children;
        }
        let mut children = vec![0u32; end as usize];
        let mut fill = starts.clone();
        for (id, place) in self.dfs.iter().enumerate().skip(1) {
            let slot = &mut fill[place.parent as usize];
            children[*slot as usize] = id as u32;
            *slot += 1;
        }
        let mut order = Vec::with_capacity(count);
        let mut numbers = vec![0; count];
        order.push(0);
        let mut at = 0;
        while at < order.len() {
            let id = order[at] as usize;
            numbers[id] = at as u32;
            let run = starts[id] as usize;
            order.extend_from_slice(&children[run..run + self.dfs[id].children as usize]);
            at += 1;
        }
        (order, numbers)
    }
}

/// Equal names are kept once, nearly: images repeat `__init__.py` and `copyright` thousands of times. A table of fixed size
/// remembers the last name of each slot, so that no choice of names can make it slow, and it costs a tenth of a hash map.
struct Interner {
    names: Vec<u8>,
    /// Offset and length of a name.
    slots: Vec<(u32, u8)>,
}

impl Interner {
    fn new(names: usize) -> Self {
        Self { names: Vec::new(), slots: vec![(0, 0); names.next_power_of_two().clamp(16, 1 << 16)] }
    }

    fn intern(&mut self, name: &[u8]) -> Result<u32, ArchiveError> {
        let mut hash = name.len() as u64;
        for chunk in name.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            // The multiplier spreads every bit to the high ones, of which the slot is made (2^64 over the golden ratio).
            hash = (hash.rotate_left(23) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        let mask = self.slots.len() - 1;
        let slot = &mut self.slots[(hash >> 48) as usize & mask];
        if &self.names[slot.0 as usize..][..usize::from(slot.1)] == name {
            return Ok(slot.0);
        }
        let at = u32::try_from(self.names.len()).map_err(|_| ArchiveError::TooLarge {
            what: "bytes of all names",
            value: self.names.len() as u64,
            limit: u32::MAX.into(),
        })?;
        // A name is at most 255 bytes: `check_path`.
        *slot = (at, name.len() as u8);
        self.names.extend_from_slice(name);
        Ok(at)
    }
}

fn implied_directory(mtime: PackedTime, owner: u32) -> Node {
    Node {
        size: 0,
        data: 0,
        atime: mtime,
        mtime,
        ctime: mtime,
        name: 0,
        parent: 0,
        nlink: 2,
        owner,
        mode: Node::pack_mode(Kind::Dir, 0o755),
        blob: 0,
        name_len: 0,
        flags: 0,
    }
}

/// Order in which a directory precedes all that lies below it, with nothing between: `/` counts as the lowest byte.
fn path_cmp(a: &[u8], b: &[u8]) -> Ordering {
    let at = common(a, b);
    match (a.get(at), b.get(at)) {
        (Some(b'/'), Some(_)) => Ordering::Less,
        (Some(_), Some(b'/')) => Ordering::Greater,
        (x, y) => x.cmp(&y),
    }
}

/// Length of the common prefix.
fn common(a: &[u8], b: &[u8]) -> usize {
    let len = a.len().min(b.len());
    let mut at = 0;
    while let (Some(x), Some(y)) = (a.get(at..at + 16), b.get(at..at + 16)) {
        if x != y {
            break;
        }
        at += 16;
    }
    a[at..len].iter().zip(&b[at..len]).position(|(x, y)| x != y).map_or(len, |more| at + more)
}
