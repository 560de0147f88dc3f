//! Convolutions in groups that are no whole blocks of channels. Those of 2, 4 or 8 channels (ResNeXt, RegNetY) have a kernel
//! of their own, [`Small`]; of others (RegNet's of 24) every block of output channels sees the few blocks of input channels
//! that its groups are in, [`Grouped`].

use std::ops::Range;

use super::Step;
use super::conv::{Direct, Panel, Taps};
use crate::engine::cpu::common::geometry::Window;
use crate::engine::cpu::common::kernels::groups::{Row, orders, row};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Geometry};
use crate::model::Pair;

pub struct Grouped {
    pub direct: Direct,
    pub weights: usize,
    pub blocks: Vec<Block>,
}

/// What a block of output channels is computed from.
pub struct Block {
    /// Blocks of input channels.
    pub from: Range<usize>,
    pub taps: Taps,
    /// Where its weights begin behind those of the first block: `[block of inputs][row][column][input of the block][16]`.
    pub weights: usize,
}

impl Block {
    /// All blocks of outputs, in order.
    pub fn all(w: &Window, input: &Geometry) -> Vec<Self> {
        let mut weights = 0;
        let block = |number: usize| {
            let from = seen(w, number);
            let last = w.channels.min(from.end * LANES);
            let taps = Taps::new(input, last - from.start * LANES, w.kernel, w.dilation);
            let first = weights;
            weights += taps.depth() * LANES;
            Self { from, taps, weights: first }
        };
        (0..w.out_channels.div_ceil(LANES)).map(block).collect()
    }
}

/// Blocks of input channels in which the groups of a block of output channels are.
fn seen(w: &Window, block: usize) -> Range<usize> {
    let (narrow, outputs) = (w.channels / w.groups, w.out_channels / w.groups);
    let last = w.out_channels.min((block + 1) * LANES) - 1;
    (block * LANES / outputs * narrow) / LANES..((last / outputs + 1) * narrow).div_ceil(LANES)
}

/// The weights of all blocks, zeros where an output does not see an input.
///
/// `filters`: `[out][input of the group][row][column]`.
pub fn pack(w: &Window, filters: &[f32], scale: Option<&[f64]>, to: &mut [f32]) {
    let (narrow, outputs, window) = (w.channels / w.groups, w.out_channels / w.groups, w.kernel[0] * w.kernel[1]);
    let mut rest = to;
    for block in 0..w.out_channels.div_ceil(LANES) {
        let from = seen(w, block);
        let inputs = from.start * LANES..w.channels.min(from.end * LANES);
        let (panel, more) = rest.split_at_mut(inputs.len() * window * LANES);
        for o in block * LANES..w.out_channels.min((block + 1) * LANES) {
            let scale = scale.map_or(1.0, |s| s[o]);
            for (i, taps) in filters[o * narrow * window..][..narrow * window].chunks_exact(window).enumerate() {
                let channel = o / outputs * narrow + i - inputs.start;
                let (first, lane) = (channel / LANES * LANES, channel % LANES);
                let lanes = LANES.min(inputs.len() - first);
                for (k, &tap) in taps.iter().enumerate() {
                    let row = first * window + k * lanes + lane;
                    panel[row * LANES + o % LANES] = (f64::from(tap) * scale) as f32;
                }
            }
        }
        rest = more;
    }
}

impl Step for Grouped {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.blocks.len()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (image, block) = (task / self.blocks.len(), task % self.blocks.len());
        dispatch(self.direct.isa, Plane { step: self, cx, image, block });
    }
}

/// One block of channels of an image.
struct Plane<'a> {
    step: &'a Grouped,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
}

