//! Products of bfloat16 in one register of AVX-512.

use std::arch::x86_64::*;

use super::avx512::Avx512;
use crate::engine::cpu::common::kernels::dot::Dot;

/// Two products and their sum are one instruction.
#[derive(Clone, Copy)]
pub struct DotBf16;

impl Dot for DotBf16 {
    const INTEGERS: bool = false;
    type Floats = Avx512;
    type Sums = __m512;
    type Pixel = __m512i;
    type Weights = __m512i;

    #[inline(always)]
    fn zero() -> __m512 {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn pixel(from: *const f32) -> __m512i {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn weights(from: *const f32) -> __m512i {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    fn dot(sums: __m512, pixel: __m512i, weights: __m512i) -> __m512 {
        // SAFETY: this type exists only where `dispatch` found AVX-512 with BF16; all bits are numbers.
        unsafe {
            let pixel = std::mem::transmute::<__m512i, __m512bh>(pixel);
            let weights = std::mem::transmute::<__m512i, __m512bh>(weights);
            _mm512_dpbf16_ps(sums, pixel, weights)
        }
    }

    #[inline(always)]
    fn floats(sums: __m512) -> Avx512 {
        Avx512(sums)
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Avx512 {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
        }
    }

    #[inline(always)]
    unsafe fn store_bytes(values: Avx512, to: *mut u8) {
        // SAFETY: this type exists only where `dispatch` found AVX-512 with BF16; the memory is the caller's promise.
        unsafe {
            _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values.0)))
        }
    }
}
