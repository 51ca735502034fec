//! Sums and copies of blocks in host memory.
//!
//! Sums run in the order of the inputs, in float64 for float64 and in float32 for everything narrower, and are
//! rounded once at the end.

use std::slice;

use half::slice::HalfFloatSliceExt;

use super::dtype::{self, DType};
use super::job::{BLOCK, Block, Job, Strip};

/// An element that can be added up in `Sum`.
trait Element: Copy {
    /// Zero of the element's type, to size buffers with.
    type Sum: Copy + Default;

    /// Writes the elements' values to `sums`.
    fn set(sums: &mut [Self::Sum], elements: &[Self]);
    /// Adds the elements' values to `sums`. `spare` has the same length and any content.
    fn add(sums: &mut [Self::Sum], elements: &[Self], spare: &mut [Self::Sum]);
    /// Rounds `sums` to elements.
    fn round(elements: &mut [Self], sums: &[Self::Sum]);
}

macro_rules! native {
    ($($float:ty),*) => {$(
        impl Element for $float {
            type Sum = $float;

            fn set(sums: &mut [$float], elements: &[$float]) {
                sums.copy_from_slice(elements);
            }

            fn add(sums: &mut [$float], elements: &[$float], _spare: &mut [$float]) {
                for (sum, element) in sums.iter_mut().zip(elements) {
                    *sum += element;
                }
            }

            fn round(elements: &mut [$float], sums: &[$float]) {
                elements.copy_from_slice(sums);
            }
        }
    )*};
}

native!(f32, f64);

impl Element for half::f16 {
    type Sum = f32;

    fn set(sums: &mut [f32], elements: &[Self]) {
        elements.convert_to_f32_slice(sums);
    }

    fn add(sums: &mut [f32], elements: &[Self], spare: &mut [f32]) {
        elements.convert_to_f32_slice(spare);
        f32::add(sums, spare, &mut []);
    }

    fn round(elements: &mut [Self], sums: &[f32]) {
        elements.convert_from_f32_slice(sums);
    }
}

/// Element types whose values are converted one by one.
macro_rules! converted {
    ($name:ident($bits:ty), $to:path, $from:path) => {
        #[derive(Clone, Copy)]
        #[repr(transparent)]
        struct $name($bits);

        impl Element for $name {
            type Sum = f32;

            fn set(sums: &mut [f32], elements: &[Self]) {
                for (sum, element) in sums.iter_mut().zip(elements) {
                    *sum = $to(element.0);
                }
            }

            fn add(sums: &mut [f32], elements: &[Self], _spare: &mut [f32]) {
                for (sum, element) in sums.iter_mut().zip(elements) {
                    *sum += $to(element.0);
                }
            }

            fn round(elements: &mut [Self], sums: &[f32]) {
                for (element, sum) in elements.iter_mut().zip(sums) {
                    *element = Self($from(*sum));
                }
            }
        }
    };
}

converted!(BFloat16(u16), dtype::bf16_to_f32, dtype::bf16_from_f32);
converted!(Float8E4M3(u8), dtype::e4m3_to_f32, dtype::e4m3_from_f32);
converted!(Float8E5M2(u8), dtype::e5m2_to_f32, dtype::e5m2_from_f32);

/// Does what is left to `part` of `parts`.
///
/// # Safety
/// The job comes from a checked operation on host memory. Its inputs are initialised and its outputs writable
/// until this returns, and nobody else touches either meanwhile, but for other parts of the same operation.
pub(crate) unsafe fn run(job: &Job, part: usize, parts: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match (job.inputs.as_slice(), job.dtype) {
            ([], _) => {}
            ([source], _) => copy(job, *source, part, parts),
            (_, DType::F64) => sum::<f64>(job, part, parts),
            (_, DType::F32) => sum::<f32>(job, part, parts),
            (_, DType::F16) => sum::<half::f16>(job, part, parts),
            (_, DType::BF16) => sum::<BFloat16>(job, part, parts),
            (_, DType::F8E4M3) => sum::<Float8E4M3>(job, part, parts),
            (_, DType::F8E5M2) => sum::<Float8E5M2>(job, part, parts),
            // Refused by the checks.
            (_, DType::I8 | DType::U8) => {}
        }
    }
}

/// # Safety
/// As for [`run`].
unsafe fn copy(job: &Job, source: Strip, part: usize, parts: usize) {
    let size = job.dtype.size();
    for block in job.blocks(part, parts) {
        let from = std::ptr::with_exposed_provenance::<u8>(source.at(block, size));
        for output in &job.outputs {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(output.at(block, size));
            if !std::ptr::addr_eq(to, from) {
                // SAFETY: both stretches lie inside checked tensors, which do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(from, to, block.len * size) };
            }
        }
    }
}

/// # Safety
/// As for [`run`], and `T` is laid out as the job's elements are.
unsafe fn sum<T: Element>(job: &Job, part: usize, parts: usize) {
    let mut sums = [T::Sum::default(); BLOCK];
    let mut spare = [T::Sum::default(); BLOCK];
    for block in job.blocks(part, parts) {
        let (Some(sums), Some(spare)) = (sums.get_mut(..block.len), spare.get_mut(..block.len)) else {
            continue;
        };
        for (index, input) in job.inputs.iter().enumerate() {
            // SAFETY: the stretch lies inside a checked tensor, is aligned and initialised, and no part but
            // this one writes to it.
            let elements = unsafe { elements::<T>(*input, block) };
            if index == 0 { T::set(sums, elements) } else { T::add(sums, elements, spare) }
        }
        let mut first: Option<*const T> = None;
        for output in &job.outputs {
            let to = std::ptr::with_exposed_provenance_mut::<T>(output.at(block, size_of::<T>()));
            if let Some(first) = first {
                // SAFETY: both stretches lie inside checked outputs, which do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(first, to, block.len) };
            } else {
                // SAFETY: the stretch lies inside a checked output that only this part touches; the slices of
                // the inputs, which may be the same memory, are not used any more.
                T::round(unsafe { slice::from_raw_parts_mut(to, block.len) }, sums);
                first = Some(to);
            }
        }
    }
}

/// # Safety
/// The block of the strip is aligned, initialised memory that is not written to while the slice lives.
unsafe fn elements<'a, T>(strip: Strip, block: Block) -> &'a [T] {
    let address = strip.at(block, size_of::<T>());
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(std::ptr::with_exposed_provenance(address), block.len) }
}
