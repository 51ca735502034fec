//! All memory that the driver knows: of devices and pinned memory of the host.
//!
//! Memory of a device has an address that the host cannot use, as on a real machine; what it holds lies elsewhere.
//! Freed memory is filled with a pattern and its addresses are never given out again, so that whoever still uses it
//! is found.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError, RwLock};

use crate::codes::{ILLEGAL_ADDRESS, INVALID_VALUE, MISALIGNED_ADDRESS, OUT_OF_MEMORY, Result};
use crate::device::{self, Peer};
use crate::report::misuse;

unsafe extern "C" {
    fn mmap(at: *mut c_void, bytes: usize, access: i32, flags: i32, file: i32, offset: i64) -> *mut c_void;
    fn mprotect(at: *mut c_void, bytes: usize, access: i32) -> i32;
}

const NO_ACCESS: i32 = 0;
const READ_AND_WRITE: i32 = 3;
/// `MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE`
const OF_ITS_OWN: i32 = 0x2 | 0x20 | 0x4000;
/// `MAP_FIXED`
const IN_PLACE: i32 = 0x10;
const PAGE: usize = 4096;
/// Freed memory that keeps its pattern; older one is given to the system.
const POISONED: usize = 16;
const POISON: u8 = 0xdb;

/// Where memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Home {
    Device(u32),
    Pinned,
}

/// Who asked for it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The code that is tested; the ledger counts it.
    Driver,
    /// A test, for its tensors.
    Test,
    /// Variables of a module.
    Module,
}

#[derive(Clone)]
pub(crate) struct Allocation {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    /// Where its content lies.
    storage: usize,
    pub(crate) home: Home,
    /// The context that it was allocated in plainly; 0 for memory that was mapped by hand.
    pub(crate) context: usize,
    /// The pool that it came from.
    pub(crate) pool: usize,
    pub(crate) class: Class,
    freed: bool,
}

static ALL: RwLock<BTreeMap<u64, Allocation>> = RwLock::new(BTreeMap::new());
static LATELY_FREED: Mutex<VecDeque<(usize, usize)>> = Mutex::new(VecDeque::new());

fn pages(bytes: u64) -> usize {
    (bytes as usize).next_multiple_of(PAGE)
}

/// Allocates; the content is random for memory of a device, as far as a caller may rely on it.
pub(crate) fn allocate(home: Home, bytes: u64, context: usize, pool: usize, class: Class) -> Result<u64> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    if let Home::Device(device) = home {
        device::reserve(device, bytes)?;
    }
    let length = pages(bytes);
    let (whole, first) = match home {
        // The address, which nobody can read, and the content behind it.
        Home::Device(_) => (2 * length, NO_ACCESS),
        Home::Pinned => (length, READ_AND_WRITE),
    };
    // SAFETY: a new mapping at an address of the system's choice.
    let start = unsafe { mmap(std::ptr::null_mut(), whole, first, OF_ITS_OWN, -1, 0) };
    let start = start.expose_provenance();
    let storage = start + (whole - length);
    // SAFETY: the second half of the mapping of just now.
    if start == usize::MAX || unsafe { mprotect(pointer(storage).cast(), length, READ_AND_WRITE) } != 0 {
        return Err(OUT_OF_MEMORY);
    }
    if class == Class::Driver && matches!(home, Home::Device(_)) {
        // What is not cleared holds what others left there.
        // SAFETY: as long as the mapping, and known to nobody yet.
        unsafe { pointer(storage).write_bytes(POISON, (bytes as usize).min(PAGE)) };
    }
    let start = start as u64;
    let allocation = Allocation { start, bytes, storage, home, context, pool, class, freed: false };
    ALL.write().unwrap_or_else(PoisonError::into_inner).insert(start, allocation);
    Ok(start)
}

fn pointer(address: usize) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address)
}

