//! Convolution of any geometry as im2col and a matrix product.

use std::ops::Range;

use crate::engine::cpu::common::geometry::Window;
use crate::engine::cpu::train::kernels::im2col::{col2im, im2col};
use crate::engine::cpu::train::kernels::matmul::{View, matmul};
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out, Param};
use crate::engine::cpu::train::memory::Slot;

pub struct Conv {
    pub window: Window,
    pub input: Edge,
    pub out: Out,
    pub weight: Param,
    pub bias: Option<Param>,
    /// Samples whose columns go into one product.
    pub block: usize,
    /// `depth x (block * pixels)`, twice in training: the windows and their derivative.
    pub columns: Slot,
    pub column_grads: Option<Slot>,
    /// `out_channels / groups x (block * pixels)`; needed with more than one sample per product.
    pub gathered: Option<Slot>,
}

/// Weights above this many floats do not stay in a core's own cache from sample to sample.
const CACHED_WEIGHTS: usize = 1 << 16;
/// Columns that make a product worth packing the weights for.
const COLUMNS: usize = 256;

impl Conv {
    /// One sample at a time where its columns suffice and the weights stay in the cache.
    pub fn grain(window: &Window, weights: usize) -> Grain {
        if window.pixels() >= COLUMNS && weights <= CACHED_WEIGHTS { Grain::Sample } else { Grain::Chunk }
    }

    pub fn block(window: &Window, weights: usize, samples: usize) -> usize {
        match Self::grain(window, weights) {
            Grain::Sample => 1,
            _ => (2 * COLUMNS).div_ceil(window.pixels().max(1)).clamp(1, samples.max(1)),
        }
    }

    /// Output channels per group, outputs per channel.
    fn sizes(&self) -> (usize, usize) {
        (self.window.out_channels / self.window.groups, self.window.pixels())
    }

    /// Floats of one group of a sample.
    fn image_len(&self) -> usize {
        self.window.group_channels() * self.window.input[0] * self.window.input[1]
    }

    /// Calls `work` with the columns of one group of some samples: the image itself where a 1 x 1 kernel makes no
    /// difference.
    fn with_columns(&self, cx: &Context<'_>, samples: Range<usize>, group: usize, work: impl FnOnce(View<'_>)) {
        let (plane, pixels) = (self.image_len(), self.window.pixels());
        // SAFETY: an input, which this layer does not write, of a sample that is this worker's.
        let image = |sample| unsafe { cx.one(self.input.value, sample) };
        if samples.len() == 1 && self.window.is_pointwise() {
            return work(View::new(&image(samples.start)[group * plane..][..plane], pixels));
        }
        // SAFETY: nobody else in this layer takes the columns.
        let (mut columns, ld) = (unsafe { cx.own(self.columns) }, samples.len() * pixels);
        for (i, sample) in samples.enumerate() {
            im2col(&self.window, &image(sample)[group * plane..][..plane], &mut columns[i * pixels..], ld);
        }
        work(View::new(&columns, ld));
    }

    fn blocks(&self, cx: &Context<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (end, block) = (cx.samples.end, self.block);
        cx.samples.clone().step_by(block).map(move |start| start..(start + block).min(end))
    }
}

impl Layer for Conv {
    fn grain(&self) -> Grain {
        Self::grain(&self.window, weights(self))
    }

