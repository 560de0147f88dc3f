//! Where values live: their geometry, and the memory that all workers share.
//!
//! Two workers never write the same floats at the same time: a step divides its output among its tasks, every task runs
//! once, and a barrier separates the steps (and the phases of a step). All addresses come from the geometry that
//! `build` computed; that is what makes the kernels' use of raw memory sound.

use memmap2::MmapMut;

use super::kernels::lanes::LANES;
use crate::error::{Error, Result};
use crate::model::Pair;
use crate::os;

/// How one image of a value lies in memory: `[blocks][height + border][width + border][pixel]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    /// Zeros above and to the left.
    pub before: Pair,
    /// Zeros below and to the right.
    pub after: Pair,
    /// Channels that lie together: [`LANES`], or all of them where a network reads few (colour images).
    pub pixel: usize,
}

impl Geometry {
    /// Blocks of sixteen channels. A vector of F features is an image of F channels and one pixel.
    pub fn blocked(channels: usize, height: usize, width: usize) -> Self {
        Self { channels, height, width, before: [0, 0], after: [0, 0], pixel: LANES }
    }

    /// From PyTorch's shape without the batch.
    pub fn of(shape: &[usize]) -> Option<Self> {
        match *shape {
            [channels] => Some(Self::blocked(channels, 1, 1)),
            [channels, height, width] => Some(Self::blocked(channels, height, width)),
            _ => None,
        }
    }

    /// Makes room for zeros around the image.
    pub fn widen(&mut self, before: Pair, after: Pair) {
        for i in 0..2 {
            self.before[i] = self.before[i].max(before[i]);
            self.after[i] = self.after[i].max(after[i]);
        }
    }

    pub fn blocks(&self) -> usize {
        self.channels.div_ceil(self.pixel)
    }

    /// Floats between a pixel and the one below.
    pub fn row(&self) -> usize {
        (self.before[1] + self.width + self.after[1]) * self.pixel
    }

    /// Floats between a block of channels and the next.
    pub fn plane(&self) -> usize {
        (self.before[0] + self.height + self.after[0]) * self.row()
    }

    /// Floats of one image.
    pub fn len(&self) -> usize {
        self.blocks() * self.plane()
    }

    /// Where pixel (y, x) of block 0 begins.
    pub fn at(&self, y: usize, x: usize) -> usize {
        (self.before[0] + y) * self.row() + (self.before[1] + x) * self.pixel
    }
}

/// Zeroed floats, page by page as they are first used.
pub struct Arena {
    start: *mut f32,
    len: usize,
    _map: MmapMut,
}

// SAFETY: an arena is an address; who writes what, and when, is the schedule's (head of this file).
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// # Errors
    /// `Argument` when there is not that much memory.
    pub fn new(len: usize) -> Result<Self> {
        let none = |error: std::io::Error| {
            let gib = len as f64 * 4.0 / f64::from(1 << 30);
            Error::Argument(format!("no memory for {gib:.2} GiB of weights and activations: {error}"))
        };
        let mut map = MmapMut::map_anon(len.max(1) * 4).map_err(none)?;
        // Transformed tiles are written to dozens of distant planes: with 4 KiB pages each is a miss of the TLB.
        os::ask_for_large_pages(&map);
        Ok(Self { start: map.as_mut_ptr().cast(), len, _map: map })
    }

    /// The address of `len` floats from `offset`.
    pub fn at(&self, offset: usize, len: usize) -> *mut f32 {
        assert!(offset + len <= self.len, "{len} floats at {offset} of {}", self.len);
        self.start.wrapping_add(offset)
    }

    /// The whole arena, while nobody shares it.
    pub fn slice_mut(&mut self) -> &mut [f32] {
        // SAFETY: the map holds `len` zeroed or written floats, and `&mut self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

/// Where the images of a value are.
#[derive(Debug, Clone, Copy)]
pub struct Value {
    pub geometry: Geometry,
    pub offset: usize,
    /// Holds the whole batch, not only the group of images that is being computed.
    pub whole: bool,
}

/// What a task sees.
pub struct Context<'a> {
    pub arena: &'a Arena,
    pub weights: &'a Arena,
    /// Memory all workers share during one step.
    pub shared: *mut f32,
    /// This worker's own memory.
    pub own: *mut f32,
    /// First image of the group, and how many.
    pub first: usize,
    pub images: usize,
    /// The caller's batch, NCHW.
    pub input: *const f32,
    pub output: *mut f32,
}

// SAFETY: addresses; see the head of this file.
unsafe impl Sync for Context<'_> {}

impl Context<'_> {
    /// Where image `image` of the group begins.
    pub fn image(&self, value: &Value, image: usize) -> *mut f32 {
        assert!(image < self.images, "image {image} of {}", self.images);
        let index = if value.whole { self.first + image } else { image };
        self.arena.at(value.offset + index * value.geometry.len(), value.geometry.len())
    }
}
