//! The communicator and its list calls.

use std::sync::Arc;

use super::backend::Backend;
use super::check;
use super::cpu::Cpu;
use super::operation::{Layout, Operation, Pair};
use super::options::CommOptions;
use super::refusal::Refusal;
use super::view::Tensor;
use crate::device::{Device, Stream};
use crate::error::{Error, Result};
use crate::split::Split;

/// More ranks than any machine has devices.
const MOST_RANKS: usize = 64;
/// What a list call without streams goes to.
const DEFAULT_STREAMS: [Stream; MOST_RANKS] = [Stream(0); MOST_RANKS];

/// Moves and sums tensors between ranks; see the [module](super) for what it promises.
///
/// In list calls, a list that belongs to a split has one tensor for each of the split's intervals, in its
/// order. Other lists have one tensor a rank; ranks without one may be left out, since a tensor's device tells
/// whose it is. A tensor without elements stands for a rank that gives or gets nothing.
///
/// `streams` in list calls has one entry a rank, or none for the default streams; ranks on host memory ignore
/// it.
///
/// Dropping it stops it. On CUDA devices its memory is freed once the devices have done all work that was queued before:
/// where that takes longer than a tenth of a second, by a thread of its own. Else a rank's thread that happens to drop
/// one communicator could keep its peers waiting in another one.
pub struct Communicator {
    pub(super) devices: Vec<Device>,
    pub(super) backend: Arc<dyn Backend>,
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator").field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        Arc::clone(&self.backend).end();
    }
}

#[cfg(feature = "cuda")]
fn on_cuda(devices: &[Device], options: &CommOptions) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(super::cuda::Cuda::new(devices, options)?))
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(devices: &[Device], _options: &CommOptions) -> Result<Arc<dyn Backend>> {
    let names: Vec<_> = devices.iter().map(ToString::to_string).collect();
    let wanted = "\"cpu\" for every rank: this build of the crate is without the feature `cuda`";
    Err(Error::invalid("devices", format!("{names:?}"), wanted))
}

impl Communicator {
    /// A communicator whose rank `i` is on `devices[i]`. Several ranks may share a device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no device, for more than 64 (16 CUDA ranks), for a timeout of zero, for CUDA
    /// devices beside host memory, and for a CUDA device that is not there; [`Error::Driver`] where the driver fails.
    pub fn new(devices: &[Device], options: &CommOptions) -> Result<Self> {
        if devices.is_empty() || devices.len() > MOST_RANKS {
            let got = format!("{} devices", devices.len());
            return Err(Error::invalid("devices", got, format!("1 to {MOST_RANKS}, one a rank")));
        }
        if options.timeout.is_zero() {
            return Err(Error::invalid("timeout", "0 s", "a time above 0"));
        }
        if options.threads == Some(0) {
            return Err(Error::invalid("threads", 0, "1 or more, or none for one a core"));
        }
        let backend: Arc<dyn Backend> = if devices.iter().all(|device| *device == Device::Cpu) {
            Arc::new(Cpu::new(devices, options))
        } else {
            on_cuda(devices, options)?
        };
        Ok(Self { devices: devices.to_vec(), backend })
    }

    /// The device of every rank.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// A stream for each rank that belongs to the communicator, for callers who have none. On host memory it is the
    /// default one.
    #[must_use]
    pub fn streams(&self) -> Vec<Stream> {
        self.backend.streams()
    }

    /// Stops the communicator from any thread. Ranks that wait get [`Error::Aborted`] with `reason` at once, and
    /// so does every later call. Work that has begun is finished.
    pub fn abort(&self, reason: &str) {
        self.backend.stop(reason.to_owned());
    }

    /// Whether the communicator can go on.
    ///
    /// # Errors
    /// [`Error::Aborted`] with the reason, once a wait timed out, was interrupted, or [`Communicator::abort`]
    /// was called.
    pub fn check(&self) -> Result<()> {
        self.backend.check("check")
    }

    /// Waits until the work of all ranks on `streams` is done; on host memory it is. `streams` is as in list calls.
    ///
    /// # Errors
    /// As for [`Communicator::check`]; [`Error::Driver`] where a device failed.
    pub fn wait(&self, streams: &[Stream]) -> Result<()> {
        let streams = self.one_a_rank(streams)?;
        self.backend.wait(streams)
    }

    /// Makes a stopped communicator usable again, once every rank is out of the call that failed. Does nothing
    /// to one that can go on.
    ///
    /// The ranks begin anew: whatever some of them had done of the call in which it stopped is theirs to undo. On CUDA
    /// devices, kernels that still wait end, and all work on the ranks' devices is waited for; graphs that were captured
    /// before can be replayed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while a rank is inside a call on host memory; [`Error::Driver`] where a device failed,
    /// or is capturing a graph.
    pub fn reset(&self) -> Result<()> {
        self.backend.reset()
    }

