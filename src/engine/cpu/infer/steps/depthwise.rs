//! Convolutions with one filter per channel, together with the convolution before them where there is one.

use super::Step;
use super::conv::{Conv, Dotted, Floats, Pixels, Sum};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::depthwise::{Row, row};
use crate::engine::cpu::common::kernels::dot::{self, Dot, DotKernel};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Pair;

pub struct Depthwise {
    pub isa: Isa,
    pub workers: usize,
    pub source: Source,
    pub output: Value,
    pub residual: Option<Value>,
    /// `[block][row][column][16]`
    pub weights: usize,
    pub bias: usize,
    pub kernel: Pair,
    pub stride: Pair,
    pub padding: Pair,
    pub dilation: Pair,
    pub activation: Activate,
}

/// What the windows slide over.
pub enum Source {
    Value(Value),
    /// The result of a convolution without groups, which nobody else reads: a row of a few channels is computed just
    /// before the first window needs it and forgotten after the last. An expanded image (MobileNet, EfficientNet) never
    /// leaves the second-level cache.
    Conv(Box<Conv>),
}

/// Fewer tasks than this per worker, and images are cut into strips.
const TASKS: usize = 4;
/// Rows of outputs that make a strip worth its overlap with the next.
const STRIP: usize = 8;

impl Depthwise {
    /// Geometry of the input.
    fn input(&self) -> &Geometry {
        match &self.source {
            Source::Value(value) => &value.geometry,
            Source::Conv(conv) => &conv.direct.output.geometry,
        }
    }

    /// Blocks of channels that a task computes together.
    fn together(&self) -> usize {
        match &self.source {
            Source::Value(_) => 1,
            Source::Conv(_) => self.isa.columns(),
        }
    }

    fn panels(&self) -> usize {
        self.output.geometry.blocks().div_ceil(self.together())
    }

    fn strips(&self, images: usize) -> usize {
        let wanted = (TASKS * self.workers).div_ceil(images * self.panels());
        let least = match self.source {
            Source::Value(_) => STRIP,
            // Two strips both compute the rows that both see.
            Source::Conv(_) => STRIP.max(self.reach()),
        };
        wanted.min(self.output.geometry.height / least).max(1)
    }

    /// Input rows between the first and the last row of a window, both included.
    fn reach(&self) -> usize {
        (self.kernel[0] - 1) * self.dilation[0] + 1
    }
}

impl Step for Depthwise {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.panels() * self.strips(images)
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (panels, strips) = (self.panels(), self.strips(cx.images));
        let (image, rest) = (task / (panels * strips), task % (panels * strips));
        let (panel, strip) = (rest / strips, rest % strips);
        let height = self.output.geometry.height;
        let rows = strip * height / strips..(strip + 1) * height / strips;
        let strip = Strip { step: self, cx, image, panel, rows };
        match &self.source {
            Source::Conv(conv) if let Some(bytes) = &conv.bytes => dot::dispatch(bytes.dots, strip),
            _ => dispatch(self.isa, strip),
        }
    }

    fn own(&self) -> usize {
        match &self.source {
            Source::Value(_) => 0,
            Source::Conv(_) => self.reach() * self.together() * self.input().row(),
        }
    }
}

struct Strip<'a> {
    step: &'a Depthwise,
    cx: &'a Context<'a>,
    image: usize,
    panel: usize,
    rows: std::ops::Range<usize>,
}

impl Kernel for Strip<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        self.each::<V, Floats<V>>();
    }
}

impl DotKernel for Strip<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        self.each::<D::Floats, Dotted<D>>();
    }
}

