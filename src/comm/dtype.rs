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
    /// 4 bits of exponent, 3 of mantissa, no infinities, largest 448.
    F8E4M3,
    /// 5 bits of exponent, 2 of mantissa, infinities, largest 57344.
    F8E5M2,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 8] =
        [Self::F64, Self::F32, Self::F16, Self::BF16, Self::I8, Self::U8, Self::F8E4M3, Self::F8E5M2];

    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I8 | Self::U8 | Self::F8E4M3 | Self::F8E5M2 => 1,
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
        !matches!(self, Self::I8 | Self::U8)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The value of a bfloat16.
#[must_use]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16.
#[must_use]
#[allow(clippy::cast_possible_truncation)] // Both arms are below 2^16.
pub fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN whose upper bits are zero would round to infinity.
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { nearest }) as u16
}

/// A float of 8 bits: its exponent's bias, and how many bits its mantissa has.
struct Format8 {
    bias: i16,
    mantissa_bits: u32,
    /// Magnitudes from here on (as a float32's bits) become `overflow`.
    overflow_from: f32,
    overflow: u32,
}

const E4M3: Format8 = Format8 { bias: 7, mantissa_bits: 3, overflow_from: 480.0, overflow: 0x7f };
const E5M2: Format8 = Format8 { bias: 15, mantissa_bits: 2, overflow_from: 65536.0, overflow: 0x7c };

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Every result is below 2^8, every exponent positive.
fn narrow(value: f32, format: &Format8) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    let power_of_two = |exponent: i16| f32::from_bits(((exponent + 127) as u32) << 23);
    let dropped = 23 - format.mantissa_bits;
    let rounded = if value.is_nan() {
        0x7f
    } else if magnitude >= format.overflow_from.to_bits() {
        format.overflow
    } else if magnitude < power_of_two(1 - format.bias).to_bits() {
        // Beside this addend a float32's last place is the format's smallest subnormal: the addition rounds.
        let addend = power_of_two(1 - format.bias + dropped as i16);
        (f32::from_bits(magnitude) + addend).to_bits() - addend.to_bits()
    } else {
        let odd = (magnitude >> dropped) & 1;
        let rebased = magnitude - (((127 - format.bias) as u32) << 23);
        (rebased + (1 << (dropped - 1)) - 1 + odd) >> dropped
    };
    (sign | rounded) as u8
}

/// The nearest `float8_e4m3fn`. Above 464, half way to what would be 480, there is only NaN.
#[must_use]
pub fn e4m3_from_f32(value: f32) -> u8 {
    narrow(value, &E4M3)
}

/// The nearest `float8_e5m2`. From 61440 on, half way to what would be 65536, that is infinity.
#[must_use]
pub fn e5m2_from_f32(value: f32) -> u8 {
    narrow(value, &E5M2)
}

/// The value of a `float8_e4m3fn`.
#[must_use]
pub fn e4m3_to_f32(bits: u8) -> f32 {
    E4M3_VALUES[usize::from(bits)]
}

/// The value of a `float8_e5m2`: it is a float16 without its lower byte.
#[must_use]
pub fn e5m2_to_f32(bits: u8) -> f32 {
    half::f16::from_bits(u16::from(bits) << 8).to_f32()
}

static E4M3_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut bits = 0;
    while bits < 256_u16 {
        let (exponent, mantissa) = ((bits >> 3) & 15, bits & 7);
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            // 2^(exponent - 7) from its bits, times 1.mantissa.
            f32::from_bits((exponent as u32 + 120) << 23) * (1.0 + mantissa as f32 / 8.0)
        };
        values[bits as usize] = if bits >= 128 { -magnitude } else { magnitude };
        bits += 1;
    }
    values
};

#[cfg(test)]
#[path = "dtype_tests.rs"]
mod tests;
