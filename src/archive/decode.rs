//! From bytes to an [`Archive`].

use std::collections::HashMap;

use super::builder::{EntryRef, corrupt, show};
use super::gob::{Decoder, Plan, TypeId, Want};
use super::{ArchiveError, BlobIx, Extension, Extent, Header, Kind, Storage, Timestamp, Tree, TreeBuilder};
use crate::units::Digest;

/// v1 or v2, told from the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// Data-carrying.
    V1,
    /// Index-only.
    V2,
}

/// A decoded archive: everything a mount needs but the seek table.
#[derive(Debug)]
pub struct Archive {
    /// The header.
    pub header: Header,
    /// Where file data lies.
    pub storage: Storage,
    /// The tree.
    pub tree: Tree,
    /// Our extension, where the archive has one.
    pub extension: Option<Extension>,
    /// SHA-256 over header, index and storage info (the seek table's digest is inside the index); where this digest stands in the index itself,
    /// zeros count for it.
    pub digest: Digest,
}

impl Archive {
    /// v1 or v2.
    pub fn version(&self) -> Version {
        match self.storage {
            Storage::Oci(_) => Version::V2,
            Storage::Local | Storage::S3(_) => Version::V1,
        }
    }
}

/// Decodes header, index and storage info bytes (exactly the ranges that `header` names).
///
/// Cost: one pass over the index, no allocation per node (some 100 bytes a node in all while it runs); a sort of the names.
pub fn decode(header: &[u8], index: &[u8], storage_info: &[u8]) -> Result<Archive, ArchiveError> {
    let header_bytes = header;
    let header = Header::decode(header)?;
    for (what, declared, bytes) in
        [("index", header.index.1, index), ("storage info", header.storage_info.1, storage_info)]
    {
        let have = bytes.len() as u64;
        if have < declared {
            return Err(ArchiveError::Truncated { what, need: declared, have });
        }
        if have > declared {
            return Err(ArchiveError::Corrupt { what, detail: format!("{have} bytes, the header says {declared}") });
        }
    }
    let storage = Storage::decode(storage_info)?;
    let (tree, extension) = decode_index(index, &storage)?;
    let (extension, summed) = extension.map_or((None, false), |(extension, summed)| (Some(extension), summed));
    let digest = super::sum::check(header_bytes, index, storage_info, summed)?;
    Ok(Archive { header, storage, tree, extension, digest })
}

#[derive(Clone, Copy)]
enum NodeField {
    Type,
    Path,
    Attr,
    Target,
    ContentHash,
    DataPos,
    DataLen,
    Remote,
    Ext,
    Xattrs,
    Rdev,
    Sparse,
    Blob,
    Extents,
}

#[derive(Clone, Copy)]
enum AttrField {
    Ino,
    Size,
    Atime,
    Mtime,
    Ctime,
    Atimensec,
    Mtimensec,
    Ctimensec,
    Mode,
    Nlink,
    Owner,
    Rdev,
}

#[derive(Clone, Copy)]
enum OwnerField {
    Uid,
    Gid,
}

#[derive(Clone, Copy)]
enum RemoteField {
    Layer,
    Offset,
    Length,
}

const STRING: Want = Want::Basic(TypeId::STRING);
const INT: Want = Want::Basic(TypeId::INT);
const UINT: Want = Want::Basic(TypeId::UINT);

/// How to read this stream's structs; parts that its types lack are `None`.
struct Plans {
    node: Plan<NodeField>,
    attr: Option<Plan<AttrField>>,
    owner: Option<Plan<OwnerField>>,
    remote: Option<Plan<RemoteField>>,
    ext: Option<Plan<super::extension::Field>>,
}

