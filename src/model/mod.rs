//! What a split must know of a model: [`ModelShape`] from configurations and headers, never from weights.

pub mod checkpoint;
pub mod gguf;
mod header;
pub mod index;
mod json;
pub mod safetensors;
mod shape;
mod tensor;
mod visitors;
mod workload;

pub use shape::{Dimensions, Layer, Mixer, Mlp, ModelShape, Quantization, Source, Unsplittable};
pub use tensor::{CutAlong, Part, RawTensor, Role, Tensor};
pub(crate) use workload::Costs;
