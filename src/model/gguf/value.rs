//! Metadata values of a GGUF file.

/// The type of a metadata value, by GGUF's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    /// 8 bits, unsigned.
    U8,
    /// 8 bits, signed.
    I8,
    /// 16 bits, unsigned.
    U16,
    /// 16 bits, signed.
    I16,
    /// 32 bits, unsigned.
    U32,
    /// 32 bits, signed.
    I32,
    /// 32 bits, floating point.
    F32,
    /// One byte, 0 or 1.
    Bool,
    /// Bytes with a length.
    String,
    /// Values of one type, with a length.
    Array,
    /// 64 bits, unsigned.
    U64,
    /// 64 bits, signed.
    I64,
    /// 64 bits, floating point.
    F64,
}

impl GgufType {
    /// The type with GGUF's number `id`.
    pub(super) fn of(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of a value of this type; `None` for strings and arrays, whose length is in the file.
    pub(super) fn bytes(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// A metadata value. Numbers are widened to 64 bits.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// An unsigned number.
    Unsigned(u64),
    /// A signed number.
    Signed(i64),
    /// A floating-point number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string. Bytes that are not UTF-8 are replaced.
    String(String),
    /// An array.
    Array(GgufArray),
}

/// An array of metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufArray {
    /// The type of its values.
    pub element: GgufType,
    /// How many it has.
    pub length: u64,
    /// The values; `None` where they were passed over: strings (a tokenizer's words), arrays in the array, and more
    /// than [`GgufArray::MAX_KEPT`] values.
    pub values: Option<Vec<GgufValue>>,
}

impl GgufArray {
    /// Most values that are kept. The arrays that say something of the model have a value a layer.
    pub const MAX_KEPT: u64 = 4096;
}

impl GgufValue {
    /// The value as a number that is not negative, whatever integer type it was written with.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// The value as a floating-point number, integers included.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            Self::Float(value) => Some(value),
            _ => None,
        }
    }

    /// The value as a truth value.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// The value as a string.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value as an array.
    #[must_use]
    pub fn as_array(&self) -> Option<&GgufArray> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }

    /// An array's values as numbers that are not negative; `None` where it is no such array, or was not kept.
    #[must_use]
    pub fn as_u64s(&self) -> Option<Vec<u64>> {
        self.as_array()?.values.as_ref()?.iter().map(Self::as_u64).collect()
    }

    /// An array's values as truth values; `None` where it is no such array, or was not kept.
    #[must_use]
    pub fn as_bools(&self) -> Option<Vec<bool>> {
        self.as_array()?.values.as_ref()?.iter().map(Self::as_bool).collect()
    }

    /// An array's values as numbers, truth values as 0 and 1; `None` where it is no such array, or was not kept.
    #[must_use]
    pub fn as_numbers(&self) -> Option<Vec<f64>> {
        let number = |value: &Self| value.as_f64().or_else(|| value.as_bool().map(f64::from));
        self.as_array()?.values.as_ref()?.iter().map(number).collect()
    }
}
