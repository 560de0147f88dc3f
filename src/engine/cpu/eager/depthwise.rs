//! A depthwise convolution: each channel has a filter of its own.
//!
//! The last block of channels begins sixteen before the end: where channels are no whole blocks, some are computed twice.

use std::ops::Range;

use super::depthwise_rows::{Cut, Reader, Ring, Share};
use super::depthwise_taps::{Row, Taps};
use super::late::{Moments, Values};
use super::rows::all_moments;
use super::{Address, Shape, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::error::Result;

/// Sizes of a depthwise convolution with square filters, the same stride both ways.
#[derive(Debug, Clone, Copy)]
pub struct Depthwise {
    pub input: Shape,
    pub kernel: usize,
    pub stride: usize,
    /// Above and to the left of the image; below and to the right there are as many zeros as `outputs` need.
    pub padding: usize,
    /// Rows and columns.
    pub outputs: [usize; 2],
}

impl Depthwise {
    /// Whether there is code for these sizes.
    pub fn is_known(&self) -> bool {
        // Every filter begins at least one number in front of the end of the image.
        let fits = |(&side, &outputs): (&usize, &usize)| {
            side > 0 && outputs > 0 && (outputs - 1).saturating_mul(self.stride) < side + self.padding
        };
        let known = matches!((self.kernel, self.stride), (3 | 5, 1 | 2) | (7, 1));
        let fit = self.input.size.iter().zip(&self.outputs).all(fits);
        known && fit && self.padding < self.kernel && self.input.channels >= LANES
    }

    pub fn output(&self) -> Shape {
        Shape { size: self.outputs, ..self.input }
    }

    /// y of the values, which are zeros around the image; `moments`: those of y. `weight`: `[channels][kernel][kernel]`.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn run(
        &self,
        values: Values<'_>,
        weight: &[f32],
        y: &mut [f32],
        moments: Option<&mut Moments>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (output, channels) = (self.output(), self.input.channels);
        assert!(self.is_known(), "{self:?}");
        assert_eq!((values.x.len(), y.len()), (self.input.floats(), output.floats()), "floats of images");
        assert_eq!(weight.len(), self.taps() * channels, "floats of the filters");
        values.check(channels);
        let rows = |step: usize| (step - 1) * self.stride + self.kernel;
        let width = (output.size[1] - 1) * self.stride + self.kernel;
        let cut = Cut::new(self, workspace.threads.workers(), |step| Ring::floats(rows(step), width, 1));
        let ring = Ring::floats(rows(cut.step), width, cut.widest());
        let (filters, slots) = (self.taps() * cut.channels.padded(), cut.parts() * 2 * cut.channels.padded());
        let workers = workspace.threads.workers();
        let weights = Address(workspace.memory(filters + workers * ring + slots)?);
        let job = Job {
            conv: *self,
            values: Reader::of(values),
            weights,
            rings: Address(weights.at(filters)),
            ring,
            y: Address(y.as_mut_ptr()),
            slots: moments.is_some().then(|| Address(weights.at(filters + workers * ring))),
            cut,
            isa: workspace.isa,
        };
        // SAFETY: there is room for them.
        unsafe { self.arrange(&job.cut, weight, weights, |tap| tap) };
        workspace.threads.run(job.cut.tasks(), &|task, worker| job.run(task, worker))?;
        if let (Some(moments), Some(slots)) = (moments, job.slots) {
            // SAFETY: all tasks have filled theirs.
            let slots = unsafe { std::slice::from_raw_parts(slots.0, cut.parts() * 2 * cut.channels.padded()) };
            *moments = all_moments(cut.channels, slots, |part| cut.rows(part).len() * output.size[1]);
        }
        Ok(())
    }

    pub(super) fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Every block's filters as `[tap][16]`, the taps in an order of the caller's.
    ///
    /// # Safety
    /// There is room for all blocks.
    pub(super) unsafe fn arrange(&self, cut: &Cut, weight: &[f32], to: Address, place: impl Fn(usize) -> usize) {
        let taps = self.taps();
        for tap in 0..taps {
            for block in 0..cut.channels.blocks() {
                let from = &weight[cut.channels.start(block) * taps..][..LANES * taps];
                let to = to.at((block * taps + place(tap)) * LANES);
                for lane in 0..LANES {
                    // SAFETY: the caller's promise.
                    unsafe { to.add(lane).write(from[lane * taps + tap]) };
                }
            }
        }
    }
}

/// What the tasks read, and where they write.
struct Job<'a> {
    conv: Depthwise,
    cut: Cut,
    isa: Isa,
    values: Reader<'a>,
    weights: Address,
    /// Per worker a ring of that many floats.
    rings: Address,
    ring: usize,
    y: Address,
    /// Per part and block of channels, mean and sum of squared differences from it.
    slots: Option<Address>,
}

/// Taps of a column of the largest filter.
pub(super) const MOST: usize = 7;

