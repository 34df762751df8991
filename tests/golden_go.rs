//! Archives that we made, read by the Go module (tests/golden/main.go, version in its go.mod).
//!
//! Skipped, by name, where there is no Go.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use clip_csi::archive::storage_info::OciStorage;
use clip_csi::archive::{
    Attr, BlobIx, Data, Entry, Extension, Extent, HEADER_LEN, ImageMetadata, Kind, LayerMetadata, S3Storage, SeekTable,
    Storage, Timestamp, Tree, TreeBuilder, encode,
};
use clip_csi::units::Digest;
use serde_json::Value;
use skip::needs;

#[path = "common/skip.rs"]
mod skip;

/// The Go program, built once. A Go that can't build it is a failure.
static GOLDEN: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("golden_go");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let build = Command::new("go").args(["build", "-o"]).arg(&program).arg(".").current_dir(source).output();
    let build = build.expect("go build");
    assert!(build.status.success(), "go build: {}", String::from_utf8_lossy(&build.stderr));
    program
});

/// What the Go module reads of an archive: its storage info, and its nodes by path.
fn dump(golden: &Path, archive: &Path) -> (Value, BTreeMap<Vec<u8>, Value>) {
    let output = Command::new(golden).arg("dump").arg(archive).output().expect("golden dump");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut lines = output.stdout.split(|&b| b == b'\n').filter(|line| !line.is_empty());
    let parse = |line: &[u8]| serde_json::from_slice::<Value>(line).expect("JSON");
    let storage = parse(lines.next().expect("a line"))["Storage"].take();
    let nodes = lines.map(parse).map(|node| (bytes(&node["Path"]), node)).collect();
    (storage, nodes)
}

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().expect("hex")).expect("hex")
}

/// The whole tree: what the module has a place for must be there, true.
fn assert_shown(tree: &Tree, nodes: &BTreeMap<Vec<u8>, Value>, layers: &[String]) {
    assert_eq!(nodes.len(), tree.len());
    for id in tree.ids() {
        let path = tree.path(id);
        let shown = path.escape_ascii();
        let node = nodes.get(&path).unwrap_or_else(|| panic!("{shown} is not there"));
        let Attr { kind, mode, uid, gid, size, nlink, atime, mtime, ctime, .. } = tree.attr(id);
        let (name, format) = match kind {
            Kind::Dir => ("dir", libc::S_IFDIR),
            Kind::Symlink => ("symlink", libc::S_IFLNK),
            Kind::File => ("file", libc::S_IFREG),
            Kind::Fifo => ("file", libc::S_IFIFO),
            Kind::Socket => ("file", libc::S_IFSOCK),
            Kind::CharDevice => ("file", libc::S_IFCHR),
            Kind::BlockDevice => ("file", libc::S_IFBLK),
        };
        assert_eq!(node["Type"], name, "{shown}");
        let attr = &node["Attr"];
        for (field, value) in [
            ("Ino", 1 + u64::from(tree.inode(id).0)),
            ("Size", size),
            ("Mode", u64::from(format | u32::from(mode))),
            ("Nlink", nlink.into()),
            ("Uid", uid.into()),
            ("Gid", gid.into()),
            ("Atime", atime.sec as u64),
            ("Mtime", mtime.sec as u64),
            ("Ctime", ctime.sec as u64),
            ("Mtimensec", mtime.nsec.into()),
        ] {
            let owner = &attr["Owner"];
            let found = if owner[field].is_null() { &attr[field] } else { &owner[field] };
            assert_eq!(found.as_u64(), Some(value), "{shown}: {field}");
        }
        assert_eq!(bytes(&node["Target"]), tree.target(id), "{shown}");
        assert_eq!(node["ContentHash"], tree.content_hash(id).map(|hash| hash.hex()).unwrap_or_default(), "{shown}");
        if kind == Kind::Dir {
            let names: Vec<_> = tree.children(id).map(|child| tree.name(clip_csi::archive::NodeId(child))).collect();
            let mut listed: Vec<_> = node["Listed"].as_array().map_or(&[][..], |l| l).iter().map(bytes).collect();
            listed.sort();
            assert_eq!(listed, names, "{shown}");
        }
        match tree.data(id) {
            Data::Contiguous { blob, offset } if !layers.is_empty() => {
                let remote = &node["Remote"];
                assert_eq!(remote["LayerDigest"], layers[usize::from(blob.0)], "{shown}");
                assert_eq!(
                    (remote["UOffset"].as_u64(), remote["ULength"].as_u64()),
                    (Some(offset), Some(size)),
                    "{shown}"
                );
            }
            Data::Contiguous { offset, .. } => {
                assert_eq!((node["DataPos"].as_u64(), node["DataLen"].as_u64()), (Some(offset), Some(size)), "{shown}");
            }
            Data::Sparse { .. } => {
                // Its reads of what it can't know must fail: a length, and a position behind any file's end.
                assert!(node["Remote"].is_null(), "{shown}");
                let (pos, len) = (node["DataPos"].as_u64().unwrap(), node["DataLen"].as_u64().unwrap());
                assert_eq!((pos + len, len), (i64::MAX as u64, size), "{shown}");
            }
            Data::Empty => assert!(node["Remote"].is_null(), "{shown}"),
        }
    }
}

