//! Which layers compute in bytes, and in which ranges: a pass over the layers.
//!
//! ```text
//! float32:    conv -> value -> conv
//! looking:    conv -> value -> Observe, conv             (percentiles of the first images)
//! bytes:      conv -> value -> Quantize -> bytes -> conv (where somebody else reads floats, or makes them)
//!             conv -> bytes -> conv
//! ```
//! The bytes of node `n` have the number `n + nodes`. Four channels have the room of one float: in memory they are a value
//! of a quarter of the channels. bfloat16 is the same with two channels in a float, and without ranges.

use std::sync::{Arc, Mutex, PoisonError};

use super::fuse::{Fused, Role};
use super::memory::Geometry;
use super::method::{Exact, Method, joined, window};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::bytes::Range;
use crate::engine::cpu::common::kernels::dot::{Dots, MOST_PRODUCTS};
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::model::{Activation, Graph, Op, Shape};

/// Below this many input channels the sums are too short to gain.
const LEAST_CHANNELS: usize = LANES;
/// The part of a value's numbers that may be beyond its range, on both sides together.
const BEYOND: f64 = 1e-4;

/// Numbers counted by sign, exponent and the first six bits of the fraction.
pub struct Histogram(Vec<u64>);

impl Default for Histogram {
    fn default() -> Self {
        Self(vec![0; 1 << 16])
    }
}

/// Bits of a float that the histogram does not see.
const UNSEEN: u32 = 16;

impl Histogram {
    pub fn count(&mut self, values: &[f32]) {
        for value in values {
            self.0[(value.to_bits() >> UNSEEN) as usize] += 1;
        }
    }

    /// Lowest and highest value but for 0.01 % of all: half of them on each side. None where some are not finite.
    fn range(&self) -> Option<[f32; 2]> {
        let edge = |bits: usize| f32::from_bits((bits as u32) << UNSEEN | ((1 << UNSEEN) - 1));
        let half = self.0.len() / 2;
        let (positive, negative) = self.0.split_at(half);
        let infinite = f32::INFINITY.to_bits() as usize >> UNSEEN;
        if [positive, negative].iter().any(|side| side[infinite..].iter().any(|&n| n > 0)) {
            return None;
        }
        let most = (self.0.iter().sum::<u64>() as f64 * BEYOND / 2.0) as u64;
        let end = |side: &[u64]| {
            let mut beyond = 0;
            let last = side.iter().rposition(|&n| {
                beyond += n;
                beyond > most
            });
            last.filter(|&bits| bits > 0).map_or(0.0, edge)
        };
        Some([-end(negative), end(positive)])
    }
}

/// What some layers read instead of floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Bytes,
    Bf16,
}

impl Form {
    /// Channels in the room of one float.
    pub fn per_float(self) -> usize {
        match self {
            Self::Bytes => 4,
            Self::Bf16 => 2,
        }
    }

    /// Blocks of sixteen channels in a block of sixteen floats, next to each other.
    pub fn blocks(self) -> usize {
        self.per_float()
    }

    pub fn dots(self, isa: Isa) -> Dots {
        match self {
            Self::Bytes => Dots::of(isa),
            Self::Bf16 => Dots::bf16(isa),
        }
    }
}

/// What is known of a network's values.
pub struct Quantization {
    pub form: Form,
    /// Convolutions and linear layers that read bytes.
    chosen: Vec<bool>,
    /// Layers of floats that can write bytes.
    makers: Vec<bool>,
    /// By node what was seen of the values that become bytes.
    seen: Vec<Arc<Mutex<Histogram>>>,
    /// By node what its bytes stand for, once enough was seen.
    ranges: Option<Vec<Option<[f32; 2]>>>,
}

impl Quantization {
    /// None where there is nothing to gain.
    pub fn of(graph: &Graph, shapes: &[Shape]) -> Option<Self> {
        let chosen: Vec<bool> = (0..graph.nodes.len()).map(|node| is_worth_it(graph, shapes, node)).collect();
        let seen = chosen.iter().map(|_| Arc::default()).collect();
        chosen.contains(&true).then_some(Self { form: Form::Bytes, chosen, makers: makers(graph), seen, ranges: None })
    }

