use super::*;
use crate::archive::{Entry, Extent, TreeBuilder};
use async_trait::async_trait;
use proptest::prelude::*;
use std::sync::atomic::AtomicUsize;

/// A blob in memory, of which a prefix is "in the cache".
#[derive(Debug)]
struct Memory {
    bytes: Vec<u8>,
    here: usize,
    cold: AtomicUsize,
}

#[async_trait]
impl Blob for Memory {
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        let off = off as usize;
        if off + buf.len() > self.here {
            return false;
        }
        buf.copy_from_slice(&self.bytes[off..off + buf.len()]);
        true
    }

    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        self.cold.fetch_add(1, Ordering::Relaxed);
        match self.bytes.get(off as usize..off as usize + len) {
            Some(bytes) => Ok(Bytes::copy_from_slice(bytes)),
            None => Err(super::super::blob::beyond("the blob", off, len, self.bytes.len() as u64)),
        }
    }
}

fn memory(len: usize, here: usize) -> Arc<Memory> {
    let bytes = (0..len).map(|i| (i * 7 + i / 251 + 1) as u8).collect();
    Arc::new(Memory { bytes, here, cold: AtomicUsize::new(0) })
}

fn fs_of(entry: Entry, blob: Arc<Memory>) -> (ImageFs, NodeId) {
    let mut builder = TreeBuilder::default();
    builder.insert(b"/file", entry);
    builder.insert(b"/link", Entry { target: b"file".to_vec(), ..Entry::new(Kind::Symlink, 0o777) });
    let tree = Arc::new(builder.finish().unwrap());
    let node = tree.lookup(NodeId::ROOT, b"file").unwrap();
    (ImageFs::new(tree, NodeId::ROOT, vec![blob]), node)
}

fn file(size: u64, offset: u64) -> Entry {
    Entry { size, offset, ..Entry::new(Kind::File, 0o644) }
}

/// Reads, by whichever way the filesystem takes; says whether it was a hit.
fn read(fs: &ImageFs, node: NodeId, off: u64, len: u32) -> (Result<Bytes, Errno>, bool) {
    match fs.read(node, off, len) {
        ReadResult::Ready(bytes) => (Ok(bytes), true),
        ReadResult::Pending(future) => (futures::executor::block_on(future), false),
    }
}

#[test]
fn reads_are_clamped_at_the_end_of_the_file() {
    let (fs, node) = fs_of(file(100, 10), memory(1000, 1000));
    let blob = memory(1000, 0).bytes.clone();
    assert_eq!(read(&fs, node, 0, 4096), (Ok(Bytes::copy_from_slice(&blob[10..110])), true));
    assert_eq!(read(&fs, node, 90, 4096), (Ok(Bytes::copy_from_slice(&blob[100..110])), true));
    for off in [100, 101, u64::MAX] {
        assert_eq!(read(&fs, node, off, 4096).0, Ok(Bytes::new()));
    }
}

#[test]
fn a_file_beyond_its_blob_is_an_io_error_not_a_short_read() {
    for (size, offset) in [(100, 950), (100, 5000), (10, 1 << 62)] {
        let (fs, node) = fs_of(file(size, offset), memory(1000, 1000));
        assert_eq!(read(&fs, node, 0, 100).0, Err(Errno(libc::EIO)), "{size} at {offset}");
    }
}

#[test]
fn what_is_no_file_has_no_bytes() {
    let (fs, _) = fs_of(file(1, 0), memory(10, 10));
    let link = fs.tree().lookup(NodeId::ROOT, b"link").unwrap();
    assert_eq!(read(&fs, NodeId::ROOT, 0, 10).0, Err(Errno::ISDIR));
    assert_eq!(read(&fs, link, 0, 10).0, Err(Errno::INVAL));
}

#[test]
fn a_read_that_is_partly_here_is_a_miss_as_a_whole() {
    let blob = memory(1000, 50);
    let (fs, node) = fs_of(file(100, 0), Arc::clone(&blob));
    assert!(read(&fs, node, 0, 50).1);
    let (bytes, hit) = read(&fs, node, 0, 51);
    assert_eq!((bytes.unwrap(), hit), (Bytes::copy_from_slice(&blob.bytes[..51]), false));
}

#[test]
fn a_file_without_its_blob_is_an_io_error() {
    let entry = Entry { blob: BlobIx(3), ..file(10, 0) };
    let (fs, node) = fs_of(entry, memory(10, 10));
    assert_eq!(read(&fs, node, 0, 10).0, Err(Errno(libc::EIO)));
}

#[test]
fn extents_that_touch_in_the_blob_are_one_read() {
    let blob = memory(1000, 0);
    let extents = vec![
        Extent { offset: 100, len: 10, blob_offset: 200 },
        Extent { offset: 300, len: 20, blob_offset: 210 },
        Extent { offset: 400, len: 5, blob_offset: 500 },
    ];
    let (fs, node) = fs_of(Entry { extents: Some(extents), ..file(600, 0) }, Arc::clone(&blob));
    let bytes = read(&fs, node, 0, 600).0.unwrap();
    assert_eq!(bytes[300..320], blob.bytes[210..230]);
    assert_eq!(blob.cold.load(Ordering::Relaxed), 2);
    // Holes need no blob at all.
    assert_eq!(read(&fs, node, 500, 100), (Ok(vec![0; 100].into()), true));
}

