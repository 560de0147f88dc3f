//! Max-pooling of any geometry; remembers where each maximum came from.

use crate::engine::cpu::common::geometry::{Span, max_span};
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out};
use crate::engine::cpu::train::memory::Slot;
use crate::model::Pair;

pub struct MaxPool {
    pub channels: usize,
    pub size: Pair,
    pub output: Pair,
    pub kernel: Pair,
    pub stride: Pair,
    pub padding: Pair,
    pub dilation: Pair,
    pub input: Edge,
    pub out: Out,
    /// Position of each maximum in its plane, as the bits of a `u32`; only kept for `backward`.
    pub origins: Option<Slot>,
}

impl MaxPool {
    /// Input positions of an output position along one axis.
    fn span(&self, axis: usize, o: usize) -> Span {
        max_span(o * self.stride[axis], self.kernel[axis], self.padding[axis], self.dilation[axis], self.size[axis])
    }

    fn plane(&self, x: &[f32], y: &mut [f32], mut origins: Option<&mut [f32]>) {
        let width = self.size[1];
        for oy in 0..self.output[0] {
            let ys = self.span(0, oy);
            for ox in 0..self.output[1] {
                let xs = self.span(1, ox);
                let (mut best, mut origin) = (f32::NEG_INFINITY, ys.start * width + xs.start);
                for iy in (ys.start..ys.end).step_by(ys.step) {
                    for ix in (xs.start..xs.end).step_by(xs.step) {
                        let value = x[iy * width + ix];
                        // PyTorch's rule: the first of equals wins, NaN beats everything.
                        if value > best || value.is_nan() {
                            (best, origin) = (value, iy * width + ix);
                        }
                    }
                }
                y[oy * self.output[1] + ox] = best;
                if let Some(origins) = &mut origins {
                    origins[oy * self.output[1] + ox] = f32::from_bits(origin as u32);
                }
            }
        }
    }
}

impl Layer for MaxPool {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        let (plane, pixels) = (self.size[0] * self.size[1], self.output[0] * self.output[1]);
        for sample in cx.samples.clone() {
            // SAFETY: input, output and origins are three slots, and the sample is this worker's.
            let (x, mut y, mut origins) = unsafe {
                let origins = self.origins.map(|slot| cx.one_mut(slot, sample));
                (cx.one(self.input.value, sample), cx.one_mut(self.out.value, sample), origins)
            };
            for c in 0..self.channels {
                let origins = origins.as_deref_mut().map(|o| &mut o[c * pixels..][..pixels]);
                self.plane(&x[c * plane..][..plane], &mut y[c * pixels..][..pixels], origins);
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input), Some(origins)) = (self.out.grad, self.input.grad, self.origins) else { return };
        let (plane, pixels) = (self.size[0] * self.size[1], self.output[0] * self.output[1]);
        for sample in cx.samples.clone() {
            // SAFETY: both derivatives and the origins are three slots, and the sample is this worker's.
            let (dy, mut dx, origins) =
                unsafe { (cx.one(grad, sample), cx.one_mut(input, sample), cx.one(origins, sample)) };
            if !self.input.add {
                dx.fill(0.0);
            }
            for c in 0..self.channels {
                let dx = &mut dx[c * plane..][..plane];
                for (d, origin) in dy[c * pixels..][..pixels].iter().zip(&origins[c * pixels..][..pixels]) {
                    dx[origin.to_bits() as usize] += d;
                }
            }
        }
    }
}
