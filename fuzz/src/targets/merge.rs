//! Layers that bytes pick, through the merger: what comes out is a tree that an archive can hold, is the same wherever whiteouts
//! stand in their layer, and, where no links are about, is what a much simpler merger says.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use arbitrary::{Result, Unstructured};

use super::model;
use crate::archive::storage_info::OciStorage;
use crate::archive::{
    BlobIx, Entry, Extension, Extent, HEADER_LEN, Header, Kind, SeekTable, Storage, Timestamp, TreeBuilder, decode,
    encode,
};
use crate::build::merge::Merger;
use crate::build::tar::{EntryKind, TarEntry};

/// Few names, so that layers meet.
const NAMES: &[&[u8]] = &[b"a", b"b", b"c", b"lib", b"a b", b"\xff", b".wh", b".whx", b"..."];
const WHITEOUTS: &[&[u8]] =
    &[b".wh.a", b".wh.b", b".wh.lib", b".wh..wh..opq", b".wh..wh.plnk", b".wh.", b".wh..", b".wh..wh.a"];
const TARGETS: &[&[u8]] =
    &[b"a", b"b", b"/", b"..", b"../b", b"/lib", b"./c/./", b"lib/../..", b"/.wh.a/x", b"c/.wh..wh.x", b"not/there"];

type Layer = Vec<TarEntry>;
/// What a merger gives, in its order.
pub type Names = Vec<(Vec<u8>, Entry)>;

pub fn run(input: &[u8]) {
    let Ok(layers) = layers(&mut Unstructured::new(input)) else { return };
    let merged = merge(&layers);
    let with = |change: fn(&mut Layer)| {
        let mut layers = layers.clone();
        layers.iter_mut().for_each(change);
        merge(&layers)
    };
    let first = with(|layer| layer.sort_by_key(|entry| !is_whiteout(entry)));
    let last = with(|layer| layer.sort_by_key(is_whiteout));
    assert_eq!(first.is_ok(), last.is_ok());
    let Ok(names) = merged else {
        assert!(first.is_err(), "whiteouts in front make a broken layer whole");
        if model::knows(&layers) {
            assert_eq!(model::merge(&layers), None, "{merged:?}");
        }
        return;
    };
    assert_eq!(first.as_ref(), Ok(&names), "whiteouts in front");
    assert_eq!(last.as_ref(), Ok(&names), "whiteouts behind");
    check(&names, &layers);
    if model::knows(&layers) {
        assert_eq!(model::merge(&layers).expect("the model merges it"), model::of(&names));
    }
    archive(&names, layers.len());
    let mut more = layers.clone();
    more.push(Vec::new());
    assert_eq!(merge(&more).as_ref(), Ok(&names), "a layer of nothing changes something");
    *more.last_mut().expect("it was pushed") = vec![entry(b".wh..wh..opq", EntryKind::File)];
    assert_eq!(merge(&more).expect("an opaque root").len(), 1, "an opaque root hides all");
}

fn is_whiteout(entry: &TarEntry) -> bool {
    let name = entry.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    name == b".wh..wh..opq" || (name.starts_with(b".wh.") && !entry.path.starts_with(b".wh..wh."))
}

fn merge(layers: &[Layer]) -> std::result::Result<Names, String> {
    let mut merger = Merger::new();
    for (blob, layer) in layers.iter().enumerate() {
        merger.apply(BlobIx(blob as u16), layer.clone()).map_err(|error| error.to_string())?;
    }
    let mut names = Vec::new();
    merger.finish("", &mut |path, entry| names.push((path, entry)));
    Ok(names)
}

fn entry(path: &[u8], kind: EntryKind) -> TarEntry {
    let time = Timestamp::default();
    TarEntry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: time,
        atime: time,
        ctime: time,
        rdev: 0,
        link: Box::default(),
        xattrs: Vec::new(),
        size: 0,
        offset: 0,
        extents: None,
    }
}

fn layers(u: &mut Unstructured<'_>) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    let mut offset = 512;
    for _ in 0..u.int_in_range(1..=4)? {
        let mut layer = Vec::new();
        for _ in 0..u.int_in_range(0..=12)? {
            if u.is_empty() {
                break;
            }
            layer.push(any_entry(u, &mut offset)?);
        }
        layers.push(layer);
    }
    Ok(layers)
}

fn path(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for _ in 0..u.int_in_range(0..=4)? {
        if !out.is_empty() {
            out.push(b'/');
        }
        let name = if u.ratio(1, 6)? { u.choose(WHITEOUTS)? } else { u.choose(NAMES)? };
        out.extend_from_slice(name);
    }
    Ok(out)
}

