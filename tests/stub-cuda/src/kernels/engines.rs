//! What runs before, between and after the copies of engines, as cuda/engines.cuh has it.

use super::copies::copy_rows;
use super::numbers::Sum;
use super::protocol::{Meeting, Peer, Seat, entry};
use super::staged::Line;
use crate::codes::Result;
use crate::dtype::DType;
use crate::faults::stall;
use crate::layout::{GETS, GIVES, LETTER_BYTES, Rows, Step};

/// One step of one rank.
struct Engine<'a> {
    seat: &'a Seat<'a>,
    step: &'a Step,
    sequence: u64,
    peer: usize,
    /// Of the peer.
    role: u32,
}

/// The rank that is not this one.
fn other(seat: &Seat<'_>) -> usize {
    1 - seat.index()
}

/// What the peer brings, from the letter that `meet` has passed on.
fn role_of_other(seat: &Seat<'_>) -> Result<u32> {
    let sequence = seat.sequence()? + 1;
    let letter = entry(&seat.rank.seen, other(seat)) + (sequence & 1) * LETTER_BYTES as u64;
    Ok(seat.eye.load64(letter + 8)? as u32)
}

impl<'a> Engine<'a> {
    /// `None`: the rank has stopped.
    fn new(seat: &'a Seat<'a>, step: &'a Step) -> Result<Option<Self>> {
        stall();
        if !seat.alive()? {
            return Ok(None);
        }
        let (sequence, peer, role) = (seat.sequence()? + 1, other(seat), role_of_other(seat)?);
        Ok(Some(Self { seat, step, sequence, peer, role }))
    }

    fn mark(&self, chunk: u32) -> u64 {
        self.sequence << 24 | u64::from(chunk)
    }

    /// Lets the peer use the slot, works on what has come, waits for the lane's next chunk.
    fn receive(&self, in_place: bool, work: impl FnOnce() -> Result) -> Result {
        let (seat, step) = (self.seat, self.step);
        let given = self.role & GIVES != 0;
        let (inbox, out) = (seat.inbox(self.peer), seat.out(self.peer));
        if given && step.copied != 0 {
            seat.eye.store64(Seat::consumed_flag(out, step.lane), self.mark(step.copied))?;
        }
        if step.from < step.to {
            work()?;
        }
        if step.awaited == 0 {
            return Ok(());
        }
        let awaited = self.mark(step.awaited);
        if given && !seat.wait_for(Seat::staged_flag(inbox, step.lane), awaited, self.peer)? {
            return Ok(());
        }
        if in_place && seat.gives() && self.role & GETS != 0 {
            seat.wait_for(Seat::staged_flag(out, step.lane), awaited, self.peer)?;
        }
        Ok(())
    }

    /// The chunk in the scratch memory.
    fn chunk(&self) -> Result<Vec<u8>> {
        let mut chunk = vec![0; (self.step.to - self.step.from) as usize];
        self.seat.eye.read(self.step.scratch, &mut chunk, 1)?;
        Ok(chunk)
    }
}

pub(super) fn meet(seat: &Seat<'_>) -> Result {
    let sequence = seat.announce(false)?;
    if seat.alive()? {
        seat.read_letter(sequence as u32, other(seat), false)?;
    }
    Ok(())
}

pub(super) fn own(seat: &Seat<'_>) -> Result {
    if !seat.alive()? {
        return Ok(());
    }
    let me = seat.index();
    let rows = Rows {
        to: seat.me.output + u64::from(entry(&seat.call.begin, me)),
        to_stride: seat.me.output_stride,
        from: seat.me.input + u64::from(entry(&seat.call.skip, me)),
        from_stride: seat.me.input_stride,
        count: seat.call.rows,
        width: seat.width(me),
    };
    if rows.to == rows.from { Ok(()) } else { copy_rows(seat.eye, &rows) }
}

pub(super) fn send(seat: &Seat<'_>, step: &Step) -> Result {
    let Some(engine) = Engine::new(seat, step)? else { return Ok(()) };
    if engine.role & GETS == 0 {
        return Ok(());
    }
    if step.copied != 0 {
        let flag = Seat::staged_flag(seat.out(engine.peer), step.lane);
        seat.eye.store64(flag, engine.mark(step.copied))?;
    }
    if step.from < step.to {
        let me = seat.index();
        let (size, width, skip) = match step.size {
            0 => (1, seat.width(me), u64::from(entry(&seat.call.skip, me))),
            size => (u64::from(size), seat.call.columns, 0),
        };
        let line = Line::of(seat.me.input, seat.me.input_stride, seat.call.rows, skip, width, size);
        let mut chunk = vec![0; (step.to - step.from) as usize];
        line.read(seat.eye, step.from, &mut chunk)?;
        seat.eye.write(step.scratch, &chunk, 1)?;
    }
    if step.awaited != 0 {
        let flag = Seat::consumed_flag(seat.inbox(engine.peer), step.lane);
        seat.wait_for(flag, engine.mark(step.awaited), engine.peer)?;
    }
    Ok(())
}

pub(super) fn take(seat: &Seat<'_>, step: &Step) -> Result {
    let Some(engine) = Engine::new(seat, step)? else { return Ok(()) };
    engine.receive(false, || {
        if engine.role & GIVES == 0 {
            return Ok(());
        }
        let begin = u64::from(entry(&seat.call.begin, engine.peer));
        let width = seat.width(engine.peer);
        let line = Line::of(seat.me.output, seat.me.output_stride, seat.call.rows, begin, width, 1);
        line.write(seat.eye, step.from, &engine.chunk()?)
    })
}

pub(super) fn sum(seat: &Seat<'_>, step: &Step, dtype: DType) -> Result {
    let Some(engine) = Engine::new(seat, step)? else { return Ok(()) };
    engine.receive(true, || {
        let size = dtype.size() as u64;
        let (rows, columns) = (seat.call.rows, seat.call.columns);
        let line = Line::of(seat.me.output, seat.me.output_stride, rows, 0, columns, size);
        let mut chunk = engine.chunk()?;
        let mut sum = Sum::new(dtype);
        let mut any = false;
        for rank in 0..seat.ranks() {
            let mine = rank == seat.index();
            if (if mine { seat.me.role } else { engine.role }) & GIVES == 0 {
                continue;
            }
            any = true;
            if mine {
                let mut own = vec![0; chunk.len()];
                line.read(seat.eye, step.from, &mut own)?;
                sum.add(&own);
            } else {
                sum.add(&chunk);
            }
        }
        if !any {
            return Ok(());
        }
        sum.round(&mut chunk);
        line.write(seat.eye, step.from, &chunk)
    })
}

pub(super) fn leave(seat: &Seat<'_>) -> Result {
    let sequence = seat.sequence()? + 1;
    let came = seat.alive()?;
    let mut peers = vec![Peer { role: seat.me.role, ..Peer::default() }; seat.ranks()];
    if came && let Some(about) = peers.get_mut(other(seat)) {
        about.role = role_of_other(seat)?;
    }
    let meeting = Meeting { sequence, peers };
    seat.leave(sequence, came.then_some(&meeting))
}
