//! From the structure of a graph to layers with memory.

use super::layer::{Edge, Grain, Layer, Out, Param};
use super::layers::average::{Mean, WindowAverage};
use super::layers::binary::{Add, Cat, Map, Mul};
use super::layers::conv::Conv;
use super::layers::conv_pool::{BackwardSlots, Chain, ConvPool, Slots};
use super::layers::dropout::Dropout;
use super::layers::large_linear::{Kept, LargeLinear};
use super::layers::linear::Linear;
use super::layers::max_pool::MaxPool;
use super::layers::norm::Norm;
use super::layers::pointwise::Pointwise;
use super::layers::softmax::Softmax;
use super::maps::{broadcast_map, mean_targets};
use super::memory::{Place, Slot};
use super::structure::{Item, Structure};
use super::waiting::{is_worth, most_steps};
use crate::engine::cpu::common::analysis::axis;
use crate::engine::cpu::common::geometry::{self, Reduce, Span, Window};
use crate::engine::cpu::train::kernels::skinny::PANEL;
use crate::engine::cpu::train::kernels::sparse::ROWS;
use crate::error::{Error, Result};
use crate::model::{Graph, Op, Tensor};

/// Lays memory out while it makes the layers.
pub struct Builder<'a> {
    graph: &'a Graph,
    structure: &'a Structure,
    trained: &'a [bool],
    training: bool,
    workers: usize,
    batch: usize,
    pub batch_len: usize,
    pub worker_len: usize,
    /// Layers that draw random numbers.
    streams: u64,
    values: Vec<Option<Slot>>,
    grads: Vec<Option<Slot>>,
    params: Vec<Option<Param>>,
}

impl<'a> Builder<'a> {
    pub fn new(
        graph: &'a Graph,
        structure: &'a Structure,
        trained: &'a [bool],
        training: bool,
        workers: usize,
    ) -> Self {
        let nodes = graph.nodes.len();
        let mut builder = Self {
            graph,
            structure,
            trained,
            training,
            workers,
            batch: structure.shapes[0].first().copied().unwrap_or(0),
            batch_len: 0,
            worker_len: 0,
            streams: 0,
            values: vec![None; nodes],
            grads: vec![None; nodes],
            params: vec![None; graph.tensors.len()],
        };
        builder.values[0] = Some(Slot { place: Place::Input, offset: 0, len: builder.len(0) });
        for root in structure.items.iter().filter(|item| !item.inplace).map(|item| item.root) {
            let local = builder.is_local(root);
            // Training reads values again on the way back, when the worker has seen other samples.
            builder.values[root] = Some(builder.value_slot(root, local && !training));
            builder.grads[root] = structure.needs_grad[root].then(|| builder.value_slot(root, local));
        }
        builder
    }

    /// Floats per sample.
    fn len(&self, node: usize) -> usize {
        self.structure.shapes[node].iter().skip(1).product()
    }

    /// Memory of `copies` times `len` floats that all workers see.
    fn shared(&mut self, len: usize, copies: usize) -> Slot {
        let slot = Slot { place: Place::Batch, offset: self.batch_len, len };
        // Slots start on cache lines, so that workers do not share one at the seams.
        self.batch_len += (len * copies).next_multiple_of(16);
        slot
    }

    /// Memory that every worker has for itself.
    pub fn own(&mut self, len: usize) -> Slot {
        let slot = Slot { place: Place::Worker, offset: self.worker_len, len };
        self.worker_len += len.next_multiple_of(16);
        slot
    }

    fn value_slot(&mut self, root: usize, local: bool) -> Slot {
        let len = self.len(root);
        if local { self.own(len) } else { self.shared(len, self.batch) }
    }

    /// Made and read within one run of layers that takes a sample through all of them.
    fn is_local(&self, root: usize) -> bool {
        let touches = |item: &Item| item.root == root || item.inputs.contains(&root);
        let items = &self.structure.items;
        let (Some(first), Some(last)) = (items.iter().position(touches), items.iter().rposition(touches)) else {
            return false;
        };
        root != self.structure.output && items[first..=last].iter().all(|item| item.grain == Grain::Sample)
    }