fn tree(v2: bool) -> Tree {
    let mut builder = TreeBuilder::default();
    let time = |sec| Timestamp { sec, nsec: 7 };
    let base = |kind, mode| Entry {
        uid: 1000,
        gid: 4_000_000_000,
        mtime: time(1_700_000_000),
        atime: time(1),
        ctime: time(-5),
        ..Entry::new(kind, mode)
    };
    let file = |offset, size| Entry { offset, size, blob: BlobIx(v2.into()), ..base(Kind::File, 0o644) };
    let mut insert = |path: &[u8], entry| builder.insert(path, entry);
    insert(b"/", base(Kind::Dir, 0o1777));
    insert(b"/usr/bin/su", Entry { mode: 0o4755, ..file(55, 10) });
    insert(b"/usr/bin/empty", file(0, 0));
    insert(b"/usr/bin-x", Entry { target: b"bin/\xff".to_vec(), ..base(Kind::Symlink, 0o777) });
    let linked = Entry {
        link_group: 3,
        content_hash: Some(Digest::of(b"hello")),
        xattrs: vec![(b"security.capability".to_vec(), vec![0, 1, 2, 255]), (b"user.empty".to_vec(), Vec::new())],
        ..file(1 << 40, 5)
    };
    insert(b"/usr/a", linked.clone());
    insert(b"/usr/bin/b", linked);
    insert(b"/dev/null", Entry { rdev: 0x103, ..base(Kind::CharDevice, 0o666) });
    insert(b"/dev/sda", Entry { rdev: 0x800, ..base(Kind::BlockDevice, 0o660) });
    insert(b"/run/fifo", base(Kind::Fifo, 0o600));
    insert(b"/run/sock", base(Kind::Socket, 0o600));
    insert(b"/odd \xff\n name", file(100, 1));
    let extents = vec![
        Extent { offset: 4096, len: 100, blob_offset: 8192 },
        Extent { offset: 1 << 33, len: 1, blob_offset: 9000 },
    ];
    insert(b"/sparse", Entry { extents: Some(extents), ..file(0, 1 << 34) });
    insert(b"/hole", Entry { extents: Some(Vec::new()), ..file(0, 4096) });
    for n in 0..300 {
        insert(format!("/many/{n}").as_bytes(), file(1000 + n, n));
    }
    builder.finish().expect("a tree")
}

fn write(storage: &Storage, tree: &Tree, tail_pos: u64) -> tempfile::NamedTempFile {
    let extension = Extension {
        generator: "clip-csi test".into(),
        bundle: true,
        manifest_digest: Some(Digest::of(b"m")),
        ..Extension::default()
    };
    let encoded = encode(tree, storage, extension, &SeekTable::default(), tail_pos).expect("encoded");
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(&encoded.header).expect("written");
    file.write_all(&vec![0; tail_pos as usize - HEADER_LEN]).expect("written");
    file.write_all(&encoded.tail).expect("written");
    file
}

