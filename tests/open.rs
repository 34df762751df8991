//! From an archive to bytes through the library: what opening costs, what a read fetches, what damage does.

#[path = "common/bench.rs"]
mod bench;
#[path = "common/layers.rs"]
#[allow(dead_code)]
mod layers;
#[path = "common/skip.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bench::Bench;
use clip_csi::archive::{self, Extension, NodeId, SeekTable, Storage, Version};
use clip_csi::build::progress::Silent;
use clip_csi::build::{BuildOptions, archive_dir, index_image};
use clip_csi::cache::CacheError;
use clip_csi::fs::{
    ImageFs, Integrity, OpenError, OpenOptions, Opened, RootView, digest_dir, digest_fs, extract, open, verify,
};
use clip_csi::source::fake::{FakeSource, Fault, FaultySource};
use clip_csi::source::{BlobSource, ImageRef};
use clip_csi::units::{Compression, Platform};
use layers::{Layer, text_like, write_layout};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use rustix::io::Errno;

impl Bench {
    async fn open(&self, source: Arc<dyn BlobSource>) -> Result<Opened, OpenError> {
        self.open_with(source, &OpenOptions::default()).await
    }

    async fn open_with(&self, source: Arc<dyn BlobSource>, options: &OpenOptions) -> Result<Opened, OpenError> {
        open(source, &self.sources, &self.cache, options).await
    }

    /// A directory with some of everything, 5 MiB of it in one file.
    fn directory(&self) -> PathBuf {
        let dir = self.path("dir");
        std::fs::create_dir_all(dir.join("sub/deep")).unwrap();
        for i in 0..50u64 {
            std::fs::write(dir.join(format!("sub/{i}")), text_like(i, 100 + 977 * i as usize)).unwrap();
        }
        std::fs::write(dir.join("big"), text_like(99, 5 << 20)).unwrap();
        std::fs::write(dir.join("empty"), b"").unwrap();
        std::fs::hard_link(dir.join("sub/7"), dir.join("sub/deep/seven")).unwrap();
        std::os::unix::fs::symlink("../sub/3", dir.join("sub/link")).unwrap();
        let sparse = std::fs::File::create(dir.join("sparse")).unwrap();
        sparse.set_len(8 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, &text_like(5, 5000), 4 << 20).unwrap();
        dir
    }

    async fn v1(&self) -> (PathBuf, Vec<u8>) {
        let (dir, out) = (self.directory(), self.path("v1.clip"));
        archive_dir(&dir, &out, &BuildOptions::default(), &Silent).await.unwrap();
        (dir, std::fs::read(out).unwrap())
    }

    async fn v2(&self, compression: Compression) -> Vec<u8> {
        let layout = self.path("layout");
        let big = text_like(1, 2 << 20);
        let lower = Layer::new(compression).dir("a", 0o755).file("a/big", &big).file("a/small", b"small");
        let upper = Layer::new(compression).dir("b", 0o711).file("b/x", b"x marks").whiteout("a/small");
        write_layout(&layout, vec![lower, upper]);
        let image = ImageRef::Layout { dir: layout, tag: Some("latest".into()) };
        let image = self.sources.resolve(&image, &Platform::host(), &Default::default()).await.unwrap();
        let out = self.path("v2.clip");
        index_image(&image, &out, &BuildOptions::default(), &Silent).await.unwrap();
        std::fs::read(out).unwrap()
    }
}

fn node(fs: &ImageFs, path: &str) -> NodeId {
    fs.tree().resolve(fs.root(), path.as_bytes(), true).unwrap_or_else(|e| panic!("{path}: {e}"))
}