    fn slot(&self, root: usize) -> Result<Slot> {
        self.values[root].ok_or_else(|| Error::internal(format_args!("{}: no memory", self.graph.nodes[root].name)))
    }

    pub fn output(&self) -> Out {
        let output = self.structure.output;
        let nothing = Slot { place: Place::Input, offset: 0, len: self.len(output) };
        Out { value: self.values[output].unwrap_or(nothing), grad: self.grads[output] }
    }

    /// Parameters that the workers add up gradients for.
    pub fn params(&self) -> Vec<Param> {
        self.params.iter().flatten().copied().collect()
    }

    fn param(&mut self, tensor: Tensor) -> Param {
        if let Some(param) = self.params[tensor] {
            return param;
        }
        let wanted = self.training && self.trained[tensor];
        let len = self.graph.tensors[tensor].iter().product();
        let param = Param { tensor, grad: wanted.then(|| self.own(len)) };
        self.params[tensor] = Some(param);
        param
    }

    fn edge(&self, at: usize, which: usize) -> Result<Edge> {
        let items = &self.structure.items;
        let root = items[at].inputs[which];
        // Backward visits later readers first; the first to write does not add.
        let later = items[at + 1..].iter().any(|item| item.inputs.contains(&root) && !item.inplace);
        let add = later || items[at].inputs[..which].contains(&root);
        Ok(Edge { value: self.slot(root)?, grad: self.grads[root], add })
    }

    pub fn layers(&mut self) -> Result<Vec<Box<dyn Layer>>> {
        (0..self.structure.items.len()).map(|at| self.layer(at)).collect()
    }

    fn layer(&mut self, at: usize) -> Result<Box<dyn Layer>> {
        let item = self.structure.items[at].clone();
        let (graph, structure) = (self.graph, self.structure);
        let node = &graph.nodes[item.node];
        let input = self.edge(at, 0)?;
        let out = Out { value: self.slot(item.root)?, grad: self.grads[item.root] };
        let shape = &structure.shapes[item.node];
        let from = &structure.shapes[node.inputs[0]];
        let plane = |shape: &[usize]| [shape[2], shape[3]];
        Ok(match &node.op {
            Op::Input => return Err(Error::internal("a graph has one input")),
            Op::Conv2d { .. } => match &item.chain {
                Some(chain) => Box::new(self.conv_pool(item.node, chain, input, out)),
                None => Box::new(self.conv(item.node, input, out)?),
            },
            Op::Linear { weight, .. } if item.grain == Grain::Batch => {
                Box::new(self.large_linear(item.node, *weight, input, out))
            }
            Op::Linear { weight, bias } => {
                let [out_features, in_features] = pair(&graph.tensors[*weight]);
                let (weight, bias) = (self.param(*weight), bias.map(|b| self.param(b)));
                Box::new(Linear { in_features, out_features, input, out, weight, bias })
            }
            Op::BatchNorm2d { .. } => Box::new(self.norm(item.node, input, out)),
            Op::Activation { function, .. } => {
                Box::new(Pointwise { function: *function, input, out, inplace: item.inplace })
            }
            Op::Dropout { p, channels, .. } => {
                let run = if *channels { shape.iter().skip(2).product() } else { 1 };
                let mask = self.shared(self.len(item.node) / run.max(1), self.batch);
                let stream = self.stream();
                Box::new(Dropout { p: *p, run, stream, mask, input, out, inplace: item.inplace })
            }
            Op::MaxPool2d { kernel, stride, padding, dilation, .. } => Box::new(MaxPool {
                channels: shape[1],
                size: plane(from),
                output: plane(shape),
                kernel: *kernel,
                stride: *stride,
                padding: *padding,
                dilation: *dilation,
                input,
                out,
                origins: input.grad.map(|_| self.shared(self.len(item.node), self.batch)),
            }),
            Op::AvgPool2d { .. } | Op::AdaptiveAvgPool2d { .. } => {
                let (spans, reduce) = geometry::pool(&node.op, plane(from), plane(shape))
                    .ok_or_else(|| Error::internal(format_args!("{} is no pool", node.name)))?;
                let fixed = if let Reduce::Mean(divisor) = reduce { divisor } else { None };
                let divisor = |h: &Span, w: &Span| fixed.unwrap_or(h.count * w.count) as f32;
                let divisors = spans[0].iter().flat_map(|h| spans[1].iter().map(move |w| divisor(h, w))).collect();
                Box::new(WindowAverage { channels: shape[1], size: plane(from), spans, divisors, input, out })
            }
            Op::Mean { dims, .. } => {
                let (target, count) = mean_targets(from, dims);
                Box::new(Mean { target, count, input, out })
            }
            Op::Softmax { dim, log } => {
                let dim = axis(*dim, shape.len());
                let outer = shape[1..dim].iter().product();
                let inner = shape[dim + 1..].iter().product();
                Box::new(Softmax { log: *log, outer, classes: shape[dim], inner, input, out })
            }
            Op::Add { .. } => Box::new(Add { inputs: self.sides(at, item.node)?, out }),
            Op::Mul => Box::new(Mul { inputs: self.sides(at, item.node)?, out }),
            Op::Cat { dim } => {
                let dim = axis(*dim, shape.len());
                let length = |node: &usize| structure.shapes[*node][dim..].iter().product();
                let edges = (0..node.inputs.len()).map(|i| self.edge(at, i)).collect::<Result<Vec<_>>>()?;
                let inputs = edges.into_iter().zip(node.inputs.iter().map(length)).collect();
                Box::new(Cat { outer: shape[1..dim].iter().product(), inputs, out })
            }
            Op::Flatten { .. } | Op::Reshape { .. } => {
                return Err(Error::internal(format_args!("{}: a view is not a layer", node.name)));
            }
            // `structure` has refused them, with the reason.
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
            | Op::Upsample { .. } => {
                return Err(Error::internal(format_args!("{} has no kernel", node.name)));
            }
        })
    }

