//! Output shapes: `(W - F + 2P) / S + 1` per side, rounded down unless `ceil_mode`.

use super::{Bias, Dim, Graph, Node, Op, Pair, Scores, Windows};
use crate::error::{Error, Result};

/// Sizes in PyTorch's order, batch first: `[N, C, H, W]` or `[N, F]`.
pub type Shape = Vec<usize>;

/// The shape of every node's value for one input shape.
///
/// # Errors
/// `Shape`, naming the layer, what it expects and what reaches it.
pub fn shapes(graph: &Graph, input: &[usize]) -> Result<Vec<Shape>> {
    let mut known: Vec<Shape> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let shape = output(graph, node, &known, input)?;
        known.push(shape);
    }
    Ok(known)
}

fn output(graph: &Graph, node: &Node, known: &[Shape], input: &[usize]) -> Result<Shape> {
    let from = |i: usize| -> Result<&Shape> {
        node.inputs.get(i).and_then(|&n| known.get(n)).ok_or_else(|| fail(node, "has no input".to_owned()))
    };
    match &node.op {
        Op::Input => Ok(input.to_vec()),
        Op::Conv2d { weight, bias, stride, padding, dilation, groups } => {
            let ([n, c, h, w], weight) = (image(node, from(0)?)?, &graph.tensors[*weight]);
            if c != weight[1] * groups {
                return Err(fail(node, format!("expects {} input channels, got {c}", weight[1] * groups)));
            }
            if weight[0] == 0 || weight[0].checked_rem(*groups) != Some(0) {
                return Err(fail(node, format!("cannot divide {} output channels into {groups} groups", weight[0])));
            }
            vectors(graph, node, &[*bias], weight[0])?;
            let kernel = [weight[2], weight[3]];
            let out = window(node, [h, w], kernel, *stride, *padding, *dilation, false)?;
            Ok(vec![n, weight[0], out[0], out[1]])
        }
        Op::BatchNorm2d { weight, bias, running_mean, running_var, training, .. } => {
            let shape = from(0)?;
            let [n, c, h, w] = image(node, shape)?;
            vectors(graph, node, &[*weight, *bias, *running_mean, *running_var], c)?;
            // Without running statistics the batch's own are used in either mode.
            match (*training || running_mean.is_none()) && n * h * w == 1 {
                true => Err(fail(node, format!("expected more than 1 value per channel when training, got {shape:?}"))),
                false => Ok(shape.clone()),
            }
        }
        Op::MaxPool2d { kernel, stride, padding, dilation, ceil_mode } => {
            let [n, c, h, w] = filled(node, from(0)?)?;
            padded(node, *kernel, *padding, *dilation)?;
            let out = window(node, [h, w], *kernel, *stride, *padding, *dilation, *ceil_mode)?;
            Ok(vec![n, c, out[0], out[1]])
        }
        Op::AvgPool2d { kernel, stride, padding, ceil_mode, divisor, .. } => {
            let [n, c, h, w] = filled(node, from(0)?)?;
            padded(node, *kernel, *padding, [1, 1])?;
            if *divisor == Some(0) {
                return Err(fail(node, "divisor must be not zero".to_owned()));
            }
            let out = window(node, [h, w], *kernel, *stride, *padding, [1, 1], *ceil_mode)?;
            Ok(vec![n, c, out[0], out[1]])
        }
        Op::AdaptiveAvgPool2d { output } => {
            let [n, c, h, w] = filled(node, from(0)?)?;
            match [output[0].unwrap_or(h), output[1].unwrap_or(w)] {
                [0, _] | [_, 0] => Err(fail(node, format!("an output of size {output:?} is empty"))),
                [h, w] => Ok(vec![n, c, h, w]),
            }
        }
        // Its draw has four dimensions, so any other value would become one of four.
        Op::StochasticDepth { keep: Some(_), .. } => image(node, from(0)?).map(|size| size.to_vec()),
        Op::Activation { .. } | Op::Dropout { .. } | Op::StochasticDepth { .. } => Ok(from(0)?.clone()),
        Op::Softmax { dim, .. } => {
            let shape = from(0)?;
            axis(node, *dim, shape.len()).map(|_| shape.clone())
        }
        Op::Flatten { start, end } => {
            let shape = from(0)?;
            let (start, end) = (axis(node, *start, shape.len())?, axis(node, *end, shape.len())?);
            if start > end {
                return Err(fail(node, format!("start_dim {start} cannot come after end_dim {end}")));
            }
            let mut out = shape[..start].to_vec();
            out.push(shape.get(start..=end).unwrap_or_default().iter().product());
            out.extend_from_slice(shape.get(end + 1..).unwrap_or_default());
            Ok(out)
        }
        Op::Reshape { dims } => reshape(node, dims, from(0)?, known),
        Op::Linear { weight, bias } => {
            let (shape, weight) = (from(0)?, &graph.tensors[*weight]);
            vectors(graph, node, &[*bias], weight[0])?;
            match shape.split_last() {
                Some((&features, rest)) if features == weight[1] => Ok([rest, &weight[..1]].concat()),
                _ => Err(fail(node, format!("expects {} input features, got shape {shape:?}", weight[1]))),
            }
        }
        Op::LayerNorm { shape, weight, bias, .. } => {
            let from = from(0)?;
            if !from.ends_with(shape) || shape.is_empty() {
                return Err(fail(node, format!("normalises last dimensions of sizes {shape:?}, got {from:?}")));
            }
            match weight.iter().chain(bias).find(|&&t| graph.tensors[t] != *shape) {
                Some(&t) => Err(fail(node, format!("has weights of shape {:?} for {shape:?}", graph.tensors[t]))),
                None => Ok(from.clone()),
            }
        }
        Op::GroupNorm { groups, weight, bias, .. } => {
            let shape = from(0)?;
            let [_, c, h, w] = image(node, shape)?;
            vectors(graph, node, &[*weight, *bias], c)?;
            match c.checked_rem(*groups) {
                Some(0) if h * w > 0 => Ok(shape.clone()),
                _ => Err(fail(node, format!("cannot divide {shape:?} into {groups} groups of channels"))),
            }
        }
        Op::ResponseNorm { dims, weight, bias, .. } => {
            let shape = from(0)?;
            let axes = dims.iter().map(|&dim| axis(node, dim, shape.len())).collect::<Result<Vec<_>>>()?;
            match shape.iter().enumerate().skip(1).filter(|(dim, _)| !axes.contains(dim)).collect::<Vec<_>>()[..] {
                [(_, &c)] if shape.len() == 4 && !axes.contains(&0) => {
                    vectors(graph, node, &[Some(*weight), Some(*bias)], c)?
                }
                _ => return Err(fail(node, format!("takes norms of {shape:?} over {dims:?}, not over pixels"))),
            }
            Ok(shape.clone())
        }
        Op::Upsample { scale } => {
            let [n, c, h, w] = filled(node, from(0)?)?;
            match scale.contains(&0) {
                true => Err(fail(node, format!("scales by {scale:?}"))),
                false => Ok(vec![n, c, h * scale[0], w * scale[1]]),
            }
        }
        Op::Pad { before, after } => {
            let [n, c, h, w] = image(node, from(0)?)?;
            Ok(vec![n, c, before[0] + h + after[0], before[1] + w + after[1]])
        }
        Op::Permute { dims } => {
            let shape = from(0)?;
            let mut sorted = dims.clone();
            sorted.sort_unstable();
            match sorted.iter().copied().eq(0..shape.len()) {
                true => Ok(dims.iter().map(|&d| shape[d]).collect()),
                false => Err(fail(node, format!("{dims:?} is no order of the dimensions of {shape:?}"))),
            }
        }
        Op::Scale { factor, .. } => {
            let (shape, factor) = (from(0)?, &graph.tensors[*factor]);
            match broadcast(node, shape, factor)? {
                out if out == *shape => Ok(out),
                _ => Err(fail(node, format!("a factor of shape {factor:?} would repeat values of shape {shape:?}"))),
            }
        }
        Op::Mean { dims, keepdim } => {
            let shape = from(0)?;
            let axes = dims.iter().map(|&d| axis(node, d, shape.len())).collect::<Result<Vec<_>>>()?;
            if let Some(twice) = axes.iter().enumerate().find_map(|(i, d)| axes[..i].contains(d).then_some(d)) {
                return Err(fail(node, format!("dim {twice} appears multiple times in the list of dims")));
            }
            let kept = shape.iter().enumerate().filter_map(|(i, &size)| match axes.contains(&i) {
                true => keepdim.then_some(1),
                false => Some(size),
            });
            Ok(kept.collect())
        }
        Op::Add { inplace } => match broadcast(node, from(0)?, from(1)?)? {
            out if *inplace && out != *from(0)? => {
                Err(fail(node, format!("a value of shape {:?} cannot hold one of shape {out:?}", from(0)?)))
            }
            out => Ok(out),
        },
        Op::Mul => broadcast(node, from(0)?, from(1)?),
        Op::Cat { dim } => {
            let mut out = from(0)?.clone();
            let dim = axis(node, *dim, out.len())?;
            for i in 1..node.inputs.len() {
                let other = from(i)?;
                let fits = other.len() == out.len() && (0..out.len()).all(|d| d == dim || other[d] == out[d]);
                if !fits {
                    return Err(fail(node, format!("cannot concatenate {other:?} to {out:?} along dimension {dim}")));
                }
                out[dim] += other[dim];
            }
            Ok(out)
        }
        Op::Split { dim, sizes, part } => {
            let mut out = from(0)?.clone();
            let dim = axis(node, *dim, out.len())?;
            let total = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size));
            match sizes.get(*part) {
                Some(&size) if total == Some(out[dim]) => {
                    out[dim] = size;
                    Ok(out)
                }
                _ => Err(fail(node, format!("cannot divide {out:?} into {sizes:?} along dimension {dim}"))),
            }
        }
        Op::Attention { heads, rotation, .. } => {
            let shape = from(0)?;
            let parts = if node.inputs.len() == 1 { 3 } else { 1 };
            let [n, tokens, channels] = shape[..] else {
                return Err(fail(node, format!("expects tokens (N, T, C), got shape {shape:?}")));
            };
            if !matches!(node.inputs.len(), 1..=3) || channels.checked_rem(parts * heads) != Some(0) {
                return Err(fail(node, format!("cannot divide {shape:?} into {heads} heads")));
            }
            let channels = channels / parts;
            // As many keys as there are; keys and values side by side, or each for itself.
            let wide = if node.inputs.len() == 2 { 2 * channels } else { channels };
            let keys = from(1).ok().and_then(|keys| keys.get(1)).copied().unwrap_or(tokens);
            for i in 1..node.inputs.len() {
                if *from(i)? != [n, keys, wide] {
                    let got = from(i)?;
                    return Err(fail(node, format!("expects keys and values of {channels} channels, got {got:?}")));
                }
            }
            if let Some(rotation) = rotation
                && (keys != tokens
                    || rotation.first > tokens
                    || graph.tensors[rotation.table][..] != [2, tokens - rotation.first, channels / heads])
            {
                let table = &graph.tensors[rotation.table];
                return Err(fail(node, format!("cannot turn {tokens} queries and {keys} keys by {table:?}")));
            }
            Ok(vec![n, tokens, channels])
        }
        Op::WindowAttention(windows) => window_attention(graph, node, windows, from(0)?),
        Op::PatchMerging => {
            let [n, h, w, c] = filled(node, from(0)?)?;
            Ok(vec![n, h.div_ceil(2), w.div_ceil(2), 4 * c])
        }
        Op::Expand { tensor } => match (from(0)?.first(), &graph.tensors[*tensor][..]) {
            (Some(&n), &[1, tokens, channels]) => Ok(vec![n, tokens, channels]),
            (_, shape) => Err(fail(node, format!("expects one sequence of tokens (1, T, C), got shape {shape:?}"))),
        },
        Op::Shift { summand } => {
            let (shape, summand) = (from(0)?, &graph.tensors[*summand]);
            match broadcast(node, shape, summand)? {
                out if out == *shape => Ok(out),
                _ => Err(fail(node, format!("a summand of shape {summand:?} would repeat values of shape {shape:?}"))),
            }
        }
        Op::ChannelShuffle { groups } => {
            let shape = from(0)?;
            let [_, c, ..] = image(node, shape)?;
            match c.checked_rem(*groups) {
                Some(0) => Ok(shape.clone()),
                _ => Err(fail(node, format!("cannot divide {c} channels into {groups} groups"))),
            }
        }
    }
}

