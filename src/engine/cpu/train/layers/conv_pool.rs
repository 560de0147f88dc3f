//! Convolution, dropout of channels, ReLU and 2 x 2 max-pool as one layer. Three quarters of the derivative behind such
//! a pool are zero, and ReLU and dropout zero more: backward walks the rest only.

use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::train::kernels::direct::{Direct, SLACK, conv_pool};
use crate::engine::cpu::train::kernels::terms::{
    Combine, Gather, OVERSHOOT, Spread, Terms, combine, gather, spread, terms,
};
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out, Param};
use crate::engine::cpu::train::memory::Slot;
use crate::engine::cpu::train::random::{dropout_mask, key};
use crate::model::{Activation, Graph, Op, Pair, Shape};

/// A convolution and what follows it in one kernel.
#[derive(Debug, Clone)]
pub struct Chain {
    /// The nodes after the convolution.
    pub nodes: Vec<usize>,
    pub last: usize,
    pub relu: bool,
    /// Probability of dropping a channel.
    pub dropout: Option<f64>,
}

/// Planes above this many pixels have positions that the kernel's floats cannot count.
const PIXELS: usize = 1 << 23;

/// The chain that starts at the convolution `index`, if it ends in the right pool.
///
/// Without `shapes` whether there is one for images that are not too large.
pub fn chain(graph: &Graph, shapes: Option<&[Shape]>, readers: &[Vec<usize>], index: usize) -> Option<Chain> {
    let Op::Conv2d { weight, stride: [1, 1], padding, dilation: [1, 1], groups: 1, .. } = graph.nodes[index].op else {
        return None;
    };
    let [outs, _, kh, kw] = *graph.tensors[weight].as_slice() else { return None };
    let padded = shapes.map_or(0, |shapes| {
        let input = &shapes[graph.nodes[index].inputs[0]];
        (input[2] + 2 * padding[0]) * (input[3] + 2 * padding[1])
    });
    if outs > MAX_CHANNELS || kh != kw || !matches!(kh, 3 | 5) || padded > PIXELS {
        return None;
    }
    let mut chain = Chain { nodes: Vec::new(), last: index, relu: false, dropout: None };
    let mut pooled = false;
    while let [next] = readers[chain.last][..] {
        match graph.nodes.get(next).map(|node| &node.op) {
            Some(Op::Activation { function: Activation::Relu, .. }) => chain.relu = true,
            Some(Op::Dropout { training, p, .. }) if !training || *p == 0.0 => {}
            Some(Op::Dropout { channels: true, p, .. }) if chain.dropout.is_none() => chain.dropout = Some(*p),
            Some(Op::MaxPool2d {
                kernel: [2, 2],
                stride: [2, 2],
                padding: [0, 0],
                dilation: [1, 1],
                ceil_mode: false,
            }) if !pooled => {
                pooled = true;
            }
            _ => break,
        }
        chain.nodes.push(next);
        chain.last = next;
    }
    pooled.then_some(chain)
}

pub struct ConvPool {
    pub channels: usize,
    /// Floats per pixel where channels are innermost: see [`ConvPool::pixel`].
    pub pixel: usize,
    pub out_channels: usize,
    /// Input height and width.
    pub size: Pair,
    pub padding: Pair,
    pub k: usize,
    pub pooled: Pair,
    pub relu: bool,
    pub input: Edge,
    pub out: Out,
    pub weight: Param,
    pub bias: Option<Param>,
    /// Probability, stream and memory of the channels' draws.
    pub dropout: Option<(f64, u64, Slot)>,
    pub slots: Slots,
}

/// Working memory, one copy per worker.
pub struct Slots {
    /// The input with its padding, by channel.
    pub padded: Slot,
    /// A list of output channels.
    pub live: Slot,
    /// Backward only.
    pub backward: Option<BackwardSlots>,
}

pub struct BackwardSlots {
    /// Positions of the maxima, one per output, kept from forward.
    pub origins: Slot,
    /// The input with its padding, channels innermost; its derivative likewise.
    pub pixels: Slot,
    pub pixel_grads: Slot,
    /// `out_channels x k x row`: weights and their derivative, channels innermost, rows filled up to whole vectors.
    pub weights: Slot,
    pub weight_grads: Slot,
    /// A list of one output channel's terms.
    pub terms: Slot,
}

impl ConvPool {
    /// Padded height and width.
    fn padded(&self) -> Pair {
        [self.size[0] + 2 * self.padding[0], self.size[1] + 2 * self.padding[1]]
    }

    /// Whole vectors per pixel where that is not much more memory: then what one term of the input's derivative adds to
    /// is exactly what another has stored, and the processor passes it on without a trip through the cache.
    pub fn pixel(channels: usize, input_grads: bool) -> usize {
        let whole = channels.next_multiple_of(LANES);
        if input_grads && 5 * whole <= 8 * channels { whole } else { channels }
    }

    /// Length of an image with its slack; `channels`: floats per pixel.
    pub fn image_len(channels: usize, size: Pair, padding: Pair) -> usize {
        channels * (size[0] + 2 * padding[0]) * (size[1] + 2 * padding[1]) + SLACK
    }

