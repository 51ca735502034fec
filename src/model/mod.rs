//! What a split must know of a model: [`ModelShape`] from configurations and headers, never from weights.

mod activations;
mod check;
pub mod checkpoint;
pub mod config;
mod exllamav2;
mod from_headers;
pub mod gguf;
mod gguf_config;
mod header;
mod held;
pub mod index;
mod inventory;
mod json;
pub mod roles;
mod rotary;
pub mod safetensors;
#[cfg(test)]
mod samples;
mod shape;
mod tensor;
mod visitors;
mod workload;

pub use held::WeightType;
pub use shape::{Dimensions, Layer, Mixer, Mlp, ModelShape, Quantization, Source, Unsplittable};
pub use tensor::{CutAlong, Part, RawTensor, Role, Tensor};
pub(crate) use workload::Costs;
