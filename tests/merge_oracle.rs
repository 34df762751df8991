//! The merge rules against a real unpacker: what `umoci unpack` makes of a layout, the merger must say of its layers.
//!
//! Skipped, by name, where umoci is not installed or the test does not run as root.

#[path = "common/skip.rs"]
mod skip;
#[path = "../src/build/testing.rs"]
mod testing;

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use clip_csi::archive::{BlobIx, Kind};
use clip_csi::build::merge::Merger;
use clip_csi::build::tar::Walker;
use clip_csi::units::Digest;
use serde_json::json;
use skip::{installed, skipped};
use testing::{Header, Tar, record};

/// One line per path: type, mode, owner, size or target or device, content digest, mtime (files only: an unpacker touches directories),
/// attributes, and the first path of the same inode.
type Listing = BTreeMap<Vec<u8>, String>;

fn ours(layers: &[Tar]) -> Listing {
    let tars: Vec<Vec<u8>> = layers.iter().map(|tar| tar.clone().end()).collect();
    let mut merger = Merger::new();
    for (i, tar) in tars.iter().enumerate() {
        let mut walker = Walker::new();
        let mut entries = Vec::new();
        walker.push(tar, &mut |entry| entries.push(entry)).unwrap();
        walker.finish().unwrap();
        merger.apply(BlobIx(i as u16), entries).unwrap();
    }
    let mut found = BTreeMap::new();
    merger.finish("", &mut |path, entry| {
        found.insert(path, entry);
    });
    let mut groups: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    found
        .into_iter()
        .map(|(path, entry)| {
            let what = match entry.kind {
                Kind::File => {
                    let layer = &tars[usize::from(entry.blob.0)];
                    let mut content = vec![0; entry.size as usize];
                    match &entry.extents {
                        None => content.copy_from_slice(&layer[entry.offset as usize..][..entry.size as usize]),
                        Some(extents) => extents.iter().for_each(|e| {
                            let data = &layer[e.blob_offset as usize..][..e.len as usize];
                            content[e.offset as usize..][..e.len as usize].copy_from_slice(data);
                        }),
                    }
                    format!("file {} {} {}", entry.size, Digest::of(&content), entry.mtime.sec)
                }
                Kind::Dir => "dir".into(),
                Kind::Symlink => format!("symlink {} {}", entry.target.escape_ascii(), entry.mtime.sec),
                Kind::Fifo => "fifo".into(),
                Kind::Socket => "socket".into(),
                Kind::CharDevice | Kind::BlockDevice => format!("device {:?} {:#x}", entry.kind, entry.rdev),
            };
            let xattrs: Vec<String> = entry.xattrs.iter().map(|(n, v)| xattr(n, v)).collect();
            let first = match entry.link_group {
                0 => path.clone(),
                group => groups.entry(group).or_insert_with(|| path.clone()).clone(),
            };
            (path, line(&what, entry.mode.into(), entry.uid, entry.gid, &xattrs, &first))
        })
        .collect()
}

fn xattr(name: &[u8], value: &[u8]) -> String {
    format!("{}={}", name.escape_ascii(), value.escape_ascii())
}

fn line(what: &str, mode: u32, uid: u32, gid: u32, xattrs: &[String], first: &[u8]) -> String {
    format!("{what} {mode:o} {uid}:{gid} {xattrs:?} ={}", first.escape_ascii())
}

