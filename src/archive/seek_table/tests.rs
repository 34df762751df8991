use proptest::prelude::*;

use super::*;

fn span(uoff: u64, coff: u64, cend: u64) -> Span {
    let digest = Digest::of(&uoff.to_le_bytes());
    Span { uoff, coff, cend, bits: 0, starts_stream: false, window: (0, 0), digest }
}

fn table() -> SeekTable {
    let mut spans = vec![span(0, 0, 400), span(1000, 399, 900), span(2500, 899, 1000)];
    spans[0].starts_stream = true;
    (spans[1].bits, spans[1].window) = (3, (0, 5));
    (spans[2].bits, spans[2].window) = (7, (5, 2));
    let gzip = BlobTable {
        digest: Digest::of(b"c"),
        compression: Compression::Gzip,
        clen: 1000,
        ulen: 3000,
        diff_id: Digest::of(b"u"),
        spans,
        windows: b"windows".to_vec(),
        chunks: None,
    };
    let stored = BlobTable {
        digest: Digest::of(b"s"),
        compression: Compression::None,
        clen: 300,
        ulen: 300,
        diff_id: Digest::of(b"s"),
        spans: vec![span(0, 0, 100), span(100, 100, 300)],
        windows: Vec::new(),
        chunks: None,
    };
    let empty = BlobTable { clen: 0, ulen: 0, spans: Vec::new(), ..stored.clone() };
    SeekTable { blobs: vec![gzip, stored, empty] }
}

#[test]
fn a_table_round_trips_and_finds_its_spans_and_windows() {
    let table = table();
    let bytes = table.encode();
    assert_eq!(SeekTable::decode(&bytes).unwrap(), table);
    assert_eq!(table.blobs[0].window(SpanIx(2)), b"ws");
    assert_eq!(table.blobs[0].span_at(999), SpanIx(0));
    assert_eq!(table.blobs[0].span_at(1000), SpanIx(1));
    assert_eq!(table.blobs[0].bounds(SpanIx(2)), 2500..3000);
}

/// The bytes are a contract with every archive that is out there: a change here needs a new version.
#[test]
fn the_format_is_frozen() {
    let bytes = table().encode();
    assert_eq!(&bytes[..HEAD_LEN], b"XClipSk\n\x01\0\0\0\x02\0\0\0");
    assert_eq!(
        Digest::of(&bytes).hex(),
        "f5d95fc0c1b1709f3d79a4fb0d0d51cef2ec706646f283cececc7ad55b35c8d3",
        "{}",
        hex::encode(&bytes)
    );
    assert_eq!(table().blobs[0].root().hex(), "6d001d98b6ba6ee71ffc2f19f428b43d260c867523f6547e0f9b9b435c0bb117");
}

#[test]
fn the_root_tells_boundaries_and_digests_apart() {
    let base = table().blobs.remove(0);
    let mut other = base.clone();
    other.spans[1].uoff += 1;
    assert_ne!(other.root(), base.root());
    let mut other = base.clone();
    other.spans[1].digest = Digest([0; 32]);
    assert_ne!(other.root(), base.root());
    let mut other = base.clone();
    (other.spans[1].coff, other.digest, other.windows) = (1, Digest([0; 32]), Vec::new());
    assert_eq!(other.root(), base.root(), "where the bytes come from does not matter");
}

#[test]
fn tables_that_contradict_themselves_are_refused() {
    type Edit = fn(&mut BlobTable);
    let edits: &[(&str, Edit)] = &[
        ("no spans", |b| b.spans.clear()),
        ("first not at 0", |b| b.spans[0].uoff = 1),
        ("uncompressed order", |b| b.spans[1].uoff = 2500),
        ("compressed order", |b| b.spans[1].coff = 900),
        ("behind the uncompressed end", |b| b.ulen = 2500),
        ("behind the compressed end", |b| b.clen = 999),
        ("window out of bounds", |b| b.spans[1].window = (3, 5)),
        ("window far out of bounds", |b| b.spans[1].window = (u64::MAX, 5)),
        ("stream start with window", |b| b.spans[1].starts_stream = true),
        ("stored with a window", |b| b.compression = Compression::None),
        ("huge", |b| b.ulen = u64::MAX),
    ];
    for (name, edit) in edits {
        let mut table = table();
        edit(&mut table.blobs[0]);
        assert!(matches!(SeekTable::decode(&table.encode()), Err(ArchiveError::Corrupt { .. })), "{name}");
    }
}

