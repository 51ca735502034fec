//! From the driver's codes to errors.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

/// What can be done about the errors that users meet.
fn remedy(code: CUresult) -> &'static str {
    match code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "free memory on the device, or give its ranks a smaller budget with gpu_split"
        }
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_ASSERT => {
            "the device's context is broken by a kernel that ran on it, of whatever library; start the process \
             again, with CUDA_LAUNCH_BLOCKING=1 to find the kernel"
        }
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        | CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        | CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        | CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => {
            "this cannot be captured in a CUDA graph; do it before the capture"
        }
        CUresult::CUDA_ERROR_INVALID_PTX | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "the kernels need a driver of CUDA 12.2 or later: update the driver"
        }
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
            "the kernels need a card of compute capability 7.0 or later"
        }
        _ => "check that `nvidia-smi` works and that the device is free",
    }
}

/// Turns a driver's code into a result. `device` is `None` where the call concerns no device.
pub(crate) fn check(call: &'static str, device: Option<usize>, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: `text` is a valid place for a pointer; the driver's strings live as long as the process.
    let known =
        unsafe { sys::cuGetErrorName(code, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    let name = if known {
        // SAFETY: on success the driver stored a NUL-terminated string of static lifetime.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".to_owned()
    };
    Err(Error::Driver {
        call,
        device: device.map_or_else(|| "the driver".to_owned(), |index| format!("cuda:{index}")),
        rank: None,
        name,
        code: code as i32,
        remedy: remedy(code).to_owned(),
    })
}

/// Logs what failed while something was given back.
pub(super) fn log_failure(result: Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "could not give something back to the driver");
    }
}
