//! Where a tensor lives and where work on it is queued.

use crate::error::Error;

/// The device that holds a rank or a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// A CUDA device, by its index in the driver's order.
    Cuda(u32),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = Error;

    /// Reads `cpu`, `cuda:N`, or `cuda` for the first CUDA device.
    fn from_str(name: &str) -> Result<Self, Error> {
        let refused = || Error::invalid("device", format!("{name:?}"), "\"cpu\" or \"cuda:N\"");
        match name {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let digits = name.strip_prefix("cuda:").ok_or_else(refused)?;
                // `parse` alone would take "+1".
                if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
                    return Err(refused());
                }
                digits.parse().map(Self::Cuda).map_err(|_| refused())
            }
        }
    }
}

/// A queue of work on a CUDA device: the driver's handle as a number, 0 for the default stream.
///
/// Ranks on host memory have no queues and ignore it: their calls have done their work when they return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Stream(pub usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(17)] {
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:99999999999", "CPU", "cuda:1 "] {
            assert!(name.parse::<Device>().is_err(), "{name:?}");
        }
    }
}
