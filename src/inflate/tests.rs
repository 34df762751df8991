use std::io::Write;

use flate2::{Compress, FlushCompress, GzBuilder};
use proptest::prelude::*;
use sha2::Digest as _;

use super::*;
use crate::archive::{BlobTable, SpanIx};
use crate::units::Digest;

/// A small generator, so that megabytes of data come out of one number.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// `len` bytes that compress about as source code does, with stretches of noise and of one byte.
fn data(seed: u64, len: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "fn ",
        "return ",
        "layer",
        "0x1f",
        "\n    ",
        "let mut ",
        "span",
        " = ",
        "(",
        ")",
        ";\n",
        "checkpoint",
        "self.",
        "window",
        "match ",
        "bytes",
    ];
    let mut noise = Noise(seed | 1);
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        match noise.next() % 64 {
            0 => (0..noise.next() % 4096).for_each(|_| out.push(noise.next() as u8)),
            1 => out.resize(out.len() + (noise.next() % 4096) as usize, b' '),
            2 => out.extend_from_slice(&noise.next().to_le_bytes()),
            n => out.extend_from_slice(WORDS[n as usize % 16].as_bytes()),
        }
    }
    out.truncate(len);
    out
}

fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// One member whose stream is flushed at every `every` bytes, as pigz (sync) and gzip --rsyncable (full) do.
fn gzip_flushed(data: &[u8], level: u32, every: usize, flush: FlushCompress) -> Vec<u8> {
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    let mut deflate = Compress::new(flate2::Compression::new(level), false);
    let mut pieces = data.chunks(every).peekable();
    while let Some(piece) = pieces.next() {
        let flush = if pieces.peek().is_some() { flush } else { FlushCompress::Finish };
        out.reserve(piece.len() * 2 + 1024);
        deflate.compress_vec(piece, &mut out, flush).unwrap();
    }
    let mut crc = flate2::Crc::new();
    crc.update(data);
    out.extend_from_slice(&crc.sum().to_le_bytes());
    out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    out
}

fn zstd_frames(data: &[u8], level: i32, every: usize) -> Vec<u8> {
    data.chunks(every.max(1)).flat_map(|piece| zstd::bulk::compress(piece, level).unwrap()).collect()
}

fn skippable(len: u32) -> Vec<u8> {
    let mut out = 0x184D_2A5E_u32.to_le_bytes().to_vec();
    out.extend_from_slice(&len.to_le_bytes());
    out.resize(out.len() + len as usize, 7);
    out
}

fn index_in(
    blob: &[u8],
    compression: Compression,
    span_size: u64,
    chunk: usize,
) -> Result<(BlobTable, Vec<u8>), InflateError> {
    let mut out = Vec::new();
    let mut indexer = Indexer::new(compression, span_size);
    for piece in blob.chunks(chunk.max(1)) {
        indexer.push(piece, &mut |bytes| out.extend_from_slice(bytes))?;
    }
    let table = indexer.finish(&mut |bytes| out.extend_from_slice(bytes))?;
    Ok((table, out))
}

fn index(blob: &[u8], compression: Compression, span_size: u64) -> Result<(BlobTable, Vec<u8>), InflateError> {
    index_in(blob, compression, span_size, 64 << 10)
}

fn part<'a>(table: &BlobTable, spans: std::ops::Range<u32>, blob: &'a [u8]) -> &'a [u8] {
    let range = compressed_range(table, spans).unwrap();
    &blob[range.start as usize..range.end as usize]
}

