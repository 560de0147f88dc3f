//! Both gradients of a 1 x 1 convolution, `da = g W` and `dW = g^T a`, in one pass over memory: a part of the pixels at a
//! time, the derivative g finished where it is read, and the batch norm before the convolution begun where da is written.
//!
//! The parts are shared out among a few gradients of the weight, which are added up in the end.

use super::late::{Derivative, Gradients, Values};
use super::pointwise::{Inputs, Multiply, Pack, PackTask, Parts, Pointwise, STREAMED, steps};
use super::rows::{
    Ahead, Channels, NOTHING, Panels, all_sums, read_derivative, read_values, write_derivative, write_gated,
};
use super::{Address, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::winograd::odd;
use crate::error::Result;

/// Products that are added up before they join the sum so far, which keeps its rounding error small.
const CHUNK: usize = 128;
/// Floats of all gradients of the weight before they are added up, where there is a choice.
const MOST: usize = 1 << 18;
/// Outputs whose gradients are added up by one worker.
const ROWS: usize = 8;

impl Pointwise {
    /// The gradients that are asked for.
    ///
    /// # Arguments
    /// `derivative`: that of y; `dx`: where `values` have a norm, the unfinished derivative dz of what is read; `sums`: of
    /// that dz; `dweight`: `[outputs][inputs]`.
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
        self.check(values, weight);
        let Gradients { dx, sums, open, weight: dweight } = to;
        assert_eq!(derivative.d.len(), self.pixels * self.outputs, "floats of the derivative");
        derivative.check(self.pixels * self.outputs, self.outputs);
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == values.x.len()), "floats of dx");
        assert!(sums.is_none() || dx.is_some() && values.norm.is_some(), "sums are those of dz");
        assert!(dweight.as_ref().is_none_or(|dweight| dweight.len() == weight.len()), "floats of dweight");
        let gate = values.open.map(|open| open.factors.len());
        assert!(open.as_ref().is_none_or(|open| Some(open.len()) == gate), "floats of the gate");
        assert!(sums.is_none() || gate.is_none(), "a gate is between dz and what is computed");
        if dx.is_none() && dweight.is_none() && open.is_none() {
            return Ok(());
        }
        let (isa, workers) = (workspace.isa, workspace.threads.workers());
        let (ins, outs) = (Channels(self.inputs), Channels(self.outputs));
        let parts = Parts::new(self.pixels, values.open, 2 * self.inputs + self.outputs, isa.rows(), workers);
        // Several gradients per worker, so that none waits long for the last one; but they are memory to go through. As many
        // for each: of three, two workers would compute in the time of four.
        let most = (MOST / weight.len() / workers).clamp(1, 4) * workers;
        let tasks = if dweight.is_some() { most.min(parts.count) } else { parts.count };
        let panels = |channels, columns, row: usize| Panels { channels, columns, plane: row * columns * LANES };
        let plane = |columns| odd(parts.most() * columns * LANES);
        let job = Job {
            isa,
            conv: *self,
            parts,
            tasks,
            values,
            derivative,
            g: Panels { channels: outs, columns: 1, plane: plane(1) },
            a: Panels { channels: ins, columns: isa.columns(), plane: plane(isa.columns()) },
            packed: panels(ins, isa.columns(), self.outputs),
            gradient: panels(ins, isa.columns(), outs.padded()),
            past: values.norm.is_some() && values.open.is_none() && dx.as_ref().is_some_and(|dx| self.is_streamed(dx)),
            dx: dx.map(|dx| Address(dx.as_mut_ptr())),
            is_gated: open.is_some(),
            dweight: dweight.map(|dweight| Address(dweight.as_mut_ptr())),
            memory: Address(std::ptr::null_mut()),
        };
        let memory = Address(workspace.memory(job.begin()[3] + workers * job.own())?);
        let job = Job { memory, ..job };
        if job.has_da() {
            let pack = Pack { weight, columns: self.inputs, turned: true, panels: job.packed, to: memory };
            workspace.threads.run(job.packed.count(), &|panel, _| dispatch(isa, PackTask(&pack, panel)))?;
        }
        workspace.threads.run(tasks, &|task, worker| {
            job.run(task, memory.at(job.begin()[3] + worker * job.own()));
        })?;
        if let Some(sums) = sums {
            // SAFETY: the parts have filled them.
            let of_parts = unsafe { std::slice::from_raw_parts(memory.at(job.begin()[1]), parts.count * job.slot()) };
            *sums = all_sums(ins, of_parts);
        }
        if let Some(open) = open {
            for (image, open) in open.chunks_exact_mut(self.inputs).enumerate() {
                let first = image * parts.of_each * job.slot();
                // SAFETY: the parts have filled the first half of theirs.
                let of_parts = unsafe {
                    std::slice::from_raw_parts(memory.at(job.begin()[1] + first), parts.of_each * job.slot())
                };
                let sums = all_sums(ins, of_parts).plain;
                for (open, sum) in open.iter_mut().zip(sums) {
                    *open = sum as f32;
                }
            }
        }
        if job.dweight.is_some() {
            workspace.threads.run(self.outputs.div_ceil(ROWS), &|rows, _| dispatch(isa, Add { job: &job, rows }))?;
        }
        Ok(())
    }

    /// Whether dx has left the caches before it is read, and its pixels are whole cache lines.
    fn is_streamed(&self, dx: &[f32]) -> bool {
        let lines = self.inputs.is_multiple_of(LANES) && dx.as_ptr().addr().is_multiple_of(4 * LANES);
        lines && dx.len() >= STREAMED
    }
}

