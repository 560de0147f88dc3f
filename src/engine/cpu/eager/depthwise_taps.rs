//! Rows of sums over a filter's taps: all that is compiled for each size of filters.

use std::ops::Range;

use super::depthwise_rows::{Cut, ahead};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

/// Outputs side by side in registers: enough to hide the latency of the additions, few enough for their inputs to stay in
/// registers beside them.
const SIDE: usize = 7;

/// One row of a filter, and what it is multiplied with.
#[derive(Clone, Copy)]
pub struct Taps {
    pub input: *const f32,
    pub weights: *const f32,
}

impl Taps {
    pub const NONE: Self = Self { input: std::ptr::null(), weights: std::ptr::null() };
}

/// A row of outputs, whole strips of pixels one after the other: memory is written in its order, or nearly so.
pub struct Row<'a> {
    pub cut: &'a Cut,
    pub rows: &'a [Taps],
    /// Taps of each row.
    pub taps: usize,
    /// Pixels from one output's inputs to those of the next.
    pub stride: usize,
    pub blocks: Range<usize>,
    /// Floats from one block of the inputs to the next, and of the weights of all blocks, not only of these.
    pub input: usize,
    pub weights: usize,
    pub to: *mut f32,
    /// Floats from one output to the next.
    pub pixel: usize,
    /// The same from one block of these to the next; None where they lie as in images.
    pub block: Option<usize>,
    pub width: usize,
}

impl Row<'_> {
    /// # Safety
    /// All inputs and weights are readable, the outputs writable.
    #[inline(never)]
    pub unsafe fn compute(&self, isa: Isa) {
        match (self.taps, self.stride) {
            _ if isa == Isa::Portable => dispatch(isa, OfSize::<0, 0>(self)),
            (1, 1) => dispatch(isa, OfSize::<1, 1>(self)),
            (2, 1) => dispatch(isa, OfSize::<2, 1>(self)),
            (3, 1) => dispatch(isa, OfSize::<3, 1>(self)),
            (5, 1) => dispatch(isa, OfSize::<5, 1>(self)),
            (7, 1) => dispatch(isa, OfSize::<7, 1>(self)),
            (3, 2) => dispatch(isa, OfSize::<3, 2>(self)),
            (5, 2) => dispatch(isa, OfSize::<5, 2>(self)),
            (taps, stride) => unreachable!("{taps} taps and a stride of {stride}"),
        }
    }
}

/// A row of `T` taps and a stride of `S`; of any, where they are 0.
struct OfSize<'a, const T: usize, const S: usize>(&'a Row<'a>);

impl<const T: usize, const S: usize> Kernel for OfSize<'_, T, S> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // Code for known sizes is for fast lanes, the other one for all others.
        if V::FAST != (T > 0) {
            return;
        }
        let (width, mut x) = (self.0.width, 0);
        // SAFETY: the promise to `Row::compute`.
        unsafe {
            while V::FAST && x + SIDE <= width {
                self.strip::<V, SIDE>(x);
                x += SIDE;
            }
            while x + 4 <= width {
                self.strip::<V, 4>(x);
                x += 4;
            }
            while x < width {
                self.strip::<V, 1>(x);
                x += 1;
            }
        }
    }
}

impl<const T: usize, const S: usize> OfSize<'_, T, S> {
    /// # Safety
    /// As for [`Row::compute`]; the pixels are in the row.
    #[inline(always)]
    unsafe fn strip<V: Lanes, const R: usize>(&self, x: usize) {
        let row = self.0;
        let stride = if S > 0 { S } else { row.stride };
        for (at, block) in row.blocks.clone().enumerate() {
            let place = match row.block {
                Some(floats) => at * floats,
                None => row.cut.channels.start(block),
            };
            let to = row.to.wrapping_add(x * row.pixel + place);
            // SAFETY: the caller's promise.
            unsafe {
                let values = self.tile::<V, R>(at * row.input + x * stride * LANES, block * row.weights);
                for (r, value) in values.iter().enumerate() {
                    ahead::<V>(to.wrapping_add(r * row.pixel));
                    value.store(to.wrapping_add(r * row.pixel));
                }
            }
        }
    }

    /// `R` outputs of a block of channels. `input` and `weights`: the block's offsets from those of the taps.
    ///
    /// # Safety
    /// All inputs and weights are readable.
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize>(&self, input: usize, weights: usize) -> [V; R] {
        let row = self.0;
        let (taps, stride) = if T > 0 { (T, S) } else { (row.taps, row.stride) };
        let mut sums = [V::splat(0.0); R];
        for row in row.rows {
            let (input, weights) = (row.input.wrapping_add(input), row.weights.wrapping_add(weights));
            for tap in 0..taps {
                // SAFETY: the caller's promise.
                unsafe {
                    let weight = V::load(weights.wrapping_add(tap * LANES));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(input.wrapping_add((r * stride + tap) * LANES)).mul_add(weight, *sum);
                    }
                }
            }
        }
        sums
    }
}
