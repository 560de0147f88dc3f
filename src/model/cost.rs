//! What a layer costs and sees: floating-point operations and receptive field.

use super::{Graph, Node, Op, Pair, Shape};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Multiplications and additions of one forward pass over the whole batch, a fused multiply-add counted as two.
    pub flops: u64,
    /// Side lengths of the input region one output value depends on; `None` once everything depends on everything.
    pub receptive_field: Option<Pair>,
}

/// Receptive field of a node and the distance, in input pixels, between neighbouring outputs.
#[derive(Clone, Copy)]
struct Field {
    size: Pair,
    jump: Pair,
}

/// Receptive fields grow by `(kernel - 1) * dilation * jump`, jumps multiply by the stride (Dumoulin & Visin,
/// "A guide to convolution arithmetic for deep learning", arXiv:1603.07285).
pub fn costs(graph: &Graph, shapes: &[Shape]) -> Vec<Cost> {
    let mut fields: Vec<Option<Field>> = Vec::with_capacity(graph.nodes.len());
    let mut out = Vec::with_capacity(graph.nodes.len());
    for (node, shape) in graph.nodes.iter().zip(shapes) {
        let field = field(graph, node, &fields, shapes);
        out.push(Cost { flops: flops(graph, node, shape, shapes), receptive_field: field.map(|f| f.size) });
        fields.push(field);
    }
    out
}

fn field(graph: &Graph, node: &Node, known: &[Option<Field>], shapes: &[Shape]) -> Option<Field> {
    if node.op == Op::Input {
        return Some(Field { size: [1, 1], jump: [1, 1] });
    }
    // Where branches meet, the widest one decides.
    let mut from = known.get(*node.inputs.first()?).copied()??;
    for &input in &node.inputs[1..] {
        let other = known.get(input).copied()??;
        for i in 0..2 {
            from.size[i] = from.size[i].max(other.size[i]);
            from.jump[i] = from.jump[i].max(other.jump[i]);
        }
    }
    let (kernel, stride, dilation) = match &node.op {
        Op::Conv2d { weight, stride, dilation, .. } => {
            ([graph.tensors[*weight][2], graph.tensors[*weight][3]], *stride, *dilation)
        }
        Op::MaxPool2d { kernel, stride, dilation, .. } => (*kernel, *stride, *dilation),
        Op::AvgPool2d { kernel, stride, .. } => (*kernel, *stride, [1, 1]),
        // Over the channels of each pixel or token, which a permutation has made the last dimension.
        Op::Linear { .. } | Op::LayerNorm { .. } if shapes[node.inputs[0]].len() > 2 => return Some(from),
        Op::AdaptiveAvgPool2d { .. }
        | Op::GroupNorm { .. }
        | Op::ResponseNorm { .. }
        | Op::Upsample { .. }
        | Op::Linear { .. }
        | Op::LayerNorm { .. }
        | Op::Mean { .. }
        | Op::Softmax { .. }
        | Op::Attention { .. }
        | Op::WindowAttention(_) => {
            return None;
        }
        Op::PatchMerging => ([2, 2], [2, 2], [1, 1]),
        Op::Input
        | Op::BatchNorm2d { .. }
        | Op::Activation { .. }
        | Op::Dropout { .. }
        | Op::StochasticDepth { .. }
        | Op::Flatten { .. }
        | Op::Reshape { .. }
        | Op::Pad { .. }
        | Op::Permute { .. }
        | Op::Scale { .. }
        | Op::Add { .. }
        | Op::Mul
        | Op::Cat { .. }
        | Op::Split { .. }
        | Op::ChannelShuffle { .. }
        | Op::Expand { .. }
        | Op::Shift { .. } => return Some(from),
    };
    for i in 0..2 {
        from.size[i] += (kernel[i] - 1) * dilation[i] * from.jump[i];
        from.jump[i] *= stride[i];
    }
    Some(from)
}

fn flops(graph: &Graph, node: &Node, shape: &Shape, shapes: &[Shape]) -> u64 {
    let count = |s: &[usize]| s.iter().map(|&d| d as u64).product::<u64>();
    let (out, input) = (count(shape), node.inputs.first().map_or(0, |&i| count(&shapes[i])));
    match &node.op {
        Op::Conv2d { weight, bias, .. } => out * (2 * count(&graph.tensors[*weight][1..]) + u64::from(bias.is_some())),
        Op::Linear { weight, bias } => out * (2 * graph.tensors[*weight][1] as u64 + u64::from(bias.is_some())),
        Op::BatchNorm2d { .. } => 2 * out,
        Op::MaxPool2d { kernel, .. } | Op::AvgPool2d { kernel, .. } => out * count(kernel),
        Op::AdaptiveAvgPool2d { .. } | Op::Mean { .. } => input,
        Op::Softmax { .. } => 3 * out,
        // One addition for the mean, three operations for the variance, two for factor and summand.
        Op::LayerNorm { .. } | Op::GroupNorm { .. } => 6 * out,
        // Two for the squares, two for factor and summand.
        Op::ResponseNorm { .. } => 4 * out,
        Op::Activation { .. } | Op::Add { .. } | Op::Mul | Op::Scale { .. } | Op::Shift { .. } => out,
        // Two products of all queries by all keys, and a softmax for each head.
        Op::Attention { heads, .. } => {
            let [queries, keys] = [0, 1].map(|i| shapes[*node.inputs.get(i).unwrap_or(&node.inputs[0])][1] as u64);
            4 * out * keys + 3 * shape[0] as u64 * *heads as u64 * queries * keys
        }
        // The same in each window, and a summand per score.
        Op::WindowAttention(windows) => {
            let (tokens, [height, width]) = (windows.tokens() as u64, windows.padded([shape[1], shape[2]]));
            let pixels = (shape[0] * height * width) as u64;
            4 * pixels * shape[3] as u64 * tokens + 4 * pixels * windows.heads as u64 * tokens
        }
        Op::Input
        | Op::Dropout { .. }
        | Op::StochasticDepth { .. }
        | Op::Flatten { .. }
        | Op::Reshape { .. }
        | Op::Cat { .. }
        | Op::Split { .. }
        | Op::ChannelShuffle { .. }
        | Op::Pad { .. }
        | Op::Upsample { .. }
        | Op::Permute { .. }
        | Op::PatchMerging
        | Op::Expand { .. } => 0,
    }
}