fn any_entry(u: &mut Unstructured<'_>, offset: &mut u64) -> Result<TarEntry> {
    let path = path(u)?;
    let kind = match u.int_in_range(0..=11)? {
        0..=3 => EntryKind::File,
        4..=6 => EntryKind::Dir,
        7 | 8 => EntryKind::Symlink,
        9 | 10 => EntryKind::HardLink,
        _ => *u.choose(&[EntryKind::Fifo, EntryKind::CharDevice, EntryKind::BlockDevice])?,
    };
    let mut entry = entry(&path, kind);
    entry.mode = u.int_in_range(0..=0o7777)?;
    entry.uid = u.int_in_range(0..=2)?;
    entry.mtime.sec = u.int_in_range(0..=3)?;
    if u.ratio(1, 8)? {
        entry.xattrs.push((b"user.x".to_vec(), u.bytes(1)?.to_vec()));
    }
    match kind {
        EntryKind::File => {
            // No two files at one place: so a file tells which entry it came of.
            entry.offset = *offset;
            entry.size = u.int_in_range(0..=3)?;
            *offset += 512;
            if u.ratio(1, 8)? {
                entry.extents = Some(vec![Extent { offset: entry.size, len: 1, blob_offset: entry.offset }]);
                entry.size += 2;
            }
        }
        EntryKind::Symlink => entry.link = (*u.choose(TARGETS)?).into(),
        EntryKind::HardLink => entry.link = self::path(u)?.into(),
        EntryKind::CharDevice | EntryKind::BlockDevice => entry.rdev = u.int_in_range(0..=3)?,
        _ => {}
    }
    Ok(entry)
}

/// What every merged tree is.
fn check(names: &Names, layers: &[Layer]) {
    assert_eq!(names.first().map(|(path, entry)| (&path[..], entry.kind)), Some((&b"/"[..], Kind::Dir)));
    let written: HashMap<(u16, u64), &TarEntry> = layers
        .iter()
        .enumerate()
        .flat_map(|(blob, layer)| layer.iter().map(move |entry| ((blob as u16, entry.offset), entry)))
        .filter(|(_, entry)| entry.kind == EntryKind::File)
        .collect();
    let mut dirs = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut groups: BTreeMap<u64, Vec<&Entry>> = BTreeMap::new();
    for (path, entry) in names {
        let shown = path.escape_ascii();
        assert!(seen.insert(path.clone()), "{shown} is there twice");
        if path != b"/" {
            let cut = path.iter().rposition(|b| *b == b'/').expect("an absolute path");
            let parent = if cut == 0 { &b"/"[..] } else { &path[..cut] };
            assert!(dirs.contains(parent), "{shown} comes before its directory");
            let name = &path[cut + 1..];
            assert!(!name.is_empty() && name != b"." && name != b".." && !name.starts_with(b".wh."), "{shown}");
        }
        if entry.kind == Kind::Dir {
            dirs.insert(path.clone());
            assert_eq!(entry.link_group, 0, "{shown}");
        }
        if entry.kind == Kind::File {
            let of = written.get(&(entry.blob.0, entry.offset)).expect("a file of some layer");
            assert_eq!(
                (entry.size, entry.mode, entry.uid, entry.mtime, &entry.extents, &entry.xattrs),
                (of.size, of.mode, of.uid, of.mtime, &of.extents, &of.xattrs),
                "{shown}"
            );
        }
        if entry.link_group != 0 {
            groups.entry(entry.link_group).or_default().push(entry);
        }
    }
    for group in groups.values() {
        assert!(group.len() > 1 && group.iter().all(|entry| entry == &group[0]), "{group:?}");
    }
    let mut places: Vec<_> = names
        .iter()
        .filter(|(_, entry)| entry.kind == Kind::File && entry.link_group == 0)
        .map(|(_, entry)| (entry.blob, entry.offset))
        .collect();
    places.sort_unstable();
    assert!(places.is_sorted_by(|a, b| a < b), "two files of one entry that are not linked");
}

/// An archive holds it and gives it back.
pub fn archive(names: &Names, layers: usize) {
    let mut builder = TreeBuilder::default();
    names.iter().for_each(|(path, entry)| builder.insert(path, entry.clone()));
    let tree = builder.finish().expect("a tree");
    assert_eq!(tree.len(), names.len());
    let layers = (0..layers).map(|layer| format!("sha256:{layer:064x}")).collect();
    let storage = Storage::Oci(Box::new(OciStorage { layers, ..Default::default() }));
    let written =
        encode(&tree, &storage, Extension::default(), &SeekTable::default(), HEADER_LEN as u64).expect("an archive");
    let header = Header::decode(&written.header).expect("our own header");
    let part = |(pos, len): (u64, u64)| &written.tail[pos as usize - HEADER_LEN..][..len as usize];
    let again = decode(&written.header, part(header.index), part(header.storage_info)).expect("our own archive");
    assert!(again.tree == tree, "another tree");
}
