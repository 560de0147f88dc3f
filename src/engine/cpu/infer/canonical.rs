//! Permuted images are images all the same: every value is kept as (N, C, H, W), a permutation only changes which of its
//! dimensions PyTorch's arguments mean.
//!
//! What is left of `permute(0, 2, 3, 1) -> LayerNorm -> Linear -> permute(0, 3, 1, 2)` is a norm over the channels of each
//! pixel and a convolution of one pixel.

use crate::engine::cpu::common::analysis::{OVERWRITES_BATCH, OVERWRITES_READ, axis, unsupported};
use crate::error::Result;
use crate::model::{Graph, Node, Op, Shape};

/// The graph as operations on (N, C, H, W) or (N, F), and the shapes of its values.
pub struct Canonical {
    pub graph: Graph,
    pub shapes: Vec<Shape>,
    /// Whether PyTorch's result has its channels last.
    pub channels_last: bool,
}

/// The order of dimensions of tokens (N, T, C), which are images one pixel high.
const TOKENS: [usize; 3] = [0, 3, 1];
/// That of images (N, H, W, C).
const PIXELS: [usize; 4] = [0, 2, 3, 1];

/// # Errors
/// `Unsupported`, naming the first operation that reads dimensions in an order this engine cannot use, or that overwrites
/// what others read.
pub fn canonical(graph: &Graph, mut shapes: Vec<Shape>) -> Result<Canonical> {
    overwritten(graph)?;
    let mut nodes = graph.nodes.clone();
    // Where each of PyTorch's dimensions lies among (N, C, H, W).
    let mut orders: Vec<Vec<usize>> = Vec::with_capacity(nodes.len());
    for (index, node) in nodes.iter_mut().enumerate() {
        let (before, shape) = shapes.split_at_mut(index);
        let shape = &mut shape[0];
        let order = order(graph, node, shape, before, &orders)?;
        let mut lies = vec![1; if shape.len() == 3 { 4 } else { shape.len() }];
        shape.iter().zip(&order).for_each(|(&size, &place)| lies[place] = size);
        *shape = lies;
        orders.push(order);
    }
    let channels_last = orders[graph.output] == TOKENS || orders[graph.output] == PIXELS;
    if !channels_last && !plain(&orders[graph.output]) {
        return Err(unsupported(&graph.nodes[graph.output], "returns permuted dimensions"));
    }
    let graph = Graph { nodes, output: graph.output, tensors: graph.tensors.clone() };
    Ok(Canonical { graph, shapes, channels_last })
}

/// (N, C, H, W), (N, C, W) or (N, F).
fn own(rank: usize) -> Vec<usize> {
    if rank == 3 { vec![0, 1, 3] } else { (0..rank).collect() }
}

fn plain(order: &[usize]) -> bool {
    order == own(order.len())
}

