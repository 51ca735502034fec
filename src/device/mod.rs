//! Devices: which there are, what is free on them, and how fast their memory is.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod place;

pub use place::{Device, Stream};

use serde::{Deserialize, Serialize};

use crate::error::Result;

/// A CUDA device as the driver describes it, in the driver's order (`CUDA_VISIBLE_DEVICES` is honoured by it).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CudaDevice {
    /// Index.
    pub index: usize,
    /// Name.
    pub name: String,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes free for a process that has no context on the device yet: what is free now, plus the context that had
    /// to be made to ask.
    pub free_bytes: u64,
    /// Memory bandwidth in GB/s, from the clock and the width of the bus; `None` where the driver does not say.
    pub bandwidth_gb_s: Option<f64>,
}

/// The CUDA devices of this machine; none where there is no driver, no device, or the crate was built without the
/// feature `cuda`.
///
/// The caller's current device and context are left as they were.
///
/// # Errors
/// [`crate::Error::Driver`] where there is a driver and it fails.
#[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
pub fn cuda_devices() -> Result<Vec<CudaDevice>> {
    #[cfg(feature = "cuda")]
    return cuda::devices();
    #[cfg(not(feature = "cuda"))]
    return Ok(Vec::new());
}

/// Bytes of host memory that are available without swapping; `None` where the system does not say
/// (`MemAvailable` of `/proc/meminfo`).
#[must_use]
pub fn host_available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_for_devices_never_panics() {
        // With or without a driver: an empty list, devices, or an error with the driver's words.
        match cuda_devices() {
            Ok(devices) => assert!(devices.iter().all(|device| device.free_bytes <= device.total_bytes)),
            Err(error) => assert!(error.to_string().contains("failed on")),
        }
    }
}
