use std::collections::BTreeMap;
use std::io::Write as _;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::build::tar::EntryKind;
use crate::build::testing::{Header, Tar, record};
use crate::units::Compression;

/// Where the data ends in most of these tables.
const END: u64 = 10_000;

fn sha(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

fn file(name: &str, size: u64, offset: u64) -> Value {
    json!({"type": "reg", "name": name, "size": size, "offset": offset, "digest": sha(name.as_bytes()), "mode": 0o644})
}

fn table(entries: &[Value]) -> Vec<u8> {
    json!({"version": 1, "entries": entries}).to_string().into_bytes()
}

fn parsed(entries: &[Value]) -> Result<Contents, TocError> {
    entries::parse(&table(entries), END)
}

#[test]
fn every_kind_of_entry_is_read() {
    let contents = parsed(&[
        json!({"type": "dir", "name": "./d/", "mode": 0o41777, "uid": 5, "gid": 6, "modtime": "2023-11-14T22:13:20Z"}),
        json!({"type": "symlink", "name": "d/s", "linkName": "../x", "xattrs": {"user.k": "dg==", "trusted.overlay.x": ""}}),
        json!({"type": "reg", "name": "d/empty", "digest": sha(b"")}),
        json!({"type": "reg", "name": "big", "size": 10, "offset": 100, "endOffset": 170, "chunkSize": 4, "chunkDigest": sha(b"0"),
               "modtime": "1969-12-31T23:59:59.25+00:00", "accesstime": "2001-09-09T01:46:40.000000007Z"}),
        json!({"type": "chunk", "name": "big", "offset": 120, "chunkOffset": 4, "chunkSize": 5, "chunkDigest": sha(b"1"), "chunkType": "zeros"}),
        json!({"type": "chunk", "name": "big", "offset": 150, "chunkOffset": 9, "chunkDigest": sha(b"2")}),
        json!({"type": "hardlink", "name": "link", "linkName": "/big"}),
        json!({"type": "char", "name": "null", "devMajor": 1, "devMinor": 3, "NumLink": 1}),
        json!({"type": "fifo", "name": "pipe"}),
        file("small", 3, 500),
    ])
    .unwrap();
    let kinds: Vec<EntryKind> = contents.entries.iter().map(|entry| entry.kind).collect();
    use EntryKind::{CharDevice, Dir, Fifo, File, HardLink, Symlink};
    assert_eq!(kinds, [Dir, Symlink, File, File, HardLink, CharDevice, Fifo, File]);
    let [dir, symlink, empty, big, link, null, _, small] = &contents.entries[..] else { panic!() };
    assert_eq!((&*dir.path, dir.mode, dir.uid, dir.gid, dir.mtime.sec), (&b"d"[..], 0o1777, 5, 6, 1_700_000_000));
    assert_eq!((&*symlink.link, &symlink.xattrs[..]), (&b"../x"[..], &[(b"user.k".to_vec(), b"v".to_vec())][..]));
    assert_eq!((empty.size, big.size, big.offset, small.offset), (0, 10, 0, 10));
    assert_eq!((big.mtime.sec, big.mtime.nsec, big.atime.nsec), (-1, 250_000_000, 7));
    assert_eq!((&*link.link, null.rdev), (&b"big"[..], 0x103));
    let chunks: Vec<_> = contents.chunks.iter().map(|c| (c.coff, c.cend, c.len)).collect();
    assert_eq!(chunks, [(100, 120, 4), (120, 150, 5), (150, 170, 1), (500, END, 3)]);
    let table = contents.table(Digest::of(b"l"), Compression::Gzip, 20_000, Digest::of(b"d")).unwrap();
    let whole = crate::archive::SeekTable { blobs: vec![table] };
    assert_eq!(crate::archive::SeekTable::decode(&whole.encode()).unwrap(), whole);
    assert_eq!((whole.blobs[0].ulen, whole.blobs[0].spans[3].uoff), (13, 10));
}

#[test]
fn chunks_that_share_a_stream_are_told_by_what_comes_before_them() {
    let inner = |mut file: Value, inner: u64| {
        file["innerOffset"] = inner.into();
        file
    };
    let contents = parsed(&[inner(file("a", 10, 0), 512), inner(file("b", 10, 0), 1536), file("c", 1, 700)]).unwrap();
    let found: Vec<_> = contents.chunks.iter().map(|c| (c.coff, c.cend, c.skip)).collect();
    assert_eq!(found, [(0, 700, 512), (0, 700, 1536), (700, END, 0)]);
    let table = contents.table(Digest::of(b"l"), Compression::Gzip, END, Digest::of(b"d")).unwrap();
    assert_eq!(table.chunks.unwrap().skips, [(0, 512), (1, 1536)]);
    let error = parsed(&[inner(file("a", 10, 5), 512), inner(file("b", 10, 5), 521)]).unwrap_err();
    assert!(error.to_string().contains("out of order"), "{error}");
}

#[test]
fn tables_that_lie_or_lack_something_are_refused() {
    let chunk = |offset: u64, at: u64, len: u64| json!({"type": "chunk", "name": "f", "offset": offset, "chunkOffset": at, "chunkSize": len, "chunkDigest": sha(b"c")});
    let first = |size: u64, len: u64| {
        let mut file = file("f", size, 100);
        (file["chunkSize"], file["chunkDigest"]) = (len.into(), sha(b"f").into());
        file
    };
    let set = |key: &str, value: Value| {
        let mut file = file("f", 10, 100);
        file[key] = value;
        vec![file]
    };
    for (what, entries, words) in [
        ("a gap between chunks", vec![first(10, 4), chunk(200, 5, 5)], "do not make up"),
        ("chunks beyond the file", vec![first(10, 4), chunk(200, 4, 7)], "do not make up"),
        ("too few chunks", vec![first(10, 4)], "do not make up"),
        ("an empty chunk", vec![first(10, 4), chunk(200, 4, 0), chunk(300, 4, 6)], "do not make up"),
        ("chunks out of order", vec![first(10, 4), chunk(90, 4, 6)], "out of order"),
        ("a chunk where its header is", vec![file("f", 10, 0)], "out of order"),
        ("a chunk beyond the data", vec![file("f", 10, END)], "is the end"),
        ("an end before the start", set("endOffset", 100.into()), "from 100 to 100"),
        ("an end beyond the data", set("endOffset", (END + 1).into()), "is the end"),
        ("a chunk of nothing", vec![chunk(200, 4, 6)], "follows no chunk"),
        ("a chunk of another file", vec![file("g", 10, 100), chunk(200, 4, 6)], "follows no chunk"),
        ("no digest", set("digest", "".into()), "without a digest"),
        ("another kind of digest", set("digest", "md5:12".into()), "sha256:"),
        ("two digests", set("chunkDigest", sha(b"other").into()), "digests differ"),
        ("a huge chunk", set("size", (65_u64 << 20).into()), "fetched as one"),
        ("an absurd size", set("size", (1_u64 << 62).wrapping_add(1).into()), "absurd"),
        ("a negative size", set("size", (-1).into()), "size is -1"),
        ("a negative offset", set("offset", (-1).into()), "offset is -1"),
        ("far into its stream", set("innerOffset", (65 << 20).into()), "in vain"),
        ("a name above the root", set("name", "../f".into()), "above the root"),
        ("a NUL in a name", set("name", "a\0b".into()), "NUL"),
        ("an unknown type", set("type", "socket".into()), "\"socket\""),
        ("a time that is none", set("modtime", "yesterday".into()), "no time"),
        ("an owner out of range", set("uid", (1_u64 << 32).into()), "32-bit"),
        ("an attribute that is no base64", set("xattrs", json!({"user.k": "?"})), "base64"),
        ("a symlink to nothing", vec![json!({"type": "symlink", "name": "s"})], "target"),
        ("a device beyond Linux", vec![json!({"type": "char", "name": "c", "devMajor": 1 << 20})], "Linux"),
        ("a type of JSON", set("size", "ten".into()), "invalid type"),
    ] {
        let error = parsed(&entries).unwrap_err().to_string();
        assert!(error.contains(words), "{what}: {error}");
    }
    for (json, words) in [
        (&b"{\"entries\": []}"[..], "no version"),
        (b"{\"version\": 2, \"entries\": []}", "version 2"),
        (b"{\"version\": 1, \"entries\": []} x", "trailing"),
        (b"[]", "table of contents"),
        (b"", "EOF"),
    ] {
        let error = entries::parse(json, END).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn names_that_json_can_not_hold_are_noticed() {
    assert!(parsed(&[file("a\u{fffd}b", 0, 0)]).unwrap().lossy);
    assert!(parsed(&[json!({"type": "symlink", "name": "s", "linkName": "\u{fffd}"})]).unwrap().lossy);
    assert!(!parsed(&[file("ä", 0, 0)]).unwrap().lossy);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn footer(toc: u64) -> Vec<u8> {
    let mut out = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0".to_vec();
    out.extend(format!("{toc:016x}STARGZ").bytes());
    out.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    out
}

#[test]
fn both_forms_of_the_footer_are_found_at_the_end() {
    let whole = footer(0x1234);
    assert_eq!(whole.len(), estargz::FOOTER_LEN);
    let legacy = [&whole[..10], b"\x16\0", &whole[16..]].concat();
    assert_eq!(legacy.len(), 47);
    for footer in [&whole, &legacy] {
        let start = 0x2000 - footer.len() as u64;
        let tail = [&b"what comes before"[..], footer].concat();
        let found = estargz::footer(&tail, 0x2000).unwrap();
        assert_eq!(found, estargz::Footer { toc: 0x1234, start });
        for bad in [&tail[..tail.len() - 1], &footer[1..]] {
            assert!(estargz::footer(bad, 0x2000).is_err());
        }
        assert!(estargz::footer(&tail, 0x1234).is_err(), "the table would lie behind the layer's end");
    }
    let plus = [&whole[..16], b"+", &whole[17..]].concat();
    assert!(estargz::footer(&plus, 0x2000).is_err(), "no hex digit");
    assert!(matches!(estargz::footer(&footer(1), 1 << 40), Err(TocError::TooLarge { .. })));
    assert!(estargz::footer(&footer(0), 100).is_err());
}

#[test]
fn an_estargz_table_is_read_only_if_it_is_what_the_manifest_says() {
    let json = table(&[file("a", 3, 20)]);
    let tar = Tar::new().file("stargz.index.json", &json).end();
    let member = gzip(&tar);
    let toc = estargz::Footer { toc: 9000, start: 9000 + member.len() as u64 };
    let (contents, (entry, chunk)) = estargz::open(&member, toc, &Digest::of(&json)).unwrap();
    assert_eq!((contents.entries.len(), contents.chunks[0].cend), (1, 9000));
    assert_eq!((entry.size, chunk.skip, chunk.len), (json.len() as u64, 512, json.len() as u64));
    assert_eq!((chunk.coff, chunk.digest), (9000, Digest::of(&json)));
    assert!(matches!(estargz::open(&member, toc, &Digest::of(b"")), Err(TocError::Digest { .. })));
    for other in [
        Tar::new().file("other", &json).end(),
        Tar::new().file("stargz.index.json", &json).file("more", b"").end(),
        Tar::new().end(),
    ] {
        assert!(matches!(estargz::open(&gzip(&other), toc, &Digest::of(&json)), Err(TocError::Broken { .. })));
    }
    for cut in [0, 5, member.len() / 2, member.len() - 1] {
        assert!(estargz::open(&member[..cut], toc, &Digest::of(&json)).is_err(), "{cut}");
    }
    let lossy = table(&[file("\u{fffd}", 0, 0)]);
    let member = gzip(&Tar::new().file("stargz.index.json", &lossy).end());
    let error = estargz::open(&member, toc, &Digest::of(&lossy)).unwrap_err();
    assert!(error.to_string().contains("UTF-8"), "{error}");
}

#[test]
fn a_table_behind_the_end_of_the_tar_is_no_file() {
    let contents = parsed(&[file("a", 3, 20)]).unwrap();
    let headers = Tar::new().dir("d").end();
    let open = gzip(&[&b"abc"[..], &[0; 509], &headers[..512]].concat());
    assert!(estargz::is_in_the_tar(&contents, &open).unwrap());
    let ended = gzip(&[&b"abc"[..], &[0; 509], &headers].concat());
    assert!(!estargz::is_in_the_tar(&contents, &ended).unwrap());
    assert!(estargz::is_in_the_tar(&contents, &gzip(b"abc")).is_err(), "the padding is missing");
    let range = estargz::last_stream(&contents, estargz::Footer { toc: 90, start: 100 }).unwrap();
    assert_eq!(range, 20..90);
}

/// What zstd:chunked keeps beside a tar: its headers as segments, its data as sizes.
fn split(tar: &[u8], data: &[(usize, usize)]) -> Vec<u8> {
    use base64::Engine as _;
    let mut out = Vec::new();
    let segment = |bytes: &[u8]| json!({"type": 2, "payload": base64::engine::general_purpose::STANDARD.encode(bytes)});
    let mut at = 0;
    for (start, len) in data {
        writeln!(out, "{}", segment(&tar[at..*start])).unwrap();
        writeln!(out, "{}", json!({"type": 1, "name": "f", "size": len, "payload": "AAAA"})).unwrap();
        at = start + len;
    }
    writeln!(out, "{}", segment(&tar[at..])).unwrap();
    out
}

fn a_tar() -> Vec<u8> {
    let mut owned = Header::new(b'0', "d/\u{e9}");
    owned.uid = 7;
    let nanos = [record("mtime", "1700000000.123456789"), record("path", b"d/caf\xe9")];
    Tar::new().dir("d").pax(&nanos).with(owned, b"some data").file("empty", b"").file("g", [7; 600]).end()
}

/// Offsets and lengths of the data in [`a_tar`].
const DATA: [(usize, usize); 2] = [(512 + 1024 + 512, 9), (512 + 1024 + 512 + 512 + 512 + 512, 600)];

fn listed() -> Contents {
    parsed(&[
        json!({"type": "dir", "name": "d/"}),
        file("d/caf\u{fffd}", 9, 100),
        json!({"type": "reg", "name": "empty"}),
        file("g", 600, 300),
    ])
    .unwrap()
}

#[test]
fn tar_split_data_says_what_json_can_not() {
    let mut contents = listed();
    assert!(contents.lossy);
    tar_split::refine(&mut contents, &split(&a_tar(), &DATA)).unwrap();
    let entry = &contents.entries[1];
    assert_eq!((&*entry.path, entry.uid, entry.mtime.nsec), (&b"d/caf\xe9"[..], 7, 123_456_789));
    assert_eq!((contents.entries[3].offset, contents.lossy), (9, false));
}

#[test]
fn tar_split_data_that_contradicts_the_table_or_its_tar_is_refused() {
    let tar = a_tar();
    let refine = |lines: &[u8]| tar_split::refine(&mut listed(), lines).map_err(|error| error.to_string());
    let whole = split(&tar, &DATA);
    assert!(refine(&split(&tar, &DATA[..1])).unwrap_err().contains("leaves out"), "data as a segment");
    assert!(refine(&split(&tar, &[(DATA[0].0, 8), DATA[1]])).unwrap_err().contains("8 bytes"));
    assert!(refine(&split(&Tar::new().dir("d").end(), &[])).unwrap_err().contains("entries"));
    let renamed = Tar::new().dir("d").file("x", b"some data").file("other", b"").file("g", [7; 600]).end();
    let mut named = listed();
    named.lossy = false;
    let data = [(1024, 9), (1024 + 512 + 1024, 600)];
    assert!(tar_split::refine(&mut named, &split(&renamed, &data)).unwrap_err().to_string().contains("where"));
    assert!(refine(b"{\"type\": 3}").unwrap_err().contains("type 3"));
    assert!(refine(b"{\"type\": 2, \"payload\": \"?\"}").unwrap_err().contains("base64"));
    assert!(refine(b"{\"type\": 1, \"size\": -5}").is_err());
    assert!(refine(&whole[..whole.len() / 2]).is_err());
    let sparse =
        [record("GNU.sparse.map", "0,3"), record("GNU.sparse.size", "600"), record("GNU.sparse.numblocks", "1")];
    let sparse = Tar::new().pax(&sparse).file("g", b"abc").end();
    let mut contents = parsed(&[file("g", 600, 100)]).unwrap();
    let refined = tar_split::refine(&mut contents, &split(&sparse, &[(1536, 3)]));
    assert!(matches!(refined, Err(TocError::Lacking(_))), "{refined:?}");
}

fn annotated(prefix: &str, pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| (format!("{prefix}{key}"), (*value).to_owned())).collect()
}

#[test]
fn zstd_tables_are_found_by_their_annotations_and_must_match_them() {
    let lines = split(&a_tar(), &DATA);
    let stored_lines = zstd::bulk::compress(&lines, 3).unwrap();
    let mut json: Value = serde_json::from_slice(&table(&[
        json!({"type": "dir", "name": "d/"}),
        file("d/caf\u{fffd}", 9, 100),
        json!({"type": "reg", "name": "empty"}),
        file("g", 600, 300),
    ]))
    .unwrap();
    json["tarSplitDigest"] = sha(&stored_lines).into();
    let json = json.to_string().into_bytes();
    let stored = zstd::bulk::compress(&json, 3).unwrap();
    let position = format!("1008:{}:{}:1", stored.len(), json.len());
    let split_position = format!("{}:{}:{}", 1016 + stored.len(), stored_lines.len(), lines.len());
    let pairs = [
        ("manifest-position", &*position),
        ("manifest-checksum", &sha(&stored)),
        ("tarsplit-position", &split_position),
    ];
    for prefix in ["io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."] {
        let found = zstd_chunked::positions(&annotated(prefix, &pairs), 5000).unwrap().unwrap();
        let contents = zstd_chunked::open(&found, &stored, Some(&stored_lines)).unwrap();
        assert_eq!(&*contents.entries[1].path, b"d/caf\xe9");
        assert_eq!(contents.chunks[1].cend, 1000, "the data ends before the head of the first skippable frame");
        let error = zstd_chunked::open(&found, &stored, None).unwrap_err();
        assert!(error.to_string().contains("UTF-8"), "without tar-split data a name is lost: {error}");
        assert!(matches!(zstd_chunked::open(&found, &stored, Some(b"other")), Err(TocError::Digest { .. })));
        assert!(matches!(zstd_chunked::open(&found, &stored[1..], None), Err(TocError::Digest { .. })));
        let mut lying = found.clone();
        lying.table.plain += 1;
        assert!(matches!(zstd_chunked::open(&lying, &stored, None), Err(TocError::Broken { .. })));
        lying.table.plain -= 2;
        assert!(matches!(zstd_chunked::open(&lying, &stored, None), Err(TocError::Broken { .. })));
    }
    assert!(zstd_chunked::positions(&BTreeMap::new(), 5000).is_none());
    for (size, key, value) in [
        (1008, "manifest-position", &*position),
        (5000, "manifest-position", "1008:5:5:2"),
        (5000, "manifest-position", "1008:5:5"),
        (5000, "manifest-position", "7:5:5:1"),
        (5000, "manifest-position", "+8:5:5:1"),
        (5000, "manifest-position", "18446744073709551615:5:5:1"),
        (5000, "manifest-checksum", "none"),
        (5000, "tarsplit-position", "1008:5000:5"),
        (5000, "tarsplit-position", "1008:5:99999999999"),
    ] {
        let mut map = annotated("io.github.containers.zstd-chunked.", &pairs);
        map.insert(format!("io.github.containers.zstd-chunked.{key}"), value.to_owned());
        assert!(zstd_chunked::positions(&map, size).unwrap().is_err(), "{key} {value}");
    }
}

proptest! {
    #[test]
    fn arbitrary_tables_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        cut in any::<prop::sample::Index>(),
        values in prop::collection::vec((any::<prop::sample::Index>(), any::<i64>()), 0..6),
    ) {
        let _ = entries::parse(&bytes, END);
        let _ = tar_split::parse(&bytes);
        let _ = estargz::footer(&bytes, bytes.len() as u64);
        let keys = ["size", "offset", "endOffset", "innerOffset", "chunkOffset", "chunkSize", "mode", "uid", "devMajor"];
        let mut entries = vec![file("a", 10, 100), json!({"type": "chunk", "name": "a", "offset": 200}), file("b", 1, 300)];
        for (at, value) in &values {
            let entry = at.index(entries.len());
            entries[entry][keys[at.index(keys.len())]] = (*value).into();
        }
        if let Ok(contents) = parsed(&entries) {
            let blob = contents.table(Digest([1; 32]), Compression::Zstd, END, Digest([2; 32])).unwrap();
            let table = crate::archive::SeekTable { blobs: vec![blob] };
            prop_assert_eq!(crate::archive::SeekTable::decode(&table.encode()).unwrap(), table);
        }
        let lines = split(&a_tar(), &DATA);
        let _ = tar_split::parse(&lines[..cut.index(lines.len())]);
    }
}
