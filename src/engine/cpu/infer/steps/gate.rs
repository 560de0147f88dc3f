//! A part of the channels times an activation of another part: gated linear units.

use super::Step;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, activate};
use crate::engine::cpu::common::kernels::lanes::{Kernel, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Gate {
    pub isa: Isa,
    pub input: Value,
    /// The blocks of the input with which the part behind the activation begins, and the other.
    pub parts: [usize; 2],
    pub output: Value,
    pub activation: Activate,
}

impl Step for Gate {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.output.geometry.blocks();
        dispatch(self.isa, Plane { step: self, cx, image: task / blocks, block: task % blocks });
    }
}

/// One block of an image.
struct Plane<'a> {
    step: &'a Gate,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
}

impl Kernel for Plane<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Plane { step: s, cx, image, block } = self;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let [gate, factor] = s.parts.map(|part| cx.image(&s.input, image).wrapping_add((part + block) * i.plane()));
        let to = cx.image_mut(&s.output, image).wrapping_add(block * o.plane());
        for y in 0..o.height {
            for x in 0..o.width {
                // SAFETY: the parts are whole blocks of the input, which has the size of the output.
                unsafe {
                    let value = activate(s.activation, V::load(gate.add(i.at(y, x))));
                    value.mul(V::load(factor.add(i.at(y, x)))).store(to.add(o.at(y, x)));
                }
            }
        }
    }
}
