//! Softmax and log-softmax along one dimension.

use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out};

pub struct Softmax {
    pub log: bool,
    /// A sample is `(outer, classes, inner)`.
    pub outer: usize,
    pub classes: usize,
    pub inner: usize,
    pub input: Edge,
    pub out: Out,
}

impl Softmax {
    /// Index of each class, for every vector of a sample.
    fn vectors(&self) -> impl Iterator<Item = usize> {
        let (classes, inner) = (self.classes, self.inner);
        (0..self.outer).flat_map(move |o| (0..inner).map(move |i| o * classes * inner + i))
    }
}

impl Layer for Softmax {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        for sample in cx.samples.clone() {
            // SAFETY: the input's slot is not the output's, and the sample is this worker's.
            let (x, mut y) = unsafe { (cx.one(self.input.value, sample), cx.one_mut(self.out.value, sample)) };
            for start in self.vectors() {
                let at = |c: usize| start + c * self.inner;
                let top = (0..self.classes).map(|c| x[at(c)]).fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = (0..self.classes).map(|c| (x[at(c)] - top).exp()).sum();
                let log_sum = sum.ln();
                for c in 0..self.classes {
                    y[at(c)] = if self.log { x[at(c)] - top - log_sum } else { (x[at(c)] - top).exp() / sum };
                }
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input)) = (self.out.grad, self.input.grad) else { return };
        for sample in cx.samples.clone() {
            // SAFETY: the derivatives are slots of their own, and the sample is this worker's.
            let (dy, y, mut dx) =
                unsafe { (cx.one(grad, sample), cx.one(self.out.value, sample), cx.one_mut(input, sample)) };
            for start in self.vectors() {
                let at = |c: usize| start + c * self.inner;
                let sum: f32 = (0..self.classes).map(|c| if self.log { dy[at(c)] } else { dy[at(c)] * y[at(c)] }).sum();
                for c in 0..self.classes {
                    let i = at(c);
                    let d = if self.log { dy[i] - y[i].exp() * sum } else { y[i] * (dy[i] - sum) };
                    dx[i] = if self.input.add { dx[i] + d } else { d };
                }
            }
        }
    }
}
