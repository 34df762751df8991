use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::testing::{Header, Tar, record};
use super::*;
use crate::archive::{
    self, Archive, Data, HEADER_LEN, Kind, NodeId, OciStorage, S3Storage, SeekTable, SpanIx, Storage, Version,
};
use crate::inflate::inflate_span;
use crate::source::fake::{FakeSource, Fault, FaultySource};
use crate::source::{BlobSource, ImageRef, LayerSource, Scope};
use crate::units::{Compression, Platform};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

fn compress(media_type: &str, tar: &[u8]) -> Vec<u8> {
    match media_type {
        PLAIN => tar.to_vec(),
        ZSTD => zstd::encode_all(tar, 3).unwrap(),
        _ => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
    }
}

/// An image in memory, its sources and its uncompressed layers.
struct Image {
    resolved: ResolvedImage,
    sources: Vec<Arc<FakeSource>>,
    tars: Vec<Vec<u8>>,
}

fn image(layers: &[(&str, Tar)]) -> Image {
    let tars: Vec<Vec<u8>> = layers.iter().map(|(_, tar)| tar.clone().end()).collect();
    let mut sources = Vec::new();
    let mut descriptors = Vec::new();
    for ((media_type, _), tar) in layers.iter().zip(&tars) {
        let stored = compress(media_type, tar);
        let digest = Digest::of(&stored);
        let source = FakeSource::new("registry.test/app", stored.clone());
        sources.push(source.clone());
        descriptors.push(LayerSource {
            media_type: (*media_type).into(),
            digest,
            size: stored.len() as u64,
            annotations: BTreeMap::new(),
            source,
        });
    }
    let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "2024-05-06T07:08:09.5Z", "author": null,
        "config": {
            "Env": ["A=b"], "Cmd": ["-x"], "Entrypoint": ["/bin/app"], "User": "web", "WorkingDir": "/srv",
            "Labels": {"l": "1"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": null,
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string().into_bytes();
    let resolved = ResolvedImage {
        reference: ImageRef::Registry {
            registry: "registry.test".into(),
            repository: "team/app".into(),
            tag: Some("v1".into()),
            digest: None,
        },
        manifest_digest: Digest::of(b"manifest"),
        manifest: bytes::Bytes::from_static(b"manifest"),
        config_digest: Digest::of(&config),
        config: config.into(),
        platform: Platform { os: "linux".into(), arch: "amd64".into(), variant: None },
        layers: descriptors,
        scope: Scope::Public,
    };
    Image { resolved, sources, tars }
}

/// Counts what is begun, done and ended.
#[derive(Default)]
struct Counts {
    begun: AtomicU64,
    ended: AtomicU64,
    bytes: AtomicU64,
}

impl Progress for Counts {
    fn begin(&self, _: &str, _: Option<u64>) -> u64 {
        self.begun.fetch_add(1, Ordering::Relaxed)
    }
    fn advance(&self, _: u64, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    fn end(&self, _: u64) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A directory for one output, and what a failed build must leave: nothing.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }
    fn out(&self) -> PathBuf {
        self.dir.path().join("out.clip")
    }
    fn is_empty(&self) -> bool {
        std::fs::read_dir(self.dir.path()).unwrap().next().is_none()
    }
    fn read(&self) -> Built {
        let bytes = std::fs::read(self.out()).unwrap();
        Built::of(bytes)
    }
}

struct Built {
    bytes: Vec<u8>,
    archive: Archive,
    seek_table: SeekTable,
}

impl Built {
    fn of(bytes: Vec<u8>) -> Self {
        let part = |(at, len): (u64, u64)| &bytes[at as usize..(at + len) as usize];
        let header = archive::Header::decode(&bytes[..HEADER_LEN]).unwrap();
        let archive = archive::decode(&bytes[..HEADER_LEN], part(header.index), part(header.storage_info)).unwrap();
        let (at, len, digest) = archive.extension.as_ref().unwrap().seek_table.unwrap();
        let seek_table = part((at, len));
        assert_eq!(Digest::of(seek_table), digest);
        let seek_table = SeekTable::decode(seek_table).unwrap();
        Self { bytes, archive, seek_table }
    }

    /// A file's content; `blobs` are what offsets refer to.
    fn content(&self, id: NodeId, blobs: &[&[u8]]) -> Vec<u8> {
        let tree = &self.archive.tree;
        let size = tree.attr(id).size as usize;
        match tree.data(id) {
            Data::Empty => Vec::new(),
            Data::Contiguous { blob, offset } => blobs[usize::from(blob.0)][offset as usize..][..size].to_vec(),
            Data::Sparse { blob, extents } => {
                let mut out = vec![0; size];
                for e in extents {
                    let data = &blobs[usize::from(blob.0)][e.blob_offset as usize..][..e.len as usize];
                    out[e.offset as usize..][..e.len as usize].copy_from_slice(data);
                }
                out
            }
        }
    }

    /// Every name with what is there.
    fn listing(&self, blobs: &[&[u8]]) -> BTreeMap<String, String> {
        let tree = &self.archive.tree;
        (0..tree.len() as u32)
            .map(|i| {
                let id = NodeId(i);
                let attr = tree.attr(id);
                let what = match attr.kind {
                    Kind::File => {
                        let content = self.content(id, blobs);
                        if content.len() < 100 {
                            String::from_utf8_lossy(&content).into()
                        } else {
                            Digest::of(&content).hex()
                        }
                    }
                    Kind::Symlink => String::from_utf8_lossy(tree.target(id)).into(),
                    _ => format!("{}", attr.rdev),
                };
                let path = String::from_utf8(tree.path(id)).unwrap();
                (path, format!("{:?} {:o} {}:{} {}x {what}", attr.kind, attr.mode, attr.uid, attr.gid, attr.nlink))
            })
            .collect()
    }

    fn id(&self, path: &str) -> NodeId {
        self.archive.tree.resolve(NodeId::ROOT, path.as_bytes(), false).unwrap()
    }

    /// Every span of a v1 archive's table matches the file, the header's too.
    fn check_v1_spans(&self) {
        let [table] = self.seek_table.blobs.as_slice() else { panic!("one blob") };
        assert_eq!((table.compression, table.clen), (Compression::None, table.ulen));
        assert_eq!(table.digest, Digest::of(&self.bytes[HEADER_LEN..table.ulen as usize]));
        for i in 0..table.spans.len() as u32 {
            let range = table.bounds(SpanIx(i));
            let stored = &self.bytes[range.start as usize..range.end as usize];
            assert_eq!(inflate_span(table, SpanIx(i), stored).unwrap(), stored, "span {i}");
        }
    }

    /// The block around a file's data: type byte before, CRC-64/ISO behind.
    fn check_v1_block(&self, path: &str) {
        let id = self.id(path);
        let content = self.content(id, &[&self.bytes]);
        let Data::Contiguous { offset, .. } = self.archive.tree.data(id) else { panic!("{path} has no data") };
        let end = offset as usize + content.len();
        assert_eq!(self.bytes[offset as usize - 1], 0);
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64GoIso, &content);
        assert_eq!(self.bytes[end..end + 8], crc.to_be_bytes());
        assert_eq!(self.archive.tree.content_hash(id), Some(Digest::of(&content)));
    }
}

/// Bytes that don't compress, so that layers have many blocks.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn three_layers() -> [(&'static str, Tar); 3] {
    let mut big = noise(3 << 20, 1);
    big.extend(vec![b'a'; 4 << 20]);
    let mut suid = Header::new(b'0', "usr/bin/su");
    (suid.mode, suid.uid, suid.gid) = (0o4755, 0, 42);
    [
        (
            GZIP,
            Tar::new()
                .dir("etc")
                .file("etc/passwd", "root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\n")
                .file("big", &big)
                .file("gone", "SECRET-OF-THE-LOWER-LAYER")
                .with(suid, b"su")
                .hardlink("usr/bin/su2", "usr/bin/su"),
        ),
        (
            ZSTD,
            Tar::new()
                .file(".wh.gone", "")
                .pax(&[record("SCHILY.xattr.user.k", "v")])
                .file("etc/motd", "hello\n")
                .symlink("link", "etc/motd")
                .file("zeros", vec![0; 1 << 20]),
        ),
        (PLAIN, Tar::new().dir("etc").file("etc/motd", "bye\n").file("empty", "").raw(&Header::new(b'6', "fifo"), &[])),
    ]
}

