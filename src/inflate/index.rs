//! The walk over a whole compressed blob that leaves its table.

use super::track::{Restart, Track};
use super::window::WINDOW;
use super::zstream::{Stop, Wrap, ZStream};
use super::{InflateError, zstd_frame};
use crate::archive::BlobTable;
use crate::units::Compression;

/// Deflate data that is kept to thin one window. 32 KiB of output need little more than 32 KiB of input, unless
/// somebody strings empty blocks together: then the window stays whole.
const FOLLOWS_MAX: usize = 4 * WINDOW;

/// Walks a compressed blob once: uncompressed bytes out, table at the end. Memory is flat in the blob's length but for
/// the table (about 100 bytes and a window of one or two KiB per span).
///
/// Hashes run on a thread of their own while there are more CPUs than indexers; the bytes themselves are made on the caller's.
/// After an error the indexer is of no use any more.
pub struct Indexer {
    compression: Compression,
    format: Format,
    track: Track,
    /// Stored bytes taken so far.
    at: u64,
}

enum Format {
    None {
        aim: u64,
    },
    Gzip(Box<Gzip>),
    Zstd(Box<Zstd>),
    /// A decoder could not be made; said at the first push.
    Failed(&'static str),
}

impl Indexer {
    /// `span_size`: aim of uncompressed bytes per span, 1 KiB to 32 MiB (others are taken as the nearest). A span ends
    /// at the first block, member or frame boundary after that; where none comes within twice that much, spans
    /// are cut all the same and share one restart point (see [`super::run_of`]).
    pub fn new(compression: Compression, span_size: u64) -> Self {
        let format = match compression {
            Compression::None => Format::None { aim: span_size.clamp(1 << 10, super::MAX_SPAN / 2) },
            Compression::Gzip => match ZStream::new(Wrap::Gzip) {
                Some(stream) => Format::Gzip(Box::new(Gzip {
                    stream,
                    state: GzipState::Between,
                    members: 0,
                    end: 0,
                    last: 0,
                    thinning: None,
                })),
                None => Format::Failed("no memory for a decoder"),
            },
            Compression::Zstd => match zstd_frame::decoder() {
                Some(decoder) => Format::Zstd(Box::new(Zstd { decoder, in_frame: false, frames: 0, end: (0, 0) })),
                None => Format::Failed("no memory for a decoder"),
            },
        };
        Self { compression, format, track: Track::new(span_size), at: 0 }
    }

    /// Feeds compressed bytes, in pieces of any size; `sink` gets the uncompressed ones in order, some of them later.
    pub fn push(&mut self, input: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<(), InflateError> {
        if self.compression != Compression::None {
            self.track.stored(input);
        }
        let mut walk = Walk { compression: self.compression, track: &mut self.track, at: &mut self.at, input, sink };
        match &mut self.format {
            Format::None { aim } => walk.stored(*aim),
            Format::Gzip(gzip) => gzip.push(&mut walk),
            Format::Zstd(zstd) => zstd.push(&mut walk),
            Format::Failed(detail) => Err(walk.corrupt(*detail)),
        }
    }

    /// Ends the stream: checks that it is whole and gives the table (SHA-256 of both sides included).
    pub fn finish(self, sink: &mut dyn FnMut(&[u8])) -> Result<BlobTable, InflateError> {
        let (whole, end) = match &self.format {
            Format::None { .. } => (true, self.at),
            Format::Gzip(gzip) => (gzip.members > 0 && gzip.state != GzipState::Member, gzip.end),
            Format::Zstd(zstd) => (zstd.frames > 0 && !zstd.in_frame, zstd.end.0),
            Format::Failed(_) => (false, self.at),
        };
        if !whole {
            return Err(InflateError::Truncated { compression: self.compression, at: self.at });
        }
        // What follows the last data (padding, skippable frames) belongs to no span.
        self.track.finish(self.compression, end, self.at, sink)
    }
}

/// One push.
struct Walk<'a> {
    compression: Compression,
    track: &'a mut Track,
    at: &'a mut u64,
    input: &'a [u8],
    sink: &'a mut dyn FnMut(&[u8]),
}

impl Walk<'_> {
    fn corrupt(&self, detail: impl Into<String>) -> InflateError {
        InflateError::Corrupt { compression: self.compression, at: *self.at, detail: detail.into() }
    }

    fn take(&mut self, n: usize) {
        self.input = &self.input[n..];
        *self.at += n as u64;
    }

    fn wrote(&mut self, n: usize) {
        self.track.wrote(n, *self.at, self.sink);
    }

