//! A CUDA driver in host memory, for tests on machines without a GPU and for what GPUs don't do on command.
//!
//! It has the functions that `tp_rs` calls, and no more. Streams are queues with threads, and the kernels of cuda/
//! run as Rust, on the same structures, with real concurrency: ranks wait for each other through memory. Where the
//! real driver leaves behaviour undefined this one is strict, and keeps a list of what was done wrong.
//!
//! | file | what it does |
//! |---|---|
//! | `api/` | the driver's functions |
//! | `control.rs` | `stub_...`: how tests set it up, break it, and ask what happened |
//! | `faults.rs` | counting calls, injected errors, stalls |
//! | `device.rs`, `memory.rs`, `stream.rs`, `graph.rs`, `ptx.rs` | what the driver keeps |
//! | `kernels/` | the kernels, one file an operation |

mod api;
mod codes;
mod control;
mod device;
#[allow(dead_code, missing_docs)]
#[path = "../../../src/comm/dtype.rs"]
mod dtype;
mod faults;
mod graph;
mod kernels;
// What the host writes is what the kernels read.
#[allow(dead_code)]
#[path = "../../../src/comm/cuda/layout.rs"]
mod layout;
mod memory;
mod ptx;
mod report;
mod stream;
