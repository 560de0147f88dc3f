//! The two passes of a resize, a few rows at a time: what one pass leaves is still in the cache when the other reads it.

#![forbid(unsafe_code)]

use super::taps::clip;
use super::weights::{WeightCache, Weights};
use super::{Filter, ResizePath};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, vbmi};
use crate::error::Result;
use crate::image::{Image, Layout};
use crate::memory;

/// Which pass runs first; each pass rounds to 8 bits, so the order shows in the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PillowOrder {
    /// Pillow 12: along the rows first, unless the image is more than a hundred times as high as wide and gets lower.
    HorizontalFirst,
    /// Pillow 13: down the columns first when the height shrinks by more than twice what the width does.
    #[default]
    Pillow13,
}

/// Buffers and weights that resizing needs and the next image can use again.
#[derive(Debug, Default)]
pub struct ResizeScratch {
    pub(super) weights: WeightCache,
    /// Rows after the first pass that the second one still reads.
    pub(super) between: Vec<u8>,
    /// Rows of the result that go on to the tensor.
    pub(super) rows: Vec<u8>,
    pub(super) result: Image,
}

/// Rows of the first pass at a time; the kernels take four.
const STRIP: usize = 16;

/// Rows of the result at a time when the pass along the rows comes last.
pub(super) const BLOCK: usize = 4;

/// Where the rows of the result go, top to bottom.
pub(super) trait RowSink {
    /// Room for rows `y` to `y + count`; `count` is at most [`BLOCK`].
    fn room(&mut self, y: usize, count: usize) -> &mut [u8];
    /// These rows are complete.
    fn done(&mut self, y: usize, count: usize);
}

/// All rows behind each other.
pub(super) struct Whole<'a> {
    pub stride: usize,
    pub data: &'a mut [u8],
}

impl RowSink for Whole<'_> {
    fn room(&mut self, y: usize, count: usize) -> &mut [u8] {
        &mut self.data[y * self.stride..(y + count) * self.stride]
    }

    fn done(&mut self, _: usize, _: usize) {}
}

/// Resizes to `(height, width)`, which is not the size of `image`, with a filter that has weights.
pub(super) fn resize_into(
    path: ResizePath,
    image: &Image,
    (height, width): (usize, usize),
    filter: Filter,
    order: PillowOrder,
    scratch: &mut ResizeScratch,
    out: &mut impl RowSink,
) -> Result<()> {
    let ResizeScratch { weights, between, .. } = scratch;
    let shrinks_by = |from: usize, to: usize| from as i64 - to as i64;
    let down = shrinks_by(image.height, height);
    let columns_first = down > 0
        && match order {
            PillowOrder::Pillow13 => down > 2 * shrinks_by(image.width, width),
            PillowOrder::HorizontalFirst => image.height > 100 * image.width,
        };
    let mut table = |from, to| (from != to).then(|| weights.get(path, from, to, filter)).transpose();
    let (rows, columns) = (table(image.width, width)?, table(image.height, height)?);
    match (rows, columns) {
        (None, None) => {}
        (None, Some(columns)) => {
            for y in 0..height {
                let room = out.room(y, 1);
                vertical(path, &image.data, image.stride(), 0, &columns, y, room);
                out.done(y, 1);
            }
        }
        (Some(rows), columns) if columns.is_none() || columns_first => {
            for y in (0..height).step_by(BLOCK) {
                let count = BLOCK.min(height - y);
                let stride = image.stride();
                let input = match &columns {
                    None => &image.data[y * stride..(y + count) * stride],
                    Some(columns) => {
                        memory::resize(between, BLOCK * stride)?;
                        for (i, line) in between.chunks_exact_mut(stride).take(count).enumerate() {
                            vertical(path, &image.data, stride, 0, columns, y + i, line);
                        }
                        &between[..count * stride]
                    }
                };
                horizontal(path, input, image.layout, &rows, out.room(y, count));
                out.done(y, count);
            }
        }
        (Some(rows), columns) => {
            if let Some(columns) = columns {
                rows_first(path, image, &rows, &columns, between, out)?;
            }
        }
    }
    Ok(())
}