    /// Bytes that are stored as they are: spans of a fixed size.
    fn stored(&mut self, aim: u64) -> Result<(), InflateError> {
        while !self.input.is_empty() {
            if self.at.is_multiple_of(aim) {
                self.track.cut(*self.at, 0, false);
            }
            let room = self.track.room();
            let n = room.len().min(self.input.len());
            room[..n].copy_from_slice(&self.input[..n]);
            self.take(n);
            self.wrote(n);
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GzipState {
    /// Before a member: at the start, or after another one.
    Between,
    Member,
    /// After the last member only zeros may come (tape and block devices pad so).
    Padding,
}

struct Gzip {
    stream: ZStream,
    state: GzipState,
    members: u64,
    /// Where the last member ended.
    end: u64,
    /// The last byte taken.
    last: u8,
    thinning: Option<Thinning>,
}

/// A window whose following data is being collected.
struct Thinning {
    window: Vec<u8>,
    bits: u8,
    follows: Vec<u8>,
    /// Uncompressed offset from which on nothing refers to the window.
    until: u64,
}

impl Gzip {
    fn push(&mut self, walk: &mut Walk<'_>) -> Result<(), InflateError> {
        loop {
            match self.state {
                GzipState::Between => match walk.input.first() {
                    None => return Ok(()),
                    Some(0) if self.members > 0 => self.state = GzipState::Padding,
                    Some(0x1f) => {
                        self.stream.reset(Wrap::Gzip);
                        self.members += 1;
                        walk.track.free_boundary(Restart::plain(*walk.at, true));
                        self.state = GzipState::Member;
                    }
                    Some(_) if self.members > 0 => {
                        return Err(walk.corrupt("neither a gzip member nor zeros follow the last one"));
                    }
                    Some(_) => return Err(walk.corrupt("no gzip header")),
                },
                GzipState::Padding => {
                    if let Some(n) = walk.input.iter().position(|b| *b != 0) {
                        walk.take(n);
                        return Err(walk.corrupt("other bytes follow the zeros after the last gzip member"));
                    }
                    walk.take(walk.input.len());
                    return Ok(());
                }
                GzipState::Member => {
                    if !self.step(walk)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// One call of inflate; `false`: all input is used up.
    fn step(&mut self, walk: &mut Walk<'_>) -> Result<bool, InflateError> {
        let at_block = walk.track.wants_boundary();
        let until = self.thinning.as_ref().map_or(u64::MAX, |t| t.until - walk.track.uoff());
        let room = walk.track.room();
        let limit = room.len().min(usize::try_from(until).unwrap_or(usize::MAX));
        let step = match self.stream.inflate(walk.input, &mut room[..limit], at_block) {
            Ok(step) => step,
            Err(detail) => return Err(walk.corrupt(detail)),
        };
        let taken = &walk.input[..step.consumed];
        if let Some(last) = taken.last() {
            self.last = *last;
        }
        if let Some(thinning) = &mut self.thinning {
            thinning.follows.extend_from_slice(taken);
        }
        walk.take(step.consumed);
        walk.wrote(step.produced);
        if let Some(thinning) = self
            .thinning
            .take_if(|t| step.stop == Stop::End || walk.track.uoff() >= t.until || t.follows.len() > FOLLOWS_MAX)
        {
            let Thinning { mut window, bits, mut follows, until } = thinning;
            if follows.len() > FOLLOWS_MAX {
                follows.clear();
            }
            // The stream ended right here: no span will start at this place.
            if walk.track.uoff() == until - WINDOW as u64 {
                window.clear();
            }
            walk.track.window(window, bits, follows);
        }
        match step.stop {
            Stop::End => {
                self.state = GzipState::Between;
                self.end = *walk.at;
                Ok(true)
            }
            Stop::Block { bits } if walk.track.wants_boundary() => {
                self.checkpoint(walk, bits);
                Ok(true)
            }
            // With the output full there may be more of it, even without input.
            _ if step.produced == limit => Ok(true),
            _ if walk.input.is_empty() => Ok(false),
            _ if step.consumed == 0 && step.produced == 0 && step.stop == Stop::More => {
                Err(walk.corrupt("the decoder is stuck"))
            }
            _ => Ok(true),
        }
    }

    fn checkpoint(&mut self, walk: &mut Walk<'_>, bits: u8) {
        let window = self.stream.window();
        // The window before this one is still collecting (spans of less than 32 KiB): it stays whole.
        if let Some(open) = self.thinning.take() {
            walk.track.window(open.window, open.bits, Vec::new());
        }
        walk.track.cut(*walk.at, bits, !window.is_empty());
        if !window.is_empty() {
            let until = walk.track.uoff() + WINDOW as u64;
            let mut follows = Vec::with_capacity(WINDOW);
            if bits > 0 {
                follows.push(self.last);
            }
            self.thinning = Some(Thinning { window, bits, follows, until });
        }
    }
}

struct Zstd {
    decoder: zstd_safe::DCtx<'static>,
    in_frame: bool,
    frames: u64,
    /// Stored and uncompressed bytes where the last frame with data in it ended.
    end: (u64, u64),
}

impl Zstd {
    fn push(&mut self, walk: &mut Walk<'_>) -> Result<(), InflateError> {
        loop {
            if !self.in_frame {
                if walk.input.is_empty() {
                    return Ok(());
                }
                walk.track.free_boundary(Restart::plain(*walk.at, true));
                (self.in_frame, self.frames) = (true, self.frames + 1);
            }
            let room = walk.track.room();
            let limit = room.len();
            let step = match zstd_frame::step(&mut self.decoder, walk.input, room) {
                Ok(step) => step,
                Err(detail) => return Err(walk.corrupt(detail)),
            };
            walk.take(step.consumed);
            // Until all output of a frame is out, the decoder leaves the last byte that it has used in the input.
            walk.track.wrote(step.produced, *walk.at + u64::from(!step.ended), walk.sink);
            if step.ended {
                self.in_frame = false;
                if walk.track.uoff() > self.end.1 {
                    self.end = (*walk.at, walk.track.uoff());
                }
            } else if step.produced < limit && walk.input.is_empty() {
                return Ok(());
            } else if step.consumed == 0 && step.produced == 0 {
                return Err(walk.corrupt("the decoder is stuck"));
            }
        }
    }
}
