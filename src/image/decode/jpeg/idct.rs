//! libjpeg's accurate integer inverse DCT ("islow") for four blocks at a time, with AVX-512.
//!
//! The sums are those of libjpeg-turbo's own vector code, which every other decoder of Pillow's kind runs: 16-bit additions
//! that wrap, 32-bit products, packing that saturates. So even coefficients that no encoder writes come out the same; the
//! one exception is announced (see [`four_blocks`]).

use std::arch::x86_64::*;

/// Coefficients of four blocks: row by row, in each row those of the four blocks one after the other.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Group(pub [[i16; 32]; 8]);

pub const ZEROS: Group = Group([[0; 32]; 8]);

/// Blocks in a [`Group`].
pub const BLOCKS: usize = 4;

const CONST_BITS: u32 = 13;
const PASS1_BITS: u32 = 2;

/// Products of the first row up to here: libjpeg-turbo's shortcut for blocks without other rows does not saturate.
const LARGEST: i16 = i16::MAX >> PASS1_BITS;

pub fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// Two constants for `vpdpwssd`.
#[target_feature(enable = "avx512f")]
fn two(a: i16, b: i16) -> __m512i {
    _mm512_set1_epi32(i32::from(a) & 0xffff | i32::from(b) << 16)
}

/// One dimension: `x[i]` is coefficient `i` of all columns, and becomes sample `i`, shifted down by `SHIFT`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn pass<const SHIFT: u32>(x: &mut [__m512i; 8]) {
    const F0_298: i16 = 2446;
    const F0_390: i16 = 3196;
    const F0_541: i16 = 4433;
    const F0_765: i16 = 6270;
    const F0_899: i16 = 7373;
    const F1_175: i16 = 9633;
    const F1_501: i16 = 12299;
    const F1_847: i16 = 15137;
    const F1_961: i16 = 16069;
    const F2_053: i16 = 16819;
    const F2_562: i16 = 20995;
    const F3_072: i16 = 25172;
    let zero = _mm512_setzero_si512();
    let half = _mm512_set1_epi32(1 << (SHIFT - 1));
    let pairs = |a, b| [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)];
    let (sum, difference) = (_mm512_add_epi16(x[0], x[4]), _mm512_sub_epi16(x[0], x[4]));
    let (z3, z4) = (_mm512_add_epi16(x[7], x[3]), _mm512_add_epi16(x[5], x[1]));
    let (sum, difference) = (pairs(zero, sum), pairs(zero, difference));
    let (in26, in71, in53, z34) = (pairs(x[2], x[6]), pairs(x[7], x[1]), pairs(x[5], x[3]), pairs(z3, z4));
    let mut results = [[zero; 2]; 8];
    for i in 0..2 {
        let scaled = |v| _mm512_add_epi32(_mm512_srai_epi32::<{ 16 - CONST_BITS }>(v), half);
        let (tmp0, tmp1) = (scaled(sum[i]), scaled(difference[i]));
        let tmp10 = _mm512_dpwssd_epi32(tmp0, in26[i], two(F0_541 + F0_765, F0_541));
        let tmp13 = _mm512_dpwssd_epi32(tmp0, in26[i], two(-F0_541 - F0_765, -F0_541));
        let tmp11 = _mm512_dpwssd_epi32(tmp1, in26[i], two(F0_541, F0_541 - F1_847));
        let tmp12 = _mm512_dpwssd_epi32(tmp1, in26[i], two(-F0_541, F1_847 - F0_541));
        let z3 = _mm512_madd_epi16(z34[i], two(F1_175 - F1_961, F1_175));
        let z4 = _mm512_madd_epi16(z34[i], two(F1_175, F1_175 - F0_390));
        let tmp0 = _mm512_dpwssd_epi32(z3, in71[i], two(F0_298 - F0_899, -F0_899));
        let tmp1 = _mm512_dpwssd_epi32(z4, in53[i], two(F2_053 - F2_562, -F2_562));
        let tmp2 = _mm512_dpwssd_epi32(z3, in53[i], two(-F2_562, F3_072 - F2_562));
        let tmp3 = _mm512_dpwssd_epi32(z4, in71[i], two(-F0_899, F1_501 - F0_899));
        let ends = [(tmp10, tmp3), (tmp11, tmp2), (tmp12, tmp1), (tmp13, tmp0)];
        for (k, (a, b)) in ends.into_iter().enumerate() {
            results[k][i] = _mm512_srai_epi32::<SHIFT>(_mm512_add_epi32(a, b));
            results[7 - k][i] = _mm512_srai_epi32::<SHIFT>(_mm512_sub_epi32(a, b));
        }
    }
    for (x, [low, high]) in x.iter_mut().zip(results) {
        *x = _mm512_packs_epi32(low, high);
    }
}

