//! A gzip or stored blob, made of pieces that bytes pick or bytes themselves, whole or damaged: its index, and what resuming in its
//! middle gives, against another decoder that goes through all of it.

use std::io::{Read as _, Write as _};

use arbitrary::{Result, Unstructured};
use flate2::{Compression as Level, GzBuilder};

use crate::archive::{BlobTable, SeekTable, SpanIx};
use crate::inflate::{Indexer, SpanInflater, compressed_range, inflate_span, inflate_spans, run_of};
use crate::units::{Compression, Digest};

/// Most uncompressed bytes: a little input may inflate to a thousand times as much.
const MAX_PLAIN: usize = 1 << 20;

pub fn run(input: &[u8]) {
    let _ = try_run(&mut Unstructured::new(input));
}

fn try_run(u: &mut Unstructured<'_>) -> Result<()> {
    let how: u8 = u.arbitrary()?;
    let setting = Setting::pick(u)?;
    match how % 8 {
        0 => check(Compression::None, u.bytes(u.len())?, &setting),
        1 => check(Compression::Gzip, u.bytes(u.len())?, &setting),
        more => {
            let mut blob = gzip(u)?;
            if more == 2 {
                damage(&mut blob, u)?;
            }
            check(Compression::Gzip, &blob, &setting);
        }
    }
    Ok(())
}

/// What does not lie in the blob.
#[derive(Debug)]
pub struct Setting {
    span_size: u64,
    /// Bytes pushed at once.
    step: usize,
    /// Picks spans.
    pick: u32,
    /// How the table is damaged before the last try.
    harm: (u8, u32),
}

impl Setting {
    pub fn pick(u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(Self {
            span_size: u64::from(u.arbitrary::<u16>()?) + 1024,
            step: usize::from(u.arbitrary::<u16>()?) + 1,
            pick: u.arbitrary()?,
            harm: (u.arbitrary()?, u.arbitrary()?),
        })
    }
}

/// Flips, cuts or repeats some bytes.
pub fn damage(blob: &mut Vec<u8>, u: &mut Unstructured<'_>) -> Result<()> {
    for _ in 0..u.int_in_range(1..=4)? {
        if blob.is_empty() {
            return Ok(());
        }
        let at = u.choose_index(blob.len())?;
        match u.int_in_range(0..=3)? {
            0 => blob.truncate(at),
            1 => blob.extend_from_within(at..),
            _ => blob[at] = u.arbitrary()?,
        }
    }
    Ok(())
}

/// Some text: noise, runs, and repetitions of what came before.
pub fn text(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut out: Vec<u8> = Vec::new();
    for _ in 0..u.int_in_range(0..=5)? {
        let len = usize::from(u.arbitrary::<u16>()? % (16 << 10));
        match u.int_in_range(0..=3)? {
            0 => out.extend(std::iter::repeat_n(u.arbitrary::<u8>()?, len)),
            1 => {
                let mut state = u.arbitrary::<u32>()? | 1;
                let mask: u8 = u.arbitrary()?;
                out.extend((0..len / 4).map(|_| {
                    state ^= state << 13;
                    state ^= state >> 17;
                    state ^= state << 5;
                    (state >> 8) as u8 & mask
                }));
            }
            2 if !out.is_empty() => {
                let from = u.choose_index(out.len())?;
                let to = (from + len).min(out.len());
                out.extend_from_within(from..to);
            }
            _ => out.extend_from_slice(u.bytes(len.min(u.len()).min(64))?),
        }
    }
    Ok(out)
}

/// Members of any level with any header, flushed anywhere, and zeros behind the last.
fn gzip(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for _ in 0..u.int_in_range(1..=3)? {
        let mut builder = GzBuilder::new();
        let header: u8 = u.arbitrary()?;
        if header & 1 != 0 {
            builder = builder.filename("name");
        }
        if header & 2 != 0 {
            builder = builder.comment("comment").extra(vec![7; usize::from(header)]);
        }
        let mut encoder = builder.write(out, Level::new(u.int_in_range(0..=9)?));
        for _ in 0..u.int_in_range(0..=2)? {
            encoder.write_all(&text(u)?).expect("memory");
            if u.arbitrary()? {
                encoder.flush().expect("memory");
            }
        }
        out = encoder.finish().expect("memory");
    }
    let padding = u.int_in_range(0..=3)? * usize::from(u.arbitrary::<u8>()?);
    out.resize(out.len() + padding, 0);
    Ok(out)
}

/// What the other decoder makes of it; `None` where it has errors.
fn plainly(compression: Compression, blob: &[u8]) -> Option<Vec<u8>> {
    match compression {
        Compression::None => Some(blob.to_vec()),
        Compression::Zstd => ::zstd::stream::decode_all(blob).ok(),
        Compression::Gzip => {
            let (mut out, mut rest) = (Vec::new(), blob);
            // It takes no zeros between or behind members.
            while rest.iter().any(|byte| *byte != 0) {
                flate2::bufread::GzDecoder::new(&mut rest).read_to_end(&mut out).ok()?;
            }
            Some(out)
        }
    }
}

