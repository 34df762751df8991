//! Bytes as a layer's uncompressed tar, in pieces of a size that the first byte picks: never a panic, and the result does not depend on
//! the pieces. What is walked is merged, twice, as two layers of one image.
#![no_main]

use clip_csi::archive::BlobIx;
use clip_csi::build::merge::Merger;
use clip_csi::build::tar::{TarEntry, Walker};
use libfuzzer_sys::fuzz_target;

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

fuzz_target!(|data: &[u8]| {
    let Some((step, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    seal(&mut bytes);
    let entries = walk(&bytes, usize::from(*step) + 1);
    assert_eq!(entries, walk(&bytes, usize::MAX));
    let Some(entries) = entries else { return };
    let mut merger = Merger::new();
    for blob in 0..2 {
        if merger.apply(BlobIx(blob), entries.clone()).is_err() {
            return;
        }
    }
    merger.finish("", &mut |path, _| assert!(path.first() == Some(&b'/')));
});
