//! The demo's image: layers of this machine's own files and the changes that make merging hard, as an OCI layout, and
//! the [`Model`] of what they merge to, computed from what was put into them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::model::{Inodes, Model, Record, What, join};
use crate::units::{Digest, Platform};

/// Time of everything that the demo writes itself: 2023-11-14 22:13:20 UTC.
const EPOCH: u64 = 1_700_000_000;
/// Larger files are left out, so that the image has many.
const MAX_FILE: u64 = 16 << 20;
/// What the third layer hides at most of one directory, so that the image keeps its size.
const MAX_HIDDEN: u64 = 1 << 20;
/// What the lower layer takes of [`SHARE`] at most.
const MAX_SHARE_FILES: usize = 4000;
/// Many small files: the lowest layer, a third of the bytes at most.
const SHARE: &[&str] = &["/usr/share", "/usr/include"];
/// Larger files: the second layer.
const LIB: &[&str] = &["/usr/lib", "/usr/bin", "/usr/sbin", "/usr/libexec", "/usr/local"];

/// The image that was made.
#[derive(Debug)]
pub(super) struct DemoImage {
    /// What it merges to.
    pub(super) model: Model,
    pub(super) layers: usize,
    /// Sum of the compressed layers.
    pub(super) layer_bytes: u64,
    /// What the upper layers do, for the report.
    pub(super) changes: Vec<String>,
    /// A file in the middle of a layer, about 1 MiB: the one that is read first.
    pub(super) probe: Vec<u8>,
}

/// One entry of a layer.
struct Entry {
    path: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
    body: Body,
}

enum Body {
    Dir,
    Copy(PathBuf),
    Bytes(Vec<u8>),
    Symlink(Vec<u8>),
    /// Another name of an earlier entry of the same layer.
    HardLink(Vec<u8>),
}

/// A layer with what its entries held, in order.
struct Written {
    blob: Blob,
    diff_id: Digest,
    entries: Vec<(Entry, Content)>,
}

struct Blob {
    digest: Digest,
    size: u64,
}

/// Makes the image in `dir` (created), with about `target` bytes of files.
pub(super) fn make(dir: &Path, target: u64) -> io::Result<DemoImage> {
    fs::create_dir_all(dir.join("blobs/sha256"))?;
    let mut seen = BTreeSet::new();
    let mut lowest = vec![directory(b"", 0o755, EPOCH)];
    lowest.extend(collect(SHARE, target / 3, MAX_SHARE_FILES, &mut seen));
    let rest = target.saturating_sub(lowest.iter().map(size).sum());
    let second = collect(LIB, rest, usize::MAX, &mut seen);
    // The two large layers are compressed side by side.
    let (lowest, second) = std::thread::scope(|scope| {
        let second = scope.spawn(|| write_layer(dir, second));
        let lowest = write_layer(dir, lowest)?;
        let second = second.join().map_err(|_| io::Error::other("a layer's writer panicked"))??;
        io::Result::Ok((lowest, second))
    })?;

    let mut model = Model::default();
    apply(&mut model, &lowest);
    apply(&mut model, &second);
    let probe = probe(&model, &second).ok_or_else(|| io::Error::other("/usr holds no file to read"))?;
    let (third, changes) = change(&model, &probe);
    let third = write_layer(dir, third)?;
    apply(&mut model, &third);
    let top = write_layer(dir, application())?;
    apply(&mut model, &top);

    let layers = [lowest, second, third, top];
    write_manifest(dir, &layers)?;
    let layer_bytes = layers.iter().map(|l| l.blob.size).sum();
    Ok(DemoImage { model, layers: layers.len(), layer_bytes, changes, probe })
}

fn directory(path: &[u8], mode: u32, mtime: u64) -> Entry {
    Entry { path: path.to_vec(), mode, uid: 0, gid: 0, mtime, body: Body::Dir }
}

fn text(path: &str, mode: u32, content: &str) -> Entry {
    let body = Body::Bytes(content.into());
    Entry { path: path.into(), mode, uid: 0, gid: 0, mtime: EPOCH, body }
}

fn size(entry: &Entry) -> u64 {
    match &entry.body {
        Body::Copy(path) => fs::metadata(path).map_or(0, |m| m.len()),
        _ => 0,
    }
}

