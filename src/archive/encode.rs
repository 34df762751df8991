//! From a tree to bytes.
//!
//! What the Go module needs stays where it looks for it, nodes ordered by path as it orders them. What it has no place
//! for rides in fields that it skips: on the root node `XClipExt` ([`super::extension`]), and where a node has any
//!
//! | field | holds |
//! |---|---|
//! | `XClipXattrs` `map[string][]byte` | extended attributes |
//! | `XClipRdev` `uint` | a device's number |
//! | `XClipSparse` `bool` | the file is sparse |
//! | `XClipBlob` `uint` | v2: position of a sparse file's layer |
//! | `XClipExtents` `[]uint` | its extents: offset, length, offset in the blob, and so on |
//!
//! Sparse files and the Go module: in v1 `DataPos` and `DataLen` name the whole file, holes as zeros, where the archive
//! holds it so ([`super::Entry::offset`]); else a position behind any file's end, where its reads fail. In v2 always the
//! latter, and `Remote` is nil: a `DataLen` without it is what makes its reads fail, and without either they would be empty.
//!
//! Files of a layer whose blob is [`super::Chunks`] are written as sparse files of one extent without a hole: their offsets are none
//! in the layer's tar, which is where the Go module would look. Reading undoes it.

use super::gob::{Define, Encoder, Fields, TypeId};
use super::{ArchiveError, Data, Extension, Extent, Header, Kind, NodeId, SeekTable, Storage, Tree};
use crate::units::Digest;

/// What comes after the data region of an archive, ready to be written, and the header to be written first.
#[derive(Debug)]
pub struct Encoded {
    /// The 54 bytes at position 0.
    pub header: [u8; super::HEADER_LEN],
    /// The bytes at `tail_pos`: seek table, index, storage info (in whichever order the encoder likes).
    pub tail: Vec<u8>,
    /// Position, length and SHA-256 of the seek table, as the extension has it.
    pub seek_table: Option<(u64, u64, Digest)>,
}

/// Encodes all but the data. `tail_pos` is where the tail will lie: [`super::HEADER_LEN`] for v2, the end of the data
/// region for a v1 archive. The same input makes the same bytes.
///
/// `extension.seek_table` is filled in here where `seek_table` has blobs and the archive can hold it. A v1 *remote*
/// archive ([`Storage::S3`]) holds none: what `extension.seek_table` names, in the full archive, is kept.
pub fn encode(
    tree: &Tree,
    storage: &Storage,
    mut extension: Extension,
    seek_table: &SeekTable,
    tail_pos: u64,
) -> Result<Encoded, ArchiveError> {
    let mut tail = Vec::new();
    if !seek_table.blobs.is_empty() && !matches!(storage, Storage::S3(_)) {
        tail = seek_table.encode();
        within("length of the seek table", tail.len(), super::MAX_SEEK_TABLE_LEN)?;
        extension.seek_table = Some((tail_pos, tail.len() as u64, Digest::of(&tail)));
    }
    let mut index = encode_index(tree, storage, &extension, seek_table)?;
    let info = storage.encode();
    within("length of the index", index.len(), super::MAX_INDEX_LEN)?;
    within("length of the storage info", info.len(), super::MAX_STORAGE_INFO_LEN)?;
    let index_pos = tail_pos + tail.len() as u64;
    let info_pos = if info.is_empty() { 0 } else { index_pos + index.len() as u64 };
    let header = Header {
        index: (index_pos, index.len() as u64),
        storage_info: (info_pos, info.len() as u64),
        storage_type: storage.type_name().into(),
    }
    .encode();
    super::sum::seal(&header, &mut index, &info);
    tail.extend_from_slice(&index);
    tail.extend_from_slice(&info);
    Ok(Encoded { header, tail, seek_table: extension.seek_table })
}

fn within(what: &'static str, len: usize, limit: u64) -> Result<(), ArchiveError> {
    let value = len as u64;
    if value > limit { Err(ArchiveError::TooLarge { what, value, limit }) } else { Ok(()) }
}

