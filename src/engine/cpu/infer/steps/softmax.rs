//! Softmax over the channels.

use super::Step;
use super::layout::clear_spare;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Softmax {
    pub input: Value,
    pub output: Value,
    pub log: bool,
}

impl Step for Softmax {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images
    }

    fn run(&self, _phase: usize, image: usize, cx: &Context<'_>) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (from, to) = (cx.image(&self.input, image), cx.image_mut(&self.output, image));
        // SAFETY: an image of the value.
        unsafe { clear_spare(o, to, 0..o.height) };
        for y in 0..o.height {
            for x in 0..o.width {
                let at = |c: usize| from.wrapping_add(c / LANES * i.plane() + i.at(y, x) + c % LANES);
                // SAFETY: channel and pixel are inside the values.
                let read = |c: usize| unsafe { *at(c) };
                let largest = (0..o.channels).map(read).fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = (0..o.channels).map(|c| (read(c) - largest).exp()).sum();
                for c in 0..o.channels {
                    let value = match self.log {
                        true => read(c) - largest - total.ln(),
                        false => (read(c) - largest).exp() / total,
                    };
                    // SAFETY: channel and pixel are inside the output, and this task alone has the image.
                    unsafe { *to.wrapping_add(c / LANES * o.plane() + o.at(y, x) + c % LANES) = value };
                }
            }
        }
    }
}
