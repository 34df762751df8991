//! Tables of contents (eStargz, zstd:chunked, tar-split). Of layers that bytes pick, as the formats' writers make them: a true table gives
//! every file its bytes. Changed ones, and any bytes as each of the formats' parts: no panic, memory by what comes in, chunks that
//! follow each other within the layer, entries that merge.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};

use arbitrary::{Result, Unstructured};
use base64::Engine as _;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::memory::bounded;
use super::merge::archive;
use super::{tar_walk, testing};
use crate::archive::{BlobIx, BlobTable, SeekTable, SpanIx};
use crate::build::merge::Merger;
use crate::build::tar::{EntryKind, TarEntry};
use crate::build::toc::{Contents, TocError, entries, estargz, tar_split, zstd_chunked};
use crate::inflate::{compressed_range, inflate_span, inflate_spans, run_of};
use crate::units::{Compression, Digest};

/// Most bytes that a table inflates to, and a chunk with what comes before it.
const MAX_PLAIN: u64 = 1 << 20;
const PREFIX: &str = "io.github.containers.zstd-chunked.";
/// RFC 8878, 3.1.2: a skippable frame's magic number.
const SKIPPABLE: u32 = 0x184D_2A50;

pub fn run(input: &[u8]) {
    let Some((how, bytes)) = input.split_first() else { return };
    match how % 8 {
        0 => table(bytes),
        1 => lines(bytes),
        2 => estargz_layer(bytes),
        3 => zstd_layer(bytes),
        _ => drop(made(&mut Unstructured::new(bytes))),
    }
}

/// Any bytes as the JSON of both formats.
fn table(bytes: &[u8]) {
    const END: u64 = 1 << 40;
    if let Ok(contents) = bounded(bytes.len(), || entries::parse(bytes, END)) {
        check(&contents, Compression::Gzip, END, None);
    }
}

/// Any bytes as tar-split data.
fn lines(bytes: &[u8]) {
    let Ok(entries) = bounded(bytes.len(), || tar_split::parse(bytes)) else { return };
    entries.iter().for_each(|entry| tar_walk::check(entry, i64::MAX as u64));
    let mut contents = Contents { entries: entries.clone(), ..Contents::default() };
    match tar_split::refine(&mut contents, bytes) {
        Ok(()) => assert_eq!(contents.entries, entries),
        Err(error) => assert!(entries.iter().any(|entry| entry.extents.is_some()), "{error}"),
    }
}

/// Any bytes as a whole layer in eStargz, whose table the manifest vouches for.
fn estargz_layer(layer: &[u8]) {
    let size = layer.len() as u64;
    let Ok(footer) = estargz::footer(layer, size) else { return };
    assert!(footer.toc < footer.start && footer.start < size);
    let member = &layer[footer.toc as usize..footer.start as usize];
    let Some(plain) = plain_len(member) else { return };
    let open = |digest| bounded(member.len() + plain, || estargz::open(member, footer, &digest));
    let Err(TocError::Digest { found, .. }) = open(Digest([0; 32])) else { return };
    let Ok((mut contents, (entry, chunk))) = open(found) else { return };
    check(&contents, Compression::Gzip, size, Some(layer));
    let stream = estargz::last_stream(&contents, footer).expect("a short layer has no long stream");
    let stream = &layer[stream.start as usize..stream.end as usize];
    let Some(plain) = plain_len(stream) else { return };
    if let Ok(true) = bounded(stream.len() + plain, || estargz::is_in_the_tar(&contents, stream)) {
        contents.push(entry, chunk);
        check(&contents, Compression::Gzip, size, Some(layer));
    }
}

/// Bytes that some gzip members inflate to, as another decoder has it, up to an error; `None`: too many to go on with.
fn plain_len(members: &[u8]) -> Option<usize> {
    let mut plain = Vec::new();
    // What it has until an error is there all the same.
    let _ = MultiGzDecoder::new(members).take(MAX_PLAIN).read_to_end(&mut plain);
    Some(plain.len()).filter(|len| (*len as u64) < MAX_PLAIN)
}