impl Plans {
    fn of(d: &Decoder<'_>, node: TypeId) -> Result<Self, ArchiveError> {
        let node = d.plan(
            node,
            "ClipNode",
            &[
                ("NodeType", STRING, NodeField::Type),
                ("Path", STRING, NodeField::Path),
                ("Attr", Want::Struct, NodeField::Attr),
                ("Target", STRING, NodeField::Target),
                ("ContentHash", STRING, NodeField::ContentHash),
                ("DataPos", INT, NodeField::DataPos),
                ("DataLen", INT, NodeField::DataLen),
                ("Remote", Want::Struct, NodeField::Remote),
                ("XClipExt", Want::Struct, NodeField::Ext),
                ("XClipXattrs", Want::Map, NodeField::Xattrs),
                ("XClipRdev", UINT, NodeField::Rdev),
                ("XClipSparse", Want::Basic(TypeId::BOOL), NodeField::Sparse),
                ("XClipBlob", UINT, NodeField::Blob),
                ("XClipExtents", Want::List, NodeField::Extents),
            ],
        )?;
        let attr = node.type_of(|f| matches!(f, NodeField::Attr)).map(|id| {
            d.plan(
                id,
                "Attr",
                &[
                    ("Ino", UINT, AttrField::Ino),
                    ("Size", UINT, AttrField::Size),
                    ("Atime", UINT, AttrField::Atime),
                    ("Mtime", UINT, AttrField::Mtime),
                    ("Ctime", UINT, AttrField::Ctime),
                    ("Atimensec", UINT, AttrField::Atimensec),
                    ("Mtimensec", UINT, AttrField::Mtimensec),
                    ("Ctimensec", UINT, AttrField::Ctimensec),
                    ("Mode", UINT, AttrField::Mode),
                    ("Nlink", UINT, AttrField::Nlink),
                    ("Owner", Want::Struct, AttrField::Owner),
                    ("Rdev", UINT, AttrField::Rdev),
                ],
            )
        });
        let attr = attr.transpose()?;
        let owner = attr.as_ref().and_then(|attr| attr.type_of(|f| matches!(f, AttrField::Owner)));
        let owner =
            owner.map(|id| d.plan(id, "Owner", &[("Uid", UINT, OwnerField::Uid), ("Gid", UINT, OwnerField::Gid)]));
        let remote = node.type_of(|f| matches!(f, NodeField::Remote)).map(|id| {
            let fields = [
                ("LayerDigest", STRING, RemoteField::Layer),
                ("UOffset", INT, RemoteField::Offset),
                ("ULength", INT, RemoteField::Length),
            ];
            d.plan(id, "RemoteRef", &fields)
        });
        let ext = node.type_of(|f| matches!(f, NodeField::Ext)).map(|id| Extension::plan(d, id));
        if let Some(map) = node.type_of(|f| matches!(f, NodeField::Xattrs)) {
            let (name, value) = d.key_and_element(map)?;
            d.expect(name, STRING, "XClipXattrs")?;
            d.expect(value, Want::Basic(TypeId::BYTES), "XClipXattrs")?;
        }
        if let Some(list) = node.type_of(|f| matches!(f, NodeField::Extents)) {
            d.expect(d.element(list)?, UINT, "XClipExtents")?;
        }
        Ok(Self { owner: owner.transpose()?, remote: remote.transpose()?, ext: ext.transpose()?, attr, node })
    }
}

/// One node as the stream has it. Reused from node to node.
#[derive(Default)]
struct Node<'a> {
    kind: &'a [u8],
    path: &'a [u8],
    target: &'a [u8],
    content_hash: &'a [u8],
    data_pos: i64,
    data_len: i64,
    remote: Option<(&'a [u8], i64, i64)>,
    ino: u64,
    size: u64,
    times: [(u64, u32); 3],
    mode: u32,
    nlink: u32,
    owner: (u32, u32),
    rdev: u32,
    ext: Option<(Extension, bool)>,
    xattrs: Vec<(&'a [u8], &'a [u8])>,
    sparse: bool,
    blob: u64,
    extents: Vec<Extent>,
}

impl<'a> Node<'a> {
    fn clear(&mut self) {
        let (mut xattrs, mut extents) = (std::mem::take(&mut self.xattrs), std::mem::take(&mut self.extents));
        xattrs.clear();
        extents.clear();
        *self = Self { xattrs, extents, ..Self::default() };
    }

    fn read(&mut self, d: &mut Decoder<'a>, plans: &Plans) -> Result<(), ArchiveError> {
        let mut at = 0;
        while let Some((field, id)) = d.field(&plans.node, &mut at)? {
            match field {
                NodeField::Type => self.kind = d.bytes()?,
                NodeField::Path => self.path = d.bytes()?,
                NodeField::Target => self.target = d.bytes()?,
                NodeField::ContentHash => self.content_hash = d.bytes()?,
                NodeField::DataPos => self.data_pos = d.int()?,
                NodeField::DataLen => self.data_len = d.int()?,
                NodeField::Rdev => self.rdev = d.uint32()?,
                NodeField::Sparse => self.sparse = d.bool()?,
                NodeField::Blob => self.blob = d.uint()?,
                NodeField::Attr => match &plans.attr {
                    Some(plan) => self.read_attr(d, plan, plans.owner.as_ref())?,
                    None => d.skip(id)?,
                },
                NodeField::Remote => match &plans.remote {
                    Some(plan) => self.remote = Some(read_remote(d, plan)?),
                    None => d.skip(id)?,
                },
                NodeField::Ext => match &plans.ext {
                    Some(plan) => self.ext = Some(Extension::read(d, plan)?),
                    None => d.skip(id)?,
                },
                NodeField::Xattrs => {
                    for _ in 0..d.count()? {
                        self.xattrs.push((d.bytes()?, d.bytes()?));
                    }
                }
                NodeField::Extents => {
                    let count = d.count()?;
                    if count % 3 != 0 {
                        return Err(d.corrupt("XClipExtents is not a list of triples"));
                    }
                    for _ in 0..count / 3 {
                        self.extents.push(Extent { offset: d.uint()?, len: d.uint()?, blob_offset: d.uint()? });
                    }
                }
            }
        }
        Ok(())
    }