/// All that a table promises: order, lengths, digests; each span alone, each pair of neighbours, and all in one go.
fn assert_whole(table: &BlobTable, blob: &[u8], plain: &[u8]) {
    assert_eq!((table.clen, table.ulen), (blob.len() as u64, plain.len() as u64));
    assert_eq!((table.digest, table.diff_id), (Digest::of(blob), Digest::of(plain)));
    assert_eq!(table.spans.first().map(|s| s.uoff), (!plain.is_empty()).then_some(0));
    for pair in table.spans.windows(2) {
        assert!(pair[0].uoff < pair[1].uoff && pair[0].coff <= pair[1].coff && pair[0].cend <= pair[1].cend);
    }
    let n = table.spans.len() as u32;
    for ix in 0..n {
        let bounds = table.bounds(SpanIx(ix));
        let want = &plain[bounds.start as usize..bounds.end as usize];
        let span = &table.spans[ix as usize];
        let run = run_of(table, SpanIx(ix));
        assert!(run.contains(&ix));
        let got = inflate_span(table, SpanIx(ix), &blob[span.coff as usize..span.cend as usize]).unwrap();
        assert!(got == want, "span {ix}");
        let to = (ix + 2).min(n);
        let mut both = Vec::new();
        inflate_spans(table, ix..to, part(table, ix..to, blob), &mut |_, bytes| both.extend(bytes)).unwrap();
        assert!(both == plain[bounds.start as usize..table.bounds(SpanIx(to - 1)).end as usize]);
    }
    let mut inflater = SpanInflater::new(table, 0..n).unwrap();
    let mut all = Vec::new();
    for piece in part(table, 0..n, blob).chunks(1000) {
        inflater.push(piece, &mut |_, bytes| all.extend(bytes)).unwrap();
    }
    inflater.finish().unwrap();
    assert!(all == plain);
}

/// How a blob is put together.
#[derive(Debug, Clone)]
enum Layout {
    Stored,
    Gzip { level: u32, member: usize, padding: usize },
    GzipFlushed { level: u32, every: usize, full: bool },
    Zstd { level: i32, frame: usize, skip: u32 },
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Stored),
        (0..10_u32, prop_oneof![Just(usize::MAX), 1..300_usize, 10_000..200_000_usize], 0..2000_usize)
            .prop_map(|(level, member, padding)| Layout::Gzip { level, member, padding }),
        (1..10_u32, 1_000..200_000_usize, any::<bool>()).prop_map(|(level, every, full)| Layout::GzipFlushed {
            level,
            every,
            full
        }),
        (1..6_i32, prop_oneof![Just(usize::MAX), 500..3000_usize, 10_000..200_000_usize], 0..3000_u32)
            .prop_map(|(level, frame, skip)| Layout::Zstd { level, frame, skip }),
    ]
}