#[tokio::test]
async fn an_index_of_gzip_zstd_and_plain_layers_reads_back() {
    let image = image(&three_layers());
    let place = Place::new();
    let progress = Counts::default();
    let report = index_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress).await.unwrap();
    let built = place.read();
    assert_eq!(built.archive.version(), Version::V2);

    let blobs: Vec<&[u8]> = image.tars.iter().map(Vec::as_slice).collect();
    let list = built.listing(&blobs);
    let names: Vec<&str> = list.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "/",
            "/big",
            "/empty",
            "/etc",
            "/etc/motd",
            "/etc/passwd",
            "/fifo",
            "/link",
            "/usr",
            "/usr/bin",
            "/usr/bin/su",
            "/usr/bin/su2",
            "/zeros"
        ]
    );
    assert_eq!(list["/etc/motd"], "File 644 0:0 1x bye\n");
    assert_eq!(list["/usr/bin/su2"], "File 4755 0:42 2x su");
    assert_eq!(list["/link"], "Symlink 777 0:0 1x etc/motd");
    assert_eq!(list["/fifo"], "Fifo 644 0:0 1x 0");

    // Each span inflates from its own piece of the stored layer.
    assert!(built.seek_table.blobs[0].spans.len() >= 4);
    for ((table, source), tar) in built.seek_table.blobs.iter().zip(&image.sources).zip(&image.tars) {
        assert_eq!(table.diff_id, Digest::of(tar));
        for i in 0..table.spans.len() as u32 {
            let span = &table.spans[i as usize];
            let stored = source.read_range(span.coff..span.cend).await.unwrap();
            let range = table.bounds(SpanIx(i));
            assert_eq!(inflate_span(table, SpanIx(i), &stored).unwrap(), tar[range.start as usize..range.end as usize]);
        }
    }

    let Storage::Oci(storage) = &built.archive.storage else { panic!("not OCI") };
    let OciStorage { registry_url, repository, reference, layers, .. } = &**storage;
    assert_eq!((registry_url.as_str(), repository.as_str()), ("registry.test", "team/app"));
    assert_eq!(*reference, format!("v1@{}", image.resolved.manifest_digest));
    let digests: Vec<String> = image.resolved.layers.iter().map(|l| l.digest.to_string()).collect();
    assert_eq!(*layers, digests);
    let gzip = &storage.gzip_checkpoints[&digests[0]];
    assert!(gzip.len() >= 3 && gzip.windows(2).all(|w| w[1].1 - w[0].1 >= 2 << 20 || w[1] == gzip[gzip.len() - 1]));
    assert_eq!(gzip.last().unwrap().1, image.tars[0].len() as i64);
    assert_eq!(storage.gzip_checkpoints.len(), 1);
    let frames = &storage.zstd_frames[&digests[1]];
    assert_eq!(*frames, [(0, image.resolved.layers[1].size as i64, 0, image.tars[1].len() as i64)]);
    assert_eq!(storage.decompressed_hash[&digests[2]], Digest::of(&image.tars[2]).hex());
    let metadata = storage.image.as_ref().unwrap();
    assert_eq!(
        (metadata.env.as_slice(), metadata.created),
        (&["A=b".to_owned()][..], Some((1_714_979_289, 500_000_000)))
    );
    assert_eq!((metadata.exposed_ports.as_slice(), metadata.user.as_str()), (&["80/tcp".to_owned()][..], "web"));

    let extension = built.archive.extension.as_ref().unwrap();
    assert_eq!((extension.manifest_digest, extension.bundle), (Some(image.resolved.manifest_digest), false));
    assert_eq!((extension.layout.as_deref(), &report.warnings[..]), (None, &[][..]));
    assert_eq!(report.archive_bytes, built.bytes.len() as u64);
    assert_eq!((report.nodes, report.content_bytes), (13, built.archive.tree.total_size()));
    assert_eq!(report.layer_bytes, image.resolved.layers.iter().map(|l| l.size).sum::<u64>());
    assert_eq!(progress.bytes.into_inner(), report.layer_bytes);
    assert_eq!((progress.begun.into_inner(), progress.ended.into_inner()), (3, 3));
    assert!(image.sources.iter().all(|source| source.ranges()[0] == (0..source.ranges()[0].end)));
}