/// Files, directories and symlinks below `roots`, in order, until there are `bytes` or `files` of them.
fn collect(roots: &[&str], bytes: u64, files: usize, seen: &mut BTreeSet<Vec<u8>>) -> Vec<Entry> {
    let mut out = Vec::new();
    let mut left = (bytes, files);
    for root in roots {
        let root = Path::new(root);
        if !fs::symlink_metadata(root).is_ok_and(|m| m.is_dir()) {
            continue;
        }
        let parents: Vec<&Path> = root.ancestors().skip(1).collect();
        for parent in parents.into_iter().rev().filter(|p| *p != Path::new("/")) {
            entry_of(parent, seen, &mut out);
        }
        walk(root, &mut left, seen, &mut out);
    }
    link_up(&mut out);
    out
}

fn walk(dir: &Path, left: &mut (u64, usize), seen: &mut BTreeSet<Vec<u8>>, out: &mut Vec<Entry>) {
    entry_of(dir, seen, out);
    let Ok(children) = fs::read_dir(dir) else { return };
    let mut children: Vec<PathBuf> = children.flatten().map(|c| c.path()).collect();
    children.sort();
    for child in children {
        if left.0 == 0 || left.1 == 0 {
            return;
        }
        match fs::symlink_metadata(&child) {
            Ok(meta) if meta.is_dir() => walk(&child, left, seen, out),
            Ok(meta) if meta.is_symlink() => entry_of(&child, seen, out),
            Ok(meta) if meta.is_file() && meta.len() <= MAX_FILE && File::open(&child).is_ok() => {
                entry_of(&child, seen, out);
                left.0 = left.0.saturating_sub(meta.len());
                left.1 -= 1;
            }
            _ => {}
        }
    }
}

/// The entry of a path of this machine, once. What can't be read, and names that mean something in a layer, are left out.
fn entry_of(path: &Path, seen: &mut BTreeSet<Vec<u8>>, out: &mut Vec<Entry>) {
    let name = path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default().to_vec();
    let marker = path.file_name().is_some_and(|n| n.as_bytes().starts_with(b".wh."));
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if marker || !seen.insert(name.clone()) {
        return;
    }
    let body = if meta.is_dir() {
        Body::Dir
    } else if meta.is_symlink() {
        let Ok(target) = fs::read_link(path) else { return };
        Body::Symlink(target.into_os_string().into_vec())
    } else {
        Body::Copy(path.to_owned())
    };
    let mode = if meta.is_symlink() { 0o777 } else { meta.mode() & 0o7777 };
    let mtime = u64::try_from(meta.mtime()).unwrap_or(0);
    out.push(Entry { path: name, mode, uid: meta.uid(), gid: meta.gid(), mtime, body });
}

/// Files of one inode become hard links to the first of them.
fn link_up(entries: &mut [Entry]) {
    let mut first = std::collections::HashMap::new();
    for entry in entries {
        let Body::Copy(path) = &entry.body else { continue };
        let Ok(meta) = fs::metadata(path) else { continue };
        if meta.nlink() > 1 {
            match first.entry((meta.dev(), meta.ino())) {
                std::collections::hash_map::Entry::Vacant(vacant) => {
                    vacant.insert(entry.path.clone());
                }
                std::collections::hash_map::Entry::Occupied(known) => entry.body = Body::HardLink(known.get().clone()),
            }
        }
    }
}

/// The file of the second layer that is nearest to 1 MiB.
fn probe(model: &Model, layer: &Written) -> Option<Vec<u8>> {
    let own: BTreeSet<&[u8]> = layer.entries.iter().map(|(entry, _)| entry.path.as_slice()).collect();
    let files = model.single_files().filter(|(name, size)| *size > 0 && own.contains(name.as_slice()));
    files.min_by_key(|(_, size)| size.abs_diff(1 << 20)).map(|(name, _)| name.clone())
}

