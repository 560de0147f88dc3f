//! A 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3), and the gradient of its input, which is another one.

use super::{Address, Shape, Workspace, patch};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::winograd::{
    Finish, Pixels, Size, transform_filter, transform_input, transform_output,
};
use crate::engine::cpu::common::winograd::{Blocks, Share, odd};
use crate::error::Result;
use crate::model::Pair;

/// Outputs per side of a tile, inputs per side, and products.
pub(super) const OUTPUTS: usize = 4;
pub(super) const INPUTS: usize = 6;
pub(super) const PRODUCTS: usize = 36;

/// Sizes of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Conv3x3 {
    pub input: Shape,
    pub outputs: usize,
    pub padding: usize,
}

/// Filters `[out][in][3][3]`.
#[derive(Clone, Copy)]
pub enum Filters<'a> {
    AsTheyAre(&'a [f32]),
    /// Those of the convolution whose input's gradient is computed: turned by half a turn, in and out exchanged.
    Turned(&'a [f32]),
}

impl Filters<'_> {
    fn len(&self) -> usize {
        let (Self::AsTheyAre(w) | Self::Turned(w)) = self;
        w.len()
    }

    /// Nine taps of each of the sixteen input channels `q`, each of the sixteen output channels `block`.
    #[inline(always)]
    pub(super) fn taps<V: Lanes>(
        &self,
        [inputs, outputs]: [usize; 2],
        [q, block]: [usize; 2],
        taps: &mut [V; 9 * LANES],
    ) {
        match self {
            Filters::AsTheyAre(w) => {
                for (at, taps) in (0..).step_by(LANES).zip(taps.as_chunks_mut::<LANES>().0) {
                    for (lane, row) in taps.iter_mut().enumerate() {
                        let filters = &w[((block * LANES + lane) * inputs + q * LANES) * 9..][at..at + LANES];
                        // SAFETY: sixteen floats.
                        *row = unsafe { V::load(filters.as_ptr()) };
                    }
                    *taps = V::transpose(*taps);
                }
            }
            Filters::Turned(w) => {
                for (i, taps) in taps.as_chunks_mut::<9>().0.iter_mut().enumerate() {
                    let filters = &w[((q * LANES + i) * outputs + block * LANES) * 9..][..9 * LANES];
                    // Behind a filter's nine taps is the next one, of which nothing is used; behind the last is nothing.
                    let mut rows = [V::splat(0.0); LANES];
                    let mut last = [0.0; LANES];
                    last[..9].copy_from_slice(&filters[9 * (LANES - 1)..]);
                    for (lane, row) in rows.iter_mut().enumerate() {
                        let from = if lane + 1 < LANES { &filters[9 * lane..][..LANES] } else { &last };
                        // SAFETY: sixteen floats.
                        *row = unsafe { V::load(from.as_ptr()) };
                    }
                    for (tap, column) in taps.iter_mut().rev().zip(V::transpose(rows)) {
                        *tap = column;
                    }
                }
            }
        }
    }
}

impl Conv3x3 {
    pub fn output(&self) -> Shape {
        let size = self.input.size.map(|side| side + 2 * self.padding - 2);
        Shape { images: self.input.images, size, channels: self.outputs }
    }

    /// That which computes the gradient of the input from that of the output.
    pub fn turned(&self) -> Self {
        Self { input: self.output(), outputs: self.input.channels, padding: 2 - self.padding }
    }

    pub(super) fn check(&self, input: &[f32], filters: Filters<'_>, bias: &[f32], output: &[f32]) {
        assert_eq!((input.len(), output.len()), (self.input.floats(), self.output().floats()), "floats of the images");
        assert_eq!(filters.len(), self.input.channels * self.outputs * 9, "floats of the filters");
        assert_eq!(bias.len(), self.outputs, "a bias for every channel");
    }

    pub(super) fn check_gradient(&self, input: &[f32], derivative: &[f32], gradient: &[f32]) {
        let images = (self.input.floats(), self.output().floats());
        assert_eq!((input.len(), derivative.len()), images, "floats of the images");
        assert_eq!(gradient.len(), self.input.channels * self.outputs * 9, "floats of the filters");
    }

    /// Tiles of one image, down and across.
    pub(super) fn tiles(&self) -> Pair {
        self.output().size.map(|side| side.div_ceil(OUTPUTS))
    }

    pub(super) fn all_tiles(&self) -> usize {
        let [down, across] = self.tiles();
        self.input.images * down * across
    }

    /// Image, row and column of a tile.
    #[inline(always)]
    pub(super) fn place(&self, tile: usize) -> (usize, usize, usize) {
        let [down, across] = self.tiles();
        (tile / (down * across), tile / across % down, tile % across)
    }

