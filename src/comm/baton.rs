//! Whose turn it is: of the threads that share an interpreter, one runs while the others wait or compute.

use super::sync::{AtomicBool, Condvar, Mutex, Ordering, PoisonError, spin_loop, yield_now};

/// Looks before the first yield: a few microseconds.
const SPINS: u32 = 200;
/// Yields before sleeping: some hundred microseconds. Waking a sleeper takes tens of them, and the stretches that
/// are waited for are hardly longer.
const YIELDS: u32 = 1000;
/// Yields where those who wait take the processor from those who work.
const YIELDS_CROWDED: u32 = 20;

/// A baton: whoever holds it runs, and lays it down before waiting for others or doing work that needs no
/// interpreter.
///
/// Threads that run Python freely contend for the interpreter's lock at every tensor operation, and each of
/// these contentions wakes a thread. With a baton that happens only where one has something else to do for a
/// while.
#[derive(Debug)]
pub struct Baton {
    spins: u32,
    yields: u32,
    held: AtomicBool,
    sleepers: Mutex<usize>,
    bell: Condvar,
}

impl Baton {
    /// A baton that nobody holds, for so many threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (spins, yields) = if threads <= cores { (SPINS, YIELDS) } else { (0, YIELDS_CROWDED) };
        Self { spins, yields, held: AtomicBool::new(false), sleepers: Mutex::new(0), bell: Condvar::new() }
    }

    /// Takes the baton if nobody holds it.
    #[must_use]
    pub fn try_take(&self) -> bool {
        !self.held.swap(true, Ordering::Acquire)
    }

    /// Waits until the baton lies there, and takes it. Looks for a while before it sleeps.
    pub fn take(&self) {
        for look in 0..self.spins + self.yields {
            if !self.held.load(Ordering::Relaxed) && self.try_take() {
                return;
            }
            if look < self.spins { spin_loop() } else { yield_now() }
        }
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        // Counted before the last look: who lays the baton down after it sees the sleeper.
        *sleepers += 1;
        while !self.try_take() {
            sleepers = self.bell.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
    }

    /// Lets the next one take the baton. Only for who holds it.
    pub fn lay_down(&self) {
        self.held.store(false, Ordering::Release);
        if *self.sleepers.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            self.bell.notify_one();
        }
    }
}

/// A baton that was laid down by its holder; it waits for it and takes it again when dropped.
#[must_use]
#[derive(Debug)]
pub struct LaidDown<'a>(&'a Baton);

impl<'a> LaidDown<'a> {
    /// Lays the baton down. Only for who holds it.
    pub fn new(baton: &'a Baton) -> Self {
        baton.lay_down();
        Self(baton)
    }
}

impl Drop for LaidDown<'_> {
    fn drop(&mut self) {
        self.0.take();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::UnsafeCell;
    use std::sync::atomic::AtomicUsize;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_holds_it_at_a_time() {
        for threads in 1..=6 {
            // Many: those who wait go to sleep soon.
            let baton = Baton::new(if threads % 2 == 0 { usize::MAX } else { 1 });
            let (inside, rounds) = (AtomicUsize::new(0), AtomicUsize::new(0));
            thread::scope(|scope| {
                for number in 0..threads {
                    let (baton, inside, rounds) = (&baton, &inside, &rounds);
                    scope.spawn(move || {
                        for round in 0..300_u64 {
                            baton.take();
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            // Now and then so long that the others fall asleep.
                            if (round + number) % 50 == 0 {
                                thread::sleep(Duration::from_millis(1));
                            }
                            inside.fetch_sub(1, Ordering::SeqCst);
                            baton.lay_down();
                            rounds.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                }
            });
            assert_eq!(rounds.into_inner() as u64, threads * 300);
            assert!(baton.try_take());
        }
    }

    #[test]
    fn a_sleeper_is_woken_and_sees_what_was_written() {
        struct Shared(UnsafeCell<u32>);
        // SAFETY: only the holder of the baton touches the number.
        unsafe impl Sync for Shared {}
        let (baton, shared) = (Baton::new(2), Shared(UnsafeCell::new(0)));
        assert!(baton.try_take());
        assert!(!baton.try_take());
        thread::scope(|scope| {
            let (baton, shared) = (&baton, &shared);
            let sleeper = scope.spawn(move || {
                baton.take();
                // SAFETY: the baton is held.
                unsafe { *shared.0.get() }
            });
            thread::sleep(Duration::from_millis(30));
            // SAFETY: the baton is held.
            unsafe { *shared.0.get() = 7 };
            baton.lay_down();
            assert_eq!(sleeper.join().unwrap(), 7);
        });
    }

    #[test]
    fn laid_down_for_a_while() {
        let baton = Baton::new(1);
        baton.take();
        {
            let _while = LaidDown::new(&baton);
            assert!(baton.try_take());
            baton.lay_down();
        }
        assert!(!baton.try_take());
    }
}
