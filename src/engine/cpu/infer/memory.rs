//! Where values live: their geometry, and the memory that all workers share.
//!
//! Two workers never write the same floats at the same time: a step divides its output among its tasks, every task runs
//! once, and a barrier separates the steps (and the phases of a step). Values that are needed at the same time are
//! apart (`plan` asserts it). All addresses come from the geometry that `build` computed. Kernels use addresses, never
//! slices of memory that another task may write.

use crate::engine::cpu::common::arena::Arena;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::error::{Error, Result};
use crate::model::Pair;

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

/// # Errors
/// `NoMemory` when there is not that much memory.
pub fn arena(len: usize) -> Result<Arena> {
    Arena::pages(len).map_err(|error| {
        let gib = len as f64 * 4.0 / f64::from(1 << 30);
        Error::NoMemory(format!("no memory for {gib:.2} GiB of weights and activations: {error}"))
    })
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

// SAFETY: shared by the functions of one task; it holds addresses, whose use is unsafe and each task's promise.
unsafe impl Sync for Context<'_> {}

impl Context<'_> {
    /// Where image `image` of the group begins, to be read: no task of this phase writes the value.
    pub fn image(&self, value: &Value, image: usize) -> *const f32 {
        self.image_mut(value, image)
    }

    /// The same, of a value that this step makes: a task writes only its own part, between the borders.
    pub fn image_mut(&self, value: &Value, image: usize) -> *mut f32 {
        assert!(image < self.images, "image {image} of {}", self.images);
        let index = if value.whole { self.first + image } else { image };
        self.arena.at(value.offset + index * value.geometry.len(), value.geometry.len())
    }

    /// `len` of the weights from `offset`; nobody writes them after the first batch.
    pub fn weights(&self, offset: usize, len: usize) -> *const f32 {
        self.weights.at(offset, len)
    }
}
