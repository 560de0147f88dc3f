//! A 3 x 3 convolution of stride 1 by Winograd's algorithm, with bias, residual, activation and 2 x 2 max-pooling in
//! its output transform.
//!
//! ```text
//! V = [block of tiles][k][tiles / rows][in / 16][rows][16]     what the microkernel reads, in its order
//! U = [panel of output channels][k][in][columns * 16]
//! M = [k][tile][columns * 16]                                  one panel of one block, never leaves the worker's cache
//! ```

use super::Step;
use crate::engine::cpu::common::isa::{Compiled, Isa, dispatch_narrow};
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::engine::cpu::common::kernels::winograd::{Finish, Pixels, Size, transform_input, transform_output};
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Pair;

pub struct Winograd {
    pub isa: Isa,
    pub size: Size,
    pub input: Value,
    pub output: Value,
    pub residual: Option<Value>,
    /// Where U and the bias begin in the weights.
    pub weights: usize,
    pub bias: usize,
    pub padding: Pair,
    pub activation: Activate,
    pub pool: bool,
    /// Tiles of one image, down and across.
    pub tiles: Pair,
    /// Tiles that are taken through the layer together, a multiple of the microkernel's rows.
    pub block: usize,
    /// One worker takes a block through the whole layer. Otherwise all transform the input first and then share the
    /// pairs of block and panel: better when there are few blocks, or when U is large.
    pub alone: bool,
    /// Where the input blocks of a group of tiles begin in V.
    pub offsets: Vec<usize>,
}

/// Planes an odd number of cache lines apart do not fall into the same sets.
fn odd(floats: usize) -> usize {
    ((floats / LANES) | 1) * LANES
}

/// Tiles of one image, down and across, for the convolution's output.
pub fn tiles(size: Size, output: Pair) -> Pair {
    [output[0].div_ceil(size.outputs()), output[1].div_ceil(size.outputs())]
}

impl Winograd {
    /// Tiles per block, and whether a worker takes a block through the layer alone.
    pub fn blocking(isa: Isa, size: Size, input_blocks: usize, workers: usize) -> (usize, bool) {
        // Few channels: U is small and V of a few tiles fits the second-level cache.
        let alone = input_blocks <= 8;
        let tile = size.products() * input_blocks * LANES * 4;
        let tiles = match alone {
            true => (256 << 10) / tile,
            // The larger the block, the less often U is read; many workers need many blocks.
            false if workers <= 4 => 112,
            false => 42,
        };
        ((tiles / isa.rows()).max(1) * isa.rows(), alone)
    }

    fn v_plane(&self) -> usize {
        odd(self.block * self.input.geometry.blocks() * LANES)
    }

    /// Floats of V for one block of tiles.
    fn v_len(&self) -> usize {
        self.size.products() * self.v_plane()
    }

    fn columns(&self, panel: usize) -> usize {
        let wide = self.isa.columns();
        wide.min(self.output.geometry.blocks() - panel * wide)
    }

    fn m_plane(&self) -> usize {
        odd(self.block * self.isa.columns() * LANES)
    }

    fn panels(&self) -> usize {
        self.output.geometry.blocks().div_ceil(self.isa.columns())
    }

    fn blocks(&self, images: usize) -> usize {
        (images * self.tiles[0] * self.tiles[1]).div_ceil(self.block)
    }

    fn work<'a>(&'a self, cx: &'a Context<'a>, block: usize, v: *mut f32, m: *mut f32) -> Work<'a> {
        // Blocks, and the microkernels of a block, of about the same size: a last one of two tiles would waste registers.
        let (all, blocks) = (cx.images * self.tiles[0] * self.tiles[1], self.blocks(cx.images));
        let (first, end) = (all * block / blocks, all * (block + 1) / blocks);
        let rows = (end - first).div_ceil((end - first).div_ceil(self.isa.rows()));
        Work { step: self, cx, first, count: end - first, rows, v, m }
    }
}

impl Step for Winograd {
    fn phases(&self) -> usize {
        if self.alone { 1 } else { 2 }
    }

    fn tasks(&self, phase: usize, images: usize) -> usize {
        let blocks = self.blocks(images);
        match (self.alone, phase) {
            (true, _) => blocks,
            (false, 0) => blocks * self.block / self.isa.rows(),
            (false, _) => blocks * self.panels(),
        }
    }

    fn run(&self, phase: usize, task: usize, cx: &Context<'_>) {
        let blocks = self.blocks(cx.images);
        if self.alone {
            let work = self.work(cx, task, cx.own, cx.own.wrapping_add(self.v_len()));
            dispatch(self.isa, Alone(work, 0..self.panels()));
        } else if phase == 0 {
            let groups = self.block / self.isa.rows();
            let (block, group) = (task / groups, task % groups);
            let work = self.work(cx, block, cx.shared.wrapping_add(block * self.v_len()), cx.own);
            dispatch(self.isa, Transform(work, group));
        } else {
            // Panels first: a worker's share is a part of U, which is read once, for all blocks of tiles.
            let (panel, block) = (task / blocks, task % blocks);
            let work = self.work(cx, block, cx.shared.wrapping_add(block * self.v_len()), cx.own);
            dispatch(self.isa, Multiply(work, panel));
        }
    }

