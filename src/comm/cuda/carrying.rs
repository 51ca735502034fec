//! What one rank enqueues for an operation that the copy engines carry: see `engines`.

use std::ffi::c_void;
use std::sync::MutexGuard;

use cudarc::driver::sys::CUstream;

use super::engines::{LANES, Lanes, SLOT_BYTES, SLOTS, Side};
use super::kernels::{Machine, Sum};
use super::layout::{Call, Step, THREADS};
use crate::comm::DType;
use crate::device::cuda::Function;
use crate::error::{Error, Result};

/// Bytes of a chunk that are worth a block.
const BYTES_A_BLOCK: usize = 64 * THREADS as usize;
/// The most blocks that work on a chunk.
const MOST_BLOCKS: u32 = 64;
/// Threads of a kernel that only waits.
const FEW: u32 = 32;

/// How bytes in a line are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunks {
    pub(super) bytes: usize,
    pub(super) chunk: usize,
}

impl Chunks {
    fn count(self) -> usize {
        self.bytes.div_ceil(self.chunk)
    }

    /// First byte of a chunk and one past its last.
    fn range(self, index: usize) -> (usize, usize) {
        let from = (index * self.chunk).min(self.bytes);
        (from, (from + self.chunk).min(self.bytes))
    }

    /// The next chunk of the same lane.
    fn next(self, index: usize) -> Option<usize> {
        Some(index + LANES).filter(|next| *next < self.count())
    }
}

/// Where the slot of a chunk begins.
fn slot(chunk: usize) -> usize {
    chunk % SLOTS * SLOT_BYTES
}

/// The number by which kernels name a chunk.
fn named(chunk: usize) -> u32 {
    u32::try_from(chunk + 1).unwrap_or(u32::MAX)
}

/// What one rank enqueues for one operation.
#[allow(clippy::struct_excessive_bools)] // Of nothing in common.
pub(super) struct Run<'a> {
    pub(super) rank: usize,
    pub(super) stream: CUstream,
    pub(super) machine: &'a Machine,
    pub(super) side: &'a Side,
    pub(super) peer: &'a Side,
    pub(super) lanes: MutexGuard<'a, Lanes>,
    pub(super) call: Call,
    pub(super) dtype: Option<DType>,
    pub(super) is_captured: bool,
    /// Whether the rank brings anything.
    pub(super) present: bool,
    /// What it gives, the address of its first byte, and whether rows follow each other without gaps.
    pub(super) out: Chunks,
    pub(super) source: u64,
    pub(super) dense: bool,
    /// What it gets from the peer.
    pub(super) back: Chunks,
    /// Bytes that it gives itself.
    pub(super) own: usize,
    /// Streams that come after the caller's by now.
    pub(super) forked: usize,
    /// Whether a kernel was launched.
    pub(super) launched: bool,
}

