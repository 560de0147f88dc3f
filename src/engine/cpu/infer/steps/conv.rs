//! Convolutions by direct summation, and linear layers: a line of pixels times a panel of output channels.

use std::marker::PhantomData;

use super::Step;
use super::bytes::Bytes;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::dot::{self, Dot, DotKernel};
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

    /// For a window of one pixel whose channels lie anywhere.
    pub fn picked(offsets: Vec<usize>) -> Self {
        Self { offsets, len: 1, short: 0, short_len: 0 }
    }

    /// Products per output.
    pub fn depth(&self) -> usize {
        (self.offsets.len() - self.short) * self.len + self.short * self.short_len
    }
}

/// What direct summation needs to know, however the channels are grouped.
pub struct Direct {
    pub isa: Isa,
    pub input: Value,
    pub output: Value,
    pub residual: Option<Value>,
    pub bias: usize,
    pub stride: Pair,
    pub padding: Pair,
    pub activation: Activate,
}

/// A convolution whose groups are whole blocks of channels.
pub struct Conv {
    pub direct: Direct,
    pub weights: usize,
    pub groups: usize,
    /// Blocks of output channels of a group.
    pub blocks: usize,
    pub taps: Taps,
    /// What it has where it reads bytes.
    pub bytes: Option<Bytes>,
}

/// Output channels that see the same input channels.
pub struct Panel<'a> {
    /// First block of output channels, and how many.
    pub block: usize,
    pub columns: usize,
    /// First block of input channels.
    pub from: usize,
    pub taps: &'a Taps,
    pub weights: usize,
}

/// Pixels side by side, which the microkernel walks with one stride.
#[derive(Clone, Copy)]
pub struct Lines {
    /// Lines of an image (or of all images together), pixels of a line.
    pub count: usize,
    pub length: usize,
    /// Pixels per microkernel.
    pub rows: usize,
    /// A line runs through the images because each has one pixel.
    pub across: bool,
}

/// Weights that fit the second-level cache are walked for every few pixels; larger ones once for many pixels.
const SMALL: usize = 96 << 10;
/// Input floats a task looks at, so that they stay in the second-level cache while the panels go by.
const WORKING_SET: usize = 64 << 10;

impl Direct {
    pub fn lines(&self, images: usize) -> Lines {
        let g = &self.output.geometry;
        let across = g.height * g.width == 1;
        let (count, length) = if across { (1, images) } else { (g.height, g.width) };
        let parts = length.div_ceil(self.isa.rows());
        Lines { count, length, rows: length.div_ceil(parts.max(1)), across }
    }
}

impl Conv {
    /// Panels never reach over the edge of a group.
    fn panels_per_group(&self) -> usize {
        self.blocks.div_ceil(self.direct.isa.columns())
    }

    fn panels(&self) -> usize {
        self.groups * self.panels_per_group()
    }

    /// How many (lines, panels) make a task.
    fn grain(&self, images: usize) -> Pair {
        let (lines, stride) = (self.direct.lines(images), self.direct.stride);
        let weights = self.taps.depth() * self.blocks * LANES;
        let touched = lines.length * stride[1] * stride[0] * self.taps.depth() / self.taps.offsets.len().max(1)
            * self.direct.input.geometry.blocks();
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
        let (lines, [high, wide]) = (self.direct.lines(images), self.grain(images));
        let images = if lines.across { 1 } else { images };
        images * lines.count.div_ceil(high) * self.panels().div_ceil(wide)
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (lines, [high, wide]) = (self.direct.lines(cx.images), self.grain(cx.images));
        let (chunks, panels) = (lines.count.div_ceil(high), self.panels().div_ceil(wide));
        let (image, rest) = (task / (chunks * panels), task % (chunks * panels));
        let (panel, chunk) = (rest / chunks * wide, rest % chunks * high);
        let chunk = Chunk {
            step: self,
            cx,
            image,
            lines,
            y: chunk..lines.count.min(chunk + high),
            panels: panel..self.panels().min(panel + wide),
        };
        match &self.bytes {
            Some(bytes) => dot::dispatch(bytes.dots, chunk),
            None => dispatch(self.direct.isa, chunk),
        }
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
        self.each::<Floats<V>>();
    }
}

impl DotKernel for Chunk<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        self.each::<Dotted<D>>();
    }
}

/// What sums the products.
pub trait Sum {
    /// # Safety
    /// As for [`Direct::pixels`].
    unsafe fn pixels(conv: &Conv, cx: &Context<'_>, lines: Lines, panel: &Panel<'_>, p: &Pixels);
}

