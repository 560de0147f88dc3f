//! The two passes of `resize` for x86-64 with AVX2; same sums, same bytes.
//!
//! A 22-bit weight does not fit the 16-bit multiplier, so it is split: `k = hi << 15 | lo`. `vpmaddwd` then multiplies
//! and adds two taps at once, and `(sum_hi << 15) + sum_lo` is the exact sum modulo 2^32, which is all `i32` keeps.

use std::arch::x86_64::*;

use super::resize::{PRECISION, Weights, Window, vertical_scalar};

pub fn available() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Taps that one 16-byte load brings.
const TAPS: usize = 4;

/// The weights of a pass as the horizontal kernel reads them.
#[derive(Debug)]
pub(super) struct Packed {
    /// Loads per output pixel; 0 when the input is too narrow for whole loads.
    loads: usize,
    /// First pixel read for each output pixel, moved left where the last load would run over the row's end.
    first: Vec<usize>,
    /// Per load: low parts of four taps, then their high parts.
    values: Vec<[i16; 2 * TAPS]>,
}

impl Packed {
    pub fn new(windows: &[Window], weights: &[i32], input: usize) -> Self {
        let loads = windows.iter().map(|w| w.count).max().unwrap_or(0).div_ceil(TAPS);
        if loads * TAPS > input {
            return Self { loads: 0, first: Vec::new(), values: Vec::new() };
        }
        let mut first = Vec::with_capacity(windows.len());
        let mut values = vec![[0i16; 2 * TAPS]; windows.len() * loads];
        for (window, values) in windows.iter().zip(values.chunks_exact_mut(loads.max(1))) {
            let start = window.first.min(input - loads * TAPS);
            first.push(start);
            for (i, &k) in weights[window.offset..window.offset + window.count].iter().enumerate() {
                let tap = window.first - start + i;
                values[tap / TAPS][tap % TAPS] = (k & 0x7fff) as i16;
                values[tap / TAPS][TAPS + tap % TAPS] = (k >> 15) as i16;
            }
        }
        Self { loads, first, values }
    }

    pub fn fits(&self) -> bool {
        self.loads > 0
    }
}

/// All rows of `input` (RGBX, `stride` bytes each) along the rows.
pub(super) fn horizontal(input: &[u8], stride: usize, weights: &Weights, out: &mut [u8]) {
    let packed = &weights.packed;
    let out_stride = 4 * packed.first.len();
    let rows = input.len() / stride;
    assert!(available() && packed.fits() && out.len() == rows * out_stride);
    assert!(packed.first.iter().all(|first| (first + packed.loads * TAPS) * 4 <= stride));
    for y in (0..rows).step_by(4) {
        // Past the last row the same row again: it is written twice with the same bytes.
        let row = |i: usize| (y + i).min(rows - 1);
        let from = [row(0), row(1), row(2), row(3)].map(|r| input[r * stride..].as_ptr());
        let to = [row(0), row(1), row(2), row(3)].map(|r| out[r * out_stride..].as_mut_ptr());
        // SAFETY: AVX2 is there, every load lies inside its row of `stride` bytes and every store inside its row of
        // `out_stride` bytes (both asserted above).
        unsafe { horizontal_four(from, to, packed) }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn horizontal_four(from: [*const u8; 4], to: [*mut u8; 4], packed: &Packed) {
    // Pixels 0, 1 of the load to the low lane and 2, 3 to the high lane, as pairs (R0 R1) (G0 G1) (B0 B1) (X0 X1).
    let pairs = _mm256_setr_epi8(
        0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, //
        8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1,
    );
    let low_parts = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    let high_parts = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    let half = _mm256_set1_epi32(1 << (PRECISION - 1));
    for (x, (&first, values)) in packed.first.iter().zip(packed.values.chunks_exact(packed.loads)).enumerate() {
        let mut low = [_mm256_setzero_si256(); 4];
        let mut high = [_mm256_setzero_si256(); 4];
        for (i, eight) in values.iter().enumerate() {
            // SAFETY: 16 bytes of an array of 16 bytes.
            let k = _mm256_castsi128_si256(unsafe { _mm_loadu_si128(eight.as_ptr().cast()) });
            let (k_low, k_high) =
                (_mm256_permutevar8x32_epi32(k, low_parts), _mm256_permutevar8x32_epi32(k, high_parts));
            for r in 0..4 {
                // SAFETY: the caller asserted that the load ends inside the row.
                let pixels = unsafe { _mm_loadu_si128(from[r].add(4 * (first + TAPS * i)).cast()) };
                let taps = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pixels), pairs);
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(taps, k_low));
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(taps, k_high));
            }
        }
        let mut sum = [half; 4];
        for r in 0..4 {
            sum[r] = _mm256_add_epi32(low[r], _mm256_slli_epi32::<15>(high[r]));
        }
        // Low and high lane hold the sums over even and odd pairs of taps: add them, two rows per register.
        let two = |a, b| {
            let both = _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b));
            _mm256_srai_epi32::<{ PRECISION as i32 }>(_mm256_add_epi32(both, half))
        };
        let words = _mm256_packs_epi32(two(sum[0], sum[1]), two(sum[2], sum[3]));
        let bytes = _mm256_packus_epi16(words, words);
        let (even, odd) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
        let pixels =
            [_mm_cvtsi128_si32(even), _mm_cvtsi128_si32(odd), _mm_extract_epi32::<1>(even), _mm_extract_epi32::<1>(odd)];
        for r in 0..4 {
            // SAFETY: `x` is below the number of output pixels, 4 bytes each.
            unsafe { to[r].add(4 * x).cast::<i32>().write_unaligned(pixels[r]) }
        }
    }
}