fn theirs(rootfs: &Path) -> Listing {
    let mut all = vec![rootfs.to_owned()];
    let mut at = 0;
    while let Some(path) = all.get(at).cloned() {
        at += 1;
        if std::fs::symlink_metadata(&path).unwrap().is_dir() {
            all.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    all.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    let mut inodes: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut out = Listing::new();
    for path in all {
        let name = path.as_os_str().as_bytes().strip_prefix(rootfs.as_os_str().as_bytes()).unwrap().to_vec();
        let name = if name.is_empty() { b"/".to_vec() } else { name };
        let stat = std::fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let what = if kind.is_file() {
            format!("file {} {} {}", stat.len(), Digest::of(&std::fs::read(&path).unwrap()), stat.mtime())
        } else if kind.is_dir() {
            "dir".into()
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&path).unwrap();
            format!("symlink {} {}", target.as_os_str().as_bytes().escape_ascii(), stat.mtime())
        } else if kind.is_fifo() {
            "fifo".into()
        } else {
            let kind = if kind.is_char_device() { Kind::CharDevice } else { Kind::BlockDevice };
            format!("device {kind:?} {:#x}", stat.rdev())
        };
        let mut list = vec![0; 4096];
        let len = rustix::fs::llistxattr(&path, &mut list[..]).unwrap();
        let mut xattrs: Vec<String> = list[..len]
            .split(|b| *b == 0)
            .filter(|n| !n.is_empty())
            .map(|name| {
                let mut value = vec![0; 4096];
                let len = rustix::fs::lgetxattr(&path, name, &mut value[..]).unwrap();
                xattr(name, &value[..len])
            })
            .collect();
        xattrs.sort();
        let first = inodes.entry(stat.ino()).or_insert_with(|| name.clone()).clone();
        out.insert(name, line(&what, stat.mode() & 0o7777, stat.uid(), stat.gid(), &xattrs, &first));
    }
    out
}

/// Writes a layout with one image, tag `t`.
fn layout(dir: &Path, layers: &[Tar]) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        (digest.to_string(), bytes.len())
    };
    let tars: Vec<Vec<u8>> = layers.iter().map(|tar| tar.clone().end()).collect();
    let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": diff_ids.iter().map(|_| json!({"created_by": "test"})).collect::<Vec<_>>(),
    });
    let (config, config_size) = put(config.to_string().as_bytes());
    let descriptors: Vec<_> = tars
        .iter()
        .map(|tar| {
            let (digest, size) = put(tar);
            json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size})
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
        "layers": descriptors,
    });
    let (manifest, size) = put(manifest.to_string().as_bytes());
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": size,
            "annotations": {"org.opencontainers.image.ref.name": "t"},
        }],
    });
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// `Err`: why it can't be told here.
fn unpack(layers: &[Tar]) -> Result<(tempfile::TempDir, bool), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("it takes root".into());
    }
    if !installed("umoci") {
        return Err("umoci is not installed".into());
    }
    let dir = tempfile::tempdir().unwrap();
    layout(&dir.path().join("layout"), layers);
    let output = Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:t", dir.path().join("layout").display()))
        .arg(dir.path().join("bundle"))
        .output()
        .expect("umoci can be started");
    if !output.status.success() {
        eprintln!("umoci: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok((dir, output.status.success()))
}

/// Both agree on the merged tree.
fn agree(name: &str, layers: &[Tar]) {
    let (dir, ok) = match unpack(layers) {
        Ok(unpacked) => unpacked,
        Err(why) => return skipped(&format!("merge_oracle: {name}"), &why),
    };
    assert!(ok, "umoci can't unpack {name}");
    let (ours, theirs) = (ours(layers), theirs(&dir.path().join("bundle/rootfs")));
    for (path, theirs) in &theirs {
        let ours = ours.get(path).map_or("nothing", String::as_str);
        assert_eq!(ours, theirs, "{name}: {}", path.escape_ascii());
    }
    for path in ours.keys() {
        assert!(theirs.contains_key(path), "{name}: {} is in our tree only", path.escape_ascii());
    }
}

fn base() -> Tar {
    let mut sticky = Header::new(b'5', "tmp/");
    (sticky.mode, sticky.uid, sticky.gid) = (0o1777, 7, 8);
    let mut suid = Header::new(b'0', "usr/bin/su");
    (suid.mode, suid.uid) = (0o4755, 1000);
    Tar::new()
        .dir("./")
        .raw(&sticky, &[])
        .dir("usr")
        .dir("usr/bin")
        .with(suid, b"su")
        .hardlink("usr/bin/su2", "usr/bin/su")
        .dir("usr/lib")
        .file("usr/lib/libc", "libc")
        .symlink("lib", "usr/lib")
        .symlink("abs", "/usr/lib")
        .dir("etc")
        .file("etc/a", "a")
        .file("etc/b", "b")
        .dir("etc/sub")
        .file("etc/sub/x", "x")
        .file("plain", "plain")
}

#[test]
fn whiteouts_and_opaque_directories() {
    let upper = [
        ("hide", Tar::new().file("etc/.wh.a", "").file(".wh.plain", "").file("usr/bin/.wh.su", "")),
        ("hide a tree", Tar::new().file(".wh.etc", "")),
        ("opaque first", Tar::new().dir("etc").file("etc/.wh..wh..opq", "").file("etc/new", "new")),
        ("opaque last", Tar::new().dir("etc").file("etc/new", "new").file("etc/.wh..wh..opq", "")),
        ("sibling before", Tar::new().dir("etc").file("etc/a", "2").file("etc/.wh.a", "")),
        ("sibling after", Tar::new().dir("etc").file("etc/.wh.a", "").file("etc/a", "2")),
        ("nothing there", Tar::new().file("etc/.wh.none", "")),
    ];
    for (name, layer) in upper {
        agree(name, &[base(), layer]);
    }
    agree("come back", &[base(), Tar::new().file(".wh.etc", ""), Tar::new().dir("etc").file("etc/a", "3")]);
}

#[test]
fn replacements() {
    let upper = [
        ("file by directory", Tar::new().dir("plain").file("plain/f", "f")),
        ("directory by file", Tar::new().file("etc", "now a file")),
        ("directory by symlink", Tar::new().symlink("etc", "usr")),
        ("symlink by directory", Tar::new().dir("lib").file("lib/own", "own")),
        ("symlink by file", Tar::new().file("lib", "file")),
        ("one name of a linked file", Tar::new().file("usr/bin/su", "new")),
        ("directory over directory", {
            let mut etc = Header::new(b'5', "etc/");
            (etc.mode, etc.uid) = (0o700, 5);
            Tar::new().pax(&[record("SCHILY.xattr.user.k", "v")]).raw(&etc, &[])
        }),
    ];
    for (name, layer) in upper {
        agree(name, &[base(), layer]);
    }
}

#[test]
fn symlinks_in_the_parent_path() {
    let upper = [
        ("relative", Tar::new().file("lib/new", "new")),
        ("absolute", Tar::new().file("abs/new", "new")),
        ("whiteout", Tar::new().file("lib/.wh.libc", "")),
        ("out of the root", Tar::new().symlink("up", "../../../etc").file("up/new", "new")),
        ("hard link through it", Tar::new().hardlink("lib/c", "abs/libc")),
        ("dangling", Tar::new().symlink("d", "not/yet").file("d/new", "new")),
    ];
    for (name, layer) in upper {
        agree(name, &[base(), layer]);
    }
}

#[test]
fn links_special_files_and_sparse_files() {
    let mut null = Header::new(b'3', "null");
    (null.major, null.minor, null.mode) = (1, 3, 0o666);
    let sparse = [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.minor", "0"),
        record("GNU.sparse.name", "sparse"),
        record("GNU.sparse.realsize", "100000"),
    ];
    let mut body = b"1\n50000\n512\n".to_vec();
    body.resize(512, 0);
    body.extend([5; 512]);
    let upper = [
        ("to a lower layer", Tar::new().hardlink("again", "usr/bin/su")),
        ("to a symlink", Tar::new().hardlink("lib2", "lib")),
        ("special", Tar::new().raw(&null, &[]).raw(&Header::new(b'6', "fifo"), &[])),
        ("sparse", Tar::new().pax(&sparse).file("GNUSparseFile.0/sparse", &body)),
        ("long name", Tar::new().pax(&[record("path", format!("{0}/{0}/{0}/f", "n".repeat(200)))]).file("f", "f")),
        ("root attributes", {
            let mut root = Header::new(b'5', "./");
            (root.mode, root.uid) = (0o711, 9);
            Tar::new().raw(&root, &[])
        }),
    ];
    for (name, layer) in upper {
        agree(name, &[base(), layer]);
    }
}

/// Where no unpacker can follow us nobody can tell what is right: we refuse as well.
#[test]
fn what_an_unpacker_refuses_is_refused() {
    for (name, layer) in [
        ("link to nothing", Tar::new().hardlink("l", "nowhere")),
        ("link to a directory", Tar::new().hardlink("l", "etc")),
        ("a file as a parent", Tar::new().file("p", "1").file("p/q", "2")),
    ] {
        match unpack(&[base(), layer.clone()]) {
            Ok((_dir, ok)) => assert!(!ok, "umoci unpacks {name}"),
            Err(why) => skipped(&format!("merge_oracle: {name}"), &why),
        }
        let mut merger = Merger::new();
        let refused = [base(), layer].into_iter().enumerate().any(|(i, tar)| {
            let mut entries = Vec::new();
            Walker::new().push(&tar.end(), &mut |entry| entries.push(entry)).unwrap();
            merger.apply(BlobIx(i as u16), entries).is_err()
        });
        assert!(refused, "{name}");
    }
}
