//! Largest or mean value of windows.

use super::Step;
use crate::engine::cpu::common::geometry::{Reduce, Span};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, activate};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Pool {
    pub isa: Isa,
    pub input: Value,
    pub output: Value,
    pub spans: [Vec<Span>; 2],
    pub reduce: Reduce,
    pub activation: Activate,
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
        let to = self.cx.image_mut(&s.output, self.image).wrapping_add(self.block * o.plane() + o.at(0, 0));
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
