//! The gradient of a 3 x 3 convolution's filters by Winograd's algorithm, each of whose steps is turned round:
//!
//! ```text
//! dU[k] = V[k]^T D[k],  D = A dy A^T,  dg = G^T dU G
//! V = [k][in / 16][tile][16]      D = [k][panel of outputs][tile][columns * 16]      dU = [k][panel][in][columns * 16]
//! ```
//! With few channels each worker takes some tiles at a time through all products and adds to a dU of its own. With many, the
//! dU of one product is as much as a cache holds: V and D of many tiles are made first, and the workers share the products.

use super::conv3x3::{Conv3x3, INPUTS, OUTPUTS, PRODUCTS};
use super::{Address, Workspace, patch};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, outer, outer_rows};
use crate::engine::cpu::common::kernels::winograd::{Size, filter_derivative, transform_derivative, transform_input};
use crate::engine::cpu::common::winograd::odd;
use crate::error::Result;

/// Up to so many floats of dU, every worker has one.
const MOST_OWN: usize = 1 << 20;
/// Floats of V and D that are made before the products; tests need several rounds.
const MOST_AT_ONCE: usize = if cfg!(test) { 1 << 20 } else { 1 << 24 };
/// Tiles that a worker transforms before it asks for more.
const GROUP: usize = 8;
/// Products that are added up before they join the sum so far, which keeps its rounding error small.
const CHUNK: usize = 64;

impl Conv3x3 {
    /// [`Self::weight_gradient`] by Winograd's algorithm.
    pub(super) fn weight_gradient_winograd(
        &self,
        input: &[f32],
        derivative: &[f32],
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check_gradient(input, derivative, gradient);
        let (isa, workers) = (workspace.isa, workspace.threads.workers());
        let plan = Plan::new(*self, isa, workers);
        let (u, tiles) = (plan.parts * plan.u_len(), plan.block_len());
        let rooms = if plan.alone { workers } else { 1 };
        let memory = Address(workspace.memory(u + rooms * tiles + workers * plan.piece_len())?);
        let job = Job {
            plan: &plan,
            input: input.as_ptr(),
            derivative: derivative.as_ptr(),
            gradient: Address(gradient.as_mut_ptr()),
            u: memory,
        };
        let room = |worker: usize| memory.at(u + worker * tiles);
        if plan.alone {
            workspace
                .threads
                .run(plan.parts, &|part, worker| dispatch(isa, Part { job: &job, part, room: room(worker) }))?;
        } else {
            let products = PRODUCTS * plan.panels();
            for first in (0..self.all_tiles()).step_by(plan.block) {
                let count = plan.block.min(self.all_tiles() - first);
                let block = Block { job: &job, first, count, memory: room(0) };
                let groups = count.div_ceil(GROUP);
                workspace.threads.run(groups, &|group, _| dispatch(isa, Transform { block: &block, group }))?;
                workspace.threads.run(products, &|product, _| dispatch(isa, Product { block: &block, product }))?;
            }
        }
        let room = |worker: usize| memory.at(u + rooms * tiles + worker * plan.piece_len());
        workspace
            .threads
            .run(plan.pieces(), &|piece, worker| dispatch(isa, Piece { job: &job, piece, room: room(worker) }))
    }
}

struct Plan {
    conv: Conv3x3,
    isa: Isa,
    /// Whether a worker takes tiles through all products.
    alone: bool,
    /// Tiles that are transformed together.
    block: usize,
    /// How many dU there are.
    parts: usize,
}

impl Plan {
    fn new(conv: Conv3x3, isa: Isa, workers: usize) -> Self {
        let all = conv.all_tiles();
        let alone = PRODUCTS * conv.input.channels * conv.outputs <= MOST_OWN;
        if !alone {
            let most = MOST_AT_ONCE / (PRODUCTS * (conv.input.channels + conv.outputs)) / CHUNK * CHUNK;
            return Self { conv, isa, alone, block: most.max(CHUNK).min(all), parts: 1 };
        }
        let tiles = (512 << 10) / (PRODUCTS * (conv.input.channels + conv.outputs) * 4);
        let block = tiles.max(16).min(all);
        Self { conv, isa, alone, block, parts: workers.min(all.div_ceil(block)) }
    }

    fn v_plane(&self) -> usize {
        odd(self.block * self.conv.input.channels)
    }

    fn d_plane(&self) -> usize {
        odd(self.block * self.conv.outputs)
    }

    /// Floats of V and D of one block of tiles.
    fn block_len(&self) -> usize {
        PRODUCTS * (self.v_plane() + self.d_plane())
    }

    fn u_len(&self) -> usize {
        PRODUCTS * self.conv.input.channels * self.conv.outputs
    }