/// One output row from the `k.len()` rows of `stride` bytes in `input`.
pub(super) fn vertical(input: &[u8], stride: usize, k: &[i32], out: &mut [u8]) {
    assert!(available() && input.len() == stride * k.len() && out.len() == stride);
    if stride < BLOCK {
        return vertical_scalar(input, stride, 0, k, out);
    }
    let mut x = 0;
    while x < stride {
        // The last block overlaps the one before instead of leaving a remainder.
        let start = x.min(stride - BLOCK);
        // SAFETY: AVX2 is there and `start + BLOCK <= stride`.
        unsafe { vertical_block(input, stride, start, k, out) }
        x += BLOCK;
    }
}

const BLOCK: usize = 32;

#[target_feature(enable = "avx2")]
unsafe fn vertical_block(input: &[u8], stride: usize, start: usize, k: &[i32], out: &mut [u8]) {
    let zero = _mm256_setzero_si256();
    let mut low = [zero; 4];
    let mut high = [zero; 4];
    let pair = |a: i32, b: i32| _mm256_set1_epi32(a & 0xffff | b << 16);
    for t in (0..k.len()).step_by(2) {
        // An odd last tap is paired with itself at weight 0.
        let (second, k1) = k.get(t + 1).map_or((t, 0), |&k1| (t + 1, k1));
        let (k_low, k_high) = (pair(k[t] & 0x7fff, k1 & 0x7fff), pair(k[t] >> 15, k1 >> 15));
        // SAFETY: both rows lie inside `input` and `start + BLOCK <= stride`, as the caller checked.
        let (a, b) = unsafe {
            (
                _mm256_loadu_si256(input.as_ptr().add(t * stride + start).cast()),
                _mm256_loadu_si256(input.as_ptr().add(second * stride + start).cast()),
            )
        };
        let (left, right) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
        let taps = [
            _mm256_unpacklo_epi8(left, zero),
            _mm256_unpackhi_epi8(left, zero),
            _mm256_unpacklo_epi8(right, zero),
            _mm256_unpackhi_epi8(right, zero),
        ];
        for i in 0..4 {
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(taps[i], k_low));
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(taps[i], k_high));
        }
    }
    let half = _mm256_set1_epi32(1 << (PRECISION - 1));
    let mut sum = [zero; 4];
    for i in 0..4 {
        let exact = _mm256_add_epi32(low[i], _mm256_slli_epi32::<15>(high[i]));
        sum[i] = _mm256_srai_epi32::<{ PRECISION as i32 }>(_mm256_add_epi32(exact, half));
    }
    let bytes = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
    // SAFETY: `start + BLOCK <= stride == out.len()`.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(start).cast(), bytes) }
}