/// Rows become columns in each block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn transpose(x: &mut [__m512i; 8]) {
    let a: [_; 4] = std::array::from_fn(|i| _mm512_unpacklo_epi16(x[i], x[i + 4]));
    let b: [_; 4] = std::array::from_fn(|i| _mm512_unpackhi_epi16(x[i], x[i + 4]));
    let mut y = [_mm512_setzero_si512(); 8];
    for (half, c) in [a, b].into_iter().enumerate() {
        // Rows 0 2 4 6 and 1 3 5 7 of two columns each, then all of a column.
        let (even, odd) = ([c[0], c[2]], [c[1], c[3]]);
        let even = [_mm512_unpacklo_epi16(even[0], even[1]), _mm512_unpackhi_epi16(even[0], even[1])];
        let odd = [_mm512_unpacklo_epi16(odd[0], odd[1]), _mm512_unpackhi_epi16(odd[0], odd[1])];
        for i in 0..2 {
            y[4 * half + 2 * i] = _mm512_unpacklo_epi16(even[i], odd[i]);
            y[4 * half + 2 * i + 1] = _mm512_unpackhi_epi16(even[i], odd[i]);
        }
    }
    *x = y;
}

/// Four blocks side by side to eight rows of 32 samples, `stride` bytes apart from `out` on; the coefficients become zeros.
/// Whether they are such that libjpeg-turbo's result is the same: they are not when a file is unsound.
///
/// # Safety
/// The instructions of [`available`] must be there, and `out` must have room for the rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
pub unsafe fn four_blocks(group: &mut Group, quant: &[u16; 64], flat: bool, out: *mut u8, stride: usize) -> bool {
    let quant = |row: usize| {
        // SAFETY: eight values.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(quant[8 * row..8 * row + 8].as_ptr().cast()) })
    };
    let load = |row: &mut [i16; 32]| {
        // SAFETY: 64 bytes.
        unsafe {
            let loaded = _mm512_loadu_si512(row.as_ptr().cast());
            _mm512_storeu_si512(row.as_mut_ptr().cast(), _mm512_setzero_si512());
            loaded
        }
    };
    let center = _mm512_set1_epi8(-128);
    let first = _mm512_mullo_epi16(load(&mut group.0[0]), quant(0));
    let sound = _mm512_cmpgt_epu16_mask(_mm512_abs_epi16(first), _mm512_set1_epi16(LARGEST)) == 0;
    if flat {
        // Nothing but the first coefficients: each block has one value.
        let value = _mm512_srai_epi16::<3>(_mm512_add_epi16(first, _mm512_set1_epi16(4)));
        let value = _mm512_add_epi8(_mm512_packs_epi16(value, value), center);
        let spread = _mm512_permutexvar_epi8(
            _mm512_set_epi64(
                0,
                0,
                0,
                0,
                0x30 * 0x0101_0101_0101_0101,
                0x20 * 0x0101_0101_0101_0101,
                0x10 * 0x0101_0101_0101_0101,
                0,
            ),
            value,
        );
        for y in 0..8 {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_si256(out.add(y * stride).cast(), _mm512_castsi512_si256(spread)) }
        }
        return sound;
    }
    let mut x = [first; 8];
    for (i, x) in x.iter_mut().enumerate().skip(1) {
        *x = _mm512_mullo_epi16(load(&mut group.0[i]), quant(i));
    }
    pass::<{ CONST_BITS - PASS1_BITS }>(&mut x);
    transpose(&mut x);
    pass::<{ CONST_BITS + PASS1_BITS + 3 }>(&mut x);
    // Columns 0 and 4, ... to bytes, then rows of eight bytes.
    let p: [_; 4] = std::array::from_fn(|i| _mm512_packs_epi16(x[i], x[i + 4]));
    let a = [_mm512_unpacklo_epi8(p[0], p[2]), _mm512_unpackhi_epi8(p[0], p[2])];
    let b = [_mm512_unpacklo_epi8(p[1], p[3]), _mm512_unpackhi_epi8(p[1], p[3])];
    let left = [_mm512_unpacklo_epi8(a[0], b[0]), _mm512_unpackhi_epi8(a[0], b[0])];
    let right = [_mm512_unpacklo_epi8(a[1], b[1]), _mm512_unpackhi_epi8(a[1], b[1])];
    let side_by_side = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    for i in 0..2 {
        let rows = [_mm512_unpacklo_epi32(left[i], right[i]), _mm512_unpackhi_epi32(left[i], right[i])];
        for (j, two) in rows.into_iter().enumerate() {
            let two = _mm512_add_epi8(_mm512_permutexvar_epi64(side_by_side, two), center);
            // SAFETY: the caller's promise.
            unsafe {
                let at = out.add((4 * i + 2 * j) * stride);
                _mm256_storeu_si256(at.cast(), _mm512_castsi512_si256(two));
                _mm256_storeu_si256(at.add(stride).cast(), _mm512_extracti64x4_epi64::<1>(two));
            }
        }
    }
    sound
}
