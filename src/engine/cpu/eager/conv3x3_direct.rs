//! A 3 x 3 convolution of stride 1 summed directly, for images of few pixels and for few images: a tile of Winograd's would be
//! mostly empty, or the transforms of many filters more work than all products.
//!
//! Outputs that the same taps reach are computed together, whichever pixel and image they are of; what lies outside the images
//! costs nothing.
//!
//! ```text
//! A = [group of outputs][tap][in / 16][rows][16]      what the microkernel reads, in its order
//! W = [tap][in][columns * 16]                         filters of one panel, which never leave the worker's cache
//! ```

use std::ops::Range;

use super::conv3x3::{Conv3x3, Filters};
use super::{Address, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::error::Result;

/// Floats that one worker has copied before others have woken up.
pub(super) const ALONE: usize = 1 << 15;

/// Neighbouring outputs on one axis that the same taps reach.
#[derive(Debug, Clone)]
pub(super) struct Span {
    pub taps: Range<usize>,
    pub outputs: Range<usize>,
}

impl Span {
    /// All of an axis with so many inputs.
    pub fn all(side: usize, padding: usize) -> Vec<Self> {
        let mut spans: Vec<Self> = Vec::new();
        for at in 0..side + 2 * padding - 2 {
            let taps = padding.saturating_sub(at)..(side + padding - at).min(3);
            match spans.last_mut() {
                Some(last) if last.taps == taps => last.outputs.end = at + 1,
                _ => spans.push(Self { taps, outputs: at..at + 1 }),
            }
        }
        spans
    }
}

impl Conv3x3 {
    /// [`Self::run`] by direct sums.
    pub(super) fn run_direct(
        &self,
        input: &[f32],
        filters: Filters<'_>,
        bias: &[f32],
        output: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check(input, filters, bias, output);
        let (isa, workers) = (workspace.isa, workspace.threads.workers());
        let plan = Plan::new(*self, isa, workers);
        let memory = Address(workspace.memory(plan.a_len() + workers * plan.own())?);
        let job =
            Job { plan: &plan, input: input.as_ptr(), filters, bias, output: Address(output.as_mut_ptr()), a: memory };
        let tasks = if plan.a_len() <= ALONE { 1 } else { plan.groups.len() };
        workspace.threads.run(tasks, &|task, _| {
            for group in (task..plan.groups.len()).step_by(tasks) {
                dispatch(isa, Gather { job: &job, group });
            }
        })?;
        workspace.threads.run(plan.panels() * plan.parts, &|task, worker| {
            let room = memory.at(plan.a_len() + worker * plan.own());
            dispatch(isa, Multiply { job: &job, panel: task / plan.parts, part: task % plan.parts, room });
        })
    }
}

/// Outputs of one microkernel: neighbours in the order pixel, image.
struct Group {
    down: Span,
    across: Span,
    first: usize,
    rows: usize,
    /// Where its inputs begin, in taps.
    start: usize,
}

impl Group {
    fn taps(&self) -> usize {
        self.down.taps.len() * self.across.taps.len()
    }

    /// Image, row and column of an output.
    #[inline(always)]
    fn place(&self, row: usize, images: usize) -> [usize; 3] {
        let (pixel, image) = ((self.first + row) / images, (self.first + row) % images);
        let across = self.across.outputs.len();
        [image, self.down.outputs.start + pixel / across, self.across.outputs.start + pixel % across]
    }

    /// Taps whose filters are neighbours in memory: how many times how many, and the first of them.
    #[inline(always)]
    fn runs(&self) -> [usize; 3] {
        let (down, across) = (&self.down.taps, &self.across.taps);
        let first = down.start * 3 + across.start;
        if across.len() == 3 { [1, down.len() * 3, first] } else { [down.len(), across.len(), first] }
    }
}

struct Plan {
    conv: Conv3x3,
    isa: Isa,
    groups: Vec<Group>,
    /// Rows of the largest group, for which A has room in all.
    rows: usize,
    /// Parts of the groups, for each of which the filters are packed once more.
    parts: usize,
    /// Where the blocks of inputs of all taps begin.
    offsets: Vec<usize>,
}

impl Plan {
    fn new(conv: Conv3x3, isa: Isa, workers: usize) -> Self {
        let axes = conv.input.size.map(|side| Span::all(side, conv.padding));
        let (mut groups, mut start) = (Vec::new(), 0);
        for (down, across) in axes[0].iter().flat_map(|down| axes[1].iter().map(move |across| (down, across))) {
            let all = down.outputs.len() * across.outputs.len() * conv.input.images;
            // Of about the same size: the last one of two rows would waste registers.
            let count = all.div_ceil(isa.rows());
            for group in 0..count {
                let (first, end) = (all * group / count, all * (group + 1) / count);
                let group = Group { down: down.clone(), across: across.clone(), first, rows: end - first, start };
                start += group.taps();
                groups.push(group);
            }
        }
        let rows = groups.iter().map(|group| group.rows).max().unwrap_or(1);
        let offsets = (0..9 * conv.input.blocks()).map(|block| block * rows * LANES).collect();
        let panels = conv.output().blocks().div_ceil(isa.columns());
        let even = |parts: usize| (panels * parts).is_multiple_of(workers) || panels * parts >= 4 * workers;
        let parts = (1..groups.len()).find(|&parts| even(parts)).unwrap_or(groups.len());
        Self { conv, isa, groups, rows, parts, offsets }
    }

    /// Floats of one tap's inputs.
    fn tap(&self) -> usize {
        self.conv.input.channels * self.rows
    }

    fn a_len(&self) -> usize {
        let taps: usize = self.groups.last().map_or(0, |last| last.start + last.taps());
        taps * self.tap()
    }

    fn panels(&self) -> usize {
        self.conv.output().blocks().div_ceil(self.isa.columns())
    }

    fn wide(&self) -> usize {
        self.isa.columns() * LANES
    }

    /// Floats of a worker's own: W, and the sums of a group, twice.
    fn own(&self) -> usize {
        (9 * self.conv.input.channels + 2 * self.rows) * self.wide()
    }
}

struct Job<'a> {
    plan: &'a Plan,
    input: *const f32,
    filters: Filters<'a>,
    bias: &'a [f32],
    output: Address,
    a: Address,
}