    fn own(&self) -> usize {
        let m = self.size.products() * self.m_plane();
        if self.alone { self.v_len() + m } else { m }
    }

    fn shared(&self, images: usize) -> usize {
        if self.alone { 0 } else { self.blocks(images) * self.v_len() }
    }
}

/// One block of tiles.
struct Work<'a> {
    step: &'a Winograd,
    cx: &'a Context<'a>,
    first: usize,
    count: usize,
    /// Tiles per microkernel.
    rows: usize,
    v: *mut f32,
    m: *mut f32,
}

struct Transform<'a>(Work<'a>, usize);
struct Multiply<'a>(Work<'a>, usize);
struct Alone<'a>(Work<'a>, std::ops::Range<usize>);

impl Kernel for Transform<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // SAFETY: `Winograd::own` and `shared` made room for V; the input's border covers every tile.
        unsafe { self.0.transform::<V>(self.1) };
    }
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // SAFETY: `Winograd::own` made room for M, and the phase before has filled V; the output holds every tile.
        unsafe { self.0.multiply::<V>(self.1) };
    }
}

impl Kernel for Alone<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let work = self.0;
        for group in 0..work.count.div_ceil(work.rows) {
            // SAFETY: `Winograd::own` made room for V; the input's border covers every tile.
            unsafe { work.transform::<V>(group) };
        }
        for panel in self.1 {
            // SAFETY: `Winograd::own` made room for M, and V was just filled; the output holds every tile.
            unsafe { work.multiply::<V>(panel) };
        }
    }
}

