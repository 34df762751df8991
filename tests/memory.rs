//! What an index build holds while it runs: a test binary of its own, since it looks at its process.

mod common;

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use clip_csi::build::progress::Silent;
use clip_csi::build::{BuildOptions, index_image};
use clip_csi::source::{BlobSource, BlobStat, LayerSource, ResolvedImage, Scope, SourceError};
use clip_csi::units::{Digest, Platform};
use flate2::{Compress, Compression, Crc, FlushCompress};
use futures::stream::{BoxStream, StreamExt};
use sha2::{Digest as _, Sha256};

/// Uncompressed bytes of the layer.
const LAYER: u64 = 1 << 30;
/// Bytes of the piece that it repeats, and of each of its files but for the header.
const PIECE: usize = 1 << 20;
/// What the build may add to the resident memory of this process.
const LIMIT_KB: u64 = 64 << 10;

/// One gzip member with the deflate blocks of a piece again and again: nothing of it is ever there whole.
#[derive(Debug, Clone)]
struct Endless {
    head: Bytes,
    piece: Bytes,
    pieces: u64,
    tail: Bytes,
}

impl Endless {
    fn bytes(&self) -> impl Iterator<Item = Bytes> + Send + use<> {
        let piece = self.piece.clone();
        let middle = (0..self.pieces).map(move |_| piece.clone());
        std::iter::once(self.head.clone()).chain(middle).chain(std::iter::once(self.tail.clone()))
    }
}

#[async_trait]
impl BlobSource for Endless {
    async fn read_range(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        unreachable!("an index build streams: {range:?}")
    }
    async fn stream(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        assert_eq!(offset, 0);
        Ok(futures::stream::iter(self.bytes().map(Ok)).boxed())
    }
    async fn stat(&self) -> Result<BlobStat, SourceError> {
        unreachable!("its descriptor says its size")
    }
    fn describe(&self) -> String {
        "a generated layer".into()
    }
}

/// A tar of files of one piece each, and its diff ID.
fn layer() -> (Endless, Digest) {
    let file = {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        let data = common::layers::text_like(1, PIECE - 512);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, "file", &data[..]).unwrap();
        let mut bytes = tar.into_inner().unwrap();
        bytes.truncate(PIECE);
        bytes
    };
    let end = vec![0; 1024];
    let mut deflate = Compress::new(Compression::new(6), false);
    let mut next = |bytes: &[u8], flush| {
        let mut out = Vec::with_capacity(2 * PIECE);
        deflate.compress_vec(bytes, &mut out, flush).unwrap();
        Bytes::from(out)
    };
    // After a flush a piece depends on the window before it alone, and that is the end of a piece: so all but the first are equal,
    // and each refers to the one before.
    let first = next(&file, FlushCompress::Sync);
    let piece = next(&file, FlushCompress::Sync);
    let last = next(&end, FlushCompress::Finish);
    let pieces = LAYER / PIECE as u64 - 1;
    let (mut crc, mut plain) = (Crc::new(), Sha256::new());
    for _ in 0..=pieces {
        crc.update(&file);
        plain.update(&file);
    }
    crc.update(&end);
    plain.update(&end);
    let mut tail = last.to_vec();
    tail.extend_from_slice(&crc.sum().to_le_bytes());
    tail.extend_from_slice(&crc.amount().to_le_bytes());
    let head = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255][..], &first].concat();
    let layer = Endless { head: head.into(), piece, pieces, tail: tail.into() };
    (layer, Digest(plain.finalize().into()))
}

/// A line of /proc/self/status in kB.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_a_gigabyte_is_indexed_in_little_memory() {
    let (source, diff_id) = layer();
    let (mut stored, mut size) = (Sha256::new(), 0);
    for bytes in source.bytes() {
        stored.update(&bytes);
        size += bytes.len() as u64;
    }
    let digest = Digest(stored.finalize().into());
    let config = serde_json::json!({
        "architecture": Platform::host().arch, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    let config = Bytes::from(config.to_string());
    let image = ResolvedImage {
        reference: "registry.test/x:latest".parse().unwrap(),
        manifest_digest: Digest::of(b"manifest"),
        manifest: Bytes::new(),
        config_digest: Digest::of(&config),
        config,
        platform: Platform::host(),
        layers: vec![LayerSource {
            media_type: common::image::LAYER.into(),
            digest,
            size,
            annotations: Default::default(),
            source: Arc::new(source),
        }],
        scope: Scope::Public,
    };
    let dir = tempfile::tempdir().unwrap();
    // 5: the peak of resident memory is forgotten (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let report = index_image(&image, &dir.path().join("x.clip"), &BuildOptions::default(), &Silent).await.unwrap();
    let peak = status("VmHWM");
    assert_eq!((report.nodes, report.layer_bytes), (2, size));
    println!("resident before {before} kB, at most {peak} kB");
    assert!(peak - before.min(peak) < LIMIT_KB, "{before} kB before, {peak} kB at most");
}
