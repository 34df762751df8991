//! Every way in which layers are compressed in the field, made by the tools that do it: indexed, every byte verified through its
//! spans, and extracted, which reads through the library. The oracle is the tar itself, uncompressed.

mod common;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clip_csi::units::{Compression, Digest};
use common::layers::{self, Layer, Stored};
use common::skip::{self, installed, needs, skipped};
use common::tree::{Facts, assert_same, walk};

fn clip_csi(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(args).output().unwrap()
}

fn ok(output: Output, what: &str) -> Output {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Runs a filter over bytes.
fn pipe(command: &str, input: &[u8]) -> Vec<u8> {
    let mut words = command.split(' ');
    let mut child = Command::new(words.next().unwrap());
    let mut child = child.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, bytes) = (child.stdin.take().unwrap(), input.to_vec());
    let feeder = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = ok(child.wait_with_output().unwrap(), command);
    feeder.join().unwrap().unwrap();
    output.stdout
}

/// A tar of some MiB: text, noise, zeros, small files.
fn tar() -> Vec<u8> {
    let mut layer = Layer::new(Compression::None)
        .dir("d", 0o755)
        .file("d/text", &layers::text_like(1, 3 << 20))
        .file("d/noise", &common::noise(2 << 20, 7))
        .file("d/zeros", &vec![0; 3 << 20])
        .symlink("link", "d/text");
    for i in 0..50 {
        layer = layer.file(&format!("d/small-{i}"), &layers::text_like(i, 2000));
    }
    layer.into_tar()
}

struct Place {
    dir: tempfile::TempDir,
    tar: Vec<u8>,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), tar: tar() }
    }

    fn text(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A one-layer image; the command that indexes it to the text that is returned too.
    fn index(&self, name: &str, media_type: &str, bytes: Vec<u8>) -> (Output, String) {
        let (media_type, diff_id) = (media_type.to_owned(), Digest::of(&self.tar));
        let annotations = serde_json::json!({});
        layers::write_stored(Path::new(&self.text(name)), [Stored { media_type, bytes, diff_id, annotations }]);
        let archive = self.text(&format!("{name}.clip"));
        (clip_csi(&["index", &format!("oci:{}:latest", self.text(name)), "-o", &archive]), archive)
    }

    /// What the library shows of an image with this layer.
    fn shown(&self, name: &str, media_type: &str, bytes: Vec<u8>) -> BTreeMap<PathBuf, Facts> {
        let (indexed, archive) = self.index(name, media_type, bytes);
        ok(indexed, name);
        ok(clip_csi(&["verify", "--data", &archive]), name);
        let copy = self.text(&format!("{name}-copy"));
        ok(clip_csi(&["extract", &archive, &copy]), name);
        let mut shown = walk(Path::new(&copy));
        shown.get_mut(Path::new("")).unwrap().mtime = (0, 0);
        std::fs::remove_dir_all(copy).unwrap();
        shown
    }

    /// The tar as GNU tar unpacks it.
    fn oracle(&self) -> BTreeMap<PathBuf, Facts> {
        let (file, dir) = (self.text("layer.tar"), self.text("oracle"));
        std::fs::write(&file, &self.tar).unwrap();
        std::fs::create_dir(&dir).unwrap();
        ok(Command::new("tar").args(["--delay-directory-restore", "-xpf", &file, "-C", &dir]).output().unwrap(), "tar");
        let mut tree = walk(Path::new(&dir));
        let root = tree.get_mut(Path::new("")).unwrap();
        (root.mtime, root.mode) = ((0, 0), 0o755);
        tree
    }
}

/// The tar in zstd frames of 256 KiB, closed by the table of zstd's seekable format: a skippable frame of the compressed and
/// uncompressed length of each frame, their number, no checksums, and the format's magic number.
fn seekable(tar: &[u8]) -> Vec<u8> {
    let (mut out, mut table) = (Vec::new(), Vec::new());
    for piece in tar.chunks(256 << 10) {
        let frame = zstd::bulk::compress(piece, 3).unwrap();
        table.extend([frame.len() as u32, piece.len() as u32].iter().flat_map(|n| n.to_le_bytes()));
        out.extend(frame);
    }
    let count = (table.len() / 8) as u32;
    table.extend(count.to_le_bytes());
    table.push(0);
    table.extend(0x8F92_EAB1_u32.to_le_bytes());
    out.extend(0x184D_2A5E_u32.to_le_bytes());
    out.extend((table.len() as u32).to_le_bytes());
    out.extend(table);
    out
}

