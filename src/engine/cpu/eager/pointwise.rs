//! A 1 x 1 convolution of stride 1: `y = a W^T`, the batch norm before it and the statistics for the one behind it on the way.
//!
//! A part of the pixels at a time goes all the way, so that what is gone over twice is still in the second-level cache.

use super::late::{Moments, Open, Values};
use super::rows::{Ahead, Channels, NOTHING, Panels, all_moments, moments, read_values, stream};
use super::{Address, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::engine::cpu::common::winograd::odd;
use crate::error::Result;

/// Floats of a part.
const PART: usize = if cfg!(test) { 1 << 12 } else { 1 << 16 };
/// Pixels of a part at least.
const LEAST: usize = 32;
/// An output of so many floats has left the caches before it is read.
pub(super) const STREAMED: usize = if cfg!(test) { 1 << 12 } else { 5 << 20 };

/// Sizes of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Pointwise {
    pub pixels: usize,
    pub inputs: usize,
    pub outputs: usize,
}

impl Pointwise {
    /// Whether there is code for these sizes.
    pub fn is_known(&self) -> bool {
        self.pixels > 0 && self.inputs >= LANES && self.outputs >= LANES
    }

    /// y from `weight`, `[outputs][inputs]`.
    ///
    /// # Arguments
    /// `y`: all of it is written; `moments`: those of y.
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
        self.check(values, weight);
        assert_eq!(y.len(), self.pixels * self.outputs, "floats of y");
        let (isa, workers) = (workspace.isa, workspace.threads.workers());
        let (ins, outs) = (Channels(self.inputs), Channels(self.outputs));
        let parts = Parts::new(self.pixels, values.open, self.inputs + self.outputs, isa.rows(), workers);
        let packed = Panels { channels: outs, columns: isa.columns(), plane: self.inputs * isa.columns() * LANES };
        let a = Panels { channels: ins, columns: 1, plane: odd(parts.most() * LANES) };
        let streamed = y.len() >= STREAMED;
        let own = a.floats() + if streamed { (parts.most() * self.outputs).next_multiple_of(LANES) } else { 0 };
        let tasks = parts.count.min(4 * workers);
        let slots = if moments.is_some() { parts.count * 2 * outs.padded() } else { 0 };
        let memory = Address(workspace.memory(packed.floats() + slots + workers * own)?);
        let (to_slots, room) = (Address(memory.at(packed.floats())), Address(memory.at(packed.floats() + slots)));
        let sums = moments.is_some().then_some(to_slots);
        let pack = Pack { weight, columns: self.inputs, turned: false, panels: packed, to: memory };
        workspace.threads.run(packed.count(), &|panel, _| dispatch(isa, PackTask(&pack, panel)))?;
        let y = Address(y.as_mut_ptr());
        let job = Job { isa, conv: *self, parts, tasks, streamed, values, a, packed, weights: memory, y, sums };
        workspace.threads.run(tasks, &|task, worker| {
            job.run(task, room.at(worker * own));
        })?;
        if let Some(moments) = moments {
            // SAFETY: the parts have filled them.
            let sums = unsafe { std::slice::from_raw_parts(to_slots.0, slots) };
            *moments = all_moments(outs, sums, |part| parts.range(part)[1]);
        }
        Ok(())
    }

    pub(super) fn check(&self, values: Values<'_>, weight: &[f32]) {
        assert!(self.is_known(), "{self:?}");
        assert_eq!(values.x.len(), self.pixels * self.inputs, "floats of x");
        assert_eq!(weight.len(), self.inputs * self.outputs, "floats of the weight");
        values.check(self.inputs);
    }
}

/// Parts of the pixels, the same for whatever thread computes them: whole microkernels of `rows` pixels, but for the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    /// Pixels of an image where every part is to be of one, else of all images.
    pixels: usize,
    rows: usize,
    /// Parts of these pixels.
    pub of_each: usize,
    pub count: usize,
}

