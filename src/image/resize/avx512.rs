//! The two passes of `resize` with AVX-512 VNNI: `vpdpbusd` multiplies four bytes with four signed weights and adds.
//!
//! A weight becomes three signed bytes, `k = b2 << 16 + b1 << 8 + b0`, and the sums over each are put together at the
//! end: exact modulo 2^32, which is all `i32` keeps.

use std::arch::x86_64::*;

use super::taps::{PRECISION, Taps};

pub fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

/// Taps per multiplication, and pixels that one 16-byte load brings.
const TAPS: usize = 4;

/// Output pixels per 16-byte store, and rows per round: one in each quarter of a register.
const PIXELS: usize = 4;
const ROWS: usize = 4;

/// Output bytes per round of the vertical pass.
const BLOCK: usize = 64;

/// Four taps' weights: their low, middle and high bytes.
pub(super) type Quad = [i32; 3];

/// The weights of a pass as the kernels read them.
#[derive(Debug, Default)]
pub(super) struct Quads {
    /// Along the rows. Loads per output pixel; 0 when input or output is too narrow for whole loads and stores.
    loads: usize,
    /// First pixel read for each output pixel, moved left where the last load would run over the row's end.
    first: Vec<usize>,
    along: Vec<Quad>,
    /// Down the columns; missing taps weigh 0.
    down: Vec<Quad>,
    /// Where the quads of each output row begin in `down`.
    down_at: Vec<usize>,
}

/// Up to four weights, byte by byte.
pub(super) fn quad(weights: &[i32]) -> Quad {
    let mut bytes = [[0u8; TAPS]; 3];
    for (tap, &k) in weights.iter().enumerate() {
        let mut rest = k;
        for byte in &mut bytes {
            // The nearest signed byte: what is left is divisible by 256.
            byte[tap] = rest as u8;
            rest = (rest - i32::from(rest as i8)) >> 8;
        }
    }
    bytes.map(i32::from_le_bytes)
}

impl Quads {
    pub fn new(windows: &[Taps], weights: &[i32], input: usize) -> Self {
        let mut packed = Self::default();
        for window in windows {
            packed.down_at.push(packed.down.len());
            packed.down.extend(weights[window.offset..window.offset + window.count].chunks(TAPS).map(quad));
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
            packed.along.extend(taps.chunks_exact(TAPS).map(quad));
        }
        packed
    }

    /// Whether the horizontal kernel can be used.
    pub fn fits(&self) -> bool {
        self.loads > 0
    }

    /// The quads of output row `y` for the vertical kernel.
    pub fn down(&self, y: usize) -> &[Quad] {
        &self.down[self.down_at[y]..self.down_at[y + 1]]
    }
}

