//! Products of bytes in two registers of AVX2.

use std::arch::x86_64::*;

use super::avx2::Avx2;
use crate::engine::cpu::common::kernels::dot::Dot;

/// With VNNI: four products and their sum are one instruction.
#[derive(Clone, Copy)]
pub struct DotAvxVnni;

/// Without: even and odd bytes as 16-bit numbers, whose products no sum can overflow. The instruction for bytes saturates
/// at 16 bits: other numbers than elsewhere.
#[derive(Clone, Copy)]
pub struct DotAvx2;

macro_rules! conversions {
    () => {
        type Floats = Avx2;
        type Sums = [__m256i; 2];

        #[inline(always)]
        fn zero() -> [__m256i; 2] {
            // SAFETY: this type exists only where `dispatch` found AVX2.
            unsafe { [_mm256_setzero_si256(); 2] }
        }

        #[inline(always)]
        fn floats(sums: [__m256i; 2]) -> Avx2 {
            // SAFETY: this type exists only where `dispatch` found AVX2.
            unsafe { Avx2(_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])) }
        }

        #[inline(always)]
        unsafe fn load_bytes(from: *const u8) -> Avx2 {
            // SAFETY: this type exists only where `dispatch` found AVX2; the memory is the caller's promise.
            unsafe {
                let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
                let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
                Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
            }
        }

        #[inline(always)]
        unsafe fn store_bytes(values: Avx2, to: *mut u8) {
            // SAFETY: this type exists only where `dispatch` found AVX2; the memory is the caller's promise.
            unsafe {
                let (low, high) = (_mm256_cvtps_epi32(values.0), _mm256_cvtps_epi32(values.1));
                // Within halves of 128 bits: 0-3, 8-11 and 4-7, 12-15.
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
                let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                _mm_storeu_si128(to.cast(), bytes);
            }
        }
    };
}

impl Dot for DotAvxVnni {
    type Pixel = __m256i;
    type Weights = [__m256i; 2];

    conversions!();

    #[inline(always)]
    unsafe fn pixel(from: *const f32) -> __m256i {
        // SAFETY: this type exists only where `dispatch` found AVX2; the memory is the caller's promise.
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn weights(from: *const f32) -> [__m256i; 2] {
        // SAFETY: this type exists only where `dispatch` found AVX2; the memory is the caller's promise.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())] }
    }

    #[inline(always)]
    fn dot(sums: [__m256i; 2], pixel: __m256i, weights: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: this type exists only where `dispatch` found AVX-VNNI.
        unsafe {
            [_mm256_dpbusd_avx_epi32(sums[0], pixel, weights[0]), _mm256_dpbusd_avx_epi32(sums[1], pixel, weights[1])]
        }
    }
}

impl Dot for DotAvx2 {
    type Pixel = [__m256i; 2];
    type Weights = [__m256i; 4];

    conversions!();

    #[inline(always)]
    unsafe fn pixel(from: *const f32) -> [__m256i; 2] {
        // SAFETY: this type exists only where `dispatch` found AVX2; the memory is the caller's promise.
        unsafe {
            let four = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            [_mm256_and_si256(four, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(four)]
        }
    }

    #[inline(always)]
    unsafe fn weights(from: *const f32) -> [__m256i; 4] {
        // SAFETY: this type exists only where `dispatch` found AVX2; the memory is the caller's promise.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast()));
            [
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(low)),
                _mm256_srai_epi16::<8>(low),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(high)),
                _mm256_srai_epi16::<8>(high),
            ]
        }
    }

    #[inline(always)]
    fn dot(sums: [__m256i; 2], pixel: [__m256i; 2], weights: [__m256i; 4]) -> [__m256i; 2] {
        // SAFETY: this type exists only where `dispatch` found AVX2.
        unsafe {
            let [even_low, odd_low, even_high, odd_high] = weights;
            let low = _mm256_add_epi32(_mm256_madd_epi16(pixel[0], even_low), _mm256_madd_epi16(pixel[1], odd_low));
            let high = _mm256_add_epi32(_mm256_madd_epi16(pixel[0], even_high), _mm256_madd_epi16(pixel[1], odd_high));
            [_mm256_add_epi32(sums[0], low), _mm256_add_epi32(sums[1], high)]
        }
    }
}
