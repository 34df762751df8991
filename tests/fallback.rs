//! When a v1 archive is made in a v2 index's place: where no index can be built, and never because something went wrong.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use clip_csi::archive::Version;
use clip_csi::build::BuildError;
use clip_csi::build::provider::{ImageServiceConfig, Provided, Provider, PullPolicy, Request};
use clip_csi::metrics::metrics;
use clip_csi::source::Location;
use clip_csi::source::policy::{RegistryEntry, SourceConfig};
use clip_csi::units::{Compression, Digest, Platform};
use common::http_fault::{Reply, Seen, Server};
use common::layers::{self, Layer, Stored};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Layers that a registry need not hold.
const FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";

/// A registry with one image of one layer, and how it answers requests for that layer: by this status, or with other bytes.
struct Registry {
    server: Server,
    status: Arc<AtomicU16>,
    flipped: Arc<Mutex<bool>>,
    _dir: tempfile::TempDir,
}

impl Registry {
    async fn start(media_type: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tar = Layer::new(Compression::None).file("etc/os-release", &common::noise(200_000, 1)).into_tar();
        let bytes = {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            std::io::Write::write_all(&mut encoder, &tar).unwrap();
            encoder.finish().unwrap()
        };
        let stored = Stored {
            media_type: media_type.into(),
            bytes,
            diff_id: Digest::of(&tar),
            annotations: serde_json::json!({}),
        };
        let layer = layers::write_stored(dir.path(), [stored]).1[0].0;
        let (status, flipped) = (Arc::new(AtomicU16::new(200)), Arc::<Mutex<bool>>::default());
        let (layout, says, lies) = (dir.path().to_owned(), status.clone(), flipped.clone());
        let server = Server::start(move |seen, _| match says.load(Ordering::SeqCst) {
            200 => answer(seen, &layout, layer, *lies.lock().unwrap()),
            status if seen.path.contains(&layer.to_string()) => Reply::status(status),
            _ => answer(seen, &layout, layer, false),
        })
        .await;
        Self { server, status, flipped, _dir: dir }
    }

    /// A v2 index of its image, asked for at a node that has nothing yet; and what the node has afterwards.
    async fn provide(&self) -> (Result<Provided, BuildError>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let host = self.server.host().to_owned();
        let image = format!("{host}/app:latest").parse().unwrap();
        let entry = RegistryEntry { plain_http: true, ..Default::default() };
        let sources = common::sources(false, SourceConfig { registries: [(host, entry)].into(), ..Default::default() });
        let config = ImageServiceConfig {
            archive_dir: dir.path().to_owned(),
            referrers: false,
            clip_version: Some(2),
            ..Default::default()
        };
        let request = Request {
            image,
            platform: Platform::host(),
            version: Version::V2,
            pull_policy: PullPolicy::Always,
            credentials: Default::default(),
        };
        let provided = Provider::new(config, sources).unwrap().provide(&request).await;
        let names = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        (provided, names.filter(|name| name.ends_with(".clip")).collect())
    }
}

fn answer(seen: &Seen, layout: &Path, layer: Digest, flip: bool) -> Reply {
    let blob = |digest: &str| std::fs::read(layout.join("blobs/sha256").join(digest));
    if let Some((_, digest)) = seen.path.split_once("/blobs/sha256:") {
        let Ok(mut bytes) = blob(digest) else { return Reply::status(404) };
        if flip && digest == layer.hex() {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        return Reply::range(seen, &Bytes::from(bytes));
    }
    if seen.path.contains("/manifests/") {
        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let manifest = blob(digest.strip_prefix("sha256:").unwrap()).unwrap();
        return Reply::ok(manifest).with("content-type", common::image::MANIFEST).with("docker-content-digest", digest);
    }
    Reply::ok("{}")
}

// One test: it counts in a metric of the whole process.
#[tokio::test(flavor = "multi_thread")]
async fn v1_is_built_only_where_no_index_can_be_and_never_for_an_error() {
    let fallbacks = || metrics().build_fallbacks.get();
    let registry = Registry::start(FOREIGN).await;
    let (provided, files) = registry.provide().await;
    let Location::File(path) = provided.unwrap().location else { panic!("it lies on the node") };
    assert!(path.to_str().unwrap().ends_with("-v1.clip") && files.len() == 1, "{path:?} {files:?}");
    assert_eq!(fallbacks(), 1);

    let registry = Registry::start(GZIP).await;
    for status in [401, 403, 404, 429, 500, 503] {
        registry.status.store(status, Ordering::SeqCst);
        let (provided, files) = registry.provide().await;
        assert!(provided.is_err() && files.is_empty(), "{status}: {files:?}");
    }
    registry.status.store(200, Ordering::SeqCst);
    *registry.flipped.lock().unwrap() = true;
    let (provided, files) = registry.provide().await;
    assert!(provided.is_err() && files.is_empty(), "a damaged layer: {files:?}");
    *registry.flipped.lock().unwrap() = false;
    let (provided, files) = registry.provide().await;
    assert!(provided.is_ok() && files.len() == 1 && files[0].ends_with("-v2.clip"), "{files:?}");
    assert_eq!(fallbacks(), 1, "no error is a reason");
}