fn window_attention(graph: &Graph, node: &Node, windows: &Windows, shape: &Shape) -> Result<Shape> {
    let ([n, h, w, c], Windows { heads, window, shift, .. }) = (filled(node, shape)?, windows);
    if c.checked_rem(3 * heads) != Some(0) {
        return Err(fail(node, format!("cannot divide {shape:?} into queries, keys and values of {heads} heads")));
    }
    if window.contains(&0) || (0..2).any(|i| shift[i] >= window[i]) {
        return Err(fail(node, format!("shifts windows of {window:?} by {shift:?}")));
    }
    if windows.grid && (*shift != [0, 0] || windows.padded([h, w]) != [h, w]) {
        return Err(fail(node, format!("divides an image of {:?} (H, W) into a grid of {window:?}", [h, w])));
    }
    let tall = [2 * window[0] - 1, 2 * window[1] - 1];
    let mut tensors = vec![];
    match windows.bias {
        Bias::Table(table) => tensors.push((table, vec![windows.distances(), *heads])),
        Bias::Computed { distances, hidden, hidden_bias, output } => {
            let wide = graph.tensors[hidden].first().copied().unwrap_or(0);
            tensors.push((distances, vec![1, tall[0], tall[1], 2]));
            tensors.extend([(hidden, vec![wide, 2]), (hidden_bias, vec![wide]), (output, vec![*heads, wide])]);
        }
    }
    if let Scores::Cosine { logit } = windows.scores {
        tensors.push((logit, vec![*heads, 1, 1]));
    }
    tensors.extend(windows.fill.map(|fill| (fill, vec![c])));
    match tensors.iter().find(|(tensor, wanted)| graph.tensors[*tensor] != *wanted) {
        Some((tensor, wanted)) => {
            Err(fail(node, format!("has numbers of shape {:?}, not {wanted:?}", graph.tensors[*tensor])))
        }
        None => Ok(vec![n, h, w, c / 3]),
    }
}

