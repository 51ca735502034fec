//! Tensor parallelism in one process, over devices that need not match.
//!
//! It plans: from a checkpoint's headers, without reading a weight, it finds the fastest split over unequal devices and
//! says to the byte what every rank will hold, whether that fits, and the largest context that would. And it moves and
//! sums what ranks have, on host memory and on CUDA devices.
//!
//! | room | what it does |
//! |---|---|
//! | [`model`] | what a split must know of a model, from configurations and headers |
//! | [`split`] | arithmetic: splits, the solver, memory, plans |
//! | [`device`] | devices: which there are, what is free on them, how fast their memory is |
//! | [`comm`] | moves and sums tensors between the ranks of this process, on host memory and, with `cuda`, on CUDA devices |
//! | [`error`] | the one error type |
//!
//! ```no_run
//! use tp_rs::model::ModelShape;
//! use tp_rs::split::{Options, RankBudget};
//!
//! let shape = ModelShape::open("path/to/checkpoint")?;
//! // A card of 24 GiB beside one of 12.
//! let budgets = [RankBudget::cuda(0, 24.0), RankBudget::cuda(1, 12.0)];
//! let plan = tp_rs::plan(&shape, &budgets, &Options::default())?;
//! match &plan.shortfall {
//!     None => println!("fits, with up to {} tokens of context", plan.max_context),
//!     Some(shortfall) => println!("{shortfall}"),
//! }
//! # Ok::<(), tp_rs::Error>(())
//! ```

pub mod comm;
pub mod device;
pub mod error;
pub mod model;
mod planning;
#[cfg(feature = "python")]
mod python;
pub mod split;

pub use error::{Error, Kind, Result};
pub use planning::plan;
