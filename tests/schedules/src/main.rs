//! The meeting of CPU ranks (`src/comm/meeting.rs`, that very file) on a scheduler that chooses which thread goes on at
//! every lock, flag and bell: schedules that a machine would show once in a million runs, each with a seed that repeats
//! it. Sleeps don't time out here, so a wake-up that is lost is a deadlock, which the scheduler reports.

#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/comm/meeting.rs"]
mod meeting;
mod models;
#[path = "../../../src/device/place.rs"]
mod place;
#[path = "../../../src/comm/refusal.rs"]
mod refusal;

mod device {
    pub use crate::place::Device;
}

/// What an error of planning carries; there is no planning here.
mod split {
    #[derive(Debug, thiserror::Error)]
    #[error("does not fit")]
    pub struct Shortfall;
}

/// In place of `src/comm/sync.rs`.
mod sync {
    pub(crate) use shuttle::hint::spin_loop;
    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use shuttle::thread::yield_now;
    pub(crate) use std::sync::PoisonError;
}

/// Runs every model in as many schedules of each kind as the argument says (10,000).
fn main() {
    let schedules = std::env::args().nth(1).and_then(|count| count.parse().ok()).unwrap_or(10_000);
    for (name, model) in models::ALL {
        shuttle::check_random(model, schedules);
        shuttle::check_pct(model, schedules, 3);
        println!("{name}: {schedules} random schedules, {schedules} with 3 changes of priority");
    }
}
