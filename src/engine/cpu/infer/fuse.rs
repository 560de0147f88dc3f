//! From the graph to layers: what follows an operation and only reads its result becomes part of it.
//!
//! ```text
//! ZeroPad2d -> Conv2d | Linear -> (BatchNorm2d | Scale | Shift)* -> Add -> activation -> MaxPool2d 2x2 (Winograd only)
//! Conv2d | Linear -> ReLU -> Scale | Shift, all channels alike
//! (BatchNorm2d | Scale | Shift)* | Add | Mul | norms | pooling -> activation
//! Conv2d (direct, one group, no Add, more than one pixel) -> depthwise Conv2d
//! Cat of tokens -> Shift
//! Split -> activation of one part -> Mul by the other
//! x * sigmoid(x) is the activation SiLU; permutations are names (`canonical`), and so are moved channels (`places`)
//! ```

use super::method::{Exact, Method, joined, window};
use super::places::{self, Names, Picked};
use super::{tokens, windows};
use crate::engine::cpu::common::analysis::{axis, readers, unsupported};
use crate::engine::cpu::common::kernels::activate::Activate;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::error::Result;
use crate::model::{Activation, Dim, Graph, Node, Op, Shape, Tensor};

/// A layer: an operation and what has been fused with it.
#[derive(Debug)]
pub struct Fused {
    /// A convolution whose result only this depthwise convolution reads; `inputs` are its inputs then.
    pub expand: Option<Box<Self>>,
    pub node: usize,
    /// The node whose value the layer makes.
    pub last: usize,
    /// Nodes whose values it reads.
    pub inputs: Vec<usize>,
    /// Batch norm or scale after the sums: factor and summand per channel.
    pub affine: Option<[Vec<f64>; 2]>,
    /// Node whose value is added before the activation.
    pub residual: Option<usize>,
    /// Of tokens: a table that is added.
    pub summand: Option<Tensor>,
    /// A product of two parts of its input, one of them behind an activation: the blocks with which they begin.
    pub gate: Option<[usize; 2]>,
    pub activation: Activate,
    pub pool: bool,
    /// Where it finds each channel, if not in the order of one value. A layer of its own that has nothing else is a copy.
    pub picked: Option<Picked>,
    /// Of a convolution: for each channel in memory which of PyTorch's it is, if not the same.
    pub order: Option<Vec<usize>>,
    pub role: Role,
}

/// What a layer does with bytes (`quantization`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Nothing: it computes in float32.
    Floats,
    /// A convolution or linear layer that sums products of bytes.
    Bytes,
    /// Makes bytes of a value.
    Quantize,
    /// Looks at a value that will be bytes.
    Observe,
}

impl Fused {
    /// One operation alone.
    pub fn plain(node: usize, inputs: &[usize]) -> Self {
        Self {
            expand: None,
            node,
            last: node,
            inputs: inputs.to_vec(),
            affine: None,
            residual: None,
            summand: None,
            gate: None,
            activation: Activate::Nothing,
            pool: false,
            picked: None,
            order: None,
            role: Role::Floats,
        }
    }
}

/// Parameters and buffers of the graph, as float32; `None` for those that hold no float32.
pub type Tensors<'a> = [Option<&'a [f32]>];

struct Fusion<'a> {
    graph: &'a Graph,
    shapes: &'a [Shape],
    tensors: &'a Tensors<'a>,
    exact: Exact<'a>,
    /// Nodes that read each node.
    readers: Vec<Vec<usize>>,
    /// The node that holds each node's value.
    source: Vec<usize>,
    taken: Vec<bool>,
    names: Names,
}

/// The layers in the order in which they can run.
///
/// # Errors
/// `Unsupported`, naming the first operation that this engine does not compute.
pub fn fuse(graph: &Graph, shapes: &[Shape], tensors: &Tensors<'_>, exact: Exact<'_>) -> Result<(Vec<Fused>, usize)> {
    let source = (0..graph.nodes.len()).collect();
    let taken = vec![false; graph.nodes.len()];
    let names = Names::new(graph.nodes.len());
    let mut fusion = Fusion { graph, shapes, tensors, exact, readers: readers(graph), source, taken, names };
    let mut layers = Vec::new();
    for index in 0..graph.nodes.len() {
        if !fusion.taken[index] {
            layers.extend(fusion.layer(index)?);
        }
    }
    let resolve = |node: &mut usize| *node = fusion.source[*node];
    for layer in &mut layers {
        layer.inputs.iter_mut().for_each(resolve);
        layer.residual.as_mut().map(resolve);
    }
    let output = fusion.source[graph.output];
    layers.extend(fusion.names.copies(&layers, output));
    // A layer that ends in an addition runs where the addition stood: by then the other operand is known.
    layers.sort_by_key(|layer| layer.last);
    places::pick(graph, shapes, exact, output, &mut layers);
    Ok((expansions(graph, shapes, exact, output, layers), output))
}

