use proptest::prelude::*;

use super::super::gob::{Define, Encoder, Fields};
use super::super::storage_info::{OciStorage, S3Storage};
use super::super::{BlobTable, Data, Encoded, Entry, HEADER_LEN, NodeId, SeekTable, Span, encode};
use super::*;
use crate::units::{Compression, Platform};

fn layers() -> Storage {
    let layers = ["a", "b", "c"].map(|l| Digest::of(l.as_bytes()).to_string()).to_vec();
    Storage::Oci(Box::new(OciStorage { layers, ..OciStorage::default() }))
}

fn s3() -> Storage {
    Storage::S3(S3Storage { bucket: "b".into(), key: "k".into(), ..S3Storage::default() })
}

fn extension() -> Extension {
    Extension {
        generator: "clip-csi test".into(),
        seek_table: None,
        bundle: true,
        manifest_digest: Some(Digest::of(b"manifest")),
        platform: Some(Platform { os: "linux".into(), arch: "arm64".into(), variant: Some("v8".into()) }),
        layout: Some("/images/layout".into()),
    }
}

fn seek_table() -> SeekTable {
    let span = Span {
        uoff: 0,
        coff: 0,
        cend: 10,
        bits: 0,
        starts_stream: false,
        window: (0, 0),
        digest: Digest::of(b"0123456789"),
    };
    SeekTable {
        blobs: vec![BlobTable {
            digest: Digest::of(b"0123456789"),
            compression: Compression::None,
            clen: 10,
            ulen: 10,
            diff_id: Digest::of(b"0123456789"),
            spans: vec![span],
            windows: Vec::new(),
            chunks: None,
        }],
    }
}

/// One of everything.
fn tree(v2: bool) -> Tree {
    let mut builder = TreeBuilder::default();
    let mut insert = |path: &str, entry| builder.insert(path.as_bytes(), entry);
    let time = |sec| Timestamp { sec, nsec: 5 };
    let base = |kind, mode| Entry {
        uid: 1000,
        gid: 4_000_000_000,
        mtime: time(1_700_000_000),
        atime: time(-5),
        ctime: time(3),
        ..Entry::new(kind, mode)
    };
    insert("/", base(Kind::Dir, 0o1777));
    insert("/bin/su", Entry { size: 10, offset: 55, ..base(Kind::File, 0o4755) });
    insert("/bin/empty", base(Kind::File, 0o644));
    insert("/bin-x", Entry { target: b"bin/\xff".to_vec(), ..base(Kind::Symlink, 0o777) });
    let linked = Entry {
        size: 5,
        offset: 1 << 40,
        blob: BlobIx(u16::from(v2) * 2),
        link_group: 3,
        content_hash: Some(Digest::of(b"hello")),
        xattrs: vec![(b"security.capability".to_vec(), vec![0, 1, 2, 255]), (b"user.empty".to_vec(), Vec::new())],
        ..base(Kind::File, 0o2755)
    };
    insert("/z", linked.clone());
    insert("/bin/linked", linked);
    insert("/dev/null", Entry { rdev: 0x103, ..base(Kind::CharDevice, 0o666) });
    insert("/dev/sda", Entry { rdev: 0xffff_ffff, ..base(Kind::BlockDevice, 0o660) });
    insert("/run/fifo", base(Kind::Fifo, 0o600));
    insert("/run/sock", base(Kind::Socket, 0o600));
    let extents = vec![
        Extent { offset: 4096, len: 100, blob_offset: 8192 },
        Extent { offset: 1 << 33, len: 1, blob_offset: 9000 },
    ];
    insert(
        "/sparse",
        Entry { size: 1 << 34, extents: Some(extents), blob: BlobIx(v2.into()), ..base(Kind::File, 0o600) },
    );
    insert("/hole", Entry { size: 1 << 20, extents: Some(Vec::new()), ..base(Kind::File, 0o600) });
    if !v2 {
        let extents = Some(vec![Extent { offset: 0, len: 7, blob_offset: 4000 }]);
        insert("/whole", Entry { size: 1 << 20, offset: 4000, extents, ..base(Kind::File, 0o600) });
    }
    insert("/\u{1f600} name\n", Entry { link_group: 7, ..base(Kind::Fifo, 0) });
    insert("/another", Entry { link_group: 7, ..base(Kind::Fifo, 0) });
    builder.finish().unwrap()
}