    /// Where the tiles of a block begin in V.
    fn offsets(&self) -> Vec<usize> {
        (0..self.block).map(|t| t * LANES).collect()
    }

    /// Floats per output channel panel.
    fn wide(&self) -> usize {
        self.isa.columns() * LANES
    }

    fn panels(&self) -> usize {
        self.conv.outputs.div_ceil(self.wide())
    }

    fn width(&self, panel: usize) -> usize {
        self.wide().min(self.conv.outputs - panel * self.wide())
    }

    /// Sixteen input channels and a panel of output channels.
    fn pieces(&self) -> usize {
        self.conv.input.blocks() * self.panels()
    }

    fn piece_len(&self) -> usize {
        PRODUCTS * LANES * self.wide()
    }
}

struct Job<'a> {
    plan: &'a Plan,
    input: *const f32,
    derivative: *const f32,
    gradient: Address,
    u: Address,
}

// SAFETY: input and derivative are only read, and workers write to places of their own.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// V and D of some tiles, the first of which is number `t` of its block.
    ///
    /// # Safety
    /// There is room for a block at `to`, and nobody else has these tiles of it.
    #[inline(always)]
    unsafe fn transform<V: Lanes>(&self, first: usize, count: usize, t: usize, to: *mut f32) {
        let p = self.plan;
        let conv = p.conv;
        let output = conv.output();
        let d = to.wrapping_add(PRODUCTS * p.v_plane());
        let mut room = [[[0.0; LANES]; INPUTS]; INPUTS];
        let mut small = [[[0.0; LANES]; OUTPUTS]; OUTPUTS];
        for (t, tile) in (t..).zip(first..first + count) {
            let (image, y, x) = conv.place(tile);
            let image = self.derivative.wrapping_add(image * output.size[0] * output.row());
            let corner = [y, x].map(|at| (at * OUTPUTS).cast_signed());
            // SAFETY: the caller's promise; `check_gradient` has compared the lengths of the images.
            unsafe {
                for q in 0..conv.input.blocks() {
                    let pixels = conv.tile::<V>(self.input, tile, q, &mut room);
                    let to = to.wrapping_add((q * p.block + t) * LANES);
                    transform_input::<V>(Size::Four, pixels, to, p.v_plane());
                }
                for q in 0..output.blocks() {
                    let pixels = patch::<V, OUTPUTS>(image, &output, corner, q, &mut small);
                    let (panel, column) = (q * LANES / p.wide(), q * LANES % p.wide());
                    let to = d.wrapping_add(panel * p.wide() * p.block + t * p.width(panel) + column);
                    transform_derivative::<V>(pixels, to, p.d_plane());
                }
            }
        }
    }

    /// The products of a block's tiles, for one product and a panel of output channels, into dU or added to it.
    ///
    /// # Safety
    /// V and D of as many tiles as there are offsets are at `block`; nobody else has this part of `u`.
    #[inline(always)]
    unsafe fn multiply<V: Lanes>(
        &self,
        block: *const f32,
        offsets: &[usize],
        k: usize,
        panel: usize,
        u: *mut f32,
        first: bool,
    ) {
        let p = self.plan;
        let (inputs, width) = (p.conv.input.channels, p.width(panel));
        let d = block.wrapping_add(PRODUCTS * p.v_plane() + k * p.d_plane() + panel * p.wide() * p.block);
        let v = block.wrapping_add(k * p.v_plane());
        for i in (0..inputs).step_by(outer_rows::<V>()) {
            let output = u.wrapping_add(k * inputs * p.conv.outputs + panel * p.wide() * inputs + i * width);
            for (part, offsets) in offsets.chunks(CHUNK).enumerate() {
                let tile = Tile {
                    input: v.wrapping_add(i / LANES * p.block * LANES + i % LANES),
                    stride: 1,
                    offsets,
                    len: 1,
                    short: 0,
                    short_len: 0,
                    weights: d.wrapping_add(part * CHUNK * width),
                    later: d,
                    later_lines: 0,
                    output,
                    output_stride: width,
                    output_block: LANES,
                    bias: std::ptr::null(),
                    residual: if first && part == 0 { std::ptr::null() } else { output },
                    residual_stride: width,
                    residual_block: LANES,
                    activation: Activate::Nothing,
                };
                // SAFETY: the caller's promise.
                unsafe { outer::<V>(width / LANES, &tile) };
            }
        }
    }
}

/// A part of the tiles, into a dU of its own.
struct Part<'a> {
    job: &'a Job<'a>,
    part: usize,
    room: *mut f32,
}

