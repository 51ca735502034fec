//! `take`: everyone who gets anything takes the columns of everyone who gives. Columns are in bytes.

use super::copies::copy_rows;
use super::protocol::{Meeting, Seat, entry};
use super::staged::{Line, Staging};
use crate::codes::Result;
use crate::layout::Rows;

pub(super) fn direct(seat: &Seat<'_>, meeting: &Meeting) -> Result {
    if !seat.gets() {
        return Ok(());
    }
    for hop in 0..seat.ranks() {
        let peer = (seat.index() + hop) % seat.ranks();
        if !meeting.gives(peer) || seat.width(peer) == 0 || !seat.direct(meeting, peer) {
            continue;
        }
        let about = meeting.about(peer);
        let rows = Rows {
            to: seat.me.output + u64::from(entry(&seat.call.begin, peer)),
            to_stride: seat.me.output_stride,
            from: about.data + u64::from(entry(&seat.call.skip, peer)),
            from_stride: about.stride,
            count: seat.call.rows,
            width: seat.width(peer),
        };
        if rows.to != rows.from {
            copy_rows(seat.eye, &rows)?;
        }
    }
    Ok(())
}

/// What `direct` leaves.
pub(super) fn staged(seat: &Seat<'_>, meeting: &Meeting, block: u32) -> Result<bool> {
    let me = seat.index();
    let rows = seat.call.rows;
    let skip = u64::from(entry(&seat.call.skip, me));
    let own = Line::of(seat.me.input, seat.me.input_stride, rows, skip, seat.width(me), 1);
    let bytes: Vec<u64> = (0..seat.ranks()).map(|peer| rows * seat.width(peer)).collect();
    let staging = Staging::new(seat, meeting, block, rows * seat.call.columns);
    staging.each_chunk(&own, &bytes, |index| {
        for peer in 0..seat.ranks() {
            let length = entry(&bytes, peer);
            if !staging.takes_from(peer) || staging.first(index) >= length {
                continue;
            }
            let begin = u64::from(entry(&seat.call.begin, peer));
            let line = Line::of(seat.me.output, seat.me.output_stride, rows, begin, seat.width(peer), 1);
            staging.copy_back(&line, peer, index)?;
        }
        Ok(())
    })
}
