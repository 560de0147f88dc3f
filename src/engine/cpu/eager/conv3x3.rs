//! A 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3), and the gradient of its input, which is another one.
//!
//! ```text
//! V = [block of tiles][k][tiles / rows][in / 16][rows][16]     what the microkernel reads, in its order
//! U = [panel of output channels][k][in][columns * 16]
//! M = [k][tile][columns * 16]                                  one panel of one block, never leaves the worker's cache
//! ```

use super::{Address, Shape, Workspace, patch};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::engine::cpu::common::kernels::winograd::{
    Finish, Pixels, Size, transform_filter, transform_input, transform_output,
};
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

impl Conv3x3 {
    pub fn output(&self) -> Shape {
        let size = self.input.size.map(|side| side + 2 * self.padding - 2);
        Shape { images: self.input.images, size, channels: self.outputs }
    }

    /// That which computes the gradient of the input from that of the output.
    pub fn turned(&self) -> Self {
        Self { input: self.output(), outputs: self.input.channels, padding: 2 - self.padding }
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

    /// The convolution of `input` with `filters`.
    ///
    /// # Arguments
    /// `input`: as its shape says; `bias`: one float per output channel; `output`: all of it is written.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn run(
        &self,
        input: &[f32],
        filters: Filters<'_>,
        bias: Option<&[f32]>,
        output: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        assert_eq!((input.len(), output.len()), (self.input.floats(), self.output().floats()), "floats of the images");
        let (isa, workers) = (workspace.isa, workspace.threads.workers());
        let plan = Plan::new(*self, isa, workers);
        let zeros = vec![0.0; self.outputs];
        let bias = bias.unwrap_or(&zeros);
        assert_eq!(bias.len(), self.outputs, "a bias for every channel");
        let (u_len, shared, own) = (plan.u_len(), plan.shared(), plan.own());
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
        let v = |block: usize| memory.at(u_len + block * plan.v_len());
        let blocks = plan.blocks();
        if plan.alone {
            return workspace.threads.run(blocks, &|block, worker| {
                let own = room(worker);
                dispatch(isa, Alone(Work::new(&job, block, own, own.wrapping_add(plan.v_len()))));
            });
        }
        let groups = plan.block / isa.rows();
        for first in (0..blocks).step_by(plan.at_once()) {
            let count = plan.at_once().min(blocks - first);
            workspace.threads.run(count * groups, &|task, worker| {
                let (block, group) = (task / groups, task % groups);
                dispatch(isa, Transform(Work::new(&job, first + block, v(block), room(worker)), group));
            })?;
            // Panels first: a worker's share is a part of U, which is read once, for all these blocks of tiles.
            workspace.threads.run(plan.panels() * count, &|task, worker| {
                let (panel, block) = (task / count, task % count);
                dispatch(isa, Multiply(Work::new(&job, first + block, v(block), room(worker)), panel));
            })?;
        }
        Ok(())
    }
}

/// Planes an odd number of cache lines apart do not fall into the same sets.
pub(super) fn odd(floats: usize) -> usize {
    ((floats / LANES) | 1) * LANES
}

/// Floats of V that workers share; tests need several rounds.
const MOST_AT_ONCE: usize = if cfg!(test) { 1 << 20 } else { 1 << 24 };

struct Plan {
    conv: Conv3x3,
    isa: Isa,
    /// Tiles that are taken through the layer together, a multiple of the microkernel's rows.
    block: usize,
    /// One worker takes a block through the whole layer. Otherwise all transform the input first.
    alone: bool,
    /// Where the input blocks of a group of tiles begin in V.
    offsets: Vec<usize>,
}

impl Plan {
    fn new(conv: Conv3x3, isa: Isa, workers: usize) -> Self {
        // Few channels: U is small and V of a few tiles fits the second-level cache.
        let alone = conv.input.blocks() <= 8;
        let bytes = PRODUCTS * conv.input.channels * 4;
        let tiles = match alone {
            true => (256 << 10) / bytes,
            // The larger the block, the less often U is read; many workers need many blocks.
            false if workers <= 4 => 112,
            false => 42,
        };
        let block = (tiles / isa.rows()).max(1) * isa.rows();
        let offsets = (0..conv.input.blocks()).map(|q| q * isa.rows() * LANES).collect();
        Self { conv, isa, block, alone, offsets }
    }

    fn panels(&self) -> usize {
        self.conv.output().blocks().div_ceil(self.isa.columns())
    }

    fn blocks(&self) -> usize {
        self.conv.all_tiles().div_ceil(self.block)
    }

    fn columns(&self, panel: usize) -> usize {
        let wide = self.isa.columns();
        wide.min(self.conv.output().blocks() - panel * wide)
    }

    fn v_plane(&self) -> usize {
        odd(self.block * self.conv.input.channels)
    }

    /// Floats of V for one block of tiles.
    fn v_len(&self) -> usize {
        PRODUCTS * self.v_plane()
    }

    fn m_plane(&self) -> usize {
        odd(self.block * self.isa.columns() * LANES)
    }

    /// Floats of one product of a panel's filters.
    fn u_plane(&self, panel: usize) -> usize {
        odd(self.conv.input.channels * self.columns(panel) * LANES)
    }

    /// Where the filters of a panel begin in U.
    fn u_start(&self, panel: usize) -> usize {
        PRODUCTS * panel * odd(self.conv.input.channels * self.isa.columns() * LANES)
    }

    fn u_len(&self) -> usize {
        self.u_start(self.panels())
    }

    fn own(&self) -> usize {
        let m = PRODUCTS * self.m_plane();
        if self.alone { self.v_len() + m } else { m }
    }