fn lay_out(layout: &Layout, plain: &[u8]) -> (Compression, Vec<u8>) {
    match *layout {
        Layout::Stored => (Compression::None, plain.to_vec()),
        Layout::Gzip { level, member, padding } => {
            let mut blob: Vec<u8> = plain.chunks(member).flat_map(|piece| gzip(piece, level)).collect();
            if blob.is_empty() {
                blob = gzip(&[], level);
            }
            blob.resize(blob.len() + padding, 0);
            (Compression::Gzip, blob)
        }
        Layout::GzipFlushed { level, every, full } => {
            let flush = if full { FlushCompress::Full } else { FlushCompress::Sync };
            let blob = if plain.is_empty() { gzip(plain, level) } else { gzip_flushed(plain, level, every, flush) };
            (Compression::Gzip, blob)
        }
        Layout::Zstd { level, frame, skip } => {
            let mut blob = skippable(skip);
            blob.extend(zstd_frames(plain, level, frame));
            blob.extend(skippable(skip));
            (Compression::Zstd, blob)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_span_of_every_layout_inflates_alone(
        layout in layouts(),
        seed in any::<u64>(),
        len in 0..400_000_usize,
        span_size in prop_oneof![Just(1_u64), 2_000..40_000_u64, 40_000..150_000_u64],
        chunk in prop_oneof![1..40_usize, 1_000..100_000_usize],
    ) {
        let plain = data(seed, len);
        let (compression, blob) = lay_out(&layout, &plain);
        let (table, out) = index_in(&blob, compression, span_size, chunk).unwrap();
        prop_assert!(out == plain);
        assert_whole(&table, &blob, &plain);
    }

    #[test]
    fn a_flipped_bit_never_changes_what_a_span_yields(
        layout in layouts(),
        seed in any::<u64>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u32), 1..4),
    ) {
        let plain = data(seed, 150_000);
        let (compression, blob) = lay_out(&layout, &plain);
        let (table, _) = index(&blob, compression, 20_000).unwrap();
        let mut bad = blob.clone();
        for (at, bit) in &flips {
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
        }
        if let Ok((found, _)) = index(&bad, compression, 20_000) {
            prop_assert_eq!(found.digest, Digest::of(&bad));
        }
        for ix in 0..table.spans.len() as u32 {
            let span = &table.spans[ix as usize];
            if let Ok(bytes) = inflate_span(&table, SpanIx(ix), &bad[span.coff as usize..span.cend as usize]) {
                prop_assert_eq!(Digest::of(&bytes), span.digest);
            }
        }
        let n = table.spans.len() as u32;
        let mut wrong = 0;
        let _ = inflate_spans(&table, 0..n, part(&table, 0..n, &bad), &mut |ix, bytes| {
            wrong += usize::from(Digest::of(&bytes) != table.spans[ix.0 as usize].digest);
        });
        prop_assert_eq!(wrong, 0);
    }

    #[test]
    fn a_hostile_table_is_an_error_and_no_panic(
        seed in any::<u64>(),
        which in any::<prop::sample::Index>(),
        field in 0..7,
        value in prop_oneof![Just(0_u64), Just(u64::MAX), 0..200_000_u64],
    ) {
        let plain = data(seed, 150_000);
        let blob = gzip(&plain, 6);
        let (mut table, _) = index(&blob, Compression::Gzip, 20_000).unwrap();
        let at = which.index(table.spans.len());
        let (count, span) = (table.spans.len(), &mut table.spans[at]);
        match field {
            0 => span.uoff = value,
            1 => span.coff = value,
            2 => span.cend = value,
            3 => span.bits = value as u8,
            4 => span.window.0 = value,
            5 => span.window.1 = value as u32,
            _ => span.starts_stream = !span.starts_stream,
        }
        for ix in 0..=count as u32 {
            if let Ok(range) = compressed_range(&table, ix..ix + 1)
                && let Some(bytes) = blob.get(range.start as usize..range.end as usize)
                && let Ok(bytes) = inflate_span(&table, SpanIx(ix), bytes)
            {
                prop_assert_eq!(Digest::of(&bytes), table.spans[ix as usize].digest);
            }
        }
    }
}

#[test]
fn the_size_of_the_pushes_changes_nothing() {
    let plain = data(1, 700_000);
    for (compression, blob) in [
        (Compression::Gzip, gzip(&plain, 6)),
        (Compression::Zstd, zstd_frames(&plain, 3, 90_000)),
        (Compression::None, plain.clone()),
    ] {
        let (table, _) = index_in(&blob, compression, 64 << 10, usize::MAX).unwrap();
        for chunk in [1, 7, 4096, 100_000] {
            assert!(index_in(&blob, compression, 64 << 10, chunk).unwrap().0 == table, "{compression} {chunk}");
        }
    }
}

