//! The graph as the items of a plan: views and switched-off dropout vanish, in-place operations share memory, chains
//! that one kernel can run become one item, and dead branches are left out.

use super::layer::Grain;
use super::layers::conv::Conv;
use super::layers::conv_pool::{self, Chain};
use super::layers::large_linear::LargeLinear;
use crate::engine::cpu::common::analysis::{OVERWRITES_BATCH, OVERWRITES_READ, is_view, readers, unsupported};
use crate::engine::cpu::common::geometry::Window;
use crate::error::{Error, Result};
use crate::model::{Activation, Graph, Node, Op, Shape, shapes};

/// One layer of the plan.
#[derive(Debug, Clone)]
pub struct Item {
    /// The node whose operation it is (of a chain: the convolution).
    pub node: usize,
    /// Values it reads, by root.
    pub inputs: Vec<usize>,
    /// The value it makes, by root.
    pub root: usize,
    /// It overwrites its input.
    pub inplace: bool,
    pub chain: Option<Chain>,
    pub grain: Grain,
}

/// Nodes that share memory have the same root.
pub struct Structure {
    pub shapes: Vec<Shape>,
    pub items: Vec<Item>,
    pub output: usize,
    /// Whether the loss's derivative by this root is wanted.
    pub needs_grad: Vec<bool>,
}

/// # Errors
/// `Shape` where a layer cannot take what reaches it, `Argument` for what this engine does not do.
pub fn structure(graph: &Graph, input: &[usize], trained: &[bool], training: bool) -> Result<Structure> {
    let shapes = shapes(graph, input)?;
    let mut walk = Walk {
        graph,
        shapes: &shapes,
        readers: all_readers(graph),
        root: (0..graph.nodes.len()).collect(),
        value: (0..graph.nodes.len()).collect(),
        items: Vec::new(),
        needs_grad: vec![false; graph.nodes.len()],
        fused: vec![false; graph.nodes.len()],
        trained,
        training,
    };
    for index in 1..graph.nodes.len() {
        if !walk.fused[index] {
            walk.node(index)?;
        }
    }
    let (output, needs_grad) = (walk.root[graph.output], walk.needs_grad);
    let all = walk.items.len();
    let counting = |items: &[Item]| items.iter().filter(|item| counts(&graph.nodes[item.node].op)).count();
    let before = counting(&walk.items);
    let items = alive(walk.items, output);
    if items.len() < all && counting(&items) < before {
        return Err(Error::Unsupported(
            "a batch norm in training does not reach the output: use engine='python', which computes it all the same"
                .to_owned(),
        ));
    }
    if shapes[graph.output].len() != 2 {
        return Err(Error::Unsupported(format!(
            "the cpu engine needs an output of shape (N, classes), got {:?}: use engine='python'",
            shapes[graph.output]
        )));
    }
    Ok(Structure { shapes, items, output, needs_grad })
}

/// Convolutions that go through a general matrix product, which libtorch does at least as well, where they hold more than
/// half of the convolutions' weights (measured: a network is faster here up to about that share); otherwise none.
pub fn slow(graph: &Graph) -> Vec<usize> {
    let readers = all_readers(graph);
    let (mut all, mut general, mut nodes) = (0, 0, Vec::new());
    for (index, node) in graph.nodes.iter().enumerate() {
        let Op::Conv2d { weight, .. } = node.op else { continue };
        let weights: usize = graph.tensors[weight].iter().product();
        all += weights;
        if conv_pool::chain(graph, None, &readers, index).is_none() {
            general += weights;
            nodes.push(index);
        }
    }
    if 2 * general > all { nodes } else { Vec::new() }
}

/// Who reads each node; the caller counts as a reader of the output, after all others.
fn all_readers(graph: &Graph) -> Vec<Vec<usize>> {
    let mut readers = readers(graph);
    readers[graph.output].push(graph.nodes.len());
    readers
}

