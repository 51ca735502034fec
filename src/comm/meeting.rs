//! Where ranks meet: a barrier that carries what each of them brought, with a bounded wait.
//!
//! All state is behind one mutex, so there is no wake-up to lose; a counter beside it lets those who wait look
//! without taking the mutex. A wait spins briefly, then yields, then sleeps. It ends when everybody is there,
//! when the timeout is over, or when somebody stops the meeting; the latter two break it for good, since the
//! ranks no longer agree on which call comes next.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::refusal::Refusal;
use super::sync::{
    AtomicBool, AtomicU64, Condvar, Mutex, MutexGuard, Ordering, PoisonError, spin_loop, yield_now,
};
use crate::device::Device;
use crate::error::{Error, Result};

/// How often a sleeping rank looks whether it was interrupted.
const POLL_EVERY: Duration = Duration::from_millis(50);
/// Looks before the first yield, where every rank has a core: a few microseconds.
const SPINS: u32 = 200;
/// Yields before sleeping, where every rank has a core: about the time that a sleeper takes to wake up, a few
/// times over.
const YIELDS: u32 = 500;
/// Yields where ranks that wait take the processor from ranks that work.
const YIELDS_CROWDED: u32 = 50;

/// What the last one to arrive decides for all.
pub(crate) enum Decision {
    /// It is done: everybody may go.
    Done,
    /// Everybody does a part, and nobody goes before all parts are done.
    Share,
}

pub(crate) struct Meeting<T> {
    ranks: usize,
    timeout: Duration,
    spins: u32,
    yields: u32,
    /// Counts the times that everybody was let go.
    turn: AtomicU64,
    broken: AtomicBool,
    /// Ranks that are inside a call.
    busy: Vec<AtomicBool>,
    state: Mutex<State<T>>,
    bell: Condvar,
}

struct State<T> {
    posted: Vec<Option<T>>,
    arrived: usize,
    leaving: usize,
    sleepers: usize,
    outcome: Outcome<T>,
    failure: Option<Failure>,
}

enum Outcome<T> {
    Done,
    Share(Arc<Vec<T>>),
    Refused(Refusal),
}

#[derive(Clone)]
enum Failure {
    Timeout { operation: &'static str, missing: Vec<usize>, seconds: f64 },
    Stopped { reason: String },
}

impl Failure {
    /// The error of a rank that was waiting when it happened.
    fn of_waiting(&self, operation: &'static str, rank: usize) -> Error {
        match self {
            Self::Timeout { missing, seconds, .. } => Error::CollectiveTimeout {
                operation,
                rank,
                device: Device::Cpu,
                missing: missing.clone(),
                seconds: *seconds,
            },
            Self::Stopped { reason } => Error::Aborted { operation, reason: reason.clone() },
        }
    }

    /// The error of whoever calls later.
    fn of_later(&self, operation: &'static str) -> Error {
        let reason = match self {
            Self::Timeout { operation, missing, seconds } => {
                format!("ranks {missing:?} had not come to {operation} within {seconds} s")
            }
            Self::Stopped { reason } => reason.clone(),
        };
        Error::Aborted { operation, reason }
    }
}

/// Marks a rank as being inside a call, until dropped.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A rank's part in work that all ranks share. Nobody goes before all have dropped theirs.
pub(crate) struct Shared<'a, T> {
    meeting: &'a Meeting<T>,
    items: Arc<Vec<T>>,
    interrupt: Option<Error>,
    left: bool,
    _busy: Busy<'a>,
}

impl<T> Shared<'_, T> {
    /// What every rank brought.
    pub(crate) fn items(&self) -> &[T] {
        &self.items
    }

    /// Says that this rank's part is done and waits for the others.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.leave();
        self.interrupt.take().map_or(Ok(()), Err)
    }

    fn leave(&mut self) {
        if !std::mem::replace(&mut self.left, true) {
            self.meeting.leave();
        }
    }
}

