//! The side work of indexing: SHA-256 of both sides and of every span, and thin windows.
//!
//! All of it follows the bytes and nothing waits for it, so it runs on a thread beside inflate, over a bounded queue.
//! On a single CPU, or where no thread can be had, it runs inline.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use sha2::{Digest as _, Sha256};

use super::window::{self, Marker};
use crate::units::Digest;

/// Bytes per buffer: small enough for the second-level cache, which inflate and both hashes share.
pub(super) const BUFFER: usize = 256 << 10;
/// Buffers in the queue: with [`BUFFER`], what one indexer holds beside its table.
const QUEUE: usize = 8;

/// A piece of side work, in stream order.
pub(super) enum Job {
    /// Bytes of the blob as stored.
    Stored(Vec<u8>),
    /// Uncompressed bytes: the first `len` of `buffer`, with the offsets in it at which spans end.
    Plain { buffer: Vec<u8>, len: usize, cuts: Vec<usize> },
    /// The next window, with the deflate data after it (empty: too long, so the window stays whole).
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
    /// Packed windows in the order they came.
    pub(super) windows: Vec<Vec<u8>>,
}

#[derive(Default)]
struct Digester {
    stored: Sha256,
    plain: Sha256,
    span: Sha256,
    spans: Vec<Digest>,
    windows: Vec<Vec<u8>>,
    marker: Option<Marker>,
}

impl Digester {
    /// Does the job and gives its buffer back.
    fn run(&mut self, job: Job) -> Option<Vec<u8>> {
        match job {
            Job::Stored(buffer) => {
                self.stored.update(&buffer);
                Some(buffer)
            }
            Job::Plain { buffer, len, cuts } => {
                self.plain.update(&buffer[..len]);
                let mut from = 0;
                for cut in cuts {
                    self.span.update(&buffer[from..cut]);
                    self.spans.push(Digest(self.span.finalize_reset().into()));
                    from = cut;
                }
                self.span.update(&buffer[from..len]);
                Some(buffer)
            }
            Job::Window { mut window, bits, follows } => {
                if !follows.is_empty() {
                    if self.marker.is_none() {
                        self.marker = Marker::new();
                    }
                    // A window that can't be thinned stays whole: larger, never wrong.
                    if let Some(marker) = &mut self.marker {
                        marker.thin(&mut window, &follows, bits);
                    }
                }
                self.windows.push(window::pack(&window));
                None
            }
        }
    }

    fn finish(self) -> Digests {
        Digests {
            stored: Digest(self.stored.finalize().into()),
            plain: Digest(self.plain.finalize().into()),
            spans: self.spans,
            windows: self.windows,
        }
    }
}

/// Where the side work is done.
pub(super) enum SideWork {
    Inline(Box<Inline>),
    Thread { jobs: SyncSender<Job>, returned: Receiver<Vec<u8>>, thread: JoinHandle<Digests> },
}

/// Side work on the caller's own thread.
pub(super) struct Inline {
    digester: Digester,
    spare: Vec<Vec<u8>>,
}

impl SideWork {
    pub(super) fn start() -> Self {
        let inline = || Self::Inline(Box::new(Inline { digester: Digester::default(), spare: Vec::new() }));
        if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            return inline();
        }
        let (jobs, inbox) = sync_channel::<Job>(QUEUE);
        let (back, returned) = channel();
        match std::thread::Builder::new().name("index-digests".into()).spawn(move || work(inbox, back)) {
            Ok(thread) => Self::Thread { jobs, returned, thread },
            Err(_) => inline(),
        }
    }

    /// A buffer: one that came back, or a new one. Its content is arbitrary.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        match self {
            Self::Inline(inline) => inline.spare.pop(),
            Self::Thread { returned, .. } => returned.try_recv().ok(),
        }
        .unwrap_or_default()
    }

    /// Hands a job over; waits while the queue is full.
    pub(super) fn hand(&mut self, job: Job) {
        match self {
            Self::Inline(inline) => {
                let back = inline.digester.run(job);
                inline.spare.extend(back);
            }
            // A thread that is gone has panicked: `finish` says so.
            Self::Thread { jobs, .. } => drop(jobs.send(job)),
        }
    }

    /// Waits for the rest; `None` if the thread has panicked.
    pub(super) fn finish(self) -> Option<Digests> {
        match self {
            Self::Inline(inline) => Some(inline.digester.finish()),
            Self::Thread { jobs, thread, .. } => {
                drop(jobs);
                thread.join().ok()
            }
        }
    }
}

fn work(inbox: Receiver<Job>, back: Sender<Vec<u8>>) -> Digests {
    let mut digester = Digester::default();
    for job in inbox {
        if let Some(buffer) = digester.run(job) {
            // The indexer may be gone already; then nobody needs the buffer.
            let _ = back.send(buffer);
        }
    }
    digester.finish()
}
