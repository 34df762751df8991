//! Archives that the Go module made (tests/golden/main.go, version in its go.mod), read by us.
//!
//! `cd tests/golden && go run . make fixtures` makes them again: times of the archive's making change, nothing else may.

use std::path::PathBuf;

use clip_csi::archive::{Archive, ArchiveError, Data, Header, Kind, NodeId, Storage, Version, decode};
use clip_csi::units::Digest;

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn open(bytes: &[u8]) -> Result<Archive, ArchiveError> {
    let header = Header::decode(bytes)?;
    header.check(bytes.len() as u64)?;
    let part = |(pos, len): (u64, u64)| &bytes[pos as usize..(pos + len) as usize];
    decode(&bytes[..54], part(header.index), part(header.storage_info))
}

/// A node a line: path, kind, mode, owner, size, link count, mtime, and where its bytes lie or what it points to.
/// Directories' times are left out: the Go module takes the root's from its clock.
fn listing(archive: &Archive) -> String {
    let tree = &archive.tree;
    let mut lines: Vec<String> = tree
        .ids()
        .map(|id| {
            let attr = tree.attr(id);
            let data = match (attr.kind, tree.data(id)) {
                (Kind::Symlink, _) => format!("-> {}", tree.target(id).escape_ascii()),
                (_, Data::Contiguous { blob, offset }) => format!("{}+{offset}", blob.0),
                (_, data) => format!("{data:?}"),
            };
            let mtime =
                if attr.kind == Kind::File { format!("{}.{}", attr.mtime.sec, attr.mtime.nsec) } else { "-".into() };
            format!(
                "{} {:?} {:o} {}:{} {} x{} {mtime} {data}",
                tree.path(id).escape_ascii(),
                attr.kind,
                attr.mode,
                attr.uid,
                attr.gid,
                attr.size,
                attr.nlink
            )
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

const V1_TREE: &str = "\
/ Dir 755 0:0 0 x3 - Empty
/config.json File 644 0:0 47 x1 1700000000.123456789 0+3114
/rootfs Dir 755 0:0 0 x5 - Empty
/rootfs/etc Dir 755 0:0 0 x2 - Empty
/rootfs/etc/hardlink File 644 0:0 7 x1 1700000000.123456789 0+3170
/rootfs/etc/hostname File 644 0:0 7 x1 1700000000.123456789 0+3186
/rootfs/tmp Dir 777 0:0 0 x2 - Empty
/rootfs/usr Dir 755 0:0 0 x5 - Empty
/rootfs/usr/bin Dir 755 0:0 0 x2 - Empty
/rootfs/usr/bin/tool File 755 0:0 20 x1 1700000000.123456789 0+55
/rootfs/usr/lib Dir 755 0:0 0 x2 - Empty
/rootfs/usr/lib-x Dir 755 0:0 0 x2 - Empty
/rootfs/usr/lib-x/\\xffname File 600 0:0 3 x1 1700000000.123456789 0+84
/rootfs/usr/lib/empty File 640 0:0 0 x1 1700000000.123456789 Empty
/rootfs/usr/lib/lib.so File 755 0:0 3000 x1 1700000000.123456789 0+105
/rootfs/usr/link Symlink 777 0:0 15 x1 - -> ../etc/hostname";

fn find(archive: &Archive, path: &[u8]) -> NodeId {
    archive.tree.resolve(NodeId::ROOT, path, false).unwrap_or_else(|error| panic!("{}: {error}", path.escape_ascii()))
}

#[test]
fn a_v1_archive_of_the_go_module_shows_its_tree_and_its_bytes() {
    let bytes = fixture("v1-local.clip");
    let archive = open(&bytes).unwrap();
    assert_eq!((archive.version(), &archive.storage), (Version::V1, &Storage::Local));
    assert_eq!(archive.extension, None);
    assert_eq!(listing(&archive), V1_TREE);
    let content = |path: &[u8]| {
        let id = find(&archive, path);
        let size = archive.tree.attr(id).size as usize;
        let content = match archive.tree.data(id) {
            Data::Contiguous { offset, .. } => &bytes[offset as usize..][..size],
            _ => &[],
        };
        assert_eq!(archive.tree.content_hash(id), Some(Digest::of(content)), "{}", path.escape_ascii());
        content
    };
    assert_eq!(content(b"/rootfs/etc/hostname"), b"golden\n");
    assert_eq!(content(b"/rootfs/usr/lib/lib.so"), "lib".repeat(1000).as_bytes());
    assert_eq!(content(b"/rootfs/usr/lib-x/\xffname"), b"odd");
    assert_eq!(content(b"/rootfs/usr/lib/empty"), b"");
}

#[test]
fn a_v1_remote_archive_of_the_go_module_names_its_object() {
    let archive = open(&fixture("v1-remote.rclip")).unwrap();
    assert_eq!(archive.version(), Version::V1);
    let Storage::S3(s3) = &archive.storage else { panic!("{:?}", archive.storage) };
    assert_eq!((&*s3.bucket, &*s3.region, &*s3.key), ("images", "eu-central-1", "golden/v1.clip"));
    assert_eq!((&*s3.endpoint, s3.force_path_style), ("http://127.0.0.1:9000", true));
    assert_eq!(listing(&archive), V1_TREE);
    assert_eq!(archive.header.storage_type, "s3");
}

#[test]
fn a_v2_index_of_the_go_module_shows_its_tree_and_its_image() {
    let archive = open(&fixture("v2.clip")).unwrap();
    assert_eq!(archive.version(), Version::V2);
    assert_eq!(
        listing(&archive),
        "\
/ Dir 755 0:0 0 x5 - Empty
/empty File 644 1000:100 0 x1 1700000000.0 Empty
/etc Dir 755 0:0 0 x2 - Empty
/etc/hostname File 640 1000:100 12 x1 1700000000.0 1+1024
/lib Symlink 777 0:0 7 x2 - -> usr/lib
/lib-too Symlink 777 0:0 7 x2 - -> usr/lib
/usr Dir 755 0:0 0 x3 - Empty
/usr/bin Dir 755 0:0 0 x2 - Empty
/usr/bin/alias File 755 1000:100 10 x2 1700000000.0 0+3584
/usr/bin/tool File 755 1000:100 10 x2 1700000000.0 0+3584
/var Dir 755 0:0 0 x2 - Empty
/var/run Symlink 777 0:0 4 x1 - -> /run"
    );
    let id = find(&archive, b"/etc/hostname");
    let attr = archive.tree.attr(id);
    assert_eq!((attr.atime, attr.ctime), (attr.mtime, attr.mtime), "Go's zero time is sanitised");
    let Storage::Oci(oci) = &archive.storage else { panic!("{:?}", archive.storage) };
    assert_eq!(
        (&*oci.registry_url, &*oci.repository, &*oci.reference),
        ("registry.example.com", "library/golden", "1")
    );
    assert_eq!(oci.layers.len(), 2);
    for layer in &oci.layers {
        assert_eq!(oci.gzip_checkpoints[layer].len(), 1);
        assert_eq!(oci.decompressed_hash[layer].len(), 64);
    }
    assert!(oci.zstd_frames.is_empty());
    let image = oci.image.as_ref().unwrap();
    assert_eq!(image.created, Some((1_700_000_000, 123_456_789)));
    assert_eq!((&*image.architecture, &*image.os, &*image.author), ("amd64", "linux", "somebody"));
    assert_eq!((&*image.user, &*image.working_dir, &*image.stop_signal), ("1000", "/srv", "SIGINT"));
    assert_eq!((&image.env[..], &image.cmd[..]), (&["PATH=/usr/bin".to_owned()][..], &["tool".to_owned()][..]));
    assert_eq!(image.entrypoint, ["/bin/sh", "-c"]);
    assert_eq!((&image.exposed_ports[..], &image.volumes[..]), (&["80/tcp".to_owned()][..], &["/data".to_owned()][..]));
    assert_eq!(image.labels["org.opencontainers.image.title"], "golden");
    assert_eq!(image.layers, oci.layers);
    assert_eq!(image.layers_data.iter().map(|l| &l.digest).collect::<Vec<_>>(), oci.layers.iter().collect::<Vec<_>>());
    assert!(image.layers_data.iter().all(|l| l.size > 0 && l.mime_type.contains("gzip")));
    assert!(image.digest.parse::<Digest>().is_ok());
}

#[test]
fn a_v2_index_that_the_go_module_classed_s3_is_refused_by_name() {
    let error = open(&fixture("v2-as-s3.rclip")).unwrap_err().to_string();
    assert!(error.contains("storage is s3") && error.contains("/e"), "{error}");
}

#[test]
fn archives_from_before_fields_were_added_are_read() {
    let v1 = open(&fixture("old-v1.clip")).unwrap();
    assert_eq!(v1.version(), Version::V1);
    assert_eq!(listing(&v1), "/ Dir 755 0:0 0 x2 - Empty\n/file File 644 0:0 5 x1 1600000000.0 0+55");
    assert_eq!(v1.tree.content_hash(find(&v1, b"/file")), None);
    let v2 = open(&fixture("old-v2.clip")).unwrap();
    assert_eq!(v2.version(), Version::V2);
    assert_eq!(listing(&v2), "/ Dir 755 0:0 0 x2 - Empty\n/file File 644 0:0 5 x1 1600000000.0 0+512");
    let Storage::Oci(oci) = &v2.storage else { panic!("{:?}", v2.storage) };
    assert_eq!((&oci.image, oci.decompressed_hash.len()), (&None, 0));
    assert_eq!(oci.gzip_checkpoints[&oci.layers[0]], [(10, 20)]);
}

#[test]
fn fields_of_any_type_that_nobody_knows_yet_are_skipped() {
    let archive = open(&fixture("newer.clip")).unwrap();
    assert_eq!(
        listing(&archive),
        "/ Dir 755 0:0 0 x2 - Empty\n/file File 640 7:8 4 x1 0.0 0+77\n/other File 640 7:8 4 x1 0.0 0+99"
    );
}

#[test]
fn damaged_fixtures_are_errors_or_other_trees_but_never_panics() {
    for name in ["v1-local.clip", "v2.clip", "newer.clip"] {
        let bytes = fixture(name);
        for len in 0..bytes.len() {
            assert!(open(&bytes[..len]).is_err(), "{name} cut to {len}");
        }
        for byte in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[byte] ^= flip;
                if let Ok(archive) = open(&bytes) {
                    listing(&archive);
                }
            }
        }
    }
}
