//! The side work of indexing: SHA-256 of both sides and of every span, and thin windows. Nothing waits for its results, so
//! that it can be done elsewhere ([`super::side_work`]).

use sha2::{Digest as _, Sha256};

use super::twin::Twin;
use super::window::{GROUP, Marker, Packer, Sparse};
use crate::units::Digest;

/// A piece of side work, in stream order.
pub(super) enum Job {
    /// Bytes of the blob as stored.
    Stored(Vec<u8>),
    /// Uncompressed bytes: the first `len` of `buffer`, with the offsets in it at which spans end.
    Plain { buffer: Vec<u8>, len: usize, cuts: Vec<usize> },
    /// The next window (empty: nothing was made from it), with the deflate data after it (empty: too long, so the window
    /// stays whole).
    Window { window: Vec<u8>, bits: u8, follows: Vec<u8> },
}

/// What the side work found.
pub(super) struct Digests {
    /// Of the blob as stored; of nothing where no [`Job::Stored`] came.
    pub(super) stored: Digest,
    /// Of the uncompressed blob.
    pub(super) plain: Digest,
    /// Of each span.
    pub(super) spans: Vec<Digest>,
    /// Packed windows, and where each lies, in the order they came; length 0: nothing is needed of it.
    pub(super) windows: Vec<u8>,
    pub(super) places: Vec<(u64, u32)>,
}

/// Does the jobs, in the order in which they come.
#[derive(Default)]
pub(super) struct Digester {
    stored: Sha256,
    /// Of the uncompressed blob, and of the open span.
    plain: Twin,
    spans: Vec<Digest>,
    windows: Windows,
}

impl Digester {
    /// Does the job and gives its buffer back.
    pub(super) fn run(&mut self, job: Job) -> Option<Vec<u8>> {
        match job {
            Job::Stored(buffer) => {
                self.stored.update(&buffer);
                Some(buffer)
            }
            Job::Plain { buffer, len, cuts } => {
                let mut from = 0;
                for cut in cuts {
                    self.plain.update(&buffer[from..cut]);
                    self.spans.push(self.plain.cut());
                    from = cut;
                }
                self.plain.update(&buffer[from..len]);
                Some(buffer)
            }
            Job::Window { window, bits, follows } => {
                self.windows.add(&window, bits, &follows);
                None
            }
        }
    }

    /// After the last job.
    pub(super) fn finish(mut self) -> Digests {
        self.windows.close();
        Digests {
            stored: Digest(self.stored.finalize().into()),
            plain: self.plain.finish(),
            spans: self.spans,
            windows: self.windows.packed,
            places: self.windows.places,
        }
    }
}

/// Thins windows and packs them in groups.
#[derive(Default)]
struct Windows {
    tools: Option<(Marker, Packer)>,
    /// The open group: windows, and their numbers in `places`.
    group: Vec<Sparse>,
    numbers: Vec<usize>,
    packed: Vec<u8>,
    places: Vec<(u64, u32)>,
}

impl Windows {
    fn add(&mut self, window: &[u8], bits: u8, follows: &[u8]) {
        let number = self.places.len();
        self.places.push((0, 0));
        if self.tools.is_none() {
            self.tools = Marker::new().map(|marker| (marker, Packer::new()));
        }
        // A window that can't be thinned stays whole: larger, never wrong.
        let thin = match &mut self.tools {
            Some((marker, _)) if !follows.is_empty() => marker.thin(window, follows, bits),
            _ => None,
        };
        let sparse = thin.unwrap_or_else(|| Sparse::whole(window));
        if !sparse.is_empty() {
            self.group.push(sparse);
            self.numbers.push(number);
        }
        if self.group.len() == GROUP {
            self.close();
        }
    }

    fn close(&mut self) {
        if self.group.is_empty() {
            return;
        }
        let packed = match &mut self.tools {
            Some((_, packer)) => packer.pack(&self.group),
            None => Packer::new().pack(&self.group),
        };
        for (nth, number) in self.numbers.drain(..).enumerate() {
            self.places[number] = ((self.packed.len() + nth) as u64, (packed.len() - nth) as u32);
        }
        self.packed.extend_from_slice(&packed);
        self.group.clear();
    }
}