    /// Which layers compute in bfloat16: those that sum products directly. Winograd's algorithm saves more of them.
    pub fn bf16(graph: &Graph, shapes: &[Shape]) -> Option<Self> {
        let is_chosen = |node: usize| {
            Method::of(graph, shapes, node, Exact::Nowhere) == Method::Direct
                && window(graph, shapes, node).is_some_and(|w| {
                    // Channels in pairs.
                    w.groups == 1 && w.channels >= LEAST_CHANNELS && w.channels.is_multiple_of(2)
                })
                && !is_images(graph, graph.nodes[node].inputs[0])
        };
        let chosen: Vec<bool> = (0..graph.nodes.len()).map(is_chosen).collect();
        let (seen, ranges) = (Vec::new(), Some(vec![Some([0.0, 0.0]); chosen.len()]));
        chosen.contains(&true).then_some(Self { form: Form::Bf16, chosen, makers: makers(graph), seen, ranges })
    }

    pub fn chosen(&self) -> &[bool] {
        &self.chosen
    }

    pub fn seen(&self, node: usize) -> Arc<Mutex<Histogram>> {
        Arc::clone(&self.seen[node])
    }

    pub fn is_ready(&self) -> bool {
        self.ranges.is_some()
    }

    pub fn range(&self, node: usize) -> Option<Range> {
        let [low, high] = self.ranges.as_ref()?.get(node).copied().flatten()?;
        Some(Range::new(low, high))
    }

    /// (node, lowest, highest) of what was seen; an infinite or NaN range where a value was.
    pub fn found(&self) -> Vec<(usize, f32, f32)> {
        let seen = self.seen.iter().map(|one| one.lock().unwrap_or_else(PoisonError::into_inner));
        seen.enumerate()
            .filter(|(_, histogram)| histogram.0.iter().any(|&n| n > 0))
            .map(|(node, histogram)| {
                let [low, high] = histogram.range().unwrap_or([f32::NAN; 2]);
                (node, low, high)
            })
            .collect()
    }

    pub fn settle(&mut self, ranges: &[(usize, f32, f32)]) {
        let mut all = vec![None; self.chosen.len()];
        for &(node, low, high) in ranges {
            if let Some(place) = all.get_mut(node) {
                *place = Some([low, high]);
            }
        }
        self.ranges = Some(all);
    }

    /// The node of a layer's convolution, the first of two, where that reads bytes.
    pub fn reads_bytes(&self, layer: &Fused) -> Option<usize> {
        let first = layer.expand.as_deref().unwrap_or(layer);
        (self.chosen[first.node] && first.picked.is_none() && first.order.is_none()).then_some(first.node)
    }

    /// Whether a layer of floats can write bytes where only such layers read it.
    fn makes_bytes(&self, layer: &Fused) -> bool {
        self.makers[layer.node]
    }

