//! Sums of elements: in the order in which they come, in float32 (float64 for float64), rounded once.

use crate::dtype::{
    DType, bf16_from_f32, bf16_to_f32, e4m3_from_f32, e4m3_to_f32, e5m2_from_f32, e5m2_to_f32, f16_from_f32,
    f16_to_f32,
};

fn widen(dtype: DType, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (DType::F64, bytes) => bytes.try_into().map_or(f64::NAN, f64::from_le_bytes),
        (DType::F32, bytes) => {
            bytes.try_into().map_or(f64::NAN, |bytes| f64::from(f32::from_le_bytes(bytes)))
        }
        (DType::F16, &[a, b]) => f64::from(f16_to_f32(u16::from_le_bytes([a, b]))),
        (DType::BF16, &[a, b]) => f64::from(bf16_to_f32(u16::from_le_bytes([a, b]))),
        (DType::F8E4M3, &[a]) => f64::from(e4m3_to_f32(a)),
        (DType::F8E5M2, &[a]) => f64::from(e5m2_to_f32(a)),
        _ => f64::NAN,
    }
}

#[allow(clippy::cast_possible_truncation)] // The value is a float32.
fn narrow(dtype: DType, value: f64, bytes: &mut [u8]) {
    let single = value as f32;
    match (dtype, bytes) {
        (DType::F64, bytes @ [_, _, _, _, _, _, _, _]) => bytes.copy_from_slice(&value.to_le_bytes()),
        (DType::F32, bytes @ [_, _, _, _]) => bytes.copy_from_slice(&single.to_le_bytes()),
        (DType::F16, bytes @ [_, _]) => bytes.copy_from_slice(&f16_from_f32(single).to_le_bytes()),
        (DType::BF16, bytes @ [_, _]) => bytes.copy_from_slice(&bf16_from_f32(single).to_le_bytes()),
        (DType::F8E4M3, [byte]) => *byte = e4m3_from_f32(single),
        (DType::F8E5M2, [byte]) => *byte = e5m2_from_f32(single),
        _ => {}
    }
}

/// Elements as they are added up.
pub(super) struct Sum {
    dtype: DType,
    values: Vec<f64>,
    first: bool,
}

impl Sum {
    pub(super) fn new(dtype: DType) -> Self {
        Self { dtype, values: Vec::new(), first: true }
    }

    /// Adds elements; the first ones replace what was there.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let dtype = self.dtype;
        let parts = bytes.chunks_exact(dtype.size()).map(|element| widen(dtype, element));
        if std::mem::replace(&mut self.first, false) {
            self.values = parts.collect();
            return;
        }
        for (sum, part) in self.values.iter_mut().zip(parts) {
            // A float64 sum of two float32 rounds to their float32 sum (Figueroa, When is double rounding
            // innocuous?, 1995).
            #[allow(clippy::cast_possible_truncation)]
            let single = || f64::from((*sum + part) as f32);
            *sum = if dtype == DType::F64 { *sum + part } else { single() };
        }
    }

    /// Rounds to the type.
    pub(super) fn round(&self, bytes: &mut [u8]) {
        for (value, element) in self.values.iter().zip(bytes.chunks_exact_mut(self.dtype.size())) {
            narrow(self.dtype, *value, element);
        }
    }
}
