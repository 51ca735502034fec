//! The communicator: moves and sums tensors between the ranks of one process.
//!
//! Every rank's memory is addressable from everywhere, so there is no launcher, no registration and no copy
//! through a socket. A [`Communicator`] has two sets of calls that do the same:
//! - *list calls* take one tensor a rank and are made from one thread ([`Communicator::all_reduce`]);
//! - *rank calls* are made by every rank for itself, from a thread each, and meet each other
//!   ([`Communicator::rank_all_reduce`]).
//!
//! Sums run in the order of the ranks, in float32 (float64 for float64), and are rounded once. The result is
//! bitwise the same on every rank, from run to run, and between both sets of calls. Only the payload of a NaN
//! is the processor's choice; it, too, is the same on every rank.
//!
//! Every wait for other ranks is bounded: see [`CommOptions::timeout`], [`CommOptions::poll`] and
//! [`Communicator::abort`]. Ranks whose threads share an interpreter take turns with a [`Baton`].

mod backend;
mod baton;
mod check;
mod communicator;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod dtype;
mod job;
mod meeting;
mod operation;
mod options;
mod ranks;
mod refusal;
mod sum;
mod sync;
mod view;

pub use baton::{Baton, LaidDown};
pub use communicator::Communicator;
pub use dtype::DType;
pub use options::{CommOptions, Peers, Poll};
pub use view::Tensor;

pub use crate::device::{Device, Stream};
