//! Archives that somebody damaged or made with intent: verify finds what is wrong, extract stays where it was sent.

#[path = "common/bench.rs"]
mod bench;
#[path = "common/layers.rs"]
#[allow(dead_code)]
mod layers;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bench::Bench;
use clip_csi::archive::{Data, Header, Kind, NodeId};
use clip_csi::build::progress::Silent;
use clip_csi::build::{BuildOptions, archive_dir, index_image};
use clip_csi::fs::{OpenError, OpenOptions, Opened, RootView, extract, open, verify};
use clip_csi::source::ImageRef;
use clip_csi::source::fake::FakeSource;
use clip_csi::units::{Compression, Digest, Platform};
use layers::{Layer, text_like, write_layout};

impl Bench {
    async fn open(&self, bytes: Vec<u8>) -> Result<Opened, OpenError> {
        let options = OpenOptions { root: RootView::Archive, ..OpenOptions::default() };
        open(FakeSource::new("the archive", bytes), &self.sources, &self.cache, &options).await
    }

    /// Whether `verify --data` is content.
    async fn is_good(&self, bytes: Vec<u8>) -> bool {
        match self.open(bytes).await {
            Ok(opened) => verify(&opened, true, &|_| {}).await.is_ok_and(|report| report.is_ok()),
            Err(_) => false,
        }
    }

    async fn index(&self, compression: Compression) -> (Vec<u8>, PathBuf) {
        let layout = self.path("layout");
        let layer = Layer::new(compression).file("text", &text_like(1, 300_000)).file("empty", b"").file("b", b"small");
        let (_, layers) = write_layout(&layout, vec![layer]);
        let image = ImageRef::Layout { dir: layout.clone(), tag: Some("latest".into()) };
        let image = self.sources.resolve(&image, &Platform::host(), &Default::default()).await.unwrap();
        let out = self.path("v2.clip");
        let options = BuildOptions { span_size: 64 << 10, ..BuildOptions::default() };
        index_image(&image, &out, &options, &Silent).await.unwrap();
        (std::fs::read(out).unwrap(), layout.join("blobs/sha256").join(layers[0].0.hex()))
    }
}