#[tokio::test]
async fn the_same_image_makes_the_same_bytes() {
    let image = image(&three_layers());
    let (a, b) = (Place::new(), Place::new());
    for place in [&a, &b] {
        index_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    }
    assert_eq!(a.read().bytes, b.read().bytes);
    for place in [&a, &b] {
        archive_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    }
    assert_eq!(a.read().bytes, b.read().bytes);
}

#[tokio::test]
async fn a_layer_that_comes_twice_is_streamed_once() {
    let layer = (GZIP, Tar::new().file("a", "1"));
    let mut image = image(&[layer.clone(), (PLAIN, Tar::new().file(".wh.a", "")), layer]);
    image.resolved.layers[2].source = image.sources[0].clone();
    let place = Place::new();
    index_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    let built = place.read();
    assert_eq!(image.sources[0].requests(), 1);
    assert_eq!(built.seek_table.blobs.len(), 3);
    assert_eq!(built.seek_table.blobs[0], built.seek_table.blobs[2]);
    assert_eq!(built.content(built.id("/a"), &[&image.tars[0]]), b"1");
}

/// Both builds fail, with these words, and leave no file behind.
async fn both_fail(image: &ResolvedImage, words: &[&str]) -> Vec<BuildError> {
    let place = Place::new();
    let options = BuildOptions::default();
    let errors = [
        index_image(image, &place.out(), &options, &progress::Silent).await.unwrap_err(),
        archive_image(image, &place.out(), &options, &progress::Silent).await.unwrap_err(),
    ];
    for error in &errors {
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} not all in: {text}");
        assert!(!text.contains('\n'));
    }
    assert!(place.is_empty(), "a failed build leaves files");
    errors.into()
}

