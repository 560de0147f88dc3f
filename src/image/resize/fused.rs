//! Resize and normalise in one go: rows become floats while they are in the cache, straight in the batch.

#![forbid(unsafe_code)]

use super::passes::{BLOCK, ResizeScratch, RowSink, resize_into};
use super::{Filter, PillowOrder, ResizePath};
use crate::error::Result;
use crate::image::{Image, Layout, Normalizer};
use crate::memory;

/// Rows of the result on their way to the planes of the tensor.
struct Normalized<'a> {
    rows: &'a mut [u8],
    stride: usize,
    layout: Layout,
    normalizer: &'a Normalizer,
    size: usize,
    out: &'a mut [f32],
}

impl RowSink for Normalized<'_> {
    fn room(&mut self, _: usize, count: usize) -> &mut [u8] {
        &mut self.rows[..count * self.stride]
    }

    fn done(&mut self, y: usize, count: usize) {
        let at = y * self.stride / self.layout.bytes_per_pixel();
        self.normalizer.part(&self.rows[..count * self.stride], self.layout, at, self.size, self.out);
    }
}

/// `image` resized to `(height, width)`, normalised, into the `channels x height x width` values of `out`. `image` stays
/// as it is. Whether it could be done: not to the same size, and not with [`Filter::Nearest`].
pub fn resize_normalized(
    image: &Image,
    (height, width): (usize, usize),
    filter: Filter,
    order: PillowOrder,
    normalizer: &Normalizer,
    scratch: &mut ResizeScratch,
    out: &mut [f32],
) -> Result<bool> {
    if filter == Filter::Nearest || (image.height, image.width) == (height, width) {
        return Ok(false);
    }
    let layout = image.layout;
    let stride = width * layout.bytes_per_pixel();
    let mut rows = std::mem::take(&mut scratch.rows);
    memory::resize(&mut rows, BLOCK * stride)?;
    let mut sink = Normalized { rows: &mut rows, stride, layout, normalizer, size: height * width, out };
    resize_into(ResizePath::best(), image, (height, width), filter, order, scratch, &mut sink)?;
    scratch.rows = rows;
    Ok(true)
}
