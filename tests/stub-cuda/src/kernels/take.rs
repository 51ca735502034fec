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
        if !meeting.gives(peer) || seat.width(peer) == 0 {
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

pub(super) fn staged(seat: &Seat<'_>, meeting: &Meeting, block: u32) -> Result<bool> {
    let me = seat.index();
    let skip = u64::from(entry(&seat.call.skip, me));
    let own = Line::of(seat.me.input, seat.me.input_stride, seat.call.rows, skip, seat.width(me), 1);
    let bytes: Vec<u64> = (0..seat.ranks()).map(|peer| seat.call.rows * seat.width(peer)).collect();
    let staging = Staging { seat, meeting, block };
    staging.each_chunk(&own, &bytes, |index| {
        let from = staging.first(index);
        for peer in (0..seat.ranks()).filter(|peer| meeting.gives(*peer)) {
            let length = entry(&bytes, peer);
            if from >= length {
                continue;
            }
            let begin = u64::from(entry(&seat.call.begin, peer));
            let (output, stride) = (seat.me.output, seat.me.output_stride);
            let line = Line::of(output, stride, seat.call.rows, begin, seat.width(peer), 1);
            // A root's own tensor is in its place already.
            if peer == me && line.data == own.data {
                continue;
            }
            let to = (from + u64::from(seat.rank.chunk_bytes)).min(length);
            let mut chunk = vec![0; (to - from) as usize];
            seat.eye.read(staging.slot(peer, index), &mut chunk, 1)?;
            line.write(seat.eye, from, &chunk)?;
        }
        Ok(())
    })
}