    /// Blocks of which V is there at the same time.
    fn at_once(&self) -> usize {
        (MOST_AT_ONCE / self.v_len()).clamp(1, self.blocks().max(1))
    }

    fn shared(&self) -> usize {
        if self.alone { 0 } else { self.at_once() * self.v_len() }
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
    first: usize,
    count: usize,
    /// Tiles per microkernel.
    rows: usize,
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
        // SAFETY: `Plan::own` made room for M, and the phase before has filled V.
        unsafe { self.0.multiply::<V>(self.1) };
    }
}

impl Kernel for Alone<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let work = self.0;
        for group in 0..work.count.div_ceil(work.rows) {
            // SAFETY: `Plan::own` made room for V.
            unsafe { work.transform::<V>(group) };
        }
        for panel in 0..work.job.plan.panels() {
            // SAFETY: `Plan::own` made room for M, and V was just filled.
            unsafe { work.multiply::<V>(panel) };
        }
    }
}

impl<'a> Work<'a> {
    fn new(job: &'a Job<'a>, block: usize, v: *mut f32, m: *mut f32) -> Self {
        // Blocks, and the microkernels of a block, of about the same size: a last one of two tiles would waste registers.
        let plan = job.plan;
        let (all, blocks) = (plan.conv.all_tiles(), plan.blocks());
        let (first, end) = (all * block / blocks, all * (block + 1) / blocks);
        let rows = (end - first).div_ceil((end - first).div_ceil(plan.isa.rows()));
        Self { job, first, count: end - first, rows, v, m }
    }

    /// Fills V for the tiles that one microkernel reads.
    ///
    /// # Safety
    /// There is room for them in V, which nobody else has.
    #[inline(always)]
    unsafe fn transform<V: Lanes>(&self, group: usize) {
        let p = self.job.plan;
        let (rows, wide, blocks) = (self.rows, p.isa.rows(), p.conv.input.blocks());
        let mut room = [[[0.0; LANES]; INPUTS]; INPUTS];
        let start = group * rows;
        for r in start..self.count.min(start + rows) {
            let to = self.v.wrapping_add((group * blocks * wide + (r - start)) * LANES);
            for q in 0..blocks {
                // SAFETY: the caller's promise; `Conv3x3::run` has compared the input's length.
                unsafe {
                    let pixels = p.conv.tile::<V>(self.job.input, self.first + r, q, &mut room);
                    transform_input::<V>(Size::Four, pixels, to.wrapping_add(q * wide * LANES), p.v_plane());
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
        let p = self.job.plan;
        let (rows, columns, wide) = (self.rows, p.columns(panel), p.isa.columns());
        let inputs = p.conv.input.channels;
        let u_plane = p.u_plane(panel);
        let u = self.job.u.wrapping_add(p.u_start(panel));
        let groups = self.count.div_ceil(rows);
        // U of the next product comes from far away, once for all tiles of the block: each microkernel asks for a slice of
        // it. Alone, U is small and stays near.
        let slice = if p.alone { 0 } else { u_plane.div_ceil(LANES * p.offsets.len() * groups) };
        for k in 0..PRODUCTS {
            for (group, start) in (0..self.count).step_by(rows).enumerate() {
                let job = Tile {
                    input: self.v.wrapping_add(k * p.v_plane() + group * p.isa.rows() * inputs),
                    stride: LANES,
                    offsets: &p.offsets,
                    len: LANES,
                    short: 0,
                    short_len: 0,
                    weights: u.wrapping_add(k * u_plane),
                    later: u.wrapping_add((k + 1) * u_plane + group * slice * p.offsets.len() * LANES),
                    later_lines: slice,
                    output: self.m.wrapping_add(k * p.m_plane() + start * columns * LANES),
                    output_stride: columns * LANES,
                    output_block: LANES,
                    bias: std::ptr::null(),
                    residual: std::ptr::null(),
                    residual_stride: 0,
                    residual_block: 0,
                    activation: Activate::Nothing,
                };
                // SAFETY: the caller's promise.
                unsafe { tile::<V, false>(rows.min(self.count - start), columns, &job) };
            }
        }
        let shape = p.conv.output();
        for t in 0..self.count {
            let (image, y, x) = p.conv.place(self.first + t);
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
                unsafe { transform_output::<V>(Size::Four, from, p.m_plane(), &finish) };
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
        let (panel, column) = (block / plan.isa.columns(), block % plan.isa.columns());
        let width = plan.columns(panel) * LANES;
        let u = u.at(plan.u_start(panel) + column * LANES);
        // All taps of the sixteen input channels, each of sixteen output channels.
        let mut taps = [V::splat(0.0); 9 * LANES];
        match filters {
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
                    let mut rows = [V::splat(0.0); LANES];
                    for (row, filter) in rows.iter_mut().zip(filters.as_chunks::<9>().0) {
                        let mut taps = [0.0; LANES];
                        taps[..9].copy_from_slice(filter);
                        *row = V::from_array(taps);
                    }
                    for (tap, column) in taps.iter_mut().rev().zip(V::transpose(rows)) {
                        *tap = column;
                    }
                }
            }
        }
        for (i, taps) in (q * LANES..).zip(taps.as_chunks::<9>().0) {
            let pixels = Pixels { from: taps.as_ptr().cast(), row: 3 * LANES, pixel: LANES };
            // SAFETY: nine taps of sixteen filters; `Plan::u_len` made room for the products of all of them.
            unsafe { transform_filter::<V>(pixels, u.wrapping_add(i * width), plan.u_plane(panel)) };
        }
    }
}
