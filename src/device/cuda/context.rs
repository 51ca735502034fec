//! The primary context of a device, which torch and every other user of the runtime share.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute};

use super::calls::{check, log_failure};
use crate::error::{Error, Result};

/// A device's primary context, kept alive.
#[derive(Debug)]
pub(crate) struct Context {
    index: u32,
    device: CUdevice,
    primary: CUcontext,
}

// SAFETY: a context handle may be used from every thread.
unsafe impl Send for Context {}
// SAFETY: as above; the driver does its own locking.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of a device, and makes it if nobody has yet.
    pub(crate) fn open(index: u32) -> Result<Arc<Self>> {
        let count = super::probe::count()?;
        if index as usize >= count {
            let wanted = match count {
                0 => "\"cpu\": no CUDA device or no driver of CUDA 12.2 or later was found".to_owned(),
                1 => "\"cuda:0\" or \"cpu\", which are all there are".to_owned(),
                _ => format!("\"cuda:0\" to \"cuda:{}\", or \"cpu\"", count - 1),
            };
            return Err(Error::invalid("devices", format!("\"cuda:{index}\""), wanted));
        }
        let mut device = 0;
        // SAFETY: `device` is a valid place for a device handle.
        let code = unsafe { sys::cuDeviceGet(&raw mut device, i32::try_from(index).unwrap_or(i32::MAX)) };
        check("cuDeviceGet", Some(index as usize), code)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a valid place for a handle; released in Drop.
        let code = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
        check("cuDevicePrimaryCtxRetain", Some(index as usize), code)?;
        Ok(Arc::new(Self { index, device, primary: context }))
    }

    /// The device's index.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    pub(super) fn device(&self) -> CUdevice {
        self.device
    }

    pub(super) fn raw(&self) -> CUcontext {
        self.primary
    }

    /// An error of a call on this device.
    pub(crate) fn check(&self, call: &'static str, code: sys::CUresult) -> Result<()> {
        check(call, Some(self.index as usize), code)
    }

    /// Makes the context current on this thread until the guard is dropped. Costs next to nothing where it is
    /// already.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        let mut current = std::ptr::null_mut();
        // SAFETY: `current` is a valid place for a handle.
        let code = unsafe { sys::cuCtxGetCurrent(&raw mut current) };
        self.check("cuCtxGetCurrent", code)?;
        let pushed = current != self.primary;
        if pushed {
            // SAFETY: the context is retained for as long as `self` lives, and the guard borrows it.
            let code = unsafe { sys::cuCtxPushCurrent_v2(self.primary) };
            self.check("cuCtxPushCurrent_v2", code)?;
        }
        Ok(Entered { context: self, pushed })
    }

    /// As `enter`, for giving something back, which nobody does later: tries once more, and lets the caller go on without
    /// it, since the driver knows from most handles where they belong.
    pub(super) fn enter_to_free(&self) -> Option<Entered<'_>> {
        self.enter()
            .or_else(|error| {
                tracing::warn!(%error, "trying again to enter the context, to give something back");
                self.enter()
            })
            .ok()
    }

    /// Waits for all work of the process on the device.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the context is current.
        self.check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    fn attribute(&self, which: Attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: `value` is a valid place for an int and the device handle came from the driver.
        let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, self.device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Multiprocessors of the device.
    pub(crate) fn multiprocessors(&self) -> Result<u32> {
        let value = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(u32::try_from(value).unwrap_or(1).max(1))
    }

    /// Whether a kernel can be started while the one before it on its stream ends, in captures too: devices since compute
    /// capability 9.0, with drivers since CUDA 12.3, which were the first to capture that.
    pub(crate) fn overlaps(&self) -> Result<bool> {
        const CAPTURED_SINCE: i32 = 12_030;
        let mut version = 0;
        // SAFETY: `version` is a valid place for an int.
        let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
        self.check("cuDriverGetVersion", code)?;
        let major = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        Ok(major >= 9 && version >= CAPTURED_SINCE)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: gives back what `open` retained.
        let code = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        log_failure(self.check("cuDevicePrimaryCtxRelease_v2", code));
    }
}

/// Keeps a context current.
#[must_use]
pub(crate) struct Entered<'a> {
    context: &'a Context,
    pushed: bool,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: undoes the push of `enter`; what lies below is the caller's.
            let code = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
            log_failure(self.context.check("cuCtxPopCurrent_v2", code));
        }
    }
}