pub struct Floats<V>(PhantomData<V>);
pub struct Dotted<D>(PhantomData<D>);

impl<V: Lanes> Sum for Floats<V> {
    #[inline(always)]
    unsafe fn pixels(conv: &Conv, cx: &Context<'_>, lines: Lines, panel: &Panel<'_>, p: &Pixels) {
        // SAFETY: the caller's promise.
        unsafe { conv.direct.pixels::<V>(cx, lines, panel, p) };
    }
}

impl<D: Dot> Sum for Dotted<D> {
    #[inline(always)]
    unsafe fn pixels(conv: &Conv, cx: &Context<'_>, lines: Lines, panel: &Panel<'_>, p: &Pixels) {
        if let Some(bytes) = &conv.bytes {
            // SAFETY: the caller's promise.
            unsafe { conv.byte_pixels::<D>(bytes, cx, lines, panel, p) };
        }
    }
}

impl Chunk<'_> {
    #[inline(always)]
    fn each<S: Sum>(self) {
        let s = &self.step.direct;
        for y in self.y.clone() {
            for start in (0..self.lines.length).step_by(self.lines.rows) {
                for panel in self.panels.clone() {
                    let panel = self.step.panel(panel);
                    let pixels = s.line(self.cx, &panel, self.image, y, start);
                    // SAFETY: a line of the output.
                    unsafe { S::pixels(self.step, self.cx, self.lines, &panel, &pixels) };
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
    /// Where pixel 0 of the line goes, and the distance to its next block of channels.
    pub to: *mut f32,
    pub to_block: usize,
}

impl Conv {
    #[inline(always)]
    pub fn panel(&self, number: usize) -> Panel<'_> {
        let (group, part) = (number / self.panels_per_group(), number % self.panels_per_group());
        let (blocks, wide) = (self.blocks, self.direct.isa.columns());
        let block = group * blocks + part * wide;
        Panel {
            block,
            columns: wide.min(blocks - part * wide),
            from: group * (self.direct.input.geometry.blocks() / self.groups),
            taps: &self.taps,
            weights: self.weights + block * LANES * self.taps.depth(),
        }
    }
}

impl Direct {
    /// Pixels of a line of the output.
    #[inline(always)]
    pub fn line(&self, cx: &Context<'_>, panel: &Panel<'_>, image: usize, y: usize, start: usize) -> Pixels {
        let o = &self.output.geometry;
        let to = cx.image_mut(&self.output, image).wrapping_add(panel.block * o.plane() + o.at(y, 0));
        Pixels { image, y, start, to, to_block: o.plane() }
    }

    /// # Safety
    /// There is room for a line of each block of the panel where `p` says.
    #[inline(always)]
    pub unsafe fn pixels<V: Lanes>(&self, cx: &Context<'_>, lines: Lines, panel: &Panel<'_>, p: &Pixels) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let Panel { block, columns, from, taps, weights } = *panel;
        let (input_stride, output_stride) =
            if lines.across { (i.len(), o.len()) } else { (self.stride[1] * i.pixel, LANES) };
        let corner = (i.before[0] + p.y * self.stride[0] - self.padding[0]) * i.row()
            + (i.before[1] - self.padding[1]) * i.pixel
            + from * i.plane();
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
            offsets: &taps.offsets,
            len: taps.len,
            short: taps.short,
            short_len: taps.short_len,
            weights: cx.weights(weights, columns * LANES * taps.depth()),
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
    let Packing { out, groups, inp, kernel, pixel, weight, scale, rows: picked, order, .. } = *conv;
    let (group_out, window) = (out / groups, kernel[0] * kernel[1]);
    // A few rows of the panel at a time, which stay in the cache until all their columns are written.
    let step = (64 / window).max(1);
    for from in (0..inp).step_by(step) {
        for column in 0..width.min(group_out.saturating_sub(start)) {
            let lies = group * group_out + start + column;
            let o = order.map_or(lies, |order| order[lies]);
            let scale = scale.map_or(1.0, |s| s[o]);
            for i in from..(from + step).min(inp) {
                // Narrow images: [window][channel]; blocks of channels: [block][window][channel of the block].
                let (first, lane) = (i / pixel * pixel, i % pixel);
                let rows = picked.map_or(first * window + lane, |rows| rows[i]);
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
    /// Of a window of one pixel: where among the taps each input channel is, if not in order.
    pub rows: Option<&'a [usize]>,
    /// Which output channel goes to each place, if not in order.
    pub order: Option<&'a [usize]>,
}
