//! The bytes that a run takes beside weights and cache: a documented formula with named constants.
//!
//! Counted for a chunk of `T` tokens, elements of `e` bytes and a residual stream of `h` columns:
//! - always alive: [`RESIDUAL_COPIES`] × `T·h·e` (the residual stream, its normalised copy and the block's output)
//!   and one mask byte for every token of the chunk and every cached token;
//! - while attention runs: [`QUERY_COPIES`] × `T·e` a query element (the query before and after its rotation, and the
//!   attention's output) and [`KEY_COPIES`] × `T·e` a key or value element;
//! - while the MLP runs: [`MLP_COPIES`] × `T·e` a column (gate, up and their product). A token passes through each
//!   of its experts, and its residual row is copied for each.
//!
//! Logits are kept for the last position of every sequence only.

/// Copies of the residual stream alive at once.
pub const RESIDUAL_COPIES: u64 = 3;
/// Copies of a query element alive at once.
pub const QUERY_COPIES: u64 = 3;
/// Copies of a key or value element alive at once, beside the cache.
pub const KEY_COPIES: u64 = 2;
/// Copies of an intermediate element alive at once.
pub const MLP_COPIES: u64 = 3;

/// Bytes that a CUDA process takes on a device before any tensor is made: the context, loaded kernels, the libraries'
/// workspaces and the rounding of the allocator.
///
/// Measured on an H100 with torch 2.11 (driver of CUDA 13): 527 MiB for the context alone, 693 MiB once matrix products,
/// attention and elementwise kernels had run.
pub const CUDA_FRAMEWORK_BYTES: u64 = 704 << 20;

/// Bytes of the communicator's buffers for small messages on a device, for each pair of ranks.
pub const SMALL_MESSAGE_BYTES: u64 = 1 << 20;
/// Bytes of pinned host memory that a rank stages chunks of large messages through.
pub const STAGING_BYTES: u64 = 8 << 20;