fn fail(node: &Node, reason: String) -> Error {
    Error::Shape { layer: format!("{} ({})", node.name, node.op.kind()), reason }
}

fn image(node: &Node, shape: &[usize]) -> Result<[usize; 4]> {
    shape.try_into().map_err(|_| fail(node, format!("expects an input of shape (N, C, H, W), got {shape:?}")))
}

/// As [`image`], of at least one pixel and channel.
fn filled(node: &Node, shape: &[usize]) -> Result<[usize; 4]> {
    match image(node, shape)? {
        [_, c, h, w] if c * h * w == 0 => Err(fail(node, format!("expects images, got shape {shape:?}"))),
        size => Ok(size),
    }
}

/// Parameters and statistics hold one number per channel or feature.
fn vectors(graph: &Graph, node: &Node, which: &[Option<usize>], features: usize) -> Result<()> {
    let wrong = which.iter().flatten().map(|&t| &graph.tensors[t]).find(|shape| ***shape != [features]);
    wrong.map_or(Ok(()), |shape| Err(fail(node, format!("has numbers of shape {shape:?} for {features} channels"))))
}

/// A pool must not look at padding alone.
fn padded(node: &Node, kernel: Pair, padding: Pair, dilation: Pair) -> Result<()> {
    match (0..2).all(|i| 2 * padding[i] <= dilation[i] * kernel[i].saturating_sub(1) + 1) {
        true => Ok(()),
        false => Err(fail(node, format!("pad {padding:?} is more than half of the kernel {kernel:?}"))),
    }
}

