//! ggml's tensor types: how many elements share a block, and how many bytes a block takes.
//!
//! Source: the block structures of ggml (`ggml-common.h`), whose sizes the Python package `gguf` lists too
//! (`gguf.constants.GGML_QUANT_SIZES`, which the test compares with).

/// A ggml tensor type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType {
    /// ggml's name, in capitals.
    pub name: &'static str,
    /// Elements of a block, along the innermost dimension. 1 for plain types.
    pub block: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

impl TensorType {
    /// The type with ggml's number `id`; `None` for a number that ggml has not given, or has withdrawn.
    #[must_use]
    pub fn of(id: u32) -> Option<Self> {
        let (name, block, bytes) = match id {
            0 => ("F32", 1, 4),
            1 => ("F16", 1, 2),
            2 => ("Q4_0", 32, 18),
            3 => ("Q4_1", 32, 20),
            6 => ("Q5_0", 32, 22),
            7 => ("Q5_1", 32, 24),
            8 => ("Q8_0", 32, 34),
            9 => ("Q8_1", 32, 40),
            10 => ("Q2_K", 256, 84),
            11 => ("Q3_K", 256, 110),
            12 => ("Q4_K", 256, 144),
            13 => ("Q5_K", 256, 176),
            14 => ("Q6_K", 256, 210),
            15 => ("Q8_K", 256, 292),
            16 => ("IQ2_XXS", 256, 66),
            17 => ("IQ2_XS", 256, 74),
            18 => ("IQ3_XXS", 256, 98),
            19 => ("IQ1_S", 256, 50),
            20 => ("IQ4_NL", 32, 18),
            21 => ("IQ3_S", 256, 110),
            22 => ("IQ2_S", 256, 82),
            23 => ("IQ4_XS", 256, 136),
            24 => ("I8", 1, 1),
            25 => ("I16", 1, 2),
            26 => ("I32", 1, 4),
            27 => ("I64", 1, 8),
            28 => ("F64", 1, 8),
            29 => ("IQ1_M", 256, 56),
            30 => ("BF16", 1, 2),
            34 => ("TQ1_0", 256, 54),
            35 => ("TQ2_0", 256, 66),
            39 => ("MXFP4", 32, 17),
            40 => ("NVFP4", 64, 36),
            41 => ("Q1_0", 128, 18),
            _ => return None,
        };
        Some(Self { name, block, bytes })
    }

    /// Whether ggml once had a type with this number and has removed it: `Q4_2`, `Q4_3`, and the types whose rows were
    /// interleaved for one kind of processor (`Q4_0_4_4`, `IQ4_NL_4_4` and their like).
    pub(super) fn is_withdrawn(id: u32) -> bool {
        matches!(id, 4 | 5 | 31..=33 | 36..=38)
    }
}