fn read(encoded: &Encoded, tail_pos: u64) -> Result<Archive, ArchiveError> {
    let header = Header::decode(&encoded.header)?;
    header.check(tail_pos + encoded.tail.len() as u64)?;
    let part = |(pos, len): (u64, u64)| match len {
        0 => &[],
        _ => &encoded.tail[(pos - tail_pos) as usize..][..len as usize],
    };
    decode(&encoded.header, part(header.index), part(header.storage_info))
}

#[test]
fn an_archive_of_every_kind_decodes_to_what_was_encoded() {
    for (storage, version) in [(Storage::Local, Version::V1), (s3(), Version::V1), (layers(), Version::V2)] {
        let tree = tree(version == Version::V2);
        let tail_pos = if version == Version::V2 { HEADER_LEN as u64 } else { 1 << 41 };
        let encoded = encode(&tree, &storage, extension(), &seek_table(), tail_pos).unwrap();
        let archive = read(&encoded, tail_pos).unwrap();
        assert_eq!(archive.tree, tree);
        if version == Version::V1 {
            let images = |tree: &Tree| tree.ids().map(|id| tree.sparse_image(id)).collect::<Vec<_>>();
            assert_eq!(images(&archive.tree), images(&tree));
            assert_eq!(archive.tree.sparse_image(find(&archive, "/whole")), Some(4000));
        }
        assert_eq!(archive.storage, storage);
        assert_eq!(archive.version(), version);
        assert_eq!(archive.header.storage_type, storage.type_name());
        let read = archive.extension.unwrap();
        assert_eq!(read.seek_table, encoded.seek_table);
        assert_eq!(Extension { seek_table: None, ..read.clone() }, extension());
        match (storage, read.seek_table) {
            // The full archive holds it; the remote one keeps what it was told.
            (Storage::S3(_), found) => assert_eq!(found, None),
            (_, found) => {
                let (pos, len, digest) = found.unwrap();
                let bytes = &encoded.tail[(pos - tail_pos) as usize..][..len as usize];
                assert_eq!(Digest::of(bytes), digest);
                assert_eq!(SeekTable::decode(bytes).unwrap(), seek_table());
            }
        }
    }
}

#[test]
fn a_remote_archive_keeps_the_seek_table_of_the_full_one() {
    let named = Some((1234, 567, Digest::of(b"table")));
    let extension = Extension { seek_table: named, ..extension() };
    let encoded = encode(&tree(false), &s3(), extension, &SeekTable::default(), HEADER_LEN as u64).unwrap();
    assert_eq!(encoded.seek_table, named);
    assert_eq!(read(&encoded, HEADER_LEN as u64).unwrap().extension.unwrap().seek_table, named);
}

/// The bytes are a contract: with the Go module, with archives that are out there, and with digests that name them.
#[test]
fn the_encoding_is_deterministic_and_frozen() {
    let digest = |v2| {
        let storage = if v2 { layers() } else { Storage::Local };
        let encoded = encode(&tree(v2), &storage, extension(), &seek_table(), 100).unwrap();
        Digest::of(&[&encoded.header[..], &encoded.tail].concat()).hex()
    };
    let expected = [
        "681f10fcc3526bcb2e214250e3e1927d923a12e8745d0d85972403fda2f727e8",
        "3c73a5fdc105b05b2f5c42606b490c9acc69e06aed3eeec2e4af6c8cd729a623",
    ];
    assert_eq!([digest(false), digest(true)], expected);
}

#[test]
fn no_bit_of_the_metadata_changes_unnoticed() {
    for (v2, storage) in [(false, Storage::Local), (false, s3()), (true, layers())] {
        let encoded = encode(&tree(v2), &storage, extension(), &SeekTable::default(), HEADER_LEN as u64).unwrap();
        let (pos, len) = encoded_index(&encoded);
        let whole = [&encoded.header[..], &encoded.tail[pos..]].concat();
        let decode = |bytes: &[u8]| {
            let (header, rest) = bytes.split_at(HEADER_LEN);
            decode(header, &rest[..len], &rest[len..]).map(|archive| archive.digest)
        };
        decode(&whole).unwrap();
        // Of most bytes one bit, each kind of bit in its turn.
        for at in (0..whole.len() * 8).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            assert!(decode(&damaged).is_err(), "bit {at} of {}", whole.len() * 8);
        }
    }
}

