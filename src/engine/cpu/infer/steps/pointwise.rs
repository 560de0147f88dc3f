//! Functions of single pixels: sums and products of two values, batch norm on its own, activations.

use super::Step;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, activate};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    Add,
    Mul,
}

pub struct Pointwise {
    pub isa: Isa,
    pub input: Value,
    /// A value with one pixel stands for an image of that pixel.
    pub second: Option<(Binary, Value)>,
    /// Where factors and summands, one of each per channel, begin in the weights.
    pub affine: Option<[usize; 2]>,
    pub output: Value,
    pub activation: Activate,
}

impl Step for Pointwise {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.output.geometry.blocks();
        dispatch(self.isa, Plane { step: self, cx, image: task / blocks, block: task % blocks });
    }
}

struct Plane<'a> {
    step: &'a Pointwise,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
}

/// Where a block of a value begins, and the distances between its rows and its pixels: none for a single pixel.
#[inline(always)]
fn walk(cx: &Context<'_>, value: &Value, image: usize, block: usize) -> (*const f32, usize, usize) {
    let g = &value.geometry;
    let start = cx.image(value, image).wrapping_add(block * g.plane() + g.at(0, 0));
    if g.height * g.width == 1 { (start, 0, 0) } else { (start, g.row(), LANES) }
}

impl Kernel for Plane<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Plane { step: s, cx, image, block } = self;
        let o = &s.output.geometry;
        let to = cx.image_mut(&s.output, image).wrapping_add(block * o.plane() + o.at(0, 0));
        let (a, a_row, a_pixel) = walk(cx, &s.input, image, block);
        let second = s.second.as_ref().map(|(op, value)| (*op, walk(cx, value, image, block)));
        let (factor, summand) = match s.affine {
            // SAFETY: `at` checks that the weights hold a block.
            Some([f, t]) => unsafe {
                let load = [cx.weights(f + block * LANES, LANES), cx.weights(t + block * LANES, LANES)];
                (V::load(load[0]), V::load(load[1]))
            },
            None => (V::splat(1.0), V::splat(0.0)),
        };
        for y in 0..o.height {
            for x in 0..o.width {
                // SAFETY: all values have the size of the output, or one pixel that is read again and again.
                unsafe {
                    let mut value = V::load(a.add(y * a_row + x * a_pixel));
                    if let Some((op, (b, b_row, b_pixel))) = second {
                        let other = V::load(b.add(y * b_row + x * b_pixel));
                        value = match op {
                            Binary::Add => value.add(other),
                            Binary::Mul => value.mul(other),
                        };
                    }
                    if s.affine.is_some() {
                        value = value.mul_add(factor, summand);
                    }
                    activate(s.activation, value).store(to.add(y * o.row() + x * LANES));
                }
            }
        }
    }
}
