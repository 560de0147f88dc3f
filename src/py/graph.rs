//! `cnnrs._cnnrs.Graph`: the network as plain data, built by `python/cnnrs/model/lowering.py`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::error::convert;
use super::record::{Names, Record, choice, record};
use crate::model::{self, Activation, Bias, Dim, Node, Op, Pair, Rotation, Scores, Shape, Windows};

/// A network as a list of operations, in the order `forward` calls them.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct Graph {
    pub inner: model::Graph,
}

#[pymethods]
impl Graph {
    /// `nodes`: (name, kind, inputs, attributes) with node 0 the input; `tensors`: shapes of parameters and buffers.
    #[new]
    fn new(
        nodes: Vec<(String, String, Vec<usize>, Bound<'_, PyAny>)>,
        output: usize,
        tensors: Vec<Shape>,
    ) -> PyResult<Self> {
        let nodes = nodes
            .into_iter()
            .enumerate()
            .map(|(index, (name, kind, inputs, attributes))| {
                if inputs.iter().any(|&i| i >= index) {
                    return Err(PyValueError::new_err(format!("node {index} ({name}) reads a later node")));
                }
                let read = choice("operation", &kind, OPERATIONS)?;
                let op = record(&format!("{name} ({kind})"), &attributes, |record| {
                    read(&Attributes { record, tensors: tensors.len() })
                })?;
                Ok(Node { op, name, inputs })
            })
            .collect::<PyResult<Vec<_>>>()?;
        if output >= nodes.len() {
            return Err(PyValueError::new_err(format!("output {output} of a graph of {} nodes", nodes.len())));
        }
        Ok(Self { inner: model::Graph { nodes, output, tensors } })
    }

    /// The kinds of operations there are.
    #[classattr]
    fn kinds() -> Vec<&'static str> {
        OPERATIONS.iter().map(|(kind, _)| *kind).collect()
    }

    fn __len__(&self) -> usize {
        self.inner.nodes.len()
    }

    /// Output shape of every node for one input shape (N, C, H, W).
    fn shapes(&self, py: Python<'_>, input: Vec<usize>) -> PyResult<Vec<Shape>> {
        model::shapes(&self.inner, &input).map_err(|error| convert(py, error))
    }

    /// (FLOPs, receptive field (h, w) or None) of every node, from the shapes that `shapes` returned.
    fn costs(&self, shapes: Vec<Shape>) -> Vec<(u64, Option<(usize, usize)>)> {
        let costs = model::costs(&self.inner, &shapes);
        costs.iter().map(|cost| (cost.flops, cost.receptive_field.map(|[h, w]| (h, w)))).collect()
    }

    /// Indices of the parameters that the output depends on.
    fn reached(&self) -> Vec<usize> {
        self.inner.reached()
    }

    /// Indices of the parameters that each node reads.
    fn parameters(&self) -> Vec<Vec<usize>> {
        self.inner.nodes.iter().map(|node| node.op.parameters()).collect()
    }
}

/// The arguments of one operation of a graph over `tensors` parameters and buffers.
struct Attributes<'a, 'py> {
    record: &'a Record<'py>,
    tensors: usize,
}

impl<'py> Attributes<'_, 'py> {
    fn get<T: FromPyObject<'py>>(&self, name: &'static str) -> PyResult<T> {
        self.record.get(name)
    }

    fn tensor(&self, name: &'static str) -> PyResult<usize> {
        self.optional(name)?.ok_or_else(|| self.record.wrong(name, "a tensor expected, got None"))
    }

    fn optional(&self, name: &'static str) -> PyResult<Option<usize>> {
        match self.get::<Option<usize>>(name)? {
            Some(index) if index >= self.tensors => Err(self.record.wrong(name, format!("no tensor {index}"))),
            index => Ok(index),
        }
    }

    fn pair(&self, name: &'static str) -> PyResult<Pair> {
        self.get::<(usize, usize)>(name).map(|(h, w)| [h, w])
    }

    /// A pair whose entries divide: zero would divide by zero.
    fn positive_pair(&self, name: &'static str) -> PyResult<Pair> {
        let pair = self.pair(name)?;
        if pair.contains(&0) {
            return Err(self.record.wrong(name, format!("must be positive, got {pair:?}")));
        }
        Ok(pair)
    }
}

