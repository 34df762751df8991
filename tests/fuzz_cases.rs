//! What the fuzz targets promise (`fuzz/`, docs/fuzzing.md), held without a fuzzer: all seeds and all cases that were ever found.

#[path = "../fuzz/src/targets/mod.rs"]
mod targets;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

// As the targets name them.
use clip_csi::{archive, build, inflate, units};

use archive::gob::{Define, Encoder, TypeId};
use archive::{HEADER_LEN, Header, SeekTable, Storage};
use build::toc::{estargz, zstd_chunked};
use targets::testing::{GNU, Header as TarHeader, Tar, record};
use targets::{ALL, memory};
use units::Compression;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The files of a directory; none where it is missing.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Runs a target over its files below `kind`, and says how many there were.
fn replay(kind: &str) -> usize {
    let mut count = 0;
    for (name, run) in ALL {
        for (path, bytes) in files(&fuzz().join(kind).join(name)) {
            if let Err(panic) = std::panic::catch_unwind(|| run(&bytes)) {
                eprintln!("{} breaks {name}", path.display());
                std::panic::resume_unwind(panic);
            }
            count += 1;
        }
    }
    count
}

#[test]
fn what_fuzzing_found_stays_mended() {
    assert!(replay("cases") > 0);
}

#[test]
fn every_seed_keeps_the_promises_of_its_target() {
    assert!(replay("seeds") >= ALL.len());
}

#[test]
fn every_target_is_built_has_seeds_and_is_replayed() {
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let built: BTreeSet<&str> = manifest
        .split("[[bin]]")
        .skip(1)
        .map(|bin| bin.lines().find_map(|line| line.strip_prefix("name = ")).unwrap().trim_matches('"'))
        .collect();
    let here: BTreeSet<&str> = ALL.iter().map(|(name, _)| *name).collect();
    assert_eq!(built, here);
    for name in &here {
        assert!(!files(&fuzz().join("seeds").join(name)).is_empty(), "{name} has no seeds");
    }
    for kind in ["seeds", "cases"] {
        for entry in fs::read_dir(fuzz().join(kind)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(here.contains(&*name), "fuzz/{kind}/{name} belongs to no target");
        }
    }
}

/// Shapes of storage info in which a byte makes the most of itself.
#[test]
fn the_dearest_storage_info_stays_within_its_bound_of_memory() {
    const COUNT: u64 = 100_000;
    let oci = |types: &dyn Fn(&mut Encoder), field: (&str, TypeId), element: &[u8]| {
        let info = TypeId(64);
        let mut inner = Encoder::default();
        inner.define(info, "OCIStorageInfo", Define::Struct(&[field]));
        types(&mut inner);
        inner.structure(info, |fields| {
            let list = fields.nested(0);
            if field.0 == "ImageMetadata" {
                list.uint(1);
            }
            list.uint(COUNT);
            // Elements as raw bytes: unsigned integers below 128 are themselves.
            (0..COUNT).for_each(|_| element.iter().for_each(|byte| list.uint((*byte).into())));
            if field.0 == "ImageMetadata" {
                list.uint(0);
            }
        });
        inner.finish()
    };
    let strings = |e: &mut Encoder| e.define(TypeId(65), "[]string", Define::Slice(TypeId::STRING));
    let layers = |e: &mut Encoder| {
        e.define(TypeId(65), "ImageMetadata", Define::Struct(&[("LayersData", TypeId(66))]));
        e.define(TypeId(66), "[]LayerMetadata", Define::Slice(TypeId(67)));
        e.define(TypeId(67), "LayerMetadata", Define::Struct(&[("Size", TypeId::INT)]));
    };
    for (name, bytes) in [
        ("layers of no name", oci(&strings, ("Layers", TypeId(65)), &[0])),
        ("layers without metadata", oci(&layers, ("ImageMetadata", TypeId(65)), &[0])),
    ] {
        let mut wrapper = Encoder::default();
        let fields = [("Type", TypeId::STRING), ("Data", TypeId::BYTES)];
        wrapper.define(TypeId(64), "StorageInfoWrapper", Define::Struct(&fields));
        wrapper.structure(TypeId(64), |fields| {
            fields.bytes(0, b"oci");
            fields.bytes(1, &bytes);
        });
        let bytes = wrapper.finish();
        assert!(bytes.len() >= COUNT as usize, "{name}");
        let result = memory::bounded(bytes.len(), || Storage::decode(&bytes));
        // Either it is read whole or its count is refused; not for its encoding.
        if let Err(error) = result {
            assert!(error.to_string().contains("number of layers"), "{name}: {error}");
        }
    }
}

