//! Attention: all tokens of an image to each other.

use super::Step;
use super::attend::{Attend, Head, Side};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::dispatch;
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Attention {
    isa: Isa,
    /// Queries, keys and values, one pixel high, each with the first block of channels of the first head.
    inputs: [(Value, usize); 3],
    output: Value,
    heads: usize,
    scale: f32,
    attend: Attend,
}

impl Attention {
    /// The channels of a head are whole blocks.
    pub fn new(isa: Isa, inputs: [(Value, usize); 3], output: Value, heads: usize, scale: f32) -> Self {
        let g = &output.geometry;
        let attend = Attend::new(isa, g.width, g.blocks() / heads, Some(inputs[0].0.geometry.plane()));
        Self { isa, inputs, output, heads, scale, attend }
    }
}

impl Step for Attention {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.heads
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (image, head) = (task / self.heads, task % self.heads);
        let side = |(value, block): &(Value, usize)| {
            let g = &value.geometry;
            let first = (block + head * self.attend.blocks()) * g.plane() + g.at(0, 0);
            let start = cx.image_mut(value, image).wrapping_add(first);
            Side { start, plane: g.plane(), places: None, fill: std::ptr::null() }
        };
        let inputs = [0, 1, 2].map(|part| side(&self.inputs[part]));
        let head = Head {
            attend: &self.attend,
            inputs,
            output: side(&(self.output, 0)),
            own: cx.own,
            factor: self.scale * std::f32::consts::LOG2_E,
            bias: std::ptr::null(),
            mask: std::ptr::null(),
            cosine: false,
        };
        dispatch(self.isa, head);
    }

    fn own(&self) -> usize {
        self.attend.own()
    }
}
