//! One register of AVX-512.

use std::arch::x86_64::*;

use super::avx2::sum;
use crate::engine::cpu::common::kernels::lanes::{LANES, Lanes};

#[derive(Clone, Copy)]
pub struct Avx512(pub(super) __m512);

impl Lanes for Avx512 {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_halves(low: *const f32, high: *const f32) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe {
            let low = _mm512_castpd256_pd512(_mm256_loadu_pd(low.cast()));
            Self(_mm512_castpd_ps(_mm512_insertf64x4::<1>(low, _mm256_loadu_pd(high.cast()))))
        }
    }

    #[inline(always)]
    unsafe fn store_halves(self, low: *mut f32, high: *mut f32) {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe {
            let all = _mm512_castps_pd(self.0);
            _mm256_storeu_pd(low.cast(), _mm512_castpd512_pd256(all));
            _mm256_storeu_pd(high.cast(), _mm512_extractf64x4_pd::<1>(all));
        }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512. Of a NaN and a number the instruction returns
        // its second operand.
        unsafe { Self(_mm512_max_ps(other.0, self.0)) }
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe {
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(other.0, other.0);
            Self(_mm512_mask_mov_ps(self.max(other).0, nan, other.0))
        }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512. Of a NaN and a number the instruction returns
        // its second operand.
        unsafe { Self(_mm512_min_ps(other.0, self.0)) }
    }

    #[inline(always)]
    fn unless_negative(self, condition: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(condition.0, _mm512_setzero_ps());
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut columns = rows;
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe {
            // Within each quarter of a register: columns j, j + 4, j + 8, j + 12 of four rows are then in fours[.][j].
            let mut fours = [[_mm512_setzero_ps(); 4]; 4];
            for (i, four) in fours.iter_mut().enumerate() {
                let [a, b, c, d] = [rows[4 * i].0, rows[4 * i + 1].0, rows[4 * i + 2].0, rows[4 * i + 3].0];
                let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (low2, high2) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                *four = [
                    _mm512_shuffle_ps::<0x44>(low, low2),
                    _mm512_shuffle_ps::<0xee>(low, low2),
                    _mm512_shuffle_ps::<0x44>(high, high2),
                    _mm512_shuffle_ps::<0xee>(high, high2),
                ];
            }
            // Even and odd quarters (0x88, 0xdd) of pairs, twice.
            for j in 0..4 {
                let [a, b, c, d] = [fours[0][j], fours[1][j], fours[2][j], fours[3][j]];
                let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
                let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
                columns[j] = Self(_mm512_shuffle_f32x4::<0x88>(even[0], even[1]));
                columns[8 + j] = Self(_mm512_shuffle_f32x4::<0xdd>(even[0], even[1]));
                columns[4 + j] = Self(_mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]));
                columns[12 + j] = Self(_mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]));
            }
        }
        columns
    }

    #[inline(always)]
    fn spread(self, order: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe { Self(_mm512_permutexvar_ps(_mm512_castps_si512(order.0), self.0)) }
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512. 0: to the nearest integer.
        Self(unsafe { _mm512_roundscale_ps::<0>(self.0) })
    }

    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }

    #[inline(always)]
    fn recip(self) -> Self {
        // One step of Newton's method squares the relative error of 2^-14.
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        let guess = Self(unsafe { _mm512_rcp14_ps(self.0) });
        let error = Self::splat(2.0).sub(self.mul(guess));
        guess.mul(error)
    }

    #[inline(always)]
    fn unzip(a: Self, b: Self) -> (Self, Self) {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe {
            let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            (Self(_mm512_permutex2var_ps(a.0, even, b.0)), Self(_mm512_permutex2var_ps(a.0, odd, b.0)))
        }
    }

    #[inline(always)]
    fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self) {
        // SAFETY: this type exists only where `dispatch` found AVX-512.
        unsafe {
            let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(other.0, self.0);
            let takes = greater | _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(other.0, other.0);
            (Self(_mm512_mask_mov_ps(self.0, takes, other.0)), Self(_mm512_mask_mov_ps(mine.0, takes, others.0)))
        }
    }

    #[inline(always)]
    unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise. In registers
        // and then stored whole: the instruction that stores what it keeps is slow on AMD.
        unsafe {
            let kept = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(self.0, _mm512_setzero_ps());
            let numbers = _mm512_cvttps_epi32(_mm512_maskz_compress_ps(kept, positions.0));
            _mm512_storeu_ps(values, _mm512_maskz_compress_ps(kept, self.0));
            _mm512_storeu_si512(offsets.cast(), _mm512_mullo_epi32(numbers, _mm512_set1_epi32(unit as i32)));
            kept.count_ones() as usize
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: this type exists only where `dispatch` found AVX-512, which AVX2 comes with.
        unsafe {
            let high = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0b11_10_11_10>(
                _mm512_castps_pd(self.0),
                _mm512_castps_pd(self.0),
            ));
            sum(_mm512_castps512_ps256(_mm512_add_ps(self.0, high)))
        }
    }

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array holds sixteen floats.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    #[inline(always)]
    fn from_array(lanes: [f32; LANES]) -> Self {
        // SAFETY: the array holds sixteen floats.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    #[inline(always)]
    fn prefetch(at: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn prefetch_l2(at: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: this type exists only where `dispatch` found AVX-512; the memory is the caller's promise.
        unsafe { _mm512_stream_ps(to, self.0) }
    }

    #[inline(always)]
    fn fence() {
        // SAFETY: every x86-64 has it.
        unsafe { _mm_sfence() }
    }
}