/// Whether an operation in training changes more than its output.
fn counts(op: &Op) -> bool {
    matches!(op, Op::BatchNorm2d { training: true, .. })
}

fn refusal(node: &Node, reason: &str) -> Error {
    unsupported(node, &format!("{reason}: use engine='python'"))
}

/// Items that contribute to the output.
fn alive(mut items: Vec<Item>, output: usize) -> Vec<Item> {
    let mut wanted = vec![output];
    items.reverse();
    items.retain(|item| {
        let keep = wanted.contains(&item.root);
        if keep {
            wanted.extend_from_slice(&item.inputs);
        }
        keep
    });
    items.reverse();
    items
}

struct Walk<'a> {
    graph: &'a Graph,
    shapes: &'a [Shape],
    readers: Vec<Vec<usize>>,
    root: Vec<usize>,
    /// The node that made, or last overwrote, the value in this node's memory.
    value: Vec<usize>,
    items: Vec<Item>,
    needs_grad: Vec<bool>,
    fused: Vec<bool>,
    trained: &'a [bool],
    training: bool,
}

impl Walk<'_> {
    fn node(&mut self, index: usize) -> Result<()> {
        let node = &self.graph.nodes[index];
        self.check(index)?;
        let first = node.inputs.first().copied().unwrap_or(0);
        match &node.op {
            op if is_view(op) => {
                (self.root[index], self.value[index]) = (self.root[first], self.value[first]);
                return Ok(());
            }
            Op::Input
            | Op::Conv2d { .. }
            | Op::BatchNorm2d { .. }
            | Op::Activation { .. }
            | Op::MaxPool2d { .. }
            | Op::AvgPool2d { .. }
            | Op::AdaptiveAvgPool2d { .. }
            | Op::Dropout { .. }
            | Op::StochasticDepth { .. }
            | Op::Flatten { .. }
            | Op::Reshape { .. }
            | Op::Linear { .. }
            | Op::LayerNorm { .. }
            | Op::Pad { .. }
            | Op::Permute { .. }
            | Op::Scale { .. }
            | Op::Softmax { .. }
            | Op::Mean { .. }
            | Op::Add { .. }
            | Op::Mul
            | Op::Cat { .. }
            | Op::Split { .. }
            | Op::ChannelShuffle { .. }
            | Op::Attention { .. }
            | Op::WindowAttention(_)
            | Op::PatchMerging
            | Op::Expand { .. }
            | Op::Shift { .. }
            | Op::GroupNorm { .. }
            | Op::ResponseNorm { .. }
            | Op::Upsample { .. } => {}
        }
        let chain = self.chain(index);
        let last = chain.as_ref().map_or(index, |chain| chain.last);
        let inputs: Vec<usize> = node.inputs.iter().map(|&i| self.root[i]).collect();
        let wants = node.op.parameters().iter().any(|&p| self.trained[p]);
        let wants = self.training && (wants || inputs.iter().any(|&r| self.needs_grad[r]));
        let inplace = self.inplace(index)?;
        if inplace {
            self.root[index] = inputs[0];
            let old = self.value[first];
            // Whoever reads this memory from now on sees the new value, as in PyTorch.
            self.value.iter_mut().filter(|v| **v == old).for_each(|v| *v = index);
        } else {
            self.root[last] = last;
            self.value[last] = last;
        }
        let root = self.root[last];
        self.needs_grad[root] = wants;
        let grain = self.grain(index, chain.as_ref());
        self.items.push(Item { node: index, inputs, root, inplace, chain, grain });
        Ok(())
    }

    /// Samples must not mix, except where a layer says so.
    fn check(&self, index: usize) -> Result<()> {
        let node = &self.graph.nodes[index];
        let refuse = |reason| Err(refusal(node, reason));
        let batch = self.shapes[0].first();
        if self.shapes[index].first() != batch {
            return refuse("the cpu engine cannot change the batch dimension");
        }
        let rank = |i: usize| self.shapes[node.inputs[i]].len();
        let is_first = |dim: i64, rank: usize| dim == 0 || dim + rank as i64 == 0;
        match &node.op {
            Op::Softmax { dim, .. } | Op::Cat { dim } if is_first(*dim, rank(0)) => refuse("works across samples"),
            Op::Mean { dims, .. } if dims.iter().any(|&d| is_first(d, rank(0))) => refuse("works across samples"),
            Op::Flatten { start, .. } if is_first(*start, rank(0)) && rank(0) > 1 => refuse("works across samples"),
            Op::Add { .. } | Op::Mul if rank(0) != rank(1) || self.mixes(&node.inputs) => {
                refuse("broadcasts across samples")
            }
            Op::LayerNorm { .. }
            | Op::StochasticDepth { .. }
            | Op::Pad { .. }
            | Op::Permute { .. }
            | Op::Scale { .. }
            | Op::Split { .. }
            | Op::ChannelShuffle { .. }
            | Op::Attention { .. }
            | Op::WindowAttention(_)
            | Op::PatchMerging
            | Op::Expand { .. }
            | Op::Shift { .. }
            | Op::GroupNorm { .. }
            | Op::ResponseNorm { .. }
            | Op::Upsample { .. } => refuse("the cpu engine has no training kernel for it"),
            Op::MaxPool2d { .. } if self.shapes[index].iter().product::<usize>() == 0 => refuse("has an empty output"),
            Op::Input
            | Op::Conv2d { .. }
            | Op::BatchNorm2d { .. }
            | Op::Activation { .. }
            | Op::MaxPool2d { .. }
            | Op::AvgPool2d { .. }
            | Op::AdaptiveAvgPool2d { .. }
            | Op::Dropout { .. }
            | Op::Flatten { .. }
            | Op::Reshape { .. }
            | Op::Linear { .. }
            | Op::Softmax { .. }
            | Op::Mean { .. }
            | Op::Add { .. }
            | Op::Mul
            | Op::Cat { .. } => Ok(()),
        }
    }

    fn mixes(&self, inputs: &[usize]) -> bool {
        inputs.iter().any(|&i| self.shapes[i].first() != self.shapes[0].first())
    }

    /// Whether the operation may overwrite its input.
    fn inplace(&self, index: usize) -> Result<bool> {
        let node = &self.graph.nodes[index];
        let asked = match node.op {
            Op::Activation { inplace, .. } | Op::Dropout { inplace, .. } | Op::Add { inplace } => inplace,
            _ => return Ok(false),
        };
        let (root, made_by) = (self.root[node.inputs[0]], self.value[node.inputs[0]]);
        if asked && root == 0 {
            return Err(refusal(node, OVERWRITES_BATCH));
        }
        let others: Vec<usize> = self.readers_of(made_by).filter(|&r| r != index).collect();
        let able = match node.op {
            Op::Activation { function: Activation::Relu, .. } | Op::Dropout { .. } => {
                root != 0 && self.may_be_overwritten(root)
            }
            _ => false,
        };
        if asked && self.training && self.needs_grad[root] && derivative_reads_output(&self.graph.nodes[made_by].op) {
            return Err(refusal(node, "overwrites a value that a derivative needs"));
        }
        if others.is_empty() {
            return Ok(able);
        }
        if !asked {
            return Ok(false);
        }
        if able && others.iter().all(|&other| other > index) {
            return Ok(true);
        }
        Err(refusal(node, OVERWRITES_READ))
    }

    /// The derivative of what made this value can be found without the value.
    fn may_be_overwritten(&self, root: usize) -> bool {
        let made_by = self.items.iter().find(|item| item.root == root).map(|item| &self.graph.nodes[item.node].op);
        match made_by {
            Some(Op::Softmax { .. }) | None => false,
            Some(Op::Activation { function, .. }) => *function == Activation::Relu,
            Some(_) => true,
        }
    }

    /// Operations, other than views, that read the value made by `node`.
    fn readers_of(&self, node: usize) -> impl Iterator<Item = usize> {
        let members: Vec<usize> =
            (0..self.graph.nodes.len()).filter(|&i| self.value[i] == node || self.sees(i, node)).collect();
        let mut found: Vec<usize> = members.iter().flat_map(|&m| self.readers[m].iter().copied()).collect();
        found.retain(|reader| !members.contains(reader));
        found.into_iter()
    }

    /// `node` is `of` or a view of it (views after the present node included).
    fn sees(&self, node: usize, of: usize) -> bool {
        if node == of {
            return true;
        }
        is_view(&self.graph.nodes[node].op)
            && self.graph.nodes[node].inputs.first().is_some_and(|&input| self.sees(input, of))
    }

    /// The longest chain from here that one kernel runs.
    fn chain(&mut self, index: usize) -> Option<Chain> {
        let chain = conv_pool::chain(self.graph, Some(self.shapes), &self.readers, index)?;
        chain.nodes.iter().for_each(|&node| self.fused[node] = true);
        Some(chain)
    }

    fn grain(&self, index: usize, chain: Option<&Chain>) -> Grain {
        let node = &self.graph.nodes[index];
        match &node.op {
            Op::Conv2d { weight, .. } if chain.is_none() => {
                let window = Window::of(self.graph, self.shapes, index);
                let weights = self.graph.tensors[*weight].iter().product();
                window.map_or(Grain::Chunk, |w| Conv::grain(&w, weights))
            }
            Op::Linear { weight, .. } => match self.is_large(*weight, index) {
                true => Grain::Batch,
                false => Grain::Chunk,
            },
            Op::BatchNorm2d { training, running_mean, .. } if *training || running_mean.is_none() => Grain::Batch,
            _ => Grain::Sample,
        }
    }

    /// A large matrix that only this layer uses, applied to rows.
    fn is_large(&self, weight: usize, index: usize) -> bool {
        let uses = self.graph.nodes.iter().filter(|n| n.op.parameters().contains(&weight)).count();
        let count: usize = self.graph.tensors[weight].iter().product();
        count >= LargeLinear::THRESHOLD && uses == 1 && self.shapes[index].len() == 2
    }
}

