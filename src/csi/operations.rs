//! Work that outlives the call that began it: one operation per key, joined by retries.
//!
//! A call starts its work as a task and waits for it until shortly before its caller gives up; then it answers ABORTED
//! and the work goes on. The same call made again joins the task; its outcome, if nobody was there to hear it, is kept
//! for the next one for [`KEEP`]. Another call on the same key is answered ABORTED, except that an unpublish asks a waiting
//! publish to end and takes its place. Tasks are never dropped half-way: a caller that hangs up can't leave a mount
//! behind that nobody knows of.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};
use tracing::Instrument as _;

use super::status::{aborted, status};
use crate::units::Digest;

/// How long an outcome that nobody has heard waits for the retry. The kubelet's longest pause between tries is 2 min.
pub(super) const KEEP: Duration = Duration::from_secs(300);

/// What a call wants done.
pub(super) struct Call<'a> {
    /// What is locked: a target path, a volume id.
    pub key: &'a str,
    /// "publish", "unpublish", "create", "delete".
    pub kind: &'static str,
    /// Everything that makes two calls the same.
    pub fingerprint: Digest,
    /// When the caller must have its answer.
    pub deadline: Instant,
    /// What goes on if that is too early, for the message.
    pub what: String,
    /// How far it is by then, where that is known.
    pub progress: &'a (dyn Fn() -> Option<String> + Send + Sync),
    /// The kind of operation that is cancelled and waited for first.
    pub preempts: Option<&'static str>,
}

type Outcome<T> = Option<(Instant, Result<T, Status>)>;

struct Operation<T> {
    serial: u64,
    kind: &'static str,
    fingerprint: Digest,
    started: Instant,
    cancel: CancellationToken,
    done: watch::Receiver<Outcome<T>>,
}

impl<T> Operation<T> {
    fn finished(&self) -> bool {
        // A sender that is gone without a word panicked.
        self.done.borrow().is_some() || self.done.has_changed().is_err()
    }

    fn stale(&self, keep: Duration) -> bool {
        self.finished() && self.done.borrow().as_ref().is_none_or(|(at, _)| at.elapsed() > keep)
    }
}

struct Table<T> {
    operations: HashMap<String, Operation<T>>,
    next: u64,
}

/// The operations of one service.
pub(super) struct Operations<T> {
    table: Arc<Mutex<Table<T>>>,
    tasks: TaskTracker,
    keep: Duration,
}

impl<T> Clone for Operations<T> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone(), tasks: self.tasks.clone(), keep: self.keep }
    }
}

impl<T> Default for Operations<T> {
    fn default() -> Self {
        let table = Table { operations: HashMap::new(), next: 0 };
        Self { table: Arc::new(Mutex::new(table)), tasks: TaskTracker::new(), keep: KEEP }
    }
}

impl<T> fmt::Debug for Operations<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operations").field("tasks", &self.tasks.len()).finish_non_exhaustive()
    }
}

enum Step<T> {
    Join { serial: u64, started: Instant, done: watch::Receiver<Outcome<T>> },
    After(watch::Receiver<Outcome<T>>),
    Busy(&'static str),
}

impl<T: Clone + Send + Sync + 'static> Operations<T> {
    fn lock(&self) -> MutexGuard<'_, Table<T>> {
        // Nothing that runs under this lock can leave the table half-changed.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `call`, or joins it. `work` is asked for a future once at most; it should heed its token while it waits for
    /// others, and finish what it has begun to change.
    pub async fn run<W, F>(&self, call: Call<'_>, work: W) -> Result<T, Status>
    where
        W: FnOnce(CancellationToken) -> F,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let mut work = Some(work);
        loop {
            match self.step(&call, &mut work) {
                Step::Join { serial, started, mut done } => {
                    let Ok(outcome) = tokio::time::timeout_at(call.deadline, done.wait_for(Option::is_some)).await
                    else {
                        let seconds = started.elapsed().as_secs();
                        let progress = (call.progress)().map(|state| format!(": {state}")).unwrap_or_default();
                        let what = &call.what;
                        return Err(aborted(&format!(
                            "{what} goes on{progress} ({seconds} s so far); the next try joins it"
                        )));
                    };
                    let outcome = outcome.ok().and_then(|outcome| outcome.as_ref().map(|(_, result)| result.clone()));
                    self.forget(call.key, serial);
                    let broken =
                        || Err(status(Code::Internal, &format!("{}: an internal error; see the log", call.what)));
                    return outcome.unwrap_or_else(broken);
                }
                Step::After(mut done) => {
                    // Its outcome is of no interest, only that it has ended.
                    if tokio::time::timeout_at(call.deadline, done.wait_for(Option::is_some)).await.is_err() {
                        return Err(aborted(&format!("{} waits for an earlier call to end; try again", call.what)));
                    }
                }
                Step::Busy(kind) => {
                    return Err(aborted(&format!("{}: another {kind} is under way; try again", call.what)));
                }
            }
        }
    }