/// The third layer: a file overwritten, one whited out, a directory replaced by a symlink, another made opaque. `spare`
/// is left alone.
fn change(model: &Model, spare: &[u8]) -> (Vec<Entry>, Vec<String>) {
    let mut files = model.single_files().map(|(name, _)| name).filter(|name| name.as_slice() != spare);
    let (overwritten, removed) = (files.next().cloned(), files.next().cloned());
    let untouched: Vec<&[u8]> =
        [Some(spare), overwritten.as_deref(), removed.as_deref()].into_iter().flatten().collect();
    // Directories of some names, none of which is changed otherwise or has another name elsewhere.
    let fits = |dir: &[u8]| {
        let free = |(name, record): (&Vec<u8>, &Record)| {
            let single = !matches!(record.what, What::File { names, .. } if names > 1);
            single && !untouched.contains(&name.as_slice())
        };
        let bytes = model.below(dir).map(|(_, record)| match record.what {
            What::File { size, .. } => size,
            _ => 0,
        });
        dir.iter().filter(|b| **b == b'/').count() == 2
            && model.below(dir).count() >= 3
            && model.below(dir).all(free)
            && bytes.sum::<u64>() <= MAX_HIDDEN
    };
    let all = model.names.iter().filter(|(_, record)| record.what == What::Dir).map(|(name, _)| name);
    let mut dirs = all.filter(|name| fits(name));
    let (opaque, replaced) = (dirs.next(), dirs.next());

    let show = |path: &[u8]| format!("/{}", String::from_utf8_lossy(path));
    let names = |dir: &[u8]| model.below(dir).count();
    let (mut out, mut said) = (Vec::new(), Vec::new());
    if let Some(path) = overwritten {
        said.push(format!("{} overwritten", show(&path)));
        let mut entry = text("", 0o640, "overwritten by the third layer\n");
        (entry.path, entry.uid, entry.gid) = (path, 1000, 1000);
        out.push(entry);
    }
    if let Some(path) = removed {
        said.push(format!("{} whited out", show(&path)));
        let (dir, name) = split(&path);
        let mut entry = text("", 0o644, "");
        entry.path = [dir, b".wh.", name].concat();
        out.push(entry);
    }
    if let Some(dir) = replaced {
        said.push(format!("{} ({} names) replaced by a symlink", show(dir), names(dir)));
        let body = Body::Symlink(b"/opt/demo".to_vec());
        out.push(Entry { path: dir.clone(), mode: 0o777, uid: 0, gid: 0, mtime: EPOCH, body });
    }
    if let Some(dir) = opaque {
        said.push(format!("{} ({} names) made opaque", show(dir), names(dir)));
        let inside = |name: &[u8], content: &str| {
            let mut entry = text("", 0o644, content);
            entry.path = join(dir, name);
            entry
        };
        out.push(directory(dir, 0o750, EPOCH + 1));
        // The marker comes after a name of its own layer, which it must not hide.
        out.extend([inside(b"only.txt", "all that is left here\n"), inside(b".wh..wh..opq", "")]);
    }
    (out, said)
}

/// A path's directory, with its slash, and its last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.split_at(path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1))
}

/// The top layer: a hard link, a symlink, setuid, another owner, an empty file, names with a space and with UTF-8.
fn application() -> Vec<Entry> {
    let link = |path: &str, body| Entry { path: path.into(), mode: 0o777, uid: 0, gid: 0, mtime: EPOCH, body };
    let mut hard = link("opt/demo/bin/tool-by-another-name", Body::HardLink(b"opt/demo/bin/tool".to_vec()));
    hard.mode = 0o4755;
    let mut owned = text("opt/demo/data/größe und mehr.txt", 0o600, "owned by 1000:1001\n");
    (owned.uid, owned.gid) = (1000, 1001);
    vec![
        directory(b"opt", 0o755, EPOCH),
        directory(b"opt/demo", 0o755, EPOCH),
        directory(b"opt/demo/bin", 0o755, EPOCH),
        text("opt/demo/bin/tool", 0o4755, "#!/bin/sh\necho published by clip-csi\n"),
        hard,
        link("opt/demo/run", Body::Symlink(b"bin/tool".to_vec())),
        directory(b"opt/demo/data", 0o1777, EPOCH),
        text("opt/demo/data/empty", 0o644, ""),
        owned,
    ]
}

/// A layer on top of what is there: first what it hides, then what it brings, since its own entries are never hidden by
/// its own whiteouts, wherever these stand.
fn apply(model: &mut Model, layer: &Written) {
    for (entry, _) in &layer.entries {
        let (dir, name) = split(&entry.path);
        match name.strip_prefix(b".wh.") {
            Some(b".wh..opq") => model.remove_below(dir.strip_suffix(b"/").unwrap_or(dir)),
            Some(hidden) => model.remove(&[dir, hidden].concat()),
            None => {}
        }
    }
    let mut inodes = Inodes::default();
    let mut numbers = std::collections::HashMap::new();
    for (number, (entry, content)) in layer.entries.iter().enumerate() {
        let name = &entry.path;
        let what = match (&entry.body, content) {
            _ if split(name).1.starts_with(b".wh.") => continue,
            (Body::Dir, _) => What::Dir,
            (Body::Symlink(target), _) => What::Symlink { target: target.clone() },
            (Body::HardLink(target), _) => match model.names.get(target) {
                Some(record) => record.what.clone(),
                None => continue,
            },
            (_, Some((size, sha256))) => What::File { size: *size, sha256: *sha256, first: name.clone(), names: 1 },
            (_, None) => continue,
        };
        let inode = match &entry.body {
            Body::HardLink(target) => numbers.get(target).copied().unwrap_or(number as u64),
            _ => number as u64,
        };
        numbers.insert(name.clone(), inode);
        if matches!(what, What::File { .. }) {
            inodes.note(inode, name);
        }
        if what != What::Dir {
            model.remove(name);
        }
        let record = Record { what, mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: (entry.mtime as i64, 0) };
        model.names.insert(name.clone(), record);
    }
    inodes.first_names(model);
    inodes.count_names(model);
}

