//! The gradients of a depthwise convolution's input and filters, both in one pass over memory.
//!
//! With a stride of 2 the input's pixels have four phases: even and odd rows and columns, each with taps of its own.

use std::ops::Range;

use super::depthwise::{Depthwise, MOST};
use super::depthwise_rows::{Cut, Reader, Ring, STRIP, Share, ahead};
use super::depthwise_taps::{Row, Taps};
use super::late::{Derivative, Gradients, Norm, Sums, Values};
use super::{Address, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::error::Result;

impl Depthwise {
    /// The gradients of what is asked for: of the input or, if the values are those of a norm, of its z (with `sums`); and
    /// of the filters, `[channels][kernel][kernel]` as `weight`.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn differentiate(
        &self,
        values: Values<'_>,
        weight: &[f32],
        derivative: Derivative<'_>,
        to: Gradients<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Gradients { dx, sums, open, weight: dweight } = to;
        let (output, channels, taps) = (self.output(), self.input.channels, self.taps());
        assert!(self.is_known(), "{self:?}");
        assert_eq!((values.x.len(), derivative.d.len()), (self.input.floats(), output.floats()), "floats of images");
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == self.input.floats()), "floats of the input's gradient");
        let filters = [Some(weight.len()), dweight.as_ref().map(|dweight| dweight.len())];
        assert!(filters.iter().flatten().all(|&len| len == taps * channels), "floats of the filters");
        assert!(sums.is_none() || values.norm.is_some() && dx.is_some(), "sums of what is not computed");
        assert!(values.open.is_none() && open.is_none(), "no kernel behind a gate");
        values.check(channels);
        derivative.check(output.floats(), channels);

        let (for_input, for_filters) = (dx.is_some(), dweight.is_some());
        let g = self.columns();
        let a_width = (output.size[1] - 1) * self.stride + self.kernel;
        let rows = |step: usize| {
            let a = if for_filters { (step - 1) * self.stride + self.kernel } else { 0 };
            [if for_input { step + (self.kernel - 1) / self.stride } else { step }, a]
        };
        let workers = workspace.threads.workers();
        let waiting = usize::from(for_input && values.norm.is_some());
        let floats = |step: usize, blocks: usize| {
            let rings = Ring::floats(rows(step)[0], g.width, blocks) + Ring::floats(rows(step)[1], a_width, blocks);
            rings + Ring::floats(waiting, self.input.size[1], blocks)
        };
        let cut = Cut::new(self, workers, |step| floats(step, 1));
        let ring = floats(cut.step, cut.widest());
        // Every part's gradients of the filters, and its two sums.
        let slot = (if for_filters { taps } else { 0 } + 2) * cut.channels.padded();
        let arranged = taps * cut.channels.padded();
        let memory = Address(workspace.memory(arranged + workers * ring + cut.parts() * slot)?);
        let slots = Address(memory.at(arranged + workers * ring));
        let [g_rows, a_rows] = rows(cut.step);
        let job = Job {
            conv: *self,
            values: Reader::of(values),
            derivative: Reader::derivative(derivative),
            weights: memory,
            rings: Address(memory.at(arranged)),
            ring,
            columns: g,
            g_rows,
            a_rows,
            a_width,
            dx: dx.map(|dx| Address(dx.as_mut_ptr())),
            for_filters,
            slots,
            slot,
            cut,
            isa: workspace.isa,
        };
        if for_input {
            // SAFETY: there is room for them.
            unsafe { self.arrange(&cut, weight, memory, |tap| self.place(tap)) };
        }
        workspace.threads.run(cut.tasks(), &|task, worker| job.run(task, worker))?;
        // SAFETY: all tasks have filled theirs.
        let slots = unsafe { std::slice::from_raw_parts(slots.0, cut.parts() * slot) };
        if let Some(sums) = sums {
            let part = |at: usize| {
                slots
                    .chunks_exact(slot)
                    .map(move |slot| &slot[slot.len() - at * cut.channels.padded()..][..cut.channels.padded()])
            };
            *sums =
                Sums { plain: total(cut.channels.padded(), part(2)), product: total(cut.channels.padded(), part(1)) };
            for of in [&mut sums.plain, &mut sums.product] {
                of.drain(cut.twice());
            }
        }
        if let Some(dweight) = dweight {
            let to = Address(dweight.as_mut_ptr());
            workspace.threads.run(cut.channels.blocks(), &|block, _| {
                for tap in 0..taps {
                    let sums = total(
                        LANES,
                        slots
                            .chunks_exact(slot)
                            .map(|slot| &slot[tap * cut.channels.padded() + block * LANES..][..LANES]),
                    );
                    for (at, sum) in (block * LANES..).zip(sums) {
                        if !cut.twice().contains(&at) {
                            // SAFETY: a filter's tap, whose number `differentiate` has compared; no other task has it.
                            unsafe { to.at((cut.channels.start(block) + at % LANES) * taps + tap).write(sum as f32) };
                        }
                    }
                }
            })?;
        }
        Ok(())
    }

    fn columns(&self) -> Columns {
        let (mut before, mut end) = (0, 0);
        for phase in (0..self.stride).map(|phase| self.phase(phase)) {
            before = before.max(-phase.offset);
            end = end.max(phase.offset + (phase.width + phase.taps).cast_signed() - 1);
        }
        let end = end.max(self.output().size[1].cast_signed());
        Columns { width: (before + end).cast_unsigned(), border: before.cast_unsigned() }
    }

    fn phase(&self, phase: usize) -> Phase {
        let (k, s) = (self.kernel, self.stride);
        let first = (phase + self.padding) % s;
        let taps = (k - first).div_ceil(s);
        let last = first + s * (taps - 1);
        // Both have the same remainder.
        let offset = ((phase + self.padding).cast_signed() - last.cast_signed()) / s.cast_signed();
        Phase { first, taps, offset, width: self.input.size[1].saturating_sub(phase).div_ceil(s) }
    }

    /// Where a tap's weights are: those of a phase behind each other, the last column first.
    fn place(&self, tap: usize) -> usize {
        let (k, s) = (self.kernel, self.stride);
        let (row, column) = (tap / k, tap % k);
        let phase = column % s;
        let before = (0..phase).map(|phase| (k - phase).div_ceil(s)).sum::<usize>();
        row * k + before + (k - phase).div_ceil(s) - 1 - column / s
    }
}