#[test]
fn unknown_parts_are_ignored_or_refused_by_name_as_they_say() {
    let bytes = table().encode();
    let with_section = |id: u32, flags: u32| {
        // The last entry of the directory (windows) stays; a third one is put behind it, of no bytes.
        let mut out = bytes.clone();
        out[12] = 3;
        let entry: Vec<u8> =
            [&id.to_le_bytes()[..], &flags.to_le_bytes(), &0u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
        let at = HEAD_LEN + 2 * SECTION_LEN;
        out.splice(at..at, entry);
        for section in 0..2 {
            let at = HEAD_LEN + section * SECTION_LEN + 8;
            let moved = u64::from_le_bytes(out[at..at + 8].try_into().unwrap()) + SECTION_LEN as u64;
            out[at..at + 8].copy_from_slice(&moved.to_le_bytes());
        }
        out
    };
    assert_eq!(SeekTable::decode(&with_section(3, MAY_BE_IGNORED)).unwrap(), table());
    let error = SeekTable::decode(&with_section(77, 0)).unwrap_err();
    assert!(error.to_string().contains("section 77"), "{error}");
    let mut newer = bytes.clone();
    newer[10] = 9;
    assert_eq!(SeekTable::decode(&newer).unwrap(), table(), "a newer minor version is read");
    newer[8] = 2;
    assert!(matches!(SeekTable::decode(&newer), Err(ArchiveError::Unsupported { .. })));
}

/// The gzip blob as one of chunks: the second and the third share a stream.
fn chunked() -> SeekTable {
    let mut table = table();
    let blob = &mut table.blobs[0];
    blob.spans = vec![span(0, 20, 400), span(1000, 399, 900), span(2500, 399, 900)];
    blob.spans.iter_mut().for_each(|span| span.starts_stream = true);
    (blob.windows, blob.chunks) = (Vec::new(), Some(Chunks { skips: vec![(1, 7), (2, 2000)] }));
    let mut second = blob.clone();
    second.chunks = Some(Chunks { skips: vec![(2, 1500)] });
    table.blobs.push(second);
    table
}

#[test]
fn a_table_of_chunks_round_trips_and_is_frozen() {
    let table = chunked();
    let bytes = table.encode();
    assert_eq!(SeekTable::decode(&bytes).unwrap(), table);
    let chunks = table.blobs[0].chunks.as_ref().unwrap();
    assert_eq!([0, 1, 2, 3].map(|ix| chunks.skip(ix)), [0, 7, 2000, 0]);
    assert_eq!(bytes[12], 3, "one section more than without chunks");
    // Two blobs; the first is number 0 with two skips, span 1 by 7 and one further by 2000; the second 3 further with one.
    assert!(bytes.ends_with(&[2, 0, 2, 1, 7, 1, 0xd0, 0x0f, 3, 1, 2, 0xdc, 0x0b]), "{}", hex::encode(&bytes));
}

#[test]
fn chunks_that_contradict_themselves_are_refused() {
    type Edit = fn(&mut BlobTable);
    let edits: &[(&str, Edit)] = &[
        ("no stream", |b| b.spans[0].starts_stream = false),
        ("overlap in their stream", |b| b.chunks = Some(Chunks { skips: vec![(1, 7), (2, 1506)] })),
        ("far into their stream", |b| b.chunks = Some(Chunks { skips: vec![(0, chunks::MAX_SKIP + 1)] })),
        ("of no span", |b| b.chunks = Some(Chunks { skips: vec![(3, 1)] })),
        ("twice", |b| b.chunks = Some(Chunks { skips: vec![(1, 1), (1, 1)] })),
        ("stored", |b| b.compression = Compression::None),
    ];
    for (name, edit) in edits {
        let mut table = chunked();
        edit(&mut table.blobs[0]);
        assert!(matches!(SeekTable::decode(&table.encode()), Err(ArchiveError::Corrupt { .. })), "{name}");
    }
    let bytes = chunked().encode();
    let mut more = bytes.clone();
    let at = more.len() - 13;
    more[at] = 3;
    assert!(SeekTable::decode(&more).is_err(), "a blob that does not come");
}

#[test]
fn truncated_tables_are_refused_at_every_length() {
    for bytes in [table().encode(), chunked().encode()] {
        for len in 0..bytes.len() {
            assert!(SeekTable::decode(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
        }
    }
}

#[test]
fn flipped_bits_never_panic() {
    for bytes in [table().encode(), chunked().encode()] {
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let _ = SeekTable::decode(&bytes);
        }
    }
}

prop_compose! {
    fn blobs()(
        steps in prop::collection::vec((1u64..1 << 22, 0u64..1 << 20, 0u64..1 << 20, 0u8..8, 0u32..50), 0..40),
        zstd: bool,
        seed: u8,
    ) -> BlobTable {
        let (mut uoff, mut coff, mut windows) = (0, 0, Vec::new());
        let spans: Vec<Span> = steps.iter().map(|&(ulen, clen, overlap, bits, window)| {
            let mut span = span(uoff, coff, coff + clen + overlap + 1);
            (span.bits, span.window) = (bits, if window == 0 { (0, 0) } else { (windows.len() as u64, window) });
            windows.resize(windows.len() + window as usize, seed);
            span.starts_stream = bits == 0 && window == 0;
            (uoff, coff) = (uoff + ulen, coff + clen);
            span
        }).collect();
        BlobTable {
            digest: Digest([seed; 32]),
            compression: if zstd { Compression::Zstd } else { Compression::Gzip },
            clen: spans.iter().map(|s| s.cend).max().unwrap_or(0),
            ulen: uoff,
            diff_id: Digest([seed ^ 1; 32]),
            spans,
            windows,
            chunks: None,
        }
    }
}

proptest! {
    #[test]
    fn every_table_round_trips(blobs in prop::collection::vec(blobs(), 0..4)) {
        let table = SeekTable { blobs };
        prop_assert_eq!(SeekTable::decode(&table.encode()).unwrap(), table);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..64) {
        let _ = SeekTable::decode(&bytes);
        let mut table = table().encode();
        let len = bytes.len().min(table.len() - at);
        table[at..at + len].copy_from_slice(&bytes[..len]);
        let _ = SeekTable::decode(&table);
    }
}