/// `name=value` lines of annotations, an empty one, and any bytes as the layer. The digests are the manifest's to give: they are right.
fn zstd_layer(bytes: &[u8]) {
    let Some(end) = bytes.windows(2).position(|two| two == b"\n\n") else { return };
    let (head, layer) = (String::from_utf8_lossy(&bytes[..end]), &bytes[end + 2..]);
    let mut annotations: BTreeMap<String, String> = head
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (format!("{PREFIX}{name}"), value.to_owned()))
        .collect();
    annotations.entry(format!("{PREFIX}manifest-checksum")).or_insert_with(|| Digest([0; 32]).to_string());
    let size = layer.len() as u64;
    let Some(Ok(mut positions)) = zstd_chunked::positions(&annotations, size) else { return };
    let at = |piece: zstd_chunked::Piece| &layer[piece.range().start as usize..piece.range().end as usize];
    let split = positions.tar_split.map(at);
    positions.digest = Digest::of(at(positions.table));
    positions.tar_split_digest = split.map(Digest::of);
    let plain = positions.table.plain + positions.tar_split.map_or(0, |piece| piece.plain);
    if plain > MAX_PLAIN {
        return;
    }
    let open = || zstd_chunked::open(&positions, at(positions.table), split);
    if let Ok(contents) = bounded(layer.len() + plain as usize, open) {
        check(&contents, Compression::Zstd, size, Some(layer));
    }
}

/// What every table that is accepted holds to. `size`: the layer's length; `layer`: its bytes, where there are any.
fn check(contents: &Contents, compression: Compression, size: u64, layer: Option<&[u8]>) {
    let total = contents.chunks.iter().map(|chunk| chunk.len).sum();
    let mut end = 0;
    for entry in &contents.entries {
        tar_walk::check(entry, total);
        if entry.kind == EntryKind::File && entry.size > 0 {
            assert_eq!(entry.offset, end, "the chunks are those of the files, back to back");
            end += entry.size;
        }
    }
    assert_eq!(end, total);
    let table = contents.table(Digest([1; 32]), compression, size, Digest([2; 32])).expect("a span table");
    let tables = SeekTable { blobs: vec![table] };
    assert_eq!(
        SeekTable::decode(&tables.encode()).ok().as_ref(),
        Some(&tables),
        "a span table that can't be read back"
    );
    let table = &tables.blobs[0];
    for (ix, chunk) in (0..).zip(&contents.chunks) {
        let range = compressed_range(table, ix..ix + 1).expect("a chunk's place");
        assert!(range.start < range.end && range.end <= size);
        assert!(run_of(table, SpanIx(ix)).contains(&ix));
        if let Some(layer) = layer.filter(|_| chunk.skip + chunk.len <= MAX_PLAIN)
            && let Ok(bytes) = inflate_span(table, SpanIx(ix), &layer[range.start as usize..range.end as usize])
        {
            assert_eq!(Digest::of(&bytes), chunk.digest);
        }
    }
    // As two layers of one image.
    let mut merger = Merger::new();
    if (0..2).all(|layer| merger.apply(BlobIx(layer), contents.entries.clone()).is_ok()) {
        let mut names = Vec::new();
        merger.finish("", &mut |path, entry| names.push((path, entry)));
        archive(&names, 2);
    }
}

