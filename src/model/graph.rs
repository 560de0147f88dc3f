//! A network as a list of operations in the order `forward` calls them.

use super::{Bias, Scores, Shape, Windows};

/// (height, width)
pub type Pair = [usize; 2];

/// Index of a parameter or buffer in the list that travels beside the graph.
pub type Tensor = usize;

#[derive(Debug, Clone)]
pub struct Graph {
    /// Node 0 is the input; a node's inputs come before it.
    pub nodes: Vec<Node>,
    /// The node whose value `forward` returns.
    pub output: usize,
    /// Shapes of the parameters and buffers that the operations name.
    pub tensors: Vec<Shape>,
}

#[derive(Debug, Clone)]
pub struct Node {
    /// Qualified module name (`features.0`) or the function's name.
    pub name: String,
    pub op: Op,
    pub inputs: Vec<usize>,
}

/// Names and arguments are PyTorch's. `inplace` matters to an engine that shares memory between nodes as PyTorch does.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    Input,
    Conv2d {
        weight: Tensor,
        bias: Option<Tensor>,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: usize,
    },
    BatchNorm2d {
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        running_mean: Option<Tensor>,
        running_var: Option<Tensor>,
        num_batches_tracked: Option<Tensor>,
        /// `None`: cumulative average, as in PyTorch.
        momentum: Option<f64>,
        eps: f64,
        training: bool,
    },
    Activation {
        function: Activation,
        inplace: bool,
    },
    MaxPool2d {
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    },
    AvgPool2d {
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: Option<usize>,
    },
    /// `None` keeps that side's input size.
    AdaptiveAvgPool2d {
        output: [Option<usize>; 2],
    },
    /// `channels`: zero whole channels (`Dropout2d`), which on a 2-D input means single elements.
    Dropout {
        p: f64,
        training: bool,
        channels: bool,
        inplace: bool,
    },
    /// In training: drops samples, or (not `rows`) the whole batch; torchvision's. With `keep`, 1 - p, as
    /// `x / keep * floor(keep + rand)` with one uniform number per sample.
    StochasticDepth {
        p: f64,
        rows: bool,
        keep: Option<f64>,
    },
    Flatten {
        start: i64,
        end: i64,
    },
    /// `view` and `reshape`.
    Reshape {
        dims: Vec<Dim>,
    },
    /// Over the last dimension.
    Linear {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    /// Over the last dimensions, which have the sizes `shape`.
    LayerNorm {
        shape: Shape,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        eps: f64,
    },
    /// Zeros above and to the left of images, below and to the right.
    Pad {
        before: Pair,
        after: Pair,
    },
    /// `GroupNorm`: over the pixels and channels of each group of an image.
    GroupNorm {
        groups: usize,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        eps: f64,
    },
    /// `x * (1 + weight * n / (mean of n + eps)) + bias`, where n is each channel's norm over the dimensions `dims`, those of
    /// pixels: ConvNeXt V2's global response normalisation.
    ResponseNorm {
        dims: Vec<i64>,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    },
    /// Every pixel so many times, below and beside itself: interpolation "nearest" by whole numbers.
    Upsample {
        scale: Pair,
    },
    Permute {
        dims: Vec<usize>,
    },
    /// Times a parameter or buffer that broadcasts to the value's shape; `first`: it is the left operand.
    Scale {
        factor: Tensor,
        first: bool,
    },
    Softmax {
        dim: i64,
        log: bool,
    },
    Mean {
        dims: Vec<i64>,
        keepdim: bool,
    },
    Add {
        inplace: bool,
    },
    Mul,
    Cat {
        dim: i64,
    },
    /// One of the parts, of these sizes along a dimension, that `chunk` and `split` return.
    Split {
        dim: i64,
        sizes: Vec<usize>,
        part: usize,
    },
    /// Channel `i` of group `g` goes to place `i * groups + g`.
    ChannelShuffle {
        groups: usize,
    },
    /// `scaled_dot_product_attention` of each head, side by side again: of queries (N, Q, C), keys and values (N, T, C), of
    /// queries and one input (N, T, 2 C) that holds keys and values, or of one (N, T, 3 C) that holds all three.
    Attention {
        heads: usize,
        scale: f64,
        rotation: Option<Rotation>,
    },
    /// Of tokens that are pixels, each with those of its window.
    WindowAttention(Windows),
    /// Of images (N, H, W, C) each 2 x 2 pixels as one of 4 C channels: top left, bottom left, top right, bottom right.
    /// Zeros beyond an odd side.
    PatchMerging,
    /// A parameter or buffer (1, T, C), once per sample of the input.
    Expand {
        tensor: Tensor,
    },
    /// Plus a parameter or buffer that broadcasts to the value's shape.
    Shift {
        summand: Tensor,
    },
}

/// Of queries and keys (not values), before their product: `x * table[0] + partner(x) * table[1]` for each token and
/// channel of a head (rotary position embedding; a sign is the table's).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// (2, T - `first`, channels of a head)
    pub table: Tensor,
    /// So many tokens are left as they are.
    pub first: usize,
    /// Channel `i` has partner `i` plus or minus half of a head's channels, else its neighbour: 0 and 1, 2 and 3, ...
    pub half: bool,
}