fn axis(node: &Node, dim: i64, rank: usize) -> Result<usize> {
    let positive = if dim < 0 { dim + rank as i64 } else { dim };
    usize::try_from(positive)
        .ok()
        .filter(|&d| d < rank)
        .ok_or_else(|| fail(node, format!("dimension {dim} is out of range for {rank} dimensions")))
}

fn window(
    node: &Node,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil: bool,
) -> Result<Pair> {
    let mut out = [0; 2];
    for i in 0..2 {
        if kernel[i] == 0 {
            return Err(fail(node, "has an empty kernel".to_owned()));
        }
        let reach = dilation[i] * (kernel[i] - 1) + 1;
        // Rounding up, PyTorch lets a window reach past the end, but it must start inside the input or its left padding.
        let spare = if ceil { stride[i] - 1 } else { 0 };
        let Some(room) = (size[i] + 2 * padding[i] + spare).checked_sub(reach) else {
            return Err(fail(node, format!("a kernel of {reach} does not fit an input of {size:?} (H, W)")));
        };
        out[i] = room / stride[i] + 1;
        if ceil && (out[i] - 1) * stride[i] >= size[i] + padding[i] {
            out[i] -= 1;
        }
    }
    if out.contains(&0) {
        return Err(fail(node, format!("makes an empty output of an input of {size:?} (H, W)")));
    }
    Ok(out)
}

