//! Attention: tokens of an image, or a few queries that are the same for every image, to all tokens of an image.

use super::attend::{AsBytes, Attend, Head, Side};
use super::bytes::Made;
use super::{Step, Turn};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Attention {
    /// Queries, keys and values, one pixel high, each with the first block of channels of the first head.
    inputs: [(Value, usize); 3],
    /// The queries of every image, `[blocks][queries][16]` in the weights, instead of the first input.
    constant: Option<usize>,
    turn: Option<Turn>,
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
        let [queries, keys, _] = inputs.each_ref().map(|(value, _)| &value.geometry);
        let attend = Attend::new(isa, [output.geometry.width, keys.width], blocks / heads, Some(queries.plane()));
        Self { inputs, constant: None, turn: None, output, made: None, heads, scale, attend }
    }

    /// Queries in the weights instead of those of a value, and a turn of queries and keys.
    pub fn with(self, isa: Isa, constant: Option<usize>, turn: Option<Turn>) -> Self {
        let (queries, keys) = (self.output.geometry.width, self.inputs[1].0.geometry.width);
        let plane = match (constant, turn) {
            (None, None) => return self,
            (Some(_), None) => Some(queries * LANES),
            (_, Some(_)) => None,
        };
        let attend = Attend::new(isa, [queries, keys], self.attend.blocks(), plane);
        Self { constant, turn, attend, ..self }
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
        let mut inputs = self.inputs.each_ref().map(|(value, block)| side(value, block + first));
        if let Some(table) = self.constant {
            let plane = self.output.geometry.width * LANES;
            let start = cx.weights(table + first * plane, self.attend.blocks() * plane).cast_mut();
            inputs[0] = Side { start, plane, places: None, fill: std::ptr::null() };
        }
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
            turn: self.turn.map(|turn| (turn, cx.weights(turn.table, turn.len))),
        };
        head.compute();
    }

    fn own(&self) -> usize {
        self.attend.own()
    }
}
