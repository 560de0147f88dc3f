//! Convolutions by direct summation, and linear layers: a line of pixels times a panel of output channels.

use super::Step;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Pair;

/// Which floats of the input a pixel reads: `len` at each offset, at the last `short` offsets only `short_len` (a block
/// of channels that is not full).
#[derive(Debug, Clone)]
pub struct Taps {
    pub offsets: Vec<usize>,
    pub len: usize,
    pub short: usize,
    pub short_len: usize,
}

impl Taps {
    /// For `channels` input channels (of one group) and a window of `kernel`.
    pub fn new(input: &Geometry, channels: usize, kernel: Pair, dilation: Pair) -> Self {
        let mut offsets = Vec::new();
        if input.pixel < LANES && dilation[1] == 1 {
            // All channels of all columns of the window lie side by side.
            offsets.extend((0..kernel[0]).map(|y| y * dilation[0] * input.row()));
            return Self { offsets, len: kernel[1] * input.pixel, short: 0, short_len: 0 };
        }
        for block in 0..channels.div_ceil(input.pixel) {
            for y in 0..kernel[0] {
                for x in 0..kernel[1] {
                    let offset = block * input.plane() + y * dilation[0] * input.row() + x * dilation[1] * input.pixel;
                    offsets.push(offset);
                }
            }
        }
        let short_len = channels % input.pixel;
        let short = if short_len > 0 { kernel[0] * kernel[1] } else { 0 };
        Self { offsets, len: input.pixel, short, short_len }
    }