impl Kernel for Plane<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (s, block) = (&self.step.direct, &self.step.blocks[self.block]);
        let lines = s.lines(1);
        let panel = Panel {
            block: self.block,
            columns: 1,
            from: block.from.start,
            taps: &block.taps,
            weights: self.step.weights + block.weights,
        };
        for y in 0..lines.count {
            for start in (0..lines.length).step_by(lines.rows) {
                let pixels = s.line(self.cx, &panel, self.image, y, start);
                // SAFETY: a line of the output.
                unsafe { s.pixels::<V>(self.cx, lines, &panel, &pixels) };
            }
        }
    }
}

/// Groups that lie within a block, with as many outputs as inputs.
pub struct Small {
    pub direct: Direct,
    /// `[block][row][input of the group][column][16]`
    pub weights: usize,
    pub kernel: Pair,
    /// Channels of a group.
    pub width: usize,
    pub orders: Vec<f32>,
}

impl Small {
    /// Channels of a group, where this is the way to compute it.
    pub fn width(w: &Window) -> Option<usize> {
        let (inputs, outputs) = (w.channels / w.groups, w.out_channels / w.groups);
        (inputs == outputs && matches!(inputs, 2 | 4 | 8) && w.dilation == [1, 1]).then_some(inputs)
    }

    pub fn new(direct: Direct, weights: usize, kernel: Pair, width: usize) -> Self {
        Self { direct, weights, kernel, width, orders: orders(width) }
    }

    /// Floats of the weights of a block.
    pub fn block(kernel: Pair, width: usize) -> usize {
        kernel[0] * kernel[1] * width * LANES
    }
}

/// The weights of all blocks for [`Small`], zeros in lanes beyond the last channel.
///
/// `filters`: `[out][input of the group][row][column]`.
pub fn pack_small(w: &Window, filters: &[f32], scale: Option<&[f64]>, to: &mut [f32]) {
    let (width, [rows, columns]) = (w.channels / w.groups, w.kernel);
    for (o, filter) in filters.chunks_exact(width * rows * columns).enumerate() {
        let block = &mut to[o / LANES * Small::block(w.kernel, width)..];
        let scale = scale.map_or(1.0, |s| s[o]);
        for (at, &tap) in filter.iter().enumerate() {
            let (i, y, x) = (at / columns / rows, at / columns % rows, at % columns);
            block[((y * width + i) * columns + x) * LANES + o % LANES] = (f64::from(tap) * scale) as f32;
        }
    }
}

impl Step for Small {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.direct.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.direct.output.geometry.blocks();
        dispatch(self.direct.isa, SmallPlane { step: self, cx, image: task / blocks, block: task % blocks });
    }
}

/// One block of channels of an image.
struct SmallPlane<'a> {
    step: &'a Small,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
}

impl Kernel for SmallPlane<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { step, cx, image, block } = self;
        let s = &step.direct;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let corner = block * i.plane() + (i.before[0] - s.padding[0]) * i.row() + (i.before[1] - s.padding[1]) * LANES;
        let from = cx.image(&s.input, image).wrapping_add(corner);
        let to = cx.image_mut(&s.output, image).wrapping_add(block * o.plane() + o.at(0, 0));
        let weights = Small::block(step.kernel, step.width);
        let mut rows = Vec::with_capacity(step.kernel[0]);
        for y in 0..o.height {
            rows.clear();
            for tap in 0..step.kernel[0] {
                rows.push(from.wrapping_add((y * s.stride[0] + tap) * i.row()));
            }
            let residual = s.residual.as_ref().map_or(std::ptr::null(), |value| {
                let at = block * value.geometry.plane() + value.geometry.at(y, 0);
                cx.image(value, image).wrapping_add(at)
            });
            let job = Row {
                rows: &rows,
                columns: step.kernel[1],
                stride: s.stride[1],
                orders: &step.orders,
                weights: cx.weights(step.weights + block * weights, weights),
                bias: cx.weights(s.bias + block * LANES, LANES),
                residual,
                output: to.wrapping_add(y * o.row()),
                length: o.width,
                activation: s.activation,
            };
            // SAFETY: the borders of the input cover the window of every output, and the weights hold every block.
            unsafe { row::<V>(&job) };
        }
    }
}