impl Parts {
    /// `width`: floats per pixel that are to stay in the cache.
    pub fn new(all: usize, open: Option<Open<'_>>, width: usize, rows: usize, workers: usize) -> Self {
        let pixels = open.map_or(all, |open| open.pixels);
        let images = all / pixels;
        // Of a large weight all is read for every part; several per worker, so that none waits long for the last one.
        let most = (PART / width).max(LEAST).min(all.div_ceil(4 * workers));
        let units = pixels.div_ceil(rows);
        let even = if images == 1 { workers } else { 1 };
        let of_each = units.div_ceil((most / rows).max(1)).next_multiple_of(even).min(units);
        Self { pixels, rows, of_each, count: images * of_each }
    }

    /// Pixels of the largest part.
    pub fn most(&self) -> usize {
        self.pixels.div_ceil(self.rows).div_ceil(self.of_each) * self.rows
    }

    /// The first pixel of a part, and how many there are; none beyond the last.
    #[inline(always)]
    pub fn range(&self, part: usize) -> [usize; 2] {
        if part >= self.count {
            return [0, 0];
        }
        let (image, part, units) = (part / self.of_each, part % self.of_each, self.pixels.div_ceil(self.rows));
        let start = |part: usize| (units * part / self.of_each * self.rows).min(self.pixels);
        [image * self.pixels + start(part), start(part + 1) - start(part)]
    }
}

/// The matrix in the order in which microkernels use it: panels of rows that are one input each.
pub(super) struct Pack<'a> {
    pub weight: &'a [f32],
    /// Floats of a row of the weight.
    pub columns: usize,
    /// Whether the rows of the weight are the inputs, not the outputs.
    pub turned: bool,
    pub panels: Panels,
    pub to: Address,
}

/// A panel of it.
pub(super) struct PackTask<'a>(pub &'a Pack<'a>, pub usize);

impl Kernel for PackTask<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self(Pack { weight, columns, turned, panels, to }, panel) = self;
        let channels = panels.channels;
        let first = panel * panels.columns;
        for block in first..first + panels.blocks(panel) {
            let (start, [place, stride]) = (channels.start(block), panels.place(block));
            let to = to.at(place);
            if *turned {
                for (i, row) in weight.chunks_exact(*columns).enumerate() {
                    let row = &row[start..start + LANES];
                    // SAFETY: sixteen floats, and the panels have room for all.
                    unsafe { V::load(row.as_ptr()).store(to.wrapping_add(i * stride)) };
                }
                continue;
            }
            let ins = Channels(*columns);
            for i in (0..ins.blocks()).map(|i| ins.start(i)) {
                let mut rows = [V::splat(0.0); LANES];
                for (lane, row) in rows.iter_mut().enumerate() {
                    let weight = &weight[(start + lane) * columns + i..][..LANES];
                    // SAFETY: sixteen floats.
                    *row = unsafe { V::load(weight.as_ptr()) };
                }
                for (i, column) in (i..).zip(V::transpose(rows)) {
                    // SAFETY: the panels have room for all.
                    unsafe { column.store(to.wrapping_add(i * stride)) };
                }
            }
        }
    }
}

/// Rows of inputs in panels of one block.
pub(super) struct Inputs {
    /// Where the blocks are.
    offsets: Vec<usize>,
    /// Floats of the last block that are not in the one before.
    last: usize,
}

impl Inputs {
    pub fn new(p: &Panels) -> Self {
        let channels = p.channels;
        let mut offsets: Vec<usize> = (0..channels.blocks()).map(|block| block * p.plane).collect();
        if let Some(last) = offsets.last_mut() {
            *last += channels.twice();
        }
        Self { offsets, last: LANES - channels.twice() }
    }
}

/// Microkernels of [`Multiply`], times their blocks of inputs.
pub(super) fn steps(isa: Isa, ins: Channels, packed: &Panels, count: usize) -> usize {
    packed.count() * count.div_ceil(isa.rows()) * ins.blocks()
}

const fn rows<V: Lanes>() -> usize {
    if V::WIDE { 14 } else { 6 }
}

