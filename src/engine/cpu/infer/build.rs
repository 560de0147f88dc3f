//! From layers to steps: kernels, geometry, memory and weights.

use std::sync::{Mutex, PoisonError};

use super::fuse::{Fused, Role, Tensors};
use super::memory::{Geometry, Value, arena};
use super::method::{Exact, Method, window};
use super::places::Picked;
use super::quantization::{self, Form, Quantization};
use super::steps::{
    self, Binary, Block, Cat, Conv, Depthwise, Direct, Gate, Grouped, ImageNorm, LayerNorm, Load, Over, Packing, Pad,
    PatchMerging, Pick, Pointwise, Pool, Relayout, Small, Softmax, Step, Upsample,
};
use super::steps::{Filters, Source, Store, Taps, Tokens, Winograd};
use super::{tokens, windows};
use crate::engine::cpu::common::analysis::unsupported;
use crate::engine::cpu::common::arena::Arena;
use crate::engine::cpu::common::geometry::{self, Window};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::common::team::Team;
use crate::engine::cpu::common::winograd::Blocks;
use crate::error::{Error, Result};
use crate::model::{Graph, Node, Op, Shape, Tensor};

/// What the steps of a plan are made from.
pub struct Network<'a> {
    pub graph: &'a Graph,
    pub shapes: &'a [Shape],
    pub tensors: &'a Tensors<'a>,
    pub layers: Vec<Fused>,
    /// The node whose value is the result.
    pub output: usize,
    /// Whether the caller's result has its channels last.
    pub channels_last: bool,
    pub isa: Isa,
    pub exact: Exact<'a>,
    pub quantization: Option<&'a Quantization>,
    /// By node what its channels are divided by as bytes (`balance`).
    pub balance: Vec<Option<Vec<f32>>>,
    pub workers: usize,
}

/// What [`Network::named`] calls a step that makes bytes of floats.
pub const QUANTIZE: &str = "quantize";
/// The same for bfloat16.
pub const ROUND: &str = "round";

type Write<'a> = Box<dyn Fn(usize, &mut [f32]) + Sync + 'a>;

/// Numbers that a step reads, to be written before the first batch: in pieces, each by a worker, after its number.
pub struct Fill<'a> {
    pub len: usize,
    pub piece: usize,
    pub write: Write<'a>,
}

/// Room for weights, and who writes it.
#[derive(Default)]
pub struct Weights<'a> {
    pub len: usize,
    pub fills: Vec<Fill<'a>>,
}

impl<'a> Weights<'a> {
    pub fn reserve(&mut self, len: usize, write: impl Fn(&mut [f32]) + Sync + 'a) -> usize {
        self.reserve_in(len, len, move |_, to| write(to))
    }

    pub fn reserve_in(&mut self, len: usize, piece: usize, write: impl Fn(usize, &mut [f32]) + Sync + 'a) -> usize {
        let offset = self.len;
        // Whole cache lines, so that no vector straddles two.
        self.len += len.next_multiple_of(LANES);
        self.fills.push(Fill { len, piece, write: Box::new(write) });
        offset
    }

    /// One number per channel, zeros in the lanes beyond.
    pub fn vector(&mut self, values: Vec<f64>) -> usize {
        self.reserve(values.len().next_multiple_of(LANES), move |to| {
            to.iter_mut().zip(&values).for_each(|(to, &v)| *to = v as f32);
        })
    }

    /// # Errors
    /// `NoMemory` when there is no memory, `Panic` when a worker panicked.
    pub fn arena(self, team: &mut Team) -> Result<Arena> {
        let mut arena = arena(self.len)?;
        let mut rest = arena.slice_mut();
        let mut parts = Vec::with_capacity(self.fills.len());
        for fill in &self.fills {
            let (part, more) = rest.split_at_mut(fill.len.next_multiple_of(LANES));
            parts.extend(part[..fill.len].chunks_mut(fill.piece.max(1)).enumerate().map(|(i, p)| (i, p, &fill.write)));
            rest = more;
        }
        let parts = Mutex::new(parts);
        team.run(&|_, _| {
            let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).pop();
            while let Some((number, part, write)) = next() {
                write(number, part);
            }
        })?;
        drop(parts);
        Ok(arena)
    }
}

