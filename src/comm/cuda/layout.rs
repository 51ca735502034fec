//! What the kernels and the host share, as cuda/protocol.cuh has it.

/// Ranks that one communicator can have on CUDA devices.
pub(super) const MOST_RANKS: usize = 16;
/// The most blocks that a rank uses: more would not fill any link better.
pub(super) const MOST_BLOCKS: u32 = 128;
/// Bytes of one letter.
pub(super) const LETTER_BYTES: usize = 64;
/// Threads of a block.
pub(super) const THREADS: u32 = 512;

pub(super) const GIVES: u32 = 1;
pub(super) const GETS: u32 = 2;
pub(super) const PLAIN: u32 = 4;

pub(super) const TIMED_OUT: u32 = 1;
pub(super) const DISAGREED: u32 = 2;
pub(super) const TOLD_BY_PEER: u32 = 3;

/// What a kernel says about a rank that stopped.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Status {
    pub(super) state: u32,
    pub(super) sequence: u32,
    pub(super) missing: u32,
    pub(super) signature: u32,
}

/// Bytes of an inbox without the areas for pushed pieces behind it.
pub(super) const INBOX_BYTES: usize = 24960;
/// Where an inbox has the word by which its writer says that it stopped.
pub(super) const STOP_AT: usize = 256;

/// A rank, in its device's memory.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Rank {
    pub(super) index: u32,
    pub(super) ranks: u32,
    pub(super) slot_bytes: u32,
    pub(super) slots: u32,
    pub(super) area_bytes: u64,
    pub(super) out: [u64; MOST_RANKS],
    pub(super) inboxes: [u64; MOST_RANKS],
    pub(super) stage: [u64; MOST_RANKS],
    pub(super) seen: [u64; MOST_RANKS],
    pub(super) status: u64,
    pub(super) stop: u64,
    pub(super) reaches: u16,
    pub(super) reached: u16,
    pub(super) connected: u16,
    pub(super) staging_blocks: u16,
    pub(super) state: [u32; 4],
}

/// What one rank brings to an operation.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Member {
    pub(super) rank: u64,
    pub(super) input: u64,
    pub(super) input_stride: u64,
    pub(super) output: u64,
    pub(super) output_stride: u64,
    pub(super) role: u32,
    pub(super) index: u32,
}

/// The parameter of every operation's kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Call {
    pub(super) timeout: u64,
    pub(super) rows: u64,
    pub(super) columns: u64,
    pub(super) signature: u32,
    pub(super) targets: u32,
    pub(super) ranks: u32,
    pub(super) widest: u32,
    pub(super) begin: [u32; MOST_RANKS],
    pub(super) end: [u32; MOST_RANKS],
    pub(super) skip: [u32; MOST_RANKS],
    pub(super) members: [Member; MOST_RANKS],
}

/// Rows of bytes that a kernel copies.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rows {
    pub(super) to: u64,
    pub(super) to_stride: u64,
    pub(super) from: u64,
    pub(super) from_stride: u64,
    pub(super) count: u64,
    pub(super) width: u64,
}

/// The parameter of the kernel that copies rows to and from host memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Copies {
    pub(super) leaving: u64,
    pub(super) done: u64,
    pub(super) value: u32,
    pub(super) unused: u32,
    pub(super) rows: [Rows; MOST_RANKS],
}

/// What a kernel between two copies of a lane does, its second parameter.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Step {
    pub(super) scratch: u64,
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) lane: u32,
    pub(super) copied: u32,
    pub(super) awaited: u32,
    pub(super) size: u32,
}

/// The sizes that the kernels must have been made with: the variable `tp_rs_layout`.
#[allow(clippy::cast_possible_truncation)] // Hundreds of bytes.
pub(super) const SIZES: [u32; 7] = [
    size_of::<Status>() as u32,
    INBOX_BYTES as u32,
    size_of::<Rank>() as u32,
    size_of::<Call>() as u32,
    size_of::<Copies>() as u32,
    size_of::<Step>() as u32,
    THREADS,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_kernels_have_these_sizes() {
        let text = include_str!("../../../cuda/tp_rs.ptx");
        let line = text.lines().find(|line| line.contains("tp_rs_layout[")).unwrap();
        let (_, list) = line.split_once('{').unwrap();
        let mut bytes: Vec<u8> =
            list.trim_end_matches("};").split(',').map(|byte| byte.trim().parse().unwrap()).collect();
        // Zeros at the end are left out of the text.
        bytes.resize(size_of_val(&SIZES), 0);
        let words: Vec<u32> =
            bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, SIZES);
    }
}
