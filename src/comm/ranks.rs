//! The communicator's rank calls: every rank calls for itself, from a thread of its own.
//!
//! All ranks have to make the same calls in the same order. What they bring is checked once everybody is there;
//! if it does not fit together, every rank gets the same error, nothing is written, and the ranks may go on
//! with their next call. A rank that has nothing to give or to get passes a tensor without elements and still
//! has to come.

use super::communicator::Communicator;
use super::operation::{Layout, Operation, Pair};
use super::view::Tensor;
use crate::device::Stream;
use crate::error::{Error, Result};
use crate::split::Split;

impl Communicator {
    /// Waits until every rank has come.
    ///
    /// # Errors
    /// [`Error::CollectiveTimeout`] with the ranks that did not come in time; [`Error::Aborted`] if the
    /// communicator was stopped, also during the wait; [`Error::InvalidArgument`] if another rank made another
    /// call, or this one is in a call already.
    pub fn rank_barrier(&self, rank: usize, stream: Stream) -> Result<()> {
        // SAFETY: no memory is passed.
        unsafe { self.backend.rank(rank, Operation::Barrier, Pair::default(), stream) }
    }

    /// `tensor` becomes the sum of all ranks' tensors, in place. A rank whose tensor has no elements only comes.
    ///
    /// # Errors
    /// As for [`Communicator::rank_barrier`]; also [`Error::InvalidArgument`] as for
    /// [`Communicator::all_reduce`].
    ///
    /// # Safety
    /// Until the work is done, the tensor's memory is valid and initialised, and nobody but the communicator
    /// touches it. On host memory the work is done when the call returns, with an error or without.
    pub unsafe fn rank_all_reduce(&self, rank: usize, tensor: &Tensor, stream: Stream) -> Result<()> {
        let pair = Pair { input: Some(*tensor), output: Some(*tensor) };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.backend.rank(rank, Operation::AllReduce, pair, stream) }
    }

    /// This rank's side of [`Communicator::rank_all_reduce`] when it has nothing to add: `tensor` becomes the
    /// sum of the other ranks' tensors, whatever it held. Cheaper than adding zeros.
    ///
    /// # Errors
    /// As for [`Communicator::rank_all_reduce`]; also if no rank has anything to add.
    ///
    /// # Safety
    /// As for [`Communicator::rank_all_reduce`]; the tensor need not be initialised.
    pub unsafe fn rank_receive_sum(&self, rank: usize, tensor: &Tensor, stream: Stream) -> Result<()> {
        let pair = Pair { input: None, output: Some(*tensor) };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.backend.rank(rank, Operation::AllReduce, pair, stream) }
    }

    /// `tensor` becomes a copy of the one that rank `root` passes.
    ///
    /// # Errors
    /// As for [`Communicator::rank_barrier`]; also [`Error::InvalidArgument`] as for
    /// [`Communicator::broadcast`].
    ///
    /// # Safety
    /// As for [`Communicator::rank_all_reduce`]; only the tensor of `root` need be initialised.
    pub unsafe fn rank_broadcast(
        &self,
        rank: usize,
        root: usize,
        tensor: &Tensor,
        stream: Stream,
    ) -> Result<()> {
        let pair = if rank == root {
            Pair { input: Some(*tensor), output: None }
        } else {
            Pair { input: None, output: Some(*tensor) }
        };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.backend.rank(rank, Operation::Broadcast { root }, pair, stream) }
    }

    /// Writes all ranks' parts side by side to the target that rank `root` passes; the others pass `None`.
    ///
    /// Widths are as for [`Communicator::gather`]; the part of a rank that `split` leaves out has no elements.
    ///
    /// # Errors
    /// As for [`Communicator::rank_barrier`]; also [`Error::InvalidArgument`] as for [`Communicator::gather`].
    ///
    /// # Safety
    /// As for [`Communicator::rank_all_reduce`]; the target need not be initialised.
    #[allow(clippy::too_many_arguments)] // A gather has that many.
    pub unsafe fn rank_gather(
        &self,
        rank: usize,
        root: usize,
        part: &Tensor,
        split: &Split,
        dim: u64,
        target: Option<&Tensor>,
        stream: Stream,
    ) -> Result<()> {
        let operation = Operation::Gather { root, layout: Layout::new(split, dim), blocking: true };
        let pair = Pair { input: Some(*part), output: target.copied() };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.backend.rank(rank, operation, pair, stream) }
    }

    /// Writes all ranks' parts side by side to every rank's `target`. A rank whose target has no elements does
    /// not get them.
    ///
    /// Widths are as for [`Communicator::all_gather`]; the part of a rank that `split` leaves out has no
    /// elements.
    ///
    /// # Errors
    /// As for [`Communicator::rank_barrier`]; also [`Error::InvalidArgument`] as for
    /// [`Communicator::all_gather`].
    ///
    /// # Safety
    /// As for [`Communicator::rank_all_reduce`]; the target need not be initialised.
    pub unsafe fn rank_all_gather(
        &self,
        rank: usize,
        part: &Tensor,
        split: &Split,
        dim: u64,
        target: &Tensor,
        stream: Stream,
    ) -> Result<()> {
        let operation = Operation::AllGather { layout: Layout::new(split, dim) };
        let pair = Pair { input: Some(*part), output: Some(*target) };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.backend.rank(rank, operation, pair, stream) }
    }

    /// `output` becomes this rank's columns of the sum of all ranks' inputs. A rank whose input has no elements
    /// adds nothing.
    ///
    /// Widths are as for [`Communicator::reduce_scatter`]; the output of a rank that `split` leaves out has no
    /// elements.
    ///
    /// # Errors
    /// As for [`Communicator::rank_barrier`]; also [`Error::InvalidArgument`] as for
    /// [`Communicator::reduce_scatter`].
    ///
    /// # Safety
    /// As for [`Communicator::rank_all_reduce`]; the output need not be initialised.
    pub unsafe fn rank_reduce_scatter(
        &self,
        rank: usize,
        input: &Tensor,
        output: &Tensor,
        split: &Split,
        dim: u64,
        stream: Stream,
    ) -> Result<()> {
        let operation = Operation::ReduceScatter { layout: Layout::new(split, dim) };
        let pair = Pair { input: Some(*input), output: Some(*output) };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.backend.rank(rank, operation, pair, stream) }
    }

    /// Adds to `target` this rank's columns of `source`. Waits for nobody: other ranks need not call it.
    ///
    /// Widths are as for [`Communicator::add_residual`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] as for [`Communicator::add_residual`]; [`Error::Aborted`] after the
    /// communicator was stopped.
    ///
    /// # Safety
    /// As for [`Communicator::rank_all_reduce`], for both tensors.
    pub unsafe fn rank_add_residual(
        &self,
        rank: usize,
        target: &Tensor,
        source: &Tensor,
        split: &Split,
        dim: u64,
        stream: Stream,
    ) -> Result<()> {
        let ranks = self.devices.len();
        let mut pairs = self.pairs(0);
        let mut streams = vec![Stream::default(); ranks];
        let (Some(pair), Some(place)) = (pairs.get_mut(rank), streams.get_mut(rank)) else {
            return Err(Error::invalid("rank", rank, format!("a rank below {ranks}")));
        };
        *pair = Pair { input: Some(*source), output: Some(*target) };
        *place = stream;
        let operation = Operation::AddResidual { layout: Layout::new(split, dim) };
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, &streams) }
    }
}