    /// The layers with those that read bytes, and what makes bytes for them; and the layer norms that only they read.
    pub fn apply(&self, layers: Vec<Fused>, output: usize) -> (Vec<Fused>, Vec<usize>) {
        let nodes = self.chosen.len();
        let reads_bytes = |layer: &Fused| self.reads_bytes(layer).is_some();
        let (mut wanted, mut floats) = (vec![false; nodes], vec![false; nodes]);
        floats[output] = true;
        for layer in &layers {
            let bytes = reads_bytes(layer);
            layer.inputs.iter().for_each(|&node| if bytes { wanted[node] = true } else { floats[node] = true });
            // A depthwise convolution adds floats.
            if let Some(node) = layer.residual.filter(|_| !bytes || layer.expand.is_some()) {
                floats[node] = true;
            }
        }
        let alone = |layer: &Fused| layer.expand.is_none() && wanted[layer.last] && !floats[layer.last];
        let writes_bytes = |layer: &Fused| (reads_bytes(layer) || self.makes_bytes(layer)) && alone(layer);
        let direct: Vec<usize> = layers.iter().filter(|l| writes_bytes(l)).map(|layer| layer.last).collect();
        let norms = layers.iter().filter(|l| self.makes_bytes(l) && direct.contains(&l.last));
        let norms = norms.filter(|l| l.activation == Activate::Nothing).map(|l| l.last).collect();
        let mut all = Vec::with_capacity(2 * layers.len());
        for mut layer in layers {
            let value = layer.last;
            let role = if self.is_ready() { Role::Quantize } else { Role::Observe };
            if role == Role::Quantize && reads_bytes(&layer) {
                layer.inputs[0] += nodes;
                match &mut layer.expand {
                    Some(before) => {
                        before.inputs[0] += nodes;
                        before.role = Role::Bytes;
                    }
                    None => {
                        layer.role = Role::Bytes;
                        layer.residual.as_mut().filter(|r| direct.contains(r)).into_iter().for_each(|r| *r += nodes);
                        layer.last += if direct.contains(&value) { nodes } else { 0 };
                    }
                }
            } else if role == Role::Quantize && direct.contains(&value) {
                layer.last += nodes;
            }
            let made = layer.last >= nodes;
            all.push(layer);
            if wanted[value] && !made {
                all.push(Fused { last: value + nodes, role, ..Fused::plain(value, &[value]) });
            }
        }
        (all, norms)
    }
}

/// How the bytes of a value lie in memory, borders not yet there.
pub fn geometry(of: &Geometry, form: Form) -> Geometry {
    Geometry::blocked(of.channels.div_ceil(form.per_float()), of.height, of.width)
}

/// Layers of floats whose kernels write bytes, too.
fn makers(graph: &Graph) -> Vec<bool> {
    graph.nodes.iter().map(|node| matches!(node.op, Op::LayerNorm { .. } | Op::Attention { .. })).collect()
}

/// Whether a layer can read bytes, and long sums of them.
fn is_worth_it(graph: &Graph, shapes: &[Shape], node: usize) -> bool {
    if !matches!(graph.nodes[node].op, Op::Conv2d { .. } | Op::Linear { .. }) {
        return false;
    }
    let input = graph.nodes[node].inputs[0];
    window(graph, shapes, node).is_some_and(|w| {
        w.groups == 1
            && w.channels >= LEAST_CHANNELS
            && w.channels * w.kernel[0] * w.kernel[1] <= MOST_PRODUCTS
            // Zeros around a value are its smallest byte.
            && (w.padding == [0, 0] || is_positive(graph, joined(graph, input).map_or(input, |(_, source)| source)))
            && !is_images(graph, input)
    })
}

/// Whether a value is the network's input: the first layer stays in float32.
fn is_images(graph: &Graph, node: usize) -> bool {
    match graph.nodes[node].op {
        Op::Input => true,
        Op::Dropout { .. } | Op::Pad { .. } | Op::Permute { .. } | Op::Flatten { .. } | Op::Reshape { .. } => {
            is_images(graph, graph.nodes[node].inputs[0])
        }
        _ => false,
    }
}

/// Whether no number of a value is below 0.
fn is_positive(graph: &Graph, node: usize) -> bool {
    let all = || graph.nodes[node].inputs.iter().all(|&input| is_positive(graph, input));
    match &graph.nodes[node].op {
        Op::Activation { function, .. } => {
            matches!(function, Activation::Relu | Activation::Relu6 | Activation::Sigmoid | Activation::Hardsigmoid)
                || (matches!(function, Activation::Silu | Activation::Hardswish | Activation::Gelu { .. }) && all())
        }
        Op::MaxPool2d { .. }
        | Op::AvgPool2d { .. }
        | Op::AdaptiveAvgPool2d { .. }
        | Op::Mean { .. }
        | Op::Dropout { .. }
        | Op::Pad { .. }
        | Op::Permute { .. }
        | Op::Flatten { .. }
        | Op::Reshape { .. }
        | Op::Add { .. }
        | Op::Mul
        | Op::Cat { .. }
        | Op::Split { .. }
        | Op::ChannelShuffle { .. } => all(),
        Op::Softmax { log, .. } => !log,
        _ => false,
    }
}