    /// Where the sixteen channels of a tile's inputs are.
    ///
    /// # Safety
    /// `input` is readable as its shape says.
    #[inline(always)]
    pub(super) unsafe fn tile<V: Lanes>(
        &self,
        input: *const f32,
        tile: usize,
        block: usize,
        room: &mut [[[f32; LANES]; INPUTS]; INPUTS],
    ) -> Pixels {
        let (image, y, x) = self.place(tile);
        let image = input.wrapping_add(image * self.input.size[0] * self.input.row());
        let corner = [y, x].map(|at| (at * OUTPUTS).cast_signed() - self.padding.cast_signed());
        // SAFETY: the caller's promise.
        unsafe { patch::<V, INPUTS>(image, &self.input, corner, block, room) }
    }

    /// [`Self::run`] by Winograd's algorithm.
    pub(super) fn run_winograd(
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
        let (u_len, shared, own) = (plan.u_len(), plan.shared(), plan.blocks.own());
        let memory = Address(workspace.memory(u_len + shared + own * workers)?);
        let turn = Turn { plan: &plan, filters, u: memory };
        let turns = self.input.blocks() * self.output().blocks();
        workspace.threads.run(turns, &|task, _| dispatch(isa, TurnTask(&turn, task)))?;
        let job = Job {
            plan: &plan,
            input: input.as_ptr(),
            u: memory.at(0),
            bias: bias.as_ptr(),
            output: Address(output.as_mut_ptr()),
        };
        let room = |worker: usize| memory.at(u_len + shared + worker * own);
        let v = |block: usize| memory.at(u_len + block * plan.blocks.v_len());
        let (b, blocks) = (&plan.blocks, plan.count());
        if b.alone {
            return workspace.threads.run(blocks, &|block, worker| {
                let own = room(worker);
                dispatch(isa, Alone(Work::new(&job, block, own, own.wrapping_add(b.v_len()))));
            });
        }
        for first in (0..blocks).step_by(plan.at_once()) {
            let count = plan.at_once().min(blocks - first);
            workspace.threads.run(count * b.groups(), &|task, worker| {
                let (block, group) = (task / b.groups(), task % b.groups());
                dispatch(isa, Transform(Work::new(&job, first + block, v(block), room(worker)), group));
            })?;
            // Panels first: a worker's share is a part of U, which is read once, for all these blocks of tiles.
            workspace.threads.run(b.panels() * count, &|task, worker| {
                let (panel, block) = (task / count, task % count);
                dispatch(isa, Multiply(Work::new(&job, first + block, v(block), room(worker)), panel));
            })?;
        }
        Ok(())
    }
}

/// Floats of V that workers share; tests need several rounds.
const MOST_AT_ONCE: usize = if cfg!(test) { 1 << 20 } else { 1 << 24 };

struct Plan {
    conv: Conv3x3,
    blocks: Blocks,
}

impl Plan {
    fn new(conv: Conv3x3, isa: Isa, workers: usize) -> Self {
        Self { conv, blocks: Blocks::new(isa, Size::Four, conv.input.blocks(), conv.output().blocks(), workers) }
    }

    fn count(&self) -> usize {
        self.blocks.count(self.conv.all_tiles())
    }

    /// Floats of one product of a panel's filters.
    fn u_plane(&self, panel: usize) -> usize {
        odd(self.conv.input.channels * self.blocks.columns(panel) * LANES)
    }

    /// Where the filters of a panel begin in U.
    fn u_start(&self, panel: usize) -> usize {
        PRODUCTS * panel * odd(self.conv.input.channels * self.blocks.isa.columns() * LANES)
    }

    fn u_len(&self) -> usize {
        self.u_start(self.blocks.panels())
    }

    /// Blocks of which V is there at the same time.
    fn at_once(&self) -> usize {
        (MOST_AT_ONCE / self.blocks.v_len()).clamp(1, self.count().max(1))
    }

    fn shared(&self) -> usize {
        if self.blocks.alone { 0 } else { self.at_once() * self.blocks.v_len() }
    }
}

struct Job<'a> {
    plan: &'a Plan,
    input: *const f32,
    u: *const f32,
    bias: *const f32,
    output: Address,
}

// SAFETY: the input is only read, and workers write outputs of tiles of their own.
unsafe impl Sync for Job<'_> {}

/// One block of tiles.
struct Work<'a> {
    job: &'a Job<'a>,
    share: Share,
    v: *mut f32,
    m: *mut f32,
}

struct Transform<'a>(Work<'a>, usize);
struct Multiply<'a>(Work<'a>, usize);
struct Alone<'a>(Work<'a>);