impl Kernel for Part<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (job, p) = (self.job, self.job.plan);
        let all = p.conv.all_tiles();
        let (start, end) = (all * self.part / p.parts, all * (self.part + 1) / p.parts);
        let u = job.u.at(self.part * p.u_len());
        let offsets = p.offsets();
        for first in (start..end).step_by(p.block) {
            let count = p.block.min(end - first);
            // SAFETY: the room is for a block.
            unsafe { job.transform::<V>(first, count, 0, self.room) };
            for k in 0..PRODUCTS {
                for panel in 0..p.panels() {
                    // SAFETY: the block was just filled; this part's dU is nobody else's.
                    unsafe { job.multiply::<V>(self.room, &offsets[..count], k, panel, u, first == start) };
                }
            }
        }
    }
}

/// A block of tiles that all workers take through the products.
struct Block<'a> {
    job: &'a Job<'a>,
    first: usize,
    count: usize,
    memory: *mut f32,
}

// SAFETY: a worker writes V and D of a group of its own, then dU of a product and panel of its own.
unsafe impl Sync for Block<'_> {}

/// V and D of a group of its tiles.
struct Transform<'a> {
    block: &'a Block<'a>,
    group: usize,
}

impl Kernel for Transform<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Block { job, first, count, memory } = self.block;
        let at = self.group * GROUP;
        // SAFETY: the memory is for a block.
        unsafe { job.transform::<V>(first + at, GROUP.min(count - at), at, *memory) };
    }
}

/// dU of one product and panel, of all its tiles.
struct Product<'a> {
    block: &'a Block<'a>,
    product: usize,
}

impl Kernel for Product<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Block { job, first, count, memory } = self.block;
        let p = job.plan;
        let (k, panel) = (self.product / p.panels(), self.product % p.panels());
        // SAFETY: V and D are there; this part of dU is nobody else's.
        unsafe { job.multiply::<V>(*memory, &p.offsets()[..*count], k, panel, job.u.at(0), *first == 0) };
    }
}

/// The gradient for sixteen input channels and a panel of output channels.
struct Piece<'a> {
    job: &'a Job<'a>,
    piece: usize,
    room: *mut f32,
}

impl Kernel for Piece<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (job, p) = (self.job, self.job.plan);
        let (inputs, outputs) = (p.conv.input.channels, p.conv.outputs);
        let (q, panel) = (self.piece % p.conv.input.blocks(), self.piece / p.conv.input.blocks());
        let (wide, width) = (p.wide(), p.width(panel));
        // dU of this piece, [k][in][width].
        let (u, plane) = (self.room, LANES * width);
        for k in 0..PRODUCTS {
            let at = k * inputs * outputs + panel * wide * inputs + q * LANES * width;
            for i in (0..plane).step_by(LANES) {
                // SAFETY: the parts have filled their dU; the room is this worker's.
                unsafe {
                    let mut sum = V::load(job.u.at(at + i));
                    for part in 1..p.parts {
                        sum = sum.add(V::load(job.u.at(part * p.u_len() + at + i)));
                    }
                    sum.store(u.wrapping_add(k * plane + i));
                }
            }
        }
        // Its filters' gradients, sixteen output channels at a time: [in][tap][16], then as they lie in the tensor.
        let mut taps = [V::splat(0.0); 9 * LANES];
        for column in (0..width).step_by(LANES) {
            for (i, taps) in taps.as_chunks_mut::<9>().0.iter_mut().enumerate() {
                // SAFETY: `Plan::piece_len` made room for dU; nine vectors are nine taps of sixteen floats.
                unsafe {
                    filter_derivative::<V>(u.wrapping_add(i * width + column), plane, taps.as_mut_ptr().cast(), LANES)
                };
            }
            // SAFETY: `check_gradient` has compared the gradient's length; these are this piece's filters.
            unsafe { store_taps(&taps, job.gradient, inputs, [q, (panel * wide + column) / LANES]) };
        }
    }
}

/// Nine taps of each of the sixteen input channels `q`, each of the sixteen output channels `block`, into `[out][in][3][3]`.
///
/// # Safety
/// The gradient has room for all filters, and nobody else has these.
#[inline(always)]
pub(super) unsafe fn store_taps<V: Lanes>(
    taps: &[V; 9 * LANES],
    gradient: Address,
    inputs: usize,
    [q, block]: [usize; 2],
) {
    for (at, taps) in (0..).step_by(LANES).zip(taps.as_chunks::<LANES>().0) {
        for (o, row) in (block * LANES..).zip(V::transpose(*taps)) {
            // SAFETY: the caller's promise.
            unsafe { row.store(gradient.at((o * inputs + q * LANES) * 9 + at)) };
        }
    }
}