/// Writes the seeds that are made rather than found: `cargo test --test fuzz_cases -- --ignored`.
#[test]
#[ignore = "it writes into the checkout"]
fn write_the_seeds() {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let dir = fuzz().join("seeds").join(target);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
    };
    for (path, bytes) in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let header = Header::decode(&bytes).unwrap();
        let part = |(pos, len): (u64, u64)| &bytes[pos as usize..(pos + len) as usize];
        put("archive_decode", name, &bytes);
        put("header", name, &bytes[..HEADER_LEN]);
        put("gob", name, part(header.index));
        if header.storage_info.1 > 0 {
            put("gob", &format!("{name}.info"), part(header.storage_info));
            put("storage_info", name, part(header.storage_info));
        }
    }
    for (name, tar) in tars() {
        put("tar_walk", name, &[&[63], &tar[..]].concat());
    }
    for (name, how, bytes) in tables_of_contents() {
        put("tocs", &name, &[&[how], &bytes[..]].concat());
    }
    // Of each compression a table with several spans and windows, whole and as its two sections.
    let plain: Vec<u8> =
        (0..6000_u32).flat_map(|i| format!("{:x} ", i.wrapping_mul(2_654_435_761) % 971).into_bytes()).collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = plain.chunks(9000).flat_map(|chunk| zstd::encode_all(chunk, 3).unwrap()).collect::<Vec<u8>>();
    for (name, compression, blob) in
        [("gzip", Compression::Gzip, &gzip), ("zstd", Compression::Zstd, &zstd), ("stored", Compression::None, &plain)]
    {
        let mut indexer = inflate::Indexer::new(compression, 4096);
        indexer.push(blob, &mut |_| {}).unwrap();
        let table = SeekTable { blobs: vec![indexer.finish(&mut |_| {}).unwrap()] };
        put("seek_table", name, &table.encode());
        // What picks the rest of a run, then the blob itself.
        let setting = [0, 4, 0, 1, 7, 0, 0, 0, 0, 9, 0, 0, 0];
        let (target, how) = match compression {
            Compression::Zstd => ("zstd", 0),
            Compression::Gzip => ("inflate", 1),
            Compression::None => ("inflate", 0),
        };
        put(target, name, &[&[how], &setting[..], blob].concat());
    }
}

