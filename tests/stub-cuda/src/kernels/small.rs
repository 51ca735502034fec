//! `all_reduce_small`: every rank pushes its tensor to all others, 4 bytes beside each sequence number.

use super::numbers::Sum;
use super::protocol::Seat;
use crate::codes::Result;
use crate::dtype::DType;
use crate::faults::stall;
use crate::layout::{GIVES, INBOX_BYTES};

pub(super) fn run(seat: &mut Seat<'_>, dtype: DType) -> Result {
    let whole = seat.announce(false)?;
    let sequence = whole as u32;
    let size = dtype.size() as u64;
    let row_bytes = seat.call.columns * size;
    let total = (seat.call.rows * row_bytes) as usize;
    let packs = total.div_ceil(8);
    let area = INBOX_BYTES as u64 + (whole & 1) * seat.rank.small_bytes * 2;
    let row_at = |row: u64| seat.me.output + row * seat.me.output_stride * size;
    let mut own = vec![0; packs * 8];
    for (row, line) in (0..seat.call.rows).zip(own.chunks_mut(row_bytes.max(1) as usize)) {
        let length = line.len().min(row_bytes as usize);
        seat.eye.read(row_at(row), line.get_mut(..length).unwrap_or_default(), size)?;
    }
    // What lies behind the end is zero.
    own.get_mut(total..).unwrap_or_default().fill(0);
    for peer in seat.others() {
        stall();
        for (pack, words) in own.chunks_exact(8).enumerate() {
            seat.send(seat.out(peer) + area + 16 * pack as u64, sequence, halves(words))?;
        }
    }
    if let Some(sum) = add_up(seat, dtype, sequence, area, &own)? {
        sum.round(&mut own);
        let lines = own.get(..total).unwrap_or_default().chunks(row_bytes.max(1) as usize);
        for (row, line) in (0..seat.call.rows).zip(lines) {
            seat.eye.write(row_at(row), line, size)?;
        }
    }
    seat.leave(whole, None)
}

/// The sum of what this rank has and its peers pushed. `None`: leave at once.
fn add_up(seat: &Seat<'_>, dtype: DType, sequence: u32, area: u64, own: &[u8]) -> Result<Option<Sum>> {
    if !seat.alive()? {
        return Ok(None);
    }
    let mut sum = Sum::new(dtype);
    for peer in 0..seat.ranks() {
        if peer == seat.index() {
            if seat.gives() {
                sum.add(own);
            }
            continue;
        }
        // A peer tells whether it made the same call before what it pushed is taken.
        let Some([what, ..]) = seat.read_letter(sequence, peer, false)? else { return Ok(None) };
        if what.1 & GIVES == 0 {
            continue;
        }
        let mut part = Vec::with_capacity(own.len());
        for pack in 0..own.len() as u64 / 8 {
            let at = seat.inbox(peer) + area + 16 * pack;
            let Some((low, high)) = seat.receive(at, sequence, peer)? else { return Ok(None) };
            part.extend_from_slice(&low.to_le_bytes());
            part.extend_from_slice(&high.to_le_bytes());
        }
        sum.add(&part);
    }
    Ok(Some(sum))
}

fn halves(words: &[u8]) -> (u32, u32) {
    let whole = words.try_into().map_or(0, u64::from_le_bytes);
    (whole as u32, (whole >> 32) as u32)
}