    fn forward(&self, cx: &Context<'_>) {
        // SAFETY: nobody writes parameters before all layers are done.
        let (weights, bias) = unsafe { (cx.tensor(self.weight.tensor), self.bias.map(|b| cx.tensor(b.tensor))) };
        for samples in self.blocks(cx) {
            for group in 0..self.window.groups {
                self.with_columns(cx, samples.clone(), group, |columns| {
                    self.products(cx, samples.clone(), group, columns, &weights, bias.as_deref());
                });
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        let (outs, pixels) = self.sizes();
        for samples in self.blocks(cx) {
            let ld = samples.len() * pixels;
            for group in 0..self.window.groups {
                let own = group * outs * pixels..(group + 1) * outs * pixels;
                // SAFETY: the output's derivative, which this layer does not write, of a sample that is this worker's.
                let of = |sample| unsafe { cx.one(grad, sample) };
                let (mut gathered, alone);
                let grads: &[f32] = match self.gathered {
                    Some(slot) if samples.len() > 1 => {
                        // SAFETY: nobody else in this call takes what is gathered.
                        gathered = unsafe { cx.own(slot) };
                        for (i, sample) in samples.clone().enumerate() {
                            let dy = &of(sample)[own.clone()];
                            for (to, from) in gathered.chunks_exact_mut(ld).zip(dy.chunks_exact(pixels)) {
                                to[i * pixels..][..pixels].copy_from_slice(from);
                            }
                        }
                        &gathered
                    }
                    _ => {
                        alone = of(samples.start);
                        &alone[own]
                    }
                };
                self.shares(cx, samples.clone(), group, View::new(grads, ld));
            }
        }
    }
}

impl Conv {
    /// The outputs of one group of some samples.
    fn products(
        &self,
        cx: &Context<'_>,
        samples: Range<usize>,
        group: usize,
        columns: View<'_>,
        weights: &[f32],
        bias: Option<&[f32]>,
    ) {
        let ((outs, pixels), depth) = (self.sizes(), self.window.depth());
        let (own, ld) = (group * outs * pixels..(group + 1) * outs * pixels, samples.len() * pixels);
        let weights = View::new(&weights[group * outs * depth..], depth);
        let bias = |o: usize| bias.map_or(0.0, |b| b[group * outs + o]);
        let several = self.gathered.filter(|_| samples.len() > 1);
        // SAFETY: neither the input nor its columns; the sample is this worker's, and nobody else in this call takes
        // what is gathered.
        let out = |sample| unsafe { cx.one_mut(self.out.value, sample) };
        let mut memory = match several {
            // SAFETY: nobody else in this call takes what is gathered.
            Some(gathered) => unsafe { cx.own(gathered) },
            None => out(samples.start),
        };
        let result = if several.is_some() { &mut memory[..] } else { &mut memory[own.clone()] };
        result.chunks_exact_mut(ld).take(outs).enumerate().for_each(|(o, row)| row.fill(bias(o)));
        matmul([outs, ld, depth], result, ld, weights, columns, true);
        if several.is_some() {
            for (i, sample) in samples.enumerate() {
                let out = &mut out(sample)[own.clone()];
                for (to, from) in out.chunks_exact_mut(pixels).zip(result.chunks_exact(ld)) {
                    to.copy_from_slice(&from[i * pixels..][..pixels]);
                }
            }
        }
    }

    /// What the derivative of one group of some samples adds to the others.
    fn shares(&self, cx: &Context<'_>, samples: Range<usize>, group: usize, grads: View<'_>) {
        let ((outs, pixels), depth, plane) = (self.sizes(), self.window.depth(), self.image_len());
        let ld = samples.len() * pixels;
        if let Some(share) = self.bias.and_then(|b| b.grad) {
            // SAFETY: taken once at a time, and not what `grads` lies in.
            let mut share = unsafe { cx.own(share) };
            for (db, row) in share[group * outs..][..outs].iter_mut().zip(grads.data.chunks_exact(ld)) {
                *db += row.iter().sum::<f32>();
            }
        }
        if let Some(share) = self.weight.grad {
            // SAFETY: as for the bias, and not the columns.
            let mut share = unsafe { cx.own(share) };
            let share = &mut share[group * outs * depth..][..outs * depth];
            self.with_columns(cx, samples.clone(), group, |columns| {
                matmul([outs, depth, ld], share, depth, grads, columns.transposed(), true);
            });
        }
        if let (Some(input), Some(columns)) = (self.input.grad, self.column_grads) {
            // SAFETY: nobody writes parameters before all layers are done, nor else takes the columns' derivatives.
            let (weights, mut columns) = unsafe { (cx.tensor(self.weight.tensor), cx.own(columns)) };
            let weights = View::new(&weights[group * outs * depth..], depth);
            matmul([depth, ld, outs], &mut columns, ld, weights.transposed(), grads, false);
            for (i, sample) in samples.enumerate() {
                // SAFETY: not the output's derivative, and the sample is this worker's.
                let mut image = unsafe { cx.one_mut(input, sample) };
                let image = &mut image[group * plane..][..plane];
                if !self.input.add {
                    image.fill(0.0);
                }
                col2im(&self.window, &columns[i * pixels..], ld, image);
            }
        }
    }
}

fn weights(conv: &Conv) -> usize {
    conv.window.out_channels * conv.window.depth()
}
