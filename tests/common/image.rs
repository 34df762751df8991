//! Images made by hand: a configuration and layers, as a manifest, a layout, or the content of a registry.

use std::path::Path;

use bytes::Bytes;
use clip_csi::units::Digest;

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// One image. The layers' bytes need not be tars: sources don't look.
#[derive(Debug, Clone)]
pub struct TestImage {
    pub config: Bytes,
    /// Media type and bytes, lowest first.
    pub layers: Vec<(String, Bytes)>,
    pub manifest: Bytes,
}

impl TestImage {
    pub fn new(layers: Vec<(&str, Vec<u8>)>) -> Self {
        let config =
            serde_json::json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}});
        let config = Bytes::from(config.to_string());
        let layers: Vec<(String, Bytes)> = layers.into_iter().map(|(t, b)| (t.to_owned(), b.into())).collect();
        let describe = |media_type: &str, bytes: &[u8]| serde_json::json!({"mediaType": media_type, "digest": Digest::of(bytes).to_string(), "size": bytes.len()});
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": describe(CONFIG, &config),
            "layers": layers.iter().map(|(t, b)| describe(t, b)).collect::<Vec<_>>(),
        });
        Self { config, layers, manifest: manifest.to_string().into() }
    }

    /// One layer of these bytes.
    pub fn of_layer(bytes: Vec<u8>) -> Self {
        Self::new(vec![(LAYER, bytes)])
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Configuration and layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Bytes> {
        std::iter::once(&self.config).chain(self.layers.iter().map(|(_, bytes)| bytes))
    }

    /// Writes it as an OCI layout.
    pub fn write_layout(&self, dir: &Path, tag: &str) {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).expect("the layout can be made");
        for bytes in self.blobs().chain([&self.manifest]) {
            std::fs::write(blobs.join(Digest::of(bytes).hex()), bytes).expect("a blob can be written");
        }
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": MANIFEST, "digest": self.digest().to_string(), "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }]});
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("it can be written");
        std::fs::write(dir.join("index.json"), index.to_string()).expect("it can be written");
    }
}
