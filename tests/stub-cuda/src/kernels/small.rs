//! Operations on little data: every rank pushes what its peers need in pieces, as cuda/pieces.cuh has them.

use super::numbers::Sum;
use super::protocol::{Seat, entry};
use crate::codes::Result;
use crate::dtype::DType;
use crate::faults::stall;
use crate::layout::{GIVES, INBOX_BYTES};

/// Rows of a tensor, or columns of it, that go as one line.
struct Part {
    data: u64,
    stride: u64,
    rows: u64,
    width: u64,
    size: u64,
}

impl Part {
    fn bytes(&self) -> usize {
        (self.rows * self.width) as usize
    }

    fn read(&self, seat: &Seat<'_>) -> Result<Vec<u8>> {
        let mut line = vec![0; self.bytes()];
        for (row, bytes) in (0..self.rows).zip(line.chunks_mut(self.width.max(1) as usize)) {
            seat.eye.read(self.data + row * self.stride, bytes, self.size)?;
        }
        Ok(line)
    }

    fn write(&self, seat: &Seat<'_>, line: &[u8]) -> Result {
        for (row, bytes) in (0..self.rows).zip(line.chunks(self.width.max(1) as usize)) {
            seat.eye.write(self.data + row * self.stride, bytes, self.size)?;
        }
        Ok(())
    }
}

/// Columns of this rank's input.
fn given(seat: &Seat<'_>, first: u64, columns: u64, size: u64) -> Part {
    let (data, stride) = (seat.me.input + first * size, seat.me.input_stride * size);
    Part { data, stride, rows: seat.call.rows, width: columns * size, size }
}

/// Columns of this rank's output.
fn got(seat: &Seat<'_>, first: u64, columns: u64, size: u64) -> Part {
    let (data, stride) = (seat.me.output + first * size, seat.me.output_stride * size);
    Part { data, stride, rows: seat.call.rows, width: columns * size, size }
}

fn area(seat: &Seat<'_>, whole: u64) -> u64 {
    INBOX_BYTES as u64 + (whole & 1) * seat.rank.area_bytes
}

/// Bytes of a tensor in a piece: whole elements.
fn piece_bytes(size: usize) -> usize {
    if size == 8 { 8 } else { 12 }
}

fn push(seat: &Seat<'_>, whole: u64, peer: usize, line: &[u8], size: usize) -> Result {
    stall();
    for (index, bytes) in (0..).zip(line.chunks(piece_bytes(size))) {
        // What lies behind the end is zero.
        let mut data = [0; 12];
        data.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
        send_piece(seat, seat.out(peer) + area(seat, whole) + 16 * index, whole as u32, data)?;
    }
    Ok(())
}

/// Whether a peer gives anything, once its letter has come. `None`: leave at once.
fn greet(seat: &Seat<'_>, whole: u64, peer: usize) -> Result<Option<bool>> {
    Ok(seat.read_letter(whole as u32, peer, false)?.map(|[what, ..]| what.1 & GIVES != 0))
}

/// 12 bytes that a peer pushes, beside the sequence number. A GPU reads them in one access; here the number is written last
/// and read first.
fn receive_piece(seat: &Seat<'_>, at: u64, sequence: u32, peer: usize) -> Result<Option<[u8; 12]>> {
    seat.wait(peer, || {
        let high = seat.eye.load64(at + 8)?;
        if (high >> 32) as u32 != sequence {
            return Ok(None);
        }
        let low = seat.eye.load64(at)?.to_le_bytes();
        let mut bytes = low.into_iter().chain((high as u32).to_le_bytes());
        Ok(Some(std::array::from_fn(|_| bytes.next().unwrap_or(0))))
    })
}

fn send_piece(seat: &Seat<'_>, at: u64, sequence: u32, data: [u8; 12]) -> Result {
    let [low @ .., a, b, c, d] = data;
    seat.eye.store64(at, u64::from_le_bytes(low))?;
    let high = u64::from(u32::from_le_bytes([a, b, c, d]));
    seat.eye.store64(at + 8, high | u64::from(sequence) << 32)
}

