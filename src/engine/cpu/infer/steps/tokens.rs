//! Sequences of tokens put together: values and constants one after the other, plus a constant.

use super::Step;
use super::layout::clear_spare;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};

/// Where tokens come from.
#[derive(Debug, Clone, Copy)]
pub enum Origin {
    /// The pixels of a value, row by row, from this one on.
    Value(Value, usize),
    /// A table `[blocks][tokens][16]` in the weights.
    Table(usize),
}

/// Tokens that lie side by side in the result.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub origin: Origin,
    pub count: usize,
    /// The first one's place in the result.
    pub at: usize,
}

pub struct Tokens {
    pub isa: Isa,
    pub parts: Vec<Part>,
    /// A table of the size of the result.
    pub summand: Option<usize>,
    /// One pixel high.
    pub output: Value,
}

impl Step for Tokens {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let g = &self.output.geometry;
        let (image, block) = (task / g.blocks(), task % g.blocks());
        for &part in &self.parts {
            dispatch(self.isa, Block { step: self, cx, image, block, part });
        }
        if block + 1 == g.blocks() {
            // SAFETY: an image of the value.
            unsafe { clear_spare(g, cx.image_mut(&self.output, image), 0..1) };
        }
    }
}

/// One block of channels of a part.
struct Block<'a> {
    step: &'a Tokens,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
    part: Part,
}

impl Kernel for Block<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Part { origin, count, at } = self.part;
        match origin {
            Origin::Table(table) => {
                let from = self.cx.weights(table + self.block * count * LANES, count * LANES);
                // SAFETY: a block of the table.
                unsafe { self.line::<V>(from, at, count) };
            }
            Origin::Value(value, first) => {
                let g = &value.geometry;
                let plane = self.cx.image(&value, self.image).wrapping_add(self.block * g.plane());
                let mut done = 0;
                while done < count {
                    let (y, x) = ((first + done) / g.width, (first + done) % g.width);
                    let length = (g.width - x).min(count - done);
                    // SAFETY: pixels of a row.
                    unsafe { self.line::<V>(plane.wrapping_add(g.at(y, x)), at + done, length) };
                    done += length;
                }
            }
        }
    }
}

impl Block<'_> {
    /// Tokens side by side on both sides.
    ///
    /// # Safety
    /// `length` pixels of sixteen lanes at `from`, and `at + length` at most the tokens of the result.
    #[inline(always)]
    unsafe fn line<V: Lanes>(&self, from: *const f32, at: usize, length: usize) {
        let o = &self.step.output.geometry;
        let to = self.cx.image_mut(&self.step.output, self.image).wrapping_add(self.block * o.plane() + o.at(0, at));
        let summand =
            self.step.summand.map(|table| self.cx.weights(table + (self.block * o.width + at) * LANES, length * LANES));
        for x in (0..length).map(|x| x * LANES) {
            // SAFETY: the caller's promise; `weights` checks the table.
            unsafe {
                let value = V::load(from.add(x));
                let value = summand.map_or(value, |summand| value.add(V::load(summand.add(x))));
                value.store(to.add(x));
            }
        }
    }
}
