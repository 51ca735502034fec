//! Ranks on CUDA devices.
//!
//! An operation is one kernel a rank, on the caller's stream. Kernels of one operation meet through inboxes in
//! device memory, or in pinned host memory where two devices do not reach each other; the host only launches them.
//! Ranks of a list call that share a stream share a launch.

mod carrying;
mod ending;
mod engines;
mod host;
mod kernels;
mod launch;
mod layout;
mod setup;
mod text;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::CUstream;

use self::engines::Engines;
use self::kernels::{Machine, blocks_beside};
use self::launch::Prepared;
use self::layout::{DISAGREED, MOST_BLOCKS, MOST_RANKS, Status, TIMED_OUT, TOLD_BY_PEER};
use self::setup::{Rooms, Seats};
use super::backend::Backend;
use super::check;
use super::operation::{Operation, Pair};
use super::options::CommOptions;
use crate::device::cuda::{Event, OwnStream, capturing};
use crate::device::{Device, Stream};
use crate::error::{Error, Result};

/// Ranks on CUDA devices.
pub(crate) struct Cuda {
    // Fields are dropped in this order: memory first, then what it is allocated through.
    rooms: Rooms,
    engines: Option<Engines>,
    queues: Vec<Mutex<Queue>>,
    machines: Vec<Machine>,
    own: Vec<OwnStream>,
    /// The machine of every rank.
    seats: Vec<usize>,
    devices: Vec<Device>,
    timeout: Duration,
    blocks: u32,
    /// What the caller said, if anything: bytes up to which data is pushed.
    pushed_below: Option<usize>,
    stopped: Mutex<Option<String>>,
    /// Whether the devices are done with what this owns.
    settled: AtomicBool,
}

/// Where a rank's operations go.
struct Queue {
    last: Option<CUstream>,
    /// Operations that were launched, captured ones left out.
    calls: u64,
    /// Whether the last of them was a rank call, which waits for the other ranks'.
    alone: bool,
    /// Whether `moved` marks the end of the last one already.
    marked: bool,
    /// Copies to and from host memory that the host waited for by their word.
    copies: u32,
    moved: Event,
}

// SAFETY: a stream handle may be used from every thread.
unsafe impl Send for Queue {}

fn raw(stream: Stream) -> CUstream {
    std::ptr::with_exposed_provenance_mut(stream.0)
}

impl Cuda {
    pub(crate) fn new(devices: &[Device], options: &CommOptions) -> Result<Self> {
        if devices.len() > MOST_RANKS {
            let got = format!("{} devices", devices.len());
            return Err(Error::invalid(
                "devices",
                got,
                format!("at most {MOST_RANKS} ranks on CUDA devices"),
            ));
        }
        let mut indices: Vec<u32> = Vec::new();
        let mut seats = Vec::with_capacity(devices.len());
        for device in devices {
            let Device::Cuda(index) = device else {
                let names: Vec<_> = devices.iter().map(ToString::to_string).collect();
                let wanted = "ranks on CUDA devices only, or on host memory only";
                return Err(Error::invalid("devices", format!("{names:?}"), wanted));
            };
            let seat = indices.iter().position(|known| known == index).unwrap_or_else(|| {
                indices.push(*index);
                indices.len() - 1
            });
            seats.push(seat);
        }
        let machines: Vec<_> = indices.iter().map(|index| Machine::open(*index)).collect::<Result<_>>()?;
        let blocks = machines
            .iter()
            .enumerate()
            .map(|(seat, machine)| {
                blocks_beside(machine.multiprocessors, seats.iter().filter(|other| **other == seat).count())
            })
            .min()
            .unwrap_or(1)
            .min(MOST_BLOCKS);
        let rooms = Rooms::new(&Seats { machines: &machines, of: &seats }, options.peers, blocks as usize)?;
        let engines_above = options.engines_above.unwrap_or(launch::ENGINES_ABOVE);
        let engines = if rooms.apart && engines_above < usize::MAX {
            Some(Engines::new(&Seats { machines: &machines, of: &seats }, engines_above)?)
        } else {
            None
        };
        let mut queues = Vec::with_capacity(devices.len());
        let mut own = Vec::with_capacity(devices.len());
        for seat in &seats {
            if let Some(machine) = machines.get(*seat) {
                own.push(OwnStream::new(machine.context())?);
                queues.push(Mutex::new(Queue {
                    last: None,
                    calls: 0,
                    alone: false,
                    marked: false,
                    copies: 0,
                    moved: Event::new(machine.context())?,
                }));
            }
        }
        Ok(Self {
            rooms,
            engines,
            queues,
            own,
            machines,
            seats,
            devices: devices.to_vec(),
            timeout: options.timeout,
            blocks,
            pushed_below: options.pushed_below,
            stopped: Mutex::new(None),
            settled: AtomicBool::new(false),
        })
    }

