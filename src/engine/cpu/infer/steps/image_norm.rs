//! Norms for which all pixels of an image count: of all its channels together (`GroupNorm` of one group), or each channel's
//! beside the others' (ConvNeXt V2's response norm).
//!
//! First each channel is measured, then every block looks at all channels and computes its own.

use super::Step;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, activate};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// `(x - mean) / sqrt(variance + eps) * factor + summand`
    Group,
    /// `x * (1 + factor * norm / (mean of the norms + eps)) + summand`
    Response,
}

pub struct ImageNorm {
    pub isa: Isa,
    pub over: Over,
    pub input: Value,
    pub output: Value,
    /// Where factors and summands, one of each per channel, begin in the weights.
    pub factor: usize,
    pub summand: usize,
    pub eps: f32,
    pub activation: Activate,
}

/// Numbers that measure a channel: its mean and the sum of squares around it, or zero and the sum of squares.
const MEASURES: usize = 2;

impl Step for ImageNorm {
    fn phases(&self) -> usize {
        2
    }

    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn shared(&self, images: usize) -> usize {
        images * self.output.geometry.blocks() * MEASURES * LANES
    }

    fn run(&self, phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.output.geometry.blocks();
        dispatch(self.isa, Block { step: self, cx, image: task / blocks, block: task % blocks, phase });
    }
}

struct Block<'a> {
    step: &'a ImageNorm,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
    phase: usize,
}

impl Kernel for Block<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        if self.phase == 0 { self.measure::<V>() } else { self.compute::<V>() }
    }
}

impl Block<'_> {
    /// Where the measures of a block of this image begin.
    fn measures(&self, block: usize) -> *mut f32 {
        let blocks = self.step.output.geometry.blocks();
        self.cx.shared.wrapping_add((self.image * blocks + block) * MEASURES * LANES)
    }

    /// The mean before the squares around it: both at once would cancel where the mean is large.
    #[inline(always)]
    fn measure<V: Lanes>(&self) {
        let g = &self.step.input.geometry;
        let mut mean = V::splat(0.0);
        if self.step.over == Over::Group {
            mean = self.sum::<V>(|x| x).mul(V::splat(1.0 / (g.height * g.width) as f32));
        }
        let squares = self.sum::<V>(|x| {
            let distance = x.sub(mean);
            distance.mul(distance)
        });
        let to = self.measures(self.block);
        // SAFETY: `shared` has room for the measures of every block of every image.
        unsafe {
            mean.store(to);
            squares.store(to.add(LANES));
        }
    }

    /// Row by row, so that sums of many pixels lose no more digits than those of few.
    #[inline(always)]
    fn sum<V: Lanes>(&self, of: impl Fn(V) -> V) -> V {
        let g = &self.step.input.geometry;
        let from = self.cx.image(&self.step.input, self.image).wrapping_add(self.block * g.plane() + g.at(0, 0));
        let mut sum = V::splat(0.0);
        for y in 0..g.height {
            let mut row = V::splat(0.0);
            for x in 0..g.width {
                // SAFETY: a pixel of the block.
                row = row.add(of(unsafe { V::load(from.add(y * g.row() + x * LANES)) }));
            }
            sum = sum.add(row);
        }
        sum
    }

    #[inline(always)]
    fn compute<V: Lanes>(&self) {
        let s = self.step;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let pixels = i.height * i.width;
        let measured = (0..i.channels).map(|c| {
            let at = self.measures(c / LANES).wrapping_add(c % LANES);
            // SAFETY: the first phase has written all of them.
            unsafe { (f64::from(*at), f64::from(*at.add(LANES))) }
        });
        // SAFETY: both have a block of channels there.
        let (factor, summand) = unsafe {
            let at = |first: usize| V::load(self.cx.weights(first + self.block * LANES, LANES));
            (at(s.factor), at(s.summand))
        };
        let (factor, summand) = match s.over {
            Over::Group => {
                let mean = measured.clone().map(|(mean, _)| mean).sum::<f64>() / i.channels as f64;
                let squares: f64 = measured.map(|(m, squares)| squares + pixels as f64 * (m - mean).powi(2)).sum();
                let variance = squares / (pixels * i.channels) as f64;
                let factor = factor.mul(V::splat((1.0 / (variance + f64::from(s.eps)).sqrt()) as f32));
                // The mean is taken away first: it may be large beside what is left.
                (factor, (V::splat(mean as f32), summand))
            }
            Over::Response => {
                let mean = measured.map(|(_, squares)| squares.sqrt()).sum::<f64>() / i.channels as f64;
                let mut norms = [0.0; LANES];
                for (lane, norm) in norms.iter_mut().enumerate().take(i.channels - self.block * LANES) {
                    // SAFETY: the first phase has written it.
                    *norm = unsafe { *self.measures(self.block).add(LANES + lane) }.sqrt();
                }
                let response = V::from_array(norms).mul(V::splat((1.0 / (mean + f64::from(s.eps))) as f32));
                (response.mul_add(factor, V::splat(1.0)), (V::splat(0.0), summand))
            }
        };
        let from = self.cx.image(&s.input, self.image).wrapping_add(self.block * i.plane() + i.at(0, 0));
        let to = self.cx.image_mut(&s.output, self.image).wrapping_add(self.block * o.plane() + o.at(0, 0));
        for y in 0..o.height {
            for x in 0..o.width {
                // SAFETY: a pixel of the block, in both.
                unsafe {
                    let value = V::load(from.add(y * i.row() + x * LANES)).sub(summand.0).mul_add(factor, summand.1);
                    activate(s.activation, value).store(to.add(y * o.row() + x * LANES));
                }
            }
        }
    }
}
