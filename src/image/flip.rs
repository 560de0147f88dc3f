//! Mirror images.

#![forbid(unsafe_code)]

use super::{Image, Layout};

pub fn flip_horizontal(image: &mut Image) {
    let stride = image.stride();
    if stride == 0 {
        return;
    }
    for line in image.data.chunks_exact_mut(stride) {
        match image.layout {
            Layout::Gray => line.reverse(),
            Layout::Rgbx => line.as_chunks_mut::<4>().0.reverse(),
        }
    }
}

pub fn flip_vertical(image: &mut Image) {
    let stride = image.stride();
    let (upper, lower) = image.data.split_at_mut(image.height / 2 * stride);
    if stride > 0 {
        for (a, b) in upper.chunks_exact_mut(stride).zip(lower.rchunks_exact_mut(stride)) {
            a.swap_with_slice(b);
        }
    }
}