impl Kernel for Transform<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // SAFETY: `Plan::shared` made room for V.
        unsafe { self.0.transform::<V>(self.1) };
    }
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // SAFETY: `Blocks::own` made room for M, and the phase before has filled V.
        unsafe { self.0.multiply::<V>(self.1) };
    }
}

impl Kernel for Alone<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let work = self.0;
        for group in 0..work.share.groups() {
            // SAFETY: `Blocks::own` made room for V.
            unsafe { work.transform::<V>(group) };
        }
        for panel in 0..work.job.plan.blocks.panels() {
            // SAFETY: `Blocks::own` made room for M, and V was just filled.
            unsafe { work.multiply::<V>(panel) };
        }
    }
}

impl<'a> Work<'a> {
    fn new(job: &'a Job<'a>, block: usize, v: *mut f32, m: *mut f32) -> Self {
        let plan = job.plan;
        Self { job, share: plan.blocks.share(plan.conv.all_tiles(), block), v, m }
    }

    /// Fills V for the tiles that one microkernel reads.
    ///
    /// # Safety
    /// There is room for them in V, which nobody else has.
    #[inline(always)]
    unsafe fn transform<V: Lanes>(&self, group: usize) {
        let (p, Share { first, count, rows }) = (self.job.plan, self.share);
        let mut room = [[[0.0; LANES]; INPUTS]; INPUTS];
        let start = group * rows;
        for r in start..count.min(start + rows) {
            for q in 0..p.blocks.ins {
                let to = self.v.wrapping_add(p.blocks.place(group, r - start, q));
                // SAFETY: the caller's promise; `Conv3x3::run` has compared the input's length.
                unsafe {
                    let pixels = p.conv.tile::<V>(self.job.input, first + r, q, &mut room);
                    transform_input::<V>(Size::Four, pixels, to, p.blocks.v_plane());
                }
            }
        }
    }

    /// All products of one panel of output channels, and what becomes of them.
    ///
    /// # Safety
    /// V is filled; M, which nobody else has, has room for the products.
    #[inline(always)]
    unsafe fn multiply<V: Lanes>(&self, panel: usize) {
        let (p, b) = (self.job.plan, &self.job.plan.blocks);
        let (columns, wide) = (b.columns(panel), b.isa.columns());
        let u = self.job.u.wrapping_add(p.u_start(panel));
        // SAFETY: the caller's promise.
        unsafe { b.multiply::<V>(self.share, panel, self.v, (u, p.u_plane(panel)), self.m) };
        let shape = p.conv.output();
        for t in 0..self.share.count {
            let (image, y, x) = p.conv.place(self.share.first + t);
            let [y, x] = [y, x].map(|at| at * OUTPUTS);
            let start = (image * shape.size[0] + y) * shape.row() + x * shape.channels;
            for c in 0..columns {
                let block = panel * wide + c;
                let finish = Finish {
                    to: self.job.output.at(start + block * LANES),
                    row: shape.row(),
                    pixel: shape.channels,
                    inside: [shape.size[0] - y, shape.size[1] - x],
                    pool: false,
                    bias: self.job.bias.wrapping_add(block * LANES),
                    residual: std::ptr::null(),
                    residual_row: 0,
                    activation: Activate::Nothing,
                };
                let from = self.m.wrapping_add((t * columns + c) * LANES);
                // SAFETY: the caller's promise; `Conv3x3::run` has compared the output's length.
                unsafe { transform_output::<V>(Size::Four, from, b.m_plane(), &finish) };
            }
        }
    }
}

/// The transform of all filters.
struct Turn<'a> {
    plan: &'a Plan,
    filters: Filters<'a>,
    u: Address,
}

/// Of a block of input and a block of output channels.
struct TurnTask<'a>(&'a Turn<'a>, usize);

impl Kernel for TurnTask<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self(Turn { plan, filters, u }, task) = self;
        let (inputs, outputs) = (plan.conv.input.channels, plan.conv.outputs);
        let (q, block) = (task % plan.conv.input.blocks(), task / plan.conv.input.blocks());
        let b = &plan.blocks;
        let (panel, column) = (block / b.isa.columns(), block % b.isa.columns());
        let width = b.columns(panel) * LANES;
        let u = u.at(plan.u_start(panel) + column * LANES);
        let mut taps = [V::splat(0.0); 9 * LANES];
        filters.taps([inputs, outputs], [q, block], &mut taps);
        for (i, taps) in (q * LANES..).zip(taps.as_chunks::<9>().0) {
            let pixels = Pixels { from: taps.as_ptr().cast(), row: 3 * LANES, pixel: LANES };
            // SAFETY: nine taps of sixteen filters; `Plan::u_len` made room for the products of all of them.
            unsafe { transform_filter::<V>(pixels, u.wrapping_add(i * width), plan.u_plane(panel)) };
        }
    }
}
