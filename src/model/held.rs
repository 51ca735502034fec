//! [`ModelShape::held_as`]: a model whose weights become plain elements of one type when they are loaded.

use std::collections::HashSet;
use std::str::FromStr;

use super::roles::names::{self, Leaf, Name};
use super::roles::{self, grids};
use super::{ModelShape, Quantization, RawTensor, Tensor};
use crate::error::{Error, Result};

/// A type that weights are held and computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// Eight bytes.
    Float64,
    /// Four bytes.
    Float32,
    /// Two bytes.
    Float16,
    /// Two bytes.
    Bfloat16,
}

impl WeightType {
    /// The name that [`WeightType::from_str`] takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Float64 => "float64",
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
        }
    }

    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Float64 => 8,
            Self::Float32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
        }
    }

    /// As a safetensors header writes it.
    fn stored(self) -> &'static str {
        match self {
            Self::Float64 => "F64",
            Self::Float32 => "F32",
            Self::Float16 => "F16",
            Self::Bfloat16 => "BF16",
        }
    }
}

impl FromStr for WeightType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Float64, Self::Float32, Self::Float16, Self::Bfloat16]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                Error::invalid("weights", format!("{text:?}"), "float32, bfloat16, float16 or float64")
            })
    }
}

impl ModelShape {
    /// The same model with every weight a plain element of `dtype`, as a loader holds it that decodes quantised
    /// weights or converts floats.
    ///
    /// Bytes are those of the decoded tensors; scales, zero points and indices are gone, and with them the places
    /// that cuts had to keep to. Activations are counted in `dtype` too. Tensors of integers stay as they are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a quantisation whose decoded shapes do not follow from the headers, and for
    /// sizes beyond 64 bits.
    pub fn held_as(&self, dtype: WeightType) -> Result<Self> {
        let mut dimensions = self.dimensions.clone();
        let stored = std::mem::replace(&mut dimensions.quantization, Quantization::None);
        dimensions.element_bytes = dtype.bytes();
        let known = match &stored {
            Quantization::Exl2 => false,
            // Without blocks a matrix has one scale, which takes no part in its shape.
            Quantization::Other { name } => name == "fp8",
            _ => true,
        };
        if !known {
            let got = format!("{} for weights quantised by {}", dtype.name(), grids::method(&stored));
            return Err(Error::invalid(
                "weights",
                got,
                "None, which plans for the weights as they are stored",
            ));
        }
        let read: Vec<Name> = self.tensors.iter().map(|tensor| names::read(&tensor.name)).collect();
        let packed: HashSet<&str> = read
            .iter()
            .zip(&self.tensors)
            .filter(|(name, tensor)| name.leaf == Leaf::PackedWeight || tensor.dtype.starts_with("F8"))
            .map(|(name, _)| name.prefix.as_str())
            .collect();
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in read.iter().zip(&self.tensors) {
            let of_packed = packed.contains(name.prefix.as_str());
            if !(of_packed && is_decoding_data(name.leaf)) {
                tensors.push(decoded(name, tensor, &stored, dtype)?);
            }
        }
        let name = format!("{} (weights as {})", self.name, dtype.name());
        let (tensors, unsplittable) = roles::classify(tensors, &dimensions);
        Ok(Self { name, source: self.source, dimensions, tensors, unsplittable })
    }
}

/// Whether a tensor of a quantised module is used up by decoding its weight.
fn is_decoding_data(leaf: Leaf) -> bool {
    !matches!(leaf, Leaf::Weight | Leaf::Bias | Leaf::PackedWeight)
}

fn decoded(name: &Name, tensor: &Tensor, stored: &Quantization, dtype: WeightType) -> Result<RawTensor> {
    let mut raw = RawTensor {
        name: tensor.name.clone(),
        dtype: tensor.dtype.clone(),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes,
        block: 1,
    };
    if name.leaf == Leaf::PackedWeight {
        let size = grids::size(name, &raw, stored).unwrap_or_default();
        let (Some(outputs), Some(inputs)) = (size.outputs, size.inputs) else {
            let got = format!("{} of shape {:?}", raw.name, raw.shape);
            return Err(Error::invalid("weights", got, "two dimensions of packed elements; plan with None"));
        };
        raw.name = raw.name.strip_suffix("qweight").map_or(raw.name.clone(), |stem| format!("{stem}weight"));
        raw.shape = vec![outputs, inputs];
    } else if !matches!(stored, Quantization::Gguf) && !is_float(&raw.dtype) {
        return Ok(raw);
    }
    raw.bytes =
        raw.shape.iter().try_fold(dtype.bytes(), |bytes, length| bytes.checked_mul(*length)).ok_or_else(
            || Error::invalid("weights", format!("{} of shape {:?}", raw.name, raw.shape), "less"),
        )?;
    dtype.stored().clone_into(&mut raw.dtype);
    Ok(raw)
}

fn is_float(dtype: &str) -> bool {
    dtype.starts_with('F') || dtype == "BF16"
}

#[cfg(test)]
mod tests;
