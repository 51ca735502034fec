//! Large operations of two ranks out of each other's reach, whose data the copy engines carry through pinned memory.
//!
//! Every rank forks from the caller's stream to streams of its own and joins back, so that it all can be captured, and
//! two ranks may share the caller's stream. Chunks take turns on `LANES` lanes. On a lane's outgoing stream a copy brings
//! a chunk to a slot, then a kernel tells the peer and waits for the lane's next slot; on its incoming stream a kernel
//! waits for the peer's chunk, a copy brings it to scratch memory, and the next kernel works on it. While one lane's
//! kernels work, the other's copies run.
//!
//! Kernels and copies are enqueued in an order in which what has to wait comes behind all that it waits for: streams of a
//! device may share a hardware queue, where one that waits holds up what comes behind it.

use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::CUstream;

use super::Cuda;
use super::carrying::{Chunks, Run, enqueue};
use super::kernels::Machine;
use super::launch::{Prepared, tag};
use super::layout::{GETS, GIVES, MOST_RANKS, Member};
use super::setup::Seats;
use crate::comm::DType;
use crate::comm::backend::Backend;
use crate::comm::operation::Operation;
use crate::device::cuda::{DeviceMemory, Event, OwnStream, PinnedMemory, capturing};
use crate::error::{Error, Result};
use crate::split::activations::ENGINE_BYTES;

/// Chunks that one rank has under way in each direction.
pub(super) const LANES: usize = 2;
/// Slots of a rank, a multiple of the lanes.
pub(super) const SLOTS: usize = 4;
/// Bytes of a slot, the largest chunk. Copies of fewer take longer a byte.
pub(super) const SLOT_BYTES: usize = 2 << 20;
// As plans have it; both are a few MiB.
const _: () = {
    let (scratch, slots) = ((2 * LANES * SLOT_BYTES) as u64, (SLOTS * SLOT_BYTES) as u64);
    assert!(scratch == ENGINE_BYTES && slots == ENGINE_BYTES);
};
/// Chunks that an operation is cut into where that makes smaller ones: the first and the last have no other beside them.
const CHUNKS: usize = 8;
/// What chunks are a multiple of.
const CHUNK_STEP: usize = 4096;

/// What the two ranks have for it.
#[derive(Debug)]
pub(super) struct Engines {
    above: usize,
    sides: Vec<Side>,
}

/// What one rank has.
#[derive(Debug)]
pub(super) struct Side {
    /// A chunk for every incoming lane, then one for every outgoing lane.
    pub(super) scratch: DeviceMemory,
    pub(super) slots: PinnedMemory,
    pub(super) eager: Mutex<Lanes>,
    /// Streams take part in a capture until the caller ends it, and other calls may come before that.
    pub(super) captured: Mutex<Lanes>,
}

/// Streams of incoming lanes, then of outgoing ones. The first one also meets and leaves.
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) streams: Vec<OwnStream>,
    /// The end of each stream's part.
    pub(super) ended: Vec<Event>,
    pub(super) begun: Event,
    pub(super) met: Event,
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

    pub(super) fn stream(&self, index: usize) -> CUstream {
        self.streams.get(index).map_or(std::ptr::null_mut(), OwnStream::raw)
    }

    pub(super) fn incoming(&self, chunk: usize) -> CUstream {
        self.stream(chunk % LANES)
    }

    pub(super) fn outgoing(&self, chunk: usize) -> CUstream {
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