/// Joins convolutions with the depthwise convolutions that alone read them.
fn expansions(graph: &Graph, shapes: &[Shape], exact: Exact<'_>, output: usize, layers: Vec<Fused>) -> Vec<Fused> {
    let method = |layer: &Fused| Method::of(graph, shapes, layer.node, exact);
    let is_dense = |layer: &Fused| {
        method(layer) == Method::Direct && window(graph, shapes, layer.node).is_some_and(|w| w.groups == 1)
    };
    let mut reads = vec![0; graph.nodes.len()];
    layers.iter().flat_map(|layer| layer.inputs.iter().chain(&layer.residual)).for_each(|&node| reads[node] += 1);
    reads[output] += 1;
    let image = |node: usize| shapes[node].len() == 4 && shapes[node][2..] != [1, 1];
    let mut done: Vec<Fused> = Vec::with_capacity(layers.len());
    for mut layer in layers {
        if method(&layer) == Method::Depthwise
            && reads[layer.inputs[0]] == 1
            && image(layer.inputs[0])
            && let Some(at) = done.iter().position(|before| before.last == layer.inputs[0])
            && is_dense(&done[at])
            && done[at].residual.is_none()
        {
            let before = done.remove(at);
            layer.inputs.clone_from(&before.inputs);
            layer.expand = Some(Box::new(before));
        }
        done.push(layer);
    }
    done
}