fn skippable(bytes: &[u8]) -> Vec<u8> {
    [&0x184D_2A53_u32.to_le_bytes()[..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
const DOCKER_PLAIN: &str = "application/vnd.docker.image.rootfs.diff.tar";

#[test]
fn what_each_compressor_writes_shows_the_same_tree() {
    needs!("tar", "gzip");
    let place = Place::new();
    let oracle = place.oracle();
    for command in [
        "gzip -1",
        "gzip -9",
        "gzip --rsyncable",
        "pigz -6 -p 4",
        "pigz --rsyncable",
        "pigz -0",
        "pigz --independent --blocksize 128",
        "zstd -3",
        "zstd --ultra -20 --long=27",
        "zstd --rsyncable",
        "zstd --no-check",
        "pzstd -p 4",
    ] {
        let program = command.split(' ').next().unwrap();
        if !installed(program) {
            skipped(&format!("compression: {command}"), &format!("{program} is not installed"));
            continue;
        }
        let media_type = if program.ends_with("zstd") { ZSTD } else { GZIP };
        let shown = place.shown(&command.replace([' ', '-', '='], "_"), media_type, pipe(command, &place.tar));
        assert_same(&shown, &oracle);
    }
}

#[test]
fn members_frames_and_padding_put_together_show_the_same_tree() {
    needs!("tar", "gzip", "zstd");
    let place = Place::new();
    let oracle = place.oracle();
    let each = |command: &str, len: usize| -> Vec<u8> {
        place.tar.chunks(len).flat_map(|piece| pipe(command, piece)).collect()
    };
    let padded = |mut bytes: Vec<u8>, to: usize| {
        bytes.resize(bytes.len().next_multiple_of(to), 0);
        bytes
    };
    let whole = pipe("zstd -3", &place.tar);
    for (what, media_type, bytes) in [
        ("members", GZIP, each("gzip -6", 1 << 20)),
        ("members_and_an_empty_one", GZIP, [each("gzip -6", 5 << 20), pipe("gzip", b"")].concat()),
        ("padding", GZIP, padded(pipe("gzip -6", &place.tar), 64 << 10)),
        ("members_and_padding", GZIP, padded(each("gzip -6", 3 << 20), 10_240)),
        ("frames", ZSTD, each("zstd -3", 1 << 20)),
        ("seekable", ZSTD, seekable(&place.tar)),
        ("skippable_around", ZSTD, [&skippable(b"before")[..], &whole, &skippable(&[0; 70_000])].concat()),
        ("uncompressed", PLAIN, place.tar.clone()),
    ] {
        assert_same(&place.shown(what, media_type, bytes), &oracle);
    }
}

#[test]
fn the_bytes_decide_whatever_the_media_type_says() {
    needs!("tar", "gzip", "zstd");
    let place = Place::new();
    let oracle = place.oracle();
    let stored = [pipe("gzip -1", &place.tar), pipe("zstd -1", &place.tar), place.tar.clone()];
    let types = [[GZIP, DOCKER_GZIP], [ZSTD, DOCKER_ZSTD], [PLAIN, DOCKER_PLAIN]];
    for (i, bytes) in stored.iter().enumerate() {
        for (j, media_type) in types.iter().flatten().enumerate() {
            // All that are right, and of the wrong ones a turn each.
            if j / 2 == i || j == (2 * i + 3) % 6 {
                let shown = place.shown(&format!("{i}-{j}"), media_type, bytes.clone());
                assert_same(&shown, &oracle);
            }
        }
    }
}

/// gzip(1) ignores garbage with a warning, Go's gzip refuses it, and zeros too. We take zeros, which carry nothing, as tapes pad; other
/// bytes are refused wherever the tar ended: a layer that nobody else can unpack is more likely damaged than meant so.
#[test]
fn garbage_behind_the_compressed_data_is_refused_by_name() {
    needs!("gzip", "zstd");
    let place = Place::new();
    let gzip = pipe("gzip -6", &place.tar);
    for (what, media_type, bytes, says) in [
        ("garbage", GZIP, [&gzip[..], b"garbage"].concat(), "follow the last one"),
        ("late", GZIP, [&gzip[..], &[0; 600], b"garbage"].concat(), "after the last gzip member"),
        ("cut_member", GZIP, [&gzip[..], &gzip[..gzip.len() / 2]].concat(), "truncated gzip data"),
        ("zstd", ZSTD, [&pipe("zstd -1", &place.tar)[..], b"garbage"].concat(), "unknown frame"),
    ] {
        let (output, archive) = place.index(what, media_type, bytes);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(says) && error.contains("layer sha256:"), "{what}: {error}");
        assert!(!Path::new(&archive).exists());
    }
}
