//! Counts the calls of driver functions, and lets chosen ones fail or take their time.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::codes::{self, PEER_ACCESS_ALREADY_ENABLED, Result};
use crate::device;

/// What becomes of the work of a call that is made to fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failing {
    /// It is not done.
    Instead,
    /// It is done: functions that give something back fail with the errors of earlier work.
    Afterwards,
}

#[derive(Default)]
struct Plan {
    armed: bool,
    /// Which call fails, from 1; 0 for none.
    nth: u64,
    code: i32,
    calls: Vec<&'static str>,
    /// The same for kernels, when they run.
    nth_kernel: u64,
    kernel_code: i32,
    kernels: u64,
}

static PLAN: Mutex<Plan> = Mutex::new(Plan {
    armed: false,
    nth: 0,
    code: 0,
    calls: Vec::new(),
    nth_kernel: 0,
    kernel_code: 0,
    kernels: 0,
});

/// Stalls of 65536 chances, and where their random numbers begin.
static STALLS: AtomicU32 = AtomicU32::new(0);
static SEED: AtomicU64 = AtomicU64::new(1);

fn plan() -> std::sync::MutexGuard<'static, Plan> {
    PLAN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts from now on; lets the `nth` call fail with `code`, and the `nth_kernel` kernel that runs with its own.
pub(crate) fn arm(nth: u64, code: i32, nth_kernel: u64, kernel_code: i32) {
    *plan() = Plan { armed: true, nth, code, nth_kernel, kernel_code, ..Plan::default() };
}

/// Counts no more; gives the names of the calls that were counted, and the number of kernels that ran.
pub(crate) fn disarm() -> (Vec<&'static str>, u64) {
    let plan = std::mem::take(&mut *plan());
    (plan.calls, plan.kernels)
}

pub(crate) fn set_stalls(chances: u32, seed: u64) {
    SEED.store(seed | 1, Ordering::Relaxed);
    STALLS.store(chances, Ordering::Relaxed);
}

/// Sometimes sleeps, for as long as small kernels take.
pub(crate) fn stall() {
    let chances = STALLS.load(Ordering::Relaxed);
    if chances == 0 {
        return;
    }
    thread_local!(static RANDOM: Cell<u64> = const { Cell::new(0) });
    let mut random = RANDOM.get();
    if random == 0 {
        random = SEED.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed) | 1;
    }
    // Marsaglia, Xorshift RNGs, 2003.
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    RANDOM.set(random);
    if (random >> 32) as u32 % 65536 < chances {
        std::thread::sleep(Duration::from_micros(random % 500));
    }
}

/// Runs a driver function on behalf of the thread's current device.
pub(crate) fn call(name: &'static str, failing: Failing, body: impl FnOnce() -> Result) -> i32 {
    call_on(name, failing, device::top(), body)
}

/// The same on behalf of `device`, whose context an injected error that is sticky breaks.
pub(crate) fn call_on(
    name: &'static str,
    failing: Failing,
    device: Option<u32>,
    body: impl FnOnce() -> Result,
) -> i32 {
    stall();
    let injected = {
        let mut plan = plan();
        if plan.armed {
            plan.calls.push(name);
        }
        (plan.armed && plan.calls.len() as u64 == plan.nth).then_some(plan.code)
    };
    let Some(code) = injected else { return body().err().unwrap_or(0) };
    if failing == Failing::Afterwards || code == PEER_ACCESS_ALREADY_ENABLED {
        let _ = body();
    }
    if codes::is_sticky(code)
        && let Some(device) = device
    {
        device::break_it(device, code);
    }
    code
}

/// Asked by every kernel before it does anything: whether it is to fail.
pub(crate) fn kernel() -> Result {
    stall();
    let mut plan = plan();
    if !plan.armed {
        return Ok(());
    }
    plan.kernels += 1;
    if plan.kernels == plan.nth_kernel { Err(plan.kernel_code) } else { Ok(()) }
}