impl Run<'_> {
    fn launch(
        &self,
        function: Function,
        blocks: u32,
        threads: u32,
        stream: CUstream,
        step: Option<Step>,
    ) -> Result<()> {
        let (mut call, mut step) = (self.call, step);
        let mut both: [*mut c_void; 2] = [(&raw mut call).cast(), std::ptr::null_mut()];
        let parameters = match (&mut step, &mut both) {
            (Some(step), both) => {
                let [_, second] = both;
                *second = (&raw mut *step).cast();
                both.as_mut_slice()
            }
            (None, [first, _]) => std::slice::from_mut(first),
        };
        // SAFETY: the kernel takes a `Call` and, where there is one, a `Step`; the caller of the operation answers for the
        // tensors and its stream, the others are this communicator's.
        unsafe { self.machine.kernels.module.launch(function, (blocks, 1), threads, stream, parameters) }
    }

    /// Launches a kernel that waits, packs or works on a chunk.
    fn step(&self, function: Function, stream: CUstream, step: Step) -> Result<()> {
        let bytes = usize::try_from(step.to - step.from).unwrap_or(usize::MAX);
        let blocks = u32::try_from(bytes.div_ceil(BYTES_A_BLOCK)).unwrap_or(u32::MAX).clamp(1, MOST_BLOCKS);
        let size = self.dtype.map_or(0, |dtype| u32::try_from(dtype.size()).unwrap_or(0));
        let threads = if bytes == 0 { FEW } else { THREADS };
        self.launch(function, blocks, threads, stream, Some(Step { size, ..step }))
    }

    /// A part of the scratch memory.
    fn scratch(&self, part: usize) -> u64 {
        self.side.scratch.address() + (part * SLOT_BYTES) as u64
    }

    /// Lets the first stream come after the caller's.
    fn fork(&mut self) -> Result<()> {
        // Once for all that is enqueued here.
        let _current = self.machine.context().enter()?;
        // SAFETY: the caller keeps its stream alive; the others are this communicator's.
        unsafe {
            self.lanes.begun.record(self.stream)?;
            self.lanes.begun.hold(self.lanes.stream(0))?;
        }
        self.forked = 1;
        Ok(())
    }

    /// Meets the other rank, and lets the other streams come after that.
    fn meet(&mut self) -> Result<()> {
        let _current = self.machine.context().enter()?;
        let first = self.lanes.stream(0);
        let kernels = &self.machine.kernels;
        if !self.present {
            self.launch(kernels.take, 1, THREADS, first, None)?;
            self.launched = true;
            return Ok(());
        }
        self.launch(kernels.engines.meet, 1, FEW, first, None)?;
        self.launched = true;
        // SAFETY: as in `fork`.
        unsafe {
            self.lanes.met.record(first)?;
            for index in 1..self.lanes.streams.len() {
                self.lanes.met.hold(self.lanes.stream(index))?;
                self.forked += 1;
            }
            if self.own > 0 {
                self.lanes.met.hold(self.stream)?;
            }
        }
        if self.own > 0 {
            let blocks = u32::try_from(self.own.div_ceil(BYTES_A_BLOCK)).unwrap_or(u32::MAX);
            self.launch(kernels.engines.own, blocks.clamp(1, MOST_BLOCKS), THREADS, self.stream, None)?;
        }
        Ok(())
    }

    /// Brings a chunk of this rank to its slot.
    fn send(&self, chunk: usize) -> Result<()> {
        if chunk >= self.out.count() {
            return Ok(());
        }
        let _current = self.machine.context().enter()?;
        let (lane, stream) = (chunk % LANES, self.lanes.outgoing(chunk));
        let packed = self.scratch(LANES + lane);
        let send = self.machine.kernels.engines.send;
        // What a kernel packs: the chunk, unless the copy takes it from where it is.
        let step = |chunk: Option<usize>| {
            let (from, to) = chunk.filter(|_| !self.dense).map_or((0, 0), |chunk| self.out.range(chunk));
            let lane = u32::try_from(lane).unwrap_or(0);
            Step { scratch: packed, from: from as u64, to: to as u64, lane, ..Step::default() }
        };
        if chunk < LANES && !self.dense {
            self.step(send, stream, step(Some(chunk)))?;
        }
        let (from, to) = self.out.range(chunk);
        let source = if self.dense { self.source + from as u64 } else { packed };
        // SAFETY: the caller answers for the tensor; nobody else uses the slot, as the last kernel of the lane has waited
        // for that.
        unsafe { self.side.slots.fill(self.machine.context(), stream, slot(chunk), source, to - from)? };
        let next = self.out.next(chunk);
        // Slots are free when an operation begins, because the last kernel of a lane waits for its last chunk.
        let awaited = match next {
            Some(next) => next.checked_sub(SLOTS).map_or(0, named),
            None => named(chunk),
        };
        self.step(send, stream, Step { copied: named(chunk), awaited, ..step(next) })
    }

    /// Brings a chunk of the peer to this rank's device, and works on it.
    fn receive(&self, chunk: usize) -> Result<()> {
        if chunk >= self.back.count() {
            return Ok(());
        }
        let _current = self.machine.context().enter()?;
        let kernels = &self.machine.kernels;
        let function = match self.dtype {
            Some(dtype) => kernels.sum(Sum::Engines, dtype)?,
            None => kernels.engines.take,
        };
        let (lane, stream) = (chunk % LANES, self.lanes.incoming(chunk));
        let scratch = self.scratch(lane);
        let step = Step { scratch, lane: u32::try_from(lane).unwrap_or(0), ..Step::default() };
        if chunk < LANES {
            self.step(function, stream, Step { awaited: named(chunk), ..step })?;
        }
        let (from, to) = self.back.range(chunk);
        // SAFETY: both are this communicator's, and the lane's last kernel has waited for the chunk.
        unsafe { self.peer.slots.fetch(self.machine.context(), stream, slot(chunk), scratch, to - from)? };
        let awaited = self.back.next(chunk).map_or(0, named);
        let (from, to) = (from as u64, to as u64);
        self.step(function, stream, Step { from, to, copied: named(chunk), awaited, ..step })
    }

    /// Ends the operation on the device, and lets the caller's stream come after it.
    fn leave(&self) -> Result<()> {
        let _current = self.machine.context().enter()?;
        let first = self.lanes.stream(0);
        for (index, ended) in self.lanes.ended.iter().enumerate().take(self.forked).skip(1) {
            // SAFETY: as in `fork`.
            unsafe {
                ended.record(self.lanes.stream(index))?;
                ended.hold(first)?;
            }
        }
        if self.present {
            self.launch(self.machine.kernels.engines.leave, 1, FEW, first, None)?;
        }
        self.join(0)
    }

    /// Lets the caller's stream come after one of this rank's.
    fn join(&self, index: usize) -> Result<()> {
        let Some(ended) = self.lanes.ended.get(index) else { return Ok(()) };
        // SAFETY: as in `fork`.
        unsafe {
            ended.record(self.lanes.stream(index))?;
            ended.hold(self.stream)
        }
    }

    /// Lets the caller's stream come after all that was enqueued before a failure: copies use the caller's tensors, and a
    /// capture wants all its streams back.
    pub(super) fn join_all(&self) {
        for (index, stream) in self.lanes.streams.iter().enumerate().take(self.forked) {
            let Err(error) = self.join(index) else { continue };
            tracing::warn!(%error, rank = self.rank, "could not join a stream after a failure");
            if !self.is_captured
                && let Err(error) = stream.synchronize()
            {
                tracing::warn!(%error, rank = self.rank, "could not wait for a stream after a failure");
            }
        }
    }
}

/// Enqueues the runs side by side.
pub(super) fn enqueue(runs: &mut [Run<'_>]) -> Result<()> {
    let of = |rank: usize| move |error: Error| error.of_rank(rank);
    // Before any kernel waits on a caller's stream that the ranks share.
    for run in runs.iter_mut() {
        run.fork().map_err(of(run.rank))?;
    }
    for run in runs.iter_mut() {
        run.meet().map_err(of(run.rank))?;
    }
    let chunks = runs.iter().map(|run| run.out.count().max(run.back.count())).max().unwrap_or(0);
    for chunk in 0..chunks {
        for run in runs.iter() {
            run.send(chunk).map_err(of(run.rank))?;
        }
        for run in runs.iter() {
            run.receive(chunk).map_err(of(run.rank))?;
        }
    }
    for run in runs.iter() {
        run.leave().map_err(of(run.rank))?;
    }
    Ok(())
}
