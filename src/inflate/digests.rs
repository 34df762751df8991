//! The side work of indexing: SHA-256 of both sides and of every span, and thin windows.
//!
//! All of it follows the bytes and nothing waits for it, so it runs on a thread beside inflate, over a bounded queue.
//! On a single CPU, or where no thread can be had, it runs inline.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use sha2::{Digest as _, Sha256};

use super::twin::Twin;
use super::window::{GROUP, Marker, Packer, Sparse};
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

#[derive(Default)]
struct Digester {
    stored: Sha256,
    /// Of the uncompressed blob, and of the open span.
    plain: Twin,
    spans: Vec<Digest>,
    windows: Windows,
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

    fn finish(mut self) -> Digests {
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

/// Where the side work is done.
pub(super) enum SideWork {
    Inline(Box<Inline>),
    Thread(Helper),
}

/// Side work on a thread of its own, which ends with this.
pub(super) struct Helper {
    /// `None`, like `thread`, once it is to end.
    jobs: Option<SyncSender<Job>>,
    returned: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Digests>>,
}

impl Helper {
    /// Waits until all jobs are done; `None` if the thread has panicked.
    fn finish(&mut self) -> Option<Digests> {
        drop(self.jobs.take());
        self.thread.take()?.join().ok()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // An index that is given up leaves no thread behind: what is in the queue takes milliseconds.
        self.finish();
    }
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
            Ok(thread) => Self::Thread(Helper { jobs: Some(jobs), returned, thread: Some(thread) }),
            Err(_) => inline(),
        }
    }

    /// A buffer: one that came back, or a new one. Its content is arbitrary.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        match self {
            Self::Inline(inline) => inline.spare.pop(),
            Self::Thread(helper) => helper.returned.try_recv().ok(),
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
            Self::Thread(helper) => drop(helper.jobs.as_ref().map(|jobs| jobs.send(job))),
        }
    }

    /// Waits for the rest; `None` if the thread has panicked.
    pub(super) fn finish(self) -> Option<Digests> {
        match self {
            Self::Inline(inline) => Some(inline.digester.finish()),
            Self::Thread(mut helper) => helper.finish(),
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn an_index_that_is_given_up_leaves_no_thread_behind() {
        let (jobs, inbox) = sync_channel::<Job>(QUEUE);
        let (back, returned) = channel();
        let ended = Arc::new(AtomicBool::new(false));
        let says = ended.clone();
        let thread = std::thread::spawn(move || {
            let digests = work(inbox, back);
            says.store(true, Ordering::SeqCst);
            digests
        });
        let mut side = SideWork::Thread(Helper { jobs: Some(jobs), returned, thread: Some(thread) });
        side.hand(Job::Stored(vec![0; BUFFER]));
        drop(side);
        assert!(ended.load(Ordering::SeqCst));
    }
}