/// To the Go module, that is: it must try to read such a file, and fail.
#[test]
fn a_sparse_file_has_a_length_and_lies_nowhere_for_readers_that_know_no_extents() {
    let mut builder = TreeBuilder::default();
    let extents = Some(vec![Extent { offset: 4096, len: 100, blob_offset: 8192 }]);
    builder.insert(b"/sparse", Entry { size: 1 << 20, extents, ..Entry::new(Kind::File, 0o600) });
    let tree = builder.finish().unwrap();
    for storage in [Storage::Local, s3(), layers()] {
        let encoded = encode(&tree, &storage, Extension::default(), &SeekTable::default(), HEADER_LEN as u64).unwrap();
        let (pos, len) = encoded_index(&encoded);
        let mut index = encoded.tail[pos..][..len].to_vec();
        // Fields that nobody knows are skipped.
        let is_ours =
            |at: &usize| [&b"XClip"[..], b"clip-csi-metadata"].iter().any(|name| index[*at..].starts_with(name));
        let ours: Vec<_> = (0..index.len()).filter(is_ours).collect();
        assert!(!ours.is_empty());
        ours.into_iter().for_each(|at| index[at] = b'Y');
        let archive = load(&index, &Storage::Local).unwrap();
        let file = find(&archive, "/sparse");
        assert_eq!(archive.tree.attr(file).size, 1 << 20);
        let nowhere = i64::MAX as u64 - (1 << 20);
        assert_eq!(archive.tree.data(file), Data::Contiguous { blob: BlobIx(0), offset: nowhere });
    }
}

fn encoded_index(encoded: &Encoded) -> (usize, usize) {
    let (pos, len) = Header::decode(&encoded.header).unwrap().index;
    (pos as usize - HEADER_LEN, len as usize)
}

#[test]
fn the_digest_covers_header_index_and_storage_info() {
    let encode = |storage: &Storage, pos| {
        let encoded = encode(&tree(true), storage, extension(), &SeekTable::default(), pos).unwrap();
        read(&encoded, pos).unwrap().digest
    };
    let base = encode(&layers(), 54);
    assert_eq!(encode(&layers(), 54), base);
    assert_ne!(encode(&layers(), 55), base);
    let Storage::Oci(mut other) = layers() else { panic!() };
    other.reference = "x".into();
    assert_ne!(encode(&Storage::Oci(other), 54), base);
}

#[test]
fn data_in_a_layer_that_the_image_has_not_is_refused_when_writing() {
    let Storage::Oci(mut few) = layers() else { panic!() };
    few.layers.truncate(1);
    let error = encode(&tree(true), &Storage::Oci(few), extension(), &SeekTable::default(), 54).unwrap_err();
    assert!(error.to_string().contains("layer"), "{error}");
}

#[test]
fn parts_of_another_length_than_the_header_says_are_refused() {
    let encoded = encode(&tree(false), &s3(), extension(), &SeekTable::default(), 54).unwrap();
    let header = Header::decode(&encoded.header).unwrap();
    let (index, info) = encoded.tail.split_at(header.index.1 as usize);
    assert!(decode(&encoded.header, index, info).is_ok());
    assert!(matches!(decode(&encoded.header, &index[1..], info), Err(ArchiveError::Truncated { what: "index", .. })));
    assert!(matches!(
        decode(&encoded.header, index, &info[1..]),
        Err(ArchiveError::Truncated { what: "storage info", .. })
    ));
    assert!(decode(&encoded.header, &encoded.tail, info).is_err());
}

