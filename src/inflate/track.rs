//! Where the uncompressed bytes of an index run go: into buffers, cut into spans.

use super::digests::Job;
use super::side_work::{BUFFER, SideWork};
use super::{InflateError, MAX_SPAN, Sink};
use crate::archive::{BlobTable, Span};
use crate::units::{Compression, Digest};

/// A place of the compressed blob at which inflating can start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Restart {
    pub(super) coff: u64,
    pub(super) bits: u8,
    pub(super) starts_stream: bool,
    /// Number of its window in the order of [`Job::Window`].
    pub(super) window: Option<usize>,
}

impl Restart {
    /// At a member, a frame, or a stored byte.
    pub(super) fn plain(coff: u64, starts_stream: bool) -> Self {
        Self { coff, bits: 0, starts_stream, window: None }
    }
}

struct Cut {
    uoff: u64,
    cend: u64,
    restart: Restart,
}

/// Collects the output of one run.
pub(super) struct Track {
    /// Aim of uncompressed bytes per span.
    aim: u64,
    /// Uncompressed bytes so far.
    uoff: u64,
    /// Where the open span starts.
    start: u64,
    /// Where inflating must start for the open span.
    restart: Restart,
    /// The open span is not the first of its restart point.
    follows: bool,
    cuts: Vec<Cut>,
    windows: usize,
    /// The buffer being filled, `BUFFER` long, and how far it is.
    buffer: Vec<u8>,
    filled: usize,
    buffer_cuts: Vec<usize>,
    stored: Vec<u8>,
    side: SideWork,
}

impl Track {
    pub(super) fn new(span_size: u64) -> Self {
        // A span may grow to twice the aim before it is cut without a boundary.
        let aim = span_size.clamp(1 << 10, MAX_SPAN / 2);
        let mut track = Self {
            aim,
            uoff: 0,
            start: 0,
            restart: Restart::plain(0, true),
            follows: false,
            cuts: Vec::new(),
            windows: 0,
            buffer: Vec::new(),
            filled: 0,
            buffer_cuts: Vec::new(),
            stored: Vec::new(),
            side: SideWork::start(),
        };
        track.renew();
        track
    }

    fn renew(&mut self) {
        self.buffer = self.side.buffer();
        self.buffer.resize(BUFFER, 0);
        self.filled = 0;
    }

    /// Uncompressed bytes so far.
    pub(super) fn uoff(&self) -> u64 {
        self.uoff
    }

    /// The open span is ready for a cut at the next boundary that costs a window.
    pub(super) fn wants_boundary(&self) -> bool {
        self.follows || self.uoff - self.start >= self.aim
    }

    /// Room for output: ends where the buffer does, and where the open span must be looked at again.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let len = self.uoff - self.start;
        let limit = if self.follows || len < self.aim { self.aim - len } else { 2 * self.aim - len };
        let end = BUFFER.min(self.filled.saturating_add(usize::try_from(limit).unwrap_or(usize::MAX)));
        &mut self.buffer[self.filled..end]
    }

    /// `n` bytes of [`Track::room`] have been written, out of stored bytes up to `at`. A span that has become too long
    /// ends here, boundary or not; the next one then shares its restart point.
    pub(super) fn wrote(&mut self, n: usize, at: u64, sink: Sink<'_>) {
        self.filled += n;
        self.uoff += n as u64;
        let len = self.uoff - self.start;
        if len >= if self.follows { self.aim } else { 2 * self.aim } {
            self.close(at);
        }
        if self.filled == BUFFER {
            self.flush(sink);
            self.renew();
        }
    }

    /// Ends the open span, which needs stored bytes up to `cend`.
    fn close(&mut self, cend: u64) {
        if self.uoff > self.start {
            self.cuts.push(Cut { uoff: self.start, cend, restart: self.restart });
            self.buffer_cuts.push(self.filled);
            self.start = self.uoff;
            self.follows = true;
        }
    }

    /// A restart point that costs nothing (member, frame): cuts if the open span is long enough, or shares another's
    /// restart point. An empty open span moves here.
    pub(super) fn free_boundary(&mut self, restart: Restart) {
        if self.follows || self.uoff - self.start >= self.aim - self.aim / 4 {
            self.close(restart.coff);
        }
        if self.start == self.uoff {
            self.restart = restart;
            self.follows = false;
        }
    }

    /// Cuts at a restart point in the middle of a stream, `at` being the stored bytes taken so far. With a window
    /// (`true`), its [`Job::Window`] must come before the next one's.
    pub(super) fn cut(&mut self, at: u64, bits: u8, has_window: bool) {
        self.close(at);
        let window = has_window.then_some(self.windows);
        self.windows += usize::from(has_window);
        self.restart = Restart { coff: at - u64::from(bits > 0), bits, starts_stream: false, window };
        self.follows = false;
    }

    /// The window announced in [`Track::cut`].
    pub(super) fn window(&mut self, window: Vec<u8>, bits: u8, follows: Vec<u8>) {
        self.side.hand(Job::Window { window, bits, follows });
    }

    /// Hashes bytes of the blob as stored.
    pub(super) fn stored(&mut self, bytes: &[u8]) {
        self.stored.extend_from_slice(bytes);
        if self.stored.len() >= BUFFER {
            let mut next = self.side.buffer();
            next.clear();
            self.side.hand(Job::Stored(std::mem::replace(&mut self.stored, next)));
        }
    }

    fn flush(&mut self, sink: Sink<'_>) {
        if self.filled > 0 {
            sink(&self.buffer[..self.filled]);
        }
        let buffer = std::mem::take(&mut self.buffer);
        let cuts = std::mem::take(&mut self.buffer_cuts);
        self.side.hand(Job::Plain { buffer, len: self.filled, cuts });
        self.filled = 0;
    }

    /// Ends the run: `clen` stored bytes, the first `end` of which the last span needs.
    pub(super) fn finish(
        mut self,
        compression: Compression,
        end: u64,
        clen: u64,
        sink: Sink<'_>,
    ) -> Result<BlobTable, InflateError> {
        self.close(end);
        self.flush(sink);
        if !self.stored.is_empty() {
            self.side.hand(Job::Stored(std::mem::take(&mut self.stored)));
        }
        let failed = |detail: &str| InflateError::Corrupt { compression, at: clen, detail: detail.into() };
        let found = self.side.finish().ok_or_else(|| failed("the hashing thread died"))?;
        if found.spans.len() != self.cuts.len() || found.places.len() != self.windows {
            return Err(failed("spans and digests do not agree"));
        }
        let mut spans = Vec::with_capacity(self.cuts.len());
        for (cut, digest) in self.cuts.iter().zip(found.spans) {
            // Spans of one restart point share one window.
            let window = cut.restart.window.map_or((0, 0), |number| found.places[number]);
            let Restart { coff, bits, starts_stream, .. } = cut.restart;
            spans.push(Span { uoff: cut.uoff, coff, cend: cut.cend, bits, starts_stream, window, digest });
        }
        let digest: Digest = if compression == Compression::None { found.plain } else { found.stored };
        let windows = found.windows;
        Ok(BlobTable { digest, compression, clen, ulen: self.uoff, diff_id: found.plain, spans, windows, chunks: None })
    }
}