const LIST: TypeId = TypeId(65);
const NODE: TypeId = TypeId(66);
const ATTR: TypeId = TypeId(67);
const OWNER: TypeId = TypeId(68);
const REMOTE: TypeId = TypeId(69);
const EXT: TypeId = TypeId(70);
const XATTRS: TypeId = TypeId(71);
const EXTENTS: TypeId = TypeId(72);

fn define(encoder: &mut Encoder) {
    let (string, int, uint) = (TypeId::STRING, TypeId::INT, TypeId::UINT);
    let node = [
        ("NodeType", string),
        ("Path", string),
        ("Attr", ATTR),
        ("Target", string),
        ("ContentHash", string),
        ("DataPos", int),
        ("DataLen", int),
        ("Remote", REMOTE),
        ("XClipExt", EXT),
        ("XClipXattrs", XATTRS),
        ("XClipRdev", uint),
        ("XClipSparse", TypeId::BOOL),
        ("XClipBlob", uint),
        ("XClipExtents", EXTENTS),
    ];
    let attr = [
        ("Ino", uint),
        ("Size", uint),
        ("Blocks", uint),
        ("Atime", uint),
        ("Mtime", uint),
        ("Ctime", uint),
        ("Atimensec", uint),
        ("Mtimensec", uint),
        ("Ctimensec", uint),
        ("Mode", uint),
        ("Nlink", uint),
        ("Owner", OWNER),
        ("Rdev", uint),
        ("Blksize", uint),
        ("Padding", uint),
    ];
    encoder.define(LIST, "[]*common.ClipNode", Define::Slice(NODE));
    encoder.define(NODE, "ClipNode", Define::Struct(&node));
    encoder.define(ATTR, "Attr", Define::Struct(&attr));
    encoder.define(OWNER, "Owner", Define::Struct(&[("Uid", uint), ("Gid", uint)]));
    encoder.define(REMOTE, "RemoteRef", Define::Struct(&[("LayerDigest", string), ("UOffset", int), ("ULength", int)]));
    super::extension::define(encoder, EXT);
    encoder.define(XATTRS, "map[string][]uint8", Define::Map(string, TypeId::BYTES));
    encoder.define(EXTENTS, "[]uint64", Define::Slice(uint));
}

fn encode_index(
    tree: &Tree,
    storage: &Storage,
    extension: &Extension,
    seek_table: &SeekTable,
) -> Result<Vec<u8>, ArchiveError> {
    let chunks: Vec<bool> = seek_table.blobs.iter().map(|blob| blob.chunks.is_some()).collect();
    // All paths in one piece, then their ids sorted by path, as a Go string compares.
    let mut paths = Vec::new();
    let mut order: Vec<(usize, usize, NodeId)> = Vec::with_capacity(tree.len());
    for id in tree.ids() {
        let start = paths.len();
        tree.push_path(id, &mut paths);
        order.push((start, paths.len(), id));
    }
    order.sort_unstable_by(|a, b| paths[a.0..a.1].cmp(&paths[b.0..b.1]));
    let mut encoder = Encoder::default();
    define(&mut encoder);
    let mut result = Ok(());
    encoder.single(LIST, |writer| {
        writer.uint(order.len() as u64);
        for &(start, end, id) in &order {
            let path = &paths[start..end];
            let mut fields = writer.fields();
            if let Err(detail) = write_node(&mut fields, tree, id, path, storage, extension, &chunks)
                && result.is_ok()
            {
                result = Err(super::builder::corrupt(path, &detail));
            }
            fields.end();
        }
    });
    result.map(|()| encoder.finish())
}

