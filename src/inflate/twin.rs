//! Two SHA-256 over the same bytes, as one: of the whole stream, and of the part that is under way.
//!
//! A CPU with SHA instructions spends most of a digest waiting for the round before: two digests side by side fill each
//! other's gaps and cost little more than one. Which bytes make a block differs between the two, so it takes rounds of our own,
//! checked against the library's; other CPUs use the library's alone.

use sha2::block_api::compress256;

use crate::units::Digest;

/// A block of SHA-256 in bytes.
const BLOCK: usize = 64;
/// The first 32 bits of the fractional parts of the square roots of the first 8 primes (FIPS 180-4, 5.3.3).
const START: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// Takes bytes blocks of two digests, as many for the one as for the other.
type Compress = fn(&mut [u32; 8], &[[u8; BLOCK]], &mut [u32; 8], &[[u8; BLOCK]]);

/// The two digests.
pub(super) struct Twin {
    whole: Half,
    part: Half,
    compress: Compress,
}

impl Default for Twin {
    fn default() -> Self {
        // Without optimisation each instruction of ours is a call; the library is optimised in every profile.
        let compress = if cfg!(debug_assertions) { None } else { fast() };
        Self { whole: Half::new(), part: Half::new(), compress: compress.unwrap_or(plain) }
    }
}

impl Twin {
    /// Hashes bytes into both.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        let (whole, of_whole) = self.whole.fill(bytes).as_chunks();
        let (part, of_part) = self.part.fill(bytes).as_chunks();
        let both = whole.len().min(part.len());
        let ((whole, more_whole), (part, more_part)) = (whole.split_at(both), part.split_at(both));
        (self.compress)(&mut self.whole.state, whole, &mut self.part.state, part);
        compress256(&mut self.whole.state, more_whole);
        compress256(&mut self.part.state, more_part);
        self.whole.keep(of_whole);
        self.part.keep(of_part);
    }

    /// Ends the part: its digest. The next one begins.
    pub(super) fn cut(&mut self) -> Digest {
        std::mem::replace(&mut self.part, Half::new()).finish()
    }

    /// Of all bytes.
    pub(super) fn finish(self) -> Digest {
        self.whole.finish()
    }
}

/// One digest under way.
struct Half {
    state: [u32; 8],
    /// Bytes so far.
    len: u64,
    /// The first `len % BLOCK` bytes of the next block.
    partial: [u8; BLOCK],
}

impl Half {
    fn new() -> Self {
        Self { state: START, len: 0, partial: [0; BLOCK] }
    }

    fn held(&self) -> usize {
        (self.len % BLOCK as u64) as usize
    }

    /// Completes the block that was begun; the bytes after it, none where it is still not complete.
    fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let held = self.held();
        self.len += bytes.len() as u64;
        if held == 0 {
            return bytes;
        }
        let (head, rest) = bytes.split_at(bytes.len().min(BLOCK - held));
        self.partial[held..held + head.len()].copy_from_slice(head);
        if held + head.len() == BLOCK {
            compress256(&mut self.state, &[self.partial]);
        }
        rest
    }

    /// Begins a block with what no whole one could be made of.
    fn keep(&mut self, rest: &[u8]) {
        self.partial[..rest.len()].copy_from_slice(rest);
    }

    /// Pads (FIPS 180-4, 5.1.1): one bit, zeros, the length in bits.
    fn finish(mut self) -> Digest {
        let held = self.held();
        let mut last = [[0; BLOCK]; 2];
        last[0][..held].copy_from_slice(&self.partial[..held]);
        last[0][held] = 0x80;
        let used = if held < BLOCK - 8 { 1 } else { 2 };
        last[used - 1][BLOCK - 8..].copy_from_slice(&(self.len * 8).to_be_bytes());
        compress256(&mut self.state, &last[..used]);
        let mut out = [0; 32];
        for (bytes, word) in out.chunks_exact_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        Digest(out)
    }
}

/// The library's rounds, one digest after the other.
fn plain(a: &mut [u32; 8], of_a: &[[u8; BLOCK]], b: &mut [u32; 8], of_b: &[[u8; BLOCK]]) {
    compress256(a, of_a);
    compress256(b, of_b);
}

