//! What both directions of a depthwise convolution share: how the work is divided, and rows that wait in a worker's cache.

use std::ops::Range;

use super::depthwise::Depthwise;
use super::late::{Derivative, Late, Norm, Values};
use super::rows::Channels;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

/// Floats of the rows that wait, at most: in the second-level cache, beside what is read and written.
const CACHE: usize = 1 << 16;

/// Pixels of a row below which several rows are computed before the next ones are read.
const LONG: usize = 28;

/// Tasks per worker: as many as share the work evenly.
const TASKS: usize = 8;

/// A task is a band of output rows of an image, of a group of blocks of channels.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    pub channels: Channels,
    height: usize,
    bands: usize,
    images: usize,
    groups: usize,
    /// Output rows that are computed together.
    pub step: usize,
}

/// What a task computes; `part` counts images and their bands.
pub struct Share {
    pub part: usize,
    pub image: usize,
    pub rows: Range<usize>,
    pub blocks: Range<usize>,
}

impl Cut {
    /// `floats`: what a block of channels takes in the cache if that many output rows are computed together.
    pub fn new(conv: &Depthwise, workers: usize, floats: impl Fn(usize) -> usize) -> Self {
        let ([height, width], channels, images) =
            (conv.output().size, Channels(conv.input.channels), conv.input.images);
        let step = LONG.div_ceil(width).min(height);
        let wanted = TASKS * workers;
        let bands = wanted.div_ceil(images.max(1)).clamp(1, height.div_ceil(2 * conv.kernel));
        let mut cut = Self { channels, height, bands, images, groups: 1, step };
        let for_cache = (cut.channels.blocks() * floats(step)).div_ceil(CACHE);
        // Two blocks at least: of each pixel's channels, whole cache lines in a row.
        let for_workers = wanted.div_ceil((images * bands).max(1)).min(cut.units() / 2);
        cut.groups = for_cache.max(for_workers).clamp(1, cut.units());
        cut
    }

    pub fn tasks(&self) -> usize {
        self.parts() * self.groups
    }

    pub fn parts(&self) -> usize {
        self.images * self.bands
    }

    pub fn rows(&self, part: usize) -> Range<usize> {
        let band = part % self.bands;
        self.height * band / self.bands..self.height * (band + 1) / self.bands
    }

    pub fn share(&self, task: usize) -> Share {
        let (part, group) = (task / self.groups, task % self.groups);
        Share { part, image: part / self.bands, rows: self.rows(part), blocks: self.group(group) }
    }

    /// What the last two blocks both have, of all blocks behind each other.
    pub fn twice(&self) -> Range<usize> {
        let last = self.channels.padded() - LANES;
        last..last + self.channels.twice()
    }

    /// Blocks of the largest group.
    pub fn widest(&self) -> usize {
        (0..self.groups).map(|group| self.group(group).len()).max().unwrap_or(0)
    }

    /// Blocks, of which the last two, if they overlap, are one: what they both write is then one thread's.
    fn units(&self) -> usize {
        (self.channels.0 / LANES).max(1)
    }

    fn group(&self, group: usize) -> Range<usize> {
        let [start, end] = [group, group + 1].map(|group| self.units() * group / self.groups);
        start..if end == self.units() { self.channels.blocks() } else { end }
    }
}

/// Rows of some blocks of channels, each row's pixels of a block behind each other between zeros; a new row takes the place
/// of the oldest.
#[derive(Clone, Copy)]
pub struct Ring {
    pub at: *mut f32,
    pub rows: usize,
    /// Pixels of a row, and zeros before them.
    pub width: usize,
    pub border: usize,
    pub blocks: usize,
}

impl Ring {
    pub fn floats(rows: usize, width: usize, blocks: usize) -> usize {
        rows * blocks * width * LANES
    }

    /// Zeros around `inner` pixels of every row.
    ///
    /// # Safety
    /// The ring is writable.
    pub unsafe fn clear(&self, inner: usize) {
        let before = self.border.min(self.width);
        let behind = (self.border + inner).min(self.width);
        for row in 0..self.rows * self.blocks {
            let row = self.at.wrapping_add(row * self.block());
            // SAFETY: the caller's promise.
            unsafe {
                row.write_bytes(0, before * LANES);
                row.wrapping_add(behind * LANES).write_bytes(0, (self.width - behind) * LANES);
            }
        }
    }