/// A layer that bytes pick, and its table, which may then be changed.
fn made(u: &mut Unstructured<'_>) -> Result<()> {
    let compression = if u.arbitrary()? { Compression::Zstd } else { Compression::Gzip };
    let mut layer = Layer::new(compression);
    for number in 0..u.int_in_range(0..=6)? {
        layer.add(u, number)?;
    }
    let closed = u.arbitrary()?;
    if closed {
        layer.write(&[0; 1024]);
    }
    layer.cut();
    let mut table = json!({"version": 1, "entries": layer.table});
    let changes = u.int_in_range(0..=2)?;
    for _ in 0..changes {
        change(u, &mut table)?;
    }
    let contents = match compression {
        Compression::Zstd => {
            let split = u.arbitrary()?;
            layer.end_as_zstd(table, split)
        }
        _ => layer.end_as_estargz(&table, closed, changes == 0),
    };
    match contents {
        Ok(contents) => {
            check(&contents, compression, layer.out.len() as u64, Some(&layer.out));
            if changes == 0 {
                layer.check(&contents, compression);
            }
        }
        Err(error) => assert!(changes > 0 || layer.is_refused(&error), "{error}"),
    }
    Ok(())
}

/// Changes a field of some entry.
fn change(u: &mut Unstructured<'_>, table: &mut Value) -> Result<()> {
    const FIELDS: &[&str] = &[
        "size",
        "offset",
        "endOffset",
        "innerOffset",
        "chunkOffset",
        "chunkSize",
        "mode",
        "uid",
        "devMajor",
        "name",
        "linkName",
        "type",
        "digest",
        "chunkDigest",
        "modtime",
        "xattrs",
    ];
    const TEXTS: &[&str] = &[
        "",
        "0",
        "chunk",
        "reg",
        "dir",
        "hardlink",
        "a/../b",
        "/0",
        ".wh.0",
        ".wh..wh..opq",
        "1969-12-31T23:59:59.5Z",
        "sha256:0000000000000000000000000000000000000000000000000000000000000000",
    ];
    let Some(entries) = table["entries"].as_array_mut().filter(|entries| !entries.is_empty()) else { return Ok(()) };
    let at = u.choose_index(entries.len())?;
    let field = *u.choose(FIELDS)?;
    entries[at][field] = match u.int_in_range(0..=4)? {
        0 => u.arbitrary::<i64>()?.into(),
        1 => u.int_in_range(0..=2000)?.into(),
        2 => (entries[at][field].as_i64().unwrap_or(0) + u.int_in_range(-2..=2)?).into(),
        3 => json!({"user.k": "dg=="}),
        _ => (*u.choose(TEXTS)?).into(),
    };
    Ok(())
}

/// A layer in the making.
struct Layer {
    compression: Compression,
    /// Its bytes so far, and those of the member or frame that is still open, uncompressed.
    out: Vec<u8>,
    open: Vec<u8>,
    /// Entries of the table.
    table: Vec<Value>,
    /// tar-split data, and what of the tar is not in it yet.
    split: Vec<u8>,
    segment: Vec<u8>,
    /// What the files hold.
    files: BTreeMap<Vec<u8>, Vec<u8>>,
    /// A name is not what JSON makes of it.
    lossy: bool,
}

impl Layer {
    fn new(compression: Compression) -> Self {
        let (out, open, table, split, segment) = Default::default();
        Self { compression, out, open, table, split, segment, files: BTreeMap::new(), lossy: false }
    }

    fn compress(&self, bytes: &[u8]) -> Vec<u8> {
        if self.compression == Compression::Zstd {
            return ::zstd::bulk::compress(bytes, 1).expect("memory");
        }
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory")
    }

    /// Ends the member or frame.
    fn cut(&mut self) {
        if !self.open.is_empty() {
            let open = std::mem::take(&mut self.open);
            let stored = self.compress(&open);
            self.out.extend_from_slice(&stored);
        }
    }

    /// Bytes of the tar that are no file's.
    fn write(&mut self, bytes: &[u8]) {
        self.open.extend_from_slice(bytes);
        self.segment.extend_from_slice(bytes);
    }

    fn end_segment(&mut self) {
        let payload = base64::engine::general_purpose::STANDARD.encode(std::mem::take(&mut self.segment));
        writeln!(self.split, "{}", json!({"type": 2, "payload": payload})).expect("memory");
    }