impl Strip<'_> {
    #[inline(always)]
    fn each<V: Lanes, S: Sum>(self) {
        let s = self.step;
        let (i, o) = (s.input(), &s.output.geometry);
        let first = self.panel * s.together();
        let blocks = first..o.blocks().min(first + s.together());
        if matches!(s.source, Source::Conv(_)) {
            self.clear();
        }
        let mut window = Vec::with_capacity(s.kernel[0]);
        let mut computed = 0;
        for y in self.rows.clone() {
            // Rows are counted from the border's first; those outside the image are zeros that need not be added.
            let top = y * s.stride[0];
            let above = s.padding[0].saturating_sub(top).div_ceil(s.dilation[0]);
            let end = (top + s.reach()).saturating_sub(s.padding[0]).min(i.height);
            for line in computed.max(top.saturating_sub(s.padding[0]))..end {
                self.expand::<S>(line);
            }
            computed = end;
            for block in blocks.clone() {
                window.clear();
                for tap in above..s.kernel[0] {
                    let line = top + tap * s.dilation[0] - s.padding[0];
                    if line >= i.height {
                        break;
                    }
                    window.push(self.line(line, block));
                }
                let taps = s.kernel[0] * s.kernel[1];
                let weights = self.cx.weights(s.weights + block * taps * LANES, taps * LANES);
                let residual = s.residual.as_ref().map_or(std::ptr::null(), |value| {
                    let at = block * value.geometry.plane() + value.geometry.at(y, 0);
                    self.cx.image(value, self.image).wrapping_add(at)
                });
                let job = Row {
                    rows: &window,
                    columns: s.kernel[1],
                    dilation: s.dilation[1],
                    stride: s.stride[1],
                    weights: weights.wrapping_add(above * s.kernel[1] * LANES),
                    bias: self.cx.weights(s.bias + block * LANES, LANES),
                    residual,
                    output: self.cx.image_mut(&s.output, self.image).wrapping_add(block * o.plane() + o.at(y, 0)),
                    width: o.width,
                    activation: s.activation,
                };
                // SAFETY: the rows reach as far to both sides as the windows, whose weights and outputs exist.
                unsafe { row::<V>(&job) };
            }
        }
    }
}

impl Strip<'_> {
    /// The first float that a window sees of an input row.
    #[inline(always)]
    fn line(&self, line: usize, block: usize) -> *const f32 {
        let (s, i) = (self.step, self.step.input());
        let row = match &s.source {
            Source::Value(value) => self.cx.image(value, self.image).wrapping_add(block * i.plane() + i.at(line, 0)),
            Source::Conv(_) => self.own(line, block % s.together()).wrapping_add(i.before[1] * LANES).cast_const(),
        };
        row.wrapping_sub(s.padding[1] * LANES)
    }

    /// Where a row of the convolution begins, border included: in place of one that no window needs any more.
    #[inline(always)]
    fn own(&self, line: usize, column: usize) -> *mut f32 {
        let s = self.step;
        self.cx.own.wrapping_add((line % s.reach() * s.together() + column) * s.input().row())
    }

    /// Zeros to the left and to the right of the rows to come: other steps have used the memory.
    fn clear(&self) {
        let (s, i) = (self.step, self.step.input());
        for line in 0..s.reach() {
            for column in 0..s.together() {
                let row = self.own(line, column);
                // SAFETY: a row of the worker's memory is `i.row()` floats.
                unsafe {
                    row.write_bytes(0, i.before[1] * LANES);
                    row.wrapping_add((i.before[1] + i.width) * LANES).write_bytes(0, i.after[1] * LANES);
                }
            }
        }
    }

    /// One row of the convolution.
    #[inline(always)]
    fn expand<S: Sum>(&self, line: usize) {
        let (s, i) = (self.step, self.step.input());
        if let Source::Conv(conv) = &s.source {
            let (lines, panel) = (conv.direct.lines(self.cx.images), conv.panel(self.panel));
            for start in (0..lines.length).step_by(lines.rows) {
                let pixels = Pixels {
                    image: self.image,
                    y: line,
                    start,
                    to: self.own(line, 0).wrapping_add(i.before[1] * LANES),
                    to_block: i.row(),
                };
                // SAFETY: a row of this worker's memory holds a line of each block of the panel.
                unsafe { S::pixels(conv, self.cx, lines, &panel, &pixels) };
            }
        }
    }
}
