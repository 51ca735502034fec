//! The CUDA driver, looked for before it is called: cudarc panics where the library or a symbol is missing.

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::calls::check;
use super::context::Context;
use crate::device::CudaDevice;
use crate::error::Result;

/// What this crate calls, under the versioned names that cudarc looks up.
const SYMBOLS: [&CStr; 42] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuGetErrorName",
    c"cuDeviceGet",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDeviceGetAttribute",
    c"cuDeviceTotalMem_v2",
    c"cuDeviceCanAccessPeer",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxGetCurrent",
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuCtxSynchronize",
    c"cuCtxEnablePeerAccess",
    c"cuMemGetInfo_v2",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemHostAlloc",
    c"cuMemFreeHost",
    c"cuMemHostGetDevicePointer_v2",
    c"cuMemsetD8Async",
    c"cuMemcpy2DAsync_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuPointerGetAttributes",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamWaitEvent",
    c"cuStreamIsCapturing",
    c"cuEventCreate",
    c"cuEventDestroy_v2",
    c"cuEventRecord",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuModuleGetFunction",
    c"cuModuleGetGlobal_v2",
    c"cuFuncGetAttribute",
    c"cuLaunchKernel",
    c"cuLaunchKernelEx",
];

/// Whether a driver with everything that is called here can be loaded. Looked up once: a search that fails tries
/// dozens of names.
fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        let names = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
        names.into_iter().any(|name| {
            // SAFETY: the driver's initialisers may run; that is what loading it for use does in any case.
            let Ok(library) = (unsafe { libloading::Library::new(name) }) else { return false };
            let complete = SYMBOLS.iter().all(|symbol| {
                // SAFETY: only the presence of the symbol is asked; it is not called through this type.
                unsafe { library.get::<unsafe extern "C" fn()>(symbol.to_bytes_with_nul()) }.is_ok()
            });
            // Unloading the driver while other code of this process uses it would pull it from under them.
            std::mem::forget(library);
            complete
        })
    })
}

pub(crate) fn devices() -> Result<Vec<CudaDevice>> {
    (0..count()?).map(describe).collect()
}

/// How many devices there are; none without a driver.
pub(super) fn count() -> Result<usize> {
    if !present() {
        return Ok(0);
    }
    // SAFETY: the symbol was found; 0 is the only flag there is.
    let code = unsafe { sys::cuInit(0) };
    // A driver with no device, or the linker's stand-in for a driver, is a machine without GPUs.
    if matches!(code, CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_STUB_LIBRARY) {
        return Ok(0);
    }
    check("cuInit", None, code)?;
    let mut count = 0;
    // SAFETY: `count` is a valid place for an int.
    check("cuDeviceGetCount", None, unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn describe(index: usize) -> Result<CudaDevice> {
    let mut device = 0;
    let ordinal = i32::try_from(index).unwrap_or(i32::MAX);
    // SAFETY: `device` is a valid place for a device handle.
    check("cuDeviceGet", Some(index), unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;

    let mut name = [0_u8; 256];
    // SAFETY: the buffer is as long as its length says; the driver ends the name with a NUL inside of it.
    let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) };
    check("cuDeviceGetName", Some(index), code)?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();

    let mut total = 0;
    // SAFETY: `total` is a valid place for a size.
    check("cuDeviceTotalMem_v2", Some(index), unsafe { sys::cuDeviceTotalMem_v2(&raw mut total, device) })?;

    // kHz and bits; two transfers a clock.
    let clock = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
    let bits = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
    let bandwidth = clock.zip(bits).map(|(clock, bits)| 2.0 * clock * 1e3 * bits / 8.0 / 1e9);

    let total_bytes = total as u64;
    let free_bytes = free_bytes(index)?.min(total_bytes);
    Ok(CudaDevice { index, name, total_bytes, free_bytes, bandwidth_gb_s: bandwidth })
}

fn attribute(device: sys::CUdevice, which: Attribute) -> Option<f64> {
    let mut value = 0;
    // SAFETY: `value` is a valid place for an int and the device handle came from the driver.
    let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
    (code == CUresult::CUDA_SUCCESS && value > 0).then(|| f64::from(value))
}

/// Free bytes, the context that this call has to be made in counted as free.
fn free_bytes(index: usize) -> Result<u64> {
    let context = Context::open(u32::try_from(index).unwrap_or(u32::MAX))?;
    let _current = context.enter()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are valid places for sizes, and a context is current.
    check("cuMemGetInfo_v2", Some(index), unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
    Ok(free as u64 + CONTEXT_BYTES)
}

/// About what a bare context takes (527 MiB measured on an H100); the framework's libraries come on top of it.
const CONTEXT_BYTES: u64 = 512 << 20;