fn reshape(node: &Node, dims: &[Dim], from: &Shape, known: &[Shape]) -> Result<Shape> {
    let total: usize = from.iter().product();
    let size = |dim: &Dim| match dim {
        Dim::Fixed(size) => Some(*size),
        Dim::SizeOf { node, dim } => known.get(*node).and_then(|s| s.get(*dim)).copied(),
        Dim::Infer => None,
    };
    if dims.iter().filter(|d| matches!(d, Dim::Infer)).count() > 1 {
        return Err(fail(node, "only one dimension can be inferred".to_owned()));
    }
    let fixed: usize = dims.iter().filter_map(size).product();
    let out: Shape = dims.iter().map(|d| size(d).unwrap_or(total / fixed.max(1))).collect();
    if out.iter().product::<usize>() == total {
        Ok(out)
    } else {
        Err(fail(node, format!("shape {dims:?} is invalid for input of shape {from:?}")))
    }
}

fn broadcast(node: &Node, a: &Shape, b: &Shape) -> Result<Shape> {
    let rank = a.len().max(b.len());
    let side = |s: &Shape, i: usize| (i + s.len()).checked_sub(rank).map_or(1, |i| s[i]);
    (0..rank)
        .map(|i| match (side(a, i), side(b, i)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => Err(fail(node, format!("shapes {a:?} and {b:?} do not broadcast"))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conv(kernel: usize, stride: usize, padding: usize) -> Graph {
        let op = Op::Conv2d {
            weight: 0,
            bias: None,
            stride: [stride; 2],
            padding: [padding; 2],
            dilation: [1; 2],
            groups: 1,
        };
        let nodes = vec![
            Node { name: "x".into(), op: Op::Input, inputs: vec![] },
            Node { name: "conv".into(), op, inputs: vec![0] },
        ];
        Graph { nodes, output: 1, tensors: vec![vec![8, 3, kernel, kernel]] }
    }

    #[test]
    fn the_tutorials_examples() {
        // 4x4 through a 3x3 filter gives 2x2; with padding 1 it stays 4x4.
        assert_eq!(shapes(&conv(3, 1, 0), &[1, 3, 4, 4]).unwrap()[1], [1, 8, 2, 2]);
        assert_eq!(shapes(&conv(3, 1, 1), &[1, 3, 4, 4]).unwrap()[1], [1, 8, 4, 4]);
    }

    #[test]
    fn wrong_channels_name_the_layer() {
        let error = shapes(&conv(3, 1, 0), &[1, 1, 4, 4]).unwrap_err().to_string();
        assert_eq!(error, "conv (Conv2d): expects 3 input channels, got 1");
    }
}