/// Sums over all parts, in their order.
fn total<'a>(len: usize, parts: impl Iterator<Item = &'a [f32]>) -> Vec<f64> {
    let mut sums = vec![0.0; len];
    for part in parts {
        for (sum, &value) in sums.iter_mut().zip(part) {
            *sum += f64::from(value);
        }
    }
    sums
}

/// A row of the output's derivative with the zeros that the input's gradient needs.
#[derive(Clone, Copy)]
struct Columns {
    width: usize,
    border: usize,
}

/// Every `stride`th column of the input.
struct Phase {
    /// The first of a filter's columns that reach it.
    first: usize,
    taps: usize,
    /// Where in the output the first tap of the first pixel is.
    offset: isize,
    width: usize,
}

/// What the tasks read, and where they write.
struct Job<'a> {
    conv: Depthwise,
    cut: Cut,
    isa: Isa,
    values: Reader<'a>,
    derivative: Reader<'a>,
    weights: Address,
    /// Per worker that many floats: two rings and a row of the input's gradient.
    rings: Address,
    ring: usize,
    columns: Columns,
    g_rows: usize,
    a_rows: usize,
    a_width: usize,
    dx: Option<Address>,
    for_filters: bool,
    /// A slot of so many floats per part.
    slots: Address,
    slot: usize,
}

