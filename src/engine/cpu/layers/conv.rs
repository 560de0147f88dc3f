//! Convolution of any geometry as im2col and a matrix product.

use crate::engine::cpu::kernels::im2col::{Window, col2im, im2col};
use crate::engine::cpu::kernels::matmul::{View, matmul};
use crate::engine::cpu::layer::{Context, Edge, Grain, Layer, Out, Param};
use crate::engine::cpu::memory::Slot;

pub struct Conv {
    /// Geometry of one group.
    pub window: Window,
    pub groups: usize,
    pub out_channels: usize,
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

    /// Channels per group, out channels per group, pixels.
    fn sizes(&self) -> (usize, usize, usize) {
        (self.window.channels, self.out_channels / self.groups, self.window.pixels())
    }

    fn image_len(&self) -> usize {
        self.window.channels * self.window.input[0] * self.window.input[1]
    }

    /// The columns of one group of some samples: the image itself where a 1 x 1 kernel makes no difference.
    fn columns<'a>(&self, cx: &Context<'a>, samples: std::ops::Range<usize>, group: usize) -> View<'a> {
        let (plane, pixels) = (self.image_len(), self.window.pixels());
        let image = |sample| &cx.one(self.input.value, sample)[group * plane..][..plane];
        if samples.len() == 1 && self.window.is_pointwise() {
            return View::new(image(samples.start), pixels);
        }
        let (columns, ld) = (cx.own(self.columns), samples.len() * pixels);
        for (i, sample) in samples.enumerate() {
            im2col(&self.window, image(sample), &mut columns[i * pixels..], ld);
        }
        View::new(columns, ld)
    }

    fn blocks(&self, cx: &Context<'_>) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let (end, block) = (cx.samples.end, self.block);
        cx.samples.clone().step_by(block).map(move |start| start..(start + block).min(end))
    }
}

impl Layer for Conv {
    fn grain(&self) -> Grain {
        Self::grain(&self.window, weights(self))
    }

    fn forward(&self, cx: &Context<'_>) {
        let (_, outs, pixels) = self.sizes();
        let depth = self.window.depth();
        for samples in self.blocks(cx) {
            let ld = samples.len() * pixels;
            for group in 0..self.groups {
                let columns = self.columns(cx, samples.clone(), group);
                let weights = View::new(&cx.tensor(self.weight.tensor)[group * outs * depth..], depth);
                let bias = |o: usize| self.bias.map_or(0.0, |b| cx.tensor(b.tensor)[group * outs + o]);
                let result = match self.gathered {
                    Some(gathered) if samples.len() > 1 => cx.own(gathered),
                    _ => &mut cx.one_mut(self.out.value, samples.start)[group * outs * pixels..][..outs * pixels],
                };
                result.chunks_exact_mut(ld).take(outs).enumerate().for_each(|(o, row)| row.fill(bias(o)));
                matmul([outs, ld, depth], result, ld, weights, columns, true);
                if samples.len() > 1 {
                    for (i, sample) in samples.clone().enumerate() {
                        let out = &mut cx.one_mut(self.out.value, sample)[group * outs * pixels..][..outs * pixels];
                        for (to, from) in out.chunks_exact_mut(pixels).zip(result.chunks_exact(ld)) {
                            to.copy_from_slice(&from[i * pixels..][..pixels]);
                        }
                    }
                }
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        let (_, outs, pixels) = self.sizes();
        let (depth, plane) = (self.window.depth(), self.image_len());
        for samples in self.blocks(cx) {
            let ld = samples.len() * pixels;
            for group in 0..self.groups {
                let of = |sample| &cx.one(grad, sample)[group * outs * pixels..][..outs * pixels];
                let grads: &[f32] = match self.gathered {
                    Some(gathered) if samples.len() > 1 => {
                        let gathered = cx.own(gathered);
                        for (i, sample) in samples.clone().enumerate() {
                            for (to, from) in gathered.chunks_exact_mut(ld).zip(of(sample).chunks_exact(pixels)) {
                                to[i * pixels..][..pixels].copy_from_slice(from);
                            }
                        }
                        gathered
                    }
                    _ => of(samples.start),
                };
                let grads = View::new(grads, ld);
                if let Some(share) = self.bias.and_then(|b| b.grad) {
                    let share = &mut cx.own(share)[group * outs..][..outs];
                    for (db, row) in share.iter_mut().zip(grads.data.chunks_exact(ld)) {
                        *db += row.iter().sum::<f32>();
                    }
                }
                if let Some(share) = self.weight.grad {
                    let columns = self.columns(cx, samples.clone(), group);
                    let share = &mut cx.own(share)[group * outs * depth..][..outs * depth];
                    matmul([outs, depth, ld], share, depth, grads, columns.transposed(), true);
                }
                if let (Some(input), Some(columns)) = (self.input.grad, self.column_grads) {
                    let weights = View::new(&cx.tensor(self.weight.tensor)[group * outs * depth..], depth);
                    let columns = cx.own(columns);
                    matmul([depth, ld, outs], columns, ld, weights.transposed(), grads, false);
                    for (i, sample) in samples.clone().enumerate() {
                        let image = &mut cx.one_mut(input, sample)[group * plane..][..plane];
                        if !self.input.add {
                            image.fill(0.0);
                        }
                        col2im(&self.window, &columns[i * pixels..], ld, image);
                    }
                }
            }
        }
    }
}

fn weights(conv: &Conv) -> usize {
    conv.out_channels * conv.window.depth()
}
