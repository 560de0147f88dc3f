//! `cnnrs._cnnrs.Graph`: the network as plain data, built by `python/cnnrs/graph.py`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::error::convert;
use crate::model::{self, Activation, Dim, Node, Op, Pair, Shape};

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
        nodes: Vec<(String, String, Vec<usize>, Bound<'_, PyDict>)>,
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
                Ok(Node { op: op(&kind, &Attributes(&attributes), tensors.len())?, name, inputs })
            })
            .collect::<PyResult<Vec<_>>>()?;
        if output >= nodes.len() {
            return Err(PyValueError::new_err(format!("output {output} of a graph of {} nodes", nodes.len())));
        }
        Ok(Self { inner: model::Graph { nodes, output, tensors } })
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

struct Attributes<'a, 'py>(&'a Bound<'py, PyDict>);

impl<'py> Attributes<'_, 'py> {
    fn get<T: FromPyObject<'py>>(&self, name: &str) -> PyResult<T> {
        let value =
            self.0.get_item(name)?.ok_or_else(|| PyValueError::new_err(format!("attribute {name} is missing")))?;
        value.extract()
    }

    fn tensor(&self, name: &str, count: usize) -> PyResult<usize> {
        self.optional(name, count)?.ok_or_else(|| PyValueError::new_err(format!("{name} is missing")))
    }

    fn optional(&self, name: &str, count: usize) -> PyResult<Option<usize>> {
        match self.get::<Option<usize>>(name)? {
            Some(index) if index >= count => Err(PyValueError::new_err(format!("{name}: no tensor {index}"))),
            index => Ok(index),
        }
    }

    fn pair(&self, name: &str) -> PyResult<Pair> {
        self.get::<(usize, usize)>(name).map(|(h, w)| [h, w])
    }

    /// A pair whose entries divide: zero would divide by zero.
    fn positive_pair(&self, name: &str) -> PyResult<Pair> {
        let pair = self.pair(name)?;
        if pair.contains(&0) {
            return Err(PyValueError::new_err(format!("{name} must be positive, got {pair:?}")));
        }
        Ok(pair)
    }
}

fn op(kind: &str, a: &Attributes<'_, '_>, tensors: usize) -> PyResult<Op> {
    Ok(match kind {
        "Input" => Op::Input,
        "Conv2d" => Op::Conv2d {
            weight: a.tensor("weight", tensors)?,
            bias: a.optional("bias", tensors)?,
            stride: a.positive_pair("stride")?,
            padding: a.pair("padding")?,
            dilation: a.positive_pair("dilation")?,
            groups: a.get("groups")?,
        },
        "BatchNorm2d" => Op::BatchNorm2d {
            weight: a.optional("weight", tensors)?,
            bias: a.optional("bias", tensors)?,
            running_mean: a.optional("running_mean", tensors)?,
            running_var: a.optional("running_var", tensors)?,
            num_batches_tracked: a.optional("num_batches_tracked", tensors)?,
            momentum: a.get("momentum")?,
            eps: a.get("eps")?,
            training: a.get("training")?,
        },
        "MaxPool2d" => Op::MaxPool2d {
            kernel: a.positive_pair("kernel")?,
            stride: a.positive_pair("stride")?,
            padding: a.pair("padding")?,
            dilation: a.positive_pair("dilation")?,
            ceil_mode: a.get("ceil_mode")?,
        },
        "AvgPool2d" => Op::AvgPool2d {
            kernel: a.positive_pair("kernel")?,
            stride: a.positive_pair("stride")?,
            padding: a.pair("padding")?,
            ceil_mode: a.get("ceil_mode")?,
            count_include_pad: a.get("count_include_pad")?,
            divisor: a.get("divisor")?,
        },
        "AdaptiveAvgPool2d" => {
            let (h, w) = a.get("output")?;
            Op::AdaptiveAvgPool2d { output: [h, w] }
        }
        "Dropout" => Op::Dropout {
            p: a.get("p")?,
            training: a.get("training")?,
            channels: a.get("channels")?,
            inplace: a.get("inplace")?,
        },
        "Flatten" => Op::Flatten { start: a.get("start")?, end: a.get("end")? },
        "View" => {
            Op::Reshape { dims: a.get::<Vec<Bound<'_, PyAny>>>("dims")?.iter().map(dim).collect::<PyResult<_>>()? }
        }
        "Linear" => Op::Linear { weight: a.tensor("weight", tensors)?, bias: a.optional("bias", tensors)? },
        "LayerNorm" => Op::LayerNorm {
            shape: a.get("shape")?,
            weight: a.optional("weight", tensors)?,
            bias: a.optional("bias", tensors)?,
            eps: a.get("eps")?,
        },
        "ZeroPad2d" => Op::Pad { before: a.pair("before")?, after: a.pair("after")? },
        "Permute" => Op::Permute { dims: a.get("dims")? },
        "Scale" => Op::Scale { factor: a.tensor("factor", tensors)?, first: a.get("first")? },
        "Softmax" => Op::Softmax { dim: a.get("dim")?, log: a.get("log")? },
        "Mean" => Op::Mean { dims: a.get("dims")?, keepdim: a.get("keepdim")? },
        "Add" => Op::Add { inplace: a.get("inplace")? },
        "Mul" => Op::Mul,
        "Cat" => Op::Cat { dim: a.get("dim")? },
        other => Op::Activation { function: activation(other, a)?, inplace: a.get("inplace")? },
    })
}

fn activation(kind: &str, a: &Attributes<'_, '_>) -> PyResult<Activation> {
    Ok(match kind {
        "ReLU" => Activation::Relu,
        "ReLU6" => Activation::Relu6,
        "LeakyReLU" => Activation::LeakyRelu { negative_slope: a.get("negative_slope")? },
        "SiLU" => Activation::Silu,
        "GELU" => Activation::Gelu { tanh: a.get("tanh")? },
        "Hardswish" => Activation::Hardswish,
        "Hardsigmoid" => Activation::Hardsigmoid,
        "Sigmoid" => Activation::Sigmoid,
        "Tanh" => Activation::Tanh,
        other => return Err(PyValueError::new_err(format!("unknown operation {other}"))),
    })
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