/// What a peer pushed. `None`: leave at once.
fn receive(seat: &Seat<'_>, whole: u64, peer: usize, bytes: usize, size: usize) -> Result<Option<Vec<u8>>> {
    let each = piece_bytes(size);
    let mut line = Vec::with_capacity(bytes + each);
    for index in 0..bytes.div_ceil(each) as u64 {
        let at = seat.inbox(peer) + area(seat, whole) + 16 * index;
        let Some(data) = receive_piece(seat, at, whole as u32, peer)? else { return Ok(None) };
        line.extend(data.iter().take(each));
    }
    line.truncate(bytes);
    Ok(Some(line))
}

/// The sum of this rank's part and of what its peers pushed. `None`: leave at once.
fn add_up(seat: &Seat<'_>, dtype: DType, whole: u64, own: &[u8], bytes: usize) -> Result<Option<Sum>> {
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
        match greet(seat, whole, peer)? {
            None => return Ok(None),
            Some(false) => {}
            Some(true) => {
                let Some(part) = receive(seat, whole, peer, bytes, dtype.size())? else { return Ok(None) };
                sum.add(&part);
            }
        }
    }
    Ok(Some(sum))
}

pub(super) fn all_reduce(seat: &mut Seat<'_>, dtype: DType) -> Result {
    let whole = seat.announce(false)?;
    let tensor = got(seat, 0, seat.call.columns, dtype.size() as u64);
    let mut own = tensor.read(seat)?;
    for peer in seat.others() {
        push(seat, whole, peer, &own, dtype.size())?;
    }
    if let Some(sum) = add_up(seat, dtype, whole, &own, own.len())? {
        sum.round(&mut own);
        tensor.write(seat, &own)?;
    }
    seat.leave(whole, None)
}

pub(super) fn reduce_scatter(seat: &mut Seat<'_>, dtype: DType) -> Result {
    let whole = seat.announce(false)?;
    let size = dtype.size() as u64;
    let columns = |peer: usize| given(seat, u64::from(entry(&seat.call.begin, peer)), seat.width(peer), size);
    if seat.gives() {
        for peer in seat.others() {
            push(seat, whole, peer, &columns(peer).read(seat)?, dtype.size())?;
        }
    }
    let target = got(seat, 0, seat.width(seat.index()), size);
    let own = if seat.gives() { columns(seat.index()).read(seat)? } else { Vec::new() };
    let bytes = if seat.gets() { target.bytes() } else { 0 };
    if let Some(sum) = add_up(seat, dtype, whole, own.get(..bytes).unwrap_or_default(), bytes)? {
        let mut line = vec![0; bytes];
        if bytes > 0 {
            sum.round(&mut line);
            target.write(seat, &line)?;
        }
    }
    seat.leave(whole, None)
}

/// Broadcast, gather to a rank, `all_gather`. Columns are in bytes.
pub(super) fn take(seat: &mut Seat<'_>) -> Result {
    let whole = seat.announce(false)?;
    let me = seat.index();
    let place = |peer: usize| got(seat, u64::from(entry(&seat.call.begin, peer)), seat.width(peer), 1);
    if seat.gives() {
        let own = given(seat, u64::from(entry(&seat.call.skip, me)), seat.width(me), 1);
        let line = own.read(seat)?;
        for peer in seat.others().filter(|peer| seat.call.targets >> peer & 1 == 1) {
            push(seat, whole, peer, &line, 1)?;
        }
        if seat.gets() && place(me).data != own.data {
            place(me).write(seat, &line)?;
        }
    }
    if seat.alive()? {
        for peer in seat.others() {
            let Some(gives) = greet(seat, whole, peer)? else { break };
            if !gives || !seat.gets() {
                continue;
            }
            let Some(line) = receive(seat, whole, peer, place(peer).bytes(), 1)? else { break };
            place(peer).write(seat, &line)?;
        }
    }
    seat.leave(whole, None)
}
