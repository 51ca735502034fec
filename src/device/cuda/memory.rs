//! Memory of devices and pinned memory of the host, freed when dropped.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUdeviceptr, CUstream};

use super::calls::log_failure;
use super::context::Context;
use super::stream::OwnStream;
use crate::error::{Error, Result};

/// Zeroed device memory.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: Arc<Context>,
    address: CUdeviceptr,
}

impl DeviceMemory {
    /// Allocates and zeroes. `stream` is one of this device; the memory is ready on return.
    pub(crate) fn zeroed(context: &Arc<Context>, bytes: usize, stream: &OwnStream) -> Result<Self> {
        let _current = context.enter()?;
        let mut address = 0;
        // SAFETY: `address` is a valid place for a pointer, and the context is current.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
        context.check("cuMemAlloc_v2", code)?;
        let memory = Self { context: Arc::clone(context), address };
        // SAFETY: the memory was allocated just now and is as long.
        let code = unsafe { sys::cuMemsetD8Async(address, 0, bytes, stream.raw()) };
        context.check("cuMemsetD8Async", code)?;
        stream.synchronize()?;
        Ok(memory)
    }

    /// The address, which all devices with access share.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _current = self.context.enter_to_free();
        // SAFETY: the memory is this object's, and the driver waits for work on it.
        let code = unsafe { sys::cuMemFree_v2(self.address) };
        log_failure(self.context.check("cuMemFree_v2", code));
    }
}

/// Zeroed host memory that no device has to wait for: pinned, known to all contexts, and mapped.
#[derive(Debug)]
pub(crate) struct PinnedMemory {
    context: Arc<Context>,
    memory: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory belongs to the process, not to a thread; accesses go through raw pointers.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Allocates and zeroes.
    pub(crate) fn zeroed(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _current = context.enter()?;
        let mut memory = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `memory` is a valid place for a pointer, and the context is current.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes, flags) };
        context.check("cuMemHostAlloc", code)?;
        let pinned = Self { context: Arc::clone(context), memory, bytes };
        // SAFETY: the memory was allocated just now and is as long.
        unsafe { pinned.memory.cast::<u8>().write_bytes(0, bytes) };
        Ok(pinned)
    }

    /// The word of 4 bytes at `index`, as a device may have written it just now; 0 beyond the end.
    pub(crate) fn word(&self, index: usize) -> u32 {
        self.at(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets a word for devices to see. Beyond the end nothing happens.
    pub(crate) fn set_word(&self, index: usize, value: u32) {
        if let Some(word) = self.at(index) {
            word.store(value, Ordering::Release);
        }
    }

    fn at(&self, index: usize) -> Option<&AtomicU32> {
        if index >= self.bytes / size_of::<u32>() {
            return None;
        }
        // SAFETY: the word is inside the allocation, which is aligned to pages, and all accesses of the host are
        // atomic.
        Some(unsafe { AtomicU32::from_ptr(self.memory.cast::<u32>().add(index)) })
    }

    /// Where the bytes from `at` on lie; `None` unless all `bytes` of them do.
    fn place(&self, at: usize, bytes: usize) -> Option<*mut c_void> {
        let fits = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        // SAFETY: inside of the allocation.
        fits.then(|| unsafe { self.memory.cast::<u8>().add(at).cast() })
    }

    /// Lets the copy engine write `bytes` of device memory to the place `at`, in the order of a stream.
    ///
    /// # Safety
    /// `from` is memory of the context's device and the stream one of its own; both are alive until it is done, and
    /// nobody else uses the place.
    pub(crate) unsafe fn fill(
        &self,
        context: &Context,
        stream: CUstream,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<()> {
        let Some(to) = self.place(at, bytes) else { return Err(self.beyond(at, bytes)) };
        let _current = context.enter()?;
        // SAFETY: the caller's promise; the place was checked.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream) };
        context.check("cuMemcpyDtoHAsync_v2", code)
    }

    /// Lets the copy engine read `bytes` from the place `at` to device memory, in the order of a stream.
    ///
    /// # Safety
    /// As for `fill`.
    pub(crate) unsafe fn fetch(
        &self,
        context: &Context,
        stream: CUstream,
        at: usize,
        to: u64,
        bytes: usize,
    ) -> Result<()> {
        let Some(from) = self.place(at, bytes) else { return Err(self.beyond(at, bytes)) };
        let _current = context.enter()?;
        // SAFETY: as above.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream) };
        context.check("cuMemcpyHtoDAsync_v2", code)
    }

    fn beyond(&self, at: usize, bytes: usize) -> Error {
        Error::invalid(
            "staged chunk",
            format!("{bytes} bytes at {at}"),
            format!("inside of {} bytes", self.bytes),
        )
    }

    /// The address for the devices. The same as the host's wherever addresses are unified.
    pub(crate) fn address(&self, context: &Context) -> Result<u64> {
        let _current = context.enter()?;
        let mut address = 0;
        // SAFETY: `address` is a valid place for a pointer; the memory is mapped.
        let code = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut address, self.memory, 0) };
        context.check("cuMemHostGetDevicePointer_v2", code)?;
        Ok(address)
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let _current = self.context.enter_to_free();
        // SAFETY: the memory is this object's.
        let code = unsafe { sys::cuMemFreeHost(self.memory) };
        log_failure(self.context.check("cuMemFreeHost", code));
    }
}

/// Copies words from a device and waits for them.
pub(crate) fn read(context: &Context, stream: &OwnStream, address: u64, words: &mut [u32]) -> Result<()> {
    let _current = context.enter()?;
    let bytes = size_of_val(words);
    // SAFETY: the host's place has as many bytes and is borrowed until the copy is done; the caller's address is one
    // of this device with as many.
    let code = unsafe { sys::cuMemcpyDtoHAsync_v2(words.as_mut_ptr().cast(), address, bytes, stream.raw()) };
    context.check("cuMemcpyDtoHAsync_v2", code)?;
    stream.synchronize()
}

/// Copies a plain structure to a device and waits until it is there.
///
/// # Safety
/// `address` is memory of the device with room for a `T`, and `T` has no padding that matters.
pub(crate) unsafe fn write<T: Copy>(
    context: &Context,
    stream: &OwnStream,
    address: u64,
    value: &T,
) -> Result<()> {
    let _current = context.enter()?;
    // SAFETY: the caller's promise; `value` is borrowed until the copy is done.
    let code = unsafe {
        sys::cuMemcpyHtoDAsync_v2(address, std::ptr::from_ref(value).cast(), size_of::<T>(), stream.raw())
    };
    context.check("cuMemcpyHtoDAsync_v2", code)?;
    stream.synchronize()
}