async fn content(fs: &ImageFs, path: &str) -> Result<Vec<u8>, CacheError> {
    let id = node(fs, path);
    Ok(fs.fetch(id, 0, fs.tree().attr(id).size as usize).await?.to_vec())
}

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures").join(name);
    std::fs::read(path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v1_archive_shows_the_directory_it_was_made_of() {
    let bench = Bench::new();
    let (dir, bytes) = bench.v1().await;
    let opened = bench.open(FakeSource::new("the archive", bytes)).await.unwrap();
    assert_eq!((opened.archive.version(), opened.bundle), (Version::V1, false));
    assert!(opened.detected_from.contains("no storage info"), "{}", opened.detected_from);
    assert_eq!(opened.whole_file_only_bytes(), 0);
    let want = digest_dir(&dir, &|_| {}).unwrap();
    assert_eq!(digest_fs(&opened.fs, &|_| {}).await.unwrap(), want);
    let out = bench.path("out");
    extract(&opened.fs, &out, &|_| {}).await.unwrap();
    assert_eq!(digest_dir(&out, &|_| {}).unwrap(), want);
}

#[tokio::test(flavor = "multi_thread")]
async fn extract_keeps_the_attributes_of_what_is_neither_file_nor_directory() {
    let (bench, name) = (Bench::new(), "trusted.note");
    let (dir, archive, out) = (bench.path("dir"), bench.path("v1.clip"), bench.path("out"));
    std::fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink("anywhere", dir.join("link")).unwrap();
    rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    for node in ["link", "fifo"] {
        match rustix::fs::lsetxattr(dir.join(node), name, node.as_bytes(), XattrFlags::empty()) {
            Ok(()) => {}
            // Such attributes are for those who may administer the system, on filesystems that keep them.
            Err(Errno::PERM | Errno::OPNOTSUPP) => return skip::skipped_here("no trusted.* attribute can be set here"),
            Err(error) => panic!("{error}"),
        }
    }
    archive_dir(&dir, &archive, &BuildOptions::default(), &Silent).await.unwrap();
    let opened = bench.open(FakeSource::new("the archive", std::fs::read(&archive).unwrap())).await.unwrap();
    extract(&opened.fs, &out, &|_| {}).await.unwrap();
    for node in ["link", "fifo"] {
        let mut value = [0; 16];
        let len = rustix::fs::lgetxattr(out.join(node), name, &mut value[..]).unwrap();
        assert_eq!(&value[..len], node.as_bytes());
    }
}

/// ext4 holds a file's attributes in one block and says that there is no space left; the kernel refuses capabilities that it can't read.
#[tokio::test(flavor = "multi_thread")]
async fn extract_leaves_attributes_out_that_do_not_fit_and_goes_on() {
    let bench = Bench::new();
    let layout = bench.path("layout");
    let layer = Layer::new(Compression::Gzip)
        .xattr("a", "user.long", &[b'x'; 20_000])
        .xattr("b", "security.capability", b"none that the kernel knows")
        .xattr("c", "user.short", b"kept")
        .file("d", b"and what comes after them");
    write_layout(&layout, vec![layer]);
    let image = ImageRef::Layout { dir: layout, tag: Some("latest".into()) };
    let image = bench.sources.resolve(&image, &Platform::host(), &Default::default()).await.unwrap();
    let (archive, out) = (bench.path("v2.clip"), bench.path("out"));
    index_image(&image, &archive, &BuildOptions::default(), &Silent).await.unwrap();
    let opened = bench.open(FakeSource::new("the archive", std::fs::read(&archive).unwrap())).await.unwrap();
    let extracted = extract(&opened.fs, &out, &|_| {}).await.unwrap();
    assert_eq!(std::fs::read(out.join("d")).unwrap(), b"and what comes after them");
    // How many that are hangs on the filesystem; the capability is never among the kept.
    assert!(extracted.warnings.iter().any(|line| line.contains("extended attributes were left out")), "{extracted:?}");
    let mut value = [0; 64];
    assert!(rustix::fs::lgetxattr(out.join("b"), "security.capability", &mut value[..]).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_fetches_the_index_only_and_a_read_little_more_than_its_span() {
    let bench = Bench::new();
    let (dir, bytes) = bench.v1().await;
    let source = FakeSource::new("the archive", bytes);
    let opened = bench.open(source.clone()).await.unwrap();
    assert!(source.requests() <= 2 && source.stats() == 1, "{:?}", source.ranges());
    assert!(source.bytes_read() < 128 << 10, "{:?}", source.ranges());
    let (requests, bytes) = (source.requests(), source.bytes_read());
    let big = std::fs::read(dir.join("big")).unwrap();
    let read = opened.fs.fetch(node(&opened.fs, "big"), 2_500_000, 100).await.unwrap();
    assert_eq!(read, big[2_500_000..2_500_100]);
    // The seek table, one or two spans.
    assert!(source.requests() - requests <= 3, "{:?}", source.ranges());
    assert!(source.bytes_read() - bytes < 5 << 19, "{:?}", source.ranges());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_opened_with_two_requests() {
    let bench = Bench::new();
    let source = FakeSource::new("the archive", golden("v2.clip"));
    bench.open(source.clone()).await.unwrap();
    assert_eq!((source.requests(), source.stats()), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_come_together_fetch_the_seek_table_once() {
    let bench = Bench::new();
    let (_, bytes) = bench.v1().await;
    let source = FakeSource::new("the archive", bytes);
    let opened = bench.open(source.clone()).await.unwrap();
    let reads = (0..50).map(|i| content(&opened.fs, Box::leak(format!("sub/{i}").into_boxed_str())));
    assert!(futures::future::join_all(reads).await.iter().all(Result::is_ok));
    let (at, len, _) = opened.archive.extension.as_ref().unwrap().seek_table.unwrap();
    assert_eq!(source.ranges().iter().filter(|range| **range == (at..at + len)).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_byte_is_never_served_and_the_rest_is() {
    let bench = Bench::new();
    let (dir, bytes) = bench.v1().await;
    let source = FaultySource::new(FakeSource::new("the archive", bytes), []);
    let opened = bench.open(source.clone()).await.unwrap();
    let big = node(&opened.fs, "big");
    let clip_csi::archive::Data::Contiguous { offset, .. } = opened.fs.tree().data(big) else { panic!("contiguous") };
    source.always(Fault::Flip(offset + 3_000_000));
    let error = opened.fs.fetch(big, 3_000_000, 1).await.unwrap_err();
    assert!(matches!(error, CacheError::Corrupt { .. }), "{error}");
    let want = std::fs::read(dir.join("big")).unwrap();
    assert_eq!(opened.fs.fetch(big, 0, 100).await.unwrap(), want[..100]);
    let report = verify(&opened, true, &|_| {}).await.unwrap();
    // The span, and the file that can't be checked because of it is not called bad for that.
    assert_eq!((report.problem_count, report.problems.len()), (1, 1), "{:?}", report.problems);
    source.always(Fault::None);
    assert_eq!(opened.fs.fetch(big, 3_000_000, 1).await.unwrap(), want[3_000_000..3_000_001]);
    let report = verify(&opened, true, &|_| {}).await.unwrap();
    assert!(report.is_ok() && report.verified_bytes > 5 << 20, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_seek_table_is_corrupt_at_the_first_read_and_fetched_again() {
    let bench = Bench::new();
    let (_, bytes) = bench.v1().await;
    let source = FaultySource::new(FakeSource::new("the archive", bytes), []);
    let opened = bench.open(source.clone()).await.unwrap();
    let (at, ..) = opened.archive.extension.as_ref().unwrap().seek_table.unwrap();
    source.always(Fault::Flip(at + 40));
    let error = content(&opened.fs, "sub/1").await.unwrap_err();
    assert!(error.to_string().contains("seek table"), "{error}");
    source.always(Fault::None);
    assert!(content(&opened.fs, "sub/1").await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cut_short_or_no_archive_is_refused_by_name() {
    let bench = Bench::new();
    let (_, bytes) = bench.v1().await;
    for (bytes, want) in [
        (bytes[..bytes.len() - 1].to_vec(), "truncated archive"),
        (bytes[..53].to_vec(), "truncated archive"),
        (vec![], "truncated archive"),
        (b"#!/bin/sh\nexit 0\n".repeat(10), "not a CLIP archive"),
    ] {
        let error = bench.open(FakeSource::new("s3://bucket/key.clip", bytes)).await.unwrap_err().to_string();
        assert!(error.contains("s3://bucket/key.clip") && error.contains(want), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v2_archive_reads_from_layers_of_any_compression() {
    for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
        let bench = Bench::new();
        let opened = bench.open(FakeSource::new("the archive", bench.v2(compression).await)).await.unwrap();
        assert_eq!(opened.archive.version(), Version::V2);
        assert_eq!(opened.detected_from, "storage info of type oci");
        assert_eq!(content(&opened.fs, "a/big").await.unwrap(), text_like(1, 2 << 20), "{compression}");
        assert_eq!(content(&opened.fs, "b/x").await.unwrap(), b"x marks");
        assert!(opened.fs.tree().resolve(NodeId::ROOT, b"a/small", true).is_err());
        let report = verify(&opened, true, &|_| {}).await.unwrap();
        assert!(report.is_ok() && report.blobs == 2 && report.verified_bytes > 2 << 20, "{report:?}");
    }
}

/// The archive without what only we write: as the Go module makes it.
fn without_seek_table(bytes: &[u8]) -> Vec<u8> {
    let header = archive::Header::decode(bytes).unwrap();
    let part = |(pos, len): (u64, u64)| &bytes[pos as usize..(pos + len) as usize];
    let old = archive::decode(&bytes[..54], part(header.index), part(header.storage_info)).unwrap();
    let layout = old.extension.unwrap().layout;
    let extension = Extension { layout, ..Extension::default() };
    let new = archive::encode(&old.tree, &old.storage, extension, &SeekTable::default(), 54).unwrap();
    [&new.header[..], &new.tail].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_without_a_seek_table_are_streamed_once_and_checked() {
    for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
        let bench = Bench::new();
        let bytes = without_seek_table(&bench.v2(compression).await);
        let opened = bench.open(FakeSource::new("the archive", bytes.clone())).await.unwrap();
        assert_eq!(content(&opened.fs, "a/big").await.unwrap(), text_like(1, 2 << 20), "{compression}");
        let report = verify(&opened, true, &|_| {}).await.unwrap();
        assert!(report.is_ok() && report.verified_bytes > 2 << 20, "{report:?}");
        // A layer that changed under its digest: nothing of it is served.
        let Storage::Oci(oci) = &opened.archive.storage else { panic!("v2") };
        let layer = oci.layers[0].strip_prefix("sha256:").unwrap();
        let blob = bench.path("layout/blobs/sha256").join(layer);
        let mut damaged = std::fs::read(&blob).unwrap();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        std::fs::write(&blob, damaged).unwrap();
        let fresh = Bench::new();
        let opened = fresh.open(FakeSource::new("the archive", bytes)).await.unwrap();
        assert!(content(&opened.fs, "a/big").await.is_err(), "{compression}");
        assert_eq!(content(&opened.fs, "b/x").await.unwrap(), b"x marks");
        assert!(!verify(&opened, true, &|_| {}).await.unwrap().is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v1_archive_of_the_go_module_shows_its_bundle_or_all_of_it() {
    let bench = Bench::new();
    for (root, bundle, hostname) in [
        (RootView::Auto, true, "etc/hostname"),
        (RootView::Bundle, true, "etc/hostname"),
        (RootView::Archive, false, "rootfs/etc/hostname"),
    ] {
        for integrity in [Integrity::Digest, Integrity::Strict] {
            let options = OpenOptions { root, integrity, ..OpenOptions::default() };
            let source = FakeSource::new("the archive", golden("v1-local.clip"));
            let opened = bench.open_with(source, &options).await.unwrap();
            assert_eq!(opened.bundle, bundle, "{root:?}");
            assert_eq!(content(&opened.fs, hostname).await.unwrap().len(), 7);
            assert_eq!(opened.fs.ino(opened.fs.root()), 1);
            let report = verify(&opened, true, &|_| {}).await.unwrap();
            assert!(report.is_ok() && report.verified_bytes > 0 && report.unverifiable_bytes == 0, "{report:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_no_bundle_however_it_is_asked() {
    let bench = Bench::new();
    let (_, bytes) = bench.v1().await;
    let options = OpenOptions { root: RootView::Bundle, ..OpenOptions::default() };
    let error = bench.open_with(FakeSource::new("x.clip", bytes), &options).await.unwrap_err().to_string();
    assert!(error.contains("x.clip") && error.contains("/rootfs") && error.contains("root: archive"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_an_archive_of_the_go_module_is_found_by_verify() {
    let bench = Bench::new();
    let mut bytes = golden("v1-local.clip");
    let opened = bench.open(FakeSource::new("the archive", bytes.clone())).await.unwrap();
    let id = node(&opened.fs, "etc/hostname");
    let clip_csi::archive::Data::Contiguous { offset, .. } = opened.fs.tree().data(id) else { panic!("contiguous") };
    bytes[offset as usize] ^= 1;
    let opened = bench.open(FakeSource::new("the archive", bytes)).await.unwrap();
    let report = verify(&opened, true, &|_| {}).await.unwrap();
    assert_eq!(report.problem_count, 1, "{report:?}");
    assert!(report.problems[0].contains("etc/hostname"), "{report:?}");
    assert!(content(&opened.fs, "etc/hostname").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_that_differ_only_in_data_without_digests_are_told_apart() {
    let bench = Bench::new();
    let bytes = golden("v1-local.clip");
    let mut other = bytes.clone();
    let opened = bench.open(FakeSource::new("one", bytes.clone())).await.unwrap();
    let id = node(&opened.fs, "etc/hostname");
    let clip_csi::archive::Data::Contiguous { offset, .. } = opened.fs.tree().data(id) else { panic!("contiguous") };
    other[offset as usize] ^= 1;
    let again = bench.open(FakeSource::new("one", bytes)).await.unwrap();
    let other = bench.open(FakeSource::new("other", other)).await.unwrap();
    assert_eq!(opened.content, again.content);
    assert_eq!(opened.archive.digest, other.archive.digest, "it covers the index only");
    assert_ne!(opened.content, other.content);
    // Where span digests cover the data, equal archives from different places are one.
    let (_, ours) = bench.v1().await;
    let here = bench.open(FakeSource::new("here", ours.clone())).await.unwrap();
    let there = bench.open(FakeSource::new("there", ours)).await.unwrap();
    assert_eq!((here.content, here.content), (here.archive.digest, there.content));
}