impl<'a> Network<'a> {
    /// All layers, those that are part of another before it.
    fn all(&self) -> impl Iterator<Item = &Fused> {
        self.layers.iter().flat_map(|layer| layer.expand.as_deref().into_iter().chain([layer]))
    }

    /// Where every layer's value would lie, wide enough for all that read it. Indexed by node.
    pub fn geometries(&self) -> Result<Vec<Option<Geometry>>> {
        let nodes = self.graph.nodes.len();
        // Behind those of floats the same of bytes.
        let mut geometries = vec![None; 2 * nodes];
        for layer in self.all() {
            let shape = &self.shapes[layer.last % nodes][1..];
            let node = &self.graph.nodes[layer.last % nodes];
            let made =
                Geometry::of(shape).ok_or_else(|| unsupported(node, &format!("has a result of shape {shape:?}")))?;
            geometries[layer.last] =
                Some(if layer.last < nodes { made } else { quantization::geometry(&made, self.form()) });
        }
        for layer in self.all() {
            if let (Some(window), method) = self.method(layer)
                && let Some(input) = layer.expand.as_ref().map(|before| before.last).or(layer.inputs.first().copied())
                && let Some(input) = &mut geometries[input]
            {
                method.widen(&window, input);
            }
        }
        self.align(&mut geometries);
        let dense = |l: &Fused| {
            let first = l.expand.as_deref().unwrap_or(l);
            matches!(self.method(first), (Some(w), Method::Direct) if w.groups == 1)
        };
        if let Some(input) = &mut geometries[0]
            && input.channels < LANES
            && self.layers.iter().filter(|l| l.inputs.contains(&0)).all(dense)
            && self.layers.iter().all(|l| l.residual != Some(0))
            && self.output != 0
        {
            // Colour images: channels side by side instead of thirteen lanes of zeros.
            input.pixel = input.channels;
        }
        Ok(geometries)
    }

    /// Convolutions that pick channels of several values: how many.
    pub fn together(&self) -> impl Iterator<Item = &[usize]> {
        let picks = |layer: &&Fused| layer.picked.is_some() && matches!(self.method(layer), (Some(_), _));
        self.all().filter(picks).map(|layer| layer.inputs.as_slice())
    }

    /// The same borders around values from which a convolution picks channels: one distance leads to the next image.
    fn align(&self, geometries: &mut [Option<Geometry>]) {
        loop {
            let before = geometries.to_vec();
            for nodes in self.together() {
                let all: Vec<Geometry> = nodes.iter().filter_map(|&node| geometries[node]).collect();
                for &node in nodes {
                    if let Some(geometry) = &mut geometries[node] {
                        all.iter().for_each(|other| geometry.widen(other.before, other.after));
                    }
                }
            }
            if before == geometries {
                return;
            }
        }
    }

    /// # Errors
    /// `Unsupported` naming what this engine does not compute.
    pub fn check(&self) -> Result<()> {
        self.geometries()?;
        for layer in self.all() {
            for tensor in self.node(layer).op.parameters() {
                self.floats(layer, tensor)?;
            }
        }
        Ok(())
    }

    pub fn method(&self, layer: &Fused) -> (Option<Window>, Method) {
        if matches!(layer.role, Role::Quantize | Role::Observe) {
            return (None, Method::None);
        }
        let window = window(self.graph, self.shapes, layer.node);
        (window, Method::of(self.graph, self.shapes, layer.node, self.exact))
    }

