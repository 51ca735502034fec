//! Element types, and conversions of the narrow floats to and from float32.
//!
//! Every conversion to a narrow type rounds to nearest, ties to even, as torch does. Which values overflow to
//! what follows torch too: float16, bfloat16 and `float8_e5m2` to infinity, `float8_e4m3fn`, which has no
//! infinity, to NaN. A NaN stays a NaN of the same sign; its other bits carry no meaning.

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// Signed bytes: moved, never summed.
    I8,
    /// Bytes, and any quantised format seen as bytes: moved, never summed.
    U8,
    /// Signed integers of 32 bits: moved, never summed.
    I32,
    /// Signed integers of 64 bits, as indices are: moved, never summed.
    I64,
    /// Truth values, a byte each: moved, never summed.
    Bool,
    /// 4 bits of exponent, 3 of mantissa, no infinities, largest 448.
    F8E4M3,
    /// 5 bits of exponent, 2 of mantissa, infinities, largest 57344.
    F8E5M2,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 11] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::I8,
        Self::U8,
        Self::I32,
        Self::I64,
        Self::Bool,
        Self::F8E4M3,
        Self::F8E5M2,
    ];

    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I8 | Self::U8 | Self::Bool | Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// The name that torch gives it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::Bool => "bool",
            Self::F8E4M3 => "float8_e4m3fn",
            Self::F8E5M2 => "float8_e5m2",
        }
    }

    /// The type that torch calls by this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Whether a collective may sum it. Integers would wrap around, so they are only moved.
    #[must_use]
    pub const fn can_sum(self) -> bool {
        !matches!(self, Self::I8 | Self::U8 | Self::I32 | Self::I64 | Self::Bool)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The value of a bfloat16.
#[must_use]
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16.
#[must_use]
#[inline]
#[allow(clippy::cast_possible_truncation)] // Both arms are below 2^16.
pub fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN whose upper bits are zero would round to infinity.
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { nearest }) as u16
}

/// The value of a float16.
#[must_use]
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    F16.widen(bits & 0x7fff, (bits & 0x8000) << 16)
}

/// The nearest float16. From 65520 on, half way to what would be 65536, that is infinity.
#[must_use]
#[inline]
#[allow(clippy::cast_possible_truncation)] // 15 bits and the sign.
pub fn f16_from_f32(value: f32) -> u16 {
    (F16.narrow(value) | ((value.to_bits() >> 16) & 0x8000)) as u16
}

/// The value of a `float8_e4m3fn`.
#[must_use]
#[inline]
pub fn e4m3_to_f32(bits: u8) -> f32 {
    let bits = u32::from(bits);
    E4M3.widen(bits & 0x7f, (bits & 0x80) << 24)
}

/// The nearest `float8_e4m3fn`. Above 464, half way to what would be 480, there is only NaN.
#[must_use]
#[inline]
#[allow(clippy::cast_possible_truncation)] // 7 bits and the sign.
pub fn e4m3_from_f32(value: f32) -> u8 {
    (E4M3.narrow(value) | ((value.to_bits() >> 24) & 0x80)) as u8
}

/// The value of a `float8_e5m2`.
#[must_use]
#[inline]
pub fn e5m2_to_f32(bits: u8) -> f32 {
    let bits = u32::from(bits);
    E5M2.widen(bits & 0x7f, (bits & 0x80) << 24)
}

/// The nearest `float8_e5m2`. From 61440 on, half way to what would be 65536, that is infinity.
#[must_use]
#[inline]
#[allow(clippy::cast_possible_truncation)] // 7 bits and the sign.
pub fn e5m2_from_f32(value: f32) -> u8 {
    (E5M2.narrow(value) | ((value.to_bits() >> 24) & 0x80)) as u8
}

/// A narrow float format. Its conversions choose between results instead of branching, so that loops over them
/// become vector instructions; and they meet no subnormal float32, which a thread may have set to be flushed.
struct Format {
    bias: u32,
    mantissa_bits: u32,
    /// Magnitudes from here on become `overflow`.
    overflow_from: f32,
    overflow: u32,
    nan: u32,
    /// Magnitudes from here on are no finite number.
    special_from: u32,
}

const F16: Format = Format {
    bias: 15,
    mantissa_bits: 10,
    overflow_from: 65536.0,
    overflow: 0x7c00,
    nan: 0x7e00,
    special_from: 0x7c00,
};
const E4M3: Format =
    Format { bias: 7, mantissa_bits: 3, overflow_from: 480.0, overflow: 0x7f, nan: 0x7f, special_from: 0x7f };
const E5M2: Format = Format {
    bias: 15,
    mantissa_bits: 2,
    overflow_from: 65536.0,
    overflow: 0x7c,
    nan: 0x7f,
    special_from: 0x7c,
};

impl Format {
    /// The value of a magnitude, given the sign at its place in a float32.
    #[inline]
    fn widen(&self, magnitude: u32, sign: u32) -> f32 {
        let shifted = magnitude << (23 - self.mantissa_bits);
        let normal = shifted + ((127 - self.bias) << 23);
        // As the mantissa of the smallest normal number, less that number.
        let subnormal =
            f32::from_bits(shifted + ((128 - self.bias) << 23)) - f32::from_bits((128 - self.bias) << 23);
        // The mantissa stays: zero is an infinity, all else a NaN.
        let special = shifted | (0xff << 23);
        let finite = if magnitude >> self.mantissa_bits == 0 { subnormal.to_bits() } else { normal };
        f32::from_bits(sign | if magnitude >= self.special_from { special } else { finite })
    }

    /// The nearest magnitude.
    #[inline]
    fn narrow(&self, value: f32) -> u32 {
        let magnitude = value.to_bits() & 0x7fff_ffff;
        let dropped = 23 - self.mantissa_bits;
        // Beside this addend a float32's last place is the format's smallest subnormal: the addition rounds.
        let addend = f32::from_bits((128 - self.bias + dropped) << 23);
        let subnormal = (f32::from_bits(magnitude) + addend).to_bits().wrapping_sub(addend.to_bits());
        let odd = (magnitude >> dropped) & 1;
        let rebased = magnitude.wrapping_sub((127 - self.bias) << 23);
        let normal = rebased.wrapping_add((1 << (dropped - 1)) - 1 + odd) >> dropped;
        let finite = if magnitude < (128 - self.bias) << 23 { subnormal } else { normal };
        let number = if magnitude >= self.overflow_from.to_bits() { self.overflow } else { finite };
        if magnitude > 0x7f80_0000 { self.nan } else { number }
    }
}

#[cfg(test)]
#[path = "dtype_tests.rs"]
mod tests;
