//! placeholder
/// Bytes a CUDA process takes on a device before any tensor is made.
pub const CUDA_FRAMEWORK_BYTES: u64 = 600 << 20;