    fn ranks(&self) -> usize {
        self.devices.len()
    }

    fn machine(&self, rank: usize) -> Result<&Machine> {
        let seat = self.seats.get(rank).and_then(|seat| self.machines.get(*seat));
        seat.ok_or_else(|| Error::invalid("rank", rank, format!("a rank below {}", self.ranks())))
    }

    /// Fails once a kernel of any rank gave up.
    fn look(&self, operation: &'static str) -> Result<()> {
        if let Some(reason) = self.stopped.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(Error::Aborted { operation, reason });
        }
        let mut told = None;
        for rank in 0..self.ranks() {
            let status = self.rooms.status(rank);
            match status.state {
                0 => {}
                // Another rank knows the cause.
                TOLD_BY_PEER => told = Some((rank, status)),
                _ => return Err(self.failure(operation, rank, status)),
            }
        }
        told.map_or(Ok(()), |(rank, status)| Err(self.failure(operation, rank, status)))
    }

    fn failure(&self, operation: &'static str, rank: usize, status: Status) -> Error {
        let missing: Vec<usize> = (0..self.ranks()).filter(|peer| status.missing >> peer & 1 == 1).collect();
        let device = self.devices.get(rank).copied().unwrap_or(Device::Cpu);
        let failed = Operation::name_of_tag(launch::tag(status.signature));
        match status.state {
            TIMED_OUT => Error::CollectiveTimeout {
                operation: failed,
                rank,
                device,
                missing,
                seconds: self.timeout.as_secs_f64(),
            },
            DISAGREED => Error::InvalidArgument {
                argument: format!("{failed}: rank {rank} on {device}, its operation {}", status.sequence),
                got: format!("another call from ranks {missing:?}"),
                wanted:
                    "the same operation with the same sizes, dtype and splits from every rank, in the same \
                         order; make a new communicator"
                        .into(),
            },
            _ => Error::Aborted {
                operation,
                reason: format!("ranks {missing:?} stopped while rank {rank} on {device} waited for them"),
            },
        }
    }

    /// Lets an operation of a rank on a new stream wait for those on its last one.
    fn order(&self, rank: usize, stream: CUstream, queue: &mut Queue) -> Result<()> {
        if queue.last == Some(stream) {
            return Ok(());
        }
        let machine = self.machine(rank)?;
        if capturing(machine.context(), stream)? {
            // What is captured runs whenever it is replayed; its order is the caller's.
            return Ok(());
        }
        if let Some(last) = queue.last
            && !capturing(machine.context(), last)?
        {
            // SAFETY: the caller keeps streams alive until the rank has used another one (see `Stream`).
            unsafe {
                if !queue.marked {
                    queue.moved.record(last)?;
                }
                queue.moved.hold(stream)?;
            }
        }
        (queue.last, queue.marked) = (Some(stream), false);
        Ok(())
    }

    /// Launches one rank's kernel for a rank call.
    fn launch_alone(&self, rank: usize, prepared: &Prepared, stream: CUstream) -> Result<()> {
        let Some(queue) = self.queues.get(rank) else {
            return Err(Error::invalid("rank", rank, format!("a rank below {}", self.ranks())));
        };
        if capturing(self.machine(rank)?.context(), stream)? {
            // What is captured runs whenever and wherever it is replayed.
            return self.launch(prepared, &[rank], stream);
        }
        self.mark_before(rank, stream)?;
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        self.refuse_shared_stream(rank, stream, queue.calls + 1)?;
        self.order(rank, stream, &mut queue)?;
        self.launch(prepared, &[rank], stream)?;
        queue.calls += 1;
        (queue.alone, queue.marked) = (true, false);
        Ok(())
    }

    /// Marks the end of list calls that other ranks made on the stream, before a kernel that waits for those ranks is
    /// queued behind them. A mark behind that kernel would make a rank that moves to another stream wait for it.
    fn mark_before(&self, rank: usize, stream: CUstream) -> Result<()> {
        let seat = self.seats.get(rank);
        for (other, queue) in self.queues.iter().enumerate() {
            if other == rank || self.seats.get(other) != seat {
                continue;
            }
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.last == Some(stream) && !queue.alone && !queue.marked {
                // SAFETY: the stream is the caller's, of this device and alive.
                unsafe { queue.moved.record(stream)? };
                queue.marked = true;
            }
        }
        Ok(())
    }

    /// Two ranks' kernels of one operation cannot follow each other on one stream: the first would wait for the
    /// second, which waits for the first to end.
    fn refuse_shared_stream(&self, rank: usize, stream: CUstream, call: u64) -> Result<()> {
        let seat = self.seats.get(rank);
        for (other, queue) in self.queues.iter().enumerate() {
            if other == rank || self.seats.get(other) != seat {
                continue;
            }
            // A rank that is in a call at this moment is not on our thread, so its stream is its own business.
            let Ok(queue) = queue.try_lock() else { continue };
            if queue.alone && queue.last == Some(stream) && queue.calls == call {
                let device = self.devices.get(rank).copied().unwrap_or(Device::Cpu);
                return Err(Error::invalid(
                    format!("stream of rank {rank} on {device}"),
                    format!("the stream on which rank {other} already waits for this rank"),
                    "a stream of its own for each rank of a device, or a list call for all ranks",
                ));
            }
        }
        Ok(())
    }
}