#[tokio::test]
async fn a_layer_that_is_not_what_its_digest_says_fails_the_build() {
    let good = image(&three_layers());
    let digest = good.resolved.layers[0].digest.to_string();
    // Other content, well-formed, of another length.
    let other = compress(GZIP, &Tar::new().file("evil", "x").end());
    let mut bad = good.resolved.clone();
    bad.layers[0].size = other.len() as u64;
    bad.layers[0].source = FakeSource::new("registry.test/app", other);
    both_fail(&bad, &[&digest, "with the digest", "registry.test/app"]).await;
    // Longer and shorter than its descriptor.
    let mut bad = good.resolved.clone();
    bad.layers[0].size -= 1;
    both_fail(&bad, &[&digest, "longer than"]).await;
    bad.layers[0].size += 2;
    both_fail(&bad, &[&digest, "it ends after"]).await;
    // A config that means another layer.
    let mut bad = good.resolved.clone();
    let config = String::from_utf8(bad.config.to_vec()).unwrap();
    let config = config.replace(&Digest::of(&good.tars[0]).hex(), &Digest::of(b"other").hex());
    bad.config = config.clone().into();
    both_fail(&bad, &[&digest, "config says", &Digest::of(b"other").to_string()]).await;
    // A config that counts other layers.
    let mut bad = good.resolved.clone();
    bad.layers.pop();
    both_fail(&bad, &["registry.test/team/app", "diff_ids", "3", "2"]).await;
}

#[tokio::test]
async fn truncated_and_damaged_streams_fail_the_build() {
    for media_type in [GZIP, ZSTD, PLAIN] {
        let good = image(&[(media_type, Tar::new().file("a", noise(300_000, 7)))]);
        let digest = good.resolved.layers[0].digest.to_string();
        let stored = compress(media_type, &good.tars[0]);
        let mut cut = good.resolved.clone();
        let half = &stored[..stored.len() / 2];
        cut.layers[0].size = half.len() as u64;
        cut.layers[0].source = FakeSource::new("s", half.to_vec());
        both_fail(&cut, &[&digest]).await;
        let mut flipped = good.resolved.clone();
        let source = FaultySource::new(good.sources[0].clone(), []);
        source.always(Fault::Flip(stored.len() as u64 / 2));
        flipped.layers[0].source = source;
        both_fail(&flipped, &[&digest]).await;
    }
    let garbage = image(&[(PLAIN, Tar { bytes: noise(5000, 3) })]);
    both_fail(&garbage.resolved, &["checksum"]).await;
    let missing = image(&[(GZIP, Tar::new().hardlink("a/b", "c/d"))]);
    both_fail(&missing.resolved, &["/a/b", "/c/d"]).await;
}

#[tokio::test]
async fn a_source_that_fails_is_the_error() {
    let mut image = image(&three_layers()).resolved;
    let error = SourceError::Unavailable { what: "blob".into(), tries: 5, detail: "503".into() };
    let source = FaultySource::new(image.layers[0].source.clone(), []);
    source.always(Fault::Break(100_000, error));
    image.layers[0].source = source;
    for error in both_fail(&image, &["blob", "5 tries", "503"]).await {
        assert!(matches!(error, BuildError::Source(SourceError::Unavailable { .. })), "{error:?}");
    }
}

