//! `reduce_scatter`: the columns of this rank, summed from all who give.

use super::numbers::Sum;
use super::protocol::{Meeting, Seat, entry};
use super::staged::{Line, Staging};
use crate::codes::Result;
use crate::dtype::DType;

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

pub(super) fn staged(seat: &Seat<'_>, meeting: &Meeting, block: u32, dtype: DType) -> Result<bool> {
    let size = dtype.size() as u64;
    let columns = seat.call.columns;
    let own = Line::of(seat.me.input, seat.me.input_stride, seat.call.rows, 0, columns, size);
    let whole = seat.call.rows * columns * size;
    let begin = u64::from(entry(&seat.call.begin, seat.index()));
    let end = u64::from(entry(&seat.call.end, seat.index()));
    let staging = Staging::new(seat, meeting, block, whole);
    let least = if seat.gets() { staging.chunks(whole) } else { 0 };
    staging.each_chunk(&own, &vec![whole; seat.ranks()], least, |index| {
        let from = staging.first(index) / size;
        let to = staging.last(index, whole) / size;
        let mut at = from;
        while at < to {
            let (row, column) = (at / columns, at % columns);
            let stop = (at + columns - column).min(to);
            let (left, right) = (column.max(begin), (column + stop - at).min(end));
            if left < right {
                let mut part = vec![0; ((right - left) * size) as usize];
                let offset = (at - from + left - column) * size;
                let mut sum = Sum::new(dtype);
                for peer in (0..seat.ranks()).filter(|peer| meeting.gives(*peer)) {
                    let about = meeting.about(peer);
                    let place = if seat.direct(meeting, peer) {
                        about.data + (row * about.stride + left) * size
                    } else {
                        staging.slot(peer, index) + offset
                    };
                    seat.eye.read(place, &mut part, size)?;
                    sum.add(&part);
                }
                sum.round(&mut part);
                let to = seat.me.output + (row * seat.me.output_stride + left - begin) * size;
                seat.eye.write(to, &part, size)?;
            }
            at = stop;
        }
        Ok(())
    })
}