struct Job<'a> {
    isa: Isa,
    conv: Pointwise,
    parts: Parts,
    /// Each with a gradient of the weight, of neighbouring parts.
    tasks: usize,
    values: Values<'a>,
    derivative: Derivative<'a>,
    g: Panels,
    /// First of a, then of da.
    a: Panels,
    /// Of W, a row per output.
    packed: Panels,
    /// Of the weight's gradient, a row per channel of the outputs' blocks.
    gradient: Panels,
    dx: Option<Address>,
    /// Whether the derivative of the gate is asked for.
    is_gated: bool,
    /// Whether dx goes past the caches.
    past: bool,
    dweight: Option<Address>,
    memory: Address,
}

impl Job<'_> {
    /// Where in the memory W is, the sums of the parts, the tasks' gradients, and what each worker has for itself.
    fn begin(&self) -> [usize; 4] {
        let packed = if self.has_da() { self.packed.floats() } else { 0 };
        let sums = if self.has_da() && self.values.norm.is_some() { self.parts.count * self.slot() } else { 0 };
        let gradients = if self.dweight.is_some() { self.tasks * self.gradient.floats() } else { 0 };
        [0, packed, packed + sums, packed + sums + gradients]
    }

    fn has_da(&self) -> bool {
        self.dx.is_some() || self.is_gated
    }

    /// Floats of a worker's own: g and a.
    fn own(&self) -> usize {
        self.g.floats() + self.a.floats()
    }

    /// Sums of a part.
    fn slot(&self) -> usize {
        2 * self.a.channels.padded()
    }

    fn gradient(&self, task: usize) -> *mut f32 {
        self.memory.at(self.begin()[2] + task * self.gradient.floats())
    }

    /// What is read and written of the next pixels, while there are `count` to compute with.
    fn ahead(&self, count: usize, [first, next]: [usize; 2]) -> Ahead {
        let (conv, outs) = (self.conv, self.g.channels);
        let place = |of: &[f32], channels| (of.as_ptr().wrapping_add(first * channels), next * channels);
        let values = place(self.values.x, conv.inputs);
        let late = self.derivative.late.map_or(NOTHING, |late| place(late.x, conv.outputs));
        let written = match self.dx {
            Some(dx) if !self.past => (dx.at(first * conv.inputs).cast_const(), next * conv.inputs),
            _ => NOTHING,
        };
        let products = if self.has_da() { steps(self.isa, outs, &self.packed, count) } else { 0 };
        let sums =
            if self.dweight.is_some() { self.a.count() * outs.0.div_ceil(most_rows(self.isa)) * count } else { 0 };
        Ahead::new([values, place(self.derivative.d, conv.outputs), late, written], products + sums)
    }

    /// Neighbouring parts of the pixels; `room`: for g, a and da.
    fn run(&self, task: usize, room: *mut f32) {
        let (isa, all) = (self.isa, self.parts.count);
        let (begin, end) = (all * task / self.tasks, all * (task + 1) / self.tasks);
        let inputs = Inputs::new(&self.g);
        let da = room.wrapping_add(self.g.floats());
        for part in begin..end {
            let [first, count] = self.parts.range(part);
            let mut ahead = self.ahead(count, self.parts.range(part + 1));
            let ahead = &mut ahead;
            // SAFETY: `Pointwise::differentiate` has compared the lengths and made room; nobody else writes these pixels, sums
            // and gradient.
            unsafe {
                read_derivative(isa, self.derivative, first, count, &self.g, room);
                if self.dweight.is_some() {
                    read_values(isa, self.values, first, count, &self.a, da);
                    let to = self.gradient(task);
                    WeightGradient { job: self, room, count, to, first: part == begin, ahead }.add();
                }
                if !self.has_da() {
                    continue;
                }
                let dx = self.dx.map(|dx| dx.at(first * self.conv.inputs));
                let (inputs, weights, packed) = (&inputs, self.memory.0.cast_const(), &self.packed);
                if let Some(norm) = self.values.norm {
                    let outputs = Some(&self.a);
                    Multiply { from: room, inputs, weights, packed, count, to: da, outputs, ahead }.run(isa);
                    let x = self.values.x.as_ptr().wrapping_add(first * self.conv.inputs);
                    let sums = self.memory.at(self.begin()[1] + part * self.slot());
                    match dx {
                        _ if self.values.open.is_some() => write_gated(isa, (norm, x), count, &self.a, da, dx, sums),
                        Some(dx) => write_derivative(isa, (norm, x), count, &self.a, da, (dx, self.past), sums),
                        None => {}
                    }
                } else if let Some(dx) = dx {
                    Multiply { from: room, inputs, weights, packed, count, to: dx, outputs: None, ahead }.run(isa);
                }
            }
        }
    }
}

