//! Dropout of elements and of whole channels.

use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out};
use crate::engine::cpu::train::memory::Slot;
use crate::engine::cpu::train::random::{dropout_mask, key};

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
            // SAFETY: mask, input and output are three slots, in place the last two are one and only the output is
            // taken; the sample is this worker's.
            let (mut mask, mut to, from) = unsafe {
                let from = (!self.inplace).then(|| cx.one(self.input.value, sample));
                (cx.one_mut(self.mask, sample), cx.one_mut(self.out.value, sample), from)
            };
            dropout_mask(&mut mask, self.p, key(cx.seed, cx.step, self.stream, sample as u64));
            self.scale(from.as_deref(), &mut to, &mask, false);
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input)) = (self.out.grad, self.input.grad) else { return };
        for sample in cx.samples.clone() {
            // SAFETY: as in `forward`, with the derivatives' slots for the values'.
            let (mask, mut to, from) = unsafe {
                let from = (!self.inplace).then(|| cx.one(grad, sample));
                (cx.one(self.mask, sample), cx.one_mut(input, sample), from)
            };
            self.scale(from.as_deref(), &mut to, &mask, self.input.add);
        }
    }
}