/// Indexes a blob and resumes in its middle.
pub fn check(compression: Compression, blob: &[u8], setting: &Setting) {
    let mut plain = Vec::new();
    let mut indexer = Indexer::new(compression, setting.span_size);
    for piece in blob.chunks(setting.step) {
        if indexer.push(piece, &mut |bytes| plain.extend_from_slice(bytes)).is_err() || plain.len() > MAX_PLAIN {
            return;
        }
    }
    let Ok(table) = indexer.finish(&mut |bytes| plain.extend_from_slice(bytes)) else { return };
    if let Some(theirs) = plainly(compression, blob) {
        assert!(plain == theirs, "{} bytes, the other decoder has {}", plain.len(), theirs.len());
    }
    assert_eq!((table.diff_id, table.digest), (Digest::of(&plain), Digest::of(blob)));
    assert_eq!((table.ulen, table.clen), (plain.len() as u64, blob.len() as u64));
    let tables = SeekTable { blobs: vec![table] };
    assert_eq!(SeekTable::decode(&tables.encode()).ok().as_ref(), Some(&tables), "an index that can't be read back");
    let table = &tables.blobs[0];
    resume(table, blob, &plain, setting);
    harmed(table.clone(), blob, &plain, setting);
}

/// The compressed bytes of some spans.
fn compressed<'b>(table: &BlobTable, blob: &'b [u8], spans: std::ops::Range<u32>) -> &'b [u8] {
    let range = compressed_range(table, spans).expect("a range of our own table");
    &blob[range.start as usize..range.end as usize]
}

fn resume(table: &BlobTable, blob: &[u8], plain: &[u8], setting: &Setting) {
    let count = table.spans.len() as u32;
    let same = |ix: SpanIx, bytes: &[u8]| {
        let bounds = table.bounds(ix);
        assert!(bytes == &plain[bounds.start as usize..bounds.end as usize], "span {} has other bytes", ix.0);
    };
    // All of them in one go, in pieces, handed on one by one.
    let mut inflater = SpanInflater::new(table, 0..count).expect("our own table");
    let mut next = 0;
    let mut sink = |ix: SpanIx, bytes: Vec<u8>| {
        same(ix, &bytes);
        assert_eq!(ix.0, next);
        next += 1;
    };
    for mut piece in compressed(table, blob, 0..count).chunks(setting.step) {
        while inflater.push_some(&mut piece, 1, &mut sink).expect("our own table") {}
    }
    inflater.finish().expect("all spans");
    assert_eq!(next, count);
    if count == 0 {
        return;
    }
    // Some of them alone, and some neighbours.
    for turn in 0..6u32 {
        let ix = setting.pick.rotate_left(turn * 5).wrapping_add(turn) % count;
        let bytes =
            inflate_span(table, SpanIx(ix), compressed(table, blob, ix..ix + 1)).expect("a span of our own table");
        same(SpanIx(ix), &bytes);
        assert!(run_of(table, SpanIx(ix)).contains(&ix));
    }
    let from = setting.pick % count;
    let to = (from + 1 + setting.pick % 3).min(count);
    let mut got = from;
    inflate_spans(table, from..to, compressed(table, blob, from..to), &mut |ix, bytes| {
        same(ix, &bytes);
        assert_eq!(ix.0, got);
        got += 1;
    })
    .expect("spans of our own table");
    assert_eq!(got, to);
}

/// A table that says something wrong of one span makes errors, never other bytes.
fn harmed(mut table: BlobTable, blob: &[u8], plain: &[u8], setting: &Setting) {
    let count = table.spans.len() as u32;
    if count == 0 {
        return;
    }
    let (which, value) = setting.harm;
    let ix = setting.pick % count;
    let bounds = table.bounds(SpanIx(ix));
    let span = &mut table.spans[ix as usize];
    match which % 6 {
        0 => span.coff = u64::from(value) % (span.cend + 1),
        1 => span.bits = value as u8,
        2 => span.starts_stream = !span.starts_stream,
        3 => span.window = (u64::from(value) % 4096, value % 4096),
        4 => span.cend = u64::from(value) % (blob.len() as u64 + 1),
        _ => {
            if let Some(at) = (value as usize).checked_rem(table.windows.len()) {
                table.windows[at] ^= (value >> 24) as u8 | 1;
            }
        }
    }
    let Ok(range) = compressed_range(&table, ix..ix + 1) else { return };
    if let Ok(bytes) = inflate_span(&table, SpanIx(ix), &blob[range.start as usize..range.end as usize]) {
        assert!(bytes == plain[bounds.start as usize..bounds.end as usize], "other bytes were accepted");
    }
}