#[test]
fn inode_numbers_are_one_to_one_and_the_shown_root_is_one() {
    let mut builder = TreeBuilder::default();
    for path in ["/a", "/rootfs/x", "/rootfs/y/z", "/s"] {
        builder.insert(path.as_bytes(), file(0, 0));
    }
    let tree = Arc::new(builder.finish().unwrap());
    let rootfs = tree.lookup(NodeId::ROOT, b"rootfs").unwrap();
    for root in [NodeId::ROOT, rootfs] {
        let fs = ImageFs::new(Arc::clone(&tree), root, vec![]);
        assert_eq!((fs.ino(root), fs.parent(root)), (1, root));
        let mut seen = std::collections::BTreeSet::new();
        for id in (0..tree.len() as u32).map(NodeId) {
            assert!(seen.insert(fs.ino(id)));
            assert_eq!(fs.node(fs.ino(id)), Some(id));
        }
        assert_eq!((fs.node(0), fs.node(tree.len() as u64 + 1), fs.node(u64::MAX)), (None, None, None));
    }
}

#[test]
fn every_kind_of_failure_has_an_errno_and_a_label() {
    let text = || "x".to_owned();
    let source = |e| CacheError::Source(e);
    let cases = [
        (source(SourceError::NotFound { what: text(), detail: text() }), libc::EIO, "not_found"),
        (source(SourceError::Denied { what: text(), detail: text() }), libc::EACCES, "denied"),
        (source(SourceError::Refused { what: text(), detail: text() }), libc::EACCES, "refused"),
        (source(SourceError::Unavailable { what: text(), tries: 1, detail: text() }), libc::ETIMEDOUT, "unavailable"),
        (source(SourceError::Corrupt { what: text(), detail: text() }), libc::EIO, "corrupt"),
        (source(SourceError::Invalid { what: text(), detail: text() }), libc::EIO, "invalid"),
        (source(SourceError::Io { what: text(), detail: text() }), libc::EIO, "io"),
        (CacheError::Corrupt { what: text(), detail: text() }, libc::EIO, "corrupt"),
        (CacheError::Io { what: text(), detail: text() }, libc::EIO, "io"),
        (CacheError::Unverifiable { what: text() }, libc::EIO, "unverifiable"),
    ];
    for (error, errno, label) in cases {
        assert_eq!((Errno::of_cache(&error).0, FailureKind::of(&error).label()), (errno, label));
        if let CacheError::Source(source) = &error {
            assert_eq!(source.kind(), label);
        }
    }
}

/// A file of up to 4096 bytes with extents anywhere, and what it must read as.
fn sparse_file() -> impl Strategy<Value = (u64, Vec<Extent>)> {
    (1u64..4096, prop::collection::vec((0u64..200, 1u64..300, 0u64..3000), 0..12)).prop_map(|(size, parts)| {
        let mut at = 0;
        let mut extents = Vec::new();
        for (gap, len, blob_offset) in parts {
            let offset = at + gap;
            let len = len.min(size.saturating_sub(offset));
            if len == 0 {
                break;
            }
            extents.push(Extent { offset, len, blob_offset });
            at = offset + len;
        }
        (size, extents)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_read_of_a_sparse_file_is_that_of_the_flat_file(
        (size, extents) in sparse_file(),
        here in 0usize..4000,
        reads in prop::collection::vec((0u64..4200, 0u32..4200), 1..8),
    ) {
        let blob = memory(4000, here);
        let mut flat = vec![0; size as usize];
        for e in &extents {
            let from = e.blob_offset as usize;
            flat[e.offset as usize..(e.offset + e.len) as usize].copy_from_slice(&blob.bytes[from..from + e.len as usize]);
        }
        let (fs, node) = fs_of(Entry { extents: Some(extents.clone()), ..file(size, 0) }, blob);
        for (off, len) in reads {
            let want = &flat[flat.len().min(off as usize)..flat.len().min(off as usize + len as usize)];
            prop_assert_eq!(read(&fs, node, off, len).0.unwrap(), want.to_vec());
        }
        // Data and holes, walked by seeking, are the extents.
        let mut covered = Vec::new();
        let mut at = 0;
        while let Ok(data) = fs.seek_data(node, at) {
            let hole = fs.seek_hole(node, data).unwrap();
            prop_assert!(data < hole && hole <= size);
            covered.extend(data..hole);
            at = hole;
        }
        prop_assert_eq!(covered, extents.iter().flat_map(|e| e.offset..e.offset + e.len).collect::<Vec<_>>());
    }
}

#[test]
fn the_last_failed_read_is_remembered_with_its_file_and_cause() {
    let (fs, node) = fs_of(file(100, 950), memory(1000, 1000));
    assert!(fs.last_failure().is_none());
    assert!(read(&fs, node, 0, 10).0.is_ok());
    assert!(fs.last_failure().is_none(), "a read that succeeds is none");
    assert!(read(&fs, node, 60, 10).0.is_err());
    let failure = fs.last_failure().unwrap();
    assert_eq!(failure.path, "/file");
    assert!(failure.error.contains("the blob") && failure.at.elapsed() < Duration::from_secs(60), "{failure:?}");
}
