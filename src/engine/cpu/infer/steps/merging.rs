//! Each 2 x 2 pixels as one, their channels one after the other.

use super::Step;
use crate::engine::cpu::infer::memory::{Context, Value};

/// Of whole blocks of channels.
pub struct PatchMerging {
    pub input: Value,
    pub output: Value,
}

impl Step for PatchMerging {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.height
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (image, y) = (task / o.height, task % o.height);
        let (from, to) = (cx.image(&self.input, image), cx.image_mut(&self.output, image));
        for block in 0..o.blocks() {
            let (part, within) = (block / i.blocks(), block % i.blocks());
            let (top, left) = (2 * y + part % 2, part / 2);
            let to = to.wrapping_add(block * o.plane() + o.at(y, 0));
            let from = from.wrapping_add(within * i.plane());
            for x in 0..o.width {
                let to = to.wrapping_add(x * o.pixel);
                let at = 2 * x + left;
                // SAFETY: a pixel of the output; where there is one of the input, it lies inside it.
                unsafe {
                    if top < i.height && at < i.width {
                        std::ptr::copy_nonoverlapping(from.wrapping_add(i.at(top, at)), to, o.pixel);
                    } else {
                        to.write_bytes(0, o.pixel);
                    }
                }
            }
        }
    }
}