/// Frees what begins at an address. `pinned` tells which of the two functions was called.
pub(crate) fn free(call: &str, start: u64, pinned: bool) -> Result {
    let (storage, bytes) = {
        let mut all = ALL.write().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = all.get_mut(&start) else {
            return Err(misuse(INVALID_VALUE, format!("{call} of {start:#x}, which was never allocated")));
        };
        if known.freed {
            return Err(misuse(INVALID_VALUE, format!("{call} of {start:#x}, which was freed before")));
        }
        if (known.home == Home::Pinned) != pinned {
            return Err(misuse(INVALID_VALUE, format!("{call} of {start:#x}, which is {:?}", known.home)));
        }
        known.freed = true;
        if let Home::Device(device) = known.home {
            device::give_back(device, known.bytes);
        }
        (known.storage, known.bytes)
    };
    // SAFETY: the mapping of the allocation, which stays for good.
    unsafe { pointer(storage).write_bytes(POISON, bytes as usize) };
    let mut lately = LATELY_FREED.lock().unwrap_or_else(PoisonError::into_inner);
    let (first, length) = (start as usize, pages(bytes));
    lately.push_back((first, storage - first + length));
    if lately.len() > POISONED
        && let Some((start, whole)) = lately.pop_front()
    {
        // A new mapping in its place holds no memory and joins its neighbours: a process may have so many only.
        // SAFETY: as above; nobody may use it any more.
        unsafe { mmap(pointer(start).cast(), whole, NO_ACCESS, OF_ITS_OWN | IN_PLACE, -1, 0) };
    }
    Ok(())
}

/// The allocation that an address lies in, freed or not.
pub(crate) fn around(address: u64) -> Option<Allocation> {
    let all = ALL.read().unwrap_or_else(PoisonError::into_inner);
    let (_, found) = all.range(..=address).next_back()?;
    (address < found.start + found.bytes).then(|| found.clone())
}

/// All that is allocated.
pub(crate) fn live(count: impl FnMut(&Allocation)) {
    let all = ALL.read().unwrap_or_else(PoisonError::into_inner);
    all.values().filter(|known| !known.freed).for_each(count);
}

/// Where bytes of the driver's memory lie, or what is wrong with them.
fn inside(address: u64, bytes: u64) -> std::result::Result<(Allocation, *mut u8), String> {
    let Some(known) = around(address) else { return Err(format!("{address:#x} is no memory of the driver")) };
    if known.freed {
        return Err(format!("{address:#x} was freed"));
    }
    if address + bytes > known.start + known.bytes {
        let (start, length) = (known.start, known.bytes);
        return Err(format!("{bytes} bytes at {address:#x} reach beyond the {length} at {start:#x}"));
    }
    let at = pointer(known.storage + (address - known.start) as usize);
    Ok((known, at))
}

/// Memory of a device or pinned memory, for copies. `None` for memory that the driver does not know.
pub(crate) fn known(call: &str, address: u64, bytes: u64) -> Result<Option<(Home, *mut u8)>> {
    if around(address).is_none() {
        return Ok(None);
    }
    match inside(address, bytes) {
        Ok((known, at)) => Ok(Some((known.home, at))),
        Err(problem) => Err(misuse(INVALID_VALUE, format!("{call}: {problem}"))),
    }
}

/// Memory of a device, for copies in that device's context.
pub(crate) fn of_device(call: &str, device: u32, address: u64, bytes: u64) -> Result<*mut u8> {
    match known(call, address, bytes)? {
        Some((Home::Device(owner), at)) if owner == device => Ok(at),
        Some((home, _)) => {
            Err(misuse(INVALID_VALUE, format!("{call}: {address:#x} is {home:?}, not of device {device}")))
        }
        None => Err(misuse(INVALID_VALUE, format!("{call}: {address:#x} is no memory of a device"))),
    }
}

/// What a kernel finds at an address: `None` where a driver lied about a peer.
pub(crate) fn seen_by(device: u32, address: u64, bytes: u64, align: u64) -> Result<Option<*mut u8>> {
    // The kernels of a broken context do no more.
    match device::broken(device) {
        0 => {}
        code => return Err(code),
    }
    if !address.is_multiple_of(align) {
        let text = format!("kernel on device {device}: {address:#x} accessed in units of {align} bytes");
        return Err(misuse(MISALIGNED_ADDRESS, text));
    }
    let refuse = |problem: String| misuse(ILLEGAL_ADDRESS, format!("kernel on device {device}: {problem}"));
    let (known, at) = inside(address, bytes).map_err(refuse)?;
    let Home::Device(owner) = known.home else { return Ok(Some(at)) };
    if owner == device {
        return Ok(Some(at));
    }
    if known.pool != 0 || known.context == 0 {
        return Err(refuse(format!("{address:#x} of device {owner} is not shared with peers")));
    }
    match device::access(device, owner) {
        Peer::Works => Ok(Some(at)),
        Peer::Lies => Ok(None),
        Peer::Absent => {
            Err(refuse(format!("{address:#x} is device {owner}'s, to which access is not enabled")))
        }
    }
}
