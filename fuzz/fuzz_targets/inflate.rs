//! Arbitrary bytes as a compressed blob: indexing never panics, and what an index says of a blob holds.
#![no_main]

use clip_csi::archive::SpanIx;
use clip_csi::inflate::{Indexer, compressed_range, inflate_span};
use clip_csi::units::{Compression, Digest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((kind, blob)) = input.split_first() else { return };
    let compression = [Compression::None, Compression::Gzip, Compression::Zstd][usize::from(kind % 3)];
    let mut plain = Vec::new();
    let mut indexer = Indexer::new(compression, 1 << 10);
    for piece in blob.chunks(1 + usize::from(kind / 3)) {
        if indexer.push(piece, &mut |bytes| plain.extend_from_slice(bytes)).is_err() || plain.len() > 16 << 20 {
            return;
        }
    }
    let Ok(table) = indexer.finish(&mut |bytes| plain.extend_from_slice(bytes)) else { return };
    assert_eq!(table.diff_id, Digest::of(&plain));
    for ix in 0..table.spans.len() as u32 {
        let range = compressed_range(&table, ix..ix + 1).expect("a range of our own table");
        let compressed = &blob[range.start as usize..range.end as usize];
        let bytes = inflate_span(&table, SpanIx(ix), compressed).expect("a span of our own table");
        let bounds = table.bounds(SpanIx(ix));
        assert_eq!(bytes, plain[bounds.start as usize..bounds.end as usize]);
    }
});
