//! From layers to steps where bytes are read or made.

use super::build::{Network, Values, Weights};
use super::fuse::{Fused, Role};
use super::memory::Value;
use super::quantization::Form;
use super::steps::{Bytes, Conv, Direct, Made, Observe, Quantize, Step, Taps};
use crate::engine::cpu::common::analysis::unsupported;
use crate::engine::cpu::common::kernels::bf16;
use crate::engine::cpu::common::kernels::bytes::Range;
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

    pub fn form(&self) -> Form {
        self.quantization.map_or(Form::Bytes, |quantization| quantization.form)
    }

    /// What the channels of a value are divided by where it is bytes.
    pub fn share(&self, node: usize) -> Option<&[f32]> {
        self.balance[node % self.graph.nodes.len()].as_deref()
    }

    /// How a layer of floats writes its result, where that is bytes.
    pub fn made(&self, layer: &Fused) -> Result<Option<Made>> {
        if layer.last < self.graph.nodes.len() {
            return Ok(None);
        }
        let form = self.form();
        Ok(Some(Made { dots: form.dots(self.isa), form, range: self.range(layer.last)? }))
    }

    /// Makes bytes of a value, or looks at it.
    pub fn between(&self, layer: &Fused, input: Value, output: Value) -> Result<Box<dyn Step>> {
        Ok(match (layer.role, self.quantization) {
            (Role::Observe, Some(quantization)) => {
                let share = self.share(layer.node).map(<[f32]>::to_vec);
                Box::new(Observe { input, seen: quantization.seen(layer.node), share })
            }
            _ => {
                let form = self.form();
                let made = Made { dots: form.dots(self.isa), form, range: self.range(layer.node)? };
                Box::new(Quantize { made, input, output })
            }
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
        let (isa, inputs, form) = (self.isa, self.range(layer.inputs[0])?, self.form());
        let products = filters.len() / w.out_channels;
        let ([factors, mut summands], mut units) = (self.affine(layer, bias)?, Vec::new());
        let mut scales = Vec::with_capacity(w.out_channels);
        if form == Form::Bf16 {
            (scales, units) = (vec![1.0; w.out_channels], factors.clone());
        }
        let window = w.kernel[0] * w.kernel[1];
        let share = self.share(layer.inputs[0]).map(<[f32]>::to_vec);
        let balanced = move |filter: &[f32], at: usize| {
            f64::from(filter[at]) * share.as_ref().map_or(1.0, |share| f64::from(share[at / window]))
        };
        for (o, filter) in filters.chunks_exact(products).enumerate().filter(|_| form == Form::Bytes) {
            let weight = |at: usize| balanced(filter, at);
            let largest = (0..products).fold(0f64, |largest, at| largest.max((weight(at) * factors[o]).abs()));
            if !largest.is_finite() {
                return Err(unsupported(node, "has weights that are not finite, which bytes cannot hold"));
            }
            // What one step of the weight is worth; of nothing but zeros any.
            let unit = if largest > 0.0 { largest / LARGEST } else { 1.0 };
            let sum: f64 = (0..products).map(|at| rounded(weight(at), factors[o] / unit)).sum();
            let scale = unit * f64::from(inputs.scale);
            summands[o] -= sum * f64::from(inputs.zero) * scale;
            scales.push(scale);
            units.push(factors[o] / unit);
        }
        let taps = Taps::new(&input.geometry, w.channels.div_ceil(form.per_float()), w.kernel, w.dilation);
        let (depth, packing) = (taps.depth(), taps.clone());
        let wide = isa.columns() * LANES;
        let weights_at =
            weights.reserve_in(w.out_channels.next_multiple_of(LANES) * depth, wide * depth, move |number, to| {
                let width = to.len() / depth;
                for column in 0..width.min(w.out_channels.saturating_sub(number * wide)) {
                    let o = number * wide + column;
                    let filter = &filters[o * products..][..products];
                    let mut row = 0;
                    // Offset by offset as the taps have them: [block][window][four channels, or two].
                    for at in 0..packing.offsets.len() {
                        let (block, k) = (at / window, at % window);
                        let short = packing.offsets.len() - at <= packing.short;
                        for float in 0..if short { packing.short_len } else { packing.len } {
                            let weight = |i: usize| {
                                let channel = form.per_float() * (block * LANES + float) + i;
                                if channel < w.channels { balanced(filter, channel * window + k) } else { 0.0 }
                            };
                            let byte = |i: usize| (rounded(weight(i), units[o]) as i8).cast_unsigned();
                            let half = |i: usize| bf16::rounded((weight(i) * units[o]) as f32);
                            let bits = match form {
                                Form::Bytes => u32::from_le_bytes(std::array::from_fn(byte)),
                                Form::Bf16 => u32::from(half(0)) | u32::from(half(1)) << 16,
                            };
                            to[row * width + column] = f32::from_bits(bits);
                            row += 1;
                        }
                    }
                }
            });
        let range = |node: usize| self.range(node).map(Some);
        let is_bytes = |node: &usize| *node >= self.graph.nodes.len();
        let bytes = Bytes {
            dots: form.dots(isa),
            form,
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
fn rounded(weight: f64, steps: f64) -> f64 {
    (weight * steps).round_ties_even().clamp(-LARGEST, LARGEST)
}