impl<T> Drop for Shared<'_, T> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl<T> Meeting<T> {
    /// A meeting of `ranks` ranks on a machine that runs `cores` threads at a time.
    pub(crate) fn new(ranks: usize, cores: usize, timeout: Duration) -> Self {
        let state = State {
            posted: std::iter::repeat_with(|| None).take(ranks).collect(),
            arrived: 0,
            leaving: 0,
            sleepers: 0,
            outcome: Outcome::Done,
            failure: None,
        };
        // Without a core for every rank, spinning keeps the others from coming.
        let (spins, yields) = if ranks <= cores { (SPINS, YIELDS) } else { (0, YIELDS_CROWDED) };
        Self {
            ranks,
            timeout,
            spins,
            yields,
            turn: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            busy: std::iter::repeat_with(|| AtomicBool::new(false)).take(ranks).collect(),
            state: Mutex::new(state),
            bell: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if the meeting is broken.
    pub(crate) fn check(&self, operation: &'static str) -> Result<()> {
        if !self.broken.load(Ordering::Acquire) {
            return Ok(());
        }
        self.lock().failure.as_ref().map_or(Ok(()), |failure| Err(failure.of_later(operation)))
    }

    /// Breaks the meeting and wakes everybody. Work that has begun is still finished.
    pub(crate) fn stop(&self, reason: String) {
        self.fail(&mut self.lock(), Failure::Stopped { reason });
    }

    /// Lets the ranks meet again after a failure, if none of them is still inside a call.
    pub(crate) fn reset(&self) -> Result<(), Refusal> {
        let mut state = self.lock();
        if state.failure.is_none() {
            return Ok(());
        }
        // Who is marked later finds the failure gone, or waits for the lock.
        if let Some(rank) = self.busy.iter().position(|busy| busy.load(Ordering::Acquire)) {
            let got = format!("a call while rank {rank} is still inside another");
            return Err(Refusal::new("reset", got, "every rank out of its calls"));
        }
        state.posted.iter_mut().for_each(|place| *place = None);
        state.arrived = 0;
        state.failure = None;
        self.broken.store(false, Ordering::Release);
        Ok(())
    }

    fn fail(&self, state: &mut State<T>, failure: Failure) {
        state.failure.get_or_insert(failure);
        self.broken.store(true, Ordering::Release);
        self.bell.notify_all();
    }

    /// Brings `item` and waits for all ranks. The last to arrive calls `decide` with all items, in the order of
    /// ranks; what it decides holds for everybody.
    ///
    /// `poll` is called now and then while the rank sleeps; its error ends the wait and breaks the meeting.
    ///
    /// Returns `None` if all is done, else the rank's part in what is to be done.
    pub(crate) fn meet(
        &self,
        rank: usize,
        operation: &'static str,
        item: T,
        decide: impl FnOnce(&[&T]) -> Result<Decision, Refusal>,
        poll: &dyn Fn() -> Result<()>,
    ) -> Result<Option<Shared<'_, T>>> {
        let Some(busy) = self.busy.get(rank) else {
            return Err(Error::invalid("rank", rank, format!("a rank below {}", self.ranks)));
        };
        if busy.swap(true, Ordering::Acquire) {
            return Err(Error::invalid(
                format!("{operation} on rank {rank}"),
                "a call while another call of this rank is under way",
                "one call at a time for each rank",
            ));
        }
        let busy = Busy(busy);
        let mut state = self.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.of_later(operation));
        }
        let turn = self.turn.load(Ordering::Relaxed);
        if let Some(place) = state.posted.get_mut(rank) {
            *place = Some(item);
        }
        state.arrived += 1;
        let mut interrupt = None;
        if state.arrived == self.ranks {
            let outcome = decide(&state.posted.iter().flatten().collect::<Vec<_>>());
            let items = state.posted.iter_mut().filter_map(Option::take);
            let outcome = match outcome {
                Ok(Decision::Share) => Outcome::Share(Arc::new(items.collect())),
                Ok(Decision::Done) => {
                    items.for_each(drop);
                    Outcome::Done
                }
                Err(refusal) => {
                    items.for_each(drop);
                    Outcome::Refused(refusal)
                }
            };
            state.outcome = outcome;
            state.arrived = 0;
            self.let_go(&mut state);
        } else {
            drop(state);
            interrupt = self.wait_for_all(turn, rank, operation, poll)?;
            state = self.lock();
        }
        let outcome = match &state.outcome {
            Outcome::Done => Ok(None),
            Outcome::Share(items) => Ok(Some(Arc::clone(items))),
            Outcome::Refused(refusal) => Err(refusal.clone()),
        };
        drop(state);
        match (outcome, interrupt) {
            (Ok(Some(items)), interrupt) => {
                Ok(Some(Shared { meeting: self, items, interrupt, left: false, _busy: busy }))
            }
            (_, Some(interrupt)) => Err(interrupt),
            (Ok(None), None) => Ok(None),
            (Err(refusal), None) => Err(refusal.into()),
        }
    }

    fn let_go(&self, state: &mut State<T>) {
        self.turn.fetch_add(1, Ordering::Release);
        if state.sleepers > 0 {
            self.bell.notify_all();
        }
    }

    fn has_turned(&self, turn: u64) -> bool {
        self.turn.load(Ordering::Acquire) != turn
    }

    /// Looks for a while without sleeping. True once everybody was let go.
    fn look(&self, turn: u64, give_up: impl Fn() -> bool) -> bool {
        for look in 0..self.spins + self.yields {
            if self.has_turned(turn) {
                return true;
            }
            if give_up() {
                return false;
            }
            if look < self.spins { spin_loop() } else { yield_now() }
        }
        false
    }

    /// Waits until everybody was let go. Returns an error of `poll` that came too late to end the wait.
    fn wait_for_all(
        &self,
        turn: u64,
        rank: usize,
        operation: &'static str,
        poll: &dyn Fn() -> Result<()>,
    ) -> Result<Option<Error>> {
        if self.look(turn, || self.broken.load(Ordering::Acquire)) {
            return Ok(None);
        }
        let begin = Instant::now();
        let mut state = self.lock();
        loop {
            if self.has_turned(turn) {
                return Ok(None);
            }
            if let Some(failure) = &state.failure {
                return Err(failure.of_waiting(operation, rank));
            }
            let Some(left) = self.timeout.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) else {
                let posted = state.posted.iter().enumerate();
                let missing = posted.filter(|(_, item)| item.is_none()).map(|(rank, _)| rank).collect();
                let seconds = self.timeout.as_secs_f64();
                let failure = Failure::Timeout { operation, missing, seconds };
                let error = failure.of_waiting(operation, rank);
                self.fail(&mut state, failure);
                return Err(error);
            };
            state.sleepers += 1;
            state =
                self.bell.wait_timeout(state, left.min(POLL_EVERY)).unwrap_or_else(PoisonError::into_inner).0;
            state.sleepers -= 1;
            if self.has_turned(turn) {
                return Ok(None);
            }
            drop(state);
            // A panic may not leave this frame while others can still use what this rank posted.
            let polled = catch_unwind(AssertUnwindSafe(poll)).unwrap_or_else(|_| {
                Err(Error::Aborted { operation, reason: format!("the poll of rank {rank} panicked") })
            });
            state = self.lock();
            if let Err(interrupt) = polled {
                if self.has_turned(turn) {
                    return Ok(Some(interrupt));
                }
                let reason =
                    format!("rank {rank} was interrupted while it waited in {operation}: {interrupt}");
                self.fail(&mut state, Failure::Stopped { reason });
                return Err(interrupt);
            }
        }
    }

    /// Says that a rank has done its part and waits for the parts of the others. Their work ends by itself, and
    /// going sooner would give memory back that they still use: neither a timeout nor a stop ends this wait.
    fn leave(&self) {
        let mut state = self.lock();
        let turn = self.turn.load(Ordering::Relaxed);
        state.leaving += 1;
        if state.leaving == self.ranks {
            state.leaving = 0;
            self.let_go(&mut state);
            return;
        }
        drop(state);
        if self.look(turn, || false) {
            return;
        }
        let mut state = self.lock();
        while !self.has_turned(turn) {
            state.sleepers += 1;
            state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.sleepers -= 1;
        }
    }
}

#[cfg(test)]
#[path = "meeting_tests.rs"]
mod tests;
