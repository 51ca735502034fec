//! Which devices can read and write each other's memory. What the driver says is not believed: known drivers report
//! access where copies give zeros though nothing fails, so each ordered pair is proved by kernels that write
//! and read a pattern.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::calls::log_failure;
use super::context::Context;
use super::memory::{DeviceMemory, read};
use super::module::{Function, Module};
use super::stream::OwnStream;
use crate::error::Result;

/// Words of the pattern. More than a cache line and no power of two.
const WORDS: u32 = 1021;

/// A device as it is needed for the proof.
pub(crate) struct Prover<'a> {
    pub(crate) context: &'a Arc<Context>,
    pub(crate) stream: &'a OwnStream,
    pub(crate) module: &'a Module,
    pub(crate) write: Function,
    pub(crate) check: Function,
}

/// Which device reaches the memory of which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Connections {
    devices: usize,
    reaches: Vec<bool>,
}

impl Connections {
    /// Whether kernels of `from` read and write memory of `to`. Each reaches its own.
    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        self.reaches.get(from * self.devices + to).copied().unwrap_or(false)
    }
}

/// Enables access for every ordered pair of devices and proves it. A pair that fails is left to staging, with a
/// warning where the driver had claimed that it works.
///
/// `lie` makes the proofs look for another pattern than was written, as if the driver had lied.
pub(crate) fn connect(devices: &[Prover<'_>], lie: bool) -> Result<Connections> {
    let count = devices.len();
    let mut reaches = vec![false; count * count];
    for (index, reach) in reaches.iter_mut().enumerate() {
        let (Some(from), Some(to)) = (devices.get(index / count), devices.get(index % count)) else {
            continue;
        };
        *reach = if index / count == index % count && !lie {
            true
        } else if enable(from.context, to.context)? {
            let works = prove(from, to, lie)?;
            if !works {
                tracing::warn!(
                    "the driver says that cuda:{} can access cuda:{}, and a pattern that was written did not come \
                     back; data between them goes through host memory",
                    from.context.index(),
                    to.context.index(),
                );
            }
            works
        } else {
            false
        };
    }
    Ok(Connections { devices: count, reaches })
}

/// Lets `from` access the memory of `to`, if the driver says that it can.
fn enable(from: &Context, to: &Context) -> Result<bool> {
    if from.index() == to.index() {
        return Ok(true);
    }
    let mut can = 0;
    // SAFETY: `can` is a valid place for an int, and both handles came from the driver.
    let code = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, from.device(), to.device()) };
    from.check("cuDeviceCanAccessPeer", code)?;
    if can == 0 {
        return Ok(false);
    }
    let _current = from.enter()?;
    // SAFETY: the other context is retained; 0 is the only flag there is.
    let code = unsafe { sys::cuCtxEnablePeerAccess(to.raw(), 0) };
    match code {
        // torch may have done it before.
        CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
        // A device has a limited number of peers, and virtual machines may forbid it.
        CUresult::CUDA_ERROR_TOO_MANY_PEERS
        | CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
        | CUresult::CUDA_ERROR_NOT_PERMITTED => {
            tracing::info!(?code, from = from.index(), to = to.index(), "no peer access");
            Ok(false)
        }
        _ => from.check("cuCtxEnablePeerAccess", code).map(|()| false),
    }
}

/// Whether what `from` writes into the memory of `to` is there, and what `to` wrote can be read by `from`.
fn prove(from: &Prover<'_>, to: &Prover<'_>, lie: bool) -> Result<bool> {
    let bytes = WORDS as usize * 4;
    let memory = DeviceMemory::zeroed(to.context, bytes, to.stream)?;
    let works = exchange(from, to, &memory, lie);
    if works.is_err() {
        // Freeing the memory waits for its own device only, and a kernel of the other one may still be on its way.
        log_failure(from.context.synchronize());
    }
    works
}

fn exchange(from: &Prover<'_>, to: &Prover<'_>, memory: &DeviceMemory, lie: bool) -> Result<bool> {
    let seed = 0x9e37_79b9 ^ (from.context.index() << 8) ^ to.context.index();
    let expected = seed ^ u32::from(lie);
    pattern(from, memory.address(), seed)?;
    let written = matches(to, memory.address(), expected)?;
    pattern(to, memory.address(), !seed)?;
    let read = matches(from, memory.address(), !expected)?;
    Ok(written && read)
}

fn pattern(by: &Prover<'_>, mut address: u64, mut seed: u32) -> Result<()> {
    let mut words = WORDS;
    let mut parameters: [*mut c_void; 3] =
        [(&raw mut address).cast(), (&raw mut words).cast(), (&raw mut seed).cast()];
    // SAFETY: the kernel takes an address, a number of words and a seed; the memory has as many words.
    unsafe { by.module.launch(by.write, (1, 1), 256, by.stream.raw(), &mut parameters)? };
    by.stream.synchronize()
}

fn matches(by: &Prover<'_>, mut address: u64, mut seed: u32) -> Result<bool> {
    let wrong = DeviceMemory::zeroed(by.context, 4, by.stream)?;
    let mut words = WORDS;
    let mut count_at = wrong.address();
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut address).cast(),
        (&raw mut words).cast(),
        (&raw mut seed).cast(),
        (&raw mut count_at).cast(),
    ];
    // SAFETY: as in `pattern`, and the address of a word to count in.
    unsafe { by.module.launch(by.check, (1, 1), 256, by.stream.raw(), &mut parameters)? };
    let mut count = [u32::MAX];
    read(by.context, by.stream, wrong.address(), &mut count)?;
    Ok(count == [0])
}