impl Job<'_> {
    /// A band of outputs, and of the inputs in its place.
    fn run(&self, task: usize, worker: usize) {
        let (conv, cut, output, isa) = (&self.conv, &self.cut, self.conv.output(), self.isa);
        let (kernel, stride, p, [height, width]) = (conv.kernel, conv.stride, conv.padding, conv.input.size);
        let [out_height, out_width] = output.size;
        let Share { part, image, rows, blocks } = cut.share(task);
        let room = self.rings.at(worker * self.ring);
        let g = Ring {
            at: room,
            rows: self.g_rows,
            width: self.columns.width,
            border: self.columns.border,
            blocks: blocks.len(),
        };
        let a_at = room.wrapping_add(Ring::floats(g.rows, g.width, g.blocks));
        let a = Ring { at: a_at, rows: self.a_rows, width: self.a_width, border: p, ..g };
        let waiting = a_at.wrapping_add(Ring::floats(a.rows, a.width, a.blocks));
        let inner = width.min(a.width - p.min(a.width));
        let slot = self.slots.at(part * self.slot);
        // SAFETY: every worker has both rings, every part a slot, and every task its blocks' place in it.
        unsafe {
            g.clear(out_width);
            a.clear(inner);
            for sum in 0..self.slot / cut.channels.padded() {
                let of_task = slot.wrapping_add(sum * cut.channels.padded() + blocks.start * LANES);
                of_task.write_bytes(0, blocks.len() * LANES);
            }
        }
        let mut next_x = (rows.start * stride).saturating_sub(p);
        let mut next_a = next_x;
        let mut next_g = match self.dx {
            Some(_) => rows.start.saturating_sub((kernel - 1) / stride),
            None => rows.start,
        };
        for oy in rows.clone().step_by(cut.step) {
            let end = rows.end.min(oy + cut.step);
            for y in next_g..end {
                let from = (image * out_height + y) * output.row();
                // SAFETY: inside the images, whose lengths `differentiate` has compared; the ring is this worker's.
                unsafe { self.derivative.read(isa, from, cut, blocks.clone(), &g, (y, out_width)) };
            }
            next_g = end;
            if self.for_filters {
                let needed = ((end - 1) * stride + kernel).saturating_sub(p).min(height);
                for y in next_a..needed {
                    let from = (image * height + y) * conv.input.row();
                    // SAFETY: as above.
                    unsafe { self.values.read(isa, from, cut, blocks.clone(), &a, (y, inner)) };
                }
                next_a = next_a.max(needed);
                let filters = Filters { conv, cut, g: &g, a: &a, rows: oy..end, blocks: blocks.clone(), to: slot };
                // SAFETY: the rings have the rows, and the slot has room.
                unsafe { filters.add(isa) };
            }
            // Inputs whose derivative no later output has a part in.
            let end_x = if end == out_height { height } else { (end * stride).saturating_sub(p).min(height) };
            if let Some(dx) = self.dx {
                for y in next_x..end_x {
                    let at = (image * height + y) * conv.input.row();
                    // SAFETY: the ring has the rows, the worker a row, and nobody else writes these inputs.
                    unsafe { self.input(y, &g, blocks.clone(), [dx.at(at), waiting], at, slot) };
                }
            }
            next_x = next_x.max(end_x);
        }
    }

    /// A row of the input's gradient, or of its norm's z.
    ///
    /// # Safety
    /// The ring has the rows of outputs that see it; the row of the gradient begins at `dx` and that of the input `at` floats
    /// behind the first; there is room for a row at `waiting`, and for the sums in the part's slot.
    unsafe fn input(
        &self,
        y: usize,
        g: &Ring,
        blocks: Range<usize>,
        [dx, waiting]: [*mut f32; 2],
        at: usize,
        slot: *mut f32,
    ) {
        let (conv, cut) = (&self.conv, &self.cut);
        let Depthwise { kernel, stride, padding, .. } = *conv;
        let (channels, width) = (conv.input.channels, conv.input.size[1]);
        let norm = self.values.norm;
        let (to, pixel, block) = match norm {
            Some(_) => (waiting, LANES, Some(width * LANES)),
            None => (dx, channels, None),
        };
        for phase in 0..stride {
            let Phase { first, taps, offset, width } = conv.phase(phase);
            // Weights of even columns come first.
            let before = if first == 0 { 0 } else { kernel.div_ceil(2) };
            let (mut rows, mut count) = ([Taps::NONE; MOST], 0);
            for ky in 0..kernel.min(y + padding + 1) {
                let above = y + padding - ky;
                if above.is_multiple_of(stride) && above / stride < conv.output().size[0] {
                    let input = g.pixels(above / stride).wrapping_offset(offset * LANES.cast_signed());
                    rows[count] = Taps { input, weights: self.weights.at((ky * kernel + before) * LANES) };
                    count += 1;
                }
            }
            let row = Row {
                cut,
                rows: &rows[..count],
                taps,
                stride: 1,
                blocks: blocks.clone(),
                input: g.block(),
                weights: conv.taps() * LANES,
                to: to.wrapping_add(phase * pixel),
                pixel: stride * pixel,
                block,
                width,
            };
            // SAFETY: the caller's promise; the rows' borders are wide enough for the filter.
            unsafe { row.compute(self.isa) };
        }
        if let Some(norm) = norm {
            // The slot's last two.
            let sums = slot.wrapping_add(self.slot - 2 * cut.channels.padded());
            let x = self.values.x.wrapping_add(at);
            self.begin(Begin { norm, cut, blocks, width, da: waiting, x, dx, sums });
        }
    }

    #[inline(never)]
    fn begin(&self, row: Begin<'_>) {
        dispatch(self.isa, row);
    }
}