impl Rotation {
    /// The channel, among `depth` of a head, that goes with `channel`.
    pub fn partner(&self, channel: usize, depth: usize) -> usize {
        if self.half { (channel + depth / 2) % depth } else { channel ^ 1 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    Relu,
    Relu6,
    LeakyRelu { negative_slope: f64 },
    Silu,
    Gelu { tanh: bool },
    Hardswish,
    Hardsigmoid,
    Sigmoid,
    Tanh,
}

/// One entry of a `view`'s shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    Fixed(usize),
    /// `-1`
    Infer,
    /// `x.size(dim)` of an earlier node: the batch size, as a rule.
    SizeOf {
        node: usize,
        dim: usize,
    },
}

impl Graph {
    /// Parameters that the output depends on.
    pub fn reached(&self) -> Vec<Tensor> {
        let mut wanted = vec![false; self.nodes.len()];
        wanted[self.output] = true;
        let mut tensors = Vec::new();
        for (index, node) in self.nodes.iter().enumerate().rev() {
            if wanted[index] {
                node.inputs.iter().for_each(|&input| wanted[input] = true);
                tensors.extend(node.op.parameters());
            }
        }
        tensors.sort_unstable();
        tensors.dedup();
        tensors
    }
}

impl Op {
    /// The PyTorch module that does the same.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Input => "Input",
            Self::Conv2d { .. } => "Conv2d",
            Self::BatchNorm2d { .. } => "BatchNorm2d",
            Self::Activation { function, .. } => match function {
                Activation::Relu => "ReLU",
                Activation::Relu6 => "ReLU6",
                Activation::LeakyRelu { .. } => "LeakyReLU",
                Activation::Silu => "SiLU",
                Activation::Gelu { .. } => "GELU",
                Activation::Hardswish => "Hardswish",
                Activation::Hardsigmoid => "Hardsigmoid",
                Activation::Sigmoid => "Sigmoid",
                Activation::Tanh => "Tanh",
            },
            Self::MaxPool2d { .. } => "MaxPool2d",
            Self::AvgPool2d { .. } => "AvgPool2d",
            Self::AdaptiveAvgPool2d { .. } => "AdaptiveAvgPool2d",
            Self::Dropout { channels: false, .. } => "Dropout",
            Self::Dropout { channels: true, .. } => "Dropout2d",
            Self::StochasticDepth { .. } => "StochasticDepth",
            Self::Flatten { .. } => "Flatten",
            Self::Reshape { .. } => "View",
            Self::Linear { .. } => "Linear",
            Self::LayerNorm { .. } => "LayerNorm",
            Self::Pad { .. } => "ZeroPad2d",
            Self::GroupNorm { .. } => "GroupNorm",
            Self::ResponseNorm { .. } => "ResponseNorm",
            Self::Upsample { .. } => "Upsample",
            Self::Permute { .. } => "Permute",
            Self::Scale { .. } => "Scale",
            Self::Softmax { log: true, .. } => "LogSoftmax",
            Self::Softmax { log: false, .. } => "Softmax",
            Self::Mean { .. } => "Mean",
            Self::Add { .. } => "Add",
            Self::Mul => "Mul",
            Self::Cat { .. } => "Cat",
            Self::Split { .. } => "Split",
            Self::ChannelShuffle { .. } => "ChannelShuffle",
            Self::Attention { .. } => "Attention",
            Self::WindowAttention(_) => "WindowAttention",
            Self::PatchMerging => "PatchMerging",
            Self::Expand { .. } => "Expand",
            Self::Shift { .. } => "Shift",
        }
    }

    /// The parameters (not the buffers) this operation reads.
    pub fn parameters(&self) -> Vec<Tensor> {
        match self {
            Self::Conv2d { weight, bias, .. } | Self::Linear { weight, bias } => {
                std::iter::once(*weight).chain(*bias).collect()
            }
            Self::BatchNorm2d { weight, bias, .. }
            | Self::LayerNorm { weight, bias, .. }
            | Self::GroupNorm { weight, bias, .. } => weight.iter().chain(bias).copied().collect(),
            Self::ResponseNorm { weight, bias, .. } => vec![*weight, *bias],
            Self::Scale { factor: tensor, .. } | Self::Expand { tensor } | Self::Shift { summand: tensor } => {
                vec![*tensor]
            }
            Self::WindowAttention(Windows { scores, bias, fill, .. }) => {
                let logit = match scores {
                    Scores::Scaled(_) => None,
                    Scores::Cosine { logit } => Some(*logit),
                };
                let bias = match bias {
                    Bias::Table(table) => vec![*table],
                    Bias::Computed { distances: _, hidden, hidden_bias, output } => {
                        vec![*hidden, *hidden_bias, *output]
                    }
                };
                fill.iter().copied().chain(logit).chain(bias).collect()
            }
            Self::Attention { rotation, .. } => rotation.iter().map(|rotation| rotation.table).collect(),
            Self::Input
            | Self::Activation { .. }
            | Self::MaxPool2d { .. }
            | Self::AvgPool2d { .. }
            | Self::AdaptiveAvgPool2d { .. }
            | Self::Dropout { .. }
            | Self::StochasticDepth { .. }
            | Self::Flatten { .. }
            | Self::Reshape { .. }
            | Self::Pad { .. }
            | Self::Upsample { .. }
            | Self::Permute { .. }
            | Self::Softmax { .. }
            | Self::Mean { .. }
            | Self::Add { .. }
            | Self::Mul
            | Self::Cat { .. }
            | Self::Split { .. }
            | Self::ChannelShuffle { .. }
            | Self::PatchMerging => Vec::new(),
        }
    }
}
