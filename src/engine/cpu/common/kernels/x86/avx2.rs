//! Two registers of AVX2.

use std::arch::x86_64::*;

use crate::engine::cpu::common::kernels::lanes::{LANES, Lanes};

#[derive(Clone, Copy)]
pub struct Avx2(pub(super) __m256, pub(super) __m256);

/// For every mask of eight lanes the lanes in it, in order.
static LANES_OF: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut count) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                table[mask][count] = lane;
                count += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// [`Lanes::compress`] of eight lanes.
///
/// # Safety
/// The processor has AVX2; eight numbers must be writable at `values` and at `offsets`.
#[inline(always)]
unsafe fn compress(lanes: __m256, positions: __m256, unit: u32, values: *mut f32, offsets: *mut u32) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(lanes, _mm256_setzero_ps())) as usize;
        let kept = _mm256_cvtepu8_epi32(_mm_loadl_epi64(LANES_OF[mask & 255].as_ptr().cast()));
        let numbers = _mm256_cvttps_epi32(_mm256_permutevar8x32_ps(positions, kept));
        _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(lanes, kept));
        _mm256_storeu_si256(offsets.cast(), _mm256_mullo_epi32(numbers, _mm256_set1_epi32(unit as i32)));
        mask.count_ones() as usize
    }
}

/// The sum of eight lanes.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub unsafe fn sum(lanes: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

/// Lanes 0, 2, 4, ... of `a` then `b`, and lanes 1, 3, 5, ...
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn unzip(a: __m256, b: __m256) -> (__m256, __m256) {
    // SAFETY: the caller's promise. The shuffles work within 128 bits; the permutations put the quarters in order.
    unsafe {
        let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
        let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
        let even = _mm256_permute4x64_pd::<0b11_01_10_00>(even);
        let odd = _mm256_permute4x64_pd::<0b11_01_10_00>(odd);
        (_mm256_castpd_ps(even), _mm256_castpd_ps(odd))
    }
}

/// Where `b`, which comes later, is PyTorch's maximum of a window.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn takes(a: __m256, b: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_or_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(b, a), _mm256_cmp_ps::<_CMP_UNORD_Q>(b, b)) }
}

/// Eight rows become eight columns.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn eight(rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut columns = rows;
        // Within each half of a register: columns j and j + 4 of four rows are then in halves[.][j].
        let mut halves = [[_mm256_setzero_ps(); 4]; 2];
        for (i, half) in halves.iter_mut().enumerate() {
            let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (low2, high2) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            *half = [
                _mm256_shuffle_ps::<0x44>(low, low2),
                _mm256_shuffle_ps::<0xee>(low, low2),
                _mm256_shuffle_ps::<0x44>(high, high2),
                _mm256_shuffle_ps::<0xee>(high, high2),
            ];
        }
        for j in 0..4 {
            columns[j] = _mm256_permute2f128_ps::<0x20>(halves[0][j], halves[1][j]);
            columns[4 + j] = _mm256_permute2f128_ps::<0x31>(halves[0][j], halves[1][j]);
        }
        columns
    }
}

impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn load_halves(low: *const f32, high: *const f32) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
        unsafe { Self(_mm256_loadu_ps(low), _mm256_loadu_ps(high)) }
    }

    #[inline(always)]
    unsafe fn store_halves(self, low: *mut f32, high: *mut f32) {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
        unsafe {
            _mm256_storeu_ps(low, self.0);
            _mm256_storeu_ps(high, self.1);
        }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        let all = unsafe { _mm256_set1_ps(value) };
        Self(all, all)
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA. Of a NaN and a number the instruction
        // returns its second operand.
        unsafe { Self(_mm256_max_ps(other.0, self.0), _mm256_max_ps(other.1, self.1)) }
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        let largest = self.max(other);
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe {
            let nan =
                [_mm256_cmp_ps::<_CMP_UNORD_Q>(other.0, other.0), _mm256_cmp_ps::<_CMP_UNORD_Q>(other.1, other.1)];
            Self(_mm256_blendv_ps(largest.0, other.0, nan[0]), _mm256_blendv_ps(largest.1, other.1, nan[1]))
        }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA. Of a NaN and a number the instruction
        // returns its second operand.
        unsafe { Self(_mm256_min_ps(other.0, self.0), _mm256_min_ps(other.1, self.1)) }
    }

    #[inline(always)]
    fn unless_negative(self, condition: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe {
            let zero = _mm256_setzero_ps();
            let keep =
                [_mm256_cmp_ps::<_CMP_NLE_UQ>(condition.0, zero), _mm256_cmp_ps::<_CMP_NLE_UQ>(condition.1, zero)];
            Self(_mm256_and_ps(keep[0], self.0), _mm256_and_ps(keep[1], self.1))
        }
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut columns = rows;
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe {
            for x in 0..2 {
                for y in 0..2 {
                    let mut quarter = [_mm256_setzero_ps(); 8];
                    for (i, row) in quarter.iter_mut().enumerate() {
                        let Self(low, high) = rows[8 * y + i];
                        *row = if x == 0 { low } else { high };
                    }
                    for (i, column) in eight(quarter).into_iter().enumerate() {
                        let Self(low, high) = &mut columns[8 * x + i];
                        *if y == 0 { low } else { high } = column;
                    }
                }
            }
        }
        columns
    }

    #[inline(always)]
    fn spread(self, order: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA. Of a lane's number the instruction sees what
        // is within its half.
        unsafe {
            let order = [_mm256_castps_si256(order.0), _mm256_castps_si256(order.1)];
            Self(_mm256_permutevar8x32_ps(self.0, order[0]), _mm256_permutevar8x32_ps(self.1, order[1]))
        }
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
    }

    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.0), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.1), bias));
            self.mul(Self(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)))
        }
    }

    #[inline(always)]
    fn recip(self) -> Self {
        let one = Self::splat(1.0);
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { Self(_mm256_div_ps(one.0, self.0), _mm256_div_ps(one.1, self.1)) }
    }

    #[inline(always)]
    fn unzip(a: Self, b: Self) -> (Self, Self) {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe {
            let (low, high) = (unzip(a.0, a.1), unzip(b.0, b.1));
            (Self(low.0, high.0), Self(low.1, high.1))
        }
    }

    #[inline(always)]
    fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self) {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe {
            let takes = [takes(self.0, other.0), takes(self.1, other.1)];
            let max = Self(_mm256_blendv_ps(self.0, other.0, takes[0]), _mm256_blendv_ps(self.1, other.1, takes[1]));
            (max, Self(_mm256_blendv_ps(mine.0, others.0, takes[0]), _mm256_blendv_ps(mine.1, others.1, takes[1])))
        }
    }

    #[inline(always)]
    unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
        unsafe {
            let low = compress(self.0, positions.0, unit, values, offsets);
            low + compress(self.1, positions.1, unit, values.add(low), offsets.add(low))
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
        unsafe { sum(_mm256_add_ps(self.0, self.1)) }
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
        // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
        unsafe {
            _mm256_stream_ps(to, self.0);
            _mm256_stream_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    fn fence() {
        // SAFETY: every x86-64 has it.
        unsafe { _mm_sfence() }
    }
}
