//! The pass along the rows with AVX-512 VBMI: one permutation brings the taps of four output pixels into place.
//!
//! Sixteen input pixels fill a register; `vpermb` puts four taps of each channel of four output pixels into its sixteen
//! lanes, and `vpdpbusd` multiplies and adds them, with weights split into three bytes as in `avx512`.

use std::arch::x86_64::*;

use super::avx512::quad;
use super::taps::{PRECISION, Taps};

pub fn available() -> bool {
    super::avx512::available() && is_x86_feature_detected!("avx512vbmi")
}

const TAPS: usize = 4;
/// Output pixels per 16-byte store, and rows per round.
const PIXELS: usize = 4;
const ROWS: usize = 4;
/// Input pixels per load.
const LOAD: usize = 16;

/// Four taps of four output pixels: where each byte comes from, and three bytes of each weight, for every channel.
#[derive(Debug)]
#[repr(C, align(64))]
struct Step {
    index: [u8; 64],
    weights: [[i32; 16]; 3],
}

/// The weights of a pass as the kernel reads them; empty where the taps of four pixels span more than one load.
#[derive(Debug, Default)]
pub(super) struct Groups {
    width: usize,
    /// First input pixel read for each group of four output pixels.
    first: Vec<usize>,
    /// Steps per group.
    steps: usize,
    groups: Vec<Step>,
}

impl Groups {
    pub fn new(windows: &[Taps], weights: &[i32], input: usize) -> Self {
        let width = windows.len();
        let steps = windows.iter().map(|w| w.count).max().unwrap_or(0).div_ceil(TAPS);
        if width < PIXELS || input < LOAD {
            return Self::default();
        }
        let mut packed = Self { width, steps, ..Self::default() };
        for x in (0..width).step_by(PIXELS) {
            // The last group overlaps the one before instead of leaving a remainder.
            let group = &windows[x.min(width - PIXELS)..][..PIXELS];
            let first = group.iter().map(|w| w.first).min().unwrap_or(0).min(input - LOAD);
            if group.iter().any(|w| w.first + w.count > first + LOAD) {
                return Self::default();
            }
            packed.first.push(first);
            for step in 0..steps {
                let mut out = Step { index: [0; 64], weights: [[0; 16]; 3] };
                for (i, window) in group.iter().enumerate() {
                    let from = (step * TAPS).min(window.count);
                    let until = (from + TAPS).min(window.count);
                    let bytes = quad(&weights[window.offset + from..window.offset + until]);
                    for channel in 0..4 {
                        let lane = 4 * i + channel;
                        for tap in 0..until - from {
                            out.index[TAPS * lane + tap] = (4 * (window.first + from + tap - first) + channel) as u8;
                        }
                        for (all, byte) in out.weights.iter_mut().zip(bytes) {
                            all[lane] = byte;
                        }
                    }
                }
                packed.groups.push(out);
            }
        }
        packed
    }

    /// Whether the kernel can be used.
    pub fn fits(&self) -> bool {
        !self.first.is_empty()
    }
}

/// All rows of `input` (RGBX, `stride` bytes each) along the rows.
pub(super) fn horizontal(input: &[u8], stride: usize, packed: &Groups, out: &mut [u8]) {
    let out_stride = 4 * packed.width;
    let rows = input.len() / stride;
    assert!(available() && packed.fits() && packed.width >= PIXELS && out.len() == rows * out_stride);
    assert!(packed.first.iter().all(|first| (first + LOAD) * 4 <= stride));
    assert!(
        packed.first.len() == packed.width.div_ceil(PIXELS) && packed.groups.len() == packed.first.len() * packed.steps
    );
    for y in (0..rows).step_by(ROWS) {
        // Past the last row the same row again: it is written twice with the same bytes.
        let row = |i: usize| (y + i).min(rows - 1);
        let from = [row(0), row(1), row(2), row(3)].map(|r| input[r * stride..].as_ptr());
        let to = [row(0), row(1), row(2), row(3)].map(|r| out[r * out_stride..].as_mut_ptr());
        // SAFETY: the instructions are there, every load lies inside its row of `stride` bytes and every store inside
        // its row of `out_stride` bytes (all asserted above).
        unsafe {
            match packed.steps {
                1 => four_rows::<1>(from, to, packed),
                2 => four_rows::<2>(from, to, packed),
                _ => four_rows::<0>(from, to, packed),
            }
        }
    }
}

/// `STEPS` is the number of steps per group when the compiler may unroll them, else 0.
///
/// # Safety
/// The rows of `from` must have [`LOAD`] pixels from each of the first ones of `packed` on, those of `to` as many as it
/// makes, [`PIXELS`] at least.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn four_rows<const STEPS: usize>(from: [*const u8; ROWS], to: [*mut u8; ROWS], packed: &Groups) {
    let steps = if STEPS == 0 { packed.steps } else { STEPS };
    let half = _mm512_set1_epi32(1 << (PRECISION - 1));
    let zero = _mm512_setzero_si512();
    for ((i, &first), group) in packed.first.iter().enumerate().zip(packed.groups.chunks_exact(steps)) {
        let start = (PIXELS * i).min(packed.width - PIXELS);
        // SAFETY: the caller asserted that 64 bytes from pixel `first` on lie inside each row.
        let pixels = from.map(|row| unsafe { _mm512_loadu_si512(row.add(4 * first).cast()) });
        let mut sums = [[half, zero, zero]; ROWS];
        for step in group {
            // SAFETY: 64 bytes each.
            let (index, weights) = unsafe {
                let load = |part: &[i32; 16]| _mm512_loadu_si512(part.as_ptr().cast());
                let [a, b, c] = &step.weights;
                (_mm512_loadu_si512(step.index.as_ptr().cast()), [load(a), load(b), load(c)])
            };
            for (sums, pixels) in sums.iter_mut().zip(pixels) {
                let taps = _mm512_permutexvar_epi8(index, pixels);
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbusd_epi32(*sum, taps, weights);
                }
            }
        }
        for (sums, row) in sums.iter().zip(to) {
            let high = _mm512_add_epi32(sums[1], _mm512_slli_epi32::<8>(sums[2]));
            let sum = _mm512_srai_epi32::<PRECISION>(_mm512_add_epi32(sums[0], _mm512_slli_epi32::<8>(high)));
            let bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(sum, zero));
            // SAFETY: 16 bytes from pixel `start <= width - 4` on lie inside the output row.
            unsafe { _mm_storeu_si128(row.add(4 * start).cast(), bytes) }
        }
    }
}