/// Writes the fields of one node.
type Write<'a> = &'a dyn Fn(&mut Fields<'_>);

/// An index as the Go module writes it, with the fields that a test wants. Fields: 0 NodeType, 1 Path, 2 Attr (0 Ino, 1 Size,
/// 2 Mode, 3 Nlink, 4 Atime, 5 Mtime), 3 Target, 4 ContentHash, 5 DataPos, 6 DataLen, 7 Remote (0 LayerDigest, 1 UOffset, 2 ULength), 8 XClipExt (0 Major).
fn upstream(nodes: &[Write<'_>]) -> Vec<u8> {
    let [list, node, attr, remote, ext] = [65, 66, 67, 68, 69].map(TypeId);
    let (string, int, uint) = (TypeId::STRING, TypeId::INT, TypeId::UINT);
    let mut encoder = Encoder::default();
    encoder.define(list, "", Define::Slice(node));
    encoder.define(
        node,
        "ClipNode",
        Define::Struct(&[
            ("NodeType", string),
            ("Path", string),
            ("Attr", attr),
            ("Target", string),
            ("ContentHash", string),
            ("DataPos", int),
            ("DataLen", int),
            ("Remote", remote),
            ("XClipExt", ext),
        ]),
    );
    let attrs = [("Ino", uint), ("Size", uint), ("Mode", uint), ("Nlink", uint), ("Atime", uint), ("Mtime", uint)];
    encoder.define(attr, "Attr", Define::Struct(&attrs));
    encoder.define(remote, "RemoteRef", Define::Struct(&[("LayerDigest", string), ("UOffset", int), ("ULength", int)]));
    encoder.define(ext, "XClipExt", Define::Struct(&[("Major", uint), ("Strange", attr)]));
    encoder.single(list, |writer| {
        writer.uint(nodes.len() as u64);
        for node in nodes {
            let mut fields = writer.fields();
            node(&mut fields);
            fields.end();
        }
    });
    encoder.finish()
}

fn attr(fields: &mut Fields<'_>, values: [u64; 6]) {
    let mut attr = fields.nested(2).fields();
    values.iter().enumerate().for_each(|(n, &value)| attr.uint(n as i64, value));
    attr.end();
}

fn named(fields: &mut Fields<'_>, kind: &str, path: &str) {
    fields.bytes(0, kind.as_bytes());
    fields.bytes(1, path.as_bytes());
}

fn remote(fields: &mut Fields<'_>, layer: &str, offset: i64, len: i64) {
    let mut remote = fields.nested(7).fields();
    remote.bytes(0, layer.as_bytes());
    remote.int(1, offset);
    remote.int(2, len);
    remote.end();
}

fn load(index: &[u8], storage: &Storage) -> Result<Archive, ArchiveError> {
    let info = storage.encode();
    let header = Header {
        index: (54, index.len() as u64),
        storage_info: (54 + index.len() as u64, info.len() as u64),
        // Wrong on purpose: the wrapper's type decides.
        storage_type: "s3".into(),
    };
    decode(&header.encode(), index, &info)
}

fn find(archive: &Archive, path: &str) -> NodeId {
    archive.tree.resolve(NodeId::ROOT, path.as_bytes(), false).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn storage_and_nodes_that_disagree_are_refused_by_name() {
    let layer = Digest::of(b"b").to_string();
    let in_layer = |f: &mut Fields<'_>| {
        named(f, "file", "/usr/lib/x.so");
        remote(f, &layer, 1, 2);
    };
    let in_archive = |f: &mut Fields<'_>| {
        named(f, "file", "/usr/lib/x.so");
        f.int(5, 55);
        f.int(6, 2);
    };
    let unknown_layer = |f: &mut Fields<'_>| {
        named(f, "file", "/usr/lib/x.so");
        remote(f, "sha256:unknown", 1, 2);
    };
    let nowhere = |f: &mut Fields<'_>| {
        named(f, "file", "/usr/lib/x.so");
        attr(f, [5, 100, 0o644, 1, 0, 0]);
    };
    let negative = |f: &mut Fields<'_>| {
        named(f, "file", "/usr/lib/x.so");
        remote(f, &layer, -1, 2);
    };
    let cases: &[(Write<'_>, Storage, &str)] = &[
        (&in_layer, Storage::Local, "storage is none"),
        (&in_layer, s3(), "storage is s3"),
        (&in_archive, layers(), "storage is oci"),
        (&unknown_layer, layers(), "sha256:unknown"),
        (&nowhere, layers(), "no data location"),
        (&negative, layers(), "UOffset is -1"),
    ];
    for (node, storage, words) in cases {
        let error = load(&upstream(&[*node]), storage).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("/usr/lib/x.so"), "{error}");
    }
    let archive = load(&upstream(&[&in_layer]), &layers()).unwrap();
    assert_eq!(archive.version(), Version::V2);
    let data = archive.tree.data(find(&archive, "/usr/lib/x.so"));
    assert_eq!(data, Data::Contiguous { blob: BlobIx(1), offset: 1 });
}

