//! What a kind of device does for the communicator.

use std::sync::Arc;

use super::operation::{Operation, Pair};
use crate::device::Stream;
use crate::error::Result;

/// One kind of memory and the way ranks on it meet.
///
/// # Safety of the methods
/// Tensors' memory is valid, and nobody else touches it, until the work is done: when the call returns on host
/// memory, in the order of the streams on devices.
pub(crate) trait Backend: Send + Sync {
    /// Does a checked operation for all ranks at once. `streams` has one entry a rank.
    ///
    /// # Safety
    /// See the trait; and the operation has passed `check::together`.
    unsafe fn list(&self, operation: &Operation<'_>, pairs: &[Pair], streams: &[Stream]) -> Result<()>;

    /// Does one rank's part of an operation in which the ranks meet. Checks it, together with what the other
    /// ranks bring, before anything is touched.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn rank(&self, rank: usize, operation: Operation<'_>, pair: Pair, stream: Stream) -> Result<()>;

    /// Fails if the communicator was stopped.
    fn check(&self, operation: &'static str) -> Result<()>;

    /// A queue for each rank that nobody else uses; the default one on host memory.
    fn streams(&self) -> Vec<Stream>;

    /// Waits until the work of all ranks on `streams` is done, one a rank. Work on host memory is done when its call
    /// returns.
    fn wait(&self, streams: &[Stream]) -> Result<()>;

    /// Stops the communicator and wakes whoever waits.
    fn stop(&self, reason: String);

    /// Lets the ranks go on after the communicator was stopped, unless one of them is still inside a call.
    fn reset(&self) -> Result<()>;

    /// Comes before the last owner is gone. Whoever has to wait for devices before memory is freed begins with it here,
    /// and need not come to an end.
    fn end(self: Arc<Self>) {}
}