#[tokio::test]
async fn v2_is_impossible_only_for_layers_that_no_registry_can_serve() {
    let options = BuildOptions::default();
    let place = Place::new();
    let mut unknown = image(&three_layers()).resolved;
    unknown.layers[1].media_type = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
    let error = index_image(&unknown, &place.out(), &options, &progress::Silent).await.unwrap_err();
    assert!(matches!(&error, BuildError::V2Impossible { detail } if detail.contains("encrypted")), "{error:?}");
    let error = archive_image(&unknown, &place.out(), &options, &progress::Silent).await.unwrap_err();
    assert!(matches!(&error, BuildError::BadImage { .. }), "{error:?}");

    let mut foreign = image(&three_layers()).resolved;
    foreign.layers[0].media_type = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".into();
    let error = index_image(&foreign, &place.out(), &options, &progress::Silent).await.unwrap_err();
    let BuildError::V2Impossible { detail } = &error else { panic!("{error:?}") };
    let digest = foreign.layers[0].digest.to_string();
    assert!(["nondistributable", "archive it (v1)", &digest].iter().all(|word| detail.contains(word)), "{detail}");
    assert!(place.is_empty());
    archive_image(&foreign, &place.out(), &options, &progress::Silent).await.unwrap();

    let mut packed = image(&three_layers()).resolved;
    packed.reference = ImageRef::LayoutArchive { file: "/x/image.tar".into(), tag: None };
    let error = index_image(&packed, &place.out(), &options, &progress::Silent).await.unwrap_err();
    assert!(matches!(&error, BuildError::V2Impossible { detail } if detail.contains("--store-as")), "{error:?}");
}

#[tokio::test]
async fn a_layout_is_named_with_a_warning_and_store_as_replaces_it() {
    let mut image = image(&three_layers()).resolved;
    image.reference = ImageRef::Layout { dir: "/some/layout".into(), tag: Some("x".into()) };
    let place = Place::new();
    let mut options = BuildOptions::default();
    let report = index_image(&image, &place.out(), &options, &progress::Silent).await.unwrap();
    assert!(report.warnings[0].contains("/some/layout") && report.warnings[0].contains("--store-as"));
    let built = place.read();
    assert_eq!(built.archive.extension.unwrap().layout.as_deref(), Some("/some/layout"));
    let Storage::Oci(storage) = &built.archive.storage else { panic!("not OCI") };
    assert_eq!(storage.registry_url, "");

    let registry = |digest| ImageRef::Registry {
        registry: "index.docker.io".into(),
        repository: "library/app".into(),
        tag: None,
        digest,
    };
    options.store_as = Some(registry(None));
    let report = index_image(&image, &place.out(), &options, &progress::Silent).await.unwrap();
    assert_eq!(report.warnings, [""; 0]);
    let built = place.read();
    assert_eq!(built.archive.extension.unwrap().layout, None);
    let Storage::Oci(storage) = &built.archive.storage else { panic!("not OCI") };
    assert_eq!((storage.registry_url.as_str(), storage.repository.as_str()), ("index.docker.io", "library/app"));
    assert_eq!(storage.reference, format!("latest@{}", image.manifest_digest));

    options.store_as = Some(registry(Some(Digest::of(b"another"))));
    let error = index_image(&image, &place.out(), &options, &progress::Silent).await.unwrap_err();
    assert!(error.to_string().contains(&Digest::of(b"another").to_string()), "{error}");
}

