//! Convolutions by direct summation, and linear layers: a line of pixels times a panel of output channels.

use super::Step;
use crate::engine::cpu::infer::kernels::activate::Activate;
use crate::engine::cpu::infer::kernels::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::kernels::tile::{Tile, tile};
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Pair;

/// Which floats of the input a pixel reads: `len` at each offset.
#[derive(Debug, Clone)]
pub struct Taps {
    pub offsets: Vec<usize>,
    pub len: usize,
}

impl Taps {
    /// For `channels` input channels (of one group) and a window of `kernel`.
    pub fn new(input: &Geometry, channels: usize, kernel: Pair, dilation: Pair) -> Self {
        let mut offsets = Vec::new();
        if input.pixel < LANES && dilation[1] == 1 {
            // All channels of all columns of the window lie side by side.
            offsets.extend((0..kernel[0]).map(|y| y * dilation[0] * input.row()));
            return Self { offsets, len: kernel[1] * input.pixel };
        }
        for block in 0..channels.div_ceil(input.pixel) {
            for y in 0..kernel[0] {
                for x in 0..kernel[1] {
                    let offset = block * input.plane() + y * dilation[0] * input.row() + x * dilation[1] * input.pixel;
                    offsets.push(offset);
                }
            }
        }
        Self { offsets, len: input.pixel }
    }

    /// Products per output.
    pub fn depth(&self) -> usize {
        self.offsets.len() * self.len
    }
}

pub struct Conv {
    pub isa: Isa,
    pub input: Value,
    pub output: Value,
    pub residual: Option<Value>,
    pub weights: usize,
    pub bias: usize,
    pub stride: Pair,
    pub padding: Pair,
    pub groups: usize,
    pub taps: Taps,
    pub activation: Activate,
}

/// Pixels side by side, which the microkernel walks with one stride.
#[derive(Clone, Copy)]
struct Lines {
    /// Lines of an image (or of all images together), pixels of a line.
    count: usize,
    length: usize,
    /// Pixels per microkernel.
    rows: usize,
    /// A line runs through the images because each has one pixel.
    across: bool,
}

/// Weights that fit the second-level cache are walked for every few pixels; larger ones once for many pixels.
const SMALL: usize = 96 << 10;
/// Input floats a task looks at, so that they stay in the second-level cache while the panels go by.
const WORKING_SET: usize = 64 << 10;

impl Conv {
    fn lines(&self, images: usize) -> Lines {
        let g = &self.output.geometry;
        let across = g.height * g.width == 1;
        let (count, length) = if across { (1, images) } else { (g.height, g.width) };
        let parts = length.div_ceil(self.isa.rows());
        Lines { count, length, rows: length.div_ceil(parts.max(1)), across }
    }

    fn group_blocks(&self) -> usize {
        self.output.geometry.blocks() / self.groups
    }

    /// Panels never reach over the edge of a group.
    fn panels_per_group(&self) -> usize {
        self.group_blocks().div_ceil(self.isa.columns())
    }

    fn panels(&self) -> usize {
        self.groups * self.panels_per_group()
    }

    /// How many (lines, panels) make a task.
    fn grain(&self, images: usize) -> Pair {
        let lines = self.lines(images);
        let weights = self.taps.depth() * self.output.geometry.blocks() / self.groups * LANES;
        let touched = lines.length * self.stride[1] * self.stride[0] * self.taps.depth()
            / self.taps.offsets.len().max(1)
            * self.input.geometry.blocks();
        if lines.across {
            return [1, 1];
        }
        if weights <= SMALL {
            return [1, self.panels_per_group()];
        }
        [(WORKING_SET / touched.max(1)).clamp(1, lines.count), 1]
    }
}

impl Step for Conv {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        let (lines, [high, wide]) = (self.lines(images), self.grain(images));
        let images = if lines.across { 1 } else { images };
        images * lines.count.div_ceil(high) * self.panels().div_ceil(wide)
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (lines, [high, wide]) = (self.lines(cx.images), self.grain(cx.images));
        let (chunks, panels) = (lines.count.div_ceil(high), self.panels().div_ceil(wide));
        let (image, rest) = (task / (chunks * panels), task % (chunks * panels));
        let (panel, chunk) = (rest / chunks * wide, rest % chunks * high);
        dispatch(
            self.isa,
            Rows {
                step: self,
                cx,
                image,
                lines,
                y: chunk..lines.count.min(chunk + high),
                panels: panel..self.panels().min(panel + wide),
            },
        );
    }
}