    /// An entry of the tar and of the table. No two have the same name.
    fn add(&mut self, u: &mut Unstructured<'_>, number: usize) -> Result<()> {
        let odd: &[u8] = u.choose(&[&b""[..], b"", "ä".as_bytes(), b"\"\\\n", "\u{fffd}".as_bytes(), b"\xff"])?;
        let dir: &[u8] = if u.arbitrary()? { b"d/" } else { b"" };
        let name = [dir, number.to_string().as_bytes(), odd].concat();
        let json_name = String::from_utf8_lossy(&name).into_owned();
        self.lossy |= json_name.contains('\u{fffd}');
        let pick = u.int_in_range(0..=9)?;
        let first = self.files.keys().next().filter(|_| pick == 7).cloned();
        let (kind, word) = match pick {
            5 => (b'5', "dir"),
            6 => (b'2', "symlink"),
            7 if first.is_some() => (b'1', "hardlink"),
            8 => (b'6', "fifo"),
            9 => (b'3', "char"),
            _ => (b'0', "reg"),
        };
        let mut header = testing::Header::new(kind, &name);
        header.uid = u.int_in_range(0..=2)?;
        let time = "2023-11-14T22:13:20Z";
        let mut entry =
            json!({"type": word, "name": json_name, "mode": header.mode, "uid": header.uid, "modtime": time});
        let mut data = Vec::new();
        match kind {
            b'0' => {
                let (len, byte) = (u.int_in_range(0..=600)?, u.arbitrary::<u8>()?);
                data = (0..len).map(|at| (at as u8).wrapping_mul(byte)).collect();
            }
            b'1' | b'2' => {
                header.link = first.unwrap_or_else(|| b"../target".to_vec());
                entry["linkName"] = String::from_utf8_lossy(&header.link).into();
            }
            b'3' => {
                header.major = 1;
                entry["devMajor"] = 1.into();
            }
            _ => {}
        }
        header.size = data.len() as u64;
        self.write(&header.block());
        if kind == b'0' {
            entry["size"] = header.size.into();
            entry["digest"] = Digest::of(&data).to_string().into();
            self.files.insert(name, data.clone());
        }
        if data.is_empty() {
            self.table.push(entry);
            return Ok(());
        }
        let chunk_size = *u.choose(&[data.len(), data.len(), 250, 100])?;
        let single = chunk_size >= data.len();
        for (ix, chunk) in data.chunks(chunk_size).enumerate() {
            if u.ratio(3, 4)? {
                self.cut();
            }
            if ix > 0 {
                entry = json!({"type": "chunk", "name": json_name, "chunkOffset": ix * chunk_size});
            }
            entry["offset"] = self.out.len().into();
            if !self.open.is_empty() {
                entry["innerOffset"] = self.open.len().into();
            }
            if !single {
                entry["chunkSize"] = chunk.len().into();
                entry["chunkDigest"] = Digest::of(chunk).to_string().into();
            }
            self.table.push(std::mem::take(&mut entry));
            self.open.extend_from_slice(chunk);
        }
        self.end_segment();
        writeln!(self.split, "{}", json!({"type": 1, "size": data.len(), "payload": "AAAAAAAAAAA="})).expect("memory");
        let padding = data.len().wrapping_neg() % 512;
        self.write(&[0; 512][..padding]);
        Ok(())
    }