// SAFETY: the input is only read, and workers write groups and outputs of their own.
unsafe impl Sync for Job<'_> {}

/// The inputs of a group.
struct Gather<'a> {
    job: &'a Job<'a>,
    group: usize,
}

impl Kernel for Gather<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Job { plan, input, a, .. } = self.job;
        let (shape, padding) = (plan.conv.input, plan.conv.padding);
        let group = &plan.groups[self.group];
        for row in 0..group.rows {
            let [image, y, x] = group.place(row, shape.images);
            let mut to = a.at(group.start * plan.tap() + row * LANES);
            for y in group.down.taps.clone().map(|tap| y + tap - padding) {
                for x in group.across.taps.clone().map(|tap| x + tap - padding) {
                    let pixel = (image * shape.size[0] + y) * shape.size[1] + x;
                    let from = input.wrapping_add(pixel * shape.channels);
                    for q in 0..shape.blocks() {
                        // SAFETY: the taps hit the image, whose length `Conv3x3::check` has compared; `Plan::a_len` made room.
                        unsafe { V::load(from.wrapping_add(q * LANES)).store(to) };
                        to = to.wrapping_add(plan.rows * LANES);
                    }
                }
            }
        }
    }
}

/// The outputs of a panel, in a part of the groups.
struct Multiply<'a> {
    job: &'a Job<'a>,
    panel: usize,
    part: usize,
    room: *mut f32,
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Job { plan, filters, bias, output, a, .. } = self.job;
        let (conv, shape) = (plan.conv, plan.conv.output());
        let (inputs, ins) = (conv.input.channels, conv.input.blocks());
        let first = self.panel * plan.isa.columns();
        let columns = plan.isa.columns().min(shape.blocks() - first);
        let width = columns * LANES;
        let mut taps = [V::splat(0.0); 9 * LANES];
        for (q, column) in (0..ins).flat_map(|q| (0..columns).map(move |column| (q, column))) {
            filters.taps([inputs, conv.outputs], [q, first + column], &mut taps);
            for (i, taps) in (q * LANES..).zip(taps.as_chunks::<9>().0) {
                for (tap, filters) in taps.iter().enumerate() {
                    // SAFETY: `Plan::own` made room for all taps.
                    unsafe { filters.store(self.room.wrapping_add((tap * inputs + i) * width + column * LANES)) };
                }
            }
        }
        // A run begins with the sums of the one before, but must not overwrite them: long sums are stored on the way.
        let sums = |run: usize| self.room.wrapping_add((9 * inputs + run % 2 * plan.rows) * plan.wide());
        let count = plan.groups.len();
        for group in &plan.groups[count * self.part / plan.parts..count * (self.part + 1) / plan.parts] {
            let [runs, taps, tap] = group.runs();
            for run in 0..runs {
                let job = Tile {
                    input: a.at((group.start + run * taps) * plan.tap()),
                    stride: LANES,
                    offsets: &plan.offsets[..taps * ins],
                    len: LANES,
                    short: 0,
                    short_len: 0,
                    weights: self.room.wrapping_add((tap + 3 * run) * inputs * width),
                    later: std::ptr::null(),
                    later_lines: 0,
                    output: sums(run),
                    output_stride: width,
                    output_block: LANES,
                    bias: if run == 0 { bias[first * LANES..].as_ptr() } else { std::ptr::null() },
                    residual: if run == 0 { std::ptr::null() } else { sums(run - 1) },
                    residual_stride: width,
                    residual_block: LANES,
                    activation: Activate::Nothing,
                };
                // SAFETY: the group's inputs and the filters are there, and the sums have room.
                unsafe { tile::<V, false>(group.rows, columns, &job) };
            }
            for row in 0..group.rows {
                let [image, y, x] = group.place(row, shape.images);
                let to = ((image * shape.size[0] + y) * shape.size[1] + x) * shape.channels + first * LANES;
                for column in (0..width).step_by(LANES) {
                    // SAFETY: `Conv3x3::check` has compared the output's length; these are this task's outputs.
                    unsafe { V::load(sums(runs - 1).wrapping_add(row * width + column)).store(output.at(to + column)) };
                }
            }
        }
    }
}