/// Ours, where this CPU has the instructions.
fn fast() -> Option<Compress> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1") && is_x86_feature_detected!("ssse3") {
        // SAFETY: the CPU has just been seen to have every feature that the function is compiled for.
        return Some(|a, of_a, b, of_b| unsafe { x86::compress(a, of_a, b, of_b) });
    }
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::BLOCK;

    /// The first 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2).
    const K: [u32; 64] = [
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
        0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
        0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
        0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
        0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
        0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
        0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2,
    ];

    /// The working variables as the instructions want them: ABEF and CDGH.
    type State = (__m128i, __m128i);
    /// The last 16 words of a message schedule, four to a vector.
    type Words = [__m128i; 4];

    /// Steps both digests through their blocks, round by round in turn.
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    pub(super) fn compress(a: &mut [u32; 8], of_a: &[[u8; BLOCK]], b: &mut [u32; 8], of_b: &[[u8; BLOCK]]) {
        let (mut x, mut y) = (load(a), load(b));
        for (block_x, block_y) in of_a.iter().zip(of_b) {
            let (before_x, before_y) = (x, y);
            let (mut w, mut v) = (words(block_x), words(block_y));
            let ([first, more @ ..], []) = K.as_chunks::<16>() else { return };
            rounds::<0>(&mut x, &mut y, &w, &v, first);
            rounds::<1>(&mut x, &mut y, &w, &v, first);
            rounds::<2>(&mut x, &mut y, &w, &v, first);
            rounds::<3>(&mut x, &mut y, &w, &v, first);
            // Every index is a constant, so that the words stay in registers: from memory, each waits for its own store.
            for k in more {
                schedule::<0>(&mut w, &mut v);
                rounds::<0>(&mut x, &mut y, &w, &v, k);
                schedule::<1>(&mut w, &mut v);
                rounds::<1>(&mut x, &mut y, &w, &v, k);
                schedule::<2>(&mut w, &mut v);
                rounds::<2>(&mut x, &mut y, &w, &v, k);
                schedule::<3>(&mut w, &mut v);
                rounds::<3>(&mut x, &mut y, &w, &v, k);
            }
            x = (_mm_add_epi32(x.0, before_x.0), _mm_add_epi32(x.1, before_x.1));
            y = (_mm_add_epi32(y.0, before_y.0), _mm_add_epi32(y.1, before_y.1));
        }
        (*a, *b) = (store(x), store(y));
    }

    /// Four rounds of each: numbers `4 * N` and on of sixteen.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn rounds<const N: usize>(x: &mut State, y: &mut State, w: &Words, v: &Words, k: &[u32; 16]) {
        let k = four_words(k[4 * N], k[4 * N + 1], k[4 * N + 2], k[4 * N + 3]);
        let (w, v) = (_mm_add_epi32(w[N], k), _mm_add_epi32(v[N], k));
        x.1 = _mm_sha256rnds2_epu32(x.1, x.0, w);
        y.1 = _mm_sha256rnds2_epu32(y.1, y.0, v);
        x.0 = _mm_sha256rnds2_epu32(x.0, x.1, _mm_shuffle_epi32(w, 0x0E));
        y.0 = _mm_sha256rnds2_epu32(y.0, y.1, _mm_shuffle_epi32(v, 0x0E));
    }

    /// The next four words of both message schedules, in place of the oldest.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn schedule<const N: usize>(w: &mut Words, v: &mut Words) {
        for words in [w, v] {
            let (a, b, c, d) = (words[N], words[(N + 1) % 4], words[(N + 2) % 4], words[(N + 3) % 4]);
            let sum = _mm_add_epi32(_mm_sha256msg1_epu32(a, b), _mm_alignr_epi8(d, c, 4));
            words[N] = _mm_sha256msg2_epu32(sum, d);
        }
    }

    /// The 16 words of a block, which are big-endian.
    #[inline]
    #[target_feature(enable = "sse2,ssse3")]
    fn words(block: &[u8; BLOCK]) -> Words {
        let (pairs, _) = block.as_chunks::<8>();
        [
            two_pairs(pairs[0], pairs[1]),
            two_pairs(pairs[2], pairs[3]),
            two_pairs(pairs[4], pairs[5]),
            two_pairs(pairs[6], pairs[7]),
        ]
    }

    #[inline]
    #[target_feature(enable = "sse2,ssse3")]
    fn two_pairs(low: [u8; 8], high: [u8; 8]) -> __m128i {
        let swap = _mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203);
        _mm_shuffle_epi8(_mm_set_epi64x(i64::from_le_bytes(high), i64::from_le_bytes(low)), swap)
    }

    /// The lowest first.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn four_words(a: u32, b: u32, c: u32, d: u32) -> __m128i {
        _mm_set_epi32(d as i32, c as i32, b as i32, a as i32)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn load(s: &[u32; 8]) -> State {
        (four_words(s[5], s[4], s[1], s[0]), four_words(s[7], s[6], s[3], s[2]))
    }

    #[inline]
    #[target_feature(enable = "sse4.1")]
    fn store((abef, cdgh): State) -> [u32; 8] {
        macro_rules! word {
            ($v:ident, $i:literal) => {
                _mm_extract_epi32($v, $i) as u32
            };
        }
        [
            word!(abef, 3),
            word!(abef, 2),
            word!(cdgh, 3),
            word!(cdgh, 2),
            word!(abef, 1),
            word!(abef, 0),
            word!(cdgh, 1),
            word!(cdgh, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bytes: &[u8], pieces: &[usize], cuts: &[bool], compress: Compress) {
        let mut twin = Twin { compress, ..Twin::default() };
        let (mut rest, mut from, mut at) = (bytes, 0, 0);
        for (piece, cut) in pieces.iter().zip(cuts.iter().cycle()) {
            let (head, tail) = rest.split_at((*piece).min(rest.len()));
            twin.update(head);
            at += head.len();
            rest = tail;
            if *cut {
                assert_eq!(twin.cut(), Digest::of(&bytes[from..at]));
                from = at;
            }
        }
        twin.update(rest);
        assert_eq!(twin.cut(), Digest::of(&bytes[from..]));
        assert_eq!(twin.finish(), Digest::of(bytes));
    }

    #[test]
    fn every_length_around_a_block_is_padded_right() {
        let bytes: Vec<u8> = (0..200).map(|i| i as u8).collect();
        for compress in [Some(plain as Compress), fast()].into_iter().flatten() {
            for len in 0..200 {
                check(&bytes[..len], &[len / 3, len / 2], &[true], compress);
            }
        }
    }

    proptest! {
        #[test]
        fn both_digests_are_those_of_the_library(
            bytes in prop::collection::vec(any::<u8>(), 0..4000),
            pieces in prop::collection::vec(0..700_usize, 0..12),
            cuts in prop::collection::vec(any::<bool>(), 1..12),
        ) {
            for compress in [Some(plain as Compress), fast()].into_iter().flatten() {
                check(&bytes, &pieces, &cuts, compress);
            }
        }
    }
}