    /// Every tensor becomes the sum of all, in place. A rank without a tensor, or with one without elements,
    /// takes no part.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where tensors differ in dtype or shape, overlap, are on a wrong device, hold
    /// integers or have no memory; [`Error::Aborted`] after the communicator was stopped. Nothing is written
    /// then.
    ///
    /// # Safety
    /// Until the work is done, every tensor's memory is valid and initialised, and nobody else touches it.
    /// On host memory the work is done when the call returns.
    pub unsafe fn all_reduce(&self, tensors: &[Tensor], streams: &[Stream]) -> Result<()> {
        let operation = Operation::AllReduce;
        let mut pairs = self.pairs(0);
        self.by_device(&operation, &mut pairs, tensors, |pair, tensor| {
            *pair = Pair { input: Some(tensor), output: Some(tensor) };
        })?;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, streams) }
    }

    /// Every target becomes a copy of `source`, which may be on any device and may be one of the targets.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`], but integers are fine.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`]; targets need not be initialised.
    pub unsafe fn broadcast(&self, source: &Tensor, targets: &[Tensor], streams: &[Stream]) -> Result<()> {
        let operation = Operation::Broadcast { root: self.devices.len() };
        let mut pairs = self.pairs(1);
        self.by_device(&operation, &mut pairs, targets, |pair, target| pair.output = Some(target))?;
        if let Some(caller) = pairs.last_mut() {
            caller.input = Some(*source);
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, streams) }
    }

    /// Writes the parts side by side to `target`, which may be on any device.
    ///
    /// Part `i` has the columns of the `i`-th interval of `split`, `dim` columns a unit; the target has the
    /// columns of all. Where intervals overlap, the columns are taken from the first that has them.
    ///
    /// # Errors
    /// As for [`Communicator::broadcast`]; also where a width is not what `split` says.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`]; the target need not be initialised.
    pub unsafe fn gather(
        &self,
        parts: &[Tensor],
        split: &Split,
        dim: u64,
        target: &Tensor,
        streams: &[Stream],
    ) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.gather_to(parts, split, dim, target, streams, true) }
    }

    /// As [`Communicator::gather`], but a target in host memory is complete only once the ranks' streams are, as after
    /// [`Communicator::wait`].
    ///
    /// # Errors
    /// As for [`Communicator::gather`].
    ///
    /// # Safety
    /// As for [`Communicator::gather`].
    pub unsafe fn gather_later(
        &self,
        parts: &[Tensor],
        split: &Split,
        dim: u64,
        target: &Tensor,
        streams: &[Stream],
    ) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.gather_to(parts, split, dim, target, streams, false) }
    }

    unsafe fn gather_to(
        &self,
        parts: &[Tensor],
        split: &Split,
        dim: u64,
        target: &Tensor,
        streams: &[Stream],
        blocking: bool,
    ) -> Result<()> {
        let layout = Layout::new(split, dim);
        let operation = Operation::Gather { root: self.devices.len(), layout, blocking };
        let mut pairs = self.pairs(1);
        self.by_split("parts", split, &mut pairs, parts, |pair, part| pair.input = Some(part))?;
        if let Some(caller) = pairs.last_mut() {
            caller.output = Some(*target);
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, streams) }
    }

    /// Writes the parts side by side to every target.
    ///
    /// Part `i` has the columns of the `i`-th interval of `split`, `dim` columns a unit; every target has the
    /// columns of all. `targets` has one tensor for each interval of `target_split`, whose widths do not
    /// matter: it says which ranks get the result.
    ///
    /// # Errors
    /// As for [`Communicator::gather`].
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`]; targets need not be initialised.
    pub unsafe fn all_gather(
        &self,
        parts: &[Tensor],
        split: &Split,
        targets: &[Tensor],
        target_split: &Split,
        dim: u64,
        streams: &[Stream],
    ) -> Result<()> {
        let operation = Operation::AllGather { layout: Layout::new(split, dim) };
        let mut pairs = self.pairs(0);
        self.by_split("parts", split, &mut pairs, parts, |pair, part| pair.input = Some(part))?;
        self.by_split("targets", target_split, &mut pairs, targets, |pair, it| pair.output = Some(it))?;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, streams) }
    }

    /// Every output becomes its interval's columns of the sum of all inputs.
    ///
    /// Inputs have the columns of all of `split`, `dim` columns a unit; output `i` has those of its `i`-th
    /// interval.
    ///
    /// # Errors
    /// As for [`Communicator::gather`], and integers are refused.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`]; outputs need not be initialised.
    pub unsafe fn reduce_scatter(
        &self,
        inputs: &[Tensor],
        outputs: &[Tensor],
        split: &Split,
        dim: u64,
        streams: &[Stream],
    ) -> Result<()> {
        let operation = Operation::ReduceScatter { layout: Layout::new(split, dim) };
        let mut pairs = self.pairs(0);
        self.by_device(&operation, &mut pairs, inputs, |pair, input| pair.input = Some(input))?;
        self.by_split("outputs", split, &mut pairs, outputs, |pair, output| pair.output = Some(output))?;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, streams) }
    }

    /// Adds to every target its interval's columns of the source on the same rank. No data moves between ranks.
    ///
    /// Target `i` has the columns of the `i`-th interval of `split`, `dim` columns a unit; source `i` has the
    /// columns of all.
    ///
    /// # Errors
    /// As for [`Communicator::gather`], and integers are refused.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`].
    pub unsafe fn add_residual(
        &self,
        targets: &[Tensor],
        sources: &[Tensor],
        split: &Split,
        dim: u64,
        streams: &[Stream],
    ) -> Result<()> {
        let operation = Operation::AddResidual { layout: Layout::new(split, dim) };
        let mut pairs = self.pairs(0);
        self.by_split("targets", split, &mut pairs, targets, |pair, target| pair.output = Some(target))?;
        self.by_split("sources", split, &mut pairs, sources, |pair, source| pair.input = Some(source))?;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list(&operation, &pairs, streams) }
    }

    /// One empty pair a rank and `more` behind them.
    pub(super) fn pairs(&self, more: usize) -> Vec<Pair> {
        vec![Pair::default(); self.devices.len() + more]
    }

    /// Checks an operation and does it for all ranks.
    ///
    /// # Safety
    /// As for [`Communicator::all_reduce`].
    pub(super) unsafe fn list(
        &self,
        operation: &Operation<'_>,
        pairs: &[Pair],
        streams: &[Stream],
    ) -> Result<()> {
        self.backend.check(operation.name())?;
        let streams = self.one_a_rank(streams)?;
        check::together(operation, pairs, &self.devices)?;
        // SAFETY: the caller's promise is passed on, and the operation was checked.
        unsafe { self.backend.list(operation, pairs, streams) }
    }

    fn one_a_rank<'a>(&self, streams: &'a [Stream]) -> Result<&'a [Stream]> {
        match streams.len() {
            0 => Ok(DEFAULT_STREAMS.get(..self.devices.len()).unwrap_or_default()),
            count if count == self.devices.len() => Ok(streams),
            count => {
                let wanted = format!("{}, one a rank, or none", self.devices.len());
                Err(Error::invalid("streams", format!("{count} streams"), wanted))
            }
        }
    }

    /// Gives every tensor to its rank: the next one on the tensor's device.
    fn by_device(
        &self,
        operation: &Operation<'_>,
        pairs: &mut [Pair],
        tensors: &[Tensor],
        mut give: impl FnMut(&mut Pair, Tensor),
    ) -> Result<()> {
        // With a tensor for every rank, the checks say it best if one is on a wrong device.
        let one_each = tensors.len() == self.devices.len();
        let mut ranks = pairs.iter_mut().zip(&self.devices);
        for (index, tensor) in tensors.iter().enumerate() {
            let Some((pair, _)) = ranks.find(|(_, device)| one_each || **device == tensor.device) else {
                return Err(Error::invalid(
                    format!("{}: tensor {index} of {}", operation.name(), tensors.len()),
                    tensor,
                    format!(
                        "at most one tensor a rank, in the order of the ranks' devices {:?}",
                        self.names()
                    ),
                ));
            };
            give(pair, *tensor);
        }
        Ok(())
    }

    /// Gives every tensor to the rank of its interval.
    fn by_split(
        &self,
        name: &str,
        split: &Split,
        pairs: &mut [Pair],
        tensors: &[Tensor],
        mut give: impl FnMut(&mut Pair, Tensor),
    ) -> Result<(), Refusal> {
        if tensors.len() != split.0.len() {
            let got = format!("{} tensors", tensors.len());
            let ranks: Vec<_> = split.ranks().collect();
            return Err(Refusal::new(name, got, format!("{}, one for each of ranks {ranks:?}", ranks.len())));
        }
        for (rank, tensor) in split.ranks().zip(tensors) {
            if rank >= self.devices.len() {
                let wanted = format!("ranks below {}", self.devices.len());
                return Err(Refusal::new(format!("{name}: split"), format!("rank {rank}"), wanted));
            }
            if let Some(pair) = pairs.get_mut(rank) {
                give(pair, *tensor);
            }
        }
        Ok(())
    }

    fn names(&self) -> Vec<String> {
        self.devices.iter().map(ToString::to_string).collect()
    }
}
