//! How tests set the driver up, break it, and ask what happened. All of it is about the process.

use std::ffi::c_char;
use std::sync::atomic::Ordering;

use crate::device::Peer;
use crate::memory::{Class, Home};
use crate::{device, faults, graph, memory, ptx, report, stream};

/// What the tested code holds.
#[repr(C)]
#[derive(Default)]
pub struct Ledger {
    device_allocations: u64,
    device_bytes: u64,
    pinned_allocations: u64,
    streams: u64,
    events: u64,
    modules: u64,
    context_references: u64,
    graphs: u64,
}

/// Allocations of the tested code in a device's memory.
pub(crate) fn leftovers(index: u32) -> u64 {
    let mut count = 0;
    memory::live(|known| {
        if known.class == Class::Driver && known.home == Home::Device(index) {
            count += 1;
        }
    });
    count
}

/// Makes `count` devices of 8 GiB and 4 multiprocessors that reach each other. Once, before all else.
#[unsafe(no_mangle)]
pub extern "C" fn stub_devices(count: u32) {
    device::make(count as usize);
}

/// Bytes of a device, those in use among them.
#[unsafe(no_mangle)]
pub extern "C" fn stub_set_memory(index: u32, bytes: u64) {
    let _ = device::with(index, |device| device.total = bytes);
}

/// Multiprocessors of a device.
#[unsafe(no_mangle)]
pub extern "C" fn stub_set_multiprocessors(index: u32, count: u32) {
    let _ = device::with(index, |device| device.multiprocessors = count);
}

/// The major number of a device's compute capability; 9 otherwise.
#[unsafe(no_mangle)]
pub extern "C" fn stub_set_capability(index: u32, major: u32) {
    let _ = device::with(index, |device| device.capability = major);
}

/// The version of CUDA that the driver says it is of, 1000 times the major number and 10 times the minor one; 12080
/// otherwise.
#[unsafe(no_mangle)]
pub extern "C" fn stub_set_version(version: i32) {
    device::VERSION.store(version, Ordering::Relaxed);
}

/// What `from` can do with the memory of `to`: 0 nothing, 1 all, 2 nothing though the driver says all.
#[unsafe(no_mangle)]
pub extern "C" fn stub_set_peer(from: u32, to: u32, kind: u32) {
    let kind = [Peer::Absent, Peer::Works, Peer::Lies].get(kind as usize).copied().unwrap_or(Peer::Absent);
    let _ = device::with(from, |device| {
        if let Some(place) = device.peers.get_mut(to as usize) {
            *place = kind;
        }
    });
}

/// Takes back all access between devices, which real contexts keep.
#[unsafe(no_mangle)]
pub extern "C" fn stub_forget_peers() {
    device::forget_peers();
}

/// Mends broken contexts: stands for a new process.
#[unsafe(no_mangle)]
pub extern "C" fn stub_heal() {
    device::heal_all();
}

/// Counts calls from now on. The `nth` of them gives `code`, and the `nth_kernel` kernel that runs does nothing and
/// breaks its device with `kernel_code`; 0 for none.
#[unsafe(no_mangle)]
pub extern "C" fn stub_arm(nth: u64, code: i32, nth_kernel: u64, kernel_code: i32) {
    faults::arm(nth, code, nth_kernel, kernel_code);
}

/// Counts no more. Writes the names of the calls, a line each, and stores how many kernels ran; gives the length of
/// the names, which may be more than was room for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stub_disarm(text: *mut c_char, room: usize, kernels: *mut u64) -> usize {
    let (calls, ran) = faults::disarm();
    // SAFETY: the caller's place, and a buffer as long as it says.
    unsafe {
        *kernels = ran;
        give(&calls.join("\n"), text, room)
    }
}

/// Lets calls and kernels sleep now and then: `chances` in 65536, at random from `seed`.
#[unsafe(no_mangle)]
pub extern "C" fn stub_stall(chances: u32, seed: u64) {
    faults::set_stalls(chances, seed);
}