/// A tar of each dialect and form that the walker knows.
fn tars() -> Vec<(&'static str, Vec<u8>)> {
    let mut device = TarHeader::new(b'3', "null");
    (device.major, device.minor) = (1, 3);
    let mut sparse = TarHeader::new(b'S', "sparse");
    sparse.magic = GNU;
    let mut sparse = Tar::new().with(sparse, b"data").bytes;
    sparse[386..398].copy_from_slice(b"00000010000\0");
    sparse[398..410].copy_from_slice(b"00000000004\0");
    sparse[483..495].copy_from_slice(b"00000100000\0");
    let mut long = TarHeader::new(b'L', "././@LongLink");
    long.magic = GNU;
    let version = [record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0")].concat();
    let in_data = [version, record("GNU.sparse.name", "s"), record("GNU.sparse.realsize", "9000")].concat();
    let mut body = b"1\n4096\n512\n".to_vec();
    body.resize(1024, 7);
    let pax = [
        record("path", "p/ä"),
        record("mtime", "-1.25"),
        record("SCHILY.xattr.user.a", "b"),
        record("LIBARCHIVE.xattr.user.c", "AQI"),
        record("uid", "70000"),
    ];
    let in_header =
        [record("GNU.sparse.numblocks", "1"), record("GNU.sparse.map", "100,4"), record("GNU.sparse.size", "200")];
    vec![
        ("plain", Tar::new().dir("d/").file("d/f", "text").symlink("l", "d").hardlink("h", "d/f").end()),
        ("special", Tar::new().raw(&device, &[]).raw(&TarHeader::new(b'6', "fifo"), &[]).end()),
        ("whiteouts", Tar::new().file("d/.wh.f", "").file("d/.wh..wh..opq", "").file(".wh..wh.plnk/1", "x").end()),
        ("pax", Tar::new().pax(&pax).file("f", "x").end()),
        ("gnu-sparse", Tar { bytes: sparse }.end()),
        ("pax-sparse", Tar::new().pax(&[in_data]).file("f", &body).end()),
        ("pax-sparse-map", Tar::new().pax(&in_header).file("f", "data").end()),
        ("gnu-long", Tar::new().with(long, &[b'n'; 300]).file("f", "x").end()),
    ]
}

/// Layers with a table of contents, by the libraries that make them in the field (`tests/toc`, needs Go), whole and in their parts;
/// with what tells the target which part it is.
fn tables_of_contents() -> Vec<(String, u8, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let (program, tar) = (dir.path().join("toc"), dir.path().join("in.tar"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/toc");
    assert!(
        Command::new("go").args(["build", "-o"]).arg(&program).arg(".").current_dir(source).status().unwrap().success()
    );
    let (attribute, time) = (record("SCHILY.xattr.user.k", "v"), record("mtime", "1700000000.5"));
    let layer = Tar::new().dir("d/").file("d/f", "some text").symlink("l", "d/f").hardlink("h", "d/f");
    let layer = layer.pax(&[attribute, time]).file("d/\u{e4}", [b'x'; 700]).raw(&TarHeader::new(b'6', "fifo"), &[]);
    fs::write(&tar, layer.file("empty", "").end()).unwrap();
    let inflated = |member: &[u8]| {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(member).read_to_end(&mut plain).unwrap();
        plain
    };
    let mut out = Vec::new();
    for kind in ["estargz", "estargz-lossless", "estargz-shared", "zstd-stargz", "zstd-chunked"] {
        let to = dir.path().join(kind);
        let said = Command::new(&program).arg(kind).args([&tar, &to]).output().unwrap();
        let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        let layer = fs::read(to).unwrap();
        let size = layer.len() as u64;
        if kind.starts_with("estargz") {
            let footer = estargz::footer(&layer, size).unwrap();
            let table = inflated(&layer[footer.toc as usize..footer.start as usize]);
            let json = table[512..].split(|byte| *byte == 0).next().unwrap();
            out.push((format!("{kind}.json"), 0, json.to_vec()));
            out.push((kind.to_owned(), 2, layer));
            continue;
        }
        let annotations = serde_json::from_value(said["annotations"].clone()).unwrap();
        let positions = zstd_chunked::positions(&annotations, size).unwrap().unwrap();
        let part = |piece: zstd_chunked::Piece| {
            zstd::decode_all(&layer[piece.range().start as usize..piece.range().end as usize]).unwrap()
        };
        out.push((format!("{kind}.json"), 0, part(positions.table)));
        out.extend(positions.tar_split.map(|piece| (format!("{kind}.tar-split"), 1, part(piece))));
        let names = annotations.iter().filter_map(|(name, value)| {
            let name = name.rsplit('.').next()?;
            name.ends_with("-position").then(|| format!("{name}={value}\n"))
        });
        out.push((kind.to_owned(), 3, [names.collect::<String>().as_bytes(), b"\n", &layer].concat()));
    }
    // Bytes that pick a layer, true and changed.
    let pick = |how: u8| (0..200_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ how).collect::<Vec<u8>>();
    out.extend((0..4).map(|how| (format!("made-{how}"), 4, pick(how))));
    out
}