    /// Products per output.
    pub fn depth(&self) -> usize {
        (self.offsets.len() - self.short) * self.len + self.short * self.short_len
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
pub struct Lines {
    /// Lines of an image (or of all images together), pixels of a line.
    count: usize,
    pub length: usize,
    /// Pixels per microkernel.
    pub rows: usize,
    /// A line runs through the images because each has one pixel.
    across: bool,
}

/// Weights that fit the second-level cache are walked for every few pixels; larger ones once for many pixels.
const SMALL: usize = 96 << 10;
/// Input floats a task looks at, so that they stay in the second-level cache while the panels go by.
const WORKING_SET: usize = 64 << 10;

impl Conv {
    pub fn lines(&self, images: usize) -> Lines {
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
            Chunk {
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

struct Chunk<'a> {
    step: &'a Conv,
    cx: &'a Context<'a>,
    image: usize,
    lines: Lines,
    y: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
}

impl Kernel for Chunk<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (s, o) = (self.step, &self.step.output.geometry);
        let to = self.cx.image_mut(&s.output, self.image);
        for y in self.y.clone() {
            for start in (0..self.lines.length).step_by(self.lines.rows) {
                for panel in self.panels.clone() {
                    let block = s.first_block(panel);
                    let pixels = Pixels {
                        image: self.image,
                        y,
                        start,
                        panel,
                        to: to.wrapping_add(block * o.plane() + o.at(y, 0)),
                        to_block: o.plane(),
                    };
                    // SAFETY: a line of the output.
                    unsafe { s.pixels::<V>(self.cx, self.lines, &pixels) };
                }
            }
        }
    }
}

/// Some pixels of a line, one panel of their channels.
pub struct Pixels {
    pub image: usize,
    pub y: usize,
    /// First pixel; there are as many as a microkernel takes, and fewer at the end of the line.
    pub start: usize,
    pub panel: usize,
    /// Where pixel 0 of the line goes, and the distance to its next block of channels.
    pub to: *mut f32,
    pub to_block: usize,
}

impl Conv {
    /// First of the blocks of output channels of a panel.
    #[inline(always)]
    fn first_block(&self, panel: usize) -> usize {
        let (group, part) = (panel / self.panels_per_group(), panel % self.panels_per_group());
        group * self.group_blocks() + part * self.isa.columns()
    }

    /// Blocks of output channels in a panel.
    #[inline(always)]
    fn columns(&self, panel: usize) -> usize {
        let part = panel % self.panels_per_group();
        self.isa.columns().min(self.group_blocks() - part * self.isa.columns())
    }

    /// # Safety
    /// There is room for a line of each block of the panel where `p` says.
    #[inline(always)]
    pub unsafe fn pixels<V: Lanes>(&self, cx: &Context<'_>, lines: Lines, p: &Pixels) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (depth, columns, block) = (self.taps.depth(), self.columns(p.panel), self.first_block(p.panel));
        let (input_stride, output_stride) =
            if lines.across { (i.len(), o.len()) } else { (self.stride[1] * i.pixel, LANES) };
        let group = p.panel / self.panels_per_group();
        let corner = (i.before[0] + p.y * self.stride[0] - self.padding[0]) * i.row()
            + (i.before[1] - self.padding[1]) * i.pixel
            + group * (i.blocks() / self.groups) * i.plane();
        let (residual, residual_stride, residual_block) = match &self.residual {
            Some(value) => {
                let g = &value.geometry;
                let stride = if lines.across { g.len() } else { LANES };
                let at = block * g.plane() + g.at(p.y, 0) + p.start * stride;
                (cx.image(value, p.image).wrapping_add(at), stride, g.plane())
            }
            None => (std::ptr::null(), 0, 0),
        };
        let job = Tile {
            input: cx.image(&self.input, p.image).wrapping_add(corner + p.start * input_stride),
            stride: input_stride,
            offsets: &self.taps.offsets,
            len: self.taps.len,
            short: self.taps.short,
            short_len: self.taps.short_len,
            weights: cx.weights(self.weights + block * LANES * depth, columns * LANES * depth),
            later: std::ptr::null(),
            later_lines: 0,
            output: p.to.wrapping_add(p.start * output_stride),
            output_stride,
            output_block: p.to_block,
            bias: cx.weights(self.bias + block * LANES, columns * LANES),
            residual,
            residual_stride,
            residual_block,
            activation: self.activation,
        };
        // SAFETY: the borders of the input cover the window of every output pixel, the caller made room for the outputs, and
        // the weights hold every panel.
        unsafe { tile::<V, true>(lines.rows.min(lines.length - p.start), columns, &job) };
    }
}

/// Weights in the order in which the microkernel reads them: panel by panel `[depth][out of the panel]`.
///
/// `first`: the output channel, counted with the padding of the groups before it, at which `packed` begins.
pub fn pack(conv: &Packing<'_>, first: usize, packed: &mut [f32]) {
    let (depth, wide) = (conv.taps.depth(), conv.isa.columns() * LANES);
    let padded = (conv.out / conv.groups).next_multiple_of(LANES);
    let (mut next, mut rest) = (first, packed);
    while !rest.is_empty() {
        let (group, start) = (next / padded, next % padded);
        let width = wide.min(padded - start);
        let (panel, more) = rest.split_at_mut(width * depth);
        pack_panel(conv, group, start, width, panel);
        (next, rest) = (next + width, more);
    }
}

/// `width` output channels of a group, from `start` on.
fn pack_panel(conv: &Packing<'_>, group: usize, start: usize, width: usize, panel: &mut [f32]) {
    let Packing { out, groups, inp, kernel, pixel, weight, scale, .. } = *conv;
    let (group_out, window) = (out / groups, kernel[0] * kernel[1]);
    // A few rows of the panel at a time, which stay in the cache until all their columns are written.
    let step = (64 / window).max(1);
    for from in (0..inp).step_by(step) {
        for column in 0..width.min(group_out.saturating_sub(start)) {
            let o = group * group_out + start + column;
            let scale = scale.map_or(1.0, |s| s[o]);
            for i in from..(from + step).min(inp) {
                // Narrow images: [window][channel]; blocks of channels: [block][window][channel of the block].
                let (first, lane) = (i / pixel * pixel, i % pixel);
                let rows = first * window + lane;
                for (k, &w) in weight[(o * inp + i) * window..][..window].iter().enumerate() {
                    let row = rows + k * pixel.min(inp - first);
                    panel[row * width + column] = (f64::from(w) * scale) as f32;
                }
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
