//! An artifact's content: a protobuf message. Read back only by the version of the program that wrote it.

use std::io::Write;

use prost::Message;

use super::Artifact;
use crate::archive::{Extent, SeekTable, Timestamp};
use crate::build::tar::{EntryKind, TarEntry};

/// Tag of [`Layer::entries`].
const ENTRIES: u32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Layer {
    /// A seek table of one blob.
    #[prost(bytes = "vec", tag = "1")]
    table: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    entries: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(bytes = "vec", tag = "1")]
    path: Vec<u8>,
    /// Position in [`KINDS`].
    #[prost(uint32, tag = "2")]
    kind: u32,
    #[prost(uint32, tag = "3")]
    mode: u32,
    #[prost(uint32, tag = "4")]
    uid: u32,
    #[prost(uint32, tag = "5")]
    gid: u32,
    #[prost(message, optional, tag = "6")]
    mtime: Option<Time>,
    /// The modification time, where there is none.
    #[prost(message, optional, tag = "7")]
    atime: Option<Time>,
    /// As `atime`.
    #[prost(message, optional, tag = "8")]
    ctime: Option<Time>,
    #[prost(uint32, tag = "9")]
    rdev: u32,
    #[prost(bytes = "vec", tag = "10")]
    link: Vec<u8>,
    /// Names and values in turn.
    #[prost(bytes = "vec", repeated, tag = "11")]
    xattrs: Vec<Vec<u8>>,
    #[prost(uint64, tag = "12")]
    size: u64,
    #[prost(uint64, tag = "13")]
    offset: u64,
    #[prost(bool, tag = "14")]
    sparse: bool,
    /// Offset, length and offset in the blob of each extent.
    #[prost(uint64, repeated, tag = "15")]
    extents: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Time {
    #[prost(sint64, tag = "1")]
    sec: i64,
    #[prost(uint32, tag = "2")]
    nsec: u32,
}

const KINDS: [EntryKind; 7] = [
    EntryKind::File,
    EntryKind::Dir,
    EntryKind::Symlink,
    EntryKind::HardLink,
    EntryKind::Fifo,
    EntryKind::CharDevice,
    EntryKind::BlockDevice,
];

/// Entry by entry, so that they are not all in memory twice.
pub(super) fn write(artifact: &Artifact, out: &mut impl Write) -> std::io::Result<()> {
    let table = SeekTable { blobs: vec![artifact.table.clone()] }.encode();
    out.write_all(&Layer { table, entries: Vec::new() }.encode_to_vec())?;
    let mut one = Vec::new();
    for of in &artifact.entries {
        // Messages one after the other are one message, whose lists are joined.
        one.clear();
        prost::encoding::message::encode(ENTRIES, &entry(of), &mut one);
        out.write_all(&one)?;
    }
    Ok(())
}

pub(super) fn decode(bytes: Vec<u8>) -> Result<Artifact, String> {
    let layer = Layer::decode(&*bytes).map_err(|error| error.to_string())?;
    drop(bytes);
    let mut tables = SeekTable::decode(&layer.table).map_err(|error| error.to_string())?.blobs;
    let (Some(table), true) = (tables.pop(), tables.is_empty()) else {
        return Err("it has not exactly one table".into());
    };
    let entries = layer.entries.into_iter().map(unpack).collect::<Option<_>>();
    Ok(Artifact { entries: entries.ok_or("an entry of no known kind")?, table })
}

fn entry(of: &TarEntry) -> Entry {
    let time = |time: Timestamp| Time { sec: time.sec, nsec: time.nsec };
    let unless_mtime = |other: Timestamp| (other != of.mtime).then(|| time(other));
    Entry {
        path: of.path.to_vec(),
        kind: KINDS.iter().position(|kind| *kind == of.kind).unwrap_or(KINDS.len()) as u32,
        mode: of.mode.into(),
        uid: of.uid,
        gid: of.gid,
        mtime: Some(time(of.mtime)),
        atime: unless_mtime(of.atime),
        ctime: unless_mtime(of.ctime),
        rdev: of.rdev,
        link: of.link.to_vec(),
        xattrs: of.xattrs.iter().flat_map(|(name, value)| [name.clone(), value.clone()]).collect(),
        size: of.size,
        offset: of.offset,
        sparse: of.extents.is_some(),
        extents: of.extents.iter().flatten().flat_map(|e| [e.offset, e.len, e.blob_offset]).collect(),
    }
}

fn unpack(entry: Entry) -> Option<TarEntry> {
    let time = |time: Time| Timestamp { sec: time.sec, nsec: time.nsec };
    let mtime = time(entry.mtime?);
    let extents = entry.extents.as_chunks().0.iter();
    let extents =
        extents.map(|[offset, len, blob_offset]| Extent { offset: *offset, len: *len, blob_offset: *blob_offset });
    let xattrs = entry.xattrs.as_chunks().0.iter();
    Some(TarEntry {
        path: entry.path.into(),
        kind: *KINDS.get(entry.kind as usize)?,
        mode: u16::try_from(entry.mode).ok()?,
        uid: entry.uid,
        gid: entry.gid,
        mtime,
        atime: entry.atime.map_or(mtime, time),
        ctime: entry.ctime.map_or(mtime, time),
        rdev: entry.rdev,
        link: entry.link.into(),
        xattrs: xattrs.map(|[name, value]| (name.clone(), value.clone())).collect(),
        size: entry.size,
        offset: entry.offset,
        extents: entry.sparse.then(|| extents.collect()),
    })
}
