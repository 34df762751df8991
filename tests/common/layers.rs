//! Images for tests: layers written entry by entry, put together as an OCI layout.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use clip_csi::units::{Compression, Digest};
use serde_json::json;

/// Time of every entry: 2023-11-14 22:13:20 UTC.
pub const EPOCH: u64 = 1_700_000_000;

/// One layer in the making.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
    compression: Compression,
    gzip_level: u32,
}

impl Layer {
    pub fn new(compression: Compression) -> Self {
        Self { tar: tar::Builder::new(Vec::new()), compression, gzip_level: 6 }
    }

    /// Another effort than gzip's usual one.
    pub fn gzip_level(mut self, level: u32) -> Self {
        self.gzip_level = level;
        self
    }

    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(EPOCH);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    pub fn dir(mut self, path: &str, mode: u32) -> Self {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.tar.append_data(&mut header, path, &[][..]).unwrap();
        self
    }

    pub fn file(self, path: &str, bytes: &[u8]) -> Self {
        self.file_with(path, 0o644, 0, 0, bytes)
    }

    pub fn file_with(mut self, path: &str, mode: u32, uid: u64, gid: u64, bytes: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, mode, bytes.len() as u64);
        header.set_uid(uid);
        header.set_gid(gid);
        self.tar.append_data(&mut header, path, bytes).unwrap();
        self
    }

    pub fn symlink(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, path, target).unwrap();
        self
    }

    pub fn hard_link(mut self, path: &str, target: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Link, 0o644, 0);
        self.tar.append_link(&mut header, path, target).unwrap();
        self
    }

    /// An empty file with an extended attribute.
    pub fn xattr(mut self, path: &str, name: &str, value: &[u8]) -> Self {
        self.tar.append_pax_extensions([(&*format!("SCHILY.xattr.{name}"), value)]).unwrap();
        self.file(path, b"")
    }

    pub fn fifo(mut self, path: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Fifo, 0o600, 0);
        self.tar.append_data(&mut header, path, &[][..]).unwrap();
        self
    }

    /// A sparse file (GNU's old form): `data` at `offset`, holes around it up to `size`.
    pub fn sparse(mut self, path: &str, size: u64, offset: u64, data: &[u8]) -> Self {
        let octal = |field: &mut [u8], value: u64| {
            let digits = field.len() - 1;
            field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
        };
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNUSparse);
        header.set_path(path).unwrap();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        header.set_mtime(EPOCH);
        header.set_uid(0);
        header.set_gid(0);
        let gnu = header.as_gnu_mut().unwrap();
        octal(&mut gnu.realsize, size);
        // What is mapped ends with the file: an empty extent there.
        for (entry, (at, len)) in gnu.sparse.iter_mut().zip([(offset, data.len() as u64), (size, 0)]) {
            octal(&mut entry.offset, at);
            octal(&mut entry.numbytes, len);
        }
        header.set_cksum();
        self.tar.append(&header, data).unwrap();
        self
    }

    /// Deletes a path of lower layers.
    pub fn whiteout(self, path: &str) -> Self {
        let name_at = path.rfind('/').map_or(0, |slash| slash + 1);
        self.file(&format!("{}.wh.{}", &path[..name_at], &path[name_at..]), b"")
    }

    /// Hides all that lower layers have in a directory.
    pub fn opaque(self, dir: &str) -> Self {
        self.file(&format!("{dir}/.wh..wh..opq"), b"")
    }

    /// Its uncompressed bytes.
    pub fn into_tar(self) -> Vec<u8> {
        self.tar.into_inner().unwrap()
    }

    /// (media type, stored bytes, diff ID).
    fn finish(self) -> (&'static str, Vec<u8>, Digest) {
        let tar = self.tar.into_inner().unwrap();
        let diff_id = Digest::of(&tar);
        let (media_type, bytes) = match self.compression {
            Compression::None => ("application/vnd.oci.image.layer.v1.tar", tar),
            Compression::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(self.gzip_level));
                encoder.write_all(&tar).unwrap();
                ("application/vnd.oci.image.layer.v1.tar+gzip", encoder.finish().unwrap())
            }
            Compression::Zstd => {
                // Several frames, so that there are places to start at.
                let frames = tar.chunks(256 << 10).flat_map(|chunk| zstd::encode_all(chunk, 3).unwrap()).collect();
                ("application/vnd.oci.image.layer.v1.tar+zstd", frames)
            }
        };
        (media_type, bytes, diff_id)
    }
}

/// A layer as it is stored.
pub struct Stored {
    pub media_type: String,
    pub bytes: Vec<u8>,
    pub diff_id: Digest,
    pub annotations: serde_json::Value,
}