/// Counts and hashes what passes through.
struct Hashing<W> {
    inner: W,
    sha: Sha256,
    bytes: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, sha: Sha256::new(), bytes: 0 }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.sha.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn write_layer(dir: &Path, entries: Vec<Entry>) -> io::Result<Written> {
    let temporary = tempfile::NamedTempFile::new_in(dir)?;
    let gzip = GzEncoder::new(Hashing::new(BufWriter::new(temporary)), Compression::new(5));
    let mut tar = tar::Builder::new(Hashing::new(gzip));
    let mut written = Vec::with_capacity(entries.len());
    for entry in entries {
        if let Some(content) = append(&mut tar, &entry)? {
            written.push((entry, content));
        }
    }
    let plain = tar.into_inner()?;
    let diff_id = Digest(plain.sha.finalize().into());
    let stored = plain.inner.finish()?;
    let blob = Blob { digest: Digest(stored.sha.finalize().into()), size: stored.bytes };
    let file = stored.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.persist(blob_path(dir, &blob.digest)).map_err(|e| e.error)?;
    Ok(Written { blob, diff_id, entries: written })
}

/// Size and SHA-256 of a file's content; `None` for anything else.
type Content = Option<(u64, [u8; 32])>;

/// `None`: the file could not be read any more, so it is not in the layer.
fn append<W: Write>(tar: &mut tar::Builder<W>, entry: &Entry) -> io::Result<Option<Content>> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.mode);
    header.set_uid(entry.uid.into());
    header.set_gid(entry.gid.into());
    header.set_mtime(entry.mtime);
    header.set_size(0);
    let name = if entry.path.is_empty() { b"./".as_slice() } else { &entry.path };
    let path = Path::new(OsStr::from_bytes(name));
    let read;
    let bytes = match &entry.body {
        Body::Dir => {
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, path, io::empty())?;
            return Ok(Some(None));
        }
        Body::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            // Byte for byte: `append_link` would tidy the target up.
            if header.set_link_name_literal(target).is_err() {
                tar.append_pax_extensions([("linkpath", target.as_slice())])?;
            }
            tar.append_data(&mut header, path, io::empty())?;
            return Ok(Some(None));
        }
        Body::HardLink(target) => {
            header.set_entry_type(tar::EntryType::Link);
            tar.append_link(&mut header, path, Path::new(OsStr::from_bytes(target)))?;
            return Ok(Some(None));
        }
        Body::Bytes(bytes) => bytes,
        Body::Copy(source) => match fs::read(source) {
            Ok(bytes) => {
                read = bytes;
                &read
            }
            Err(_) => return Ok(None),
        },
    };
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes.as_slice())?;
    Ok(Some(Some((bytes.len() as u64, Sha256::digest(bytes).into()))))
}

fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

fn write_json(dir: &Path, value: &serde_json::Value) -> io::Result<Blob> {
    let bytes = serde_json::to_vec(value)?;
    let digest = Digest::of(&bytes);
    fs::write(blob_path(dir, &digest), &bytes)?;
    Ok(Blob { digest, size: bytes.len() as u64 })
}

fn write_manifest(dir: &Path, layers: &[Written]) -> io::Result<()> {
    let platform = Platform::host();
    let config = write_json(
        dir,
        &json!({
            "created": "2023-11-14T22:13:20Z",
            "architecture": platform.arch,
            "os": platform.os,
            "config": { "Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/opt/demo/run"], "WorkingDir": "/opt/demo" },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|l| l.diff_id).collect::<Vec<_>>() },
        }),
    )?;
    let descriptor = |kind: &str, blob: &Blob| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": blob.digest, "size": blob.size });
    let manifest = write_json(
        dir,
        &json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", &config),
            "layers": layers.iter().map(|l| descriptor("layer.v1.tar+gzip", &l.blob)).collect::<Vec<_>>(),
        }),
    )?;
    let mut listed = descriptor("manifest.v1+json", &manifest);
    listed["annotations"] = json!({ "org.opencontainers.image.ref.name": "demo" });
    let index = json!({ "schemaVersion": 2, "manifests": [listed] });
    fs::write(dir.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
}