    fn stream(&mut self) -> u64 {
        self.streams += 1;
        self.streams
    }

    /// Both operands, each with the element that every output element reads.
    fn sides(&self, at: usize, node: usize) -> Result<[(Edge, Map); 2]> {
        let out = &self.structure.shapes[node][1..];
        let map = |i: usize| broadcast_map(&self.structure.shapes[self.graph.nodes[node].inputs[i]][1..], out);
        Ok([(self.edge(at, 0)?, map(0)), (self.edge(at, 1)?, map(1))])
    }

    fn conv(&mut self, node: usize, input: Edge, out: Out) -> Result<Conv> {
        let Op::Conv2d { weight, bias, .. } = self.graph.nodes[node].op else {
            return Err(Error::internal("not a convolution"));
        };
        let window =
            Window::of(self.graph, &self.structure.shapes, node).ok_or_else(|| Error::internal("not a convolution"))?;
        let weights = self.graph.tensors[weight].iter().product();
        let per_worker = self.batch.div_ceil(self.workers);
        let block = Conv::block(&window, weights, per_worker);
        let (depth, width) = (window.depth(), block * window.pixels());
        Ok(Conv {
            window,
            input,
            out,
            weight: self.param(weight),
            bias: bias.map(|b| self.param(b)),
            block,
            columns: self.own(depth * width),
            column_grads: input.grad.map(|_| self.own(depth * width)),
            gathered: (block > 1).then(|| self.own(window.out_channels / window.groups * width)),
        })
    }