fn rows_first(
    path: ResizePath,
    image: &Image,
    rows: &Weights,
    columns: &Weights,
    between: &mut Vec<u8>,
    out: &mut impl RowSink,
) -> Result<()> {
    let in_stride = image.stride();
    let stride = rows.windows.len() * image.layout.bytes_per_pixel();
    let tallest = columns.windows.iter().map(|w| w.count).max().unwrap_or(0);
    let capacity = tallest + STRIP;
    memory::resize(between, capacity * stride)?;
    // Only the rows that the second pass reads: `start` to `end` of them lie in `between`.
    let last = columns.windows.last().map_or(0, |w| w.first + w.count);
    let mut start = columns.windows.first().map_or(0, |w| w.first);
    let mut end = start;
    for (y, window) in columns.windows.iter().enumerate() {
        if end < window.first {
            // A rounding error between two windows of the box filter leaves a row out that nobody reads.
            (start, end) = (window.first, window.first);
        }
        while end < window.first + window.count {
            let count = STRIP.min(last - end);
            if end - start + count > capacity {
                between.copy_within((window.first - start) * stride..(end - start) * stride, 0);
                start = window.first;
            }
            let input = &image.data[end * in_stride..(end + count) * in_stride];
            horizontal(path, input, image.layout, rows, &mut between[(end - start) * stride..][..count * stride]);
            end += count;
        }
        vertical(path, between, stride, start, columns, y, out.room(y, 1));
        out.done(y, 1);
    }
    Ok(())
}

/// Whole rows of `input` along the rows.
fn horizontal(path: ResizePath, input: &[u8], layout: Layout, weights: &Weights, out: &mut [u8]) {
    let pixel = layout.bytes_per_pixel();
    let out_stride = weights.windows.len() * pixel;
    let stride = input.len() / (out.len() / out_stride);
    match (path, layout) {
        #[cfg(target_arch = "x86_64")]
        (ResizePath::Avx2, Layout::Rgbx) if weights.pairs.fits() => {
            return avx2::horizontal(input, stride, &weights.pairs, out);
        }
        #[cfg(target_arch = "x86_64")]
        (ResizePath::Vbmi, Layout::Rgbx) if weights.groups.fits() => {
            return vbmi::horizontal(input, stride, &weights.groups, out);
        }
        #[cfg(target_arch = "x86_64")]
        (ResizePath::Avx512 | ResizePath::Vbmi, Layout::Rgbx) if weights.quads.fits() => {
            return avx512::horizontal(input, stride, &weights.quads, out);
        }
        _ => {}
    }
    for (line, out_line) in input.chunks_exact(stride).zip(out.chunks_exact_mut(out_stride)) {
        for (window, out_pixel) in weights.windows.iter().zip(out_line.chunks_exact_mut(pixel)) {
            let k = &weights.values[window.offset..window.offset + window.count];
            for (channel, value) in out_pixel.iter_mut().enumerate() {
                let taps = line[window.first * pixel + channel..].iter().step_by(pixel);
                *value = clip(k.iter().zip(taps).map(|(&k, &v)| k * i32::from(v)).sum());
            }
        }
    }
}

/// Output row `y` from `data`, which begins with row `first` of the picture the weights are for.
fn vertical(path: ResizePath, data: &[u8], stride: usize, first: usize, weights: &Weights, y: usize, out: &mut [u8]) {
    let window = weights.windows[y];
    let input = &data[(window.first - first) * stride..][..window.count * stride];
    let done = match path {
        ResizePath::Scalar => false,
        #[cfg(target_arch = "x86_64")]
        ResizePath::Avx2 => avx2::vertical(input, stride, window.count, weights.pairs.down(y), out),
        #[cfg(target_arch = "x86_64")]
        ResizePath::Avx512 | ResizePath::Vbmi => {
            avx512::vertical(input, stride, window.count, weights.quads.down(y), out)
        }
    };
    if done {
        return;
    }
    let k = &weights.values[window.offset..window.offset + window.count];
    for (x, value) in out.iter_mut().enumerate() {
        *value = clip(k.iter().zip(input[x..].iter().step_by(stride)).map(|(&k, &v)| k * i32::from(v)).sum());
    }
}