/// The gradient of the weight by the pixels of a part, or that added to it.
struct WeightGradient<'a> {
    job: &'a Job<'a>,
    room: *const f32,
    count: usize,
    to: *mut f32,
    first: bool,
    ahead: &'a mut Ahead,
}

impl WeightGradient<'_> {
    /// # Safety
    /// g and a of `count` pixels are at `room`; nobody else has this gradient.
    #[inline(never)]
    unsafe fn add(self) {
        dispatch(self.job.isa, self);
    }
}

impl Kernel for WeightGradient<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { job: Job { g, a, gradient, .. }, room, count: all, to, first, ahead } = self;
        let outs = g.channels;
        for start in (0..all).step_by(CHUNK) {
            let count = CHUNK.min(all - start);
            for panel in 0..a.count() {
                let columns = a.blocks(panel);
                let width = columns * LANES;
                let of_panel = room.wrapping_add(g.floats() + panel * a.plane + start * width);
                for block in 0..outs.blocks() {
                    // The block before has the first channels of the last one.
                    let mut lane = if block + 1 == outs.blocks() { outs.twice() } else { 0 };
                    while lane < LANES {
                        let rows = largest::<V>(LANES - lane);
                        let (later, later_lines) = ahead.take(count);
                        let products = Products {
                            g: room.wrapping_add(block * g.plane + start * LANES + lane),
                            a: of_panel,
                            count,
                            to: to.wrapping_add(panel * gradient.plane + (block * LANES + lane) * width),
                            add: !first || start > 0,
                            later,
                            later_lines,
                        };
                        // SAFETY: the promise to `WeightGradient::add`.
                        unsafe { products.sum::<V>(rows, columns) };
                        lane += rows;
                    }
                }
            }
        }
    }
}

