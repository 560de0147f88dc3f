//! Pillow's 8-bit two-pass resampling: 22-bit fixed-point weights, exact 32-bit sums, one rounding per pass.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod filter;
mod fused;
mod passes;
mod path;
mod size;
mod taps;
#[cfg(target_arch = "x86_64")]
mod vbmi;
mod weights;

pub use filter::Filter;
pub(super) use fused::resize_normalized;
pub use passes::PillowOrder;
pub(super) use passes::ResizeScratch;
use passes::{Whole, resize_into};
pub use path::ResizePath;
pub use size::Size;

use super::Image;
use crate::error::Result;
use crate::memory;

/// Resizes in place as `PIL.Image.resize((width, height), filter)`; zero sizes are the caller's to refuse.
///
/// # Errors
/// When there is no memory for the result.
pub fn resize(image: &mut Image, height: usize, width: usize, filter: Filter, order: PillowOrder) -> Result<()> {
    resize_on(ResizePath::best(), image, height, width, filter, order)
}

/// [`resize`] on a chosen implementation, for tests and benchmarks: one of [`ResizePath::all`].
///
/// # Errors
/// As [`resize`].
pub fn resize_on(
    path: ResizePath,
    image: &mut Image,
    height: usize,
    width: usize,
    filter: Filter,
    order: PillowOrder,
) -> Result<()> {
    resize_with(path, image, height, width, filter, order, &mut ResizeScratch::default())
}

pub(super) fn resize_with(
    path: ResizePath,
    image: &mut Image,
    height: usize,
    width: usize,
    filter: Filter,
    order: PillowOrder,
    scratch: &mut ResizeScratch,
) -> Result<()> {
    if (image.height, image.width) == (height, width) {
        return Ok(());
    }
    let mut result = std::mem::take(&mut scratch.result);
    if filter == Filter::Nearest {
        nearest(image, height, width, &mut result)?;
    } else {
        result.reshape(width, height, image.layout)?;
        let stride = result.stride();
        let mut rows = Whole { stride, data: &mut result.data };
        resize_into(path, image, (height, width), filter, order, scratch, &mut rows)?;
    }
    std::mem::swap(image, &mut result);
    scratch.result = result;
    Ok(())
}

/// Pillow's nearest resize: positions are accumulated, so that they drift as its do.
fn nearest(image: &Image, height: usize, width: usize, out: &mut Image) -> Result<()> {
    out.reshape(width, height, image.layout)?;
    // The table of positions.
    memory::probe(8 * (width + height))?;
    let positions = |input: usize, output: usize| {
        let step = f64::from(input as f32) / output as f64;
        let mut at = step * 0.5;
        (0..output)
            .map(|_| {
                let position = at as usize;
                at += step;
                position.min(input - 1)
            })
            .collect::<Vec<_>>()
    };
    let columns = positions(image.width, width);
    let pixel = image.layout.bytes_per_pixel();
    for (y, line) in positions(image.height, height).into_iter().zip(out.data.chunks_exact_mut(width * pixel)) {
        let row = &image.data[y * image.stride()..];
        for (&x, value) in columns.iter().zip(line.chunks_exact_mut(pixel)) {
            value.copy_from_slice(&row[x * pixel..][..pixel]);
        }
    }
    Ok(())
}