#[test]
fn the_go_module_reads_our_v1_archives() {
    needs!(go);
    let golden = &*GOLDEN;
    let tree = tree(false);
    let file = write(&Storage::Local, &tree, 500);
    let (storage, nodes) = dump(golden, file.path());
    assert!(storage.is_null());
    assert_shown(&tree, &nodes, &[]);

    let s3 = S3Storage {
        bucket: "b".into(),
        region: "r".into(),
        key: "k".into(),
        endpoint: "http://e".into(),
        force_path_style: true,
    };
    let file = write(&Storage::S3(s3), &tree, HEADER_LEN as u64);
    let (storage, nodes) = dump(golden, file.path());
    let expected =
        serde_json::json!({"Bucket": "b", "Region": "r", "Key": "k", "Endpoint": "http://e", "ForcePathStyle": true});
    assert_eq!(storage, expected);
    assert_shown(&tree, &nodes, &[]);
}

#[test]
fn the_go_module_reads_our_v2_indexes() {
    needs!(go);
    let golden = &*GOLDEN;
    let layers = [Digest::of(b"a").to_string(), Digest::of(b"b").to_string()];
    let map = |value: &str| [(layers[0].clone(), value.to_owned())].into();
    let image = ImageMetadata {
        name: "registry.example.com/demo:1".into(),
        digest: Digest::of(b"m").to_string(),
        repo_tags: vec!["demo:1".into()],
        created: Some((1_700_000_000, 123_456_789)),
        docker_version: "27".into(),
        labels: map("label"),
        architecture: "arm64".into(),
        os: "linux".into(),
        variant: "v8".into(),
        author: "somebody".into(),
        env: vec!["A=b".into(), String::new()],
        cmd: vec!["sh".into()],
        entrypoint: vec!["/e".into()],
        user: "7".into(),
        working_dir: "/w".into(),
        exposed_ports: vec!["80/tcp".into()],
        volumes: vec!["/data".into(), "/more".into()],
        stop_signal: "SIGINT".into(),
        layers: layers.to_vec(),
        layers_data: vec![LayerMetadata {
            mime_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
            digest: layers[0].clone(),
            size: 1 << 40,
            annotations: map("annotation"),
        }],
    };
    let oci = OciStorage {
        registry_url: "registry.example.com".into(),
        repository: "demo".into(),
        reference: format!("1@{}", Digest::of(b"m")),
        layers: layers.to_vec(),
        gzip_checkpoints: [(layers[0].clone(), vec![(10, 0), (1 << 40, 1 << 41)])].into(),
        zstd_frames: [(layers[1].clone(), vec![(0, 10, 0, 20), (10, 5, 20, 1)])].into(),
        decompressed_hash: map("00ff"),
        image: Some(image),
    };
    let tree = tree(true);
    let file = write(&Storage::Oci(Box::new(oci)), &tree, HEADER_LEN as u64);
    let (storage, nodes) = dump(golden, file.path());
    assert_shown(&tree, &nodes, &layers);
    assert_eq!(storage["RegistryURL"], "registry.example.com");
    assert_eq!(storage["Reference"], format!("1@{}", Digest::of(b"m")));
    assert_eq!(storage["Layers"], serde_json::json!(layers));
    assert_eq!(storage["DecompressedHashByLayer"][&layers[0]], "00ff");
    let gzip = &storage["GzipIdxByLayer"][&layers[0]];
    assert_eq!(gzip["LayerDigest"], layers[0]);
    assert_eq!(gzip["Checkpoints"][1], serde_json::json!({"COff": 1u64 << 40, "UOff": 1u64 << 41}));
    let zstd = &storage["ZstdIdxByLayer"][&layers[1]]["Frames"];
    assert_eq!(zstd[1], serde_json::json!({"COff": 10, "CLen": 5, "UOff": 20, "ULen": 1}));
    let expected = serde_json::json!({
        "Name": "registry.example.com/demo:1", "Digest": Digest::of(b"m").to_string(), "RepoTags": ["demo:1"],
        "Created": "2023-11-14T22:13:20.123456789Z", "DockerVersion": "27", "Labels": {layers[0].as_str(): "label"},
        "Architecture": "arm64", "Os": "linux", "Variant": "v8", "Author": "somebody", "Env": ["A=b", ""], "Cmd": ["sh"],
        "Entrypoint": ["/e"], "User": "7", "WorkingDir": "/w", "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/data": {}, "/more": {}}, "StopSignal": "SIGINT", "Layers": layers,
        "LayersData": [{"MIMEType": "application/vnd.oci.image.layer.v1.tar+gzip", "Digest": layers[0], "Size": 1u64 << 40,
            "Annotations": {layers[0].as_str(): "annotation"}}],
    });
    assert_eq!(storage["ImageMetadata"], expected);
}
