//! `reduce_scatter`: the columns of this rank, summed from all who give.

use super::numbers::Sum;
use super::protocol::{Meeting, Seat, entry};
use super::staged::{Line, Staging};
use crate::codes::Result;
use crate::dtype::DType;
use crate::faults::stall;

pub(super) fn direct(seat: &Seat<'_>, meeting: &Meeting, dtype: DType) -> Result {
    if !seat.gets() {
        return Ok(());
    }
    let size = dtype.size() as u64;
    let begin = u64::from(entry(&seat.call.begin, seat.index()));
    let mut line = vec![0; (seat.width(seat.index()) * size) as usize];
    for row in 0..seat.call.rows {
        let mut sum = Sum::new(dtype);
        for peer in (0..seat.ranks()).filter(|peer| meeting.gives(*peer)) {
            let about = meeting.about(peer);
            seat.eye.read(about.data + (row * about.stride + begin) * size, &mut line, size)?;
            sum.add(&line);
        }
        sum.round(&mut line);
        seat.eye.write(seat.me.output + row * seat.me.output_stride * size, &line, size)?;
    }
    Ok(())
}

/// Every rank puts for each rank out of reach that rank's columns only, and sums its own. Chunks go round by round: one
/// chunk of every rank's columns, which all others put for it in the same turn.
pub(super) fn staged(seat: &Seat<'_>, meeting: &Meeting, block: u32, dtype: DType) -> Result<bool> {
    let size = dtype.size() as u64;
    let ranks = seat.ranks();
    let widest = (0..ranks).map(|peer| seat.width(peer)).max().unwrap_or(0);
    let whole = seat.call.rows * widest * size;
    let rounds = Rounds { staging: Staging::new(seat, meeting, block, whole), dtype };
    let mine = if seat.gets() { rounds.chunks(seat.index()) } else { 0 };
    let turns = rounds.staging.chunks(whole) * ranks as u64;
    for step in 0..=turns {
        let (target, round) = rounds.turn(step);
        if step < turns && !rounds.put(target, round)? {
            return Ok(false);
        }
        // What was put for the last turn.
        let Some(last) = step.checked_sub(1) else { continue };
        let (target, round) = rounds.turn(last);
        if target == seat.index() && round < mine && !rounds.sum(round)? {
            return Ok(false);
        }
    }
    Ok(true)
}

struct Rounds<'a> {
    staging: Staging<'a>,
    dtype: DType,
}

impl Rounds<'_> {
    /// Whose columns a step is for, and of which round. Blocks begin with different ranks.
    fn turn(&self, step: u64) -> (usize, u64) {
        let ranks = self.staging.seat.ranks() as u64;
        let target = (step + ranks - u64::from(self.staging.block) % ranks) % ranks;
        (target as usize, step / ranks)
    }

    /// How many chunks of a rank's columns are this block's.
    fn chunks(&self, target: usize) -> u64 {
        let seat = self.staging.seat;
        self.staging.chunks(seat.call.rows * seat.width(target) * self.dtype.size() as u64)
    }

    /// The place of a chunk among those of a giver, counted as if it put for all others.
    fn place(&self, giver: usize, target: usize, round: u64) -> u64 {
        let ranks = self.staging.seat.ranks() as u64;
        let turn = |rank: usize| (rank as u64 + u64::from(self.staging.block)) % ranks;
        let at = turn(target) - u64::from(turn(target) > turn(giver));
        round * ((ranks - 1) | 1) + at
    }

    /// Waits until all have taken what was put at least as many places before as there are slots.
    fn free_place(&self, place: u64) -> Result<bool> {
        let (staging, seat) = (&self.staging, self.staging.seat);
        let Some(before) = place.checked_sub(u64::from(seat.rank.slots)) else { return Ok(true) };
        for peer in seat.others().filter(|peer| staging.puts_for(*peer)) {
            let places = (0..self.chunks(peer)).map(|round| self.place(seat.index(), peer, round));
            let Some(last) = places.take_while(|place| *place <= before).last() else { continue };
            let flag = Seat::consumed_flag(seat.inbox(peer), staging.block);
            if !seat.wait_for(flag, staging.mark(last), peer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Columns of this rank's input.
    fn columns(&self, target: usize) -> Line {
        let seat = self.staging.seat;
        let begin = u64::from(entry(&seat.call.begin, target));
        let (rows, size) = (seat.call.rows, self.dtype.size() as u64);
        Line::of(seat.me.input, seat.me.input_stride, rows, begin, seat.width(target), size)
    }

    /// Puts a chunk of the columns of `target` where it sees it.
    fn put(&self, target: usize, round: u64) -> Result<bool> {
        let (staging, seat) = (&self.staging, self.staging.seat);
        let me = seat.index();
        if target == me || !seat.gives() || !staging.puts_for(target) || round >= self.chunks(target) {
            return Ok(true);
        }
        let place = self.place(me, target, round);
        if !self.free_place(place)? {
            return Ok(false);
        }
        let line = self.columns(target);
        let from = staging.first(round);
        let mut chunk = vec![0; (staging.last(round, line.bytes) - from) as usize];
        line.read(seat.eye, from, &mut chunk)?;
        seat.eye.write(staging.slot(me, place), &chunk, 1)?;
        stall();
        seat.eye.store64(Seat::staged_flag(seat.out(target), staging.block), staging.mark(place))?;
        Ok(true)
    }

    /// Sums chunk `round` of this rank's columns once the others' parts are there, and lets go of them.
    fn sum(&self, round: u64) -> Result<bool> {
        let (staging, seat) = (&self.staging, self.staging.seat);
        let (meeting, me) = (staging.meeting, seat.index());
        for peer in staging.peers(|peer| staging.takes_from(peer)) {
            let flag = Seat::staged_flag(seat.inbox(peer), staging.block);
            if !seat.wait_for(flag, staging.mark(self.place(peer, me, round)), peer)? {
                return Ok(false);
            }
        }
        let (rows, width, size) = (seat.call.rows, seat.width(me), self.dtype.size() as u64);
        let target = Line::of(seat.me.output, seat.me.output_stride, rows, 0, width, size);
        let from = staging.first(round);
        let mut chunk = vec![0; (staging.last(round, target.bytes) - from) as usize];
        let mut sum = Sum::new(self.dtype);
        for peer in staging.peers(|peer| meeting.gives(peer)) {
            if peer == me {
                self.columns(me).read(seat.eye, from, &mut chunk)?;
            } else if seat.direct(meeting, peer) {
                let about = meeting.about(peer);
                let begin = u64::from(entry(&seat.call.begin, me));
                Line::of(about.data, about.stride, rows, begin, width, size)
                    .read(seat.eye, from, &mut chunk)?;
            } else {
                seat.eye.read(staging.slot(peer, self.place(peer, me, round)), &mut chunk, 1)?;
            }
            sum.add(&chunk);
        }
        sum.round(&mut chunk);
        target.write(seat.eye, from, &chunk)?;
        for peer in staging.peers(|peer| staging.takes_from(peer)) {
            let flag = Seat::consumed_flag(seat.out(peer), staging.block);
            seat.eye.store64(flag, staging.mark(self.place(peer, me, round)))?;
        }
        Ok(true)
    }
}