    fn step<W, F>(&self, call: &Call<'_>, work: &mut Option<W>) -> Step<T>
    where
        W: FnOnce(CancellationToken) -> F,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let mut table = self.lock();
        table.operations.retain(|_, operation| !operation.stale(self.keep));
        let serial = table.next;
        table.next += 1;
        let slot = table.operations.entry(call.key.to_owned());
        if let Slot::Occupied(slot) = &slot {
            let running = slot.get();
            if running.kind == call.kind && running.fingerprint == call.fingerprint && !running.cancel.is_cancelled() {
                return Step::Join { serial: running.serial, started: running.started, done: running.done.clone() };
            }
            if !running.finished() {
                if call.preempts != Some(running.kind) {
                    return Step::Busy(running.kind);
                }
                running.cancel.cancel();
                return Step::After(running.done.clone());
            }
        }
        let Some(work) = work.take() else { return Step::Busy(call.kind) };
        let (tell, done) = watch::channel(None);
        let cancel = CancellationToken::new();
        let future = work(cancel.clone());
        let (this, key) = (self.clone(), call.key.to_owned());
        self.tasks.spawn(
            async move {
                let result = future.await;
                if let Err(status) = &result {
                    tracing::debug!(code = ?status.code(), "operation failed: {}", status.message());
                } else {
                    this.forget(&key, serial);
                }
                tell.send_replace(Some((Instant::now(), result)));
            }
            .in_current_span(),
        );
        let started = Instant::now();
        let operation =
            Operation { serial, kind: call.kind, fingerprint: call.fingerprint, started, cancel, done: done.clone() };
        slot.insert_entry(operation);
        Step::Join { serial, started, done }
    }

    fn forget(&self, key: &str, serial: u64) {
        let mut table = self.lock();
        if table.operations.get(key).is_some_and(|operation| operation.serial == serial) {
            table.operations.remove(key);
        }
    }

