//! `copy`: rows to or from host memory, and a word for the host when all are there.

use super::eye::Eye;
use crate::codes::Result;
use crate::layout::{Copies, Rows};

/// The widest access that all addresses allow.
pub(super) fn unit(bits: u64) -> u64 {
    [16, 4, 2].into_iter().find(|unit| bits.is_multiple_of(*unit)).unwrap_or(1)
}

/// Copies rows of bytes.
pub(super) fn copy_rows(eye: Eye, rows: &Rows) -> Result {
    let mut bits = rows.to | rows.from | rows.width;
    if rows.count > 1 {
        bits |= rows.to_stride | rows.from_stride;
    }
    let mut line = vec![0; rows.width as usize];
    for row in 0..rows.count {
        eye.read(rows.from + row * rows.from_stride, &mut line, unit(bits))?;
        eye.write(rows.to + row * rows.to_stride, &line, unit(bits))?;
    }
    Ok(())
}

pub(super) fn run(device: u32, members: u32, copies: &Copies) -> Result {
    let eye = Eye(device);
    for rows in copies.rows.iter().take(members as usize) {
        copy_rows(eye, rows)?;
    }
    if copies.done != 0 {
        // The last block finds that all have left.
        eye.add32(copies.leaving, 1)?;
        eye.store32(copies.leaving, 0)?;
        eye.store32(copies.done, copies.value)?;
    }
    Ok(())
}
