//! A 3 x 3 convolution by Winograd's algorithm, but for where its pixels come from and where they go: blocks of tiles and
//! their products.
//!
//! ```text
//! V = [block of tiles][k][tiles / rows][in / 16][rows][16]     what the microkernel reads, in its order
//! U = [panel of output channels][k][in][columns * 16]
//! M = [k][tile][columns * 16]                                  one panel of one block, never leaves the worker's cache
//! ```

use super::isa::Isa;
use super::kernels::activate::Activate;
use super::kernels::lanes::{LANES, Lanes};
use super::kernels::tile::{Tile, tile};
use super::kernels::winograd::Size;

/// Planes an odd number of cache lines apart do not fall into the same sets.
pub fn odd(floats: usize) -> usize {
    ((floats / LANES) | 1) * LANES
}

/// How the tiles of a layer are divided, and how much memory that takes.
pub struct Blocks {
    pub isa: Isa,
    pub size: Size,
    /// Blocks of sixteen input and output channels.
    pub ins: usize,
    pub outs: usize,
    /// Tiles that are taken through the layer together, a multiple of the microkernel's rows.
    pub tiles: usize,
    /// One worker takes a block through the whole layer. Otherwise all transform the input first and then share the
    /// pairs of block and panel: better when there are few blocks, or when U is large.
    pub alone: bool,
    /// Where the input blocks of a group of tiles begin in V.
    offsets: Vec<usize>,
}

/// One block of tiles.
#[derive(Clone, Copy)]
pub struct Share {
    pub first: usize,
    pub count: usize,
    /// Tiles per microkernel.
    pub rows: usize,
}

impl Share {
    /// Microkernels that it takes.
    pub fn groups(&self) -> usize {
        self.count.div_ceil(self.rows)
    }
}

impl Blocks {
    pub fn new(isa: Isa, size: Size, ins: usize, outs: usize, workers: usize) -> Self {
        // Few channels: U is small and V of a few tiles fits the second-level cache.
        let alone = ins <= 8;
        let bytes = size.products() * ins * LANES * 4;
        let tiles = match alone {
            true => (256 << 10) / bytes,
            // The larger the block, the less often U is read; many workers need many blocks.
            false if workers <= 4 => 112,
            false => 42,
        };
        let tiles = (tiles / isa.rows()).max(1) * isa.rows();
        let offsets = (0..ins).map(|q| q * isa.rows() * LANES).collect();
        Self { isa, size, ins, outs, tiles, alone, offsets }
    }

    /// Blocks of so many tiles.
    pub fn count(&self, tiles: usize) -> usize {
        tiles.div_ceil(self.tiles)
    }

    /// Groups of tiles that a block may have.
    pub fn groups(&self) -> usize {
        self.tiles / self.isa.rows()
    }

    pub fn panels(&self) -> usize {
        self.outs.div_ceil(self.isa.columns())
    }

    /// Blocks of sixteen output channels of a panel.
    pub fn columns(&self, panel: usize) -> usize {
        let wide = self.isa.columns();
        wide.min(self.outs - panel * wide)
    }

    pub fn v_plane(&self) -> usize {
        odd(self.tiles * self.ins * LANES)
    }

    /// Floats of V for one block.
    pub fn v_len(&self) -> usize {
        self.size.products() * self.v_plane()
    }

    pub fn m_plane(&self) -> usize {
        odd(self.tiles * self.isa.columns() * LANES)
    }

    /// Floats of a worker's own: M, and alone V in front of it.
    pub fn own(&self) -> usize {
        let m = self.size.products() * self.m_plane();
        if self.alone { self.v_len() + m } else { m }
    }

    /// A block of `tiles` tiles in all.
    pub fn share(&self, tiles: usize, block: usize) -> Share {
        // Blocks, and the microkernels of a block, of about the same size: a last one of two tiles would waste registers.
        let blocks = self.count(tiles);
        let (first, end) = (tiles * block / blocks, tiles * (block + 1) / blocks);
        let rows = (end - first).div_ceil((end - first).div_ceil(self.isa.rows()));
        Share { first, count: end - first, rows }
    }

    /// Where the products of sixteen channels of a tile go in V: tile `r` of a group, channels `q`.
    #[inline(always)]
    pub fn place(&self, group: usize, r: usize, q: usize) -> usize {
        ((group * self.ins + q) * self.isa.rows() + r) * LANES
    }

    /// M of one panel: all products of a block.
    ///
    /// # Safety
    /// V of the block is filled and `u`, the products of the panel `u_plane` floats apart, readable; M, which nobody else
    /// has, has room for [`Self::m_plane`] floats per product.
    #[inline(always)]
    pub unsafe fn multiply<V: Lanes>(
        &self,
        share: Share,
        panel: usize,
        v: *const f32,
        (u, u_plane): (*const f32, usize),
        m: *mut f32,
    ) {
        let (columns, inputs) = (self.columns(panel), self.ins * LANES);
        // U of the next product comes from far away, once for all tiles of the block: each microkernel asks for a slice of
        // it. Alone, U is small and stays near.
        let slice = if self.alone { 0 } else { u_plane.div_ceil(LANES * self.offsets.len() * share.groups()) };
        for k in 0..self.size.products() {
            for (group, start) in (0..share.count).step_by(share.rows).enumerate() {
                let job = Tile {
                    input: v.wrapping_add(k * self.v_plane() + group * self.isa.rows() * inputs),
                    stride: LANES,
                    offsets: &self.offsets,
                    len: LANES,
                    short: 0,
                    short_len: 0,
                    weights: u.wrapping_add(k * u_plane),
                    later: u.wrapping_add((k + 1) * u_plane + group * slice * self.offsets.len() * LANES),
                    later_lines: slice,
                    output: m.wrapping_add(k * self.m_plane() + start * columns * LANES),
                    output_stride: columns * LANES,
                    output_block: LANES,
                    bias: std::ptr::null(),
                    residual: std::ptr::null(),
                    residual_stride: 0,
                    residual_block: 0,
                    activation: Activate::Nothing,
                };
                // SAFETY: the caller's promise.
                unsafe { tile::<V, false>(share.rows.min(share.count - start), columns, &job) };
            }
        }
    }
}