/// Writes an OCI layout with one image, tagged `latest`; gives its manifest digest and its layers' digests and sizes.
pub fn write_layout(dir: &Path, layers: Vec<Layer>) -> (Digest, Vec<(Digest, u64)>) {
    let stored = layers.into_iter().map(|layer| {
        let (media_type, bytes, diff_id) = layer.finish();
        Stored { media_type: media_type.into(), bytes, diff_id, annotations: json!({}) }
    });
    write_stored(dir, stored)
}

/// [`write_layout`] of layers as they come.
pub fn write_stored(dir: &Path, layers: impl IntoIterator<Item = Stored>) -> (Digest, Vec<(Digest, u64)>) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest
    };
    let (mut descriptors, mut diff_ids, mut written) = (vec![], vec![], vec![]);
    for Stored { media_type, bytes, diff_id, annotations } in layers {
        let digest = put(&bytes);
        let mut descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        if annotations.as_object().is_some_and(|map| !map.is_empty()) {
            descriptor["annotations"] = annotations;
        }
        descriptors.push(descriptor);
        diff_ids.push(diff_id);
        written.push((digest, bytes.len() as u64));
    }
    let arch = clip_csi::units::Platform::host().arch;
    let config = serde_json::to_vec(&json!({
        "architecture": arch, "os": "linux",
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }))
    .unwrap();
    let config_digest = put(&config);
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
        "layers": descriptors,
    }))
    .unwrap();
    let manifest_digest = put(&manifest);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest_digest, "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": "latest"},
            "platform": {"architecture": arch, "os": "linux"},
        }],
    });
    fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    (manifest_digest, written)
}

/// Bytes that compress about as well as program text does and are the same on every run.
pub fn text_like(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut out = Vec::with_capacity(len + 32);
    while out.len() < len {
        let word = next() % 4096;
        out.extend_from_slice(format!("{:x}{} ", word * 2_654_435_761 % 65_521, word % 7).as_bytes());
    }
    out.truncate(len);
    out
}

/// Noise of 64 letters: gzip takes it down to three quarters, and finds nothing to repeat in it.
pub fn letters(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = vec![0; len.next_multiple_of(8)];
    for eight in out.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        eight.copy_from_slice(&(state & 0x3f3f_3f3f_3f3f_3f3f | 0x4040_4040_4040_4040).to_le_bytes());
    }
    out.truncate(len);
    out
}

/// The image that most tests publish: three layers with all that makes merging hard. `umoci` can unpack it.
pub fn tricky(compression: Compression) -> Vec<Layer> {
    let lower = Layer::new(compression)
        .dir("etc", 0o755)
        .file("etc/motd", b"lower\n")
        .file("etc/gone", b"to be deleted\n")
        .dir("opt", 0o755)
        .dir("opt/old", 0o755)
        .file("opt/old/a", b"hidden by an opaque directory\n")
        .dir("usr", 0o755)
        .dir("usr/bin", 0o755)
        .file_with("usr/bin/tool", 0o4755, 0, 0, &text_like(1, 300_000))
        .hard_link("usr/bin/tool-alias", "usr/bin/tool")
        .symlink("bin", "usr/bin")
        .file_with("usr/owned", 0o640, 1000, 2000, b"owned by somebody else")
        .file("usr/empty", b"")
        .file("swap", b"a file that becomes a directory")
        .dir("tmp", 0o1777);
    let middle = Layer::new(compression)
        .file("etc/motd", b"upper\n")
        .whiteout("etc/gone")
        .dir("opt/old", 0o700)
        .opaque("opt/old")
        .file("opt/old/b", b"only this remains\n")
        .whiteout("swap")
        .dir("swap", 0o755)
        .file("swap/inside", b"in what was a file");
    let upper = Layer::new(compression)
        .file("usr/big", &text_like(2, 5 << 20))
        .fifo("usr/pipe")
        .symlink("usr/dangling", "/nowhere/at/all");
    vec![lower, middle, upper]
}

/// Changes the configuration of a layout's one image; its new manifest.
pub fn change_config(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) -> Digest {
    let read =
        |path: std::path::PathBuf| serde_json::from_slice::<serde_json::Value>(&fs::read(path).unwrap()).unwrap();
    let path = |digest: &serde_json::Value| {
        dir.join("blobs/sha256").join(digest.as_str().unwrap().strip_prefix("sha256:").unwrap())
    };
    let put = |descriptor: &mut serde_json::Value, value: &serde_json::Value| {
        let bytes = value.to_string();
        let digest = Digest::of(bytes.as_bytes());
        fs::write(dir.join("blobs/sha256").join(digest.hex()), &bytes).unwrap();
        (descriptor["digest"], descriptor["size"]) = (json!(digest), json!(bytes.len()));
        digest
    };
    let mut index = read(dir.join("index.json"));
    let mut manifest = read(path(&index["manifests"][0]["digest"]));
    let mut config = read(path(&manifest["config"]["digest"]));
    change(&mut config);
    put(&mut manifest["config"], &config);
    let digest = put(&mut index["manifests"][0], &manifest);
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    digest
}
