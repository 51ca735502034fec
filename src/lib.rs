//! Tensor parallelism in one process.
pub mod device;
pub mod error;
pub mod model;
mod planning;
pub mod split;

pub use error::{Error, Kind, Result};
pub use planning::plan;