    /// Waits until all that is under way has ended, but no longer than `grace`. False: something has not. Work that only
    /// waits for others is cancelled.
    pub async fn drain(&self, grace: Duration) -> bool {
        for operation in self.lock().operations.values() {
            operation.cancel.cancel();
        }
        self.tasks.close();
        tokio::time::timeout(grace, self.tasks.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    /// A call whose caller waits for as long as it takes, or (a deadline that has passed) not at all.
    fn call(kind: &'static str, of: &str, patient: bool) -> Call<'static> {
        let far = Duration::from_secs(60);
        Call {
            key: "/target",
            kind,
            fingerprint: Digest::of(of.as_bytes()),
            deadline: if patient { Instant::now() + far } else { Instant::now() },
            what: format!("{kind} of {of}"),
            progress: &|| Some("34 %".to_owned()),
            preempts: (kind == "unpublish").then_some("publish"),
        }
    }

    /// Work that counts its starts and ends when told to.
    #[derive(Clone, Default)]
    struct Work {
        starts: Arc<AtomicUsize>,
        end: Arc<Notify>,
    }
    impl Work {
        async fn run(self, cancel: CancellationToken, result: Result<usize, Status>) -> Result<usize, Status> {
            self.starts.fetch_add(1, Ordering::SeqCst);
            tokio::select! {
                () = cancel.cancelled() => Err(aborted("cancelled")),
                () = self.end.notified() => result,
            }
        }
    }

    /// Waits until nothing runs, without hearing any outcome.
    async fn ended<T: Clone + Send + Sync + 'static>(operations: &Operations<T>) {
        let waiting: Vec<_> = operations.lock().operations.values().map(|running| running.done.clone()).collect();
        for mut done in waiting {
            done.wait_for(Option::is_some).await.unwrap();
        }
    }

    #[tokio::test]
    async fn work_goes_on_past_the_deadline_and_the_retry_joins_it() {
        let (operations, work) = (Operations::default(), Work::default());
        let first = operations.run(call("publish", "a", false), |c| work.clone().run(c, Ok(7))).await.unwrap_err();
        assert_eq!(first.code(), Code::Aborted);
        assert_eq!(first.message(), "publish of a goes on: 34 % (0 s so far); the next try joins it");
        work.end.notify_one();
        let second = operations.run(call("publish", "a", true), |c| work.clone().run(c, Ok(8))).await.unwrap();
        assert_eq!((second, work.starts.load(Ordering::SeqCst)), (7, 1));
    }

    #[tokio::test]
    async fn a_failure_that_nobody_heard_is_told_to_the_next_try_and_then_tried_again() {
        let (operations, work) = (Operations::default(), Work::default());
        let fail = Err(status(Code::NotFound, "no such image"));
        operations.run(call("publish", "a", false), |c| work.clone().run(c, fail.clone())).await.unwrap_err();
        work.end.notify_one();
        ended(&operations).await;
        let told = operations.run(call("publish", "a", true), |c| work.clone().run(c, Ok(1))).await.unwrap_err();
        assert_eq!((told.code(), work.starts.load(Ordering::SeqCst)), (Code::NotFound, 1));
        work.end.notify_one();
        assert_eq!(operations.run(call("publish", "a", true), |c| work.clone().run(c, Ok(1))).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn an_outcome_is_not_kept_for_ever() {
        let (operations, work) = (Operations { keep: Duration::ZERO, ..Operations::default() }, Work::default());
        let fail = Err(status(Code::NotFound, "no such image"));
        operations.run(call("publish", "a", false), |c| work.clone().run(c, fail)).await.unwrap_err();
        work.end.notify_one();
        ended(&operations).await;
        work.end.notify_one();
        assert_eq!(operations.run(call("publish", "a", true), |c| work.clone().run(c, Ok(1))).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn another_call_on_the_same_key_is_aborted() {
        let (operations, work) = (Operations::default(), Work::default());
        operations.run(call("publish", "a", false), |c| work.clone().run(c, Ok(1))).await.unwrap_err();
        let other = operations.run(call("publish", "b", true), |c| work.clone().run(c, Ok(2))).await.unwrap_err();
        assert_eq!(other.code(), Code::Aborted);
        assert!(other.message().contains("another publish is under way"), "{}", other.message());
        work.end.notify_one();
        assert_eq!(operations.run(call("publish", "a", true), |c| work.clone().run(c, Ok(3))).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn an_unpublish_ends_a_waiting_publish_and_takes_its_place() {
        let (operations, work) = (Operations::default(), Work::default());
        let waiting = tokio::spawn({
            let (operations, work) = (operations.clone(), work.clone());
            async move { operations.run(call("publish", "a", true), |c| work.run(c, Ok(1))).await }
        });
        while work.starts.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(operations.run(call("unpublish", "", true), |_| async { Ok(2) }).await.unwrap(), 2);
        assert_eq!(waiting.await.unwrap().unwrap_err().message(), "cancelled");
        assert!(operations.lock().operations.is_empty());
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_no_lock_for_ever() {
        let operations = Operations::<usize>::default();
        let broken = operations.run(call("publish", "a", true), |_| async { panic!("on purpose") }).await.unwrap_err();
        assert_eq!(broken.code(), Code::Internal);
        assert_eq!(operations.run(call("publish", "a", true), |_| async { Ok(3) }).await.unwrap(), 3);
    }
}