/// Whether PyTorch keeps the result for the derivative, and so refuses to go back when it has been overwritten.
fn derivative_reads_output(op: &Op) -> bool {
    match op {
        Op::Softmax { .. } => true,
        Op::Activation { function, inplace } => match function {
            Activation::Relu | Activation::Sigmoid | Activation::Tanh => true,
            Activation::Relu6 | Activation::LeakyRelu { .. } => *inplace,
            Activation::Silu | Activation::Gelu { .. } | Activation::Hardswish | Activation::Hardsigmoid => false,
        },
        Op::Input
        | Op::Conv2d { .. }
        | Op::BatchNorm2d { .. }
        | Op::MaxPool2d { .. }
        | Op::AvgPool2d { .. }
        | Op::AdaptiveAvgPool2d { .. }
        | Op::Dropout { .. }
        | Op::StochasticDepth { .. }
        | Op::Flatten { .. }
        | Op::Reshape { .. }
        | Op::Linear { .. }
        | Op::LayerNorm { .. }
        | Op::Pad { .. }
        | Op::Permute { .. }
        | Op::Scale { .. }
        | Op::Mean { .. }
        | Op::Add { .. }
        | Op::Mul
        | Op::Cat { .. }
        | Op::Split { .. }
        | Op::ChannelShuffle { .. }
        | Op::Attention { .. }
        | Op::WindowAttention(_)
        | Op::PatchMerging
        | Op::Expand { .. }
        | Op::Shift { .. }
        | Op::GroupNorm { .. }
        | Op::ResponseNorm { .. }
        | Op::Upsample { .. } => false,
    }
}