struct Rows<'a> {
    step: &'a Conv,
    cx: &'a Context<'a>,
    image: usize,
    lines: Lines,
    y: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
}

impl Kernel for Rows<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let s = self.step;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let (depth, wide, lines) = (s.taps.depth(), s.isa.columns(), self.lines);
        let from = self.cx.image(&s.input, self.image);
        let to = self.cx.image(&s.output, self.image);
        let residual = s.residual.as_ref().map(|value| (self.cx.image(value, self.image), value.geometry));
        let (input_stride, output_stride) =
            if lines.across { (i.len(), o.len()) } else { (s.stride[1] * i.pixel, LANES) };
        let (per_group, group_blocks) = (s.panels_per_group(), s.group_blocks());
        let input_blocks = i.blocks() / s.groups;
        for y in self.y.clone() {
            for start in (0..lines.length).step_by(lines.rows) {
                let rows = lines.rows.min(lines.length - start);
                for panel in self.panels.clone() {
                    let (group, part) = (panel / per_group, panel % per_group);
                    let columns = wide.min(group_blocks - part * wide);
                    let block = group * group_blocks + part * wide;
                    let weights = self.cx.weights.at(s.weights + block * LANES * depth, columns * LANES * depth);
                    let corner = (i.before[0] + y * s.stride[0] - s.padding[0]) * i.row()
                        + (i.before[1] - s.padding[1]) * i.pixel
                        + group * input_blocks * i.plane();
                    let (residual, residual_stride, residual_block) = match &residual {
                        Some((value, g)) => {
                            let stride = if lines.across { g.len() } else { LANES };
                            let at = block * g.plane() + g.at(y, 0) + start * stride;
                            (value.wrapping_add(at).cast_const(), stride, g.plane())
                        }
                        None => (std::ptr::null(), 0, 0),
                    };
                    let job = Tile {
                        input: from.wrapping_add(corner + start * input_stride),
                        stride: input_stride,
                        offsets: &s.taps.offsets,
                        len: s.taps.len,
                        weights,
                        output: to.wrapping_add(block * o.plane() + o.at(y, 0) + start * output_stride),
                        output_stride,
                        output_block: o.plane(),
                        bias: self.cx.weights.at(s.bias + block * LANES, columns * LANES),
                        residual,
                        residual_stride,
                        residual_block,
                        activation: s.activation,
                    };
                    // SAFETY: the borders of the input cover the window of every output pixel, the output is inside its
                    // value, and the weights hold every panel.
                    unsafe { tile::<V, true>(rows, columns, &job) };
                }
            }
        }
    }
}

/// Weights in the order in which the microkernel reads them. `weight`: `[out][in of a group][kernel]`.
pub fn pack(conv: &Packing<'_>, packed: &mut [f32]) {
    let Packing { isa, out, groups, inp, kernel, taps, pixel, weight, scale } = *conv;
    let (depth, wide) = (taps.depth(), isa.columns() * LANES);
    let (group_out, window) = (out / groups, kernel[0] * kernel[1]);
    let padded = group_out.next_multiple_of(LANES);
    for o in 0..out {
        let (group, lane) = (o / group_out, o % group_out);
        let (start, column) = (lane / wide * wide, lane % wide);
        let width = wide.min(padded - start);
        let panel = &mut packed[(group * padded + start) * depth..][..width * depth];
        let scale = scale.map_or(1.0, |s| s[o]);
        for i in 0..inp {
            for k in 0..window {
                // Narrow images: [window][channel]; blocks of channels: [block][window][channel of the block].
                let row = (i / pixel * window + k) * pixel + i % pixel;
                panel[row * width + column] = (f64::from(weight[(o * inp + i) * window + k]) * scale) as f32;
            }
        }
    }
}

/// What [`pack`] needs to know.
#[derive(Clone, Copy)]
pub struct Packing<'a> {
    pub isa: Isa,
    pub out: usize,
    pub groups: usize,
    /// Input channels of a group.
    pub inp: usize,
    pub kernel: Pair,
    pub taps: &'a Taps,
    /// `Geometry::pixel` of the input.
    pub pixel: usize,
    pub weight: &'a [f32],
    pub scale: Option<&'a [f64]>,
}