impl Job<'_> {
    /// A band of outputs.
    fn run(&self, task: usize, worker: usize) {
        let (conv, cut, output) = (&self.conv, &self.cut, self.conv.output());
        let (kernel, stride, [height, width]) = (conv.kernel, conv.stride, conv.input.size);
        let Share { part, image, rows, blocks } = cut.share(task);
        let ring = Ring {
            at: self.rings.at(worker * self.ring),
            rows: (cut.step - 1) * stride + kernel,
            width: (output.size[1] - 1) * stride + kernel,
            border: conv.padding,
            blocks: blocks.len(),
        };
        let inner = width.min(ring.width - conv.padding.min(ring.width));
        // SAFETY: every worker has a ring of this size.
        unsafe { ring.clear(inner) };
        let mut next = (rows.start * stride).saturating_sub(conv.padding);
        for first in rows.clone().step_by(cut.step) {
            let end = rows.end.min(first + cut.step);
            let needed = ((end - 1) * stride + kernel).saturating_sub(conv.padding).min(height);
            for y in next..needed {
                let from = (image * height + y) * conv.input.row();
                // SAFETY: the row is inside the images, whose length `run` has compared; the ring is this worker's.
                unsafe { self.values.read(self.isa, from, cut, blocks.clone(), &ring, (y, inner)) };
            }
            next = next.max(needed);
            for oy in first..end {
                let (mut taps, mut count) = ([Taps::NONE; MOST], 0);
                for ky in 0..kernel {
                    let y = (oy * stride + ky).wrapping_sub(conv.padding);
                    if y < height {
                        let weights = self.weights.at(ky * kernel * LANES);
                        taps[count] = Taps { input: ring.row(y), weights };
                        count += 1;
                    }
                }
                let to = self.y.at((image * output.size[0] + oy) * output.row());
                let row = Row {
                    cut,
                    rows: &taps[..count],
                    taps: kernel,
                    stride,
                    blocks: blocks.clone(),
                    input: ring.block(),
                    weights: conv.taps() * LANES,
                    to,
                    pixel: output.channels,
                    block: None,
                    width: output.size[1],
                };
                // SAFETY: the ring's rows are long enough; nobody else writes these outputs.
                unsafe { row.compute(self.isa) };
                if let Some(slots) = self.slots {
                    let mean = slots.at(part * 2 * cut.channels.padded());
                    let (blocks, width) = (blocks.clone(), output.size[1]);
                    self.measure(Measure { cut, blocks, y: to, width, rows: oy - rows.start, mean });
                }
            }
        }
    }

    #[inline(never)]
    fn measure(&self, row: Measure<'_>) {
        dispatch(self.isa, row);
    }
}

/// Adds a row's moments to those of `rows` of them.
struct Measure<'a> {
    cut: &'a Cut,
    blocks: Range<usize>,
    y: *const f32,
    width: usize,
    rows: usize,
    /// Of all blocks the mean, then the sum of squared differences from it.
    mean: *mut f32,
}

/// Pixels whose mean is near that of the row.
const FIRST: usize = 7;

impl Kernel for Measure<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { cut, width, rows, .. } = self;
        let first = FIRST.min(width);
        // Chan, Golub and LeVeque's formula.
        let share = 1.0 / (rows + 1) as f32;
        let between = V::splat((width * rows) as f32 * share);
        for block in self.blocks {
            let y = self.y.wrapping_add(cut.channels.start(block));
            let mean = self.mean.wrapping_add(block * LANES);
            let square = mean.wrapping_add(cut.channels.padded());
            // SAFETY: the row is inside the images, and the part has a slot, filled by the rows before.
            unsafe {
                let mut about = V::splat(0.0);
                for x in 0..first {
                    about = about.add(V::load(y.wrapping_add(x * cut.channels.0)));
                }
                let about = about.mul(V::splat(1.0 / first as f32));
                // Two sums, neither of which waits for the other.
                let (mut sums, mut squares) = ([V::splat(0.0); 2], [V::splat(0.0); 2]);
                for x in (0..width / 2 * 2).step_by(2) {
                    for (r, (sum, square)) in sums.iter_mut().zip(&mut squares).enumerate() {
                        let delta = V::load(y.wrapping_add((x + r) * cut.channels.0)).sub(about);
                        *sum = sum.add(delta);
                        *square = delta.mul_add(delta, *square);
                    }
                }
                if !width.is_multiple_of(2) {
                    let delta = V::load(y.wrapping_add((width - 1) * cut.channels.0)).sub(about);
                    sums[0] = sums[0].add(delta);
                    squares[0] = delta.mul_add(delta, squares[0]);
                }
                let sum = sums[0].add(sums[1]);
                let delta = sum.mul(V::splat(1.0 / width as f32));
                let squares = squares[0].add(squares[1]).sub(delta.mul(sum)).max(V::splat(0.0));
                let ours = delta.add(about);
                if rows == 0 {
                    ours.store(mean);
                    squares.store(square);
                } else {
                    let before = V::load(mean);
                    let delta = ours.sub(before);
                    delta.mul_add(V::splat(share), before).store(mean);
                    delta.mul(delta).mul_add(between, V::load(square).add(squares)).store(square);
                }
            }
        }
    }
}
