//! Largest or mean value of windows.

use super::Step;
use crate::engine::cpu::infer::kernels::activate::{Activate, activate};
use crate::engine::cpu::infer::kernels::lanes::{Isa, Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};
use crate::model::{Op, Pair};

/// The inputs that one output sees along one side, clipped to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    pub step: usize,
    /// What a mean divides by along this side.
    pub count: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reduce {
    Max,
    /// `None`: divide by the spans' counts.
    Mean(Option<usize>),
}

pub struct Pool {
    pub isa: Isa,
    pub input: Value,
    pub output: Value,
    pub spans: [Vec<Span>; 2],
    pub reduce: Reduce,
    pub activation: Activate,
}

impl Pool {
    /// Windows of an operation on images of `input` size with results of `output` size.
    pub fn windows(op: &Op, input: Pair, output: Pair) -> Option<([Vec<Span>; 2], Reduce)> {
        let both = |f: &dyn Fn(usize) -> Vec<Span>| [f(0), f(1)];
        Some(match op {
            Op::MaxPool2d { kernel, stride, padding, dilation, .. } => {
                let side = |i: usize| {
                    let place = |o: usize| max_span(o * stride[i], kernel[i], padding[i], dilation[i], input[i]);
                    (0..output[i]).map(place).collect()
                };
                (both(&side), Reduce::Max)
            }
            Op::AvgPool2d { kernel, stride, padding, count_include_pad, divisor, .. } => {
                let side = |i: usize| {
                    let place = |o: usize| {
                        // As in PyTorch: a window counts its padding, but not what `ceil_mode` adds beyond it.
                        let end = (o * stride[i] + kernel[i]).min(input[i] + 2 * padding[i]);
                        let (start, stop) = ((o * stride[i]).max(padding[i]), end.min(input[i] + padding[i]));
                        let count = if *count_include_pad { end - o * stride[i] } else { stop.saturating_sub(start) };
                        Span { start: start - padding[i], end: stop.saturating_sub(padding[i]), step: 1, count }
                    };
                    (0..output[i]).map(place).collect()
                };
                (both(&side), Reduce::Mean(*divisor))
            }
            Op::AdaptiveAvgPool2d { .. } | Op::Mean { .. } => {
                let side = |i: usize| {
                    let place = |o: usize| {
                        let (start, end) = (o * input[i] / output[i], ((o + 1) * input[i]).div_ceil(output[i]));
                        Span { start, end, step: 1, count: end - start }
                    };
                    (0..output[i]).map(place).collect()
                };
                (both(&side), Reduce::Mean(None))
            }
            _ => return None,
        })
    }
}

fn max_span(start: usize, kernel: usize, padding: usize, step: usize, size: usize) -> Span {
    let skipped = padding.saturating_sub(start).div_ceil(step);
    let end = (start + (kernel - 1) * step + 1).min(size + padding).saturating_sub(padding);
    Span { start: start + skipped * step - padding, end, step, count: kernel }
}

impl Step for Pool {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.output.geometry.blocks();
        dispatch(self.isa, Plane { step: self, cx, image: task / blocks, block: task % blocks });
    }
}

struct Plane<'a> {
    step: &'a Pool,
    cx: &'a Context<'a>,
    image: usize,
    block: usize,
}

impl Kernel for Plane<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let s = self.step;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let from = self.cx.image(&s.input, self.image).wrapping_add(self.block * i.plane() + i.at(0, 0));
        let to = self.cx.image(&s.output, self.image).wrapping_add(self.block * o.plane() + o.at(0, 0));
        for (oy, rows) in s.spans[0].iter().enumerate() {
            for (ox, columns) in s.spans[1].iter().enumerate() {
                // SAFETY: spans are clipped to the image.
                let value = unsafe {
                    match s.reduce {
                        Reduce::Max => largest::<V>(from, i.row(), rows, columns),
                        Reduce::Mean(divisor) => {
                            let count = divisor.unwrap_or(rows.count * columns.count);
                            sum::<V>(from, i.row(), rows, columns).mul(V::splat(1.0 / count as f32))
                        }
                    }
                };
                // SAFETY: the output pixel is inside its value.
                unsafe { activate(s.activation, value).store(to.add(oy * o.row() + ox * LANES)) };
            }
        }
    }
}

/// # Safety
/// Every pixel of the spans must be readable at its place from `from`, lines being `row` floats apart.
#[inline(always)]
unsafe fn largest<V: Lanes>(from: *const f32, row: usize, rows: &Span, columns: &Span) -> V {
    let mut value = V::splat(f32::NEG_INFINITY);
    for y in (rows.start..rows.end).step_by(rows.step) {
        for x in (columns.start..columns.end).step_by(columns.step) {
            // SAFETY: the caller's promise.
            value = value.max_or_nan(unsafe { V::load(from.add(y * row + x * LANES)) });
        }
    }
    value
}

/// Lines whose sums are added up before they join the whole sum.
const TOGETHER: usize = 16;

/// Line by line, a few lines at a time: the rounding error of one running sum grows with the square root of its length,
/// and a mean over a whole picture has 50,000 terms.
///
/// # Safety
/// As for [`largest`].
#[inline(always)]
unsafe fn sum<V: Lanes>(from: *const f32, row: usize, rows: &Span, columns: &Span) -> V {
    let mut whole = V::splat(0.0);
    for start in (rows.start..rows.end).step_by(TOGETHER) {
        let mut some = V::splat(0.0);
        for y in start..rows.end.min(start + TOGETHER) {
            let mut line = V::splat(0.0);
            for x in columns.start..columns.end {
                // SAFETY: the caller's promise.
                line = line.add(unsafe { V::load(from.add(y * row + x * LANES)) });
            }
            some = some.add(line);
        }
        whole = whole.add(some);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_clipped_to_the_image() {
        // Size 5, kernel 3, stride 2, padding 1: windows start at -1, 1, 3.
        let spans: Vec<_> = (0..3).map(|o| max_span(2 * o, 3, 1, 1, 5)).map(|s| (s.start, s.end)).collect();
        assert_eq!(spans, [(0, 2), (1, 4), (3, 5)]);
        // Dilation 2 from -1: the taps are -1, 1, 3.
        let span = max_span(0, 3, 1, 2, 5);
        assert_eq!((span.start, span.end, span.step), (1, 4, 2));
    }
}
