//! Each pixel's channels to mean 0 and variance 1, then factor and summand per channel.

use super::Step;
use super::bytes::{Made, Narrow, Plain, Sink};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, activate};
use crate::engine::cpu::common::kernels::bytes::Range;
use crate::engine::cpu::common::kernels::dot::{self, Dot, DotKernel};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct LayerNorm {
    pub isa: Isa,
    pub input: Value,
    pub output: Value,
    /// Where factors and summands, one of each per channel, begin in the weights.
    pub factor: usize,
    pub summand: usize,
    pub eps: f32,
    pub activation: Activate,
    /// Where the result is bytes.
    pub made: Option<Made>,
}

/// Pixels side by side, so that additions need not wait for each other.
const SIDE: usize = 4;

impl Step for LayerNorm {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.height
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let height = self.output.geometry.height;
        let line = Line { step: self, cx, image: task / height, y: task % height };
        match &self.made {
            Some(made) => dot::dispatch(made.dots, line),
            None => dispatch(self.isa, line),
        }
    }
}

struct Line<'a> {
    step: &'a LayerNorm,
    cx: &'a Context<'a>,
    image: usize,
    y: usize,
}

impl Kernel for Line<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        self.each::<V, Plain>();
    }
}

impl DotKernel for Line<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        self.each::<D::Floats, Narrow<D>>();
    }
}

impl Line<'_> {
    #[inline(always)]
    fn each<V: Lanes, S: Sink<V>>(self) {
        let width = self.step.output.geometry.width;
        let mut x = 0;
        while x + SIDE <= width {
            // SAFETY: pixels of the row.
            unsafe { self.pixels::<V, S, SIDE>(x) };
            x += SIDE;
        }
        while x < width {
            // SAFETY: a pixel of the row.
            unsafe { self.pixels::<V, S, 1>(x) };
            x += 1;
        }
    }
}

impl Line<'_> {
    /// Mean, then the variance around it, then the result: one pass for both would cancel where the mean is large.
    ///
    /// # Safety
    /// `x + P` is at most the width of the row, and the values are those of this step.
    #[inline(always)]
    unsafe fn pixels<V: Lanes, S: Sink<V>, const P: usize>(&self, x: usize) {
        let s = self.step;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let from = self.cx.image(&s.input, self.image).wrapping_add(i.at(self.y, x));
        let to = self.cx.image_mut(&s.output, self.image).wrapping_add(o.at(self.y, x)).cast::<u8>();
        let blocks = i.blocks();
        let range = s.made.map_or(Range { scale: 1.0, zero: 0 }, |made| made.range);
        let (factor, summand) = (self.cx.weights(s.factor, blocks * LANES), self.cx.weights(s.summand, blocks * LANES));
        // Lanes beyond the last channel hold anything.
        let mut last = [1.0; LANES];
        last[LANES - (blocks * LANES - i.channels)..].fill(0.0);
        let last = V::from_array(last);
        let count = i.channels as f32;
        let (mut sums, mut squares) = ([V::splat(0.0); P], [V::splat(0.0); P]);
        // SAFETY: the caller's promise: `P` pixels of `blocks` blocks from these addresses.
        unsafe {
            for block in 0..blocks {
                for (p, sum) in sums.iter_mut().enumerate() {
                    let value = V::load(from.add(block * i.plane() + p * LANES));
                    *sum = sum.add(if block + 1 == blocks { value.mul(last) } else { value });
                }
            }
            let mut means = [V::splat(0.0); P];
            for (mean, sum) in means.iter_mut().zip(sums) {
                *mean = V::splat(total(sum.to_array()) / count);
            }
            for block in 0..blocks {
                for (p, square) in squares.iter_mut().enumerate() {
                    let mut value = V::load(from.add(block * i.plane() + p * LANES)).sub(means[p]);
                    if block + 1 == blocks {
                        value = value.mul(last);
                    }
                    *square = value.mul_add(value, *square);
                }
            }
            let mut scales = [V::splat(0.0); P];
            for (scale, square) in scales.iter_mut().zip(squares) {
                *scale = V::splat(1.0 / (total(square.to_array()) / count + s.eps).sqrt());
            }
            for block in 0..blocks {
                let to = to.add(s.made.map_or(4 * block * o.plane(), |made| made.at(o, block)));
                let (factor, summand) = (V::load(factor.add(block * LANES)), V::load(summand.add(block * LANES)));
                for p in 0..P {
                    let value = V::load(from.add(block * i.plane() + p * LANES)).sub(means[p]).mul(scales[p]);
                    let value = activate(s.activation, value.mul_add(factor, summand));
                    S::put(value, range, to.add(4 * p * LANES));
                }
            }
        }
    }
}

/// The sum of sixteen lanes, in pairs.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}