/// The products of `count` rows of inputs with a packed matrix.
pub(super) struct Multiply<'a> {
    pub from: *const f32,
    pub inputs: &'a Inputs,
    pub weights: *const f32,
    pub packed: &'a Panels,
    pub count: usize,
    pub to: *mut f32,
    /// The panels they go to, None for rows as they lie in memory.
    pub outputs: Option<&'a Panels>,
    /// Of as many steps as [`steps`] says.
    pub ahead: &'a mut Ahead,
}

impl Multiply<'_> {
    /// # Safety
    /// The inputs are as `inputs` says, and there is room for the outputs.
    #[inline(never)]
    pub unsafe fn run(self, isa: Isa) {
        dispatch(isa, self);
    }
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { from, inputs, weights, packed, count, to, outputs, ahead } = self;
        let channels = packed.channels;
        let rows = rows::<V>();
        for panel in 0..packed.count() {
            let (block, columns) = (panel * packed.columns, packed.blocks(panel));
            let start = channels.start(block);
            let ([place, output_stride], output_block) = match outputs {
                Some(panels) => (panels.place(block), LANES),
                None => ([start, channels.0], channels.start(block + columns - 1) - start),
            };
            for first in (0..count).step_by(rows) {
                let (later, later_lines) = ahead.take(inputs.offsets.len());
                let job = Tile {
                    input: from.wrapping_add(first * LANES),
                    stride: LANES,
                    offsets: &inputs.offsets,
                    len: LANES,
                    short: 1,
                    short_len: inputs.last,
                    weights: weights.wrapping_add(panel * packed.plane),
                    later,
                    later_lines,
                    output: to.wrapping_add(place + first * output_stride),
                    output_stride,
                    output_block,
                    bias: std::ptr::null(),
                    residual: std::ptr::null(),
                    residual_stride: 0,
                    residual_block: 0,
                    activation: Activate::Nothing,
                };
                // SAFETY: the promise to `Multiply::run`.
                unsafe { tile::<V, false>(rows.min(count - first), columns, &job) };
            }
        }
    }
}

struct Job<'a> {
    isa: Isa,
    conv: Pointwise,
    parts: Parts,
    tasks: usize,
    streamed: bool,
    values: Values<'a>,
    a: Panels,
    packed: Panels,
    weights: Address,
    y: Address,
    /// Where the moments of the parts go.
    sums: Option<Address>,
}

impl Job<'_> {
    /// Neighbouring parts of the pixels; `room`: for a, and for y that is streamed.
    fn run(&self, task: usize, room: *mut f32) {
        let Self { isa, conv, parts, tasks, streamed, values, a, packed, weights, y, sums } = self;
        let (begin, end) = (parts.count * task / tasks, parts.count * (task + 1) / tasks);
        let inputs = Inputs::new(a);
        for part in begin..end {
            let [first, count] = parts.range(part);
            let y = y.at(first * conv.outputs);
            let next = parts.range(part + 1);
            let x = (values.x.as_ptr().wrapping_add(next[0] * conv.inputs), next[1] * conv.inputs);
            let to = if *streamed { room.wrapping_add(a.floats()) } else { y };
            let rows =
                (y.wrapping_add(count * conv.outputs).cast_const(), if *streamed { 0 } else { next[1] * conv.outputs });
            let mut ahead = Ahead::new([x, rows, NOTHING, NOTHING], steps(*isa, a.channels, packed, count));
            let (inputs, weights, ahead) = (&inputs, weights.0, &mut ahead);
            let products = Multiply { from: room, inputs, weights, packed, count, to, outputs: None, ahead };
            // SAFETY: `Pointwise::run` has compared the lengths and made room; nobody else writes these pixels and sums.
            unsafe {
                read_values(*isa, *values, first, count, a, room);
                products.run(*isa);
                if let Some(sums) = sums {
                    moments(*isa, packed.channels, to, count, sums.at(part * 2 * packed.channels.padded()));
                }
                if *streamed {
                    stream(*isa, to, y, count * conv.outputs);
                }
            }
        }
    }
}
