//! Where the side work of an index run is done: on a thread of its own while a CPU is free for it, else on the run's own.
//!
//! A second thread makes one run faster, and costs a few percent of CPU time: buffers travel from one CPU's cache to another's. Where every CPU
//! has a run of its own to do, that would only be lost.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::digests::{Digester, Digests, Job};

/// Bytes per buffer: small enough for the second-level cache, which inflate and both hashes share.
pub(super) const BUFFER: usize = 256 << 10;
/// Jobs in the queue: with [`BUFFER`], what one run holds beside its table.
const QUEUE: usize = 8;

static CPUS: LazyLock<Cpus> = LazyLock::new(|| Cpus::new(std::thread::available_parallelism().map_or(1, usize::from)));

/// Shares the CPUs out between the runs of this process.
struct Cpus {
    count: usize,
    shared: Mutex<Shared>,
}

struct Shared {
    /// Runs that are under way.
    runs: usize,
    /// Those of them that have a helper.
    helped: usize,
}

impl Cpus {
    fn new(count: usize) -> Self {
        Self { count, shared: Mutex::new(Shared { runs: 0, helped: 0 }) }
    }

    fn enter(&self) {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).runs += 1;
    }

    fn leave(&self, helped: bool) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.runs -= 1;
        shared.helped -= usize::from(helped);
    }

    /// Whether a run is to have a helper from now on, which has one (`helped`) or not until now.
    fn settle(&self, helped: bool) -> bool {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let others = shared.helped - usize::from(helped);
        let now = others < self.count.saturating_sub(shared.runs);
        shared.helped = others + usize::from(now);
        now
    }
}

/// The side work of one run.
pub(super) struct SideWork {
    cpus: &'static Cpus,
    /// This run is counted among those that have a helper.
    helped: bool,
    place: Place,
    /// Buffers to be filled again.
    spare: Vec<Vec<u8>>,
}

enum Place {
    Here(Box<Digester>),
    Helper(Helper),
    /// A helper has panicked; [`SideWork::finish`] says so.
    Lost,
}

impl SideWork {
    pub(super) fn start() -> Self {
        Self::start_on(&CPUS)
    }

    fn start_on(cpus: &'static Cpus) -> Self {
        cpus.enter();
        Self { cpus, helped: false, place: Place::Here(Box::default()), spare: Vec::new() }
    }

    /// A buffer: one that came back, or a new one. Its content is arbitrary. Of a helper's, the one that came back first: the later
    /// ones still lie in the cache of the CPU that read them.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        let returned = match &self.place {
            Place::Helper(helper) => helper.returned.try_recv().ok(),
            _ => None,
        };
        returned.or_else(|| self.spare.pop()).unwrap_or_default()
    }

    /// Does the job, or hands it over; waits while the queue is full.
    pub(super) fn hand(&mut self, job: Job) {
        let helped = self.cpus.settle(self.helped);
        if helped != self.helped {
            self.helped = helped;
            self.change_places();
        }
        match &mut self.place {
            Place::Here(digester) => self.spare.extend(digester.run(job)),
            Place::Helper(helper) => helper.hand(job),
            Place::Lost => {}
        }
    }

    fn change_places(&mut self) {
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Here(digester) if self.helped => Helper::start(digester),
            Place::Helper(helper) if !self.helped => {
                let (digester, returned) = helper.end();
                self.spare.extend(returned);
                digester.map_or(Place::Lost, Place::Here)
            }
            as_it_is => as_it_is,
        };
    }

    /// Waits for the rest; `None` if a helper has panicked.
    pub(super) fn finish(mut self) -> Option<Digests> {
        match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Here(digester) => Some(digester.finish()),
            Place::Helper(helper) => helper.end().0.map(|digester| digester.finish()),
            Place::Lost => None,
        }
    }
}

impl Drop for SideWork {
    fn drop(&mut self) {
        // An index that is given up leaves no thread behind: what is in the queue takes milliseconds.
        if let Place::Helper(helper) = std::mem::replace(&mut self.place, Place::Lost) {
            helper.end();
        }
        self.cpus.leave(self.helped);
    }
}

/// A thread that does the jobs.
struct Helper {
    jobs: SyncSender<Job>,
    returned: Receiver<Vec<u8>>,
    thread: JoinHandle<Option<Box<Digester>>>,
}

