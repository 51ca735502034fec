//! Devices and contexts.

use std::ffi::c_char;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{driver, store};
use crate::codes::{
    self, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED,
    PEER_ACCESS_ALREADY_ENABLED, PEER_ACCESS_UNSUPPORTED, Result,
};
use crate::device::{self, Peer};
use crate::faults::{self, Failing};
use crate::report::{misuse, violation};
use crate::{graph, stream};

static INITIALIZED: AtomicBool = AtomicBool::new(false);

fn known(device: i32) -> Result<u32> {
    if !INITIALIZED.load(Ordering::Acquire) {
        return Err(misuse(NOT_INITIALIZED, "a device was asked for before cuInit"));
    }
    let index = u32::try_from(device).map_err(|_| INVALID_DEVICE)?;
    device::with(index, |_| index)
}

driver! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if device::all().is_empty() {
            return Err(NO_DEVICE);
        }
        INITIALIZED.store(true, Ordering::Release);
        Ok(())
    }

    fn cuDriverGetVersion(version: *mut i32) {
        store(version, device::VERSION.load(Ordering::Relaxed))
    }

    fn cuDeviceGetCount(count: *mut i32) {
        store(count, device::all().len() as i32)
    }

    fn cuDeviceGet(place: *mut i32, ordinal: i32) {
        known(ordinal)?;
        store(place, ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, length: i32, device: i32) {
        let text = format!("Stub {}\0", known(device)?);
        for (index, byte) in text.bytes().take(length as usize).enumerate() {
            // SAFETY: the caller's buffer is as long as it says.
            unsafe { name.add(index).write(byte as c_char) };
        }
        Ok(())
    }

    fn cuDeviceGetAttribute(value: *mut i32, which: i32, device: i32) {
        let index = known(device)?;
        let (processors, major) = device::with(index, |device| (device.multiprocessors, device.capability))?;
        store(value, match which {
            16 => processors as i32,
            36 => 1_000_000,  // kHz of the memory's clock
            37 => 512,        // bits of its bus
            75 => major as i32, // compute capability
            76 | 84 => 0,     // its minor number; no multicast
            102 | 115 | 41 => 1, // virtual memory, pools, unified addresses
            _ => return Err(INVALID_VALUE),
        })
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) {
        store(bytes, device::with(known(device)?, |device| device.total)? as usize)
    }

    fn cuDeviceCanAccessPeer(can: *mut i32, from: i32, to: i32) {
        let (from, to) = (known(from)?, known(to)?);
        let peer = device::with(from, |device| device.peers.get(to as usize).copied())?;
        store(can, i32::from(from != to && peer.is_some_and(|peer| peer != Peer::Absent)))
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let device = device::current("cuMemGetInfo_v2")?;
        let (used, all) = device::with(device, |device| (device.used, device.total))?;
        store(free, (all - used) as usize)?;
        store(total, all as usize)
    }

    fn cuCtxGetCurrent(context: *mut usize) {
        store(context, device::top_handle())
    }

    /// For tests: replaces what is current.
    fn cuCtxSetCurrent(context: usize) {
        device::pop();
        if context != 0 {
            device::of_handle(context).ok_or(INVALID_CONTEXT)?;
            device::push(context);
        }
        Ok(())
    }

    fn cuCtxSynchronize() {
        // The work of a broken context is over at once, but it is waited for.
        let device = device::holder("cuCtxSynchronize")?;
        graph::allowed()?;
        stream::drain(device);
        match device::broken(device) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    fn cuCtxEnablePeerAccess(peer: usize, flags: u32) {
        let from = device::current("cuCtxEnablePeerAccess")?;
        let to = device::of_handle(peer).ok_or(INVALID_CONTEXT)?;
        if flags != 0 || from == to {
            return Err(INVALID_VALUE);
        }
        let can = device::with(from, |device| device.peers.get(to as usize).copied())?;
        if can.is_none_or(|peer| peer == Peer::Absent) {
            return Err(PEER_ACCESS_UNSUPPORTED);
        }
        if device::enable(from, to) { Err(PEER_ACCESS_ALREADY_ENABLED) } else { Ok(()) }
    }
}

driver! {
    give_back fn cuCtxPopCurrent_v2(context: *mut usize) {
        let Some(popped) = device::pop() else {
            return Err(misuse(INVALID_CONTEXT, "cuCtxPopCurrent_v2 of an empty stack"));
        };
        if context.is_null() { Ok(()) } else { store(context, popped) }
    }
}

/// Retains the primary context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: i32) -> i32 {
    faults::call_on("cuDevicePrimaryCtxRetain", Failing::Instead, u32::try_from(device).ok(), || {
        let index = known(device)?;
        device::with(index, |device| device.references += 1)?;
        store(context, device::handle(index))
    })
}

/// Releases the primary context; the last release ends it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> i32 {
    faults::call_on("cuDevicePrimaryCtxRelease_v2", Failing::Afterwards, u32::try_from(device).ok(), || {
        let index = known(device)?;
        let left = device::with(index, |device| {
            let before = device.references;
            device.references = before.saturating_sub(1);
            before.checked_sub(1)
        })?;
        let Some(left) = left else {
            return Err(misuse(
                INVALID_CONTEXT,
                format!("device {index} was released more often than retained"),
            ));
        };
        let leftovers = if left == 0 { crate::control::leftovers(index) } else { 0 };
        if leftovers > 0 {
            violation(format!(
                "the context of device {index} was released with {leftovers} allocations in it"
            ));
        }
        Ok(())
    })
}

/// Makes a context current on top of what is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPushCurrent_v2(context: usize) -> i32 {
    faults::call_on("cuCtxPushCurrent_v2", Failing::Instead, device::of_handle(context), || {
        let device = device::of_handle(context).ok_or(INVALID_CONTEXT)?;
        if device::with(device, |device| device.references)? == 0 {
            return Err(misuse(
                codes::CONTEXT_IS_DESTROYED,
                format!("device {device}'s context is not retained"),
            ));
        }
        device::push(context);
        Ok(())
    })
}

/// The driver's name of an error. Not counted: it looks up a table.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: i32, name: *mut *const c_char) -> i32 {
    let Some(text) = codes::name(code) else { return INVALID_VALUE };
    store(name, text.as_ptr().cast()).err().unwrap_or(0)
}