#[test]
fn equal_inode_numbers_are_a_hard_link_only_where_all_else_agrees() {
    let file = |path: &'static str, ino: u64, pos: i64, mode: u64| {
        move |f: &mut Fields<'_>| {
            named(f, "file", path);
            attr(f, [ino, 5, mode, 1, 0, 0]);
            f.int(5, pos);
            f.int(6, 5);
        }
    };
    let nodes = [
        file("/a", 7, 60, 0o644),
        file("/b", 7, 60, 0o644),
        file("/other-data", 7, 90, 0o644),
        file("/other-data-too", 7, 90, 0o644),
        file("/other-mode", 7, 60, 0o600),
        file("/zero1", 0, 60, 0o644),
        file("/zero2", 0, 60, 0o644),
    ];
    let nodes: Vec<Write<'_>> = nodes.iter().map(|n| n as _).collect();
    let archive = load(&upstream(&nodes), &Storage::Local).unwrap();
    let inode = |path| archive.tree.inode(find(&archive, path));
    let nlink = |path| archive.tree.attr(find(&archive, path)).nlink;
    assert_eq!(inode("/b"), find(&archive, "/a"));
    assert_eq!(inode("/other-data-too"), find(&archive, "/other-data"));
    assert_eq!(
        [nlink("/a"), nlink("/b"), nlink("/other-data"), nlink("/other-mode"), nlink("/zero1")],
        [2, 2, 2, 1, 1]
    );
    assert_ne!(inode("/zero1"), inode("/zero2"));
}

#[test]
fn the_go_modules_hard_link_to_a_symlink_is_that_symlink() {
    let link = |f: &mut Fields<'_>| {
        named(f, "symlink", "/b");
        attr(f, [9, 6, 0o120777, 1, 0, 0]);
        f.bytes(3, b"target");
    };
    let hard = |f: &mut Fields<'_>| {
        named(f, "file", "/a");
        attr(f, [9, 6, 0o120777, 1, 0, 0]);
    };
    let archive = load(&upstream(&[&hard, &link]), &layers()).unwrap();
    for path in ["/a", "/b"] {
        let id = find(&archive, path);
        assert_eq!(archive.tree.target(id), b"target");
        assert_eq!(archive.tree.attr(id).nlink, 2);
    }
}

#[test]
fn names_left_over_below_a_file_are_not_shown() {
    let node = |kind: &'static str, path: &'static str| move |f: &mut Fields<'_>| named(f, kind, path);
    let nodes = [node("dir", "/"), node("file", "/was-dir"), node("dir", "/was-dir/d"), node("file", "/was-dir/d/x")];
    let nodes: Vec<Write<'_>> = nodes.iter().map(|n| n as _).collect();
    let archive = load(&upstream(&nodes), &layers()).unwrap();
    assert_eq!(archive.tree.len(), 2);
    // In an archive of ours nothing is left over: there it is corruption.
    let ours = |f: &mut Fields<'_>| {
        named(f, "dir", "/");
        let mut ext = f.nested(8).fields();
        ext.uint(0, 1);
        ext.end();
    };
    let error = load(&upstream(&[&ours, nodes[1], nodes[2]]), &layers()).unwrap_err().to_string();
    assert!(error.contains("/was-dir/d"), "{error}");
}

#[test]
fn bad_paths_and_types_are_refused_by_name() {
    for (kind, path, words) in [
        ("file", "/a/../b", ".."),
        ("file", "/a/", "/a/"),
        ("file", "relative", "relative"),
        ("file", "/", "root"),
        ("file", "", "slash"),
        ("socket", "/a", "socket"),
        ("", "/a", "/a"),
    ] {
        let error = load(&upstream(&[&|f| named(f, kind, path)]), &Storage::Local).unwrap_err().to_string();
        assert!(error.contains(words), "{kind} {path}: {error}");
    }
    let twice = |f: &mut Fields<'_>| named(f, "dir", "/twice");
    assert!(load(&upstream(&[&twice, &twice]), &Storage::Local).unwrap_err().to_string().contains("/twice"));
}