fn write_node(
    fields: &mut Fields<'_>,
    tree: &Tree,
    id: NodeId,
    path: &[u8],
    storage: &Storage,
    extension: &Extension,
    chunks: &[bool],
) -> Result<(), String> {
    let attr = tree.attr(id);
    let (kind, format) = match attr.kind {
        Kind::Dir => ("dir", libc::S_IFDIR),
        Kind::Symlink => ("symlink", libc::S_IFLNK),
        Kind::File => ("file", libc::S_IFREG),
        Kind::Fifo => ("file", libc::S_IFIFO),
        Kind::Socket => ("file", libc::S_IFSOCK),
        Kind::CharDevice => ("file", libc::S_IFCHR),
        Kind::BlockDevice => ("file", libc::S_IFBLK),
    };
    let whole;
    let data = match tree.data(id) {
        Data::Contiguous { blob, offset } if chunks.get(usize::from(blob.0)) == Some(&true) => {
            whole = [Extent { offset: 0, len: attr.size, blob_offset: offset }];
            Data::Sparse { blob, extents: &whole }
        }
        other => other,
    };
    let stored = match data {
        Data::Sparse { extents, .. } => extents.iter().map(|extent| extent.len).sum(),
        _ => attr.size,
    };
    fields.bytes(0, kind.as_bytes());
    fields.bytes(1, path);
    let mut out = fields.nested(2).fields();
    out.uint(0, 1 + u64::from(tree.inode(id).0));
    out.uint(1, attr.size);
    out.uint(2, if attr.kind == Kind::File { stored.div_ceil(512) } else { 0 });
    let times = [attr.atime, attr.mtime, attr.ctime];
    times.iter().enumerate().for_each(|(n, time)| out.uint(3 + n as i64, time.sec as u64));
    times.iter().enumerate().for_each(|(n, time)| out.uint(6 + n as i64, time.nsec.into()));
    out.uint(9, u64::from(format | u32::from(attr.mode)));
    out.uint(10, attr.nlink.into());
    let mut owner = out.nested(11).fields();
    owner.uint(0, attr.uid.into());
    owner.uint(1, attr.gid.into());
    owner.end();
    out.end();
    fields.bytes(3, tree.target(id));
    if let Some(hash) = tree.content_hash(id) {
        fields.bytes(4, hash.hex().as_bytes());
    }
    match (storage, data) {
        (Storage::Oci(oci), Data::Contiguous { blob, offset }) => {
            let layer = layer(oci, blob)?;
            let mut remote = fields.nested(7).fields();
            remote.bytes(0, layer.as_bytes());
            remote.int(1, offset as i64);
            remote.int(2, attr.size as i64);
            remote.end();
        }
        (_, Data::Contiguous { offset, .. }) => {
            fields.int(5, offset as i64);
            fields.int(6, attr.size as i64);
        }
        (_, Data::Sparse { blob, .. }) => {
            if let Storage::Oci(oci) = storage {
                layer(oci, blob)?;
            }
            let nowhere = i64::MAX as u64 - attr.size;
            fields.int(5, tree.sparse_image(id).unwrap_or(nowhere) as i64);
            fields.int(6, attr.size as i64);
        }
        (_, Data::Empty) => {}
    }
    if id == NodeId::ROOT {
        let mut ext = fields.nested(8).fields();
        extension.write(&mut ext);
        ext.end();
    }
    fields.list(9, tree.xattrs(id).iter(), |writer, (name, value)| {
        writer.bytes(name);
        writer.bytes(value);
    });
    fields.uint(10, attr.rdev.into());
    if let Data::Sparse { blob, extents } = data {
        fields.uint(11, 1);
        fields.uint(12, blob.0.into());
        if !extents.is_empty() {
            let list = fields.nested(13);
            list.uint(extents.len() as u64 * 3);
            for extent in extents {
                [extent.offset, extent.len, extent.blob_offset].into_iter().for_each(|value| list.uint(value));
            }
        }
    }
    Ok(())
}

fn layer(oci: &super::storage_info::OciStorage, blob: super::BlobIx) -> Result<&str, String> {
    let layer = oci.layers.get(usize::from(blob.0)).map(String::as_str);
    layer.ok_or_else(|| format!("its data lies in layer {}, the image has {}", blob.0, oci.layers.len()))
}
