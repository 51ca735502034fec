//! Sums and copies of blocks in host memory.
//!
//! Sums run in the order of the inputs, in float64 for float64 and in float32 for everything narrower, and are
//! rounded once at the end. A few elements at a time are summed in registers and written to every output, so
//! that memory is read once and written once.

// What is not inlined into a function compiled for wide registers is compiled for narrow ones.
#![allow(clippy::inline_always)]

use std::ops::AddAssign;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use super::dtype::{self, DType};
use super::job::{Job, Strip};

#[cfg(target_arch = "x86_64")]
mod wide;

/// Elements that are summed at a time: in float32 two cache lines, and half of the registers that every
/// processor of 64 bits has.
const LANES: usize = 32;

/// An element that can be added up in `Sum`.
trait Element: Copy + 'static {
    type Sum: Copy + AddAssign;

    fn widen(self) -> Self::Sum;
    fn round(sum: Self::Sum) -> Self;

    #[inline(always)]
    fn widen_all<const N: usize>(elements: [Self; N]) -> [Self::Sum; N] {
        elements.map(Self::widen)
    }

    #[inline(always)]
    fn round_all<const N: usize>(sums: [Self::Sum; N]) -> [Self; N] {
        sums.map(Self::round)
    }
}

macro_rules! element {
    ($name:ident($bits:ty) sums in $sum:ty, $widen:expr, $round:expr) => {
        #[derive(Clone, Copy)]
        #[repr(transparent)]
        struct $name($bits);

        impl Element for $name {
            type Sum = $sum;

            #[inline(always)]
            fn widen(self) -> $sum {
                $widen(self.0)
            }

            #[inline(always)]
            fn round(sum: $sum) -> Self {
                Self($round(sum))
            }
        }
    };
}

element!(F64(f64) sums in f64, std::convert::identity, std::convert::identity);
element!(F32(f32) sums in f32, std::convert::identity, std::convert::identity);
element!(F16(u16) sums in f32, dtype::f16_to_f32, dtype::f16_from_f32);
element!(BF16(u16) sums in f32, dtype::bf16_to_f32, dtype::bf16_from_f32);
element!(F8E4M3(u8) sums in f32, dtype::e4m3_to_f32, dtype::e4m3_from_f32);
element!(F8E5M2(u8) sums in f32, dtype::e5m2_to_f32, dtype::e5m2_from_f32);

/// Does what is left to `part` of `parts`.
///
/// # Safety
/// The job comes from a checked operation on host memory. Its inputs are initialised and its outputs writable
/// until this returns, and nobody else touches either meanwhile, but for other parts of the same operation.
pub(crate) unsafe fn run(job: &Job, part: usize, parts: usize) {
    // SAFETY: the caller's promise is passed on, and each type is laid out as its name says.
    unsafe {
        match (job.inputs.as_slice(), job.dtype) {
            ([], _) => {}
            ([source], _) => copy(job, *source, part, parts),
            (_, DType::F64) => sum::<F64>(job, part, parts),
            (_, DType::F32) => sum::<F32>(job, part, parts),
            (_, DType::F16) => sum::<F16>(job, part, parts),
            (_, DType::BF16) => sum::<BF16>(job, part, parts),
            (_, DType::F8E4M3) => sum::<F8E4M3>(job, part, parts),
            (_, DType::F8E5M2) => sum::<F8E5M2>(job, part, parts),
            // Refused by the checks.
            (_, DType::I8 | DType::U8 | DType::I32 | DType::I64 | DType::Bool) => {}
        }
    }
}

/// # Safety
/// As for [`run`].
unsafe fn copy(job: &Job, source: Strip, part: usize, parts: usize) {
    let size = job.dtype.size();
    for block in job.blocks(part, parts) {
        let from = with_exposed_provenance::<u8>(source.at(block, size));
        for output in &job.outputs {
            let to = with_exposed_provenance_mut::<u8>(output.at(block, size));
            // SAFETY: both stretches lie inside checked tensors, which do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from, to, block.len * size) };
        }
    }
}

/// # Safety
/// As for [`run`], and `T` is laid out as the job's elements are.
unsafe fn sum<T: Element>(job: &Job, part: usize, parts: usize) {
    // SAFETY: the caller's promise is passed on; `wide` asks for the features that it needs.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if wide::sum::<T>(job, part, parts) {
            return;
        }
        sum_blocks::<T>(job, part, parts);
    }
}

/// # Safety
/// As for [`sum`].
#[inline(always)]
unsafe fn sum_blocks<T: Element>(job: &Job, part: usize, parts: usize) {
    let size = size_of::<T>();
    let mut inputs: Vec<*const T> = Vec::with_capacity(job.inputs.len());
    let mut outputs: Vec<*mut T> = Vec::with_capacity(job.outputs.len());
    for block in job.blocks(part, parts) {
        inputs.clear();
        inputs.extend(job.inputs.iter().map(|strip| with_exposed_provenance::<T>(strip.at(block, size))));
        outputs.clear();
        outputs
            .extend(job.outputs.iter().map(|strip| with_exposed_provenance_mut::<T>(strip.at(block, size))));
        let Some((first, others)) = inputs.split_first() else { return };
        let whole = block.len - block.len % LANES;
        // SAFETY: the stretches lie inside checked tensors, aligned to their elements and initialised. Only
        // this part touches them, and an output is the same memory as an input from its first element on or
        // not at all.
        unsafe {
            for start in (0..whole).step_by(LANES) {
                sum_lanes::<T, LANES>(*first, others, &outputs, start);
            }
            for start in whole..block.len {
                sum_lanes::<T, 1>(*first, others, &outputs, start);
            }
        }
    }
}

/// Sums `N` adjacent elements from `start` on.
///
/// # Safety
/// All pointers are valid for these elements, the inputs for reading and the outputs for writing.
#[inline(always)]
unsafe fn sum_lanes<T: Element, const N: usize>(
    first: *const T,
    others: &[*const T],
    outputs: &[*mut T],
    start: usize,
) {
    // SAFETY: the caller's promise; an array is aligned as its elements are.
    unsafe {
        let mut sums = T::widen_all(first.add(start).cast::<[T; N]>().read());
        for other in others {
            let elements = T::widen_all(other.add(start).cast::<[T; N]>().read());
            for (sum, element) in sums.iter_mut().zip(elements) {
                *sum += element;
            }
        }
        let rounded = T::round_all(sums);
        for output in outputs {
            output.add(start).cast::<[T; N]>().write(rounded);
        }
    }
}