    fn end_as_estargz(
        &mut self,
        table: &Value,
        closed: bool,
        is_true: bool,
    ) -> std::result::Result<Contents, TocError> {
        let json = table.to_string().into_bytes();
        let toc = self.out.len() as u64;
        let member = self.compress(&testing::Tar::new().file("stargz.index.json", &json).end());
        self.out.extend_from_slice(&member);
        let start = self.out.len() as u64;
        self.out.extend_from_slice(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
        self.out.extend_from_slice(format!("{toc:016x}STARGZ").as_bytes());
        self.out.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        let footer = estargz::footer(&self.out, self.out.len() as u64)?;
        assert_eq!((footer.toc, footer.start), (toc, start));
        let (mut contents, (entry, chunk)) =
            bounded(member.len() + 3 * json.len(), || estargz::open(&member, footer, &Digest::of(&json)))?;
        let stream = estargz::last_stream(&contents, footer)?;
        let is_in = estargz::is_in_the_tar(&contents, &self.out[stream.start as usize..stream.end as usize])?;
        assert!(!is_true || is_in != closed, "whether the tar goes on up to the table");
        if is_in {
            self.files.insert(entry.path.to_vec(), json);
            contents.push(entry, chunk);
        }
        Ok(contents)
    }

    fn end_as_zstd(&mut self, mut table: Value, with_split: bool) -> std::result::Result<Contents, TocError> {
        self.end_segment();
        let lines = std::mem::take(&mut self.split);
        let split = self.compress(&lines);
        let mut annotations = BTreeMap::new();
        let mut annotate = |name: &str, value: String| annotations.insert(format!("{PREFIX}{name}"), value);
        if with_split {
            table["tarSplitDigest"] = Digest::of(&split).to_string().into();
        }
        let json = table.to_string().into_bytes();
        let stored = self.compress(&json);
        for (name, bytes, plain, kind) in [("tarsplit", &split, &lines, ""), ("manifest", &stored, &json, ":1")]
            .into_iter()
            .skip(usize::from(!with_split))
        {
            self.out.extend_from_slice(&SKIPPABLE.to_le_bytes());
            self.out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            let position = format!("{}:{}:{}{kind}", self.out.len(), bytes.len(), plain.len());
            annotate(&format!("{name}-position"), position);
            self.out.extend_from_slice(bytes);
        }
        annotate("manifest-checksum", Digest::of(&stored).to_string());
        self.lossy &= !with_split;
        let positions = zstd_chunked::positions(&annotations, self.out.len() as u64).expect("its annotations")?;
        bounded(self.out.len() + lines.len() + json.len(), || {
            zstd_chunked::open(&positions, &stored, with_split.then_some(&split[..]))
        })
    }

    /// A true table that can't be used: names that JSON can't hold, and a layer of nothing but a table.
    fn is_refused(&self, error: &TocError) -> bool {
        match error {
            TocError::Lacking(_) => self.lossy,
            _ => self.table.is_empty(),
        }
    }

    /// Every file has its bytes, one by one and in one go.
    fn check(&self, contents: &Contents, compression: Compression) {
        let files: Vec<&TarEntry> = contents.entries.iter().filter(|entry| entry.kind == EntryKind::File).collect();
        assert_eq!(files.len(), self.files.len());
        let size = self.out.len() as u64;
        let table = contents.table(Digest([1; 32]), compression, size, Digest([2; 32])).expect("a span table");
        let count = table.spans.len() as u32;
        let (mut alone, mut in_one_go) = (Vec::new(), Vec::new());
        for ix in 0..count {
            alone.extend(inflate_span(&table, SpanIx(ix), self.stored(&table, ix..ix + 1)).expect("a true chunk"));
        }
        inflate_spans(&table, 0..count, self.stored(&table, 0..count), &mut |_, bytes| in_one_go.extend(bytes))
            .expect("true chunks");
        assert!(alone == in_one_go, "chunks are others in one go");
        for file in files {
            let bytes = &alone[file.offset as usize..][..file.size as usize];
            assert!(self.files[&*file.path] == bytes, "{file:?} has other bytes");
        }
        let mut merger = Merger::new();
        merger.apply(BlobIx(0), contents.entries.clone()).expect("a true layer merges");
    }

    fn stored(&self, table: &BlobTable, spans: std::ops::Range<u32>) -> &[u8] {
        let range = compressed_range(table, spans).expect("true chunks");
        &self.out[range.start as usize..range.end as usize]
    }
}
