//! The two passes of `resize` for x86-64 with AVX2; same sums, same bytes.
//!
//! A 22-bit weight does not fit the 16-bit multiplier, so it is split: `k = hi << 15 | lo`. `vpmaddwd` then multiplies
//! and adds two taps at once, and `(sum_hi << 15) + sum_lo` is the exact sum modulo 2^32, which is all `i32` keeps.

use std::arch::x86_64::*;

use super::taps::{PRECISION, Taps};

pub fn available() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Taps that one 16-byte load brings.
const TAPS: usize = 4;

/// Output pixels per 16-byte store, and rows per round.
const PIXELS: usize = 4;
const ROWS: usize = 4;

/// Output bytes per round of the vertical pass.
const BLOCK: usize = 32;

/// The weights of a pass as the kernels read them: two 16-bit parts side by side in one broadcast.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// Along the rows. Loads per output pixel; 0 when input or output is too narrow for whole loads and stores.
    loads: usize,
    /// First pixel read for each output pixel, moved left where the last load would run over the row's end.
    first: Vec<usize>,
    /// Per load: low parts of taps 0 and 1, of 2 and 3, then the high parts.
    along: Vec<[i32; TAPS]>,
    /// Down the columns: low and high parts of taps 2n and 2n + 1 for each output row; an odd last tap has a partner of
    /// weight 0.
    down: Vec<[i32; 2]>,
    /// Where the pairs of each output row begin in `down`.
    down_at: Vec<usize>,
}

fn pair(a: i32, b: i32) -> i32 {
    a & 0xffff | b << 16
}

fn low(k: i32) -> i32 {
    k & 0x7fff
}

fn high(k: i32) -> i32 {
    k >> 15
}

impl Pairs {
    pub fn new(windows: &[Taps], weights: &[i32], input: usize) -> Self {
        let mut packed = Self::default();
        for window in windows {
            packed.down_at.push(packed.down.len());
            for two in weights[window.offset..window.offset + window.count].chunks(2) {
                let second = two.get(1).copied().unwrap_or(0);
                packed.down.push([pair(low(two[0]), low(second)), pair(high(two[0]), high(second))]);
            }
        }
        packed.down_at.push(packed.down.len());
        let loads = windows.iter().map(|w| w.count).max().unwrap_or(0).div_ceil(TAPS);
        if loads * TAPS > input || windows.len() < PIXELS {
            return packed;
        }
        packed.loads = loads;
        let mut taps = vec![0; loads * TAPS];
        for window in windows {
            let start = window.first.min(input - taps.len());
            packed.first.push(start);
            taps.fill(0);
            taps[window.first - start..][..window.count]
                .copy_from_slice(&weights[window.offset..window.offset + window.count]);
            packed.along.extend(taps.chunks_exact(TAPS).map(|k| {
                [
                    pair(low(k[0]), low(k[1])),
                    pair(low(k[2]), low(k[3])),
                    pair(high(k[0]), high(k[1])),
                    pair(high(k[2]), high(k[3])),
                ]
            }));
        }
        packed
    }

    /// Whether the horizontal kernel can be used.
    pub fn fits(&self) -> bool {
        self.loads > 0
    }

    /// The pairs of output row `y` for the vertical kernel.
    pub fn down(&self, y: usize) -> &[[i32; 2]] {
        &self.down[self.down_at[y]..self.down_at[y + 1]]
    }
}

/// All rows of `input` (RGBX, `stride` bytes each) along the rows.
pub(super) fn horizontal(input: &[u8], stride: usize, packed: &Pairs, out: &mut [u8]) {
    let out_stride = 4 * packed.first.len();
    let rows = input.len() / stride;
    assert!(available() && packed.fits() && packed.first.len() >= PIXELS && out.len() == rows * out_stride);
    assert!(packed.first.iter().all(|first| (first + packed.loads * TAPS) * 4 <= stride));
    for y in (0..rows).step_by(ROWS) {
        // Past the last row the same row again: it is written twice with the same bytes.
        let row = |i: usize| (y + i).min(rows - 1);
        let from = [row(0), row(1), row(2), row(3)].map(|r| input[r * stride..].as_ptr());
        let to = [row(0), row(1), row(2), row(3)].map(|r| out[r * out_stride..].as_mut_ptr());
        // SAFETY: AVX2 is there, every load lies inside its row of `stride` bytes and every store inside its row of
        // `out_stride` bytes (both asserted above).
        unsafe {
            match packed.loads {
                1 => horizontal_rows::<1>(from, to, packed),
                2 => horizontal_rows::<2>(from, to, packed),
                _ => horizontal_rows::<0>(from, to, packed),
            }
        }
    }
}

/// `LOADS` is the number of loads per pixel when the compiler may unroll them, else 0.
///
/// # Safety
/// The rows of `from` must have all pixels that `packed` reads, those of `to` as many as it makes, [`PIXELS`] at least.
#[target_feature(enable = "avx2")]
unsafe fn horizontal_rows<const LOADS: usize>(from: [*const u8; ROWS], to: [*mut u8; ROWS], packed: &Pairs) {
    let loads = if LOADS == 0 { packed.loads } else { LOADS };
    let width = packed.first.len();
    let mut x = 0;
    while x < width {
        // The last four pixels overlap those before instead of leaving a remainder.
        let start = x.min(width - PIXELS);
        let mut words = [_mm256_setzero_si256(); PIXELS];
        for (i, words) in words.iter_mut().enumerate() {
            let weights = &packed.along[(start + i) * loads..(start + i + 1) * loads];
            // SAFETY: the caller asserted that the loads end inside the rows.
            *words = unsafe { horizontal_pixel::<LOADS>(from, packed.first[start + i], weights) };
        }
        // Each word register holds rows 0 and 2 in its low lane, 1 and 3 in its high lane.
        let (a, b) = (_mm256_packus_epi16(words[0], words[1]), _mm256_packus_epi16(words[2], words[3]));
        let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
        let even = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
        let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
        // SAFETY: 16 bytes from pixel `start <= width - 4` on lie inside the output row.
        unsafe {
            _mm_storeu_si128(to[0].add(4 * start).cast(), _mm256_castsi256_si128(even));
            _mm_storeu_si128(to[1].add(4 * start).cast(), _mm256_extracti128_si256::<1>(even));
            _mm_storeu_si128(to[2].add(4 * start).cast(), _mm256_castsi256_si128(odd));
            _mm_storeu_si128(to[3].add(4 * start).cast(), _mm256_extracti128_si256::<1>(odd));
        }
        x += PIXELS;
    }
}