#[test]
fn an_extension_of_a_newer_major_version_is_refused_and_of_a_newer_minor_one_read() {
    let root = |major: u64, strange: bool| {
        move |f: &mut Fields<'_>| {
            named(f, "dir", "/");
            let mut ext = f.nested(8).fields();
            ext.uint(0, major);
            if strange {
                let mut unknown = ext.nested(1).fields();
                unknown.uint(0, 5);
                unknown.end();
            }
            ext.end();
        }
    };
    assert_eq!(load(&upstream(&[&root(1, true)]), &Storage::Local).unwrap().extension, Some(Extension::default()));
    let error = load(&upstream(&[&root(2, true)]), &Storage::Local).unwrap_err();
    assert!(matches!(error, ArchiveError::Unsupported { .. }) && error.to_string().contains("version 2"), "{error}");
    assert!(load(&upstream(&[&root(0, true)]), &Storage::Local).is_err());
    assert_eq!(load(&upstream(&[&|f| named(f, "dir", "/")]), &Storage::Local).unwrap().extension, None);
}

#[test]
fn gos_zero_time_becomes_the_mtime() {
    let node = |f: &mut Fields<'_>| {
        named(f, "file", "/a");
        attr(f, [5, 0, 0o644, 1, 18_446_744_011_573_954_816, 1_600_000_000]);
    };
    let archive = load(&upstream(&[&node]), &layers()).unwrap();
    let attr = archive.tree.attr(find(&archive, "/a"));
    assert_eq!((attr.atime.sec, attr.mtime.sec, attr.ctime.sec), (1_600_000_000, 1_600_000_000, 0));
}

#[test]
fn damaged_archives_are_errors_or_other_trees_but_never_panics() {
    let encoded = encode(&tree(true), &layers(), extension(), &SeekTable::default(), 54).unwrap();
    let header = Header::decode(&encoded.header).unwrap();
    let (index, info) = encoded.tail.split_at(header.index.1 as usize);
    let storage = Storage::decode(info).unwrap();
    for len in 0..index.len() {
        assert!(decode_index(&index[..len], &storage).is_err(), "{len}");
    }
    for bit in 0..index.len() * 8 {
        let mut index = index.to_vec();
        index[bit / 8] ^= 1 << (bit % 8);
        if let Ok((tree, _)) = decode_index(&index, &storage) {
            tree.ids().for_each(|id| drop(tree.path(id)));
        }
    }
}

/// Linear in time and space, however the inode numbers, paths and owners are chosen.
#[test]
fn hostile_indexes_take_no_more_than_their_size_deserves() {
    let mut paths = Vec::new();
    for n in 0..20_000 {
        paths.push(format!("/{n}"));
    }
    for n in 0..20 {
        paths.push(format!("/{}{n}", "d/".repeat(2000)));
    }
    let nodes: Vec<_> = paths
        .iter()
        .enumerate()
        .map(|(n, path)| {
            move |f: &mut Fields<'_>| {
                named(f, "file", path);
                attr(f, [1, 0, 0o644, 5, 0, 0]);
                f.int(5, n as i64);
                f.int(6, 1);
            }
        })
        .collect();
    let nodes: Vec<Write<'_>> = nodes.iter().map(|n| n as _).collect();
    let index = upstream(&nodes);
    let started = std::time::Instant::now();
    let tree = load(&index, &Storage::Local).unwrap().tree;
    assert!(started.elapsed().as_secs() < 10);
    assert!(tree.memory() < index.len() * 20, "{} bytes of {}", tree.memory(), index.len());
    assert_eq!(tree.inodes(), tree.len());
}

fn name() -> impl Strategy<Value = String> {
    // Few and short, so that paths share parents; bytes below and above the slash, and two that are no ASCII.
    prop::sample::select(vec!["a", "b", "a-", "a.b", " ", "é", "\u{fffd}", "z\n", "..."]).prop_map(String::from)
}

prop_compose! {
    fn time()(sec in -(1i64 << 31)..(1 << 34) - (1 << 31), nsec in 0u32..1_000_000_000) -> Timestamp {
        Timestamp { sec, nsec }
    }
}