/// Memory for a test's tensors: 0 plain, 1 of a pool, 2 mapped by hand, 3 pinned. 0 if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn stub_allocate(index: u32, bytes: u64, kind: u32) -> u64 {
    let home = if kind == 3 { Home::Pinned } else { Home::Device(index) };
    let context = if kind == 2 { 0 } else { device::handle(index) };
    memory::allocate(home, bytes, context, usize::from(kind == 1) * 0xb00, Class::Test).unwrap_or(0)
}

/// Frees memory of `stub_allocate`.
#[unsafe(no_mangle)]
pub extern "C" fn stub_free(address: u64) {
    let pinned = memory::around(address).is_some_and(|known| known.home == Home::Pinned);
    let _ = memory::free("stub_free", address, pinned);
}

/// Reads memory of the driver; 0 if all of it is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stub_peek(address: u64, bytes: usize, into: *mut u8) -> i32 {
    let Ok(Some((_, at))) = memory::known("stub_peek", address, bytes as u64) else { return 1 };
    // SAFETY: inside of an allocation, and the caller's buffer is as long.
    unsafe { at.copy_to(into, bytes) };
    0
}

/// Writes memory of the driver; 0 if all of it is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stub_poke(address: u64, bytes: usize, from: *const u8) -> i32 {
    let Ok(Some((_, at))) = memory::known("stub_poke", address, bytes as u64) else { return 1 };
    // SAFETY: as above.
    unsafe { at.copy_from(from, bytes) };
    0
}

/// A stream of the caller's, as torch makes them: `blocking` ones wait for the default stream.
#[unsafe(no_mangle)]
pub extern "C" fn stub_stream(index: u32, blocking: u32) -> usize {
    stream::create(index, blocking != 0, true)
}

/// Destroys a stream of `stub_stream`.
#[unsafe(no_mangle)]
pub extern "C" fn stub_destroy_stream(handle: usize) {
    let _ = stream::destroy("stub_destroy_stream", handle);
}

/// Waits for all work of a device.
#[unsafe(no_mangle)]
pub extern "C" fn stub_drain(index: u32) {
    stream::drain(index);
}

/// The context of a device, to make it current.
#[unsafe(no_mangle)]
pub extern "C" fn stub_context(index: u32) -> usize {
    let borrow = |device: &mut device::Device| {
        // Once for good.
        device.references += 1 - device.borrowed.min(1);
        device.borrowed = 1;
    };
    let _ = device::with(index, borrow);
    device::handle(index)
}

/// How many contexts lie on this thread's stack.
#[unsafe(no_mangle)]
pub extern "C" fn stub_depth() -> u32 {
    device::depth()
}

/// What the tested code holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stub_ledger(ledger: *mut Ledger) {
    let (streams, events) = stream::live();
    let context_references = device::all().iter().map(|device| device.references - device.borrowed).sum();
    let mut now = Ledger {
        streams,
        events,
        modules: ptx::live(),
        context_references,
        graphs: graph::live(),
        ..Ledger::default()
    };
    memory::live(|known| match (known.class, known.home) {
        (Class::Driver, Home::Device(_)) => {
            now.device_allocations += 1;
            now.device_bytes += known.bytes;
        }
        (Class::Driver, Home::Pinned) => now.pinned_allocations += 1,
        _ => {}
    });
    // SAFETY: the caller's place.
    unsafe { ledger.write(now) };
}

/// Writes what was done wrong since the last time, a line each, and gives its length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stub_violations(text: *mut c_char, room: usize) -> usize {
    // SAFETY: a buffer as long as the caller says.
    unsafe { give(&report::take().join("\n"), text, room) }
}

unsafe fn give(from: &str, text: *mut c_char, room: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe { text.cast::<u8>().copy_from(from.as_ptr(), from.len().min(room)) };
    from.len()
}
