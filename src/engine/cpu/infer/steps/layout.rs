//! Between PyTorch's layout and blocks of sixteen channels.

use super::Step;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Pair;

/// Where channel `c` of pixel (y, x) is.
fn place(g: &Geometry, c: usize, y: usize, x: usize) -> usize {
    c / g.pixel * g.plane() + g.at(y, x) + c % g.pixel
}

/// Zeros in the lanes beyond the last channel, in `rows`: a NaN that an earlier value left there would go through the zero
/// weights of the next layer.
///
/// # Safety
/// `to` is where an image of this geometry begins.
pub unsafe fn clear_spare(g: &Geometry, to: *mut f32, rows: std::ops::Range<usize>) {
    let used = g.channels % g.pixel;
    if used == 0 {
        return;
    }
    for y in rows {
        for x in 0..g.width {
            // SAFETY: a pixel of the last block.
            unsafe { to.add(place(g, g.channels - 1, y, x) + 1).write_bytes(0, g.pixel - used) };
        }
    }
}

/// The caller's NCHW batch into a value.
pub struct Load {
    pub output: Value,
}

/// Rows of an image that make a task.
const ROWS: usize = 16;

impl Step for Load {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks() * self.output.geometry.height.div_ceil(ROWS)
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let g = &self.output.geometry;
        let strips = g.height.div_ceil(ROWS);
        let (image, block, strip) = (task / strips / g.blocks(), task / strips % g.blocks(), task % strips);
        let pixels = g.height * g.width;
        let from = cx.input.wrapping_add((cx.first + image) * g.channels * pixels);
        let to = cx.image_mut(&self.output, image);
        let channels = block * g.pixel..g.channels.min((block + 1) * g.pixel);
        let rows = strip * ROWS..g.height.min((strip + 1) * ROWS);
        if block + 1 == g.blocks() {
            // SAFETY: an image of the value.
            unsafe { clear_spare(g, to, rows.clone()) };
        }
        for y in rows {
            let row = |c: usize| from.wrapping_add(c * pixels + y * g.width);
            // SAFETY: the batch has `first + images` images of this shape, and the value holds the group.
            unsafe {
                if g.pixel == 3 {
                    let (rows, to) = ([row(0), row(1), row(2)], to.wrapping_add(g.at(y, 0)).cast::<[f32; 3]>());
                    for x in 0..g.width {
                        *to.add(x) = [*rows[0].add(x), *rows[1].add(x), *rows[2].add(x)];
                    }
                    continue;
                }
                for c in channels.clone() {
                    let (row, to) = (row(c), to.wrapping_add(place(g, c, y, 0)));
                    for x in 0..g.width {
                        *to.add(x * g.pixel) = *row.add(x);
                    }
                }
            }
        }
    }
}

/// A value into the caller's batch, NCHW or NHWC.
pub struct Store {
    pub input: Value,
    pub channels_last: bool,
}

impl Step for Store {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.input.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let g = &self.input.geometry;
        let (image, block) = (task / g.blocks(), task % g.blocks());
        let pixels = g.height * g.width;
        let to = cx.output.wrapping_add((cx.first + image) * g.channels * pixels);
        let from = cx.image(&self.input, image);
        let channels = block * g.pixel..g.channels.min((block + 1) * g.pixel);
        if self.channels_last {
            for y in 0..g.height {
                for x in 0..g.width {
                    let to = to.wrapping_add((y * g.width + x) * g.channels + channels.start);
                    let from = from.wrapping_add(place(g, channels.start, y, x));
                    // SAFETY: as below; a pixel of a block.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, channels.len()) };
                }
            }
            return;
        }
        for c in channels {
            for y in 0..g.height {
                let (row, from) = (to.wrapping_add(c * pixels + y * g.width), from.wrapping_add(place(g, c, y, 0)));
                for x in 0..g.width {
                    // SAFETY: the caller made room for `first + images` images of this shape.
                    unsafe { *row.add(x) = *from.add(x * g.pixel) };
                }
            }
        }
    }
}

/// `flatten`, `view`: the same numbers in PyTorch's order, in another shape.
pub struct Relayout {
    pub input: Value,
    pub output: Value,
}