prop_compose! {
    fn entry()(
        kind in prop::sample::select(vec![
            Kind::File, Kind::File, Kind::File, Kind::Dir, Kind::Symlink, Kind::Fifo, Kind::Socket, Kind::CharDevice,
            Kind::BlockDevice,
        ]),
        mode in 0u16..0o10000,
        owner in prop::sample::select(vec![(0, 0), (1000, 1000), (u32::MAX, 1)]),
        size in prop::sample::select(vec![0u64, 1, 4096, 1 << 40]),
        times: (bool,),
        [atime, mtime, ctime] in [time(), time(), time()],
        target in "[ -~]{1,20}",
        xattrs in prop::collection::btree_map("[a-z.]{1,8}", prop::collection::vec(any::<u8>(), 0..9), 0..3),
        hash in prop::option::of(any::<[u8; 32]>()),
        (rdev, blob, offset, link_group) in (any::<u32>(), 0u16..3, 1u64..1 << 40, 0u64..5),
        extents in prop::option::of(prop::collection::vec((1u64..100, 1u64..100, 0u64..1 << 40), 0..4)),
    ) -> Entry {
        let mut at = 0;
        let extents = extents.filter(|_| size >= 4096).map(|steps| steps.iter().map(|&(gap, len, blob_offset)| {
            let offset = at + gap;
            at = offset + len;
            Extent { offset, len, blob_offset }
        }).collect());
        let sparse = extents.is_some();
        Entry {
            kind, mode, uid: owner.0, gid: owner.1, size, rdev, mtime,
            atime: if times.0 { atime } else { mtime }, ctime,
            target: target.into_bytes(),
            xattrs: xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect(),
            content_hash: hash.map(Digest),
            blob: BlobIx(blob),
            offset: if sparse { 0 } else { offset },
            extents,
            link_group,
        }
    }
}

prop_compose! {
    fn trees(v2: bool)(named in prop::collection::vec((prop::collection::vec(name(), 1..5), entry()), 0..40)) -> Tree {
        let mut builder = TreeBuilder::default();
        let mut taken = std::collections::BTreeMap::new();
        let mut kinds = std::collections::HashMap::new();
        for (path, mut entry) in named {
            // A name below something that is no directory would be an error; so would two types in one link group.
            let of_group = *kinds.entry(entry.link_group).or_insert(entry.kind);
            if of_group != entry.kind {
                entry.link_group = 0;
            }
            if !v2 {
                entry.blob = BlobIx(0);
            }
            let blocked = (1..path.len()).any(|len| taken.get(&path[..len]).is_some_and(|&kind| kind != Kind::Dir));
            let parent_of = taken.range(path.clone()..).next().is_some_and(|(other, _): (&Vec<String>, _)| other.starts_with(&path));
            if blocked || parent_of {
                continue;
            }
            builder.insert(format!("/{}", path.join("/")).as_bytes(), entry.clone());
            taken.insert(path, entry.kind);
        }
        builder.finish().unwrap()
    }
}

proptest! {
    #[test]
    fn every_v1_tree_round_trips(tree in trees(false)) {
        let encoded = encode(&tree, &Storage::Local, extension(), &SeekTable::default(), 1 << 41).unwrap();
        prop_assert_eq!(read(&encoded, 1 << 41).unwrap().tree, tree);
    }

    #[test]
    fn every_v2_tree_round_trips(tree in trees(true)) {
        let encoded = encode(&tree, &layers(), extension(), &SeekTable::default(), 54).unwrap();
        prop_assert_eq!(read(&encoded, 54).unwrap().tree, tree);
    }

    #[test]
    fn arbitrary_indexes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..1000) {
        let _ = decode_index(&bytes, &Storage::Local);
        let encoded = encode(&tree(true), &layers(), extension(), &SeekTable::default(), 54).unwrap();
        let header = Header::decode(&encoded.header).unwrap();
        let mut index = encoded.tail[..header.index.1 as usize].to_vec();
        let at = at % index.len();
        let len = bytes.len().min(index.len() - at);
        index[at..at + len].copy_from_slice(&bytes[..len]);
        let _ = decode_index(&index, &layers());
    }
}
