//! Operations that PyTorch's autograd calls one by one, over its own tensors in `channels_last`: what its kernels for the
//! CPU take longer for.
//!
//! Images are `[images][height][width][channels]`.

mod batch_norm;
mod conv3x3;
mod conv3x3_direct;
mod conv3x3_direct_weight;
mod conv3x3_method;
mod conv3x3_weight;
mod depthwise;
mod depthwise_gradient;
mod depthwise_rows;
mod depthwise_taps;
mod gate;
mod late;
mod pointwise;
mod pointwise_gradient;
mod rows;
#[cfg(test)]
mod tests;
mod threads;

pub use batch_norm::{Backward, BatchNorm, Forward};
pub use conv3x3::{Conv3x3, Filters};
pub use depthwise::Depthwise;
pub use gate::Gate;
pub use late::{Derivative, Gradients, Late, Moments, Norm, Open, Sums, Values};
pub use pointwise::Pointwise;
pub use threads::Threads;

pub use crate::engine::cpu::common::kernels::activate::Activate;

use crate::engine::cpu::common::arena::Arena;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{LANES, Lanes};
use crate::engine::cpu::common::kernels::winograd::Pixels;
use crate::error::{Error, Result};
use crate::model::Pair;

/// What the operations of a network share: threads, and memory that each of them uses for itself alone.
pub struct Workspace {
    pub isa: Isa,
    pub threads: Threads,
    memory: Option<Arena>,
}

impl Workspace {
    pub fn new(threads: Threads) -> Self {
        Self { isa: Isa::best(), threads, memory: None }
    }

    /// At least `floats` of memory, contents unspecified.
    fn memory(&mut self, floats: usize) -> Result<*mut f32> {
        if self.memory.as_ref().is_none_or(|memory| memory.len() < floats) {
            // The old memory first: the two need not fit side by side.
            self.memory = None;
            let error = |_| Error::NoMemory(format!("no memory for {} bytes of a convolution's tiles", floats * 4));
            self.memory = Some(Arena::pages(floats).map_err(error)?);
        }
        self.memory.as_ref().map(|memory| memory.at(0, floats)).ok_or_else(|| Error::internal("no workspace"))
    }
}

/// Sizes of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub images: usize,
    pub size: Pair,
    pub channels: usize,
}

impl Shape {
    pub fn floats(&self) -> usize {
        self.images * self.size[0] * self.size[1] * self.channels
    }

    pub fn blocks(&self) -> usize {
        self.channels / LANES
    }

    fn row(&self) -> usize {
        self.size[1] * self.channels
    }
}

/// Where `N` x `N` pixels of sixteen channels are whose first is at `corner`; in `patch` where some lie outside the image,
/// as zeros.
///
/// # Safety
/// `image` is readable as `shape` says.
#[inline(always)]
unsafe fn patch<V: Lanes, const N: usize>(
    image: *const f32,
    shape: &Shape,
    corner: [isize; 2],
    block: usize,
    patch: &mut [[[f32; LANES]; N]; N],
) -> Pixels {
    let [height, width] = shape.size.map(usize::cast_signed);
    let [y, x] = corner;
    let n = N.cast_signed();
    let at = |y: isize, x: isize| ((y * width + x) * shape.channels.cast_signed()) + (block * LANES).cast_signed();
    if y >= 0 && x >= 0 && y + n <= height && x + n <= width {
        return Pixels { from: image.wrapping_offset(at(y, x)), row: shape.row(), pixel: shape.channels };
    }
    for (dy, row) in (0..n).zip(patch.iter_mut()) {
        for (dx, pixel) in (0..n).zip(row.iter_mut()) {
            let inside = (0..height).contains(&(y + dy)) && (0..width).contains(&(x + dx));
            let value = match inside {
                // SAFETY: the pixel is inside the image.
                true => unsafe { V::load(image.wrapping_offset(at(y + dy, x + dx))) },
                false => V::splat(0.0),
            };
            // SAFETY: sixteen floats.
            unsafe { value.store(pixel.as_mut_ptr()) };
        }
    }
    Pixels { from: patch.as_ptr().cast(), row: N * LANES, pixel: LANES }
}

/// An address that several threads use, each at places of its own.
#[derive(Clone, Copy)]
struct Address(*mut f32);

// SAFETY: using it is unsafe, and its user's promise.
unsafe impl Send for Address {}
// SAFETY: as for `Send`.
unsafe impl Sync for Address {}

impl Address {
    #[inline(always)]
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}
