//! Copies. Host memory that is not pinned is read before the call returns, and written before it returns.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver;
use crate::codes::{INVALID_VALUE, Result};
use crate::device;
use crate::faults::stall;
use crate::memory::{self, Home};
use crate::report::misuse;
use crate::stream::{self, Stream};

/// Rows of bytes on one side of a copy.
#[derive(Clone, Copy)]
struct Rows {
    at: u64,
    pitch: u64,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Description {
    src_x: usize,
    src_y: usize,
    src_kind: u32,
    src_host: *const c_void,
    src_device: u64,
    src_array: usize,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_kind: u32,
    dst_host: *mut c_void,
    dst_device: u64,
    dst_array: usize,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

const HOST: u32 = 1;
const DEVICE: u32 = 2;

/// A copy between a device and the host.
#[derive(Clone, Copy)]
struct Copy {
    call: &'static str,
    device: u32,
    there: Rows,
    host: Rows,
    to_host: bool,
    width: u64,
    height: u64,
}

impl Copy {
    fn extent(&self, rows: Rows) -> u64 {
        if self.height == 0 { 0 } else { (self.height - 1) * rows.pitch + self.width }
    }

    /// Where the device's side lies.
    fn device_side(&self) -> Result<*mut u8> {
        memory::of_device(self.call, self.device, self.there.at, self.extent(self.there))
    }

    /// Whether the host's side is pinned, after a look at whether all of it is there.
    fn pinned(&self) -> Result<bool> {
        match memory::known(self.call, self.host.at, self.extent(self.host).max(1))? {
            Some((Home::Pinned, _)) => Ok(true),
            Some((home, _)) => {
                Err(misuse(INVALID_VALUE, format!("{}: host memory that is {home:?}", self.call)))
            }
            None => Ok(false),
        }
    }

    /// Moves the rows, from or to `host`.
    fn do_rows(&self, host: *mut u8, pitch: u64) {
        let Ok(there) = self.device_side() else { return };
        for row in 0..self.height {
            // SAFETY: both sides have so many rows of so many bytes.
            unsafe {
                let host = host.add((row * pitch) as usize);
                let there = there.add((row * self.there.pitch) as usize);
                let (from, to) = if self.to_host { (there, host) } else { (host, there) };
                to.copy_from(from, self.width as usize);
            }
        }
    }

    fn queue(self, stream: &Arc<Stream>) -> Result {
        if self.width == 0 || self.height == 0 {
            return Ok(());
        }
        if self.height > 1 && self.width > self.there.pitch.min(self.host.pitch) {
            return Err(misuse(INVALID_VALUE, format!("{}: rows wider than their pitch", self.call)));
        }
        self.device_side()?;
        let (pinned, captured) = (self.pinned()?, stream.capture().is_some());
        let host = std::ptr::with_exposed_provenance_mut::<u8>(self.host.at as usize);
        if pinned || captured {
            let (at, pitch) = (self.host.at as usize, self.host.pitch);
            return stream.give(Arc::new(move || {
                // Copies take longer than calls.
                (0..20).for_each(|_| stall());
                if pinned && self.pinned().is_err() {
                    return;
                }
                self.do_rows(std::ptr::with_exposed_provenance_mut(at), pitch);
            }));
        }
        if self.to_host {
            let (at, pitch) = (self.host.at as usize, self.host.pitch);
            stream.give(Arc::new(move || self.do_rows(std::ptr::with_exposed_provenance_mut(at), pitch)))?;
            stream.mark().wait();
            return Ok(());
        }
        let mut staged = vec![0; (self.width * self.height) as usize];
        for (row, bytes) in staged.chunks_exact_mut(self.width as usize).enumerate() {
            // SAFETY: the caller's rows, which are there until the call returns.
            unsafe { host.add(row * self.host.pitch as usize).copy_to(bytes.as_mut_ptr(), bytes.len()) };
        }
        stream.give(Arc::new(move || self.do_rows(staged.as_ptr().cast_mut(), self.width)))
    }
}

fn linear(call: &'static str, there: u64, host: u64, bytes: usize, to_host: bool, on: usize) -> Result {
    let device = device::current(call)?;
    let width = bytes as u64;
    let rows = |at| Rows { at, pitch: width };
    let copy = Copy { call, device, there: rows(there), host: rows(host), to_host, width, height: 1 };
    copy.queue(&stream::find(call, on, device)?)
}

driver! {
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, on: usize) {
        linear("cuMemcpyHtoDAsync_v2", to, from.expose_provenance() as u64, bytes, false, on)
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, on: usize) {
        linear("cuMemcpyDtoHAsync_v2", from, to.expose_provenance() as u64, bytes, true, on)
    }

    fn cuMemcpy2DAsync_v2(description: *const Description, on: usize) {
        let call = "cuMemcpy2DAsync_v2";
        let device = device::current(call)?;
        // SAFETY: the caller's description.
        let copy = unsafe { description.read() };
        let offset = |x: usize, y: usize, pitch: usize| (x + y * pitch) as u64;
        let source = offset(copy.src_x, copy.src_y, copy.src_pitch);
        let target = offset(copy.dst_x, copy.dst_y, copy.dst_pitch);
        let (there, host, to_host) = match (copy.src_kind, copy.dst_kind) {
            (DEVICE, HOST) => {
                let host = copy.dst_host.expose_provenance() as u64 + target;
                let there = Rows { at: copy.src_device + source, pitch: copy.src_pitch as u64 };
                (there, Rows { at: host, pitch: copy.dst_pitch as u64 }, true)
            }
            (HOST, DEVICE) => {
                let host = copy.src_host.expose_provenance() as u64 + source;
                let there = Rows { at: copy.dst_device + target, pitch: copy.dst_pitch as u64 };
                (there, Rows { at: host, pitch: copy.src_pitch as u64 }, false)
            }
            kinds => return Err(misuse(INVALID_VALUE, format!("{call} between kinds {kinds:?}"))),
        };
        let (width, height) = (copy.width as u64, copy.height as u64);
        let copy = Copy { call, device, there, host, to_host, width, height };
        copy.queue(&stream::find(call, on, device)?)
    }
}
