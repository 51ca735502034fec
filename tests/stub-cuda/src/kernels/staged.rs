//! Operations through each rank's staging memory, chunk by chunk, as cuda/staged.cuh has them.

use super::eye::Eye;
use super::numbers::Sum;
use super::protocol::{Meeting, Seat, entry};
use crate::codes::Result;
use crate::dtype::DType;
use crate::faults::stall;

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

/// The chunks of one block, and its place in everybody's staging memory.
pub(super) struct Staging<'a> {
    pub(super) seat: &'a Seat<'a>,
    pub(super) meeting: &'a Meeting,
    pub(super) block: u32,
}

impl Staging<'_> {
    fn chunk(&self) -> u64 {
        u64::from(self.seat.rank.chunk_bytes)
    }

    /// First byte of this block's chunk `index` of a line.
    pub(super) fn first(&self, index: u64) -> u64 {
        (index * u64::from(self.seat.blocks) + u64::from(self.block)) * self.chunk()
    }

    /// How many chunks of a line are this block's.
    fn chunks(&self, bytes: u64) -> u64 {
        bytes
            .div_ceil(self.chunk())
            .saturating_sub(u64::from(self.block))
            .div_ceil(u64::from(self.seat.blocks))
    }

    pub(super) fn slot(&self, owner: usize, index: u64) -> u64 {
        let slots = u64::from(self.seat.rank.slots);
        entry(&self.seat.rank.stage, owner) + (u64::from(self.block) * slots + index % slots) * self.chunk()
    }

    fn mark(&self, index: u64) -> u64 {
        self.meeting.sequence << 24 | (index + 1)
    }

    /// Puts chunk `index` of this rank's line where peers see it.
    fn put(&self, line: &Line, index: u64) -> Result<bool> {
        let seat = self.seat;
        let slots = u64::from(seat.rank.slots);
        let waits = || seat.others().filter(|peer| self.meeting.gets(*peer));
        if index >= slots {
            for peer in waits() {
                let flag = Seat::consumed_flag(seat.inbox(peer), self.block);
                if !seat.wait_for(flag, self.mark(index - slots), peer)? {
                    return Ok(false);
                }
            }
        }
        let from = self.first(index);
        let mut chunk = vec![0; (line.bytes - from).min(self.chunk()) as usize];
        line.read(seat.eye, from, &mut chunk)?;
        seat.eye.write(self.slot(seat.index(), index), &chunk, 1)?;
        stall();
        for peer in waits() {
            seat.eye.store64(Seat::staged_flag(seat.out(peer), self.block), self.mark(index))?;
        }
        Ok(true)
    }

    /// Waits for chunk `index` of every giver that has so many.
    fn await_chunk(&self, bytes: &[u64], index: u64) -> Result<bool> {
        for peer in self.seat.others().filter(|peer| self.meeting.gives(*peer)) {
            let flag = Seat::staged_flag(self.seat.inbox(peer), self.block);
            if index < self.chunks(entry(bytes, peer)) && !self.seat.wait_for(flag, self.mark(index), peer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells every giver that its chunk `index` is not needed any more.
    fn release(&self, index: u64) -> Result {
        for peer in self.seat.others().filter(|peer| self.meeting.gives(*peer)) {
            self.seat.eye.store64(Seat::consumed_flag(self.seat.out(peer), self.block), self.mark(index))?;
        }
        Ok(())
    }

    /// Every chunk of every rank goes past `work(index)`. False: a wait had to end.
    pub(super) fn each_chunk(&self, own: &Line, bytes: &[u64], work: impl Fn(u64) -> Result) -> Result<bool> {
        let (gives, gets) = (self.seat.gives(), self.seat.gets());
        let mine = if gives { self.chunks(own.bytes) } else { 0 };
        let theirs = (0..self.seat.ranks()).filter(|peer| gets && self.meeting.gives(*peer));
        let most = theirs.map(|peer| self.chunks(entry(bytes, peer))).max().unwrap_or(0).max(mine);
        for index in 0..most {
            if index < mine && !self.put(own, index)? {
                return Ok(false);
            }
            if !gets {
                continue;
            }
            if !self.await_chunk(bytes, index)? {
                return Ok(false);
            }
            work(index)?;
            self.release(index)?;
        }
        Ok(true)
    }
}

/// `all_reduce_large` where some tensor is out of a peer's reach.
pub(super) fn all_reduce(seat: &Seat<'_>, meeting: &Meeting, block: u32, dtype: DType) -> Result<bool> {
    let size = dtype.size() as u64;
    let (columns, rows) = (seat.call.columns, seat.call.rows);
    let own = Line::of(seat.me.output, seat.me.output_stride, rows, 0, columns, size);
    let staging = Staging { seat, meeting, block };
    staging.each_chunk(&own, &vec![own.bytes; seat.ranks()], |index| {
        let from = staging.first(index);
        if from >= own.bytes {
            return Ok(());
        }
        let mut chunk = vec![0; (own.bytes - from).min(staging.chunk()) as usize];
        let mut sum = Sum::new(dtype);
        for peer in (0..seat.ranks()).filter(|peer| meeting.gives(*peer)) {
            seat.eye.read(staging.slot(peer, index), &mut chunk, 1)?;
            sum.add(&chunk);
        }
        sum.round(&mut chunk);
        own.write(seat.eye, from, &chunk)
    })
}