impl Backend for Cuda {
    unsafe fn list(&self, operation: &Operation<'_>, pairs: &[Pair], streams: &[Stream]) -> Result<()> {
        self.look(operation.name())?;
        let streams: Vec<_> = streams.iter().copied().map(raw).collect();
        // SAFETY: the caller's promise is passed on.
        unsafe { self.list_on(operation, pairs, &streams) }
    }

    unsafe fn rank(&self, rank: usize, operation: Operation<'_>, pair: Pair, stream: Stream) -> Result<()> {
        self.look(operation.name())?;
        check::alone(&operation, rank, &pair, &self.devices)?;
        let prepared = self.prepare_one(&operation, rank, &pair)?;
        self.launch_alone(rank, &prepared, raw(stream)).map_err(|error| error.of_rank(rank))
    }

    fn check(&self, operation: &'static str) -> Result<()> {
        self.look(operation)
    }

    fn stop(&self, reason: String) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        stopped.get_or_insert(reason);
        self.rooms.stop();
    }

    fn reset(&self) -> Result<()> {
        if self.look("reset").is_ok() {
            return Ok(());
        }
        let mut queues: Vec<_> =
            self.queues.iter().map(|queue| queue.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        // Kernels that still wait leave at once.
        self.rooms.stop();
        for machine in &self.machines {
            machine.context().synchronize()?;
        }
        self.rooms.renew(&Seats { machines: &self.machines, of: &self.seats })?;
        let most = queues.iter().map(|queue| queue.calls).max().unwrap_or(0);
        for queue in &mut queues {
            (queue.calls, queue.alone) = (most, false);
        }
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    fn streams(&self) -> Vec<Stream> {
        self.own.iter().map(|stream| Stream(stream.raw().expose_provenance())).collect()
    }

    fn wait(&self, streams: &[Stream]) -> Result<()> {
        for (rank, stream) in streams.iter().enumerate() {
            self.synchronize(rank, raw(*stream)).map_err(|error| error.of_rank(rank))?;
        }
        self.look("wait")
    }

    fn end(self: Arc<Self>) {
        ending::begin(&self);
    }
}