const OPERATIONS: &Names<fn(&Attributes<'_, '_>) -> PyResult<Op>> = &[
    ("Input", |_| Ok(Op::Input)),
    ("Conv2d", |a| {
        Ok(Op::Conv2d {
            weight: a.tensor("weight")?,
            bias: a.optional("bias")?,
            stride: a.positive_pair("stride")?,
            padding: a.pair("padding")?,
            dilation: a.positive_pair("dilation")?,
            groups: a.get("groups")?,
        })
    }),
    ("BatchNorm2d", |a| {
        Ok(Op::BatchNorm2d {
            weight: a.optional("weight")?,
            bias: a.optional("bias")?,
            running_mean: a.optional("running_mean")?,
            running_var: a.optional("running_var")?,
            num_batches_tracked: a.optional("num_batches_tracked")?,
            momentum: a.get("momentum")?,
            eps: a.get("eps")?,
            training: a.get("training")?,
        })
    }),
    ("MaxPool2d", |a| {
        Ok(Op::MaxPool2d {
            kernel: a.positive_pair("kernel")?,
            stride: a.positive_pair("stride")?,
            padding: a.pair("padding")?,
            dilation: a.positive_pair("dilation")?,
            ceil_mode: a.get("ceil_mode")?,
        })
    }),
    ("AvgPool2d", |a| {
        Ok(Op::AvgPool2d {
            kernel: a.positive_pair("kernel")?,
            stride: a.positive_pair("stride")?,
            padding: a.pair("padding")?,
            ceil_mode: a.get("ceil_mode")?,
            count_include_pad: a.get("count_include_pad")?,
            divisor: a.get("divisor")?,
        })
    }),
    ("AdaptiveAvgPool2d", |a| {
        let (h, w) = a.get("output")?;
        Ok(Op::AdaptiveAvgPool2d { output: [h, w] })
    }),
    ("Dropout", |a| {
        Ok(Op::Dropout {
            p: a.get("p")?,
            training: a.get("training")?,
            channels: a.get("channels")?,
            inplace: a.get("inplace")?,
        })
    }),
    ("StochasticDepth", |a| Ok(Op::StochasticDepth { p: a.get("p")?, rows: a.get("rows")?, keep: a.get("keep")? })),
    ("Flatten", |a| Ok(Op::Flatten { start: a.get("start")?, end: a.get("end")? })),
    ("View", |a| {
        Ok(Op::Reshape { dims: a.get::<Vec<Bound<'_, PyAny>>>("dims")?.iter().map(dim).collect::<PyResult<_>>()? })
    }),
    ("Linear", |a| Ok(Op::Linear { weight: a.tensor("weight")?, bias: a.optional("bias")? })),
    ("LayerNorm", |a| {
        Ok(Op::LayerNorm {
            shape: a.get("shape")?,
            weight: a.optional("weight")?,
            bias: a.optional("bias")?,
            eps: a.get("eps")?,
        })
    }),
    ("GroupNorm", |a| {
        Ok(Op::GroupNorm {
            groups: a.get("groups")?,
            weight: a.optional("weight")?,
            bias: a.optional("bias")?,
            eps: a.get("eps")?,
        })
    }),
    ("ResponseNorm", |a| {
        Ok(Op::ResponseNorm {
            dims: a.get("dims")?,
            weight: a.tensor("weight")?,
            bias: a.tensor("bias")?,
            eps: a.get("eps")?,
        })
    }),
    ("Upsample", |a| Ok(Op::Upsample { scale: a.pair("scale")? })),
    ("ZeroPad2d", |a| Ok(Op::Pad { before: a.pair("before")?, after: a.pair("after")? })),
    ("Permute", |a| Ok(Op::Permute { dims: a.get("dims")? })),
    ("Scale", |a| Ok(Op::Scale { factor: a.tensor("factor")?, first: a.get("first")? })),
    ("Softmax", |a| Ok(Op::Softmax { dim: a.get("dim")?, log: a.get("log")? })),
    ("Mean", |a| Ok(Op::Mean { dims: a.get("dims")?, keepdim: a.get("keepdim")? })),
    ("Add", |a| Ok(Op::Add { inplace: a.get("inplace")? })),
    ("Mul", |a| match a.get("inplace")? {
        true => Err(a.record.wrong("inplace", "it has a value of its own")),
        false => Ok(Op::Mul),
    }),
    ("Cat", |a| Ok(Op::Cat { dim: a.get("dim")? })),
    ("Split", |a| Ok(Op::Split { dim: a.get("dim")?, sizes: a.get("sizes")?, part: a.get("part")? })),
    ("ChannelShuffle", |a| Ok(Op::ChannelShuffle { groups: a.get("groups")? })),
    ("Attention", |a| match a.get("heads")? {
        0 => Err(a.record.wrong("heads", "must be positive")),
        heads => Ok(Op::Attention { heads, scale: a.get("scale")?, rotation: rotation(a)? }),
    }),
    ("WindowAttention", |a| match a.get("heads")? {
        0 => Err(a.record.wrong("heads", "must be positive")),
        heads => Ok(Op::WindowAttention(Windows {
            heads,
            window: a.positive_pair("window")?,
            shift: a.pair("shift")?,
            grid: a.get("grid")?,
            scores: match a.optional("logit")? {
                Some(logit) => Scores::Cosine { logit },
                None => Scores::Scaled(a.get("scale")?),
            },
            bias: match a.optional("table")? {
                Some(table) => Bias::Table(table),
                None => Bias::Computed {
                    distances: a.tensor("distances")?,
                    hidden: a.tensor("hidden")?,
                    hidden_bias: a.tensor("hidden_bias")?,
                    output: a.tensor("output")?,
                },
            },
            fill: a.optional("fill")?,
        })),
    }),
    ("PatchMerging", |_| Ok(Op::PatchMerging)),
    ("Expand", |a| Ok(Op::Expand { tensor: a.tensor("tensor")? })),
    ("Shift", |a| Ok(Op::Shift { summand: a.tensor("summand")? })),
    ("ReLU", |a| activation(a, Activation::Relu)),
    ("ReLU6", |a| activation(a, Activation::Relu6)),
    ("LeakyReLU", |a| activation(a, Activation::LeakyRelu { negative_slope: a.get("negative_slope")? })),
    ("SiLU", |a| activation(a, Activation::Silu)),
    ("GELU", |a| activation(a, Activation::Gelu { tanh: a.get("tanh")? })),
    ("Hardswish", |a| activation(a, Activation::Hardswish)),
    ("Hardsigmoid", |a| activation(a, Activation::Hardsigmoid)),
    ("Sigmoid", |a| activation(a, Activation::Sigmoid)),
    ("Tanh", |a| activation(a, Activation::Tanh)),
];

fn activation(a: &Attributes<'_, '_>, function: Activation) -> PyResult<Op> {
    Ok(Op::Activation { function, inplace: a.get("inplace")? })
}

/// (table, first, half)
fn rotation(a: &Attributes<'_, '_>) -> PyResult<Option<Rotation>> {
    match a.get::<Option<(usize, usize, bool)>>("rotation")? {
        Some((table, ..)) if table >= a.tensors => Err(a.record.wrong("rotation", format!("no tensor {table}"))),
        found => Ok(found.map(|(table, first, half)| Rotation { table, first, half })),
    }
}

/// `-1`, a size, or (node, dim) for `x.size(dim)`.
fn dim(value: &Bound<'_, PyAny>) -> PyResult<Dim> {
    if let Ok((node, dim)) = value.extract::<(usize, usize)>() {
        return Ok(Dim::SizeOf { node, dim });
    }
    match value.extract::<i64>()? {
        -1 => Ok(Dim::Infer),
        size => {
            usize::try_from(size).map(Dim::Fixed).map_err(|_| PyValueError::new_err(format!("invalid size {size}")))
        }
    }
}