impl Step for Relayout {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.input.geometry.channels
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (image, c) = (task / i.channels, task % i.channels);
        let (from, to) = (cx.image(&self.input, image), cx.image_mut(&self.output, image));
        if c == 0 {
            // SAFETY: an image of the value.
            unsafe { clear_spare(o, to, 0..o.height) };
        }
        for y in 0..i.height {
            for x in 0..i.width {
                let index = (c * i.height + y) * i.width + x;
                let (channel, pixel) = (index / (o.height * o.width), index % (o.height * o.width));
                // SAFETY: both shapes have the same number of elements.
                unsafe {
                    let value = *from.add(place(i, c, y, x));
                    *to.add(place(o, channel, pixel / o.width, pixel % o.width)) = value;
                }
            }
        }
    }
}

/// Zeros around an image, for readers that do not bring their own.
pub struct Pad {
    pub input: Value,
    pub output: Value,
    /// Above and to the left.
    pub before: Pair,
}

impl Step for Pad {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (image, block) = (task / o.blocks(), task % o.blocks());
        let from = cx.image(&self.input, image).wrapping_add(block * i.plane());
        let to = cx.image_mut(&self.output, image).wrapping_add(block * o.plane());
        let [top, left] = self.before;
        for y in 0..o.height {
            let row = to.wrapping_add(o.at(y, 0));
            // SAFETY: a row of the output; where there is one of the input, it lies inside it.
            unsafe {
                std::ptr::write_bytes(row, 0, o.width * o.pixel);
                if (top..top + i.height).contains(&y) {
                    let inside = row.add(left * o.pixel);
                    std::ptr::copy_nonoverlapping(from.add(i.at(y - top, 0)), inside, i.width * i.pixel);
                }
            }
        }
    }
}

/// Values one after the other along the channels.
pub struct Cat {
    /// Each with its first channel in the output.
    pub inputs: Vec<(Value, usize)>,
    pub output: Value,
}

impl Step for Cat {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.inputs.len()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (image, part) = (task / self.inputs.len(), task % self.inputs.len());
        let (value, first) = &self.inputs[part];
        let (i, o) = (&value.geometry, &self.output.geometry);
        let (from, to) = (cx.image(value, image), cx.image_mut(&self.output, image));
        if part == 0 {
            // SAFETY: an image of the value.
            unsafe { clear_spare(o, to, 0..o.height) };
        }
        // Whole blocks can be copied row by row; the last one only where nobody writes beside it.
        let whole = if first % o.pixel == 0 { i.channels / o.pixel } else { 0 };
        for block in 0..whole {
            for y in 0..i.height {
                let from = from.wrapping_add(block * i.plane() + i.at(y, 0));
                let to = to.wrapping_add((first / o.pixel + block) * o.plane() + o.at(y, 0));
                // SAFETY: a row of the image on both sides; different values do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(from, to, i.width * o.pixel) };
            }
        }
        for c in whole * o.pixel..i.channels {
            for y in 0..i.height {
                for x in 0..i.width {
                    // SAFETY: channel and pixel are inside both values.
                    unsafe { *to.add(place(o, first + c, y, x)) = *from.add(place(i, c, y, x)) };
                }
            }
        }
    }
}

/// Channels of several values, all in blocks, in another order.
pub struct Pick {
    pub inputs: Vec<Value>,
    /// For each channel the number of an input, and the channel there.
    pub places: Vec<(usize, usize)>,
    pub output: Value,
}

impl Step for Pick {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let o = &self.output.geometry;
        let (image, block) = (task / o.blocks(), task % o.blocks());
        let to = cx.image_mut(&self.output, image);
        if block + 1 == o.blocks() {
            // SAFETY: an image of the value.
            unsafe { clear_spare(o, to, 0..o.height) };
        }
        let places = &self.places[block * o.pixel..o.channels.min((block + 1) * o.pixel)];
        for y in 0..o.height {
            let mut from = [std::ptr::null(); LANES];
            for (from, &(input, channel)) in from.iter_mut().zip(places) {
                let value = &self.inputs[input];
                *from = cx.image(value, image).wrapping_add(place(&value.geometry, channel, y, 0));
            }
            let to = to.wrapping_add(place(o, block * o.pixel, y, 0));
            for x in 0..o.width {
                for (lane, &from) in from[..places.len()].iter().enumerate() {
                    // SAFETY: a row of both images; all values are in blocks.
                    unsafe { *to.add(x * LANES + lane) = *from.add(x * LANES) };
                }
            }
        }
    }
}
