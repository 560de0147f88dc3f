//! From operations on tokens to steps.

use super::build::{Network, Weights};
use super::fuse::Fused;
use super::memory::{Geometry, Value};
use super::steps::{Attention, Origin, Part, Turn};
use crate::engine::cpu::common::analysis::unsupported;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::error::Result;
use crate::model::{Graph, Node, Op, Rotation, Shape, Tensor};

/// Whether a node puts tokens together, takes some of them out, or makes them of the pixels of an image.
pub fn moves(graph: &Graph, shapes: &[Shape], node: usize) -> bool {
    let (shape, from) = (&shapes[node], graph.nodes[node].inputs.first().map(|&input| &shapes[input]));
    let is_line = matches!(shape[..], [_, _, 1, _]);
    is_line
        && match graph.nodes[node].op {
            Op::Cat { dim } | Op::Split { dim, .. } => dim == 3,
            Op::Flatten { .. } | Op::Reshape { .. } => from.is_some_and(|from| from.len() == 4 && from[1] == shape[1]),
            // Others have one summand per channel of images.
            Op::Shift { summand } => graph.tensors[summand].iter().rev().nth(2).is_none_or(|&size| size == 1),
            _ => false,
        }
}

/// What a layer puts together; `sources` are the values that it reads, in order.
pub fn parts<'a>(
    network: &Network<'a>,
    layer: &Fused,
    sources: &[Value],
    weights: &mut Weights<'a>,
) -> Result<Option<Vec<Part>>> {
    let (graph, shapes) = (network.graph, network.shapes);
    if !moves(graph, shapes, layer.node) {
        return Ok(None);
    }
    let node = &graph.nodes[layer.node];
    let whole = |value: Value, at: usize| {
        let count = value.geometry.height * value.geometry.width;
        Part { origin: Origin::Value(value, 0), count, at }
    };
    Ok(Some(match &node.op {
        Op::Split { sizes, part, .. } => {
            let first = sizes[..*part].iter().sum();
            vec![Part { origin: Origin::Value(sources[0], first), count: sizes[*part], at: 0 }]
        }
        Op::Cat { .. } => {
            let (mut parts, mut at, mut values) = (Vec::new(), 0, sources.iter());
            for &input in &node.inputs {
                let part = match (&graph.nodes[input].op, &shapes[input][..]) {
                    (Op::Expand { tensor }, &[_, channels, _, width]) => {
                        let origin =
                            Origin::Table(table(network, *tensor, &Geometry::blocked(channels, 1, width), weights)?);
                        Part { origin, count: width, at }
                    }
                    _ => whole(*values.next().ok_or_else(|| unsupported(node, "has lost a part"))?, at),
                };
                at += part.count;
                parts.push(part);
            }
            parts
        }
        _ => vec![whole(sources[0], 0)],
    }))
}

/// A parameter of shape (1, T, C), or one that broadcasts to that, as `[blocks][T][16]`.
pub fn table<'a>(network: &Network<'a>, tensor: Tensor, g: &Geometry, weights: &mut Weights<'a>) -> Result<usize> {
    let floats = network.tensors[tensor].unwrap_or_default();
    let shape = &network.graph.tensors[tensor];
    // The distances between tokens and between channels.
    let wide = |from_last: usize| shape.len().checked_sub(from_last).is_some_and(|at| shape[at] != 1);
    let channel = usize::from(wide(1));
    let token = if wide(2) { shape[shape.len() - 1] } else { 0 };
    let (channels, tokens) = (g.channels, g.width);
    Ok(weights.reserve(g.blocks() * tokens * LANES, move |to| {
        for (at, to) in to.iter_mut().enumerate() {
            let (c, t) = (at / (tokens * LANES) * LANES + at % LANES, at / LANES % tokens);
            *to = if c < channels { floats[c * channel + t * token] } else { 0.0 };
        }
    }))
}

/// Whether a node may read what is the same for every sample: a concatenation, or an attention as its queries.
pub fn reads_constants(node: &Node, constant: usize) -> bool {
    match node.op {
        Op::Cat { dim } => dim == 3,
        Op::Attention { rotation: None, .. } => {
            node.inputs.iter().position(|&i| i == constant) == Some(0)
                && node.inputs[1..].iter().all(|&i| i != constant)
                && node.inputs.len() > 1
        }
        _ => false,
    }
}

/// # Errors
/// `Unsupported` for heads that do not end with a block of channels.
pub fn check_attention(node: &Node, channels: usize, heads: usize, scale: f64) -> Result<()> {
    if !(channels / heads).is_multiple_of(LANES) {
        return Err(unsupported(node, &format!("has heads of {} channels, no multiple of {LANES}", channels / heads)));
    }
    if scale <= 0.0 {
        return Err(unsupported(node, &format!("multiplies scores by {scale}")));
    }
    Ok(())
}

/// `sources` are the values that it reads, in order: those that are the same for every sample are none.
pub fn attention<'a>(
    network: &Network<'a>,
    layer: &Fused,
    sources: &[Value],
    output: Value,
    weights: &mut Weights<'a>,
) -> Result<Attention> {
    let node = &network.graph.nodes[layer.node];
    let Op::Attention { heads, scale, rotation } = node.op else { return Err(unsupported(node, "is no attention")) };
    // Of bytes there are fewer.
    let queries = Geometry::blocked(network.shapes[layer.node][1], 1, output.geometry.width);
    let blocks = queries.blocks();
    let constant = match network.graph.nodes[node.inputs[0]].op {
        Op::Expand { tensor } => Some(table(network, tensor, &queries, weights)?),
        _ => None,
    };
    let whole = |at: usize, block: usize| (sources[at], block);
    let inputs = match (constant, sources) {
        // In place of the queries anything.
        (Some(_), [_]) => [whole(0, 0), whole(0, 0), whole(0, blocks)],
        (Some(_), [..]) => [whole(0, 0), whole(0, 0), whole(1, 0)],
        (None, [_]) => [0, 1, 2].map(|part| whole(0, part * blocks)),
        (None, [_, _]) => [whole(0, 0), whole(1, 0), whole(1, blocks)],
        (None, _) => [0, 1, 2].map(|part| whole(part, 0)),
    };
    let turn = match rotation {
        Some(Rotation { table, first, half }) => {
            let floats = network.floats(layer, table)?;
            let table = weights.reserve(floats.len(), move |to| to.copy_from_slice(floats));
            Some(Turn { table, len: floats.len(), first, half })
        }
        None => None,
    };
    let made = network.made(layer)?;
    let isa = made.map_or(network.isa, |made| made.dots.isa(network.isa));
    let step = Attention::new(isa, inputs, output, blocks, heads, scale as f32);
    Ok(step.with(isa, constant, turn).making(made))
}