/// One output pixel of four rows as 16-bit words: rows 0 and 2 in the low lane, 1 and 3 in the high lane.
///
/// # Safety
/// Each row must have [`TAPS`] pixels for each of the weights, from pixel `first` on.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn horizontal_pixel<const LOADS: usize>(
    from: [*const u8; ROWS],
    first: usize,
    weights: &[[i32; TAPS]],
) -> __m256i {
    // Taps 0, 1 (or 2, 3) of a lane's four pixels as 16-bit pairs (R0 R1) (G0 G1) (B0 B1) (X0 X1).
    let taps01 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    let taps23 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    let mut low = [_mm256_setzero_si256(); 2];
    let mut high = [_mm256_setzero_si256(); 2];
    for (i, k) in weights.iter().enumerate() {
        let k = k.map(|pair| _mm256_set1_epi32(pair));
        for half in 0..2 {
            // SAFETY: the caller asserted that 16 bytes from here on lie inside the row.
            let pixels = unsafe {
                let at = 4 * (first + TAPS * i);
                _mm256_inserti128_si256::<1>(
                    _mm256_castsi128_si256(_mm_loadu_si128(from[2 * half].add(at).cast())),
                    _mm_loadu_si128(from[2 * half + 1].add(at).cast()),
                )
            };
            let (a, b) = (_mm256_shuffle_epi8(pixels, taps01), _mm256_shuffle_epi8(pixels, taps23));
            let sum_low = _mm256_add_epi32(_mm256_madd_epi16(a, k[0]), _mm256_madd_epi16(b, k[1]));
            let sum_high = _mm256_add_epi32(_mm256_madd_epi16(a, k[2]), _mm256_madd_epi16(b, k[3]));
            if LOADS == 1 {
                (low[half], high[half]) = (sum_low, sum_high);
            } else {
                low[half] = _mm256_add_epi32(low[half], sum_low);
                high[half] = _mm256_add_epi32(high[half], sum_high);
            }
        }
    }
    _mm256_packs_epi32(rounded(low[0], high[0]), rounded(low[1], high[1]))
}

/// The exact sum without its fraction bits, rounded.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded(low: __m256i, high: __m256i) -> __m256i {
    let half = _mm256_set1_epi32(1 << (PRECISION - 1));
    let sum = _mm256_add_epi32(_mm256_add_epi32(low, half), _mm256_slli_epi32::<15>(high));
    _mm256_srai_epi32::<{ PRECISION as i32 }>(sum)
}

/// One output row from the `count` rows of `stride` bytes in `input`; `false` when the rows are too short for it.
pub(super) fn vertical(input: &[u8], stride: usize, count: usize, pairs: &[[i32; 2]], out: &mut [u8]) -> bool {
    assert!(available() && input.len() == stride * count && pairs.len() == count.div_ceil(2) && out.len() == stride);
    if stride < BLOCK || count == 0 {
        return false;
    }
    // SAFETY: AVX2 is there; `count` rows of at least one block lie in `input`, one row in `out`.
    unsafe { vertical_row(input, stride, count, pairs, out) }
    true
}

/// # Safety
/// `input` must have `count` rows, one at least, of `stride` bytes, `out` one; that is [`BLOCK`] bytes at least. The pairs
/// must be those of `count` rows.
#[target_feature(enable = "avx2")]
unsafe fn vertical_row(input: &[u8], stride: usize, count: usize, pairs: &[[i32; 2]], out: &mut [u8]) {
    let zero = _mm256_setzero_si256();
    let mut x = 0;
    while x < stride {
        // The last block overlaps the one before instead of leaving a remainder.
        let start = x.min(stride - BLOCK);
        let mut low = [zero; 4];
        let mut high = [zero; 4];
        for (i, [k_low, k_high]) in pairs.iter().enumerate() {
            let (k_low, k_high) = (_mm256_set1_epi32(*k_low), _mm256_set1_epi32(*k_high));
            let (first, second) = (2 * i, (2 * i + 1).min(count - 1));
            // SAFETY: both rows are below `count` and `start + BLOCK <= stride`.
            let (a, b) = unsafe {
                (
                    _mm256_loadu_si256(input.as_ptr().add(first * stride + start).cast()),
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
            for j in 0..4 {
                low[j] = _mm256_add_epi32(low[j], _mm256_madd_epi16(taps[j], k_low));
                high[j] = _mm256_add_epi32(high[j], _mm256_madd_epi16(taps[j], k_high));
            }
        }
        let words = [
            _mm256_packs_epi32(rounded(low[0], high[0]), rounded(low[1], high[1])),
            _mm256_packs_epi32(rounded(low[2], high[2]), rounded(low[3], high[3])),
        ];
        // SAFETY: `start + BLOCK <= stride == out.len()`.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(start).cast(), _mm256_packus_epi16(words[0], words[1])) }
        x += BLOCK;
    }
}
