//! Attention: all tokens of an image to each other.

use super::Step;
use super::attend::{AsBytes, Attend, Head, Side};
use super::bytes::Made;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Attention {
    /// Queries, keys and values, one pixel high, each with the first block of channels of the first head.
    inputs: [(Value, usize); 3],
    output: Value,
    /// Where that is bytes.
    made: Option<Made>,
    heads: usize,
    scale: f32,
    attend: Attend,
}

impl Attention {
    /// The channels of a head are whole blocks; so many `blocks` have all heads.
    pub fn new(isa: Isa, inputs: [(Value, usize); 3], output: Value, blocks: usize, heads: usize, scale: f32) -> Self {
        let plane = inputs[0].0.geometry.plane();
        let attend = Attend::new(isa, output.geometry.width, blocks / heads, Some(plane));
        Self { inputs, output, made: None, heads, scale, attend }
    }

    pub fn making(self, made: Option<Made>) -> Self {
        Self { made, ..self }
    }
}

impl Step for Attention {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.heads
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (image, head) = (task / self.heads, task % self.heads);
        let first = head * self.attend.blocks();
        let side = |value: &Value, block: usize| {
            let g = &value.geometry;
            let start = cx.image_mut(value, image).wrapping_add(block * g.plane() + g.at(0, 0));
            Side { start, plane: g.plane(), places: None, fill: std::ptr::null() }
        };
        let inputs = self.inputs.each_ref().map(|(value, block)| side(value, block + first));
        let geometry = &self.output.geometry;
        let bytes = self.made.map(|made| AsBytes { made, geometry, first });
        let head = Head {
            attend: &self.attend,
            inputs,
            output: side(&self.output, if bytes.is_some() { 0 } else { first }),
            bytes,
            own: cx.own,
            factor: self.scale * std::f32::consts::LOG2_E,
            bias: std::ptr::null(),
            mask: std::ptr::null(),
            cosine: false,
        };
        head.compute();
    }

    fn own(&self) -> usize {
        self.attend.own()
    }
}