#[test]
fn header_fields_of_gzip_are_passed_over() {
    let plain = data(2, 100_000);
    let mut blob = Vec::new();
    for (i, piece) in plain.chunks(30_000).enumerate() {
        let mut encoder = GzBuilder::new()
            .extra(vec![i as u8; 300])
            .filename("a file")
            .comment("a comment")
            .mtime(77)
            .write(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(piece).unwrap();
        blob.extend(encoder.finish().unwrap());
    }
    // FHCRC: CRC-16 of the header, by hand: the bytes of `gzip` with flag 2 and two more bytes.
    let plain_member = gzip(&plain[..100], 6);
    let mut header = plain_member[..10].to_vec();
    header[3] |= 2;
    let mut crc = flate2::Crc::new();
    crc.update(&header);
    blob.extend(&header);
    blob.extend(&(crc.sum() as u16).to_le_bytes());
    blob.extend(&plain_member[10..]);
    let all: Vec<u8> = plain.iter().chain(&plain[..100]).copied().collect();
    let (table, out) = index(&blob, Compression::Gzip, 20_000).unwrap();
    assert!(out == all);
    assert_whole(&table, &blob, &all);
    assert!(table.spans.iter().filter(|s| s.starts_stream).count() >= 3);
}

#[test]
fn trailers_and_what_follows_them_are_checked() {
    let plain = data(3, 50_000);
    let blob = gzip(&plain, 6);
    let n = blob.len();
    for (at, what) in [(n - 8, "check"), (n - 1, "length")] {
        let mut bad = blob.clone();
        bad[at] ^= 1;
        let error = index(&bad, Compression::Gzip, 1 << 20).unwrap_err();
        assert!(matches!(&error, InflateError::Corrupt { detail, .. } if detail.contains(what)), "{error}");
    }
    let mut garbage = blob.clone();
    garbage.extend_from_slice(b"garbage");
    assert!(matches!(index(&garbage, Compression::Gzip, 1 << 20), Err(InflateError::Corrupt { .. })));
    let mut late = blob.clone();
    late.extend_from_slice(&[0, 0, 0, 1]);
    assert!(matches!(index(&late, Compression::Gzip, 1 << 20), Err(InflateError::Corrupt { .. })));
    assert!(matches!(index(b"\0\0\0\0", Compression::Gzip, 1 << 20), Err(InflateError::Corrupt { .. })));
}

#[test]
fn a_blob_that_ends_early_is_truncated() {
    let plain = data(4, 60_000);
    let (gz, zs) = (gzip(&plain, 6), zstd_frames(&plain, 3, 25_000));
    for (compression, blob) in [(Compression::Gzip, &gz), (Compression::Zstd, &zs)] {
        for cut in [0, 1, 5, 12, blob.len() / 2, blob.len() - 1] {
            let error = index(&blob[..cut], compression, 10_000).unwrap_err();
            assert!(matches!(error, InflateError::Truncated { at, .. } if at <= cut as u64), "{cut}: {error}");
        }
        let (table, _) = index(blob, compression, 10_000).unwrap();
        let span = &table.spans[1];
        let some = &blob[span.coff as usize..(span.coff + (span.cend - span.coff) / 2) as usize];
        let error = inflate_span(&table, SpanIx(1), some).unwrap_err();
        assert!(matches!(error, InflateError::Truncated { .. }), "{error}");
    }
}

#[test]
fn a_huge_frame_is_one_run_of_spans() {
    let plain = data(5, 1_000_000);
    let mut blob = zstd_frames(&plain[..300_000], 3, 300_000);
    blob.extend(zstd_frames(&plain[300_000..], 3, 20_000));
    let (table, _) = index(&blob, Compression::Zstd, 50_000).unwrap();
    assert_whole(&table, &blob, &plain);
    let run = run_of(&table, SpanIx(2));
    assert!(run.start == 0 && run.end >= 4, "{run:?}");
    assert!(table.spans[run.start as usize..run.end as usize].iter().all(|s| s.coff == 0));
    let after = run_of(&table, SpanIx(run.end));
    assert_eq!(after, run.end..run.end + 1, "small frames restart by themselves");
}

#[test]
fn a_bomb_is_inflated_in_portions() {
    let plain = vec![0; 3_000_000];
    let blob = zstd::bulk::compress(&plain, 3).unwrap();
    assert!(blob.len() < 1000);
    let (table, _) = index(&blob, Compression::Zstd, 50_000).unwrap();
    let n = table.spans.len() as u32;
    let mut inflater = SpanInflater::new(&table, 0..n).unwrap();
    let (mut input, mut all, mut calls) = (part(&table, 0..n, &blob), 0, 0);
    loop {
        let mut given = 0;
        let more = inflater.push_some(&mut input, 200_000, &mut |_, bytes| given += bytes.len()).unwrap();
        assert!(given <= 300_000, "{given}");
        (all, calls) = (all + given, calls + 1);
        if !more {
            break;
        }
    }
    inflater.finish().unwrap();
    assert!(all == plain.len() && calls >= 10, "{all} bytes in {calls} calls");
}

#[test]
fn a_huge_deflate_block_is_cut_into_short_spans_too() {
    // One block of 16 Ki symbols that stand for 258 zeros each.
    let plain = vec![0; 4_000_000];
    let blob = gzip(&plain, 9);
    let (table, _) = index(&blob, Compression::Gzip, 100_000).unwrap();
    assert_whole(&table, &blob, &plain);
    assert!(table.spans.iter().enumerate().all(|(i, _)| {
        let bounds = table.bounds(SpanIx(i as u32));
        bounds.end - bounds.start <= 200_000
    }));
}

#[test]
fn a_zstd_window_above_128_mib_is_refused_by_name() {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.write_all(&data(6, 100_000)).unwrap();
    let blob = encoder.finish().unwrap();
    let error = index(&blob, Compression::Zstd, 1 << 20).unwrap_err().to_string();
    assert!(error.contains("128 MiB") && error.contains("--long"), "{error}");
}

#[test]
fn padding_and_skippable_frames_belong_to_no_span() {
    let plain = data(7, 10_000);
    let mut gz = gzip(&plain, 6);
    let data_end = gz.len() as u64;
    gz.resize(gz.len() + 5000, 0);
    assert_eq!(index(&gz, Compression::Gzip, 1 << 20).unwrap().0.spans[0].cend, data_end);
    let mut zs = zstd_frames(&plain, 3, usize::MAX);
    let data_end = zs.len() as u64;
    zs.extend(skippable(5000));
    let (table, _) = index(&zs, Compression::Zstd, 1 << 20).unwrap();
    assert_eq!(table.spans[0].cend, data_end);
    assert_whole(&table, &zs, &plain);
}

#[test]
fn thin_windows_are_small_and_do_the_work_of_whole_ones() {
    let plain = data(8, 8 << 20);
    let blob = gzip(&plain, 6);
    let (table, _) = index(&blob, Compression::Gzip, 1 << 20).unwrap();
    let windows: Vec<u32> = table.spans.iter().map(|s| s.window.1).filter(|n| *n > 0).collect();
    assert!(windows.len() >= 6, "{windows:?}");
    let mean = windows.iter().sum::<u32>() / windows.len() as u32;
    assert!(mean < 12 << 10, "{mean} bytes per window");
    for ix in 1..table.spans.len() as u32 {
        let span = &table.spans[ix as usize];
        let compressed = &blob[span.coff as usize..span.cend as usize];
        // The same table with the whole window in it.
        let mut whole = table.clone();
        let packed = window::pack(&plain[span.uoff as usize - window::WINDOW..span.uoff as usize]);
        whole.spans[ix as usize].window = (0, packed.len() as u32);
        whole.windows = packed;
        let want = inflate_span(&whole, SpanIx(ix), compressed).unwrap();
        assert!(inflate_span(&table, SpanIx(ix), compressed).unwrap() == want);
        // And without: the data does refer to it.
        whole.windows.clear();
        whole.spans[ix as usize].window = (0, 0);
        assert!(inflate_span(&whole, SpanIx(ix), compressed).is_err());
    }
}

#[test]
fn references_to_zeros_of_the_window_work() {
    // Zeros, then noise that is repeated from before them, zeros included: the window's referenced bytes are mostly
    // zero.
    let mut noise = Noise(99);
    let mut plain: Vec<u8> = Vec::new();
    for i in 0..60_usize {
        plain.extend((0..3000).map(|_| noise.next() as u8));
        plain.resize(plain.len() + 20_000, 0);
        let from = plain.len() - 25_000.min(plain.len());
        let again: Vec<u8> = plain[from..from + 6000].to_vec();
        plain.extend(&again[..3000 + 50 * i]);
    }
    for level in [1, 6, 9] {
        let blob = gzip_flushed(&plain, level, 4_000, FlushCompress::Sync);
        let (table, _) = index(&blob, Compression::Gzip, 10_000).unwrap();
        assert_whole(&table, &blob, &plain);
    }
}

#[test]
fn a_lying_digest_is_found_and_the_buffer_wiped() {
    let plain = data(9, 100_000);
    let blob = gzip(&plain, 6);
    let (mut table, _) = index(&blob, Compression::Gzip, 20_000).unwrap();
    table.spans[1].digest = Digest::of(b"something else");
    let span = &table.spans[1];
    let mut out = vec![1; table.spans[2].uoff as usize - span.uoff as usize];
    let compressed = &blob[span.coff as usize..span.cend as usize];
    let error = inflate_span_into(&table, SpanIx(1), compressed, &mut out).unwrap_err();
    assert!(matches!(error, InflateError::DigestMismatch { span: 1 }));
    assert!(out.iter().all(|b| *b == 0));
    let mut got = Vec::new();
    let error = inflate_spans(&table, 0..3, part(&table, 0..3, &blob), &mut |ix, _| got.push(ix.0)).unwrap_err();
    assert!(matches!(error, InflateError::DigestMismatch { span: 1 }));
    assert_eq!(got, [0]);
}

#[test]
fn empty_streams_have_empty_tables() {
    for (compression, blob) in [
        (Compression::None, Vec::new()),
        (Compression::Gzip, gzip(&[], 6)),
        (Compression::Zstd, zstd::bulk::compress(&[], 3).unwrap()),
    ] {
        let (table, out) = index(&blob, compression, 1 << 20).unwrap();
        assert!(out.is_empty() && table.spans.is_empty());
        assert_eq!((table.ulen, table.diff_id), (0, Digest(sha2::Sha256::digest([]).into())));
    }
}

#[test]
fn empty_blocks_without_end_keep_memory_flat() {
    // 200,000 empty stored blocks after some data, then a little more: the window stays whole, nothing piles up.
    let head = data(10, 40_000);
    let mut body = Vec::new();
    for piece in head.chunks(60_000) {
        body.push(0);
        body.extend_from_slice(&(piece.len() as u16).to_le_bytes());
        body.extend_from_slice(&(!(piece.len() as u16)).to_le_bytes());
        body.extend_from_slice(piece);
    }
    for _ in 0..200_000 {
        body.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
    }
    body.extend_from_slice(&[1, 4, 0, 0xfb, 0xff]);
    body.extend_from_slice(b"tail");
    let plain: Vec<u8> = head.iter().chain(b"tail").copied().collect();
    let mut blob = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    blob.extend(body);
    let mut crc = flate2::Crc::new();
    crc.update(&plain);
    blob.extend_from_slice(&crc.sum().to_le_bytes());
    blob.extend_from_slice(&(plain.len() as u32).to_le_bytes());
    let (table, out) = index(&blob, Compression::Gzip, 30_000).unwrap();
    assert!(out == plain);
    assert_whole(&table, &blob, &plain);
}

/// A layer as eStargz and zstd:chunked make it: pieces of files, with headers before and between them. The table names the pieces
/// only; `per_stream` of them share a stream. Gives the pieces too.
fn chunked(compression: Compression, per_stream: usize) -> (BlobTable, Vec<u8>, Vec<Vec<u8>>) {
    let pieces: Vec<Vec<u8>> = (0..9).map(|i| data(100 + i, 1000 + 7_919 * i as usize)).collect();
    let press = |plain: &[u8]| match compression {
        Compression::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
        _ => gzip(plain, 6),
    };
    let mut blob = press(&data(1, 512));
    let (mut spans, mut skips, mut uoff) = (Vec::new(), Vec::new(), 0);
    for group in pieces.chunks(per_stream) {
        let coff = blob.len() as u64;
        let mut plain = Vec::new();
        for piece in group {
            if !plain.is_empty() {
                skips.push((spans.len() as u32, plain.len() as u64));
            }
            spans.push(crate::archive::Span {
                uoff,
                coff,
                cend: 0,
                bits: 0,
                starts_stream: true,
                window: (0, 0),
                digest: Digest::of(piece),
            });
            uoff += piece.len() as u64;
            plain.extend(piece);
            plain.extend(data(2, 700));
        }
        blob.extend(press(&plain));
        // A stream that the table knows nothing of.
        blob.extend(press(b"headers"));
        let cend = blob.len() as u64;
        spans.iter_mut().filter(|span| span.coff == coff).for_each(|span| span.cend = cend);
    }
    let table = BlobTable {
        digest: Digest::of(&blob),
        compression,
        clen: blob.len() as u64,
        ulen: uoff,
        diff_id: Digest([0; 32]),
        spans,
        windows: Vec::new(),
        chunks: Some(crate::archive::Chunks { skips }),
    };
    (table, blob, pieces)
}

#[test]
fn chunks_are_read_alone_and_together_past_what_lies_between_them() {
    for (compression, per_stream) in
        [(Compression::Gzip, 1), (Compression::Gzip, 3), (Compression::Zstd, 1), (Compression::Zstd, 4)]
    {
        let (table, blob, pieces) = chunked(compression, per_stream);
        let n = pieces.len() as u32;
        for ix in 0..n {
            let span = &table.spans[ix as usize];
            let alone = inflate_span(&table, SpanIx(ix), &blob[span.coff as usize..span.cend as usize]).unwrap();
            assert!(alone == pieces[ix as usize]);
            for to in ix + 1..=n {
                for step in [1, 1000, usize::MAX] {
                    let mut inflater = SpanInflater::new(&table, ix..to).unwrap();
                    let mut got = Vec::new();
                    for piece in part(&table, ix..to, &blob).chunks(step) {
                        inflater.push(piece, &mut |at, bytes| got.push((at.0, bytes))).unwrap();
                    }
                    inflater.finish().unwrap();
                    let want: Vec<_> = (ix..to).map(|i| (i, pieces[i as usize].clone())).collect();
                    assert!(got == want, "{compression} {per_stream} {ix}..{to}");
                }
            }
        }
    }
}

#[test]
fn a_chunk_that_is_not_what_its_table_says_is_never_handed_on() {
    let (table, blob, _) = chunked(Compression::Gzip, 3);
    let n = table.spans.len() as u32;
    type Edit = fn(&mut BlobTable);
    let edits: &[Edit] = &[
        |t| t.spans[4].digest = Digest([7; 32]),
        |t| t.spans[4].uoff += 1,
        |t| t.chunks.as_mut().unwrap().skips[2].1 += 1,
        |t| t.chunks.as_mut().unwrap().skips[2].1 = 0,
        |t| t.spans[4].coff = 0,
    ];
    for (i, edit) in edits.iter().enumerate() {
        let mut lying = table.clone();
        edit(&mut lying);
        let mut wrong = 0;
        let result = inflate_spans(&lying, 0..n, part(&table, 0..n, &blob), &mut |ix, bytes| {
            wrong += usize::from(Digest::of(&bytes) != table.spans[ix.0 as usize].digest);
        });
        assert!(result.is_err() && wrong == 0, "{i}");
    }
}

#[test]
fn a_whole_stream_is_inflated_up_to_a_limit() {
    let plain = data(11, 300_000);
    for (compression, blob) in
        [(Compression::Gzip, gzip(&plain, 6)), (Compression::Zstd, zstd_frames(&plain, 3, 100_000))]
    {
        assert!(inflate_whole(compression, &blob, plain.len()).unwrap() == plain);
        assert!(inflate_whole(compression, &blob, 1 << 20).unwrap() == plain);
        let error = inflate_whole(compression, &blob, plain.len() - 1).unwrap_err();
        assert!(error.to_string().contains("more than 299999 bytes"), "{error}");
        for cut in [0, 1, 10, blob.len() / 2, blob.len() - 1] {
            let error = inflate_whole(compression, &blob[..cut], 1 << 20).unwrap_err();
            assert!(matches!(error, InflateError::Truncated { .. }), "{compression} {cut}: {error}");
        }
    }
    assert!(inflate_whole(Compression::Gzip, b"no gzip at all", 100).is_err());
}
