//! Memory, and what is known of addresses.

use std::ffi::c_void;
use std::sync::Arc;

use super::{driver, store};
use crate::codes::{INVALID_VALUE, Result};
use crate::memory::{Class, Home};
use crate::report::misuse;
use crate::{device, graph, memory, stream};

driver! {
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        let device = device::current("cuMemAlloc_v2")?;
        graph::allowed()?;
        let context = device::handle(device);
        store(address, memory::allocate(Home::Device(device), bytes as u64, context, 0, Class::Driver)?)
    }

    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: u32) {
        let device = device::current("cuMemHostAlloc")?;
        graph::allowed()?;
        if flags & !7 != 0 {
            return Err(INVALID_VALUE);
        }
        let at = memory::allocate(Home::Pinned, bytes as u64, device::handle(device), 0, Class::Driver)?;
        store(address, std::ptr::with_exposed_provenance_mut(at as usize))
    }

    fn cuMemHostGetDevicePointer_v2(address: *mut u64, host: *mut c_void, flags: u32) {
        device::current("cuMemHostGetDevicePointer_v2")?;
        let at = host.expose_provenance() as u64;
        let known = memory::known("cuMemHostGetDevicePointer_v2", at, 1)?;
        if flags != 0 || known.is_none_or(|(home, _)| home != Home::Pinned) {
            return Err(INVALID_VALUE);
        }
        store(address, at)
    }

    fn cuMemsetD8Async(address: u64, value: u8, bytes: usize, on: usize) {
        let call = "cuMemsetD8Async";
        let device = device::current(call)?;
        let queue = stream::find(call, on, device)?;
        memory::of_device(call, device, address, bytes as u64)?;
        queue.give(Arc::new(move || {
            if let Ok(at) = memory::of_device(call, device, address, bytes as u64) {
                // SAFETY: inside of an allocation of this device.
                unsafe { at.write_bytes(value, bytes) };
            }
        }))
    }

    fn cuPointerGetAttributes(count: u32, which: *const i32, places: *const *mut c_void, address: u64) {
        device::current("cuPointerGetAttributes")?;
        let known = memory::around(address);
        if known.is_some() {
            // Asking about freed memory is misuse.
            memory::known("cuPointerGetAttributes", address, 1)?;
        }
        for index in 0..count as usize {
            // SAFETY: the caller's lists have `count` entries.
            let (which, place) = unsafe { (which.add(index).read(), places.add(index).read()) };
            match (which, &known) {
                // An address that is not known gives zeros.
                (1, known) => store(place.cast(), known.as_ref().map_or(0, |known| known.context))?,
                (2, known) => store(place.cast::<u32>(), match known.as_ref().map(|known| known.home) {
                    Some(Home::Pinned) => 1,
                    Some(Home::Device(_)) => 2,
                    None => 0,
                })?,
                (9, known) => store(place.cast::<i32>(), match known.as_ref().map(|known| known.home) {
                    Some(Home::Device(device)) => device as i32,
                    _ => 0,
                })?,
                (17, known) => store(place.cast(), known.as_ref().map_or(0, |known| known.pool))?,
                _ => return Err(misuse(INVALID_VALUE, format!("pointer attribute {which} is not known here"))),
            }
        }
        Ok(())
    }
}

fn free(call: &str, address: u64, pinned: bool) -> Result {
    let current = device::holder(call)?;
    graph::allowed()?;
    // The real driver waits for what the device does.
    let home = memory::around(address).map(|known| known.home);
    let owner = if let Some(Home::Device(device)) = home { device } else { current };
    stream::drain(owner);
    memory::free(call, address, pinned)?;
    match device::broken(owner) {
        0 => Ok(()),
        code => Err(code),
    }
}

driver! {
    give_back fn cuMemFree_v2(address: u64) {
        free("cuMemFree_v2", address, false)
    }

    give_back fn cuMemFreeHost(address: *mut c_void) {
        free("cuMemFreeHost", address.expose_provenance() as u64, true)
    }
}