    /// Length of a row of the weights with channels innermost: whole vectors, or half a one.
    pub fn row_len(pixel: usize, k: usize, input_grads: bool) -> usize {
        let half = LANES / 2;
        if pixel * k <= half && !input_grads { half } else { (pixel * k).next_multiple_of(LANES) }
    }

    fn row(&self) -> usize {
        Self::row_len(self.pixel, self.k, self.input.grad.is_some())
    }

    /// Output channels that dropout left alive, with their scales, in `memory`.
    fn live<'m>(&self, mask: Option<&[f32]>, memory: &'m mut [f32]) -> Terms<'m> {
        let (offsets, factors) = terms(memory);
        let mut count = 0;
        for o in 0..self.out_channels {
            let scale = mask.map_or(1.0, |m| m[o]);
            (offsets[count], factors[count]) = (o as u32, scale);
            count += usize::from(scale != 0.0);
        }
        Terms { offsets: &offsets[..count], factors: &factors[..count] }
    }

    /// Floats for the list of all output channels.
    pub fn live_len(out_channels: usize) -> usize {
        2 * (out_channels + 1)
    }

    /// Floats for the longest list of terms: one per output position.
    pub fn terms_len(outputs: usize) -> usize {
        2 * (outputs + OVERSHOOT)
    }

    /// The offset of element (c, ky, kx) within an output channel's weights with channels innermost.
    fn inner(&self, c: usize, ky: usize, kx: usize) -> usize {
        ky * self.row() + kx * self.pixel + c
    }

    fn each_weight(&self, mut f: impl FnMut(usize, usize)) {
        let mut outer = 0;
        for o in 0..self.out_channels {
            for c in 0..self.channels {
                for ky in 0..self.k {
                    for kx in 0..self.k {
                        f(outer, o * self.k * self.row() + self.inner(c, ky, kx));
                        outer += 1;
                    }
                }
            }
        }
    }

    fn sample_forward(&self, cx: &Context<'_>, sample: usize) {
        let [height, width] = self.padded();
        // SAFETY: all are different slots, and the sample is this worker's; nobody writes parameters before all layers
        // are done.
        let (mut padded, image, mut out, mut live, mut mask, mut origins, weights, bias) = unsafe {
            (
                cx.own(self.slots.padded),
                cx.one(self.input.value, sample),
                cx.one_mut(self.out.value, sample),
                cx.own(self.slots.live),
                self.dropout.map(|(_, _, slot)| cx.one_mut(slot, sample)),
                self.slots.backward.as_ref().map(|b| cx.one_mut(b.origins, sample)),
                cx.tensor(self.weight.tensor),
                self.bias.map(|b| cx.tensor(b.tensor)),
            )
        };
        if self.padding == [0, 0] {
            padded[..image.len()].copy_from_slice(&image);
        } else {
            // The border was zero from the start and nobody writes it.
            for (row, line) in image.chunks_exact(self.size[1]).enumerate() {
                let (c, y) = (row / self.size[0], row % self.size[0]);
                let start = (c * height + y + self.padding[0]) * width + self.padding[1];
                padded[start..][..line.len()].copy_from_slice(line);
            }
        }
        if let (Some((p, stream, _)), Some(mask)) = (self.dropout, &mut mask) {
            dropout_mask(mask, p, key(cx.seed, cx.step, stream, sample as u64));
            let pixels = self.pooled[0] * self.pooled[1];
            for (out, &scale) in out.chunks_exact_mut(pixels).zip(mask.iter()) {
                if scale == 0.0 {
                    out.fill(0.0);
                }
            }
        }
        conv_pool(Direct {
            image: &padded,
            channels: self.channels,
            height,
            width,
            weights: &weights,
            bias: bias.as_deref(),
            k: self.k,
            relu: self.relu,
            live: self.live(mask.as_deref(), &mut live),
            pooled: self.pooled,
            out: &mut out,
            origins: origins.as_deref_mut().unwrap_or_default(),
        });
    }

    fn sample_backward(&self, cx: &Context<'_>, slots: &BackwardSlots, grad: Slot, sample: usize) {
        let (pixel, [_, width], outputs) = (self.pixel, self.padded(), self.pooled[0] * self.pooled[1]);
        // SAFETY: all are different slots, and the sample is this worker's.
        let (y, dy, origins, mask) = unsafe {
            let mask = self.dropout.map(|(_, _, slot)| cx.one(slot, sample));
            (cx.one(self.out.value, sample), cx.one(grad, sample), cx.one(slots.origins, sample), mask)
        };
        // SAFETY: different slots, each taken once.
        let (mut found, mut live, mut pixels, mut pixel_grads, weights, mut weight_grads, mut bias) = unsafe {
            (
                cx.own(slots.terms),
                cx.own(self.slots.live),
                cx.own(slots.pixels),
                cx.own(slots.pixel_grads),
                cx.own(slots.weights),
                cx.own(slots.weight_grads),
                self.bias.and_then(|b| b.grad).map(|share| cx.own(share)),
            )
        };
        let (offsets, factors) = terms(&mut found);
        let live = self.live(mask.as_deref(), &mut live);
        if self.input.grad.is_some() {
            pixel_grads.fill(0.0);
        }
        if self.weight.grad.is_some() {
            // SAFETY: an input, which this layer does not write.
            self.channels_innermost(&unsafe { cx.one(self.input.value, sample) }, &mut pixels);
        }
        for (&o, &scale) in live.offsets.iter().zip(live.factors) {
            let o = o as usize;
            let range = o * outputs..(o + 1) * outputs;
            // As in PyTorch a NaN lets its gradient through ReLU.
            let mut found = (0, 0.0);
            gather(Gather {
                y: &y[range.clone()],
                dy: &dy[range.clone()],
                origins: &origins[range],
                scale,
                relu: self.relu,
                unit: pixel as u32,
                offsets,
                factors,
                found: &mut found,
            });
            let (count, sum) = found;
            if let Some(share) = &mut bias {
                share[o] += sum;
            }
            if count == 0 {
                continue;
            }
            let (rows, row, filter) = (self.k, self.row(), o * self.k * self.row());
            let terms = Terms { offsets: &offsets[..count], factors: &factors[..count] };
            if self.weight.grad.is_some() {
                let (from, to) = (&*pixels, &mut weight_grads[filter..]);
                combine(Combine { terms, from, from_stride: width * pixel, to, to_stride: row, rows, columns: row });
            }
            if self.input.grad.is_some() {
                let (from, to, vectors) = (&weights[filter..], &mut *pixel_grads, row / LANES);
                spread(Spread { terms, from, from_stride: row, to, to_stride: width * pixel, rows, vectors });
            }
        }
        if let Some(input) = self.input.grad {
            // SAFETY: a derivative of its own, and the sample is this worker's.
            self.add_pixels(&pixel_grads, &mut unsafe { cx.one_mut(input, sample) });
        }
    }

    /// The part of a padded image with channels innermost that row `y` of the input covers.
    fn line(&self, y: usize) -> std::ops::Range<usize> {
        let start = ((y + self.padding[0]) * self.padded()[1] + self.padding[1]) * self.pixel;
        start..start + self.size[1] * self.pixel
    }

    fn channels_innermost(&self, image: &[f32], pixels: &mut [f32]) {
        let ([height, width], c) = (self.size, self.channels);
        if c == 1 && self.padding == [0, 0] {
            return pixels[..image.len()].copy_from_slice(image);
        }
        for y in 0..height {
            let to = &mut pixels[self.line(y)];
            if c == 1 {
                to.copy_from_slice(&image[y * width..][..width]);
                continue;
            }
            for channel in 0..c {
                let from = &image[(channel * height + y) * width..][..width];
                to.chunks_exact_mut(self.pixel).zip(from).for_each(|(p, x)| p[channel] = *x);
            }
        }
    }

    fn add_pixels(&self, pixels: &[f32], image: &mut [f32]) {
        let ([height, width], c) = (self.size, self.channels);
        for y in 0..height {
            let from = &pixels[self.line(y)];
            for channel in 0..c {
                let to = &mut image[(channel * height + y) * width..][..width];
                let from = from.chunks_exact(self.pixel);
                match self.input.add {
                    true => to.iter_mut().zip(from).for_each(|(x, p)| *x += p[channel]),
                    false => to.iter_mut().zip(from).for_each(|(x, p)| *x = p[channel]),
                }
            }
        }
    }
}

