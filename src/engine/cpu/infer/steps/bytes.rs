//! Between floats and bytes: four channels in the memory of one float, 64 channels per block; of bfloat16 two and 32.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use super::Step;
use super::conv::{Conv, Lines, Panel, Pixels};
use crate::engine::cpu::common::kernels::bytes::{self, ByteTile, Output, Range, Residual, byte_tile};
use crate::engine::cpu::common::kernels::dot::{self, Dot, Dots};
use crate::engine::cpu::common::kernels::lanes::{LANES, Lanes};
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::engine::cpu::infer::quantization::{Form, Histogram};

/// How floats become bytes.
#[derive(Clone, Copy)]
pub struct Made {
    pub dots: Dots,
    pub form: Form,
    pub range: Range,
}

impl Made {
    /// How far behind the first block's pixel a block of sixteen channels has that of its own, in bytes.
    #[inline(always)]
    pub fn at(&self, g: &Geometry, block: usize) -> usize {
        byte_of(g, self.form, block)
    }
}

#[inline(always)]
fn byte_of(g: &Geometry, form: Form, block: usize) -> usize {
    4 * (block / form.blocks() * g.plane()) + block % form.blocks() * 4 * LANES / form.per_float()
}

/// Writes sixteen numbers of a value.
pub trait Sink<V> {
    /// # Safety
    /// There is room for them at `to`.
    unsafe fn put(value: V, range: Range, to: *mut u8);
}

pub struct Plain;
pub struct Narrow<D>(PhantomData<D>);

impl<V: Lanes> Sink<V> for Plain {
    #[inline(always)]
    unsafe fn put(value: V, _range: Range, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { value.store(to.cast()) };
    }
}

impl<D: Dot> Sink<D::Floats> for Narrow<D> {
    #[inline(always)]
    unsafe fn put(value: D::Floats, range: Range, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { bytes::store::<D>(value, range, to) };
    }
}

/// What a convolution of bytes has besides.
pub struct Bytes {
    pub dots: Dots,
    pub form: Form,
    /// Where the factors of the sums begin in the weights, one per output channel.
    pub scale: usize,
    /// Ranges of what it adds and makes, where that are bytes.
    pub residual: Option<Range>,
    pub output: Option<Range>,
}

impl Conv {
    /// Some pixels of a line, as [`Direct::pixels`](super::Direct::pixels) does it for floats.
    ///
    /// # Safety
    /// There is room for a line of each block of the panel where `p` says, or in the output where that is bytes.
    #[inline(always)]
    pub unsafe fn byte_pixels<D: Dot>(
        &self,
        bytes: &Bytes,
        cx: &Context<'_>,
        lines: Lines,
        panel: &Panel<'_>,
        p: &Pixels,
    ) {
        let s = &self.direct;
        let (i, o) = (&s.input.geometry, &s.output.geometry);
        let Panel { block, columns, taps, weights, .. } = *panel;
        let step = |value: &Value, stride: usize| if lines.across { value.geometry.len() } else { stride };
        let input_stride = step(&s.input, s.stride[1] * LANES);
        let corner =
            (i.before[0] + p.y * s.stride[0] - s.padding[0]) * i.row() + (i.before[1] - s.padding[1]) * i.pixel;
        // Where the sixteen channels of a block of bytes are.
        let place = |value: &Value| {
            let (g, stride) = (&value.geometry, step(value, LANES));
            (g.at(p.y, 0) + p.start * stride, byte_of(g, bytes.form, block), 4 * stride)
        };
        let residual = match (&s.residual, bytes.residual) {
            (None, _) => Residual::None,
            (Some(value), Some(range)) => {
                let (at, byte, stride) = place(value);
                Residual::Bytes(
                    cx.image(value, p.image).wrapping_add(at).cast::<u8>().wrapping_add(byte),
                    stride,
                    range,
                )
            }
            (Some(value), None) => {
                let (g, stride) = (&value.geometry, step(value, LANES));
                let at = block * g.plane() + g.at(p.y, 0) + p.start * stride;
                Residual::Floats(cx.image(value, p.image).wrapping_add(at), stride, g.plane())
            }
        };
        let output = match bytes.output {
            Some(range) => {
                let (at, byte, stride) = place(&s.output);
                let to = cx.image_mut(&s.output, p.image).wrapping_add(at).cast::<u8>().wrapping_add(byte);
                Output::Bytes(to, stride, range)
            }
            None => {
                let stride = if lines.across { o.len() } else { LANES };
                Output::Floats(p.to.wrapping_add(p.start * stride), stride, p.to_block)
            }
        };
        let job = ByteTile {
            input: cx.image(&s.input, p.image).wrapping_add(corner + p.start * input_stride),
            stride: input_stride,
            offsets: &taps.offsets,
            len: taps.len,
            short: taps.short,
            short_len: taps.short_len,
            weights: cx.weights(weights, columns * LANES * taps.depth()),
            scale: cx.weights(bytes.scale + block * LANES, columns * LANES),
            bias: cx.weights(s.bias + block * LANES, columns * LANES),
            residual,
            activation: s.activation,
            output,
        };
        // SAFETY: the borders of the input cover the window of every output pixel, the caller made room for the outputs, and
        // the weights hold every panel.
        unsafe { byte_tile::<D>(lines.rows.min(lines.length - p.start), columns, &job) };
    }
}

/// Floats become bytes.
pub struct Quantize {
    pub made: Made,
    pub input: Value,
    pub output: Value,
}

impl Step for Quantize {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.output.geometry.blocks()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (i, o) = (&self.input.geometry, &self.output.geometry);
        let (image, block) = (task / o.blocks(), task % o.blocks());
        let wide = self.made.form.blocks();
        for y in 0..i.height {
            let line = bytes::Quantize {
                input: cx.image(&self.input, image).wrapping_add(block * wide * i.plane() + i.at(y, 0)),
                block: i.plane(),
                blocks: wide.min(i.blocks() - block * wide),
                pixels: i.width,
                output: cx.image_mut(&self.output, image).wrapping_add(block * o.plane() + o.at(y, 0)).cast(),
                range: self.made.range,
            };
            dot::dispatch(self.made.dots, line);
        }
    }
}

/// Counts the numbers of a value that will be bytes.
pub struct Observe {
    pub input: Value,
    pub seen: Arc<Mutex<Histogram>>,
    /// What its channels will be divided by.
    pub share: Option<Vec<f32>>,
}

/// Pixels of an image that are looked at, at least where it has so many, and less than twice as many.
const PIXELS: usize = 128;

impl Step for Observe {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images
    }

    fn run(&self, _phase: usize, image: usize, cx: &Context<'_>) {
        let g = &self.input.geometry;
        let from = cx.image(&self.input, image);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let step = (g.height * g.width / PIXELS).max(1);
        for block in 0..g.blocks() {
            let channels = g.pixel.min(g.channels - block * g.pixel);
            for pixel in (block % step..g.height * g.width).step_by(step) {
                let at = block * g.plane() + g.at(pixel / g.width, pixel % g.width);
                // SAFETY: a pixel of the image, which no task of this step writes.
                let values = unsafe { std::slice::from_raw_parts(from.add(at), channels) };
                match &self.share {
                    Some(share) => {
                        let mut divided = [0.0; LANES];
                        let share = &share[block * g.pixel..][..channels];
                        divided.iter_mut().zip(values).zip(share).for_each(|((to, value), share)| *to = value / share);
                        seen.count(&divided[..channels]);
                    }
                    None => seen.count(values),
                }
            }
        }
    }
}
