//! Bytes as a layer's uncompressed tar, in pieces of a size that the first byte picks: never a panic, bounded, and the result does
//! not depend on the pieces. What is walked is merged, twice, as two layers of one image.

use super::memory::bounded;
use crate::archive::BlobIx;
use crate::build::merge::Merger;
use crate::build::tar::{EntryKind, TarEntry, Walker};

pub fn run(input: &[u8]) {
    let Some((step, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    seal(&mut bytes);
    let entries = bounded(bytes.len(), || walk(&bytes, usize::from(*step) + 1));
    assert_eq!(entries, walk(&bytes, usize::MAX));
    let Some(entries) = entries else { return };
    entries.iter().for_each(|entry| check(entry, bytes.len() as u64));
    let mut merger = Merger::new();
    for blob in 0..2 {
        if merger.apply(BlobIx(blob), entries.clone()).is_err() {
            return;
        }
    }
    merger.finish("", &mut |path, _| assert!(path.first() == Some(&b'/')));
}

fn walk(bytes: &[u8], step: usize) -> Option<Vec<TarEntry>> {
    let mut walker = Walker::new();
    let mut entries = Vec::new();
    for piece in bytes.chunks(step) {
        walker.push(piece, &mut |entry| entries.push(entry)).ok()?;
    }
    walker.finish().ok()?;
    Some(entries)
}

/// Makes checksums right, so that the fuzzer gets past them: every block that says `ustar` is a header.
fn seal(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// What an entry promises to whoever places it, where all data lies in `len` bytes.
pub fn check(entry: &TarEntry, len: u64) {
    let clean = |path: &[u8]| {
        path.len() <= 4095
            && (path.is_empty()
                || path.split(|b| *b == b'/').all(|part| !matches!(part, b"" | b"." | b"..") && part.len() <= 255))
            && !path.contains(&0)
    };
    assert!(clean(&entry.path), "{entry:?}");
    assert!(entry.kind != EntryKind::HardLink || clean(&entry.link), "{entry:?}");
    assert!(entry.mode <= 0o7777);
    assert!(entry.xattrs.is_sorted_by(|a, b| a.0 < b.0), "{entry:?}");
    if entry.kind != EntryKind::File {
        assert!(entry.size == 0 && entry.extents.is_none(), "{entry:?}");
        return;
    }
    match &entry.extents {
        None => assert!(entry.offset + entry.size <= len, "{entry:?}"),
        Some(extents) => {
            let mut end = 0;
            for extent in extents {
                assert!(extent.len > 0 && extent.offset >= end, "{entry:?}");
                end = extent.offset + extent.len;
                assert!(extent.blob_offset >= entry.offset && extent.blob_offset + extent.len <= len, "{entry:?}");
            }
            assert!(end <= entry.size, "{entry:?}");
        }
    }
}