#[tokio::test]
async fn an_archived_image_is_a_bundle_that_carries_its_data_and_nothing_hidden() {
    let image = image(&three_layers());
    let place = Place::new();
    let progress = Counts::default();
    let report = archive_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress).await.unwrap();
    let built = place.read();
    assert_eq!((built.archive.version(), &built.archive.storage), (Version::V1, &Storage::Local));
    assert_eq!(built.archive.header.storage_info.1, 0);
    let list = built.listing(&[&built.bytes]);
    let names: Vec<&str> = list.keys().map(String::as_str).collect();
    assert_eq!(names[..4], ["/", "/config.json", "/rootfs", "/rootfs/big"]);
    assert_eq!(list["/rootfs/etc/motd"], "File 644 0:0 1x bye\n");
    assert_eq!(list["/rootfs/usr/bin/su"], "File 4755 0:42 2x su");
    assert!(
        list["/rootfs/big"].ends_with(&Digest::of(&image.tars[0][2048..][..7 << 20]).hex()),
        "{}",
        list["/rootfs/big"]
    );
    built.check_v1_spans();
    for path in ["/rootfs/big", "/rootfs/zeros", "/rootfs/etc/motd", "/config.json", "/rootfs/usr/bin/su2"] {
        built.check_v1_block(path);
    }
    let tree = &built.archive.tree;
    assert_eq!(tree.data(built.id("/rootfs/usr/bin/su")), tree.data(built.id("/rootfs/usr/bin/su2")));
    assert!(!built.bytes.windows(6).any(|w| w == b"SECRET"));
    // What is read first lies first.
    let Data::Contiguous { offset, .. } = tree.data(built.id("/rootfs/usr/bin/su")) else { panic!() };
    assert_eq!(offset, HEADER_LEN as u64 + 1);

    let spec: serde_json::Value =
        serde_json::from_slice(&built.content(built.id("/config.json"), &[&built.bytes])).unwrap();
    assert_eq!(spec["root"]["path"], "rootfs");
    assert_eq!(spec["process"]["args"], json!(["/bin/app", "-x"]));
    assert_eq!(spec["process"]["user"], json!({"uid": 33, "gid": 44}));
    assert_eq!(spec["process"]["cwd"], "/srv");
    assert!(built.archive.extension.as_ref().unwrap().bundle);
    assert_eq!(report.archive_bytes, built.bytes.len() as u64);
    assert_eq!((progress.begun.into_inner(), progress.ended.into_inner()), (4, 4));
    let entries: Vec<_> = std::fs::read_dir(place.dir.path()).unwrap().collect();
    assert_eq!(entries.len(), 1, "temporary files are left");
}

#[tokio::test]
async fn a_sparse_file_stays_sparse_in_every_archive() {
    let size = 64_u64 << 20;
    let records = [
        record("GNU.sparse.size", size.to_string()),
        record("GNU.sparse.numblocks", "1"),
        record("GNU.sparse.map", "33554432,512"),
    ];
    let image = image(&[(GZIP, Tar::new().pax(&records).file("s", vec![9; 512]))]);
    let mut want = vec![0; size as usize];
    want[32 << 20..][..512].fill(9);
    let place = Place::new();
    index_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    let built = place.read();
    assert!(built.content(built.id("/s"), &[&image.tars[0]]) == want);
    archive_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    let built = place.read();
    assert!(built.content(built.id("/rootfs/s"), &[&built.bytes]) == want);
    assert_eq!(built.archive.tree.content_hash(built.id("/rootfs/s")), Some(Digest::of(&want)));
    built.check_v1_spans();
    assert!(std::fs::metadata(place.out()).unwrap().blocks() * 512 < 4 << 20);
}

