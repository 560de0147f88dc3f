//! Averages over windows (`AvgPool2d`, `AdaptiveAvgPool2d`) and over whole dimensions (`mean`).

use std::ops::Range;

use crate::engine::cpu::common::geometry::Span;
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out};
use crate::model::Pair;

/// Average over rectangles.
pub struct WindowAverage {
    pub channels: usize,
    pub size: Pair,
    /// Input rows of each output row, input columns of each output column.
    pub spans: [Vec<Span>; 2],
    /// One divisor per output position.
    pub divisors: Vec<f32>,
    pub input: Edge,
    pub out: Out,
}

impl WindowAverage {
    /// Position of each output, and the input rows and columns that it sees.
    fn windows(&self) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
        let range = |span: &Span| span.start..span.end;
        let columns = move || self.spans[1].iter().map(range);
        let pairs = self.spans[0].iter().map(range).flat_map(move |ys| columns().map(move |xs| (ys.clone(), xs)));
        pairs.enumerate().map(|(o, (ys, xs))| (o, ys, xs))
    }
}

impl Layer for WindowAverage {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        let (plane, pixels) = (self.size[0] * self.size[1], self.divisors.len());
        for sample in cx.samples.clone() {
            // SAFETY: the input's slot is not the output's, and the sample is this worker's.
            let (x, mut y) = unsafe { (cx.one(self.input.value, sample), cx.one_mut(self.out.value, sample)) };
            for c in 0..self.channels {
                let x = &x[c * plane..][..plane];
                for (o, ys, xs) in self.windows() {
                    let sum: f32 = ys.clone().map(|y| x[y * self.size[1]..][xs.clone()].iter().sum::<f32>()).sum();
                    y[c * pixels + o] = sum / self.divisors[o];
                }
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input)) = (self.out.grad, self.input.grad) else { return };
        let (plane, pixels) = (self.size[0] * self.size[1], self.divisors.len());
        for sample in cx.samples.clone() {
            // SAFETY: the derivatives are slots of their own, and the sample is this worker's.
            let (dy, mut dx) = unsafe { (cx.one(grad, sample), cx.one_mut(input, sample)) };
            if !self.input.add {
                dx.fill(0.0);
            }
            for c in 0..self.channels {
                let dx = &mut dx[c * plane..][..plane];
                for (o, ys, xs) in self.windows() {
                    let d = dy[c * pixels + o] / self.divisors[o];
                    for y in ys.clone() {
                        dx[y * self.size[1]..][xs.clone()].iter_mut().for_each(|t| *t += d);
                    }
                }
            }
        }
    }
}

/// Average over some dimensions of a sample.
pub struct Mean {
    /// Output element of each input element.
    pub target: Vec<usize>,
    /// Input elements per output element.
    pub count: usize,
    pub input: Edge,
    pub out: Out,
}

impl Layer for Mean {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        for sample in cx.samples.clone() {
            // SAFETY: the input's slot is not the output's, and the sample is this worker's.
            let (x, mut y) = unsafe { (cx.one(self.input.value, sample), cx.one_mut(self.out.value, sample)) };
            y.fill(0.0);
            self.target.iter().zip(x.iter()).for_each(|(&o, x)| y[o] += x);
            y.iter_mut().for_each(|y| *y /= self.count as f32);
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input)) = (self.out.grad, self.input.grad) else { return };
        for sample in cx.samples.clone() {
            // SAFETY: the derivatives are slots of their own, and the sample is this worker's.
            let (dy, mut dx) = unsafe { (cx.one(grad, sample), cx.one_mut(input, sample)) };
            for (d, &o) in dx.iter_mut().zip(&self.target) {
                let share = dy[o] / self.count as f32;
                *d = if self.input.add { *d + share } else { share };
            }
        }
    }
}