    /// Floats from one block of a row to the next.
    #[inline(always)]
    pub fn block(&self) -> usize {
        self.width * LANES
    }

    /// A row's first block.
    #[inline(always)]
    pub fn row(&self, y: usize) -> *mut f32 {
        self.at.wrapping_add(y % self.rows * self.blocks * self.block())
    }

    /// The same behind its zeros.
    #[inline(always)]
    pub fn pixels(&self, y: usize) -> *mut f32 {
        self.row(y).wrapping_add(self.border * LANES)
    }
}

/// Where rows come from.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    pub x: *const f32,
    pub norm: Option<&'a Norm>,
    late: Option<&'a Late<'a>>,
}

// SAFETY: it only reads.
unsafe impl Sync for Reader<'_> {}

impl<'a> Reader<'a> {
    pub fn of(values: Values<'a>) -> Self {
        Self { x: values.x.as_ptr(), norm: values.norm, late: None }
    }

    pub fn derivative(derivative: Derivative<'a>) -> Self {
        Self { x: derivative.d.as_ptr(), norm: None, late: derivative.late }
    }

    /// `width` pixels of some blocks of channels into row `y` of a ring, computed if need be.
    ///
    /// # Safety
    /// The images have them from offset `from` on, and the ring has room.
    #[inline(never)]
    pub unsafe fn read(
        self,
        isa: Isa,
        from: usize,
        cut: &Cut,
        blocks: Range<usize>,
        ring: &Ring,
        (y, width): (usize, usize),
    ) {
        dispatch(isa, Read { reader: self, from, cut, blocks, ring, y, width });
    }

    /// Some pixels of sixteen channels, those from `channel` on.
    ///
    /// # Safety
    /// They lie `pixel` floats apart from offset `from` on; there is room for them at `to`.
    #[inline(always)]
    unsafe fn strip<V: Lanes>(&self, from: usize, pixel: usize, channel: usize, to: *mut f32, width: usize) {
        let at = self.x.wrapping_add(from);
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(norm) = self.norm {
                let norm = norm.lanes::<V>(channel);
                for x in 0..width {
                    ahead::<V>(at.wrapping_add(x * pixel));
                    norm.value(V::load(at.wrapping_add(x * pixel))).store(to.wrapping_add(x * LANES));
                }
            } else if let Some(late) = self.late {
                let (lanes, other) = (late.lanes::<V>(channel), late.x.as_ptr().wrapping_add(from));
                for x in 0..width {
                    ahead::<V>(at.wrapping_add(x * pixel));
                    ahead::<V>(other.wrapping_add(x * pixel));
                    let d = V::load(at.wrapping_add(x * pixel));
                    lanes.value(V::load(other.wrapping_add(x * pixel)), d).store(to.wrapping_add(x * LANES));
                }
            } else {
                for x in 0..width {
                    ahead::<V>(at.wrapping_add(x * pixel));
                    V::load(at.wrapping_add(x * pixel)).store(to.wrapping_add(x * LANES));
                }
            }
        }
    }
}

/// A row that is read.
struct Read<'a> {
    reader: Reader<'a>,
    from: usize,
    cut: &'a Cut,
    blocks: Range<usize>,
    ring: &'a Ring,
    y: usize,
    width: usize,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { reader, cut, ring, width, .. } = self;
        let to = ring.pixels(self.y);
        // Through memory in its order, or nearly so.
        for x in (0..width).step_by(STRIP) {
            let pixels = STRIP.min(width - x);
            for block in self.blocks.clone() {
                let start = cut.channels.start(block);
                let from = self.from + x * cut.channels.0 + start;
                let to = to.wrapping_add((block - self.blocks.start) * ring.block() + x * LANES);
                // SAFETY: the promise to `Reader::read`.
                unsafe { reader.strip::<V>(from, cut.channels.0, start, to, pixels) };
            }
        }
    }
}

/// Asks for what lies a page further on: the processor itself looks no further than the end of one.
#[inline(always)]
pub fn ahead<V: Lanes>(at: *const f32) {
    V::prefetch(at.wrapping_add(AHEAD));
}

const AHEAD: usize = 1 << 10;

/// Pixels that are read together, of each block.
pub const STRIP: usize = 8;
