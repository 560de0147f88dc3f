//! A 3 x 3 convolution of stride 1 by Winograd's algorithm, with bias, residual, activation and 2 x 2 max-pooling in
//! its output transform.

use super::Step;
use crate::engine::cpu::common::isa::{Compiled, Isa, dispatch_narrow};
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::winograd::{Finish, Pixels, Size, transform_input, transform_output};
use crate::engine::cpu::common::winograd::{Blocks, Share};
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Pair;

pub struct Winograd {
    pub blocks: Blocks,
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
}

/// Tiles of one image, down and across, for the convolution's output.
pub fn tiles(size: Size, output: Pair) -> Pair {
    [output[0].div_ceil(size.outputs()), output[1].div_ceil(size.outputs())]
}

impl Winograd {
    fn all_tiles(&self, images: usize) -> usize {
        images * self.tiles[0] * self.tiles[1]
    }

    fn work<'a>(&'a self, cx: &'a Context<'a>, block: usize, v: *mut f32, m: *mut f32) -> Work<'a> {
        Work { step: self, cx, share: self.blocks.share(self.all_tiles(cx.images), block), v, m }
    }
}

impl Step for Winograd {
    fn phases(&self) -> usize {
        if self.blocks.alone { 1 } else { 2 }
    }

    fn tasks(&self, phase: usize, images: usize) -> usize {
        let blocks = self.blocks.count(self.all_tiles(images));
        match (self.blocks.alone, phase) {
            (true, _) => blocks,
            (false, 0) => blocks * self.blocks.groups(),
            (false, _) => blocks * self.blocks.panels(),
        }
    }

    fn run(&self, phase: usize, task: usize, cx: &Context<'_>) {
        let b = &self.blocks;
        let blocks = b.count(self.all_tiles(cx.images));
        if b.alone {
            let work = self.work(cx, task, cx.own, cx.own.wrapping_add(b.v_len()));
            dispatch(b.isa, Alone(work, 0..b.panels()));
        } else if phase == 0 {
            let (block, group) = (task / b.groups(), task % b.groups());
            let work = self.work(cx, block, cx.shared.wrapping_add(block * b.v_len()), cx.own);
            dispatch(b.isa, Transform(work, group));
        } else {
            // Panels first: a worker's share is a part of U, which is read once, for all blocks of tiles.
            let (panel, block) = (task / blocks, task % blocks);
            let work = self.work(cx, block, cx.shared.wrapping_add(block * b.v_len()), cx.own);
            dispatch(b.isa, Multiply(work, panel));
        }
    }

    fn own(&self) -> usize {
        self.blocks.own()
    }

    fn shared(&self, images: usize) -> usize {
        if self.blocks.alone { 0 } else { self.blocks.count(self.all_tiles(images)) * self.blocks.v_len() }
    }
}

/// One block of tiles.
struct Work<'a> {
    step: &'a Winograd,
    cx: &'a Context<'a>,
    share: Share,
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
        for group in 0..work.share.groups() {
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
        let (s, Share { first, count, rows }) = (self.step, self.share);
        let (b, g, m) = (&s.blocks, &s.input.geometry, s.blocks.size.outputs());
        let start = group * rows;
        for r in start..count.min(start + rows) {
            let (image, y, x) = self.place(first + r);
            let corner = (g.before[0] + y * m - s.padding[0]) * g.row() + (g.before[1] + x * m - s.padding[1]) * LANES;
            let from = self.cx.image(&s.input, image).wrapping_add(corner);
            for q in 0..b.ins {
                let pixels = Pixels { from: from.wrapping_add(q * g.plane()), row: g.row(), pixel: LANES };
                let to = self.v.wrapping_add(b.place(group, r - start, q));
                // SAFETY: the caller's promise.
                unsafe { transform_input::<V>(b.size, pixels, to, b.v_plane()) };
            }
        }
    }

    /// All products of one panel of output channels, and what becomes of them.
    ///
    /// # Safety
    /// V is filled; M, which nobody else has, has room for the products, and the output for the tiles.
    #[inline(always)]
    unsafe fn multiply<V: Lanes>(&self, panel: usize) {
        let (s, b) = (self.step, &self.step.blocks);
        let (columns, wide, inputs) = (b.columns(panel), b.isa.columns(), b.ins * LANES);
        let (u_plane, products) = (inputs * columns * LANES, b.size.products());
        let u = self.cx.weights(s.weights + panel * wide * LANES * inputs * products, u_plane * products);
        // SAFETY: the caller's promise.
        unsafe { b.multiply::<V>(self.share, panel, self.v, (u, u_plane), self.m) };
        let bias = self.cx.weights(s.bias, s.output.geometry.blocks() * LANES);
        for t in 0..self.share.count {
            let (image, y, x) = self.place(self.share.first + t);
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
                unsafe { transform_output::<V>(b.size, from, b.m_plane(), &finish) };
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
        let m = if pool { step.blocks.size.outputs() / 2 } else { step.blocks.size.outputs() };
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
