//! The patterns that prove access to a peer's memory.

use super::eye::Eye;
use crate::codes::Result;

fn word(index: u32, seed: u32) -> u32 {
    (index ^ seed).wrapping_mul(2_654_435_761)
}

pub(super) fn write(device: u32, memory: u64, words: u32, seed: u32) -> Result {
    (0..words).try_for_each(|index| Eye(device).store32(memory + u64::from(index) * 4, word(index, seed)))
}

pub(super) fn check(device: u32, memory: u64, (words, seed): (u32, u32), wrong: u64) -> Result {
    let eye = Eye(device);
    for index in 0..words {
        if eye.load32(memory + u64::from(index) * 4)? != word(index, seed) {
            eye.add32(wrong, 1)?;
        }
    }
    Ok(())
}
