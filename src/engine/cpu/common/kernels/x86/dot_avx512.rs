//! Products of bytes in one register of AVX-512.

use std::arch::x86_64::*;

use super::avx512::Avx512;
use crate::engine::cpu::common::kernels::dot::Dot;

/// With VNNI: four products and their sum are one instruction.
#[derive(Clone, Copy)]
pub struct DotVnni;

/// Without: even and odd bytes as 16-bit numbers, whose products no sum can overflow.
#[derive(Clone, Copy)]
pub struct DotAvx512;

macro_rules! conversions {
    () => {
        type Floats = Avx512;
        type Sums = __m512i;

        #[inline(always)]
        fn zero() -> __m512i {
            // SAFETY: this type exists only where `dispatch` found AVX-512.
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        fn floats(sums: __m512i) -> Avx512 {
            // SAFETY: this type exists only where `dispatch` found AVX-512.
            Avx512(unsafe { _mm512_cvtepi32_ps(sums) })
        }

        #[inline(always)]
        unsafe fn load_bytes(from: *const u8) -> Avx512 {
            // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
            Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) })
        }

        #[inline(always)]
        unsafe fn store_bytes(values: Avx512, to: *mut u8) {
            // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
            unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(values.0))) }
        }
    };
}

impl Dot for DotVnni {
    type Pixel = __m512i;
    type Weights = __m512i;

    conversions!();

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
    fn dot(sums: __m512i, pixel: __m512i, weights: __m512i) -> __m512i {
        // SAFETY: this type exists only where `dispatch` found AVX-512 with VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, pixel, weights) }
    }
}

impl Dot for DotAvx512 {
    type Pixel = [__m512i; 2];
    type Weights = [__m512i; 2];

    conversions!();

    #[inline(always)]
    unsafe fn pixel(from: *const f32) -> [__m512i; 2] {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe {
            let four = _mm512_set1_epi32(from.cast::<i32>().read_unaligned());
            [_mm512_and_si512(four, _mm512_set1_epi16(255)), _mm512_srli_epi16::<8>(four)]
        }
    }

    #[inline(always)]
    unsafe fn weights(from: *const f32) -> [__m512i; 2] {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe {
            let four = _mm512_loadu_si512(from.cast());
            [_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(four)), _mm512_srai_epi16::<8>(four)]
        }
    }

    #[inline(always)]
    fn dot(sums: __m512i, pixel: [__m512i; 2], weights: [__m512i; 2]) -> __m512i {
        // SAFETY: this type exists only where `dispatch` found AVX-512 with BW.
        unsafe {
            let even = _mm512_madd_epi16(pixel[0], weights[0]);
            let odd = _mm512_madd_epi16(pixel[1], weights[1]);
            _mm512_add_epi32(sums, _mm512_add_epi32(even, odd))
        }
    }
}