/// Rows of [`Products`], bounded by the number of registers.
fn most_rows(isa: Isa) -> usize {
    if isa.columns() > 1 { 8 } else { 6 }
}

/// The largest microkernel of [`Products`] for so many rows.
#[inline(always)]
fn largest<V: Lanes>(rows: usize) -> usize {
    match rows {
        8.. if V::WIDE => 8,
        6.. if !V::WIDE => 6,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Sums of products over pixels, of some floats of g with blocks of a.
struct Products {
    /// Sixteen floats from one pixel to the next.
    g: *const f32,
    /// A panel.
    a: *const f32,
    count: usize,
    /// One row per float of g, as wide as the panel.
    to: *mut f32,
    /// Whether there are sums already.
    add: bool,
    /// What is needed later, of which each pixel asks for so many cache lines.
    later: *const f32,
    later_lines: usize,
}

impl Products {
    /// # Safety
    /// The addresses are valid for so many rows, one of [`largest`], and columns, at most what there are registers for.
    #[inline(always)]
    unsafe fn sum<V: Lanes>(&self, rows: usize, columns: usize) {
        macro_rules! sizes {
            ($c:literal) => {
                match rows {
                    1 => self.fixed::<V, 1, $c>(),
                    2 => self.fixed::<V, 2, $c>(),
                    4 => self.fixed::<V, 4, $c>(),
                    _ if V::WIDE => self.fixed::<V, 8, $c>(),
                    _ => self.fixed::<V, 6, $c>(),
                }
            };
        }
        // SAFETY: the caller's promise.
        unsafe {
            match columns {
                2 if V::WIDE => sizes!(2),
                _ => sizes!(1),
            }
        }
    }

    /// # Safety
    /// As for [`Self::sum`].
    #[inline(always)]
    unsafe fn fixed<V: Lanes, const R: usize, const C: usize>(&self) {
        let mut sums = [[V::splat(0.0); C]; R];
        for block in 0..R * C {
            V::prefetch(self.to.wrapping_add(block * LANES));
        }
        // SAFETY: the caller's promise.
        unsafe {
            for pixel in 0..self.count {
                let g = self.g.wrapping_add(pixel * LANES);
                for line in pixel * self.later_lines..(pixel + 1) * self.later_lines {
                    V::prefetch_l2(self.later.wrapping_add(line * LANES));
                }
                let mut a = [V::splat(0.0); C];
                for (c, a) in a.iter_mut().enumerate() {
                    *a = V::load(self.a.wrapping_add((pixel * C + c) * LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let g = V::splat(*g.wrapping_add(r));
                    for (sum, a) in sums.iter_mut().zip(a) {
                        *sum = g.mul_add(a, *sum);
                    }
                }
            }
            for (block, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                let to = self.to.wrapping_add(block * LANES);
                if self.add {
                    *sum = sum.add(V::load(to));
                }
                sum.store(to);
            }
        }
    }
}

/// The sum of the tasks' gradients, of some outputs.
struct Add<'a> {
    job: &'a Job<'a>,
    rows: usize,
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { job, rows } = self;
        let Some(dweight) = job.dweight else { return };
        let (ins, outs) = (job.a.channels, job.g.channels);
        for n in rows * ROWS..outs.0.min((rows + 1) * ROWS) {
            for block in 0..ins.blocks() {
                let [place, stride] = job.gradient.place(block);
                let at = place + outs.place(n) * stride;
                // SAFETY: the tasks have filled their gradients; this row is nobody else's.
                unsafe {
                    let mut sum = V::load(job.gradient(0).wrapping_add(at));
                    for task in 1..job.tasks {
                        sum = sum.add(V::load(job.gradient(task).wrapping_add(at)));
                    }
                    sum.store(dweight.at(n * ins.0 + ins.start(block)));
                }
            }
        }
    }
}