    /// What the kernel of a layer is called.
    pub fn named(&self, layer: &Fused) -> &'static str {
        let first = layer.expand.as_deref().unwrap_or(layer);
        let is_bf16 = self.form() == Form::Bf16;
        match (self.method(layer).1, layer.role, first.role) {
            (_, Role::Quantize, _) if is_bf16 => ROUND,
            (_, Role::Quantize, _) => QUANTIZE,
            (_, Role::Observe, _) => "observe",
            (_, Role::Bytes, _) if is_bf16 => "bf16",
            (_, Role::Bytes, _) => "int8",
            (_, _, Role::Bytes) if is_bf16 => "bf16 + depthwise",
            (_, _, Role::Bytes) => "int8 + depthwise",
            _ if layer.expand.is_some() => "direct + depthwise",
            (Method::Winograd(size), ..) if size.outputs() == 6 => "winograd 6",
            (Method::Winograd(_), ..) => "winograd 4",
            (Method::Depthwise, ..) => "depthwise",
            (Method::Direct, ..) => "direct",
            (Method::Grouped, ..) => "grouped",
            (Method::None, ..) => "",
        }
    }

    pub fn node(&self, layer: &Fused) -> &'a Node {
        &self.graph.nodes[layer.node]
    }

    pub fn floats(&self, layer: &Fused, tensor: Tensor) -> Result<&'a [f32]> {
        let node = self.node(layer);
        let expected: usize = self.graph.tensors[tensor].iter().product();
        match self.tensors.get(tensor).copied().flatten() {
            Some(floats) if floats.len() == expected => Ok(floats),
            _ => Err(unsupported(node, "has parameters that are not contiguous float32 on the CPU")),
        }
    }

    /// The step of a layer; `value` is where a node's value lies.
    pub fn step(
        &self,
        layer: &Fused,
        value: impl Fn(usize) -> Result<Value>,
        weights: &mut Weights<'a>,
    ) -> Result<Box<dyn Step>> {
        let (output, isa, activation) = (value(layer.last)?, self.isa, layer.activation);
        let node = self.node(layer);
        if matches!(node.op, Op::Input) {
            return Ok(Box::new(Load { output }));
        }
        let input = value(layer.inputs[0])?;
        let sources = layer.inputs.iter().map(|&node| value(node)).collect::<Result<Vec<_>>>()?;
        if matches!(layer.role, Role::Quantize | Role::Observe) {
            return self.between(layer, input, output);
        }
        if let (Some(picked), (None, _)) = (&layer.picked, self.method(layer)) {
            let number = |node: usize| layer.inputs.iter().position(|&input| input == node).unwrap_or(0);
            let places = picked.places.iter().map(|place| (number(place.node), place.channel)).collect();
            return Ok(Box::new(Pick { inputs: sources, places, output }));
        }
        if let Some(parts) = layer.gate {
            return Ok(Box::new(Gate { isa, input, parts, output, activation }));
        }
        let plane = |v: &Value| [v.geometry.height, v.geometry.width];
        Ok(match &node.op {
            Op::Conv2d { .. } | Op::Linear { .. } => {
                let residual = layer.residual.map(&value).transpose()?;
                let rows = layer.expand.as_ref().map(|before| value(before.last)).transpose()?;
                return self.sums(layer, &Values { input, sources, rows, output, residual }, weights);
            }
            Op::MaxPool2d { .. } | Op::AvgPool2d { .. } | Op::AdaptiveAvgPool2d { .. } | Op::Mean { .. } => {
                let (spans, reduce) = geometry::pool(&node.op, plane(&input), plane(&output))
                    .ok_or_else(|| unsupported(node, "is no pooling"))?;
                Box::new(Pool { isa, input, output, spans, reduce, activation })
            }
            Op::Add { .. } | Op::Mul => {
                let op = if matches!(node.op, Op::Mul) { Binary::Mul } else { Binary::Add };
                let second = Some((op, value(layer.inputs[1])?));
                Box::new(Pointwise { isa, input, second, affine: None, output, activation })
            }
            Op::LayerNorm { weight, bias, eps, .. } => {
                let made = self.made(layer)?;
                let share = self.share(layer.last).filter(|_| made.is_some());
                let [factor, summand] = self.per_channel(layer, [*weight, *bias], share, &input, weights)?;
                Box::new(LayerNorm { isa, input, output, factor, summand, eps: *eps as f32, activation, made })
            }
            Op::GroupNorm { weight, bias, eps, .. } => {
                let [factor, summand] = self.per_channel(layer, [*weight, *bias], None, &input, weights)?;
                let (over, eps) = (Over::Group, *eps as f32);
                Box::new(ImageNorm { isa, over, input, output, factor, summand, eps, activation })
            }
            Op::ResponseNorm { weight, bias, eps, .. } => {
                let [factor, summand] = self.per_channel(layer, [Some(*weight), Some(*bias)], None, &input, weights)?;
                let (over, eps) = (Over::Response, *eps as f32);
                Box::new(ImageNorm { isa, over, input, output, factor, summand, eps, activation })
            }
            Op::Upsample { scale } => Box::new(Upsample { input, output, scale: *scale }),
            Op::Pad { before, .. } => Box::new(Pad { input, output, before: *before }),
            Op::BatchNorm2d { .. } | Op::Scale { .. } | Op::Activation { .. } | Op::Shift { .. }
                if !tokens::moves(self.graph, self.shapes, layer.node) =>
            {
                let affine =
                    layer.affine.clone().map(|[factor, summand]| [weights.vector(factor), weights.vector(summand)]);
                Box::new(Pointwise { isa, input, second: None, affine, output, activation })
            }
            Op::Attention { .. } => Box::new(tokens::attention(self, layer, &sources, output, weights)?),
            Op::WindowAttention(w) => Box::new(windows::step(self, layer, w, [input, output], weights)?),
            Op::PatchMerging => Box::new(PatchMerging { input, output }),
            Op::Shift { .. } | Op::Split { .. } | Op::Flatten { .. } | Op::Reshape { .. } | Op::Cat { .. }
                if let Some(parts) = tokens::parts(self, layer, &sources, weights)? =>
            {
                let summand = layer.summand.map(|t| tokens::table(self, t, &output.geometry, weights)).transpose()?;
                Box::new(Tokens { isa, parts, summand, output })
            }
            Op::Cat { .. } => {
                let mut first = 0;
                let mut inputs = Vec::new();
                for part in sources {
                    inputs.push((part, first));
                    first += part.geometry.channels;
                }
                Box::new(Cat { inputs, output })
            }
            Op::Flatten { .. } | Op::Reshape { .. } => Box::new(Relayout { input, output }),
            Op::Softmax { log, .. } => Box::new(Softmax { input, output, log: *log }),
            Op::Input
            | Op::Dropout { .. }
            | Op::StochasticDepth { .. }
            | Op::Permute { .. }
            | Op::Split { .. }
            | Op::ChannelShuffle { .. }
            | Op::Expand { .. }
            | Op::BatchNorm2d { .. }
            | Op::Scale { .. }
            | Op::Activation { .. }
            | Op::Shift { .. } => {
                return Err(Error::internal(format_args!("{}: not a layer", node.name)));
            }
        })
    }

    /// Where factors and summands of a norm begin in the weights: one and zero per channel where there are none.
    fn per_channel(
        &self,
        layer: &Fused,
        tensors: [Option<Tensor>; 2],
        share: Option<&[f32]>,
        input: &Value,
        weights: &mut Weights<'a>,
    ) -> Result<[usize; 2]> {
        let mut places = [0; 2];
        for ((place, tensor), or) in places.iter_mut().zip(tensors).zip([1.0, 0.0]) {
            let mut numbers = match tensor {
                Some(tensor) => self.floats(layer, tensor)?.iter().map(|&v| f64::from(v)).collect(),
                None => vec![or; input.geometry.channels],
            };
            for (number, &share) in numbers.iter_mut().zip(share.unwrap_or_default()) {
                *number /= f64::from(share);
            }
            *place = weights.vector(numbers);
        }
        Ok(places)
    }

    /// The step that hands the result to the caller.
    pub fn store(&self, value: Value) -> Box<dyn Step> {
        Box::new(Store { input: value, channels_last: self.channels_last })
    }

    fn sums(&self, layer: &Fused, values: &Values, weights: &mut Weights<'a>) -> Result<Box<dyn Step>> {
        let (node, isa, activation) = (self.node(layer), self.isa, layer.activation);
        let &Values { input, output, residual, .. } = values;
        if let (_, Method::Direct) = self.method(layer) {
            return Ok(Box::new(self.conv(layer, values, weights)?));
        }
        let Sums { window: w, method, filters, scale, bias } = self.prepare(layer, weights)?;
        let (ins, outs) = (w.channels.next_multiple_of(LANES), w.out_channels.next_multiple_of(LANES));
        Ok(match method {
            Method::Winograd(size) => {
                let weight = Filters { size, isa, out: w.out_channels, inp: w.channels, weight: filters, scale: None };
                let weights = weights.reserve_in(ins * outs * size.products(), weight.panel(), move |number, u| {
                    Filters { scale: scale.as_deref(), ..weight }.transform(number, u);
                });
                let tiles = steps::tiles(size, w.output);
                let pool = layer.pool;
                let (ins, outs) = (input.geometry.blocks(), output.geometry.blocks());
                Box::new(Winograd {
                    blocks: Blocks::new(isa, size, ins, outs, self.workers),
                    input,
                    output,
                    residual,
                    weights,
                    bias,
                    padding: w.padding,
                    activation,
                    pool,
                    tiles,
                })
            }
            Method::Depthwise => {
                let source = match (&layer.expand, values.rows) {
                    (Some(before), Some(rows)) => {
                        let sources = values.sources.clone();
                        let values = Values { input, sources, output: rows, rows: None, residual: None };
                        Source::Conv(Box::new(self.conv(before, &values, weights)?))
                    }
                    _ => Source::Value(input),
                };
                let window = w.kernel[0] * w.kernel[1];
                let weights = weights.reserve(outs * window, move |to| {
                    for (c, filter) in filters.chunks_exact(window).enumerate() {
                        let factor = scale.as_ref().map_or(1.0, |s| s[c]);
                        for (k, &f) in filter.iter().enumerate() {
                            to[(c / LANES * window + k) * LANES + c % LANES] = (f64::from(f) * factor) as f32;
                        }
                    }
                });
                Box::new(Depthwise {
                    isa,
                    workers: self.workers,
                    source,
                    output,
                    residual,
                    weights,
                    bias,
                    kernel: w.kernel,
                    stride: w.stride,
                    padding: w.padding,
                    dilation: w.dilation,
                    activation,
                })
            }
            Method::Grouped if let Some(width) = Small::width(&w) => {
                let len = output.geometry.blocks() * Small::block(w.kernel, width);
                let weights = weights.reserve(len, move |to| steps::pack_small(&w, filters, scale.as_deref(), to));
                let (stride, padding) = (w.stride, w.padding);
                let direct = Direct { isa, input, output, residual, bias, stride, padding, activation };
                Box::new(Small::new(direct, weights, w.kernel, width))
            }
            Method::Grouped => {
                let blocks = Block::all(&w, &input.geometry);
                let len = blocks.iter().map(|block| block.taps.depth() * LANES).sum();
                let weights = weights.reserve(len, move |to| steps::pack_grouped(&w, filters, scale.as_deref(), to));
                let (stride, padding) = (w.stride, w.padding);
                let direct = Direct { isa, input, output, residual, bias, stride, padding, activation };
                Box::new(Grouped { direct, weights, blocks })
            }
            Method::Direct | Method::None => return Err(unsupported(node, "is no convolution")),
        })
    }

    /// A convolution by direct summation.
    fn conv(&self, layer: &Fused, values: &Values, weights: &mut Weights<'a>) -> Result<Conv> {
        let (isa, activation) = (self.isa, layer.activation);
        let &Values { mut input, output, residual, .. } = values;
        if layer.role == Role::Bytes {
            return self.byte_conv(layer, values, weights);
        }
        let Sums { window: w, method, filters, scale, bias } = self.prepare(layer, weights)?;
        if method != Method::Direct {
            return Err(unsupported(self.node(layer), "is not summed directly"));
        }
        let (groups, inp) = (w.groups, w.channels / w.groups);
        let mut taps = Taps::new(&input.geometry, inp, w.kernel, w.dilation);
        let mut rows = None;
        if let Some(picked) = &layer.picked {
            let first = values.sources.iter().min_by_key(|source| source.offset).copied();
            input = first.ok_or_else(|| unsupported(self.node(layer), "reads nothing"))?;
            taps = Taps::picked(self.offsets(layer, picked, &values.sources, &input)?);
            rows = Some(picked.rows());
        }
        let order = layer.order.clone();
        let (depth, packing) = (taps.depth(), taps.clone());
        let len = w.out_channels.next_multiple_of(LANES) * depth;
        let wide = isa.columns() * LANES;
        // Groups: all panels at once, which may be of several widths.
        let piece = if groups == 1 { wide * depth } else { len };
        let weights = weights.reserve_in(len, piece, move |number, to| {
            let packing = Packing {
                isa,
                out: w.out_channels,
                groups,
                inp,
                kernel: w.kernel,
                taps: &packing,
                pixel: input.geometry.pixel,
                weight: filters,
                scale: scale.as_deref(),
                rows: rows.as_deref(),
                order: order.as_deref(),
            };
            steps::pack(&packing, number * wide, to);
        });
        let (stride, padding) = (w.stride, w.padding);
        let direct = Direct { isa, input, output, residual, bias, stride, padding, activation };
        let blocks = output.geometry.blocks() / groups;
        Ok(Conv { direct, weights, groups, blocks, taps, bytes: None })
    }

    /// How far each picked channel is from the beginning of `first`, the first of the values in memory.
    fn offsets(&self, layer: &Fused, picked: &Picked, sources: &[Value], first: &Value) -> Result<Vec<usize>> {
        let offset = |place: &super::places::Place| {
            let at = layer.inputs.iter().position(|&node| node == place.node)?;
            let Value { geometry: g, offset, whole } = sources[at];
            // One step leads to the next image in all of them.
            let alike = g.len() == first.geometry.len() && g.plane() == first.geometry.plane() && whole == first.whole;
            alike.then(|| offset - first.offset + place.channel / LANES * g.plane() + place.channel % LANES)
        };
        let offsets: Option<Vec<usize>> = picked.places.iter().map(offset).collect();
        offsets.ok_or_else(|| Error::internal(format_args!("{}: picks of unlike values", self.node(layer).name)))
    }

    /// Factor and summand of each output channel of a convolution.
    pub fn affine(&self, layer: &Fused, bias: Option<Tensor>) -> Result<[Vec<f64>; 2]> {
        let channels = self.shapes[layer.node][1];
        let mut summand = vec![0.0; channels];
        if let Some(bias) = bias {
            summand = self.floats(layer, bias)?.iter().map(|&b| f64::from(b)).collect();
        }
        let Some([factor, shift]) = &layer.affine else { return Ok([vec![1.0; channels], summand]) };
        for ((s, f), t) in summand.iter_mut().zip(factor).zip(shift) {
            *s = *s * f + t;
        }
        Ok([factor.clone(), summand])
    }

    fn prepare(&self, layer: &Fused, weights: &mut Weights<'a>) -> Result<Sums<'a>> {
        let node = self.node(layer);
        let (Some(window), method) = self.method(layer) else { return Err(unsupported(node, "is no convolution")) };
        let (Op::Conv2d { weight, bias, .. } | Op::Linear { weight, bias }) = node.op else {
            return Err(unsupported(node, "is no convolution"));
        };
        let filters = self.floats(layer, weight)?;
        let [factors, mut summand] = self.affine(layer, bias)?;
        let scale = layer.affine.is_some().then_some(factors);
        if let Some(order) = &layer.order {
            summand = order.iter().map(|&channel| summand[channel]).collect();
        }
        Ok(Sums { window, method, filters, scale, bias: weights.vector(summand) })
    }
}

/// What a convolution reads and writes.
pub struct Values {
    pub input: Value,
    /// All that it picks channels of.
    pub sources: Vec<Value>,
    /// The result of the convolution that a depthwise one has taken in: rows in the workers' memory, in this geometry.
    pub rows: Option<Value>,
    pub output: Value,
    pub residual: Option<Value>,
}

/// What all methods of convolution need.
struct Sums<'a> {
    window: Window,
    method: Method,
    filters: &'a [f32],
    /// One factor per output channel.
    scale: Option<Vec<f64>>,
    /// Where the summands, one per output channel, begin in the weights.
    bias: usize,
}
