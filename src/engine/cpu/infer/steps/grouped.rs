//! Convolutions in groups that are no whole blocks of channels (ResNeXt's of 4, RegNet's of 8 and 24): every block of output
//! channels sees the few blocks of input channels that its groups are in.

use std::ops::Range;

use super::Step;
use super::conv::{Direct, Panel, Taps};
use crate::engine::cpu::common::geometry::Window;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Geometry};

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
