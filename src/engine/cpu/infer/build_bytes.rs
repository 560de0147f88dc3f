//! From layers to steps where bytes are read or made.

use super::build::{Network, Values, Weights};
use super::fuse::{Fused, Role};
use super::memory::Value;
use super::steps::{Bytes, Conv, Direct, Observe, Quantize, Step, Taps};
use crate::engine::cpu::common::analysis::unsupported;
use crate::engine::cpu::common::kernels::bytes::Range;
use crate::engine::cpu::common::kernels::dot::Dots;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::error::{Error, Result};
use crate::model::Op;

/// The largest weight of an output channel.
const LARGEST: f64 = 127.0;

impl<'a> Network<'a> {
    /// What the bytes of a node stand for.
    fn range(&self, node: usize) -> Result<Range> {
        let node = node % self.graph.nodes.len();
        let range = self.quantization.and_then(|quantization| quantization.range(node));
        range.ok_or_else(|| Error::internal(format_args!("{}: nothing was seen of it", self.graph.nodes[node].name)))
    }

    /// Makes bytes of a value, or looks at it.
    pub fn between(&self, layer: &Fused, input: Value, output: Value) -> Result<Box<dyn Step>> {
        Ok(match (layer.role, self.quantization) {
            (Role::Observe, Some(quantization)) => Box::new(Observe { input, seen: quantization.seen(layer.node) }),
            _ => Box::new(Quantize { dots: Dots::of(self.isa), input, output, range: self.range(layer.node)? }),
        })
    }

    /// A convolution of bytes.
    pub fn byte_conv(&self, layer: &Fused, values: &Values, weights: &mut Weights<'a>) -> Result<Conv> {
        let node = self.node(layer);
        let &Values { input, output, residual, .. } = values;
        let (Some(w), _) = self.method(layer) else { return Err(unsupported(node, "is no convolution")) };
        let (Op::Conv2d { weight, bias, .. } | Op::Linear { weight, bias }) = node.op else {
            return Err(unsupported(node, "is no convolution"));
        };
        let filters = self.floats(layer, weight)?;
        let (isa, inputs) = (self.isa, self.range(layer.inputs[0])?);
        let products = filters.len() / w.out_channels;
        let ([factors, mut summands], mut units) = (self.affine(layer, bias)?, Vec::new());
        let mut scales = Vec::with_capacity(w.out_channels);
        for (o, filter) in filters.chunks_exact(products).enumerate() {
            let largest = filter.iter().fold(0f64, |largest, &f| largest.max((f64::from(f) * factors[o]).abs()));
            if !largest.is_finite() {
                return Err(unsupported(node, "has weights that are not finite, which bytes cannot hold"));
            }
            // What one step of the weight is worth; of nothing but zeros any.
            let unit = if largest > 0.0 { largest / LARGEST } else { 1.0 };
            let sum: f64 = filter.iter().map(|&f| rounded(f, factors[o] / unit)).sum();
            let scale = unit * f64::from(inputs.scale);
            summands[o] -= sum * f64::from(inputs.zero) * scale;
            scales.push(scale);
            units.push(factors[o] / unit);
        }
        let taps = Taps::new(&input.geometry, w.channels.div_ceil(4), w.kernel, w.dilation);
        let (depth, packing) = (taps.depth(), taps.clone());
        let wide = isa.columns() * LANES;
        let window = w.kernel[0] * w.kernel[1];
        let weights_at =
            weights.reserve_in(w.out_channels.next_multiple_of(LANES) * depth, wide * depth, move |number, to| {
                let width = to.len() / depth;
                for column in 0..width.min(w.out_channels.saturating_sub(number * wide)) {
                    let o = number * wide + column;
                    let filter = &filters[o * products..][..products];
                    let mut row = 0;
                    // Offset by offset as the taps have them: [block][window][four channels].
                    for at in 0..packing.offsets.len() {
                        let (block, k) = (at / window, at % window);
                        let short = packing.offsets.len() - at <= packing.short;
                        for four in 0..if short { packing.short_len } else { packing.len } {
                            let four_of = |i: usize| {
                                let channel = 4 * (block * LANES + four) + i;
                                let w = filter.get(channel * window + k).filter(|_| channel < w.channels);
                                w.map_or(0.0, |&f| rounded(f, units[o])) as i8
                            };
                            let four_bytes = std::array::from_fn(|i| four_of(i).cast_unsigned());
                            to[row * width + column] = f32::from_bits(u32::from_le_bytes(four_bytes));
                            row += 1;
                        }
                    }
                }
            });
        let range = |node: usize| self.range(node).map(Some);
        let is_bytes = |node: &usize| *node >= self.graph.nodes.len();
        let bytes = Bytes {
            dots: Dots::of(isa),
            scale: weights.vector(scales),
            residual: layer.residual.filter(is_bytes).map_or(Ok(None), range)?,
            output: Some(layer.last).filter(is_bytes).map_or(Ok(None), range)?,
        };
        let bias = weights.vector(summands);
        let (stride, padding, activation) = (w.stride, w.padding, layer.activation);
        let direct = Direct { isa, input, output, residual, bias, stride, padding, activation };
        let blocks = w.out_channels.div_ceil(LANES);
        Ok(Conv { direct, weights: weights_at, groups: 1, blocks, taps, bytes: Some(bytes) })
    }
}

/// A weight in steps of its channel.
fn rounded(weight: f32, steps: f64) -> f64 {
    (f64::from(weight) * steps).round_ties_even().clamp(-LARGEST, LARGEST)
}
