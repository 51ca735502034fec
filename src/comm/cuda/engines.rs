//! Large operations of two ranks out of each other's reach, whose data the copy engines carry through pinned memory.
//!
//! Every rank forks from the caller's stream to streams of its own and joins back, so that it all can be captured, and
//! two ranks may share the caller's stream. Chunks take turns on `LANES` lanes. On a lane's outgoing stream a copy brings
//! a chunk to a slot, then a kernel tells the peer and waits for the lane's next slot; on its incoming stream a kernel
//! waits for the peer's chunk, a copy brings it to scratch memory, and the next kernel works on it. While one lane's
//! kernels work, the other's copies run.
//!
//! Kernels and copies are enqueued in an order in which they could run one by one: streams of a device may share a
//! hardware queue, where one that waits holds up what comes behind it.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUstream;

use super::Cuda;
use super::kernels::{Machine, Sum};
use super::launch::{Prepared, tag};
use super::layout::{Call, GETS, GIVES, MOST_RANKS, Member, Step, THREADS};
use super::setup::Seats;
use crate::comm::DType;
use crate::comm::backend::Backend;
use crate::comm::operation::Operation;
use crate::device::cuda::{DeviceMemory, Event, Function, OwnStream, PinnedMemory, capturing};
use crate::error::{Error, Result};
use crate::split::activations::ENGINE_BYTES;

/// Chunks that one rank has under way in each direction.
const LANES: usize = 2;
/// Slots of a rank, a multiple of the lanes.
const SLOTS: usize = 4;
/// Bytes of a slot, the largest chunk. Copies of fewer take longer a byte.
const SLOT_BYTES: usize = 2 << 20;
const _: () =
    assert!(2 * LANES * SLOT_BYTES == ENGINE_BYTES as usize && SLOTS * SLOT_BYTES == ENGINE_BYTES as usize);
/// Chunks that an operation is cut into where that makes smaller ones: the first and the last have no other beside them.
const CHUNKS: usize = 8;
/// What chunks are a multiple of.
const CHUNK_STEP: usize = 4096;
/// Bytes of a chunk that are worth a block.
const BYTES_A_BLOCK: usize = 64 * THREADS as usize;
/// The most blocks that work on a chunk.
const MOST_BLOCKS: u32 = 64;
/// Threads of a kernel that only waits.
const FEW: u32 = 32;

/// What the two ranks have for it.
#[derive(Debug)]
pub(super) struct Engines {
    above: usize,
    sides: Vec<Side>,
}

/// What one rank has.
#[derive(Debug)]
struct Side {
    /// A chunk for every incoming lane, then one for every outgoing lane.
    scratch: DeviceMemory,
    slots: PinnedMemory,
    eager: Mutex<Lanes>,
    /// Streams take part in a capture until the caller ends it, and other calls may come before that.
    captured: Mutex<Lanes>,
}

/// Streams of incoming lanes, then of outgoing ones. The first one also meets and leaves.
#[derive(Debug)]
struct Lanes {
    streams: Vec<OwnStream>,
    /// The end of each stream's part.
    ended: Vec<Event>,
    begun: Event,
    met: Event,
}

impl Lanes {
    fn new(machine: &Machine) -> Result<Mutex<Self>> {
        let context = machine.context();
        let count = 2 * LANES;
        Ok(Mutex::new(Self {
            streams: (0..count).map(|_| OwnStream::new(context)).collect::<Result<_>>()?,
            ended: (0..count).map(|_| Event::new(context)).collect::<Result<_>>()?,
            begun: Event::new(context)?,
            met: Event::new(context)?,
        }))
    }

    fn stream(&self, index: usize) -> CUstream {
        self.streams.get(index).map_or(std::ptr::null_mut(), OwnStream::raw)
    }

    fn incoming(&self, chunk: usize) -> CUstream {
        self.stream(chunk % LANES)
    }

    fn outgoing(&self, chunk: usize) -> CUstream {
        self.stream(LANES + chunk % LANES)
    }
}

impl Engines {
    pub(super) fn new(seats: &Seats<'_>, above: usize) -> Result<Self> {
        let mut sides = Vec::with_capacity(seats.of.len());
        for (rank, seat) in seats.of.iter().enumerate() {
            let Some(machine) = seats.machines.get(*seat) else { continue };
            let side = || {
                let context = machine.context();
                Ok(Side {
                    scratch: DeviceMemory::zeroed(context, 2 * LANES * SLOT_BYTES, &machine.stream)?,
                    slots: PinnedMemory::zeroed(context, SLOTS * SLOT_BYTES)?,
                    eager: Lanes::new(machine)?,
                    captured: Lanes::new(machine)?,
                })
            };
            sides.push(side().map_err(|error: Error| error.of_rank(rank))?);
        }
        Ok(Self { above, sides })
    }

