//! Convolutions with one filter per channel.

use super::Step;
use crate::engine::cpu::infer::kernels::activate::{Activate, activate};
use crate::engine::cpu::infer::kernels::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};
use crate::model::Pair;

pub struct Depthwise {
    pub isa: Isa,
    pub input: Value,
    pub output: Value,
    pub residual: Option<Value>,
    /// `[block][tap][16]`
    pub weights: usize,
    pub bias: usize,
    pub stride: Pair,
    pub padding: Pair,
    /// Where each tap of the window lies from the first.
    pub taps: Vec<usize>,
    pub activation: Activate,
}

/// Outputs side by side in registers: enough to hide the latency of the additions.
const SIDE: usize = 7;

impl Step for Depthwise {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.output.geometry.blocks();
        dispatch(self.isa, Plane { step: self, cx, image: task / blocks, block: task % blocks });
    }
}

struct Plane<'a> {
    step: &'a Depthwise,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
}

impl Kernel for Plane<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let s = self.step;
        let o = &s.output.geometry;
        for y in 0..o.height {
            let mut x = 0;
            while x + SIDE <= o.width {
                // SAFETY: the input's border covers every window.
                unsafe { self.pixels::<V, SIDE>(y, x) };
                x += SIDE;
            }
            while x < o.width {
                // SAFETY: as above.
                unsafe { self.pixels::<V, 1>(y, x) };
                x += 1;
            }
        }
    }
}

impl Plane<'_> {
    #[inline(always)]
    unsafe fn pixels<V: Lanes, const R: usize>(&self, y: usize, x: usize) {
        let s = self.step;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let corner = (i.before[0] + y * s.stride[0] - s.padding[0]) * i.row()
            + (i.before[1] + x * s.stride[1] - s.padding[1]) * LANES;
        let from = self.cx.image(&s.input, self.image).wrapping_add(self.block * i.plane() + corner);
        let weights = self.cx.weights.at(s.weights + self.block * s.taps.len() * LANES, s.taps.len() * LANES);
        let bias = self.cx.weights.at(s.bias + self.block * LANES, LANES);
        let to = self.cx.image(&s.output, self.image).wrapping_add(self.block * o.plane() + o.at(y, x));
        let step = s.stride[1] * LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [V::load(bias); R];
            for (t, &tap) in s.taps.iter().enumerate() {
                let w = V::load(weights.add(t * LANES));
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(from.add(tap + r * step)).mul_add(w, *sum);
                }
            }
            for (r, mut sum) in sums.into_iter().enumerate() {
                if let Some(value) = &s.residual {
                    let g = &value.geometry;
                    let at = self.block * g.plane() + g.at(y, x + r);
                    sum = sum.add(V::load(self.cx.image(value, self.image).add(at)));
                }
                activate(s.activation, sum).store(to.add(r * LANES));
            }
        }
    }
}