impl Fusion<'_> {
    fn layer(&mut self, index: usize) -> Result<Option<Fused>> {
        let node = &self.graph.nodes[index];
        let (from, shape) = (node.inputs.first().map(|&i| &self.shapes[i]), &self.shapes[index]);
        if !matches!(shape.len(), 2 | 4) {
            return Err(unsupported(node, &format!("has a result of shape {shape:?}, not (N, C, H, W) or (N, F)")));
        }
        match &node.op {
            Op::Dropout { p, training, .. } => {
                if *training && *p > 0.0 {
                    return Err(unsupported(node, "drops values in training mode; call eval()"));
                }
                self.source[index] = self.source[node.inputs[0]];
                return Ok(None);
            }
            Op::StochasticDepth { .. } => {
                return Err(unsupported(node, "drops values in training mode; call eval()"));
            }
            Op::Permute { .. } => {
                self.source[index] = self.source[node.inputs[0]];
                return Ok(None);
            }
            Op::Pad { .. } if joined(self.graph, index).is_some() => {
                self.source[index] = self.source[node.inputs[0]];
                return Ok(None);
            }
            Op::Flatten { .. } | Op::Reshape { .. } => {
                if let Op::Reshape { dims } = &node.op
                    && matches!(dims.first(), Some(Dim::Fixed(_)))
                {
                    return Err(unsupported(node, "fixes the number of images"));
                }
                if from.is_some_and(|from| from[0] != shape[0]) {
                    return Err(unsupported(node, "mixes the images of a batch"));
                }
                let pixels = |s: &Shape| s.iter().skip(2).product::<usize>();
                if from.is_some_and(|from| pixels(from) == 1) && pixels(shape) == 1 {
                    self.source[index] = self.source[node.inputs[0]];
                    return Ok(None);
                }
            }
            Op::GroupNorm { groups, .. } if *groups != 1 => {
                return Err(unsupported(node, "has several groups of channels"));
            }
            Op::Softmax { dim, .. } if !matches!(axis(*dim, shape.len()), 1) => {
                return Err(unsupported(node, "runs along another dimension than the channels"));
            }
            Op::Expand { tensor } => {
                self.floats(node, *tensor)?;
                let joins = |&reader: &usize| tokens::reads_constants(&self.graph.nodes[reader], index);
                return match self.readers[index].iter().all(joins) && index != self.graph.output {
                    true => Ok(None),
                    false => Err(unsupported(node, "is read by something else than a concatenation of tokens")),
                };
            }
            _ if tokens::moves(self.graph, self.shapes, index) => return self.tokens(index).map(Some),
            Op::Cat { dim } if axis(*dim, shape.len()) != 1 => {
                return Err(unsupported(node, "joins another dimension than the channels"));
            }
            Op::Split { dim, .. } if axis(*dim, shape.len()) != 1 => {
                return Err(unsupported(node, "divides another dimension than the channels"));
            }
            Op::Mean { dims, .. } => {
                let rank = from.map_or(0, Vec::len);
                let mut axes: Vec<_> = dims.iter().map(|&d| axis(d, rank)).collect();
                axes.sort_unstable();
                let tokens = axes == [3] && from.is_some_and(|from| from[2] == 1);
                if rank != 4 || (axes != [2, 3] && !tokens) {
                    return Err(unsupported(node, "is not over height and width, nor over tokens"));
                }
            }
            Op::Add { .. } | Op::Mul => {
                let one_pixel = |s: &Shape| s.len() == 4 && s[..2] == shape[..2] && s[2..] == [1, 1];
                let fits = |&i: &usize| self.shapes[i] == *shape || one_pixel(&self.shapes[i]);
                if !node.inputs.iter().all(fits) {
                    return Err(unsupported(node, "broadcasts something else than one pixel per channel"));
                }
            }
            Op::Input
            | Op::Conv2d { .. }
            | Op::BatchNorm2d { .. }
            | Op::Activation { .. }
            | Op::MaxPool2d { .. }
            | Op::AvgPool2d { .. }
            | Op::AdaptiveAvgPool2d { .. }
            | Op::Linear { .. }
            | Op::LayerNorm { .. }
            | Op::Pad { .. }
            | Op::Scale { .. }
            | Op::Softmax { .. }
            | Op::Cat { .. }
            | Op::Split { .. }
            | Op::GroupNorm { .. }
            | Op::ResponseNorm { .. }
            | Op::Upsample { .. }
            | Op::Shift { .. }
            | Op::ChannelShuffle { .. } => {}
            Op::Attention { heads, scale, .. } => tokens::check_attention(node, shape[1], *heads, *scale)?,
            Op::WindowAttention(windows) => windows::check(node, shape[1], windows, self.tensors)?,
            Op::PatchMerging => {
                if let Some(channels) = from.map(|from| from[1]).filter(|channels| !channels.is_multiple_of(LANES)) {
                    return Err(unsupported(node, &format!("has {channels} channels, no multiple of {LANES}")));
                }
            }
        }
        if let Some(layer) = self.gated(index) {
            return Ok(Some(layer));
        }
        if self.names.note(self.graph, self.shapes, index, &self.source, &self.readers) {
            return Ok(None);
        }
        let mut layer = Fused::plain(index, &node.inputs);
        layer.inputs.retain(|&input| !matches!(self.graph.nodes[input].op, Op::Expand { .. }));
        match &node.op {
            Op::BatchNorm2d { .. } => layer.affine = Some(self.norm(node)?),
            Op::Scale { factor, .. } => layer.affine = Some(self.scale(index, *factor)?),
            Op::Shift { summand } => layer.affine = Some(self.shift(index, *summand)?),
            Op::Activation { function, .. } => layer.activation = (*function).into(),
            _ => {}
        }
        if !matches!(
            node.op,
            Op::Input
                | Op::Cat { .. }
                | Op::Softmax { .. }
                | Op::Attention { .. }
                | Op::WindowAttention(_)
                | Op::PatchMerging
                | Op::Flatten { .. }
                | Op::Reshape { .. }
                | Op::Pad { .. }
                | Op::Upsample { .. }
        ) {
            self.follow(&mut layer)?;
        }
        self.source[layer.last] = layer.last;
        Ok(Some(layer))
    }

    /// A layer that moves tokens, and what it adds to them.
    fn tokens(&mut self, index: usize) -> Result<Fused> {
        let node = &self.graph.nodes[index];
        let mut layer = Fused::plain(index, &node.inputs);
        layer.inputs.retain(|&input| !matches!(self.graph.nodes[input].op, Op::Expand { .. }));
        if layer.inputs.is_empty() {
            return Err(unsupported(node, "joins nothing but constants"));
        }
        let mut next = index;
        loop {
            match &self.graph.nodes[next].op {
                Op::Shift { summand } if next == index || tokens::moves(self.graph, self.shapes, next) => {
                    self.floats(&self.graph.nodes[next], *summand)?;
                    layer.summand = Some(*summand);
                }
                Op::Dropout { p, training, .. } if !*training || *p == 0.0 => {}
                _ if next == index => {}
                _ => break,
            }
            self.taken[next] = true;
            layer.last = next;
            match self.readers[next][..] {
                [reader] if layer.summand.is_none() && next != self.graph.output => next = reader,
                _ => break,
            }
        }
        self.source[layer.last] = layer.last;
        Ok(layer)
    }

    /// An activation of one part of a value, times another part.
    fn gated(&mut self, index: usize) -> Option<Fused> {
        let Op::Activation { function, .. } = self.graph.nodes[index].op else { return None };
        let [product] = self.readers[index][..] else { return None };
        let (node, part) = (&self.graph.nodes[product], self.graph.nodes[index].inputs[0]);
        let [a, b] = node.inputs[..] else { return None };
        let other = if a == index { b } else { a };
        if node.op != Op::Mul || index == self.graph.output || a == b || self.shapes[other] != self.shapes[index] {
            return None;
        }
        let [gate, factor] = [part, other].map(|part| self.names.blocks(self.source[part]));
        let ((of, gate), (same, factor)) = (gate?, factor?);
        if of != same {
            return None;
        }
        self.taken[product] = true;
        self.source[product] = product;
        let mut layer = Fused::plain(product, &[of]);
        (layer.activation, layer.gate) = (function.into(), Some([gate, factor]));
        Some(layer)
    }

    /// Takes in the operations that are the only readers of what comes before them.
    fn follow(&mut self, layer: &mut Fused) -> Result<()> {
        let op = &self.graph.nodes[layer.node].op;
        let sums = matches!(op, Op::Conv2d { .. } | Op::Linear { .. });
        let affine = sums || matches!(op, Op::BatchNorm2d { .. } | Op::Scale { .. } | Op::Shift { .. });
        loop {
            let plain = layer.activation == Activate::Nothing;
            if let Some([gate, product]) = self.swish(layer.last).filter(|_| plain) {
                [gate, product].iter().for_each(|&node| self.taken[node] = true);
                layer.activation = Activate::Silu;
                layer.last = product;
            }
            let [next] = self.readers[layer.last][..] else { break };
            let node = &self.graph.nodes[next];
            let plain = layer.activation == Activate::Nothing;
            if layer.last == self.graph.output || self.taken[next] {
                break;
            }
            match &node.op {
                Op::Dropout { p, training, .. } if !*training || *p == 0.0 => {}
                Op::Permute { .. } => {}
                Op::BatchNorm2d { .. } | Op::Scale { .. } | Op::Shift { .. }
                    if affine && layer.residual.is_none() && !tokens::moves(self.graph, self.shapes, next) =>
                {
                    let after = match &node.op {
                        Op::Scale { factor, .. } => self.scale(next, *factor)?,
                        Op::Shift { summand } => self.shift(next, *summand)?,
                        _ => self.norm(node)?,
                    };
                    if !plain {
                        // `max(x, 0) * s + t` is `max(x * s + t, t)` where s is positive.
                        let Some(activation) = rectified(layer.activation, &after) else { break };
                        layer.activation = activation;
                    }
                    layer.affine = Some(match layer.affine.take() {
                        Some(before) => compose(before, after),
                        None => after,
                    });
                }
                Op::Add { .. } if sums && plain && layer.residual.is_none() && node.inputs[0] != node.inputs[1] => {
                    let other = node.inputs[usize::from(node.inputs[0] == layer.last)];
                    if self.shapes[other] != self.shapes[next] || self.shapes[layer.last] != self.shapes[next] {
                        break;
                    }
                    layer.residual = Some(other);
                }
                Op::Activation { function, .. } if plain => layer.activation = (*function).into(),
                Op::MaxPool2d { kernel: [2, 2], stride: [2, 2], padding: [0, 0], dilation: [1, 1], ceil_mode }
                    if sums
                        && layer.residual.is_none()
                        && layer.activation.keeps_order()
                        && (!ceil_mode || self.shapes[layer.last][2..].iter().all(|side| side % 2 == 0)) =>
                {
                    // Only Winograd's output transform can do it.
                    if !Method::of(self.graph, self.shapes, layer.node, self.exact).pools() {
                        break;
                    }
                    layer.pool = true;
                    self.taken[next] = true;
                    layer.last = next;
                    break;
                }
                _ => break,
            }
            self.taken[next] = true;
            layer.last = next;
        }
        Ok(())
    }

    /// `x * sigmoid(x)`, in either order, of which nobody reads a part.
    fn swish(&self, x: usize) -> Option<[usize; 2]> {
        let [gate, product] = self.readers[x][..] else { return None };
        let (nodes, output) = (&self.graph.nodes, self.graph.output);
        let sigmoid = matches!(nodes[gate].op, Op::Activation { function: Activation::Sigmoid, .. });
        let both = nodes[product].op == Op::Mul && [[x, gate], [gate, x]].iter().any(|i| nodes[product].inputs == i);
        (sigmoid && both && self.readers[gate] == [product] && output != x && output != gate).then_some([gate, product])
    }

    /// Factor per channel of a multiplication, and zeros.
    fn scale(&self, index: usize, factor: usize) -> Result<[Vec<f64>; 2]> {
        let channels = self.shapes[index][1];
        let mut factors: Vec<f64> = self.floats(&self.graph.nodes[index], factor)?.iter().map(|&f| f.into()).collect();
        if let [all] = factors[..] {
            factors = vec![all; channels];
        }
        Ok([factors, vec![0.0; channels]])
    }

    /// Ones, and the summand per channel of an addition.
    fn shift(&self, index: usize, summand: usize) -> Result<[Vec<f64>; 2]> {
        let [summands, _] = self.scale(index, summand)?;
        Ok([vec![1.0; summands.len()], summands])
    }

    fn floats(&self, node: &Node, tensor: usize) -> Result<&[f32]> {
        self.tensors[tensor]
            .ok_or_else(|| unsupported(node, "has parameters that are not contiguous float32 on the CPU"))
    }

    /// Factor and summand per channel of a batch norm with fixed statistics.
    fn norm(&self, node: &Node) -> Result<[Vec<f64>; 2]> {
        let Op::BatchNorm2d { weight, bias, running_mean, running_var, eps, training, .. } = &node.op else {
            return Err(unsupported(node, "is no batch norm"));
        };
        let (Some(mean), Some(var), false) = (running_mean, running_var, training) else {
            return Err(unsupported(node, "uses the statistics of the batch; call eval()"));
        };
        let floats = |t: usize| self.floats(node, t);
        let (mean, var) = (floats(*mean)?, floats(*var)?);
        let mut factor: Vec<f64> = var.iter().map(|&v| 1.0 / (f64::from(v) + eps).sqrt()).collect();
        if let Some(weight) = weight {
            factor.iter_mut().zip(floats(*weight)?).for_each(|(f, &w)| *f *= f64::from(w));
        }
        let mut summand: Vec<f64> = factor.iter().zip(mean).map(|(f, &m)| -f * f64::from(m)).collect();
        if let Some(bias) = bias {
            summand.iter_mut().zip(floats(*bias)?).for_each(|(s, &b)| *s += f64::from(b));
        }
        Ok([factor, summand])
    }
}

/// What is left of a ReLU behind the same factor and summand for all channels, when these come before it.
fn rectified(activation: Activate, [factor, summand]: &[Vec<f64>; 2]) -> Option<Activate> {
    let least = match activation {
        Activate::Relu => 0.0,
        Activate::AtLeast(least) => f64::from(least),
        _ => return None,
    };
    let alike = |values: &[f64]| values.iter().all(|value| *value == values[0]);
    if !alike(factor) || !alike(summand) || factor[0] <= 0.0 || !factor[0].is_finite() || !summand[0].is_finite() {
        return None;
    }
    Some(match (least * factor[0] + summand[0]) as f32 {
        0.0 => Activate::Relu,
        least => Activate::AtLeast(least),
    })
}

/// First `before`, then `after`.
fn compose([f1, s1]: [Vec<f64>; 2], [f2, s2]: [Vec<f64>; 2]) -> [Vec<f64>; 2] {
    let summand = s1.iter().zip(&f2).zip(&s2).map(|((s1, f2), s2)| s1 * f2 + s2).collect();
    [f1.iter().zip(&f2).map(|(a, b)| a * b).collect(), summand]
}
