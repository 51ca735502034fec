//! From operations to kernels and their parameters.

use std::ffi::c_void;

use cudarc::driver::sys::CUstream;

use super::Cuda;
use super::kernels::Sum;
use super::layout::{Call, GETS, GIVES, MOST_RANKS, Member, PLAIN, THREADS};
use super::setup::small_bytes;
use crate::comm::DType;
use crate::comm::backend::Backend;
use crate::comm::operation::{Layout, Operation, Pair};
use crate::comm::view::Tensor;
use crate::device::cuda::{capturing, pointer};
use crate::error::{Error, Result};
use crate::split::activations::PIECE_DATA_BYTES;

/// Up to so many bytes are pushed to all ranks in one step; above, every rank sums a share or takes what it gets. Two H100
/// with `NVLink` were faster so up to 1 MiB while each 4 bytes had a number beside them; 12 have now.
const PUSHED_BELOW: usize = 2 << 20;
/// The same for two ranks that do not reach each other, of what a rank puts and takes together: an `all_reduce` counts
/// twice. On two H100 pushing sums of 256 KiB and 1 MiB took 19 and 56 us and chunks 35 and 67; of 2 MiB 106 and 102, as
/// pushed data takes a third more bytes on the way through host memory.
const PUSHED_BELOW_APART: usize = 2 << 20;
/// The same where more ranks do not all reach each other: each would push everything to all others.
const PUSHED_BELOW_APART_OF_MORE: usize = 128 << 10;
/// From so many bytes on, the copy engines carry what two ranks out of each other's reach send. Never: on two H100 they took
/// 420 us for a sum of 8 MiB and 1190 for 32 MiB, and the kernels take 270 and 1000.
pub(super) const ENGINES_ABOVE: usize = usize::MAX;
/// Bytes of a tensor in a pushed piece.
#[allow(clippy::cast_possible_truncation)] // A few.
const PIECE: usize = PIECE_DATA_BYTES as usize;
/// Bytes of pushed data that are worth a block: a piece for each thread.
const PUSHED_BYTES_A_BLOCK: usize = PIECE * THREADS as usize;
/// Bytes of other operations that are worth a block.
const BYTES_A_BLOCK: usize = 32 * THREADS as usize;
/// The same where some ranks do not reach others: the least chunk that is staged. A second one in the same block would wait
/// until the first has gone all the way through host memory.
const STAGED_BYTES_A_BLOCK: usize = 16 * THREADS as usize;

/// Up to so many bytes are pushed, where nobody said a number. `connected`: whether all ranks reach each other.
fn pushed_below(ranks: usize, connected: bool, operation: &Operation<'_>) -> usize {
    match (connected, ranks) {
        (true, _) => PUSHED_BELOW,
        (false, ..=2) if matches!(operation, Operation::AllReduce) => PUSHED_BELOW_APART / 2,
        (false, ..=2) => PUSHED_BELOW_APART,
        (false, _) => PUSHED_BELOW_APART_OF_MORE,
    }
}

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Sum(Sum, DType),
    Take,
    TakeSmall,
    /// Several kernels and copies; elements are added up where a type is named.
    Engines(Option<DType>),
}

impl Kernel {
    /// Whether ranks push what they give, so that nobody uses a peer's tensors.
    fn pushes(self) -> bool {
        matches!(self, Self::Sum(Sum::Small | Sum::ScatterSmall, _) | Self::TakeSmall)
    }
}

/// An operation, ready to be launched for some ranks.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) kernel: Kernel,
    blocks: u32,
    pub(super) call: Call,
    /// One for each rank; those that were not asked for are empty.
    pub(super) members: [Member; MOST_RANKS],
}

/// The part of a signature that tells the operation.
pub(super) fn tag(signature: u32) -> u32 {
    signature & 7
}

