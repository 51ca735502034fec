//! Operations through each rank's staging memory, chunk by chunk, as cuda/staged.cuh has them.

use super::eye::Eye;
use super::numbers::Sum;
use super::protocol::{Meeting, Seat, entry};
use crate::codes::Result;
use crate::dtype::DType;
use crate::faults::stall;
use crate::layout::THREADS;

/// A tensor, or columns of it, as one line of bytes.
pub(super) struct Line {
    pub(super) data: u64,
    /// Bytes from row to row.
    stride: u64,
    /// Bytes of a row.
    width: u64,
    pub(super) bytes: u64,
}

impl Line {
    /// `width` columns behind `skip`, of `size` bytes each.
    pub(super) fn of(data: u64, stride: u64, rows: u64, skip: u64, width: u64, size: u64) -> Self {
        let width = width * size;
        let stride = if rows > 1 { stride * size } else { width };
        Self { data: data + skip * size, stride, width, bytes: rows * width }
    }

    /// Goes through `[from, from + length)` row by row: address in memory, offset and length in the range.
    fn pieces(&self, from: u64, length: u64, mut piece: impl FnMut(u64, usize, usize) -> Result) -> Result {
        let mut done = 0;
        while done < length {
            let (row, column) = ((from + done) / self.width, (from + done) % self.width);
            let count = (self.width - column).min(length - done);
            piece(self.data + row * self.stride + column, done as usize, count as usize)?;
            done += count;
        }
        Ok(())
    }

    pub(super) fn read(&self, eye: Eye, from: u64, into: &mut [u8]) -> Result {
        self.pieces(from, into.len() as u64, |at, offset, count| {
            eye.read(at, into.get_mut(offset..offset + count).unwrap_or_default(), 1)
        })
    }

    pub(super) fn write(&self, eye: Eye, from: u64, bytes: &[u8]) -> Result {
        self.pieces(from, bytes.len() as u64, |at, offset, count| {
            eye.write(at, bytes.get(offset..offset + count).unwrap_or_default(), 1)
        })
    }
}

/// The least chunk.
const LEAST: u64 = 16 * THREADS as u64;

/// The chunks of one block, and its place in everybody's staging memory.
pub(super) struct Staging<'a> {
    pub(super) seat: &'a Seat<'a>,
    pub(super) meeting: &'a Meeting,
    pub(super) block: u32,
    /// Blocks that stage; the others have nothing to do.
    blocks: u64,
    /// Bytes of a chunk.
    chunk: u64,
}

impl<'a> Staging<'a> {
    /// `bytes` are those of the whole.
    pub(super) fn new(seat: &'a Seat<'a>, meeting: &'a Meeting, block: u32, bytes: u64) -> Self {
        let blocks = u64::from(seat.blocks.min(u32::from(seat.rank.staging_blocks)));
        let fair = (bytes / (u64::from(seat.rank.slots) * blocks)).next_multiple_of(LEAST);
        let chunk = fair.min(u64::from(seat.rank.slot_bytes)).max(LEAST);
        Self { seat, meeting, block, blocks, chunk }
    }

    pub(super) fn takes_from(&self, peer: usize) -> bool {
        self.meeting.gives(peer) && !self.seat.direct(self.meeting, peer)
    }

    pub(super) fn puts_for(&self, peer: usize) -> bool {
        self.meeting.gets(peer) && !self.seat.seen_by(peer)
    }

    pub(super) fn peers(&self, which: impl Fn(usize) -> bool) -> impl Iterator<Item = usize> {
        (0..self.seat.ranks()).filter(move |peer| which(*peer))
    }

    /// First byte of this block's chunk `index` of a line.
    pub(super) fn first(&self, index: u64) -> u64 {
        (index * self.blocks + u64::from(self.block)) * self.chunk
    }

    /// The byte behind its last one.
    pub(super) fn last(&self, index: u64, bytes: u64) -> u64 {
        (self.first(index) + self.chunk).min(bytes)
    }

    /// How many chunks of a line are this block's.
    pub(super) fn chunks(&self, bytes: u64) -> u64 {
        let block = u64::from(self.block);
        if block >= self.blocks {
            return 0;
        }
        bytes.div_ceil(self.chunk).saturating_sub(block).div_ceil(self.blocks)
    }

    pub(super) fn slot(&self, owner: usize, index: u64) -> u64 {
        let slots = u64::from(self.seat.rank.slots);
        let place = u64::from(self.block) * slots + index % slots;
        entry(&self.seat.rank.stage, owner) + place * u64::from(self.seat.rank.slot_bytes)
    }

    pub(super) fn mark(&self, index: u64) -> u64 {
        self.meeting.sequence << 24 | (index + 1)
    }

