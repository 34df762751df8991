//! Sparse 32 KiB windows: only the bytes that later data refers to, packed.
//!
//! Deflate data after a checkpoint may copy from the 32 KiB before it, and in practice copies little of that. What it
//! copies is found without a decoder of our own: the next 32 KiB are inflated twice over *marker* windows, in which
//! each position holds a pair of bytes that names it. Where the two outputs differ, they name a position of the
//! window; where they agree, the byte came out of the compressed data itself. No other position is kept.
//!
//! Windows are packed several at a time (`Packer::pack`): neighbours share words, and their positions and their bytes each
//! have statistics of their own. A *group* of n windows is
//!
//! ```text
//! n bytes   n-1 .. 0: how many bytes like this one follow. A window's place is its byte, its end that of the group
//! varint    length of frame 1
//! frame 1   zstd: n, then per window the number of runs and per run: bytes left out before it, its length - 1; all varints
//! frame 2   zstd: the bytes of all runs, one window after the other
//! ```
//!
//! Runs ascend from the window's start. A window alone may also be a zstd frame of its last bytes (it begins with zstd's
//! magic number, whose first byte is no count): so earlier archives have it.

use super::zstream::{Stop, Wrap, ZStream};

/// Deflate's window in bytes (RFC 1951: distances up to 32 768).
pub const WINDOW: usize = 32 << 10;

/// Windows in one group: reading one costs unpacking them all.
pub(super) const GROUP: usize = 16;
/// Windows in a group that is read: fewer than the first byte of zstd's magic number, which tells a window alone.
const GROUP_MAX: usize = 32;
/// zstd level: windows take at most 0.4 % more than at level 12, and less than half of its time.
const LEVEL: i32 = 8;
/// Gaps that are kept, since telling a run costs more than their bytes.
const GAP: usize = 3;

/// The pair of markers of window position `i`: always two different bytes, and no other position has the same pair.
fn marker(i: usize) -> (u8, u8) {
    let (low, high) = (i as u8, (i >> 8) as u8 & 127);
    (low, if low == high { high | 128 } else { high })
}

/// The position that a pair of output bytes names; `None` for a byte that is not from the window.
fn position(first: u8, second: u8) -> Option<usize> {
    (first != second).then(|| usize::from(first) | usize::from(second & 127) << 8)
}

/// What later data refers to of a window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    /// Start and end, ascending, never adjacent; positions count in a window of [`WINDOW`] bytes.
    runs: Vec<(u16, u16)>,
    bytes: Vec<u8>,
}

impl Sparse {
    /// Of a window (aligned to its end where it is shorter than [`WINDOW`]) with a mark per byte that is needed.
    fn new(window: &[u8], needed: &[bool]) -> Self {
        let window = &window[window.len().saturating_sub(WINDOW)..];
        let skipped = WINDOW - window.len();
        let mut out = Self::default();
        let mut at = 0;
        let next = |from: usize, want: bool| {
            needed[from..].iter().position(|needed| *needed == want).map_or(needed.len(), |n| from + n)
        };
        loop {
            let start = next(at, true);
            if start >= window.len() {
                return out;
            }
            let mut end = next(start, false);
            loop {
                let more = next(end, true);
                if more >= window.len() || more - end > GAP {
                    break;
                }
                end = next(more, false);
            }
            out.runs.push(((skipped + start) as u16, (skipped + end - 1) as u16));
            out.bytes.extend_from_slice(&window[start..end]);
            at = end;
        }
    }

    /// All of a window, for where it is not known what is needed of it.
    pub(super) fn whole(window: &[u8]) -> Self {
        Self::new(window, &vec![true; window.len().min(WINDOW)])
    }

    /// Later data refers to nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// Finds what deflate data copies from its window. Keeps its buffers between calls.
pub(super) struct Marker {
    stream: ZStream,
    markers: [Vec<u8>; 2],
    outputs: [Vec<u8>; 2],
    needed: Vec<bool>,
}

impl Marker {
    pub(super) fn new() -> Option<Self> {
        Some(Self {
            stream: ZStream::new(Wrap::Raw)?,
            markers: [(0..WINDOW).map(|i| marker(i).0).collect(), (0..WINDOW).map(|i| marker(i).1).collect()],
            outputs: [vec![0; WINDOW], vec![0; WINDOW]],
            needed: vec![false; WINDOW],
        })
    }