/// What all ranks have to agree on, as a number. Two different calls get the same one by chance once in 500 million.
fn signature(operation: &Operation<'_>, dtype: DType, rows: u64, columns: u64, call: &Call) -> u32 {
    let mut hash = 0x811c_9dc5_u32;
    let mut mix = |value: u64| {
        for byte in value.to_le_bytes() {
            hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    };
    mix(dtype as u64);
    mix(rows);
    mix(columns);
    if let Operation::Broadcast { root } | Operation::Gather { root, .. } = operation {
        mix(*root as u64);
    }
    if operation.layout().is_some() {
        for ((begin, end), skip) in call.begin.iter().zip(call.end).zip(call.skip) {
            mix(u64::from(*begin) << 32 | u64::from(end));
            mix(u64::from(skip));
        }
    }
    (hash & !7) | operation.tag()
}

fn narrow(columns: usize, unit: usize) -> Result<u32> {
    columns.checked_mul(unit).and_then(|size| u32::try_from(size).ok()).ok_or_else(|| {
        Error::invalid("columns", format!("{columns} of {unit} bytes"), "rows below 4 GiB on CUDA devices")
    })
}

impl Call {
    /// Fills in which columns are whose, `unit` bytes or elements a column. With `first_has_it`, columns that several
    /// ranks have are taken from the first.
    fn lay_out(&mut self, layout: &Layout<'_>, unit: usize, first_has_it: bool) -> Result<()> {
        let mut covered = 0;
        for rank in 0..MOST_RANKS {
            let Some((start, end)) = layout.columns(rank) else { continue };
            let begin = if first_has_it { start.max(covered) } else { start };
            covered = covered.max(end);
            if let (Some(a), Some(b), Some(c)) =
                (self.begin.get_mut(rank), self.end.get_mut(rank), self.skip.get_mut(rank))
            {
                (*a, *b) = (narrow(begin.min(end), unit)?, narrow(end, unit)?);
                *c = narrow(begin.min(end) - start, unit)?;
            }
        }
        Ok(())
    }
}

impl Cuda {
    /// Prepares an operation at which all ranks meet. `pairs` has one entry a rank.
    pub(super) fn prepare(&self, operation: &Operation<'_>, pairs: &[Pair]) -> Result<Prepared> {
        let present = || pairs.iter().flat_map(|pair| [pair.gives(), pair.gets()]).flatten();
        let Some(first) = present().next() else { return Ok(self.nothing()) };
        let (rows, size) = (first.rows, first.dtype.size());
        let ranks = u32::try_from(self.ranks()).unwrap_or(u32::MAX);
        let mut call = Call { rows: rows as u64, targets: u32::MAX, ranks, ..Call::default() };
        if let Operation::Gather { root, .. } = operation {
            call.targets = 1_u32.checked_shl(u32::try_from(*root).unwrap_or(u32::MAX)).unwrap_or(0);
        }
        // Sums count columns in elements; what only moves, in bytes.
        let unit = if operation.sums() { 1 } else { size };
        let columns = operation.layout().map_or(first.columns, Layout::total);
        call.columns = u64::from(narrow(columns, size)?) / (if unit == 1 { size as u64 } else { 1 });
        match operation {
            Operation::Gather { layout, .. } | Operation::AllGather { layout } => {
                call.lay_out(layout, unit, true)?;
            }
            Operation::ReduceScatter { layout } => call.lay_out(layout, unit, false)?,
            Operation::Broadcast { root } => {
                if let Some(end) = call.end.get_mut(*root) {
                    *end = narrow(columns, unit)?;
                }
            }
            Operation::Barrier | Operation::AllReduce | Operation::AddResidual { .. } => {}
        }
        let widths = call.begin.iter().zip(call.end).map(|(begin, end)| end.saturating_sub(*begin));
        call.widest = widths.max().unwrap_or(0);
        call.signature = signature(operation, first.dtype, call.rows, call.columns, &call);
        let bytes = rows.saturating_mul(columns).saturating_mul(size);
        // A piece has one element of 8 bytes where elements are added up.
        let pushed = if operation.sums() && size == 8 { bytes.saturating_mul(PIECE) / 8 } else { bytes };
        let below =
            self.pushed_below.unwrap_or_else(|| pushed_below(self.ranks(), self.rooms.connected, operation));
        let small = pushed <= below.min(small_bytes(self.ranks()));
        let engines = self.engines.as_ref().is_some_and(|engines| engines.carry(operation, bytes));
        let kernel = match operation {
            _ if engines => Kernel::Engines(operation.sums().then_some(first.dtype)),
            Operation::AllReduce if small => Kernel::Sum(Sum::Small, first.dtype),
            Operation::AllReduce => Kernel::Sum(Sum::Large, first.dtype),
            Operation::ReduceScatter { .. } if small => Kernel::Sum(Sum::ScatterSmall, first.dtype),
            Operation::ReduceScatter { .. } => Kernel::Sum(Sum::Scatter, first.dtype),
            _ if small => Kernel::TakeSmall,
            _ => Kernel::Take,
        };
        let worth = match kernel.pushes() {
            true => pushed.div_ceil(PUSHED_BYTES_A_BLOCK),
            false if self.rooms.connected => bytes.div_ceil(BYTES_A_BLOCK),
            false => bytes.div_ceil(STAGED_BYTES_A_BLOCK),
        };
        let blocks = u32::try_from(worth).unwrap_or(u32::MAX).clamp(1, self.blocks);
        let mut members = [Member::default(); MOST_RANKS];
        for ((rank, member), pair) in members.iter_mut().enumerate().zip(pairs) {
            // Only a peer's kernels would ask what kind of memory it is.
            let careful = !kernel.pushes() && !engines;
            *member = self.member(rank, pair, unit, careful).map_err(|error| error.of_rank(rank))?;
        }
        Ok(Prepared { kernel, blocks, call, members })
    }

    /// The same for a rank that knows only its own part.
    pub(super) fn prepare_one(
        &self,
        operation: &Operation<'_>,
        rank: usize,
        pair: &Pair,
    ) -> Result<Prepared> {
        let mut pairs = vec![Pair::default(); self.ranks()];
        if let Some(place) = pairs.get_mut(rank) {
            *place = *pair;
        }
        self.prepare(operation, &pairs)
    }

    /// Ranks without tensors only come.
    fn nothing(&self) -> Prepared {
        let mut members = [Member::default(); MOST_RANKS];
        for ((index, member), record) in (0..).zip(&mut members).zip(&self.rooms.records) {
            (member.rank, member.index) = (*record, index);
        }
        Prepared { kernel: Kernel::Take, blocks: 1, call: Call::default(), members }
    }

    fn member(&self, rank: usize, pair: &Pair, unit: usize, careful: bool) -> Result<Member> {
        let index = u32::try_from(rank).unwrap_or(u32::MAX);
        let mut member =
            Member { rank: self.rooms.records.get(rank).copied().unwrap_or(0), index, ..Member::default() };
        let stride = |tensor: &Tensor| -> u64 {
            let elements = if tensor.rows == 1 { tensor.columns } else { tensor.row_stride };
            // Tensors were checked: no product of their sizes overflows.
            (elements * if unit == 1 { 1 } else { tensor.dtype.size() }) as u64
        };
        let mut plain = true;
        for tensor in [pair.gives(), pair.gets()].into_iter().flatten() {
            // Ranks of a single device share its context, where every address is everybody's.
            if careful && plain && self.machines.len() > 1 {
                plain = pointer::plain(self.machine(rank)?.context(), tensor.data as u64)?;
            }
        }
        if let Some(input) = pair.gives() {
            (member.input, member.input_stride) = (input.data as u64, stride(input));
            member.role |= GIVES;
        }
        if let Some(output) = pair.gets() {
            (member.output, member.output_stride) = (output.data as u64, stride(output));
            member.role |= GETS;
        }
        if plain {
            member.role |= PLAIN;
        }
        Ok(member)
    }

    /// Launches a prepared operation for ranks that share a stream.
    pub(super) fn launch(&self, prepared: &Prepared, ranks: &[usize], stream: CUstream) -> Result<()> {
        let Some(first) = ranks.first() else { return Ok(()) };
        if let (Kernel::Engines(dtype), Some(engines)) = (prepared.kernel, &self.engines) {
            return self.launch_engines(engines, prepared, dtype, &[(*first, stream)]);
        }
        let machine = self.machine(*first)?;
        let mut call = prepared.call;
        call.timeout = u64::try_from(self.timeout.as_nanos()).unwrap_or(u64::MAX);
        let mut present = false;
        for (place, rank) in call.members.iter_mut().zip(ranks) {
            if let Some(member) = prepared.members.get(*rank) {
                *place = *member;
                present |= member.role & (GIVES | GETS) != 0;
            }
        }
        let function = match prepared.kernel {
            // A rank that only comes needs no more than one block that meets the others.
            _ if !present => machine.kernels.take,
            Kernel::Sum(sum, dtype) => machine.kernels.sum(sum, dtype)?,
            Kernel::Take | Kernel::Engines(_) => machine.kernels.take,
            Kernel::TakeSmall => machine.kernels.take_small,
        };
        let blocks = if present { prepared.blocks } else { 1 };
        let together = u32::try_from(ranks.len()).unwrap_or(1);
        let mut parameters: [*mut c_void; 1] = [(&raw mut call).cast()];
        // SAFETY: the kernel takes a `Call` and waits for the one before, as a test of `text` holds; the caller of the
        // operation answers for the tensors and the stream.
        unsafe {
            machine.kernels.module.launch_early(
                function,
                (blocks, together),
                THREADS,
                stream,
                &mut parameters,
            )
        }
        .map_err(|error| error.of_rank(*first))
    }

    /// Adds every rank's columns of its source to its target. Ranks do not meet.
    pub(super) fn add_residual(
        &self,
        layout: &Layout<'_>,
        pairs: &[Pair],
        streams: &[CUstream],
    ) -> Result<()> {
        for ((rank, pair), stream) in pairs.iter().enumerate().zip(streams) {
            let (Some(source), Some(target)) = (pair.gives(), pair.gets()) else { continue };
            let Some((start, end)) = layout.columns(rank) else { continue };
            let machine = self.machine(rank)?;
            let mut call =
                Call { rows: target.rows as u64, columns: layout.total() as u64, ..Call::default() };
            call.begin[0] = narrow(start, 1)?;
            call.end[0] = narrow(end, 1)?;
            call.members[0] = self.member(rank, pair, 1, false)?;
            let function = machine.kernels.sum(Sum::Residual, source.dtype)?;
            let bytes = target.rows * target.columns * target.dtype.size();
            // No waiting here: as many blocks as there is work for.
            let blocks =
                u32::try_from(bytes.div_ceil(8 * THREADS as usize)).unwrap_or(u32::MAX).clamp(1, 4096);
            let mut parameters: [*mut c_void; 1] = [(&raw mut call).cast()];
            // SAFETY: as in `launch`.
            unsafe {
                machine.kernels.module.launch_early(function, (blocks, 1), THREADS, *stream, &mut parameters)
            }
            .map_err(|error| error.of_rank(rank))?;
        }
        Ok(())
    }

    /// Launches an operation for all ranks, those that share a stream together.
    pub(super) fn launch_all(&self, prepared: &Prepared, streams: &[CUstream]) -> Result<()> {
        let mut locks: Vec<_> = self
            .queues
            .iter()
            .map(|queue| queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
            .collect();
        for ((rank, queue), stream) in locks.iter_mut().enumerate().zip(streams) {
            self.order(rank, *stream, queue).map_err(|error| error.of_rank(rank))?;
        }
        if let (Kernel::Engines(dtype), Some(engines)) = (prepared.kernel, &self.engines) {
            let parts: Vec<_> = streams.iter().copied().enumerate().collect();
            self.launch_engines(engines, prepared, dtype, &parts)?;
        } else {
            self.launch_groups(prepared, streams)?;
        }
        for queue in &mut locks {
            queue.calls += 1;
            (queue.alone, queue.marked) = (false, false);
        }
        Ok(())
    }

    /// A launch for each group of ranks that share a stream.
    fn launch_groups(&self, prepared: &Prepared, streams: &[CUstream]) -> Result<()> {
        let mut launched = [false; MOST_RANKS];
        for rank in 0..self.ranks() {
            if launched.get(rank).copied().unwrap_or(true) {
                continue;
            }
            let mut group = [0; MOST_RANKS];
            let mut members = 0;
            for other in rank..self.ranks() {
                let here =
                    self.seats.get(other) == self.seats.get(rank) && streams.get(other) == streams.get(rank);
                if let (true, Some(place), Some(done)) =
                    (here, group.get_mut(members), launched.get_mut(other))
                {
                    *place = other;
                    *done = true;
                    members += 1;
                }
            }
            let stream = streams.get(rank).copied().unwrap_or(std::ptr::null_mut());
            let result = self.launch(prepared, group.get(..members).unwrap_or(&[]), stream);
            if let Err(error) = result {
                if rank > 0 {
                    self.stop_half_way(prepared, streams, &error);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stops the communicator after a launch for some ranks only: they wait for those that will not come, and would
    /// take their next call for this one. In a capture nothing runs, and the caller gives it up.
    fn stop_half_way(&self, prepared: &Prepared, streams: &[CUstream], error: &Error) {
        let captured = self.machine(0).and_then(|machine| {
            capturing(machine.context(), streams.first().copied().unwrap_or(std::ptr::null_mut()))
        });
        if !captured.unwrap_or(false) {
            let operation = Operation::name_of_tag(tag(prepared.call.signature));
            self.stop(format!("{operation} was launched for some of the ranks only, because {error}"));
        }
    }
}
