//! What a split must know of a model: [`ModelShape`] from configurations and headers, never from weights.

mod check;
pub mod checkpoint;
pub mod config;
mod config_defaults;
mod config_layers;
mod config_mlp;
mod config_quantization;
mod config_reader;
#[cfg(test)]
mod config_tests;
mod exllamav2;
mod from_headers;
mod geometry;
pub mod gguf;
mod gguf_config;
#[cfg(test)]
mod gguf_config_tests;
mod gguf_metadata;
mod gguf_names;
mod header;
pub mod index;
mod inventory;
mod inventory_mlp;
mod inventory_quantized;
#[cfg(test)]
mod inventory_tests;
mod inventory_traits;
mod json;
mod names;
mod quantization;
pub mod roles;
pub mod safetensors;
#[cfg(test)]
mod samples;
mod shape;
mod tensor;
mod visitors;
mod workload;

pub use shape::{Dimensions, Layer, Mixer, Mlp, ModelShape, Quantization, Source, Unsplittable};
pub use tensor::{CutAlong, Part, RawTensor, Role, Tensor};
pub(crate) use workload::Costs;