/// dz of a row, from the derivatives of act(z), `[block][pixel][16]`.
struct Begin<'a> {
    norm: &'a Norm,
    cut: &'a Cut,
    blocks: Range<usize>,
    width: usize,
    da: *const f32,
    x: *const f32,
    dx: *mut f32,
    /// Of all blocks those of dz, then those of dz (x - mean).
    sums: *mut f32,
}

impl Kernel for Begin<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { cut, width, .. } = self;
        // Through memory in its order, or nearly so.
        for first in (0..width).step_by(STRIP) {
            for (at, block) in self.blocks.clone().enumerate() {
                let start = cut.channels.start(block);
                let plain = self.sums.wrapping_add(block * LANES);
                let product = plain.wrapping_add(cut.channels.padded());
                // SAFETY: the promise to `Job::input`.
                unsafe {
                    let norm = self.norm.lanes::<V>(start);
                    let (mut s, mut t) = (V::splat(0.0), V::splat(0.0));
                    for x in first..width.min(first + STRIP) {
                        let place = x * cut.channels.0 + start;
                        let da = V::load(self.da.wrapping_add((at * width + x) * LANES));
                        let [centred, dz] = norm.derivative(V::load(self.x.wrapping_add(place)), da);
                        ahead::<V>(self.dx.wrapping_add(place));
                        dz.store(self.dx.wrapping_add(place));
                        (s, t) = (s.add(dz), centred.mul_add(dz, t));
                    }
                    V::load(plain).add(s).store(plain);
                    V::load(product).add(t).store(product);
                }
            }
        }
    }
}

/// The products of some rows of outputs with their inputs, which are added to those of other rows.
struct Filters<'a> {
    conv: &'a Depthwise,
    cut: &'a Cut,
    g: &'a Ring,
    a: &'a Ring,
    rows: Range<usize>,
    blocks: Range<usize>,
    /// `[tap]` of all blocks.
    to: *mut f32,
}

impl Filters<'_> {
    /// # Safety
    /// The rings have the rows, and the sums are there.
    #[inline(never)]
    unsafe fn add(&self, isa: Isa) {
        match (self.conv.kernel, self.conv.stride) {
            _ if isa == Isa::Portable => dispatch(isa, FiltersOfSize::<1, 0>(self)),
            (3, 1) => dispatch(isa, FiltersOfSize::<3, 1>(self)),
            (3, _) => dispatch(isa, FiltersOfSize::<3, 2>(self)),
            (5, 1) => dispatch(isa, FiltersOfSize::<5, 1>(self)),
            (5, _) => dispatch(isa, FiltersOfSize::<5, 2>(self)),
            _ => dispatch(isa, FiltersOfSize::<7, 1>(self)),
        }
    }
}

/// `T` taps of a row at a time; of any stride, if `S` is 0.
struct FiltersOfSize<'a, const T: usize, const S: usize>(&'a Filters<'a>);

impl<const T: usize, const S: usize> Kernel for FiltersOfSize<'_, T, S> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // Code for known sizes is for fast lanes, the other one for all others.
        if V::FAST != (S > 0) {
            return;
        }
        let Filters { conv, cut, g, a, rows, blocks, to } = self.0;
        let (kernel, stride) = if S > 0 { (T, S) } else { (conv.kernel, conv.stride) };
        let width = conv.output().size[1];
        for (at, block) in blocks.clone().enumerate() {
            for first in (0..conv.taps()).step_by(T) {
                let (ky, column) = (first / kernel, first % kernel);
                let mut sums = [V::splat(0.0); T];
                for oy in rows.clone() {
                    let y = (oy * stride + ky).wrapping_sub(conv.padding);
                    if y >= conv.input.size[0] {
                        continue;
                    }
                    let d = g.pixels(oy).wrapping_add(at * g.block()).cast_const();
                    let input = a.row(y).wrapping_add(at * a.block() + column * LANES).cast_const();
                    for x in 0..width {
                        // SAFETY: the promise to `Filters::add`.
                        unsafe {
                            let d = V::load(d.wrapping_add(x * LANES));
                            for (kx, sum) in sums.iter_mut().enumerate() {
                                *sum = V::load(input.wrapping_add((x * stride + kx) * LANES)).mul_add(d, *sum);
                            }
                        }
                    }
                }
                for (kx, sum) in sums.iter().enumerate() {
                    let to = to.wrapping_add((first + kx) * cut.channels.padded() + block * LANES);
                    // SAFETY: the promise to `Filters::add`.
                    unsafe { V::load(to).add(*sum).store(to) };
                }
            }
        }
    }
}