    fn read_attr(
        &mut self,
        d: &mut Decoder<'a>,
        plan: &Plan<AttrField>,
        owner: Option<&Plan<OwnerField>>,
    ) -> Result<(), ArchiveError> {
        let mut at = 0;
        while let Some((field, id)) = d.field(plan, &mut at)? {
            match field {
                AttrField::Ino => self.ino = d.uint()?,
                AttrField::Size => self.size = d.uint()?,
                AttrField::Atime => self.times[0].0 = d.uint()?,
                AttrField::Mtime => self.times[1].0 = d.uint()?,
                AttrField::Ctime => self.times[2].0 = d.uint()?,
                AttrField::Atimensec => self.times[0].1 = d.uint32()?,
                AttrField::Mtimensec => self.times[1].1 = d.uint32()?,
                AttrField::Ctimensec => self.times[2].1 = d.uint32()?,
                AttrField::Mode => self.mode = d.uint32()?,
                AttrField::Nlink => self.nlink = d.uint32()?,
                AttrField::Rdev => self.rdev = d.uint32()?,
                AttrField::Owner => {
                    let Some(plan) = owner else {
                        d.skip(id)?;
                        continue;
                    };
                    let mut at = 0;
                    while let Some((field, _)) = d.field(plan, &mut at)? {
                        match field {
                            OwnerField::Uid => self.owner.0 = d.uint32()?,
                            OwnerField::Gid => self.owner.1 = d.uint32()?,
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn read_remote<'a>(d: &mut Decoder<'a>, plan: &Plan<RemoteField>) -> Result<(&'a [u8], i64, i64), ArchiveError> {
    let (mut out, mut at): ((&[u8], _, _), _) = ((&[], 0, 0), 0);
    while let Some((field, _)) = d.field(plan, &mut at)? {
        match field {
            RemoteField::Layer => out.0 = d.bytes()?,
            RemoteField::Offset => out.1 = d.int()?,
            RemoteField::Length => out.2 = d.int()?,
        }
    }
    Ok(out)
}

fn decode_index(index: &[u8], storage: &Storage) -> Result<(Tree, Option<(Extension, bool)>), ArchiveError> {
    let mut d = Decoder::new("index", index);
    let list = d.value()?;
    d.expect(list, Want::List, "the index")?;
    let plans = Plans::of(&d, d.element(list)?)?;
    let count = d.count()?;
    let mut builder = TreeBuilder::of_archive();
    // A node of the Go module takes 100 bytes and more: room for what there can honestly be, no more.
    builder.reserve(count.min(d.left() / 64));
    let mut locator = Locator::of(storage);
    let mut extension = None;
    let mut node = Node::default();
    for number in 0..count {
        node.clear();
        node.read(&mut d, &plans)?;
        if number == 0 && node.path == b"/" {
            extension = node.ext.take();
        }
        if number == 0 && extension.is_none() {
            builder.drop_orphans();
        }
        insert(&mut builder, &node, &mut locator, extension.is_some())?;
    }
    Ok((builder.finish()?, extension))
}

/// Adds a node as the stream has it. `ours`: our own fields count.
fn insert(
    builder: &mut TreeBuilder,
    node: &Node<'_>,
    locator: &mut Locator<'_>,
    ours: bool,
) -> Result<(), ArchiveError> {
    let kind = match node.kind {
        b"dir" => Kind::Dir,
        b"symlink" => Kind::Symlink,
        b"file" => match node.mode & libc::S_IFMT {
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFCHR => Kind::CharDevice,
            libc::S_IFBLK => Kind::BlockDevice,
            // The Go module's hard link to a symlink: all of it but type and target.
            libc::S_IFLNK => Kind::Symlink,
            _ => Kind::File,
        },
        other => return Err(corrupt(node.path, &format!("is of the unknown type {}", show(other)))),
    };
    let file = match kind {
        Kind::File => locator.locate(node, ours).map_err(|detail| corrupt(node.path, &detail))?,
        _ => Location::default(),
    };
    let time = |(sec, nsec): (u64, u32)| Timestamp { sec: sec as i64, nsec };
    builder.insert_ref(
        node.path,
        &EntryRef {
            kind,
            mode: (node.mode & 0o7777) as u16,
            uid: node.owner.0,
            gid: node.owner.1,
            size: file.size,
            rdev: node.rdev,
            atime: time(node.times[0]),
            mtime: time(node.times[1]),
            ctime: time(node.times[2]),
            target: node.target,
            xattrs: if ours { &node.xattrs } else { &[] },
            content_hash: content_hash(node.content_hash),
            blob: file.blob,
            offset: file.offset,
            extents: (file.sparse && file.size > 0).then_some(&node.extents),
            // We write a true link count, so that a name of its own needs no comparing.
            link_group: if ours && node.nlink <= 1 { 0 } else { node.ino },
        },
    );
    Ok(())
}

/// 64 hex digits; anything else is no digest that could be checked, and passes as none.
fn content_hash(text: &[u8]) -> Option<Digest> {
    let mut out = [0; 32];
    hex::decode_to_slice(text, &mut out).ok().map(|()| Digest(out))
}

/// Where a file's bytes lie, as an [`EntryRef`] says it.
struct Location {
    size: u64,
    blob: BlobIx,
    offset: u64,
    sparse: bool,
}

impl Default for Location {
    fn default() -> Self {
        Self { size: 0, blob: BlobIx(0), offset: 0, sparse: false }
    }
}

/// Finds the data of files in the kind of storage that the archive names.
enum Locator<'a> {
    /// In the archive, or in the object whose type name this is.
    V1(&'static str),
    /// In layers: positions by digest, the number of layers, and the last one found.
    V2(HashMap<&'a [u8], u16>, usize, (&'a [u8], u16)),
}

impl<'a> Locator<'a> {
    fn of(storage: &'a Storage) -> Self {
        match storage {
            Storage::Local => Self::V1("none"),
            Storage::S3(_) => Self::V1("s3"),
            Storage::Oci(oci) => {
                let mut layers = HashMap::with_capacity(oci.layers.len());
                for (position, layer) in oci.layers.iter().enumerate() {
                    // `Storage::decode` sees to it that positions fit. A layer that is there twice is the same bytes.
                    layers.entry(layer.as_bytes()).or_insert(position as u16);
                }
                Self::V2(layers, oci.layers.len(), (&[], 0))
            }
        }
    }

    fn locate(&mut self, node: &Node<'_>, ours: bool) -> Result<Location, String> {
        let sparse = ours && node.sparse;
        let unsigned = |name: &str, value: i64| u64::try_from(value).map_err(|_| format!("{name} is {value}"));
        let len = unsigned("DataLen", node.data_len)?;
        match self {
            Self::V1(kind) => {
                if node.remote.is_some() {
                    let detail = format!("its data lies in an image layer, but the archive's storage is {kind}");
                    return Err(format!("{detail}; mount the image's own v2 index"));
                }
                let offset = unsigned("DataPos", node.data_pos)?;
                if !sparse {
                    return Ok(Location { size: len, offset, ..Location::default() });
                }
                // Where there is no whole image of the file, the position is one that fails to be read.
                let image = if offset.checked_add(node.size) == Some(i64::MAX as u64) { 0 } else { offset };
                Ok(Location { size: node.size, offset: image, sparse, ..Location::default() })
            }
            Self::V2(layers, count, last) => {
                // A sparse file's length says to the Go module that there is something to read, which it then can't.
                if len > 0 && !sparse {
                    return Err("its data lies in the archive, but the archive's storage is oci".into());
                }
                let Some((digest, offset, len)) = node.remote else {
                    if sparse {
                        let blob = u16::try_from(node.blob).ok().filter(|&blob| usize::from(blob) < *count);
                        let blob = blob.ok_or_else(|| format!("its layer {} is none of the {count}", node.blob))?;
                        // Without a hole: a file of a layer that is read by its own table of contents.
                        if let [one] = node.extents[..]
                            && (one.offset, one.len) == (0, node.size)
                        {
                            let (size, offset) = (one.len, one.blob_offset);
                            return Ok(Location { size, blob: BlobIx(blob), offset, sparse: false });
                        }
                        return Ok(Location { size: node.size, blob: BlobIx(blob), offset: 0, sparse });
                    }
                    if node.size > 0 {
                        return Err(format!("has {} bytes but no data location", node.size));
                    }
                    return Ok(Location::default());
                };
                if digest != last.0 || digest.is_empty() {
                    let found = layers.get_key_value(digest);
                    let (&digest, &position) =
                        found.ok_or_else(|| format!("its layer {} is not one of the image's", show(digest)))?;
                    *last = (digest, position);
                }
                let (offset, len) = (unsigned("UOffset", offset)?, unsigned("ULength", len)?);
                Ok(Location { size: len, blob: BlobIx(last.1), offset, sparse: false })
            }
        }
    }
}

#[cfg(test)]
mod tests;
