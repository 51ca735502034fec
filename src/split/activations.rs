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

/// Bytes of memory that a rank stages chunks of large messages through where a peer does not reach its device.
pub const STAGING_BYTES: u64 = 4 << 20;
/// Bytes of a rank's record, and of each peer's inbox beside the areas for small messages.
const RECORD_BYTES: u64 = 16 << 10;
/// What devices round an allocation up to.
const ALLOCATION_STEP: u64 = 2 << 20;

/// The largest sum in bytes that ranks push to each other in one step, by the number of ranks: every rank has room for
/// two of each peer's, at twice their size.
#[must_use]
pub fn pushed_bytes(ranks: usize) -> u64 {
    match ranks {
        0..=2 => 1 << 20,
        3..=4 => 512 << 10,
        5..=8 => 256 << 10,
        _ => 128 << 10,
    }
}

/// The most bytes that a communicator takes for one rank, on its device or, for peers that do not reach that, in pinned
/// host memory.
#[must_use]
pub fn communicator_bytes(ranks: u64) -> u64 {
    if ranks < 2 {
        return ALLOCATION_STEP;
    }
    let pushed = pushed_bytes(usize::try_from(ranks).unwrap_or(usize::MAX));
    let inboxes = (ranks - 1).saturating_mul(4 * pushed + RECORD_BYTES);
    STAGING_BYTES.saturating_add(RECORD_BYTES).saturating_add(inboxes).next_multiple_of(ALLOCATION_STEP)
}
