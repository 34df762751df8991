//! A real image for the benchmarks that want one: Debian's python3 and gcc, PyPI's numpy and scipy, in three layers.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use clip_csi::units::Digest;
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// The directory of its layers: the benchmark's argument, or where `make bench-sweep` leaves them.
pub fn layers() -> PathBuf {
    let given = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).map(PathBuf::from);
    given.unwrap_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("sweep-layers"))
}

/// Its layers there, in their order.
pub fn files(layers: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(layers).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> = files.filter(|path| path.to_string_lossy().ends_with(".tar.gz")).collect();
    files.sort();
    files
}

/// Makes them where they are missing.
#[allow(dead_code)]
pub fn make(layers: &Path) {
    if files(layers).is_empty() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/sweep-image.sh");
        assert!(Command::new(script).arg(layers).status().unwrap().success(), "the image can't be made");
    }
}

/// Writes an OCI layout of the layer files; bytes compressed and uncompressed.
pub fn layout(layers: &Path, dir: &Path) -> (u64, u64) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest
    };
    let (mut compressed, mut uncompressed, mut descriptors, mut diff_ids) = (0, 0, vec![], vec![]);
    for file in files(layers) {
        let bytes = std::fs::read(file).unwrap();
        let mut decoder = flate2::bufread::MultiGzDecoder::new(&bytes[..]);
        let (mut plain, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        while let n @ 1.. = decoder.read(&mut buffer).unwrap() {
            plain.update(&buffer[..n]);
            uncompressed += n as u64;
        }
        compressed += bytes.len() as u64;
        diff_ids.push(Digest(plain.finalize().into()));
        let digest = put(&bytes);
        descriptors.push(json!({"mediaType": crate::common::image::LAYER, "digest": digest, "size": bytes.len()}));
    }
    let arch = clip_csi::units::Platform::host().arch;
    let rootfs = json!({"type": "layers", "diff_ids": diff_ids});
    let config = json!({"architecture": arch, "os": "linux", "rootfs": rootfs}).to_string();
    let config =
        json!({"mediaType": crate::common::image::CONFIG, "digest": put(config.as_bytes()), "size": config.len()});
    let manifest =
        json!({"schemaVersion": 2, "mediaType": crate::common::image::MANIFEST, "config": config, "layers": descriptors})
            .to_string();
    let manifest = json!({"mediaType": crate::common::image::MANIFEST, "digest": put(manifest.as_bytes()), "size": manifest.len()});
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    (compressed, uncompressed)
}
