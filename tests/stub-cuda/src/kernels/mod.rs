//! The kernels of cuda/, as what they do to memory. A launch is a thread for each member (`blockIdx.y`), since members
//! wait for each other; the blocks of one member wait for none of each other and run one after another.

mod copies;
mod engines;
mod eye;
mod in_place;
mod numbers;
mod pattern;
mod protocol;
mod residual;
mod scatter;
mod small;
mod staged;
mod take;

use std::sync::Arc;

use crate::codes::{INVALID_VALUE, LAUNCH_FAILED, Result};
use crate::dtype::DType;
use crate::layout::{Call, Copies};
use crate::ptx::Kernel;
use crate::report::{misuse, violation};
use crate::{device, faults};
use protocol::Seat;

/// A launch, with its own copy of the parameters.
pub(crate) struct Launch {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) blocks: u32,
    pub(crate) members: u32,
    pub(crate) parameters: Vec<Vec<u8>>,
}

/// A plain structure or number from the bytes of a parameter.
fn read<T: Copy>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: as many bytes; `T` is a number or a structure of numbers, which every bit pattern is one of.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Whether the kernel is one in which ranks wait for each other.
fn meets(name: &str) -> bool {
    name.starts_with("take") || name.starts_with("all_reduce") || name.starts_with("reduce_scatter")
}

/// The element type that a kernel's name ends in.
fn dtype(name: &str) -> Option<DType> {
    let types = [
        ("_f64", DType::F64),
        ("_f32", DType::F32),
        ("_bf16", DType::BF16),
        ("_f16", DType::F16),
        ("_f8e4m3", DType::F8E4M3),
        ("_f8e5m2", DType::F8E5M2),
    ];
    types.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, dtype)| *dtype)
}

impl Launch {
    /// Runs it. What fails breaks the device's context, as on a GPU.
    pub(crate) fn run(&self) {
        let result = faults::kernel().and_then(|()| self.work());
        if let Err(code) = result {
            device::break_it(self.kernel.device, code);
        }
    }

    /// What its launch can be refused for.
    pub(crate) fn check(&self) -> Result {
        let name = &self.kernel.entry.name;
        let limit = device::with(self.kernel.device, |device| device.multiprocessors)?;
        if meets(name) && self.blocks * self.members > limit {
            // They would wait for blocks that wait for a place.
            let (blocks, members) = (self.blocks, self.members);
            violation(format!(
                "{name}: {blocks} x {members} blocks wait for each other on {limit} processors"
            ));
        }
        if self.blocks == 0 || self.members == 0 {
            return Err(misuse(INVALID_VALUE, format!("{name}: an empty launch")));
        }
        Ok(())
    }

    fn parameter<T: Copy>(&self, index: usize) -> Result<T> {
        self.parameters.get(index).and_then(|bytes| read(bytes)).ok_or_else(|| {
            let text =
                format!("{}: parameter {index} is not what the stub's kernel takes", self.kernel.entry.name);
            misuse(LAUNCH_FAILED, text)
        })
    }

    fn work(&self) -> Result {
        let name = self.kernel.entry.name.as_str();
        let device = self.kernel.device;
        match name {
            "copy" => return copies::run(device, self.members, &self.parameter::<Copies>(0)?),
            "write_pattern" => {
                return pattern::write(device, self.parameter(0)?, self.parameter(1)?, self.parameter(2)?);
            }
            "check_pattern" => {
                let words = (self.parameter(1)?, self.parameter(2)?);
                return pattern::check(device, self.parameter(0)?, words, self.parameter(3)?);
            }
            _ => {}
        }
        let call: Call = self.parameter(0)?;
        let member = |index: u32| self.member(device, &call, index);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.members).map(|index| scope.spawn(move || member(index))).collect();
            let first = member(0);
            let others = others.into_iter().map(|thread| thread.join().unwrap_or(Err(LAUNCH_FAILED)));
            others.fold(first, Result::and)
        })
    }

    fn member(&self, device: u32, call: &Call, index: u32) -> Result {
        let name = self.kernel.entry.name.as_str();
        let broken = || misuse(LAUNCH_FAILED, format!("the stub has no kernel {name}: write it in kernels/"));
        if name.starts_with("add_residual") {
            return residual::run(device, call, dtype(name).ok_or_else(broken)?);
        }
        let result = Seat::take(device, call, index, self.blocks).and_then(|mut seat| {
            if name == "take" {
                return seat.together(true, take::direct, take::staged);
            }
            if name == "take_small" {
                return small::take(&mut seat);
            }
            if let Some(part) = name.strip_prefix("engines_") {
                let step = || self.parameter(1);
                return match part {
                    "meet" => engines::meet(&seat),
                    "own" => engines::own(&seat),
                    "send" => engines::send(&seat, &step()?),
                    "take" => engines::take(&seat, &step()?),
                    "leave" => engines::leave(&seat),
                    _ => engines::sum(&seat, &step()?, dtype(name).ok_or_else(broken)?),
                };
            }
            let dtype = dtype(name).ok_or_else(broken)?;
            if name.starts_with("all_reduce_small") {
                small::all_reduce(&mut seat, dtype)
            } else if name.starts_with("reduce_scatter_small") {
                small::reduce_scatter(&mut seat, dtype)
            } else if name.starts_with("all_reduce_large") {
                seat.together(
                    false,
                    |seat, meeting| in_place::run(seat, meeting, dtype),
                    |seat, meeting, block| staged::all_reduce(seat, meeting, block, dtype),
                )
            } else if name.starts_with("reduce_scatter") {
                seat.together(
                    false,
                    |seat, meeting| scatter::direct(seat, meeting, dtype),
                    |seat, meeting, block| scatter::staged(seat, meeting, block, dtype),
                )
            } else {
                Err(broken())
            }
        });
        if let Err(code) = result {
            // The other members have to hear of it before this one is joined.
            device::break_it(device, code);
        }
        result
    }
}
