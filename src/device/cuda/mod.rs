//! CUDA devices through the driver: contexts shared with whoever else uses them, memory, streams, modules, peers.
//!
//! Every function leaves the thread's current context as it was. What is dropped is given back; a driver that
//! refuses that is logged, since nobody could act upon it.

mod calls;
mod context;
mod memory;
mod module;
mod peers;
pub(crate) mod pointer;
mod probe;
mod stream;

pub(crate) use context::Context;
pub(crate) use memory::{DeviceMemory, PinnedMemory, read, write};
pub(crate) use module::{Function, Module};
pub(crate) use peers::{Connections, Prover, connect};
pub(crate) use probe::devices;
pub(crate) use stream::{Event, OwnStream, capturing};