/// All rows of `input` (RGBX, `stride` bytes each) along the rows.
pub(super) fn horizontal(input: &[u8], stride: usize, packed: &Quads, out: &mut [u8]) {
    let out_stride = 4 * packed.first.len();
    let rows = input.len() / stride;
    assert!(available() && packed.fits() && packed.first.len() >= PIXELS && out.len() == rows * out_stride);
    assert!(packed.first.iter().all(|first| (first + packed.loads * TAPS) * 4 <= stride));
    for y in (0..rows).step_by(ROWS) {
        // Past the last row the same row again: it is written twice with the same bytes.
        let row = |i: usize| (y + i).min(rows - 1);
        let from = [row(0), row(1), row(2), row(3)].map(|r| input[r * stride..].as_ptr());
        let to = [row(0), row(1), row(2), row(3)].map(|r| out[r * out_stride..].as_mut_ptr());
        // SAFETY: the instructions are there, every load lies inside its row of `stride` bytes and every store inside
        // its row of `out_stride` bytes (all asserted above).
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
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn horizontal_rows<const LOADS: usize>(from: [*const u8; ROWS], to: [*mut u8; ROWS], packed: &Quads) {
    let loads = if LOADS == 0 { packed.loads } else { LOADS };
    let width = packed.first.len();
    // Four pixels RGBX to R of all four, G of all four, ...
    let planes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    let mut x = 0;
    while x < width {
        // The last four pixels overlap those before instead of leaving a remainder.
        let start = x.min(width - PIXELS);
        let mut pixels = [_mm512_setzero_si512(); PIXELS];
        for (i, pixel) in pixels.iter_mut().enumerate() {
            let first = packed.first[start + i];
            let quads = &packed.along[(start + i) * loads..(start + i + 1) * loads];
            let mut sums = start_sums();
            for (load, quad) in quads.iter().enumerate() {
                // SAFETY: the caller asserted that 16 bytes from here on lie inside the row.
                let four = from.map(|row| unsafe { _mm_loadu_si128(row.add(4 * (first + TAPS * load)).cast()) });
                let rows = _mm512_castsi128_si512(four[0]);
                let rows = _mm512_inserti32x4::<1>(rows, four[1]);
                let rows = _mm512_inserti32x4::<2>(rows, four[2]);
                let rows = _mm512_inserti32x4::<3>(rows, four[3]);
                sums = add_taps(sums, _mm512_shuffle_epi8(rows, planes), quad);
            }
            *pixel = rounded(sums);
        }
        let bytes =
            _mm512_packus_epi16(_mm512_packs_epi32(pixels[0], pixels[1]), _mm512_packs_epi32(pixels[2], pixels[3]));
        // SAFETY: 16 bytes from pixel `start <= width - 4` on lie inside the output row.
        unsafe {
            _mm_storeu_si128(to[0].add(4 * start).cast(), _mm512_castsi512_si128(bytes));
            _mm_storeu_si128(to[1].add(4 * start).cast(), _mm512_extracti32x4_epi32::<1>(bytes));
            _mm_storeu_si128(to[2].add(4 * start).cast(), _mm512_extracti32x4_epi32::<2>(bytes));
            _mm_storeu_si128(to[3].add(4 * start).cast(), _mm512_extracti32x4_epi32::<3>(bytes));
        }
        x += PIXELS;
    }
}

/// Sums over the low, middle and high bytes; the half that rounds is already in.
#[inline]
#[target_feature(enable = "avx512f")]
fn start_sums() -> [__m512i; 3] {
    [_mm512_set1_epi32(1 << (PRECISION - 1)), _mm512_setzero_si512(), _mm512_setzero_si512()]
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_taps(sums: [__m512i; 3], taps: __m512i, quad: &Quad) -> [__m512i; 3] {
    [
        _mm512_dpbusd_epi32(sums[0], taps, _mm512_set1_epi32(quad[0])),
        _mm512_dpbusd_epi32(sums[1], taps, _mm512_set1_epi32(quad[1])),
        _mm512_dpbusd_epi32(sums[2], taps, _mm512_set1_epi32(quad[2])),
    ]
}

/// The exact sum without its fraction bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded(sums: [__m512i; 3]) -> __m512i {
    let high = _mm512_add_epi32(sums[1], _mm512_slli_epi32::<8>(sums[2]));
    _mm512_srai_epi32::<PRECISION>(_mm512_add_epi32(sums[0], _mm512_slli_epi32::<8>(high)))
}

/// One output row from the `count` rows of `stride` bytes in `input`; `false` when the rows are too short for it.
pub(super) fn vertical(input: &[u8], stride: usize, count: usize, quads: &[Quad], out: &mut [u8]) -> bool {
    assert!(available() && input.len() == stride * count && quads.len() == count.div_ceil(TAPS));
    assert!(out.len() == stride);
    if stride < BLOCK || count == 0 {
        return false;
    }
    // SAFETY: the instructions are there; `count` rows of at least one block lie in `input`, one row in `out`.
    unsafe { vertical_row(input, stride, count, quads, out) }
    true
}

/// # Safety
/// `input` must have `count` rows, one at least, of `stride` bytes, `out` one; that is [`BLOCK`] bytes at least.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn vertical_row(input: &[u8], stride: usize, count: usize, quads: &[Quad], out: &mut [u8]) {
    let mut x = 0;
    while x < stride {
        // The last block overlaps the one before instead of leaving a remainder.
        let start = x.min(stride - BLOCK);
        let mut sums = [start_sums(); 4];
        for (i, quad) in quads.iter().enumerate() {
            // Rows behind the last have weight 0; the last row stands in for them.
            let rows: [_; TAPS] = std::array::from_fn(|tap| (TAPS * i + tap).min(count - 1) * stride + start);
            // SAFETY: every row is below `count` and `start + BLOCK <= stride`.
            let [a, b, c, d] = rows.map(|at| unsafe { _mm512_loadu_si512(input.as_ptr().add(at).cast()) });
            let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
            sums[0] = add_taps(sums[0], _mm512_unpacklo_epi16(ab, cd), quad);
            sums[1] = add_taps(sums[1], _mm512_unpackhi_epi16(ab, cd), quad);
            let (ab, cd) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
            sums[2] = add_taps(sums[2], _mm512_unpacklo_epi16(ab, cd), quad);
            sums[3] = add_taps(sums[3], _mm512_unpackhi_epi16(ab, cd), quad);
        }
        let bytes = _mm512_packus_epi16(
            _mm512_packs_epi32(rounded(sums[0]), rounded(sums[1])),
            _mm512_packs_epi32(rounded(sums[2]), rounded(sums[3])),
        );
        // SAFETY: `start + BLOCK <= stride == out.len()`.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(start).cast(), bytes) }
        x += BLOCK;
    }
}