    /// What the deflate data `compressed` refers to of `window`. `compressed` starts with the byte that holds the first
    /// `bits` bits and reaches at least 32 KiB of output far, or to the end of its stream. `None`: it is corrupt.
    pub(super) fn thin(&mut self, window: &[u8], compressed: &[u8], bits: u8) -> Option<Sparse> {
        let window = &window[window.len().saturating_sub(WINDOW)..];
        let mut made = [0; 2];
        for pass in 0..2 {
            self.stream.reset(Wrap::Raw);
            let mut input = compressed;
            if bits > 0 {
                let (first, rest) = input.split_first()?;
                self.stream.prime(bits, *first);
                input = rest;
            }
            self.stream.set_window(&self.markers[pass][..window.len()]);
            let output = &mut self.outputs[pass];
            while made[pass] < output.len() {
                let step = self.stream.inflate(input, &mut output[made[pass]..], false).ok()?;
                made[pass] += step.produced;
                input = &input[step.consumed..];
                if step.stop == Stop::End || (step.consumed == 0 && step.produced == 0) {
                    break;
                }
            }
        }
        if made[0] != made[1] {
            return None;
        }
        self.needed.fill(false);
        let [first, second] = &self.outputs;
        for (a, b) in first.iter().zip(second).take(made[0]) {
            if let Some(needed) = position(*a, *b).and_then(|i| self.needed.get_mut(i)) {
                *needed = true;
            }
        }
        Some(Sparse::new(window, &self.needed[..window.len()]))
    }
}

fn varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn read_varint(from: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for shift in [0, 7, 14, 21] {
        let (byte, rest) = from.split_first()?;
        *from = rest;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Packs windows. Keeps its compressor between calls.
pub(super) struct Packer {
    compressor: Option<zstd::bulk::Compressor<'static>>,
}

impl Packer {
    pub(super) fn new() -> Self {
        Self { compressor: zstd::bulk::Compressor::new(LEVEL).ok() }
    }

    /// A group. The place of window k in it is from byte k to its end.
    pub(super) fn pack(&mut self, windows: &[Sparse]) -> Vec<u8> {
        let (mut runs, mut bytes) = (Vec::new(), Vec::new());
        varint(&mut runs, windows.len());
        for window in windows {
            varint(&mut runs, window.runs.len());
            let mut before = 0;
            for (first, last) in &window.runs {
                varint(&mut runs, usize::from(*first) - before);
                varint(&mut runs, usize::from(last - first));
                before = usize::from(*last) + 1;
            }
            bytes.extend_from_slice(&window.bytes);
        }
        let mut out: Vec<u8> = (0..windows.len()).rev().map(|following| following as u8).collect();
        let runs = self.frame(&runs);
        varint(&mut out, runs.len());
        out.extend_from_slice(&runs);
        out.extend_from_slice(&self.frame(&bytes));
        out
    }

    fn frame(&mut self, bytes: &[u8]) -> Vec<u8> {
        // zstd fails on so little only without memory; then the bytes ride in raw blocks.
        self.compressor.as_mut().and_then(|zstd| zstd.compress(bytes).ok()).unwrap_or_else(|| raw_frame(bytes))
    }
}

/// Unpacks a window to 32 KiB, what is left out as zeros: data may well refer to bytes that are zero, and an inflate that has
/// too short a window refuses them. `packed`: its place in a group; a window alone; or nothing, a window of zeros. `None` if it
/// is none of these. Allocates 8 MiB at most.
pub fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; WINDOW];
    match packed.first() {
        None => {}
        Some(following) if usize::from(*following) < GROUP_MAX => {
            let following = usize::from(*following);
            unpack_group(packed.get(following + 1..)?, following, &mut out)?;
        }
        Some(_) => {
            let tail = zstd::bulk::decompress(packed, WINDOW).ok()?;
            out[WINDOW - tail.len()..].copy_from_slice(&tail);
        }
    }
    Some(out)
}

/// The window after which `following` more come.
fn unpack_group(mut group: &[u8], following: usize, out: &mut [u8]) -> Option<()> {
    let length = read_varint(&mut group)?;
    let (runs, bytes) = group.split_at_checked(length)?;
    // A run and the gap before it are two bytes or more of a window, and six bytes at most here.
    let runs = unframe(runs, GROUP_MAX * WINDOW * 3)?;
    let mut runs = runs.as_slice();
    let windows = read_varint(&mut runs).filter(|windows| *windows <= GROUP_MAX)?;
    let wanted = windows.checked_sub(following + 1)?;
    let bytes = unframe(bytes, windows * WINDOW)?;
    let mut bytes = bytes.as_slice();
    for window in 0..=wanted {
        let mut at = 0;
        for _ in 0..read_varint(&mut runs)? {
            at += read_varint(&mut runs)?;
            let end = at + read_varint(&mut runs)? + 1;
            let (run, rest) = bytes.split_at_checked(end - at)?;
            bytes = rest;
            let place = out.get_mut(at..end)?;
            if window == wanted {
                place.copy_from_slice(run);
            }
            at = end;
        }
    }
    Some(())
}

/// Unpacks a frame that says its length, up to `limit`.
fn unframe(frame: &[u8], limit: usize) -> Option<Vec<u8>> {
    let length = zstd_safe::get_frame_content_size(frame).ok()??;
    let length = usize::try_from(length).ok().filter(|length| *length <= limit)?;
    zstd::bulk::decompress(frame, length).ok()
}

/// A zstd frame of raw blocks (RFC 8878): 4 bytes magic, descriptor (single segment, 4-byte size), then blocks, each with 3 bytes before it.
fn raw_frame(bytes: &[u8]) -> Vec<u8> {
    /// Longest block of any frame.
    const BLOCK: usize = 128 << 10;
    let mut out = Vec::with_capacity(bytes.len() + 32);
    out.extend_from_slice(&0xFD2F_B528_u32.to_le_bytes());
    out.push(0b1010_0000);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    let blocks = bytes.len().div_ceil(BLOCK).max(1);
    for at in 0..blocks {
        let block = &bytes[at * BLOCK..bytes.len().min((at + 1) * BLOCK)];
        let last = u32::from(at + 1 == blocks);
        out.extend_from_slice(&((block.len() as u32) << 3 | last).to_le_bytes()[..3]);
        out.extend_from_slice(block);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_marker_names_its_position() {
        for i in 0..WINDOW {
            let (a, b) = marker(i);
            assert_eq!(position(a, b), Some(i));
        }
        assert!((0..=255).all(|b| position(b, b).is_none()), "a literal names no position");
    }

    /// Windows of different lengths, and what must come out.
    fn windows() -> Vec<(Sparse, Vec<u8>)> {
        let mut out = Vec::new();
        for (len, every) in [(WINDOW, 1000), (WINDOW, 7), (WINDOW, 1), (5000, 40), (1, 1), (WINDOW, WINDOW)] {
            let window: Vec<u8> = (0..len).map(|i| ((i * i) >> 5) as u8 | 1).collect();
            let needed: Vec<bool> = (0..len).map(|i| i % every < every.div_ceil(2)).collect();
            let mut want = vec![0; WINDOW];
            let kept = window.iter().zip(&needed).map(|(byte, needed)| if *needed { *byte } else { 0 });
            want[WINDOW - len..].iter_mut().zip(kept).for_each(|(to, byte)| *to = byte);
            out.push((Sparse::new(&window, &needed), want));
        }
        out.push((Sparse::whole(&[7; WINDOW + 3]), vec![7; WINDOW]));
        out
    }

    #[test]
    fn a_group_gives_each_window_back() {
        let (sparse, want): (Vec<_>, Vec<_>) = windows().into_iter().unzip();
        for packer in [Packer::new(), Packer { compressor: None }] {
            let mut packer = packer;
            let packed = packer.pack(&sparse);
            for (nth, want) in want.iter().enumerate() {
                let got = unpack(&packed[nth..]).unwrap();
                for (at, (got, want)) in got.iter().zip(want).enumerate() {
                    // Short gaps are kept with what is around them.
                    assert!(got == want || (*want == 0 && GAP > 0), "window {nth}, byte {at}");
                }
            }
            for len in 0..packed.len() {
                // A part is refused or is another, smaller thing, but nothing panics.
                let _ = unpack(&packed[..len]);
            }
        }
    }

    #[test]
    fn only_what_is_needed_is_kept() {
        let needed: Vec<bool> = (0..WINDOW).map(|i| (30_000..30_010).contains(&i)).collect();
        let sparse = Sparse::new(&vec![b'x'; WINDOW], &needed);
        assert_eq!((sparse.runs.as_slice(), sparse.bytes.len()), (&[(30_000, 30_009)][..], 10));
        assert!(Sparse::new(&[1; 100], &[false; 100]).is_empty());
        assert_eq!(unpack(&[]).unwrap(), [0; WINDOW]);
    }

    #[test]
    fn a_window_alone_is_read_as_earlier_archives_have_it() {
        let mut window = vec![0; WINDOW];
        window[30_000..30_010].copy_from_slice(b"0123456789");
        for packed in [zstd::bulk::compress(&window[30_000..], 3).unwrap(), raw_frame(&window[30_000..])] {
            assert_eq!(unpack(&packed).unwrap(), window);
        }
    }

    #[test]
    fn windows_that_unpack_to_more_are_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 10 << 20], 3).unwrap();
        assert!(unpack(&bomb).is_none());
        let mut group = vec![0];
        varint(&mut group, bomb.len());
        group.extend_from_slice(&bomb);
        group.extend_from_slice(&bomb);
        assert!(unpack(&group).is_none());
        assert!(unpack(b"no zstd frame").is_none());
        assert!(unpack(&[0, 0xff, 0xff, 0xff, 0xff, 0xff]).is_none());
    }
}
