use proptest::prelude::*;

use super::super::testing::{GNU, Header, Tar, V7, record, seal};
use super::*;

/// Walks a stream fed in pieces of `step` bytes.
fn walk(bytes: &[u8], step: usize) -> Result<Vec<TarEntry>, TarError> {
    let mut walker = Walker::new();
    let mut out = Vec::new();
    for piece in bytes.chunks(step) {
        walker.push(piece, &mut |entry| out.push(entry))?;
    }
    walker.finish()?;
    Ok(out)
}

fn one(tar: Tar) -> TarEntry {
    let mut all = walk(&tar.end(), 4096).unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn error(tar: Tar) -> String {
    walk(&tar.end(), 4096).unwrap_err().to_string()
}

#[test]
fn entries_and_offsets_do_not_depend_on_how_the_stream_is_cut() {
    let tar = Tar::new()
        .dir("./")
        .file("a/b", "hello")
        .pax(&[record("path", "long/name"), record("mtime", "1.5")])
        .file("short", vec![7; 1500])
        .symlink("l", "../a")
        .hardlink("h", "./a//b")
        .end();
    let whole = walk(&tar, usize::MAX).unwrap();
    assert_eq!(whole.len(), 5);
    for step in [1, 7, 511, 512, 513, 10_000] {
        assert_eq!(walk(&tar, step).unwrap(), whole, "step {step}");
    }
    assert_eq!(&*whole[0].path, b"");
    assert_eq!(&tar[whole[1].offset as usize..][..5], b"hello");
    assert_eq!(&*whole[2].path, b"long/name");
    assert_eq!(whole[2].mtime, Timestamp { sec: 1, nsec: 500_000_000 });
    assert_eq!((whole[2].size, tar[whole[2].offset as usize]), (1500, 7));
    assert_eq!(&*whole[3].link, b"../a");
    assert_eq!(&*whole[4].link, b"a/b");
}

#[test]
fn every_dialect_and_number_form_is_read() {
    let mut header = Header::new(b'0', "name");
    header.prefix = b"some/prefix".to_vec();
    header.uid = 4_000_000_000;
    header.mode = 0o106_755;
    let entry = one(Tar::new().raw(&header, &[]));
    assert_eq!((&*entry.path, entry.uid, entry.mode), (&b"some/prefix/name"[..], 4_000_000_000, 0o6755));

    let mut v7 = Header::new(0, "dir/");
    v7.magic = V7;
    assert_eq!(one(Tar::new().raw(&v7, &[])).kind, EntryKind::Dir);

    let mut device = Header::new(b'3', "null");
    (device.major, device.minor) = (1, 259);
    assert_eq!(one(Tar::new().raw(&device, &[])).rdev, 0x0010_0103);
    device.major = 1 << 12;
    assert!(error(Tar::new().raw(&device, &[])).contains("device 4096:259"));

    // A base-256 time before the epoch.
    let mut block = Header::new(b'0', "old").block();
    block[136..148].copy_from_slice(&[0xff; 12]);
    seal(&mut block);
    assert_eq!(one(Tar { bytes: block.to_vec() }).mtime.sec, -1);

    // A sum over signed bytes.
    let mut block = Header::new(b'0', [0xe4, 0xf6]).block();
    let sum: i32 = (0..512).map(|i| if (148..156).contains(&i) { 32 } else { i32::from(block[i] as i8) }).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(&*one(Tar { bytes: block.to_vec() }).path, [0xe4, 0xf6]);
}

#[test]
fn a_wrong_checksum_is_refused() {
    let mut tar = Tar::new().file("f", "x").bytes;
    tar[0] ^= 1;
    assert!(error(Tar { bytes: tar }).contains("checksum"));
}

#[test]
fn gnu_long_names_reach_past_the_header() {
    let name = [b"d/".repeat(100), b"file".to_vec()].concat();
    let long = |kind, text: &[u8]| {
        let mut header = Header::new(kind, "././@LongLink");
        header.magic = GNU;
        (header, [text, b"\0"].concat())
    };
    let (l, l_data) = long(b'L', &name);
    let (k, k_data) = long(b'K', &name);
    let mut link = Header::new(b'1', "cut");
    link.magic = GNU;
    let entry = one(Tar::new().with(l, &l_data).with(k, &k_data).raw(&link, &[]));
    assert_eq!((&*entry.path, &*entry.link), (&name[..], &name[..]));
}

#[test]
fn pax_overrides_the_header_and_attributes_are_kept() {
    let mut header = Header::new(b'0', "short");
    header.size = 1;
    let tar = Tar::new()
        .pax(&[
            record("size", "600"),
            record("uid", "70000"),
            record("gid", "4294967295"),
            record("atime", "5"),
            record("SCHILY.xattr.user.z", b"\0\xff"),
            record("LIBARCHIVE.xattr.user.%7a", "bm90IHRoaXM"),
            record("LIBARCHIVE.xattr.user.%61", "YmluYXJ5"),
            record("SCHILY.xattr.trusted.overlay.opaque", "y"),
            record("comment", ""),
        ])
        .raw(&header, &[1; 600]);
    let entry = one(tar.clone());
    assert_eq!((entry.size, entry.uid, entry.gid), (600, 70_000, u32::MAX));
    assert_eq!((entry.atime.sec, entry.ctime.sec), (5, 1_700_000_000));
    let want = [(b"user.a".to_vec(), b"binary".to_vec()), (b"user.z".to_vec(), b"\0\xff".to_vec())];
    assert_eq!(entry.xattrs, want);
    // The records are the next entry's only.
    let all = walk(&tar.file("next", "").end(), 512).unwrap();
    assert_eq!((&*all[1].path, all[1].uid, all[1].xattrs.len()), (&b"next"[..], 0, 0));
}

#[test]
fn global_pax_headers_change_nothing() {
    let tar = Tar::new().with(Header::new(b'g', "g"), &record("path", "evil")).file("f", "x");
    assert_eq!(&*one(tar).path, b"f");
}

fn sparse_pieces(entry: &TarEntry) -> Vec<(u64, u64, u64)> {
    entry.extents.iter().flatten().map(|e| (e.offset, e.len, e.blob_offset - entry.offset)).collect()
}

#[test]
fn all_four_forms_of_a_sparse_file_give_the_same_extents() {
    let data = [[1_u8; 512], [2; 512]].concat();
    let want = vec![(4096, 512, 0), (1 << 33, 512, 512)];
    let size = (1_u64 << 33) + 5000;
    let offsets = [4096, 1 << 33];

    let mut old = Header::new(b'S', "f");
    old.magic = GNU;
    old.size = 1024;
    let mut block = old.block();
    let number = |field: &mut [u8], value: u64| field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    for (i, offset) in offsets.iter().enumerate() {
        let at = 386 + i * 24;
        number(&mut block[at..at + 12], (*offset).min((1 << 33) - 1));
        number(&mut block[at + 12..at + 24], 512);
    }
    // 2^33 needs base-256.
    let mut big = [0_u8; 12];
    big[4..].copy_from_slice(&(1_u64 << 33).to_be_bytes());
    big[0] = 0x80;
    block[386 + 24..386 + 36].copy_from_slice(&big);
    big[4..].copy_from_slice(&size.to_be_bytes());
    block[483..495].copy_from_slice(&big);
    seal(&mut block);
    let entry = one(Tar { bytes: block.to_vec() }.data(&data));
    assert_eq!((entry.size, sparse_pieces(&entry)), (size, want.clone()));

    // The same with the second piece in an extension block.
    let second = block[386 + 24..386 + 48].to_vec();
    block[386 + 24..386 + 48].fill(0);
    block[482] = 1;
    seal(&mut block);
    let mut extension = [0; 512];
    extension[..24].copy_from_slice(&second);
    let entry = one(Tar { bytes: [block, extension].concat() }.data(&data));
    assert_eq!((entry.size, sparse_pieces(&entry)), (size, want.clone()));

    let mut pax: Vec<Vec<Vec<u8>>> = Vec::new();
    let sizes = [record("GNU.sparse.size", size.to_string()), record("GNU.sparse.numblocks", "2")];
    let mut v00 = sizes.to_vec();
    for offset in offsets {
        v00.push(record("GNU.sparse.offset", offset.to_string()));
        v00.push(record("GNU.sparse.numbytes", "512"));
    }
    pax.push(v00);
    let map = record("GNU.sparse.map", format!("4096,512,{},512", offsets[1]));
    pax.push([&sizes[..], &[map, record("GNU.sparse.name", "f")]].concat());
    for records in pax {
        let entry = one(Tar::new().pax(&records).file("GNUSparseFile.0/f", &data));
        assert_eq!((entry.size, sparse_pieces(&entry)), (size, want.clone()));
    }

    let records = [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.minor", "0"),
        record("GNU.sparse.name", "f"),
        record("GNU.sparse.realsize", size.to_string()),
    ];
    let mut body = format!("2\n4096\n512\n{}\n512\n", offsets[1]).into_bytes();
    body.resize(512, 0);
    body.extend(&data);
    let tar = Tar::new().pax(&records).file("GNUSparseFile.0/f", &body).file("next", "n").end();
    for step in [1, 512, 5000] {
        let all = walk(&tar, step).unwrap();
        assert_eq!((&*all[0].path, all[0].size, sparse_pieces(&all[0])), (&b"f"[..], size, want.clone()));
        assert_eq!(tar[all[0].offset as usize], 1);
        assert_eq!(&*all[1].path, b"next");
    }
}

#[test]
fn a_sparse_map_that_contradicts_its_file_is_refused() {
    for (map, blocks, size, stored) in [
        ("0,512,256,512", "2", "4096", 1024),  // overlaps
        ("0,512,4000,512", "2", "4096", 1024), // past the end
        ("0,512", "1", "4096", 1024),          // less than stored
        ("0,512", "2", "4096", 512),           // other count
        ("0,512,1", "1", "4096", 512),         // odd
        ("9223372036854775807,512", "1", "9223372036854775807", 512),
    ] {
        let records =
            [record("GNU.sparse.size", size), record("GNU.sparse.numblocks", blocks), record("GNU.sparse.map", map)];
        let message = error(Tar::new().pax(&records).file("f", vec![0; stored]));
        assert!(message.contains("map") || message.contains("absurd"), "{map}: {message}");
    }
    // A count without end costs no memory.
    let records = [record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0")];
    let mut body = b"9223372036854775807\n".to_vec();
    body.resize(2 << 20, b'0');
    assert!(error(Tar::new().pax(&records).file("f", body)).contains("map"));
}

#[test]
fn names_that_lead_out_of_the_image_are_refused_by_name() {
    for name in ["../etc/passwd", "a/../../b", "/..", "./../x"] {
        let message = error(Tar::new().file(name, "x"));
        assert!(message.contains(name) && message.contains("above the root"), "{message}");
    }
    assert!(error(Tar::new().hardlink("h", "a/../../x")).contains("hard link to a/../../x"));
    assert_eq!(&*one(Tar::new().file("/a/./b/../c//d", "x")).path, b"a/c/d");
    let nul = Tar::new().pax(&[record("path", b"a\0b")]).file("f", "x");
    assert!(error(nul).contains("NUL"));
    assert!(error(Tar::new().pax(&[record("path", "n".repeat(256))]).file("f", "")).contains("255"));
    assert!(error(Tar::new().pax(&[record("path", "n/".repeat(2049))]).file("f", "")).contains("4095"));
}

#[test]
fn absurd_numbers_are_refused() {
    let mut header = Header::new(b'0', "f");
    header.size = 1 << 62 | 1;
    assert!(error(Tar::new().raw(&header, &[])).contains("absurd"));
    let mut block = Header::new(b'0', "f").block();
    block[124..136].copy_from_slice(&[0xff; 12]);
    seal(&mut block);
    assert!(error(Tar { bytes: block.to_vec() }).contains("size is -1"));
    let mut header = Header::new(b'x', "pax");
    header.size = 1 << 40;
    assert!(error(Tar::new().raw(&header, &[])).contains("extended header of over"));
    let big_uid = Tar::new().pax(&[record("uid", "4294967296")]).file("f", "");
    assert!(error(big_uid).contains("owner 4294967296"));
    assert!(error(Tar::new().raw(&Header::new(b'V', "label"), &[])).contains("'V'"));
    assert!(error(Tar::new().symlink("l", "")).contains("target"));
}

#[test]
fn a_cut_stream_is_truncated_except_in_its_closing_padding() {
    let tar = Tar::new().pax(&[record("path", "p")]).file("f", "x".repeat(700)).end();
    let whole = walk(&tar, 512).unwrap();
    let data_end = whole[0].offset as usize + 700;
    for cut in 1..tar.len() {
        let result = walk(&tar[..cut], 333);
        // Whole: nothing but the first header of two (not emitted), or all of the data.
        let fine = (cut >= data_end && cut <= data_end.next_multiple_of(512))
            || (cut > data_end && cut % 512 == 0)
            || cut == 1024;
        assert_eq!(result.is_ok(), fine, "cut at {cut}: {result:?}");
    }
}

#[test]
fn what_follows_the_end_is_padding_and_a_lone_zero_block_is_no_end() {
    let mut tar = Tar::new().file("f", "x").end();
    tar.extend(vec![0xaa; 10_000]);
    assert_eq!(walk(&tar, 999).unwrap().len(), 1);
    let mut lone = Tar::new().file("f", "x");
    lone.bytes.extend([0; 512]);
    assert!(error(lone.file("g", "y")).contains("zero block"));
    assert!(walk(&[], 1).unwrap().is_empty());
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096), step in 1_usize..2000) {
        let _ = walk(&bytes, step);
    }

    /// Headers with valid checksums over damaged fields reach the code that a checksum would shield.
    #[test]
    fn damaged_headers_with_good_checksums_never_panic(
        kind in prop::sample::select(&b"\x000123456789xgLKSD"[..]),
        damage in proptest::collection::vec((0_usize..512, any::<u8>()), 0..24),
        data in proptest::collection::vec(any::<u8>(), 0..1500),
        step in 1_usize..2000,
    ) {
        let mut header = Header::new(kind, "some/name");
        header.size = data.len() as u64;
        if kind == b'S' { header.magic = GNU; }
        let mut block = header.block();
        for (at, value) in damage { block[at] = value; }
        seal(&mut block);
        let tar = Tar { bytes: block.to_vec() }.data(&data).file("after", "x").end();
        let cut = walk(&tar, step);
        prop_assert_eq!(cut.is_ok(), walk(&tar, usize::MAX).is_ok());
    }

    #[test]
    fn flipped_bits_never_panic(at in 0_usize..6000, bit in 0_u8..8) {
        let records = [
            record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.realsize", "9000"),
            record("SCHILY.xattr.user.a", "b"), record("mtime", "1.25"),
        ];
        let mut body = b"1\n4096\n512\n".to_vec();
        body.resize(1024, 7);
        let mut tar = Tar::new().dir("d").pax(&records).file("d/s", &body).symlink("l", "d").hardlink("h", "d/s").end();
        let at = at % tar.len();
        tar[at] ^= 1 << bit;
        let _ = walk(&tar, 777);
    }
}
