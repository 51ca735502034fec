//! Matrices with random content and gaps between rows, and sums of them computed one element at a time.

use tp_rs::comm::dtype::{
    bf16_from_f32, bf16_to_f32, e4m3_from_f32, e4m3_to_f32, e5m2_from_f32, e5m2_to_f32,
};
use tp_rs::comm::{DType, Device, Tensor};

pub(crate) fn next(seed: &mut u64) -> u64 {
    // SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Waits up to 200 microseconds, half of the time not at all.
pub(crate) fn pause(seed: u64) {
    let random = next(&mut { seed });
    if random.is_multiple_of(2) {
        std::thread::sleep(std::time::Duration::from_micros(random / 2 % 200));
    }
}

/// A call of a long run.
#[derive(PartialEq)]
pub(crate) enum Step {
    Small,
    Large,
    Broadcast,
    Gather,
    Barrier,
}

impl Step {
    pub(crate) fn of(step: usize) -> Self {
        match next(&mut { step as u64 }) % 12 {
            0 => Self::Large,
            1..4 => Self::Broadcast,
            4..7 => Self::Gather,
            7 => Self::Barrier,
            _ => Self::Small,
        }
    }
}

/// Rows of elements with gaps between them, in memory of its own.
#[derive(Clone)]
pub(crate) struct Matrix {
    dtype: DType,
    rows: usize,
    columns: usize,
    stride: usize,
    /// Aligned for every type.
    memory: Vec<u64>,
}

impl Matrix {
    fn new(dtype: DType, rows: usize, columns: usize, stride: usize) -> Self {
        let memory = vec![0; (rows * stride * dtype.size()).div_ceil(8)];
        Self { dtype, rows, columns, stride, memory }
    }

    /// Values of about -8 to 8, or any bytes for integers; half of the matrices have gaps between rows.
    pub(crate) fn random(dtype: DType, rows: usize, columns: usize, mut seed: u64) -> Self {
        let gap = next(&mut seed);
        let gap = if gap.is_multiple_of(2) { 0 } else { (gap / 2 % 7) as usize };
        let mut matrix = Self::new(dtype, rows, columns, columns + gap);
        let count = rows * (columns + gap);
        let bytes = if dtype.can_sum() {
            let mut value = || (next(&mut seed) >> 11) as f64 / (1_u64 << 53) as f64 * 16.0 - 8.0;
            encode(dtype, &(0..count).map(|_| value()).collect::<Vec<_>>())
        } else {
            (0..count).map(|_| next(&mut seed) as u8).collect()
        };
        matrix.write(&bytes);
        matrix
    }

    pub(crate) fn of_elements(dtype: DType, rows: usize, columns: usize, elements: &[u8]) -> Self {
        let mut matrix = Self::new(dtype, rows, columns, columns);
        matrix.write(elements);
        matrix
    }

    fn write(&mut self, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let shift = index % 8 * 8;
            self.memory[index / 8] = self.memory[index / 8] & !(0xff << shift) | u64::from(*byte) << shift;
        }
    }

    pub(crate) fn tensor(&mut self) -> Tensor {
        // An empty one has no memory at all.
        let data = if self.memory.is_empty() { 0 } else { self.memory.as_mut_ptr().expose_provenance() };
        Tensor {
            row_stride: self.stride,
            ..Tensor::dense(data, Device::Cpu, self.dtype, self.rows, self.columns)
        }
    }

    fn bytes_where(&self, keep: impl Fn(usize) -> bool) -> Vec<u8> {
        let bytes: Vec<u8> = self.memory.iter().flat_map(|word| word.to_le_bytes()).collect();
        let row = self.stride * self.dtype.size();
        let all = bytes.iter().take(self.rows * row).enumerate();
        all.filter(|(index, _)| keep(index % row / self.dtype.size())).map(|(_, byte)| *byte).collect()
    }

    /// The elements' bytes, row after row.
    pub(crate) fn elements(&self) -> Vec<u8> {
        self.bytes_where(|column| column < self.columns)
    }

    /// The bytes between rows.
    pub(crate) fn gaps(&self) -> Vec<u8> {
        self.bytes_where(|column| column >= self.columns)
    }
}

/// Columns of a matrix of bytes.
pub(crate) fn cut(bytes: &[u8], row: usize, start: usize, width: usize) -> Vec<u8> {
    bytes.chunks(row.max(1)).flat_map(|row| row[start..start + width].to_vec()).collect()
}

/// Writes a part to its columns of a matrix without gaps that has `total` of them.
pub(crate) fn paste(whole: &mut [u8], total: usize, start: usize, part: &Matrix) {
    let size = part.dtype.size();
    let width = part.columns * size;
    if width == 0 {
        return;
    }
    for (row, bytes) in part.elements().chunks(width).enumerate() {
        let at = (row * total + start) * size;
        whole[at..at + width].copy_from_slice(bytes);
    }
}

/// Values as bytes of a type.
pub(crate) fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    let narrow = |value: f64| value as f32;
    let one = |value: f64| -> Vec<u8> {
        match dtype {
            DType::F64 => value.to_le_bytes().to_vec(),
            DType::F32 => narrow(value).to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(narrow(value)).to_le_bytes().to_vec(),
            DType::BF16 => bf16_from_f32(narrow(value)).to_le_bytes().to_vec(),
            DType::F8E4M3 => vec![e4m3_from_f32(narrow(value))],
            DType::F8E5M2 => vec![e5m2_from_f32(narrow(value))],
            DType::I8 | DType::U8 | DType::I32 | DType::I64 | DType::Bool => unreachable!(),
        }
    };
    values.iter().flat_map(|value| one(*value)).collect()
}

/// The values of bytes of a type.
pub(crate) fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let pair = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    let one = |bytes: &[u8]| -> f64 {
        match dtype {
            DType::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
            DType::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
            DType::F16 => half::f16::from_bits(pair(bytes)).to_f64(),
            DType::BF16 => f64::from(bf16_to_f32(pair(bytes))),
            DType::F8E4M3 => f64::from(e4m3_to_f32(bytes[0])),
            DType::F8E5M2 => f64::from(e5m2_to_f32(bytes[0])),
            DType::I8 | DType::U8 | DType::I32 | DType::I64 | DType::Bool => unreachable!(),
        }
    };
    bytes.chunks(dtype.size()).map(one).collect()
}

/// The sum as promised: in order, in float64 for float64 and in float32 for everything else, rounded once.
pub(crate) fn sum_of(matrices: &[&Matrix]) -> Vec<u8> {
    let dtype = matrices[0].dtype;
    let all: Vec<Vec<f64>> = matrices.iter().map(|matrix| decode(dtype, &matrix.elements())).collect();
    let add = |left: f64, right: f64| match dtype {
        DType::F64 => left + right,
        // The float64 sum of two float32 rounds to their float32 sum (Figueroa, When is double rounding
        // innocuous?, 1995).
        _ => f64::from((left + right) as f32),
    };
    let sums = (0..all[0].len()).map(|index| {
        let column = all.iter().map(|values| values[index]);
        column.reduce(add).unwrap()
    });
    encode(dtype, &sums.collect::<Vec<_>>())
}
