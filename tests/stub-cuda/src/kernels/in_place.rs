//! `all_reduce_large` where all reach all: each rank sums its share of the elements, from all and to all.

use super::numbers::Sum;
use super::protocol::{Meeting, Seat};
use crate::codes::Result;
use crate::dtype::DType;

pub(super) fn run(seat: &Seat<'_>, meeting: &Meeting, dtype: DType) -> Result {
    let size = dtype.size() as u64;
    let columns = seat.call.columns;
    let total = seat.call.rows * columns;
    let present: Vec<usize> = (0..seat.ranks()).filter(|peer| meeting.present(*peer)).collect();
    let before = present.iter().filter(|peer| **peer < seat.index()).count() as u64;
    // Shares end at 128 bytes.
    let line = 128 / size;
    let lines = total.div_ceil(line);
    let share = |index: u64| (lines * index / present.len().max(1) as u64 * line).min(total);
    let (mut at, end) = (share(before), share(before + 1));
    while at < end {
        let (row, column) = (at / columns, at % columns);
        let count = (columns - column).min(end - at);
        let place = |peer: usize| {
            let about = meeting.about(peer);
            about.data + (row * about.stride + column) * size
        };
        let mut part = vec![0; (count * size) as usize];
        let mut sum = Sum::new(dtype);
        for peer in present.iter().filter(|peer| meeting.gives(**peer)) {
            seat.eye.read(place(*peer), &mut part, size)?;
            sum.add(&part);
        }
        sum.round(&mut part);
        for peer in present.iter().filter(|peer| meeting.gets(**peer)) {
            seat.eye.write(place(*peer), &part, size)?;
        }
        at += count;
    }
    Ok(())
}