impl Helper {
    /// Where no thread can be had, the work stays here.
    fn start(digester: Box<Digester>) -> Place {
        // It goes over once the thread is there, so that it is not lost with one that can't be made.
        let (begin, begun) = sync_channel(1);
        let (jobs, inbox) = sync_channel(QUEUE);
        let (back, returned) = channel();
        let work = move || begun.recv().ok().map(|digester| work(digester, inbox, back));
        match std::thread::Builder::new().name("index-digests".into()).spawn(work) {
            Ok(thread) => match begin.send(digester) {
                Ok(()) => Place::Helper(Self { jobs, returned, thread }),
                Err(unsent) => Place::Here(unsent.0),
            },
            Err(_) => Place::Here(digester),
        }
    }

    fn hand(&self, job: Job) {
        // A thread that is gone has panicked: `end` says so.
        let _ = self.jobs.send(job);
    }

    /// Waits until all jobs are done: the digester, unless the thread has panicked, and the buffers that came back.
    fn end(self) -> (Option<Box<Digester>>, Receiver<Vec<u8>>) {
        drop(self.jobs);
        (self.thread.join().ok().flatten(), self.returned)
    }
}

fn work(mut digester: Box<Digester>, inbox: Receiver<Job>, back: Sender<Vec<u8>>) -> Box<Digester> {
    for job in inbox {
        if let Some(buffer) = digester.run(job) {
            // The run may be gone already; then nobody needs the buffer.
            let _ = back.send(buffer);
        }
    }
    digester
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// As many CPUs as the test wants, shared with no other test.
    fn cpus(count: usize) -> &'static Cpus {
        Box::leak(Box::new(Cpus::new(count)))
    }

    fn job(byte: u8) -> Job {
        Job::Plain { buffer: vec![byte; 5000], len: 5000, cuts: vec![3000] }
    }

    #[test]
    fn a_run_has_a_helper_while_a_cpu_is_free_for_it() {
        let two = cpus(2);
        let mut first = SideWork::start_on(two);
        first.hand(job(1));
        assert!(matches!(first.place, Place::Helper(_)));

        let mut second = SideWork::start_on(two);
        second.hand(job(1));
        assert!(matches!(second.place, Place::Here(_)));
        first.hand(job(2));
        assert!(matches!(first.place, Place::Here(_)), "two runs on two CPUs");

        drop(second);
        first.hand(job(3));
        assert!(matches!(first.place, Place::Helper(_)), "alone again");

        let mut only = SideWork::start_on(cpus(1));
        only.hand(job(1));
        assert!(matches!(only.place, Place::Here(_)));
    }

    #[test]
    fn digests_do_not_depend_on_where_they_are_made() {
        let found = |crowded: &[bool]| {
            let two = cpus(2);
            let mut run = SideWork::start_on(two);
            for (byte, crowded) in crowded.iter().enumerate() {
                let _other = crowded.then(|| SideWork::start_on(two));
                run.hand(job(byte as u8));
            }
            let found = run.finish().unwrap();
            (found.plain, found.spans)
        };
        let alone = found(&[false; 6]);
        assert_eq!(alone.1.len(), 6);
        assert_eq!(found(&[true; 6]), alone);
        assert_eq!(found(&[false, true, false, false, true, false]), alone);
    }

    #[test]
    fn a_run_that_is_given_up_leaves_no_helper_behind() {
        let two = cpus(2);
        let mut run = SideWork::start_on(two);
        let ended = Arc::new(AtomicBool::new(false));
        let says = ended.clone();
        let (jobs, inbox) = sync_channel(QUEUE);
        let (back, returned) = channel();
        let thread = std::thread::spawn(move || {
            let digester = work(Box::default(), inbox, back);
            says.store(true, Ordering::SeqCst);
            Some(digester)
        });
        run.helped = two.settle(false);
        run.place = Place::Helper(Helper { jobs, returned, thread });
        run.hand(Job::Stored(vec![0; BUFFER]));
        drop(run);
        assert!(ended.load(Ordering::SeqCst));
        let shared = two.shared.lock().unwrap();
        assert_eq!((shared.runs, shared.helped), (0, 0));
    }
}