impl Work<'_> {
    /// Image, row and column of a tile.
    #[inline(always)]
    fn place(&self, tile: usize) -> (usize, usize, usize) {
        let [down, across] = self.step.tiles;
        (tile / (down * across), tile / across % down, tile % across)
    }

    /// Fills V for the tiles that one microkernel reads.
    ///
    /// # Safety
    /// There is room for them in V, which nobody else has, and the input has a border around every tile.
    #[inline(always)]
    unsafe fn transform<V: Lanes>(&self, group: usize) {
        let s = self.step;
        let (rows, wide, g) = (self.rows, s.isa.rows(), &s.input.geometry);
        let (blocks, m) = (g.blocks(), s.size.outputs());
        let start = group * rows;
        for r in start..self.count.min(start + rows) {
            let (image, y, x) = self.place(self.first + r);
            let corner = (g.before[0] + y * m - s.padding[0]) * g.row() + (g.before[1] + x * m - s.padding[1]) * LANES;
            let from = self.cx.image(&s.input, image).wrapping_add(corner);
            let to = self.v.wrapping_add((group * blocks * wide + (r - start)) * LANES);
            for q in 0..blocks {
                let to = to.wrapping_add(q * wide * LANES);
                // SAFETY: the caller's promise.
                unsafe {
                    let pixels = Pixels { from: from.wrapping_add(q * g.plane()), row: g.row(), pixel: LANES };
                    transform_input::<V>(s.size, pixels, to, s.v_plane());
                }
            }
        }
    }

    /// All products of one panel of output channels, and what becomes of them.
    ///
    /// # Safety
    /// V is filled; M, which nobody else has, has room for the products, and the output for the tiles.
    #[inline(always)]
    unsafe fn multiply<V: Lanes>(&self, panel: usize) {
        let s = self.step;
        let (rows, columns, wide) = (self.rows, s.columns(panel), s.isa.columns());
        let inputs = s.input.geometry.blocks() * LANES;
        let products = s.size.products();
        let u_len = inputs * columns * LANES;
        let u = self.cx.weights(s.weights + panel * wide * LANES * inputs * products, u_len * products);
        let groups = self.count.div_ceil(rows);
        // U of the next product comes from far away, once for all tiles of the block: each microkernel asks for a slice of
        // it. Alone, U is small and stays near.
        let slice = if s.alone { 0 } else { u_len.div_ceil(LANES * s.offsets.len() * groups) };
        for k in 0..products {
            for (group, start) in (0..self.count).step_by(rows).enumerate() {
                let job = Tile {
                    input: self.v.wrapping_add(k * s.v_plane() + group * s.isa.rows() * inputs),
                    stride: LANES,
                    offsets: &s.offsets,
                    len: LANES,
                    short: 0,
                    short_len: 0,
                    weights: u.wrapping_add(k * u_len),
                    later: u.wrapping_add((k + 1) * u_len + group * slice * s.offsets.len() * LANES),
                    later_lines: slice,
                    output: self.m.wrapping_add(k * s.m_plane() + start * columns * LANES),
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
        let bias = self.cx.weights(s.bias, s.output.geometry.blocks() * LANES);
        for t in 0..self.count {
            let (image, y, x) = self.place(self.first + t);
            let spot = Spot::new(s, &s.output.geometry, y, x, s.pool);
            let to = self.cx.image_mut(&s.output, image).wrapping_add(spot.start);
            for c in 0..columns {
                let block = panel * wide + c;
                let (residual, residual_row) = match &s.residual {
                    Some(value) => {
                        let g = &value.geometry;
                        let start = Spot::new(s, g, y, x, false).start + block * g.plane();
                        (self.cx.image(value, image).wrapping_add(start), g.row())
                    }
                    None => (std::ptr::null(), 0),
                };
                let finish = Finish {
                    to: to.wrapping_add(block * s.output.geometry.plane()),
                    row: s.output.geometry.row(),
                    pixel: LANES,
                    inside: spot.inside,
                    pool: s.pool,
                    bias: bias.wrapping_add(block * LANES),
                    residual,
                    residual_row,
                    activation: s.activation,
                };
                let from = self.m.wrapping_add((t * columns + c) * LANES);
                // SAFETY: the caller's promise.
                unsafe { transform_output::<V>(s.size, from, s.m_plane(), &finish) };
            }
        }
    }
}

/// Where a tile's outputs go.
struct Spot {
    start: usize,
    inside: Pair,
}

impl Spot {
    #[inline(always)]
    fn new(step: &Winograd, g: &Geometry, y: usize, x: usize, pool: bool) -> Self {
        let m = if pool { step.size.outputs() / 2 } else { step.size.outputs() };
        let (y, x) = (y * m, x * m);
        // A pooled image of odd size ends before its last tile may begin.
        let inside = [g.height.saturating_sub(y), g.width.saturating_sub(x)];
        Self { start: g.at(y, x), inside }
    }
}

/// Bytes of arithmetic saved tell little; what counts are products per output, and the cheaper transform on a tie.
pub fn best_size(output: Pair) -> Size {
    let cost = |size: Size| {
        let [down, across] = tiles(size, output);
        down * across * size.products()
    };
    if cost(Size::Six) < cost(Size::Four) { Size::Six } else { Size::Four }
}

/// The filters of a layer: `[out][in][3][3]`, with one factor per output channel.
#[derive(Clone, Copy)]
pub struct Filters<'a> {
    pub size: Size,
    pub isa: Isa,
    pub out: usize,
    pub inp: usize,
    pub weight: &'a [f32],
    pub scale: Option<&'a [f64]>,
}

impl Filters<'_> {
    /// Floats of a panel: as many output channels as a tile of the microkernel has, or what is left of them.
    pub fn panel(&self) -> usize {
        self.isa.columns() * LANES * self.inp.next_multiple_of(LANES) * self.size.products()
    }

    /// U of one panel, `[product][in][out of the panel]`; `panel`: its number.
    pub fn transform(self, panel: usize, u: &mut [f32]) {
        dispatch_narrow(Panel { filters: self, first: panel * self.isa.columns() * LANES, u });
    }
}

/// U of one panel, from channel `first` on.
struct Panel<'a> {
    filters: Filters<'a>,
    first: usize,
    u: &'a mut [f32],
}

impl Compiled for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn portable(self) {
        self.run();
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn avx2(self) {
        self.run();
    }
}

impl Panel<'_> {
    /// Filters at a time: in float64, two vectors of AVX2.
    const WIDE: usize = 8;

    #[inline(always)]
    fn run(self) {
        let Filters { size, out, inp, weight, scale, .. } = self.filters;
        let (inputs, products) = (inp.next_multiple_of(LANES), size.products());
        let width = self.u.len() / (inputs * products);
        let mut filter = [[0.0; Self::WIDE]; 9];
        let mut product = vec![[0.0; Self::WIDE]; products];
        // The products of one input channel first: in U they are far from each other.
        let mut near = vec![0.0f32; products * width];
        for i in 0..inp {
            for start in (0..width).step_by(Self::WIDE) {
                for lane in 0..Self::WIDE {
                    let o = self.first + start + lane;
                    let factor = scale.map_or(1.0, |s| s.get(o).copied().unwrap_or(0.0));
                    for (k, f) in filter.iter_mut().enumerate() {
                        f[lane] = if o < out { f64::from(weight[(o * inp + i) * 9 + k]) * factor } else { 0.0 };
                    }
                }
                size.transform_weights(&filter, &mut product);
                for (product, near) in product.iter().zip(near.chunks_exact_mut(width)) {
                    for (&p, to) in product.iter().zip(&mut near[start..]) {
                        *to = p as f32;
                    }
                }
            }
            for (k, near) in near.chunks_exact(width).enumerate() {
                self.u[(k * inputs + i) * width..][..width].copy_from_slice(near);
            }
        }
    }
}