    /// Whether they carry an operation on so many bytes. All ranks with a part in it know both.
    pub(super) fn carry(&self, operation: &Operation<'_>, bytes: usize) -> bool {
        let moves = matches!(
            operation,
            Operation::AllReduce
                | Operation::Broadcast { .. }
                | Operation::Gather { .. }
                | Operation::AllGather { .. }
        );
        moves && bytes >= self.above
    }
}

/// How bytes in a line are cut.
#[derive(Debug, Clone, Copy)]
struct Chunks {
    bytes: usize,
    chunk: usize,
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
struct Run<'a> {
    rank: usize,
    stream: CUstream,
    machine: &'a Machine,
    side: &'a Side,
    peer: &'a Side,
    lanes: MutexGuard<'a, Lanes>,
    call: Call,
    dtype: Option<DType>,
    is_captured: bool,
    /// Whether the rank brings anything.
    present: bool,
    /// What it gives, the address of its first byte, and whether rows follow each other without gaps.
    out: Chunks,
    source: u64,
    dense: bool,
    /// What it gets from the peer.
    back: Chunks,
    /// Bytes that it gives itself.
    own: usize,
    /// Streams that come after the caller's by now.
    forked: usize,
    /// Whether a kernel was launched.
    launched: bool,
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
    fn join_all(&self) {
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

impl Cuda {
    /// Enqueues an operation that the copy engines carry, for ranks with their callers' streams. What fails half way stops
    /// the communicator: the peer would wait in vain.
    pub(super) fn launch_engines(
        &self,
        engines: &Engines,
        prepared: &Prepared,
        dtype: Option<DType>,
        parts: &[(usize, CUstream)],
    ) -> Result<()> {
        let mut runs = Vec::with_capacity(parts.len());
        for (rank, stream) in parts {
            let run = self.run_of(engines, prepared, dtype, *rank, *stream);
            runs.push(run.map_err(|error| error.of_rank(*rank))?);
        }
        let result = enqueue(&mut runs);
        if let Err(error) = &result {
            // In a capture nothing runs, and the caller gives it up.
            if runs.iter().any(|run| run.launched && !run.is_captured) {
                let operation = Operation::name_of_tag(tag(prepared.call.signature));
                self.stop(format!("{operation} was enqueued in part only, because {error}"));
            }
            runs.iter().for_each(Run::join_all);
        }
        result
    }

    fn run_of<'a>(
        &'a self,
        engines: &'a Engines,
        prepared: &Prepared,
        dtype: Option<DType>,
        rank: usize,
        stream: CUstream,
    ) -> Result<Run<'a>> {
        let machine = self.machine(rank)?;
        let other = 1 - rank.min(1);
        let (Some(side), Some(peer)) = (engines.sides.get(rank), engines.sides.get(other)) else {
            return Err(Error::invalid("rank", rank, "a rank below 2"));
        };
        let is_captured = capturing(machine.context(), stream)?;
        let lanes = if is_captured { &side.captured } else { &side.eager };
        let lanes = lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let member = prepared.members.get(rank).copied().unwrap_or_default();
        let mut call = prepared.call;
        call.timeout = u64::try_from(self.timeout.as_nanos()).unwrap_or(u64::MAX);
        call.members = [Member::default(); MOST_RANKS];
        if let Some(first) = call.members.first_mut() {
            *first = member;
        }
        let unit = dtype.map_or(1, DType::size);
        let length = |count: u64| usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(unit);
        let all = length(call.rows * call.columns);
        let chunk = all.div_ceil(CHUNKS).next_multiple_of(CHUNK_STEP).clamp(CHUNK_STEP, SLOT_BYTES);
        // Of a sum every rank has all columns.
        let columns = |rank: usize| match (dtype, call.begin.get(rank), call.end.get(rank)) {
            (None, Some(begin), Some(end)) => u64::from(end.saturating_sub(*begin)),
            _ => call.columns,
        };
        let (gives, gets) = (member.role & GIVES != 0, member.role & GETS != 0);
        let line = |there: bool, rank: usize| {
            let bytes = if there { length(call.rows * columns(rank)) } else { 0 };
            Chunks { bytes, chunk }
        };
        let skip = call.skip.get(rank).copied().unwrap_or(0);
        let out = line(gives, rank);
        Ok(Run {
            rank,
            stream,
            machine,
            side,
            peer,
            lanes,
            call,
            dtype,
            is_captured,
            present: gives || gets,
            out,
            source: member.input + u64::from(skip),
            dense: call.rows == 1 || member.input_stride == columns(rank),
            back: line(gets, other),
            own: if dtype.is_none() && gets { out.bytes } else { 0 },
            forked: 0,
            launched: false,
        })
    }
}

/// Enqueues the runs side by side.
fn enqueue(runs: &mut [Run<'_>]) -> Result<()> {
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
