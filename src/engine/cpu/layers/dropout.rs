//! Dropout of elements and of whole channels.

use crate::engine::cpu::layer::{Context, Edge, Grain, Layer, Out};
use crate::engine::cpu::memory::Slot;
use crate::engine::cpu::random::{dropout_mask, key};

pub struct Dropout {
    pub p: f64,
    /// Values that share one draw: a plane for `Dropout2d`, 1 otherwise.
    pub run: usize,
    /// Number of this layer among those that draw.
    pub stream: u64,
    pub mask: Slot,
    pub input: Edge,
    pub out: Out,
    /// The output is the input's memory.
    pub inplace: bool,
}

impl Dropout {
    /// `to = from * mask`, or `to += from * mask`.
    fn scale(&self, from: Option<&[f32]>, to: &mut [f32], mask: &[f32], add: bool) {
        for (i, (to, &m)) in to.chunks_exact_mut(self.run).zip(mask).enumerate() {
            match from.map(|f| &f[i * self.run..][..self.run]) {
                None => to.iter_mut().for_each(|t| *t *= m),
                Some(from) if add => to.iter_mut().zip(from).for_each(|(t, f)| *t += f * m),
                Some(from) => to.iter_mut().zip(from).for_each(|(t, f)| *t = f * m),
            }
        }
    }
}

impl Layer for Dropout {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        for sample in cx.samples.clone() {
            let mask = cx.one_mut(self.mask, sample);
            dropout_mask(mask, self.p, key(cx.seed, cx.step, self.stream, sample as u64));
            let from = (!self.inplace).then(|| cx.one(self.input.value, sample));
            self.scale(from, cx.one_mut(self.out.value, sample), mask, false);
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input)) = (self.out.grad, self.input.grad) else { return };
        for sample in cx.samples.clone() {
            let from = (!self.inplace).then(|| cx.one(grad, sample));
            self.scale(from, cx.one_mut(input, sample), cx.one(self.mask, sample), self.input.add);
        }
    }
}