/// Output channels of the widest layer this kernel takes.
const MAX_CHANNELS: usize = 512;

impl Layer for ConvPool {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn begin(&self, cx: &Context<'_>) {
        let Some(slots) = &self.slots.backward else { return };
        // SAFETY: taken once.
        unsafe { cx.own(slots.weight_grads) }.fill(0.0);
        if self.input.grad.is_some() {
            // SAFETY: taken once, and nobody writes parameters before all layers are done.
            let (mut inner, outer) = unsafe { (cx.own(slots.weights), cx.tensor(self.weight.tensor)) };
            let (inner, outer) = (&mut *inner, &*outer);
            self.each_weight(|o, i| inner[i] = outer[o]);
        }
    }

    fn forward(&self, cx: &Context<'_>) {
        cx.samples.clone().for_each(|sample| self.sample_forward(cx, sample));
    }

    fn backward(&self, cx: &Context<'_>) {
        if let (Some(slots), Some(grad)) = (&self.slots.backward, self.out.grad) {
            cx.samples.clone().for_each(|sample| self.sample_backward(cx, slots, grad, sample));
        }
    }

    fn end(&self, cx: &Context<'_>) {
        if let (Some(slots), Some(share)) = (&self.slots.backward, self.weight.grad) {
            // SAFETY: two slots, each taken once.
            let (inner, mut outer) = unsafe { (cx.own(slots.weight_grads), cx.own(share)) };
            let (inner, outer) = (&*inner, &mut *outer);
            self.each_weight(|o, i| outer[o] += inner[i]);
        }
    }
}