#[tokio::test]
async fn an_archived_directory_keeps_everything_and_follows_nothing() {
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path().join("tree");
    let outside = tree.path().join("outside");
    std::fs::write(&outside, "OUTSIDE").unwrap();
    std::fs::create_dir_all(root.join("d/e")).unwrap();
    std::fs::write(root.join("d/f"), "content").unwrap();
    std::fs::write(root.join("d/.wh.plain"), "a plain name").unwrap();
    std::fs::hard_link(root.join("d/f"), root.join("d/g")).unwrap();
    std::fs::set_permissions(root.join("d/f"), std::fs::Permissions::from_mode(0o6750)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("l")).unwrap();
    std::os::unix::fs::symlink("../outside", root.join("dir")).unwrap();
    std::fs::write(root.join("empty"), "").unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 8 << 20).unwrap();
    sparse.set_len(24 << 20).unwrap();
    let path = |name: &str| root.join(name);
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    rustix::fs::lsetxattr(path("d"), "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
    let bytes: [u8; 3] = [0xff, b'x', 0x0a];
    std::fs::write(root.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&bytes)), "odd").unwrap();

    let place = Place::new();
    let progress = Counts::default();
    let report = archive_dir(&root, &place.out(), &BuildOptions::default(), &progress).await.unwrap();
    let built = place.read();
    built.check_v1_spans();
    for path in ["/d/f", "/d/.wh.plain"] {
        built.check_v1_block(path);
    }
    let tree = &built.archive.tree;
    assert_eq!(tree.len(), 13);
    assert!(tree.lookup(NodeId::ROOT, &bytes).is_some());
    let uid = std::fs::metadata(&root).unwrap().uid();
    let attr = tree.attr(built.id("/d/f"));
    assert_eq!((attr.mode, attr.nlink, attr.uid), (0o6750, 2, uid));
    assert_eq!(tree.inode(built.id("/d/f")), tree.inode(built.id("/d/g")));
    assert_eq!(tree.target(built.id("/l")), b"/etc/passwd");
    assert_eq!(tree.attr(built.id("/dir")).kind, Kind::Symlink);
    assert_eq!((tree.attr(built.id("/fifo")).kind, tree.attr(built.id("/socket")).kind), (Kind::Fifo, Kind::Socket));
    assert_eq!(tree.xattrs(built.id("/d")), [(b"user.k"[..].into(), b"v"[..].into())]);
    let mtime = std::fs::metadata(root.join("d/f")).unwrap();
    assert_eq!((attr.mtime.sec, i64::from(attr.mtime.nsec)), (mtime.mtime(), mtime.mtime_nsec()));
    let mut want = vec![0; 24 << 20];
    want[8 << 20..][..6].copy_from_slice(b"middle");
    assert!(built.content(built.id("/sparse"), &[&built.bytes]) == want);
    assert!(std::fs::metadata(place.out()).unwrap().blocks() * 512 < 4 << 20);
    assert!(!built.bytes.windows(7).any(|w| w == b"OUTSIDE"));
    assert!(!built.archive.extension.as_ref().unwrap().bundle);
    assert_eq!(report.content_bytes, tree.total_size());
    assert_eq!(progress.bytes.into_inner(), report.content_bytes);

    // Into the tree itself: the output of an earlier run is left out, and said to be.
    let inside = root.join("old.clip");
    std::fs::copy(place.out(), &inside).unwrap();
    let report = archive_dir(&root, &inside, &BuildOptions::default(), &progress::Silent).await.unwrap();
    assert_eq!(report.nodes, 13);
    assert!(report.warnings[0].contains("old.clip"));
}

#[tokio::test]
async fn an_empty_directory_and_a_missing_one() {
    let tree = tempfile::tempdir().unwrap();
    let place = Place::new();
    archive_dir(tree.path(), &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    let built = place.read();
    built.check_v1_spans();
    assert_eq!(built.archive.tree.len(), 1);
    let place = Place::new();
    let missing = tree.path().join("missing");
    let error = archive_dir(&missing, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap_err();
    assert!(error.to_string().contains("missing") && place.is_empty(), "{error}");
}

#[tokio::test]
async fn a_remote_index_is_the_same_tree_with_its_data_in_s3() {
    let image = image(&three_layers());
    let place = Place::new();
    archive_image(&image.resolved, &place.out(), &BuildOptions::default(), &progress::Silent).await.unwrap();
    let full = place.read();
    let remote = place.dir.path().join("out.rclip");
    let storage = S3Storage { bucket: "b".into(), key: "out.clip".into(), ..S3Storage::default() };
    let report = write_remote_index(&place.out(), storage.clone(), &remote).await.unwrap();
    let bytes = std::fs::read(&remote).unwrap();
    assert_eq!(report.archive_bytes, bytes.len() as u64);
    assert!(bytes.len() < 64 << 10);
    let header = archive::Header::decode(&bytes[..HEADER_LEN]).unwrap();
    let part = |(at, len): (u64, u64)| &bytes[at as usize..(at + len) as usize];
    let archive = archive::decode(&bytes[..HEADER_LEN], part(header.index), part(header.storage_info)).unwrap();
    assert_eq!(archive.storage, Storage::S3(storage.clone()));
    assert_eq!(archive.extension, full.archive.extension);
    let remote_built = Built { bytes: full.bytes.clone(), archive, seek_table: full.seek_table.clone() };
    assert_eq!(remote_built.listing(&[&full.bytes]), full.listing(&[&full.bytes]));
    // Not of an archive that carries no data.
    let error = write_remote_index(&remote, storage, &place.out()).await.unwrap_err();
    assert!(error.to_string().contains("carries its data"), "{error}");
}