    /// Waits until this rank's slot for chunk `index` is free.
    fn free_slot(&self, index: u64) -> Result<bool> {
        let Some(before) = index.checked_sub(u64::from(self.seat.rank.slots)) else { return Ok(true) };
        for peer in self.peers(|peer| self.puts_for(peer)) {
            let flag = Seat::consumed_flag(self.seat.inbox(peer), self.block);
            if !self.seat.wait_for(flag, self.mark(before), peer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Puts chunk `index` of this rank's line where the others see it.
    fn put(&self, line: &Line, index: u64) -> Result<bool> {
        if !self.free_slot(index)? {
            return Ok(false);
        }
        let seat = self.seat;
        let from = self.first(index);
        let mut chunk = vec![0; (self.last(index, line.bytes) - from) as usize];
        line.read(seat.eye, from, &mut chunk)?;
        seat.eye.write(self.slot(seat.index(), index), &chunk, 1)?;
        stall();
        for peer in self.peers(|peer| self.puts_for(peer)) {
            seat.eye.store64(Seat::staged_flag(seat.out(peer), self.block), self.mark(index))?;
        }
        Ok(true)
    }

    /// Waits for chunk `index` of the ranks that this one takes from, of those only that have so many.
    fn await_of(&self, index: u64, has: impl Fn(usize) -> bool) -> Result<bool> {
        for peer in self.peers(|peer| self.takes_from(peer) && has(peer)) {
            let flag = Seat::staged_flag(self.seat.inbox(peer), self.block);
            if !self.seat.wait_for(flag, self.mark(index), peer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells everyone whom this rank takes from that it is done with chunk `index`.
    fn release(&self, index: u64) -> Result {
        for peer in self.peers(|peer| self.takes_from(peer)) {
            let flag = Seat::consumed_flag(self.seat.out(peer), self.block);
            self.seat.eye.store64(flag, self.mark(index))?;
        }
        Ok(())
    }

    /// Copies a peer's chunk `index` from its slot to a line.
    pub(super) fn copy_back(&self, line: &Line, peer: usize, index: u64) -> Result {
        let from = self.first(index);
        let mut chunk = vec![0; (self.last(index, line.bytes) - from) as usize];
        self.seat.eye.read(self.slot(peer, index), &mut chunk, 1)?;
        line.write(self.seat.eye, from, &chunk)
    }

    /// Every chunk of every rank goes past `work(index)`; the next one is put before the last is waited for. False: a
    /// wait had to end.
    pub(super) fn each_chunk(&self, own: &Line, bytes: &[u64], work: impl Fn(u64) -> Result) -> Result<bool> {
        let puts = self.seat.gives() && self.peers(|peer| self.puts_for(peer)).next().is_some();
        let mine = if puts { self.chunks(own.bytes) } else { 0 };
        let takes = self.peers(|peer| self.seat.gets() && self.takes_from(peer));
        let theirs = takes.map(|peer| self.chunks(entry(bytes, peer))).max().unwrap_or(0);
        for step in 0..mine.max(theirs + 1) {
            if step < mine && !self.put(own, step)? {
                return Ok(false);
            }
            if step == 0 || step > theirs {
                continue;
            }
            let index = step - 1;
            if !self.await_of(index, |peer| index < self.chunks(entry(bytes, peer)))? {
                return Ok(false);
            }
            work(index)?;
            self.release(index)?;
        }
        Ok(true)
    }
}

/// `all_reduce_large` where some rank is out of another's reach. Two ranks that do not reach each other exchange
/// their chunks and both sum them; else the ranks sum one chunk each in turn for all.
pub(super) fn all_reduce(seat: &Seat<'_>, meeting: &Meeting, block: u32, dtype: DType) -> Result<bool> {
    let size = dtype.size() as u64;
    let own = Line::of(seat.me.output, seat.me.output_stride, seat.call.rows, 0, seat.call.columns, size);
    let staging = Staging::new(seat, meeting, block, own.bytes);
    let present: Vec<usize> = (0..seat.ranks()).filter(|peer| meeting.present(*peer)).collect();
    let other = present.iter().copied().rfind(|peer| *peer != seat.index()).unwrap_or(seat.index());
    let both = present.len() == 2 && !seat.direct(meeting, other) && !seat.seen_by(other);
    let kept = !both && present.iter().any(|peer| staging.puts_for(*peer));
    let givers: Vec<usize> = present.iter().copied().filter(|peer| meeting.gives(*peer)).collect();
    if givers.is_empty() {
        return Ok(true);
    }
    let sharing = Sharing { staging, own, present, givers, other, both, kept, dtype };
    sharing.run()
}

/// How a large sum is shared.
struct Sharing<'a> {
    staging: Staging<'a>,
    own: Line,
    present: Vec<usize>,
    /// Who sum in turn: a rank that only gets would not hear when its slots are free.
    givers: Vec<usize>,
    /// Than this rank, where there are two.
    other: usize,
    /// Whether there are two, which do not reach each other.
    both: bool,
    /// Whether sums of this rank are kept in its slots for others.
    kept: bool,
    dtype: DType,
}

impl Sharing<'_> {
    fn run(&self) -> Result<bool> {
        let chunks = self.staging.chunks(self.own.bytes);
        let lag = if self.both { 1 } else { 2 };
        for step in 0..chunks + lag {
            if step < chunks && !self.contribute(step)? {
                return Ok(false);
            }
            if step >= 1 && step <= chunks && !self.sum(step - 1)? {
                return Ok(false);
            }
            if step >= lag && !self.finish(step - lag)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Who sums chunk `index` for all.
    fn owner(&self, index: u64) -> usize {
        let turn = (index as usize + self.staging.block as usize) % self.givers.len().max(1);
        entry(&self.givers, turn)
    }

    /// Puts chunk `index` where the rank that sums it needs it there.
    fn contribute(&self, index: u64) -> Result<bool> {
        let owner = if self.both { self.other } else { self.owner(index) };
        if !self.staging.seat.gives() || self.staging.seat.seen_by(owner) {
            Ok(true)
        } else {
            self.staging.put(&self.own, index)
        }
    }

    /// Takes the sum of chunk `index` where its owner could not write it, and lets go of the chunk.
    fn finish(&self, index: u64) -> Result<bool> {
        let (staging, seat) = (&self.staging, self.staging.seat);
        let owner = if self.both { seat.index() } else { self.owner(index) };
        if !seat.seen_by(owner) {
            let flag = Seat::summed_flag(seat.inbox(owner), staging.block);
            if !seat.wait_for(flag, staging.mark(index), owner)? {
                return Ok(false);
            }
            if !self.both && seat.direct(staging.meeting, owner) {
                let from = staging.first(index);
                let mut chunk = vec![0; (staging.last(index, self.own.bytes) - from) as usize];
                self.tensor(owner).read(seat.eye, from, &mut chunk)?;
                self.own.write(seat.eye, from, &chunk)?;
            } else {
                staging.copy_back(&self.own, owner, index)?;
            }
        }
        staging.release(index)?;
        Ok(true)
    }

    /// A peer's tensor, of the same shape as this rank's.
    fn tensor(&self, peer: usize) -> Line {
        let seat = self.staging.seat;
        let about = self.staging.meeting.about(peer);
        let (rows, columns) = (seat.call.rows, seat.call.columns);
        Line::of(about.data, about.stride, rows, 0, columns, self.dtype.size() as u64)
    }

    /// Sums chunk `index` if this rank does.
    fn sum(&self, index: u64) -> Result<bool> {
        let (staging, seat) = (&self.staging, self.staging.seat);
        let (meeting, me) = (staging.meeting, seat.index());
        if !self.both && self.owner(index) != me {
            return Ok(true);
        }
        if !staging.await_of(index, |_| true)? || (self.kept && !staging.free_slot(index)?) {
            return Ok(false);
        }
        let from = staging.first(index);
        let mut chunk = vec![0; (staging.last(index, self.own.bytes) - from) as usize];
        let mut sum = Sum::new(self.dtype);
        for peer in self.present.iter().copied().filter(|peer| meeting.gives(*peer)) {
            if peer == me {
                self.own.read(seat.eye, from, &mut chunk)?;
            } else if seat.direct(meeting, peer) {
                self.tensor(peer).read(seat.eye, from, &mut chunk)?;
            } else {
                seat.eye.read(staging.slot(peer, index), &mut chunk, 1)?;
            }
            sum.add(&chunk);
        }
        sum.round(&mut chunk);
        for peer in self.present.iter().copied() {
            if peer == me {
                self.own.write(seat.eye, from, &chunk)?;
            } else if !self.both && meeting.gets(peer) && seat.direct(meeting, peer) {
                self.tensor(peer).write(seat.eye, from, &chunk)?;
            }
        }
        if self.kept {
            seat.eye.write(staging.slot(me, index), &chunk, 1)?;
        }
        stall();
        // Who could not be written to.
        let told = |peer: usize| !self.both && meeting.gets(peer) && !seat.direct(meeting, peer);
        for peer in staging.peers(told) {
            seat.eye.store64(Seat::summed_flag(seat.out(peer), staging.block), staging.mark(index))?;
        }
        Ok(true)
    }
}