    fn conv_pool(&mut self, node: usize, chain: &Chain, input: Edge, out: Out) -> ConvPool {
        let Op::Conv2d { weight, bias, padding, .. } = self.graph.nodes[node].op else { unreachable!() };
        let (from, to) = (&self.structure.shapes[self.graph.nodes[node].inputs[0]], &self.structure.shapes[chain.last]);
        let (channels, out_channels, size, pooled) = (from[1], to[1], [from[2], from[3]], [to[2], to[3]]);
        let k = self.graph.tensors[weight][2];
        let pixel = ConvPool::pixel(channels, input.grad.is_some());
        let image = ConvPool::image_len(pixel, size, padding);
        let row = out_channels * k * ConvPool::row_len(pixel, k, input.grad.is_some());
        let outputs = pooled[0] * pooled[1];
        let backward = out.grad.map(|_| BackwardSlots {
            origins: self.shared(out_channels * outputs, self.batch),
            pixels: self.own(image),
            pixel_grads: self.own(image),
            weights: self.own(row),
            weight_grads: self.own(row),
            terms: self.own(ConvPool::terms_len(outputs)),
        });
        let dropout = chain.dropout.map(|p| (p, self.stream(), self.shared(out_channels, self.batch)));
        let (weight, bias) = (self.param(weight), bias.map(|b| self.param(b)));
        let slots = Slots {
            padded: self.own(ConvPool::image_len(channels, size, padding)),
            live: self.own(ConvPool::live_len(out_channels)),
            backward,
        };
        ConvPool {
            channels,
            pixel,
            out_channels,
            size,
            padding,
            k,
            pooled,
            relu: chain.relu,
            input,
            out,
            weight,
            bias,
            dropout,
            slots,
        }
    }

    fn large_linear(&mut self, node: usize, weight: Tensor, input: Edge, out: Out) -> LargeLinear {
        let Op::Linear { bias, .. } = self.graph.nodes[node].op else { unreachable!() };
        let [out_features, in_features] = pair(&self.graph.tensors[weight]);
        let columns = LargeLinear::columns(self.batch, in_features);
        let trained = self.training && self.trained[weight];
        let nothing = Slot { place: Place::Worker, offset: 0, len: 0 };
        let most = most_steps(self.batch);
        // The derivative of an input is that of the weights as they are: who wants it cannot wait.
        let waits = trained && input.grad.is_none() && most > 1 && is_worth(in_features, out_features);
        let kept = waits.then(|| {
            let (batch, columns) = (self.batch, LargeLinear::columns(self.batch * most, in_features));
            Kept {
                most,
                inputs: self.shared(batch * in_features, most),
                grads: self.shared(batch * out_features, most),
                packed: self.own(batch * most * columns),
                terms: [batch, batch, 1].map(|each| self.own(out_features * each * most)),
                columns,
            }
        });
        LargeLinear {
            in_features,
            out_features,
            input,
            out,
            weight: Param { tensor: weight, grad: None },
            bias: bias.map(|b| self.param(b)),
            trained,
            sums: self.own(self.batch * (out_features / self.workers + 8)),
            turned: self.own(self.batch.next_multiple_of(PANEL) * (out_features / self.workers + 8)),
            packed: self.own(self.batch.next_multiple_of(PANEL) * columns),
            rows: self.own(ROWS * columns),
            input_grads: input.grad.map(|_| self.own(self.batch * columns)),
            terms: [self.batch, self.batch, 1]
                .map(|each| if trained { self.own(out_features * each) } else { nothing }),
            input_terms: [ROWS, ROWS, 1].map(|each| match input.grad {
                Some(_) => self.own(out_features.div_ceil(ROWS) * self.batch * each),
                None => nothing,
            }),
            columns,
            kept,
        }
    }

    fn norm(&mut self, node: usize, input: Edge, out: Out) -> Norm {
        let Op::BatchNorm2d { weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, training } =
            self.graph.nodes[node].op
        else {
            unreachable!()
        };
        let shape = &self.structure.shapes[node];
        let (channels, pixels) = (shape[1], shape[2] * shape[3]);
        Norm {
            channels,
            pixels,
            weight: weight.map(|t| self.param(t)),
            bias: bias.map(|t| self.param(t)),
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
            batch_statistics: training || running_mean.is_none(),
            training,
            input,
            out,
            sums: [self.shared(4 * channels, self.workers), self.shared(4 * channels, self.workers)],
            statistics: self.own(2 * channels),
        }
    }
}

fn pair(shape: &[usize]) -> [usize; 2] {
    [shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(0)]
}