/// The order of a node's dimensions; its arguments are rewritten for (N, C, H, W). `before`: the shapes of earlier nodes.
fn order(graph: &Graph, node: &mut Node, shape: &Shape, before: &[Shape], orders: &[Vec<usize>]) -> Result<Vec<usize>> {
    let refuse = |node: &Node, reason: &str| Err(unsupported(node, reason));
    let own = own(shape.len());
    let Some(from) = node.inputs.first().map(|&i| orders[i].clone()) else { return Ok(own) };
    let place = |dim: i64| from.get(axis(dim, from.len())).copied().unwrap_or(from.len());
    let channels_last = from.last() == Some(&1);
    match &mut node.op {
        Op::Permute { dims } => {
            let order: Vec<usize> = dims.iter().map(|&d| from[d]).collect();
            if order.first() != Some(&0) {
                return refuse(node, "moves the dimension of the batch");
            }
            return Ok(order);
        }
        Op::Input | Op::Activation { .. } | Op::Dropout { .. } | Op::StochasticDepth { .. } => {}
        Op::Linear { .. } if !channels_last => {
            return refuse(node, "is applied to another dimension than the channels");
        }
        Op::LayerNorm { shape, .. } if shape.len() != 1 || !channels_last => {
            return refuse(node, "normalises other dimensions than the channels");
        }
        Op::Linear { .. } | Op::LayerNorm { .. } => {}
        Op::Scale { factor, .. } => {
            if !per_channel(&graph.tensors[*factor], &from) {
                return refuse(node, "multiplies by more than one factor per channel");
            }
        }
        Op::Attention { .. } if from != TOKENS => {
            return refuse(node, "is applied to something else than tokens (N, T, C)");
        }
        Op::WindowAttention(_) | Op::PatchMerging if from != PIXELS => {
            return refuse(node, "is applied to something else than images (N, H, W, C)");
        }
        Op::WindowAttention(_) | Op::PatchMerging => {}
        Op::Shift { summand } if from != TOKENS => {
            let tensor = &graph.tensors[*summand];
            // Of (N, C, L) they would be taken for those of tokens.
            let is_line = from.len() == 3 && tensor.iter().product::<usize>() > 1;
            if is_line || !per_channel(tensor, &from) {
                return refuse(node, "adds more than one summand per channel of images");
            }
        }
        Op::Shift { summand } if graph.tensors[*summand].iter().rev().nth(2).is_some_and(|&images| images != 1) => {
            return refuse(node, "adds something else to every image");
        }
        Op::Attention { .. } | Op::Shift { .. } => {}
        Op::ResponseNorm { dims, .. } => {
            dims.iter_mut().for_each(|dim| *dim = place(*dim) as i64);
            dims.sort_unstable();
            if *dims != [2, 3] {
                return refuse(node, "takes norms over something else than height and width");
            }
        }
        Op::Expand { .. } => return Ok(TOKENS.to_vec()),
        Op::Softmax { dim, .. } => *dim = place(*dim) as i64,
        Op::Cat { dim } => *dim = place(*dim) as i64,
        Op::Split { dim, .. } => *dim = place(*dim) as i64,
        Op::Mean { dims, keepdim } => {
            let keepdim = *keepdim;
            dims.iter_mut().for_each(|dim| *dim = place(*dim) as i64);
            // Without them, what is left of an image are its channels.
            return Ok(if keepdim { from } else { own });
        }
        _ if plain(&from) => {}
        Op::Add { .. } | Op::Mul => {}
        // The pixels of images with their channels last, one after the other.
        Op::Flatten { .. } | Op::Reshape { .. }
            if from == [0, 2, 3, 1] && lines(&before[node.inputs[0]]).is_some_and(|lines| lines == shape[..]) =>
        {
            return Ok(TOKENS.to_vec());
        }
        // A single pixel has no other order than its channels'.
        Op::Flatten { .. } | Op::Reshape { .. } if shape.len() == 2 && single(&before[node.inputs[0]]) => {
            return Ok(own);
        }
        _ => return refuse(node, "reads permuted dimensions"),
    }
    if node.inputs.iter().any(|&i| orders[i].len() == from.len() && orders[i] != from) {
        return refuse(node, "combines values whose dimensions are in different orders");
    }
    Ok(if from.len() == shape.len() { from } else { own })
}

/// Whether a tensor that broadcasts to a value has one number, or one per channel.
fn per_channel(tensor: &Shape, order: &[usize]) -> bool {
    let first = order.len().saturating_sub(tensor.len());
    tensor.iter().zip(&order[first..]).all(|(&size, &place)| size == 1 || place == 1)
}

/// (N, T, C) of an image (N, C, H, W).
fn lines(shape: &Shape) -> Option<[usize; 3]> {
    let &[images, channels, height, width] = &shape[..] else { return None };
    Some([images, height * width, channels])
}

/// Whether an image (N, C, H, W) has one pixel.
fn single(shape: &Shape) -> bool {
    shape.len() == 4 && shape[2] * shape[3] == 1
}

/// PyTorch's in-place operations change what later readers of the old value see; here every node has its own value.
fn overwritten(graph: &Graph) -> Result<()> {
    let mut memory: Vec<usize> = (0..graph.nodes.len()).collect();
    for (index, node) in graph.nodes.iter().enumerate() {
        let (same, written) = match node.op {
            Op::Activation { inplace, .. } | Op::Add { inplace } => (inplace, inplace),
            // Dropout that drops something is refused elsewhere.
            Op::Flatten { .. } | Op::Reshape { .. } | Op::Permute { .. } | Op::Dropout { .. } | Op::Split { .. } => {
                (true, false)
            }
            _ => (false, false),
        };
        if same {
            memory[index] = memory[node.inputs[0]];
        }
        if !written {
            continue;
        }
        if memory[index] == 0 {
            return Err(unsupported(node, OVERWRITES_BATCH));
        }
        let old = |&input: &usize| input < index && memory[input] == memory[index];
        if graph.nodes[index + 1..].iter().any(|later| later.inputs.iter().any(old)) || old(&graph.output) {
            return Err(unsupported(node, OVERWRITES_READ));
        }
    }
    Ok(())
}
