//! The same sums compiled for AVX2, and float16 through the processor's own conversions (F16C), which every
//! processor with AVX2 has. The same additions in the same order, so the same bits.

use std::any::TypeId;
use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{__m128i, __m256, _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph};

use super::{Element, F16, Job, sum_blocks};

/// Float16 on a processor with F16C.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct F16C(F16);

/// Elements that one instruction converts.
const AT_ONCE: usize = 8;

impl Element for F16C {
    type Sum = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.0.widen()
    }

    #[inline(always)]
    fn round(sum: f32) -> Self {
        Self(F16::round(sum))
    }

    #[inline(always)]
    fn widen_all<const N: usize>(elements: [Self; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        let (sums_by_eight, rest) = sums.as_chunks_mut::<AT_ONCE>();
        let (elements_by_eight, elements_left) = elements.as_chunks::<AT_ONCE>();
        for (sums, elements) in sums_by_eight.iter_mut().zip(elements_by_eight) {
            // SAFETY: both types are plain bytes of the same length; only `sum_wide`, which needs F16C, uses
            // this type.
            unsafe {
                let elements = std::mem::transmute::<[F16C; AT_ONCE], __m128i>(*elements);
                *sums = std::mem::transmute::<__m256, [f32; AT_ONCE]>(_mm256_cvtph_ps(elements));
            }
        }
        for (sum, element) in rest.iter_mut().zip(elements_left) {
            *sum = element.widen();
        }
        sums
    }

    #[inline(always)]
    fn round_all<const N: usize>(sums: [f32; N]) -> [Self; N] {
        let mut elements = [Self(F16(0)); N];
        let (elements_by_eight, rest) = elements.as_chunks_mut::<AT_ONCE>();
        let (sums_by_eight, sums_left) = sums.as_chunks::<AT_ONCE>();
        for (elements, sums) in elements_by_eight.iter_mut().zip(sums_by_eight) {
            // SAFETY: as above.
            unsafe {
                let sums = std::mem::transmute::<[f32; AT_ONCE], __m256>(*sums);
                let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(sums);
                *elements = std::mem::transmute::<__m128i, [F16C; AT_ONCE]>(rounded);
            }
        }
        for (element, sum) in rest.iter_mut().zip(sums_left) {
            *element = Self::round(*sum);
        }
        elements
    }
}

/// Does the work if the processor can, and says whether it did.
///
/// # Safety
/// As for [`super::sum`].
pub(super) unsafe fn sum<T: Element>(job: &Job, part: usize, parts: usize) -> bool {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")) {
        return false;
    }
    // SAFETY: the caller's promise is passed on, the processor has the features, and `F16C` is laid out as
    // `F16` is.
    unsafe {
        if TypeId::of::<T>() == TypeId::of::<F16>() {
            sum_wide::<F16C>(job, part, parts);
        } else {
            sum_wide::<T>(job, part, parts);
        }
    }
    true
}

/// # Safety
/// As for [`super::sum`], on a processor with AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
unsafe fn sum_wide<T: Element>(job: &Job, part: usize, parts: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe { sum_blocks::<T>(job, part, parts) }
}
