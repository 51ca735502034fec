//! Devices, their primary contexts, and which context is current on a thread.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::atomic::AtomicI32;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::codes::{CONTEXT_IS_DESTROYED, INVALID_CONTEXT, INVALID_DEVICE, OUT_OF_MEMORY, Result};
use crate::report::misuse;

/// What a device can do with a peer's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Absent,
    Works,
    /// The driver says that it works; what is written is lost and what is read is zero.
    Lies,
}

pub(crate) struct Device {
    pub(crate) total: u64,
    pub(crate) used: u64,
    pub(crate) multiprocessors: u32,
    /// The major number of its compute capability.
    pub(crate) capability: u32,
    /// What it can do with each device's memory.
    pub(crate) peers: Vec<Peer>,
    /// Peers whose memory its context was given access to.
    enabled: HashSet<u32>,
    /// How often its primary context is retained.
    pub(crate) references: u64,
    /// How many of those are a test's own.
    pub(crate) borrowed: u64,
    /// The error that broke its context.
    broken: i32,
}

/// The version of CUDA that the driver is of.
pub(crate) static VERSION: AtomicI32 = AtomicI32::new(12_080);

static DEVICES: Mutex<Vec<Device>> = Mutex::new(Vec::new());

thread_local!(static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) });

pub(crate) fn all() -> MutexGuard<'static, Vec<Device>> {
    DEVICES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes `count` devices of 8 GiB that reach each other.
pub(crate) fn make(count: usize) {
    let device = |_| Device {
        total: 8 << 30,
        used: 0,
        multiprocessors: 4,
        capability: 9,
        peers: vec![Peer::Works; count],
        enabled: HashSet::new(),
        references: 0,
        borrowed: 0,
        broken: 0,
    };
    *all() = (0..count).map(device).collect();
}

pub(crate) fn with<T>(device: u32, ask: impl FnOnce(&mut Device) -> T) -> Result<T> {
    all().get_mut(device as usize).map(ask).ok_or(INVALID_DEVICE)
}

/// The context of a device as callers see it.
pub(crate) fn handle(device: u32) -> usize {
    0xc7_0000 + device as usize * 16
}

/// The device of a context.
pub(crate) fn of_handle(context: usize) -> Option<u32> {
    let device = context.checked_sub(0xc7_0000)?;
    let known = device.is_multiple_of(16) && device / 16 < all().len();
    known.then_some((device / 16) as u32)
}

/// The device whose context is current on this thread.
pub(crate) fn top() -> Option<u32> {
    STACK.with_borrow(|stack| stack.last().copied()).and_then(of_handle)
}

/// The handle that is current on this thread, 0 for none.
pub(crate) fn top_handle() -> usize {
    STACK.with_borrow(|stack| stack.last().copied()).unwrap_or(0)
}

pub(crate) fn depth() -> u32 {
    STACK.with_borrow(|stack| stack.len() as u32)
}

pub(crate) fn push(context: usize) {
    STACK.with_borrow_mut(|stack| stack.push(context));
}

pub(crate) fn pop() -> Option<usize> {
    STACK.with_borrow_mut(Vec::pop)
}

/// The current device, if its context can be used.
pub(crate) fn current(call: &str) -> Result<u32> {
    let device = holder(call)?;
    match with(device, |device| device.broken)? {
        0 => Ok(device),
        code => Err(code),
    }
}

/// The current device, whose context may be broken: what gives things back works all the same.
pub(crate) fn holder(call: &str) -> Result<u32> {
    let Some(device) = top() else {
        return Err(misuse(INVALID_CONTEXT, format!("{call} without a current context")));
    };
    if with(device, |device| device.references)? == 0 {
        return Err(misuse(
            CONTEXT_IS_DESTROYED,
            format!("{call} in the context of device {device} after its release"),
        ));
    }
    Ok(device)
}

/// The error that broke a device's context, 0 for none.
pub(crate) fn broken(device: u32) -> i32 {
    with(device, |device| device.broken).unwrap_or(0)
}

/// Breaks a device's context: every later call gives the first error.
pub(crate) fn break_it(device: u32, code: i32) {
    let _ = with(device, |device| {
        if device.broken == 0 {
            device.broken = code;
        }
    });
}

/// Stands for a new process.
pub(crate) fn heal_all() {
    for device in all().iter_mut() {
        device.broken = 0;
    }
}

/// Gives a context access to a peer's memory; whether it had it already.
pub(crate) fn enable(from: u32, to: u32) -> bool {
    with(from, |device| !device.enabled.insert(to)).unwrap_or(false)
}

/// Takes back all access.
pub(crate) fn forget_peers() {
    for device in all().iter_mut() {
        device.enabled.clear();
    }
}

/// What kernels of `from` can do with plain memory of `to`.
pub(crate) fn access(from: u32, to: u32) -> Peer {
    if from == to {
        return Peer::Works;
    }
    let can = |device: &mut Device| {
        if device.enabled.contains(&to) { device.peers.get(to as usize).copied() } else { None }
    };
    with(from, can).ok().flatten().unwrap_or(Peer::Absent)
}

/// Takes bytes of a device's memory.
pub(crate) fn reserve(device: u32, bytes: u64) -> Result {
    with(device, |device| {
        if device.used + bytes > device.total {
            return Err(OUT_OF_MEMORY);
        }
        device.used += bytes;
        Ok(())
    })?
}

pub(crate) fn give_back(device: u32, bytes: u64) {
    let _ = with(device, |device| device.used = device.used.saturating_sub(bytes));
}