/// All of the first and the last bytes of a range, and some between: a prime apart, so that each kind of place has its turn.
fn places(range: Range<u64>) -> BTreeSet<usize> {
    let (start, end) = (range.start as usize, range.end as usize);
    let edges = (start..end.min(start + 24)).chain(end.saturating_sub(24).max(start)..end);
    edges.chain((start..end).step_by(4099)).collect()
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1 << (at % 8);
    bytes
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures").join(name)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_a_flipped_bit_anywhere_in_data_and_seek_table_of_our_v1_archive() {
    let bench = Bench::new();
    let (dir, out) = (bench.path("dir"), bench.path("v1.clip"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("text"), text_like(1, 300_000)).unwrap();
    std::fs::write(dir.join("empty"), b"").unwrap();
    std::fs::write(dir.join("small"), b"small").unwrap();
    let options = BuildOptions { span_size: 64 << 10, ..BuildOptions::default() };
    archive_dir(&dir, &out, &options, &Silent).await.unwrap();
    let bytes = std::fs::read(out).unwrap();
    assert!(bench.is_good(bytes.clone()).await);
    let header = Header::decode(&bytes).unwrap();
    let opened = bench.open(bytes.clone()).await.unwrap();
    let (table, len, _) = opened.archive.extension.as_ref().unwrap().seek_table.unwrap();
    for at in places(54..header.index.0).into_iter().chain(places(table..table + len)) {
        assert!(!bench.is_good(flipped(&bytes, at)).await, "a flipped bit at {at} of {} is not found", bytes.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_a_flipped_bit_anywhere_in_a_layer() {
    for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
        let bench = Bench::new();
        let (archive, layer) = bench.index(compression).await;
        let bytes = std::fs::read(&layer).unwrap();
        assert!(bench.is_good(archive.clone()).await, "{compression}");
        for at in places(0..bytes.len() as u64) {
            std::fs::write(&layer, flipped(&bytes, at)).unwrap();
            assert!(!bench.is_good(archive.clone()).await, "{compression}: a flipped bit at {at} is not found");
        }
        for other in [[&bytes[..], b"x"].concat(), bytes[..bytes.len() - 1].to_vec()] {
            std::fs::write(&layer, other).unwrap();
            assert!(!bench.is_good(archive.clone()).await, "{compression}: another length is not found");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_a_flipped_bit_anywhere_in_the_files_of_an_archive_of_the_go_module() {
    let bench = Bench::new();
    let bytes = golden("v1-local.clip");
    assert!(bench.is_good(bytes.clone()).await);
    let opened = bench.open(bytes.clone()).await.unwrap();
    let tree = opened.fs.tree();
    let ids = (0..tree.len() as u32).map(NodeId).filter(|id| tree.attr(*id).kind == Kind::File);
    let files = ids.filter_map(|id| match tree.data(id) {
        // With the type before it and the checksum behind it.
        Data::Contiguous { offset, .. } => Some(offset - 1..offset + tree.attr(id).size + 8),
        _ => None,
    });
    for at in files.flat_map(places) {
        assert!(!bench.is_good(flipped(&bytes, at)).await, "a flipped bit at {at} is not found");
    }
}

/// The golden archive with another path (or target) of the same length in it, wherever it stands.
fn renamed(from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = golden("v1-local.clip");
    let places: Vec<_> = bytes.windows(from.len()).enumerate().filter(|(_, w)| *w == from.as_bytes()).collect();
    let places: Vec<usize> = places.into_iter().map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "{from} is not in it");
    places.into_iter().for_each(|at| bytes[at..][..to.len()].copy_from_slice(to.as_bytes()));
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_lead_out_of_an_archive_are_refused() {
    let bench = Bench::new();
    for to in [
        "/../../../../hardlink",
        "/rootfs/../../escaped",
        "/rootfs/etc/../../esc",
        "/rootfs/etc/.././.../",
        "rootfs/etc/hardlink/.",
        "/rootfs//etc/hardlin/",
    ] {
        // One byte shorter or longer names are no concern of this test.
        let to = &to[..to.len().min("/rootfs/etc/hardlink".len())];
        let opened = bench.open(renamed("/rootfs/etc/hardlink", to)).await;
        let Ok(opened) = opened else { continue };
        // What is not refused must be an ordinary name below the root.
        let out = bench.path("out");
        extract(&opened.fs, &out, &|_| {}).await.unwrap();
        let names: BTreeSet<_> = std::fs::read_dir(bench.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, BTreeSet::from(["cache".into(), "out".into()]), "{to}");
        std::fs::remove_dir_all(out).unwrap();
        assert!(!to.contains(".."), "{to} is read");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_extracted_through_a_symlink_of_the_archive() {
    let bench = Bench::new();
    // 15 bytes, as the target that it replaces.
    let outside = tempfile::Builder::new().prefix("clip").rand_bytes(6).tempdir_in("/tmp").unwrap();
    let target = outside.path().to_str().unwrap().to_owned();
    assert_eq!(target.len(), "../etc/hostname".len());
    let mut bytes = renamed("../etc/hostname", &target);
    let (from, to) = (b"/rootfs/usr/lib/empty", b"/rootfs/usr/link/file");
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    bytes[at..][..to.len()].copy_from_slice(to);
    // A name below a symlink: refused, or left out as the Go module's leftovers are. Never made where the link points.
    if let Ok(opened) = bench.open(bytes).await {
        let out = bench.path("out");
        extract(&opened.fs, &out, &|_| {}).await.unwrap();
        assert_eq!(std::fs::read_link(out.join("rootfs/usr/link")).unwrap(), outside.path());
    }
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_a_symlink_to_an_empty_directory_is_that_directory_and_no_other() {
    let bench = Bench::new();
    let opened = bench.open(golden("v1-local.clip")).await.unwrap();
    std::fs::create_dir(bench.path("real")).unwrap();
    std::os::unix::fs::symlink("real", bench.path("link")).unwrap();
    extract(&opened.fs, &bench.path("link"), &|_| {}).await.unwrap();
    let hostname = std::fs::read(bench.path("real/rootfs/etc/hostname")).unwrap();
    assert_eq!(Digest::of(&hostname), Digest::of(b"golden\n"));
}
