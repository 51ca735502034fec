//! The kernels on one device.

use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use super::layout::SIZES;
use super::text;
use crate::comm::DType;
use crate::device::cuda::{Context, Function, Module, OwnStream};
use crate::error::{Error, Result};

/// Element types that can be summed, by the names of their kernels.
const SUMMED: [(DType, &str); 6] = [
    (DType::F64, "f64"),
    (DType::F32, "f32"),
    (DType::F16, "f16"),
    (DType::BF16, "bf16"),
    (DType::F8E4M3, "f8e4m3"),
    (DType::F8E5M2, "f8e5m2"),
];

/// What is summed how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    Small,
    Large,
    Scatter,
    ScatterSmall,
    Residual,
    Engines,
}

/// What runs before, between and after the copies of engines.
#[derive(Debug)]
pub(super) struct EngineKernels {
    pub(super) meet: Function,
    pub(super) own: Function,
    pub(super) send: Function,
    pub(super) take: Function,
    pub(super) leave: Function,
}

/// The kernels, loaded on one device.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) module: Module,
    sums: Vec<[Function; 6]>,
    pub(super) take: Function,
    pub(super) take_small: Function,
    pub(super) copy: Function,
    pub(super) engines: EngineKernels,
    pub(super) write_pattern: Function,
    pub(super) check_pattern: Function,
    pub(super) context: Arc<Context>,
}

/// Kernels stay loaded for the life of the process: drivers lose some memory at every unloading (377 KB, seen with
/// CUDA 13.0 on an H100), which a server that makes many communicators would feel.
static LOADED: Mutex<Vec<Arc<Kernels>>> = Mutex::new(Vec::new());

impl Kernels {
    fn of(index: u32) -> Result<Arc<Self>> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = loaded.iter().find(|kernels| kernels.context.index() == index) {
            return Ok(Arc::clone(known));
        }
        let kernels = Arc::new(Self::load(index)?);
        loaded.push(Arc::clone(&kernels));
        Ok(kernels)
    }

    /// Loads all kernels: one that is loaded later would wait for those that wait for it.
    fn load(index: u32) -> Result<Self> {
        let context = Context::open(index)?;
        tracing::info!(
            "loading kernels on cuda:{index}: seconds the first time, while the driver compiles them"
        );
        let overlaps = context.overlaps()?;
        let module = Module::load(&context, &text::for_device(overlaps)?, overlaps)?;
        verify(&module, &context, &OwnStream::new(&context)?)?;
        let function = |name: String| {
            let name =
                CString::new(name).map_err(|_| Error::invalid("kernel", "a name with a NUL", "a name"))?;
            module.function(&name)
        };
        let mut sums = Vec::with_capacity(SUMMED.len());
        for (_, name) in SUMMED {
            sums.push([
                function(format!("all_reduce_small_{name}"))?,
                function(format!("all_reduce_large_{name}"))?,
                function(format!("reduce_scatter_{name}"))?,
                function(format!("reduce_scatter_small_{name}"))?,
                function(format!("add_residual_{name}"))?,
                function(format!("engines_sum_{name}"))?,
            ]);
        }
        let take = module.function(c"take")?;
        let take_small = module.function(c"take_small")?;
        let copy = module.function(c"copy")?;
        let engines = EngineKernels {
            meet: module.function(c"engines_meet")?,
            own: module.function(c"engines_own")?,
            send: module.function(c"engines_send")?,
            take: module.function(c"engines_take")?,
            leave: module.function(c"engines_leave")?,
        };
        let write_pattern = module.function(c"write_pattern")?;
        let check_pattern = module.function(c"check_pattern")?;
        Ok(Self { module, sums, take, take_small, copy, engines, write_pattern, check_pattern, context })
    }

    /// The kernel of a sum.
    pub(super) fn sum(&self, sum: Sum, dtype: DType) -> Result<Function> {
        let row = SUMMED.iter().position(|(summed, _)| *summed == dtype);
        row.and_then(|row| self.sums.get(row))
            .and_then(|row| row.get(sum as usize))
            .copied()
            .ok_or_else(|| Error::invalid("dtype", dtype, "a float type: integers are only moved"))
    }
}

/// Of its multiprocessors, ranks of one device that wait for another one take no more than this part.
const WAITING_SHARE: u32 = 4;

/// A device of the communicator.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) stream: OwnStream,
    pub(super) multiprocessors: u32,
    pub(super) kernels: Arc<Kernels>,
}

impl Machine {
    /// Opens the device. The first time in a process its driver compiles the kernels, and keeps the result on disk.
    pub(super) fn open(index: u32) -> Result<Self> {
        let kernels = Kernels::of(index)?;
        let stream = OwnStream::new(&kernels.context)?;
        let multiprocessors = kernels.context.multiprocessors()?;
        Ok(Self { stream, multiprocessors, kernels })
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.kernels.context
    }
}

/// The most blocks of a kernel where `sharing` ranks have the device. Those of ranks that wait stay on their
/// multiprocessors while other ranks compute what they wait for. A matrix product of Hopper has clusters of blocks that
/// start together within one group of multiprocessors: with 88 of 132 taken, clusters of 8 never began on an H100.
pub(super) fn blocks_beside(multiprocessors: u32, sharing: usize) -> u32 {
    let waiting = u32::try_from(sharing).unwrap_or(u32::MAX).saturating_sub(1);
    (multiprocessors / WAITING_SHARE).checked_div(waiting).unwrap_or(multiprocessors).max(1)
}

/// Fails if the kernels were made from other sources than this crate: they would read its structures wrongly.
fn verify(module: &Module, context: &Context, stream: &OwnStream) -> Result<()> {
    let (address, bytes) = module.variable(c"tp_rs_layout")?;
    let mut sizes = [0_u32; SIZES.len()];
    if bytes == size_of_val(&sizes) {
        crate::device::cuda::read(context, stream, address, &mut sizes)?;
    }
    if sizes == SIZES {
        return Ok(());
    }
    let wanted = format!("structures of {SIZES:?} bytes: make cuda/tp_rs.ptx again with cuda/build.py");
    Err(Error::invalid("kernels", format!("structures of {sizes:?} bytes"), wanted))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranks_that_wait_leave_room_for_the_one_that_computes(multiprocessors in 1_u32..200, sharing in 1_usize..16) {
            let blocks = blocks_beside(multiprocessors, sharing);
            prop_assert!(blocks >= 1);
            let waiting = (sharing - 1) * blocks as usize;
            prop_assert!(blocks == 1 || 4 * waiting <= multiprocessors as usize);
            if sharing == 1 {
                prop_assert_eq!(blocks, multiprocessors);
            }
        }
    }
}
