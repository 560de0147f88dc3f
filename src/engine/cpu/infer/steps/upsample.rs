//! Every pixel so many times, below and beside itself.

use super::Step;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::infer::memory::{Context, Value};
use crate::model::Pair;

pub struct Upsample {
    pub input: Value,
    pub output: Value,
    pub scale: Pair,
}

impl Step for Upsample {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (image, block) = (task / o.blocks(), task % o.blocks());
        let from = cx.image(&self.input, image).wrapping_add(block * i.plane() + i.at(0, 0));
        let to = cx.image_mut(&self.output, image).wrapping_add(block * o.plane() + o.at(0, 0));
        let [down, right] = self.scale;
        for y in 0..i.height {
            let first = to.wrapping_add(y * down * o.row());
            // SAFETY: pixels of a block in both; the output is so many times as high and wide.
            unsafe {
                for x in 0..i.width * right {
                    let pixel = from.add(y * i.row() + x / right * LANES);
                    std::ptr::copy_nonoverlapping(pixel, first.add(x * LANES), LANES);
                }
                for below in 1..down {
                    std::ptr::copy_nonoverlapping(first, first.add(below * o.row()), o.width * LANES);
                }
            }
        }
    }
}
