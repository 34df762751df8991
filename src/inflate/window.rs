//! Sparse 32 KiB windows: only the bytes that later data refers to, packed.
//!
//! Deflate data after a checkpoint may copy from the 32 KiB before it, and in practice copies little of that. What it
//! copies is found without a decoder of our own: the next 32 KiB are inflated twice over *marker* windows, in which
//! each position holds a pair of bytes that names it. Where the two outputs differ, they name a position of the
//! window; where they agree, the byte came out of the compressed data itself. All other positions become zero and
//! pack well.

use super::zstream::{Stop, Wrap, ZStream};

/// Deflate's window in bytes (RFC 1951: distances up to 32 768).
pub const WINDOW: usize = 32 << 10;

/// zstd level for windows: small inputs, so a low level costs little and loses little.
const LEVEL: i32 = 3;

/// The pair of markers of window position `i`: always two different bytes, and no other position has the same pair.
fn marker(i: usize) -> (u8, u8) {
    let (low, high) = (i as u8, (i >> 8) as u8 & 127);
    (low, if low == high { high | 128 } else { high })
}

/// The position that a pair of output bytes names; `None` for a byte that is not from the window.
fn position(first: u8, second: u8) -> Option<usize> {
    (first != second).then(|| usize::from(first) | usize::from(second & 127) << 8)
}

/// Finds what deflate data copies from its window. Keeps its buffers between calls.
pub(super) struct Marker {
    stream: ZStream,
    outputs: [Vec<u8>; 2],
}

impl Marker {
    pub(super) fn new() -> Option<Self> {
        Some(Self { stream: ZStream::new(Wrap::Raw)?, outputs: [vec![0; WINDOW], vec![0; WINDOW]] })
    }

    /// Zeroes what the deflate data `compressed` does not refer to. `compressed` starts with the byte that holds the
    /// first `bits` bits and reaches at least 32 KiB of output far, or to the end of its stream. `false`: it is
    /// corrupt and the window is left alone.
    pub(super) fn thin(&mut self, window: &mut [u8], compressed: &[u8], bits: u8) -> bool {
        let mut made = [0; 2];
        for pass in 0..2 {
            let pick = |i| if pass == 0 { marker(i).0 } else { marker(i).1 };
            let markers: Vec<u8> = (0..window.len()).map(pick).collect();
            self.stream.reset(Wrap::Raw);
            let mut input = compressed;
            if bits > 0 {
                let Some((first, rest)) = input.split_first() else { return false };
                self.stream.prime(bits, *first);
                input = rest;
            }
            self.stream.set_window(&markers);
            let output = &mut self.outputs[pass];
            while made[pass] < output.len() {
                match self.stream.inflate(input, &mut output[made[pass]..], false) {
                    Err(_) => return false,
                    Ok(step) => {
                        made[pass] += step.produced;
                        input = &input[step.consumed..];
                        if step.stop == Stop::End || (step.consumed == 0 && step.produced == 0) {
                            break;
                        }
                    }
                }
            }
        }
        if made[0] != made[1] {
            return false;
        }
        let mut keep = vec![false; window.len()];
        let [first, second] = &self.outputs;
        for (a, b) in first.iter().zip(second).take(made[0]) {
            if let Some(kept) = position(*a, *b).and_then(|i| keep.get_mut(i)) {
                *kept = true;
            }
        }
        for (byte, keep) in window.iter_mut().zip(keep) {
            if !keep {
                *byte = 0;
            }
        }
        true
    }
}

/// Packs a window: zeros before its first other byte are dropped (a window is aligned to its end), the rest goes
/// through zstd. Empty for a window of zeros.
pub fn pack(window: &[u8]) -> Vec<u8> {
    let window = &window[window.len().saturating_sub(WINDOW)..];
    match window.iter().position(|b| *b != 0) {
        None => Vec::new(),
        // zstd fails on a buffer of 32 KiB only without memory; then the window rides in a frame of raw blocks.
        Some(at) => zstd::bulk::compress(&window[at..], LEVEL).unwrap_or_else(|_| raw_frame(&window[at..])),
    }
}

/// Unpacks a window to 32 KiB, the zeros before it included: data may well refer to bytes that are zero, and
/// an inflate that has too short a window refuses them. `None` if the bytes are not a packed window. Allocates 64
/// KiB at most.
pub fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; WINDOW];
    if !packed.is_empty() {
        let tail = zstd::bulk::decompress(packed, WINDOW).ok()?;
        out[WINDOW - tail.len()..].copy_from_slice(&tail);
    }
    Some(out)
}

/// A zstd frame with one raw block (RFC 8878): 4 bytes magic, descriptor (single segment, 4-byte size), block header.
fn raw_frame(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 12);
    out.extend_from_slice(&0xFD2F_B528_u32.to_le_bytes());
    out.push(0b1010_0000);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(&((bytes.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    out.extend_from_slice(bytes);
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

    #[test]
    fn packing_is_undone() {
        let mut window = vec![0; WINDOW];
        window[30_000..30_010].copy_from_slice(b"0123456789");
        let packed = pack(&window);
        assert!(packed.len() < 64, "{}", packed.len());
        assert_eq!(unpack(&packed).unwrap(), window);
        assert!(pack(&[0; 100]).is_empty());
        assert_eq!(unpack(&[]).unwrap(), [0; WINDOW]);
        assert_eq!(unpack(&raw_frame(&window)).unwrap(), window);
    }

    #[test]
    fn a_window_that_unpacks_to_more_is_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 10 << 20], 3).unwrap();
        assert!(unpack(&bomb).is_none());
        assert!(unpack(b"no zstd frame").is_none());
    }
}
