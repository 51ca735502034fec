//! Tensor parallelism in one process.
pub mod error;
pub mod model;
pub mod split;

pub use error::{Error, Kind, Result};
