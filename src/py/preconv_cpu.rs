//! `cnnrs._cnnrs.CpuNetwork`: a frozen network on the cpu engine, which borrows the memory of the user's tensors.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::{Device, Kind, Tensor};

use super::enter::enter;
use super::error::convert;
use super::graph::Graph;
use crate::engine::cpu::infer::{self, Frozen, Isa, Options, Parameters};
use crate::error::{Error, Result};

/// Contiguous float32 on the CPU.
struct Floats(Tensor);

impl Floats {
    /// # Errors
    /// `Argument` for tensors of another type or in another place.
    fn new(tensor: &Tensor, what: &str) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let (kind, device) = (tensor.kind(), tensor.device());
        if device != Device::Cpu || kind != Kind::Float || tensor.is_sparse() || tensor.is_mkldnn() {
            return Err(Error::Argument(format!(
                "engine 'cpu' computes with dense float32 tensors on the CPU, but {what} is {kind:?} on {device:?}: use \
                 engine='torch'"
            )));
        }
        // A model in channels_last is copied here; all others are read where they are.
        Ok(Self(tensor.f_detach()?.f_contiguous()?))
    }

    fn shape(&self) -> Vec<usize> {
        self.0.size().into_iter().map(|d| usize::try_from(d).unwrap_or_default()).collect()
    }

    fn get(&self) -> &[f32] {
        match self.0.numel() {
            0 => &[],
            // SAFETY: `new` made a contiguous float32 tensor on the CPU; it lives as long as the slice.
            len => unsafe { std::slice::from_raw_parts(self.0.data_ptr().cast::<f32>(), len) },
        }
    }
}

/// `None` for tensors that are no dense float32 on the CPU: only counters of batch norm may be.
struct Weights(Vec<Option<Floats>>);

impl Parameters for Weights {
    fn floats(&self, index: usize) -> Option<&[f32]> {
        self.0.get(index)?.as_ref().map(Floats::get)
    }
}

fn weights(graph: &Graph, tensors: Vec<PyTensor>) -> PyResult<Weights> {
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    Ok(Weights(tensors.into_iter().map(|t| Floats::new(&t.0, "a parameter").ok()).collect()))
}

/// Compiled for the shape of the first batch, and again when it changes; the weights are read then.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct CpuNetwork {
    inner: Mutex<Frozen<Weights>>,
}

/// (name, kind, method, floating-point operations per image, seconds so far)
type Row = (String, &'static str, &'static str, u64, f64);

#[pymethods]
impl CpuNetwork {
    /// `exact`: no Winograd convolution.
    #[new]
    fn new(py: Python<'_>, graph: &Graph, tensors: Vec<PyTensor>, exact: bool) -> PyResult<Self> {
        let workers = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        let options = Options { workers, exact, isa: Isa::best() };
        let inner = Frozen::new(graph.inner.clone(), weights(graph, tensors)?, options);
        Ok(Self { inner: Mutex::new(inner.map_err(|error| convert(py, error))?) })
    }

    /// Why a graph cannot be computed on inputs of this shape; None where it can.
    #[staticmethod]
    fn obstacle(graph: &Graph, tensors: Vec<PyTensor>, input: Vec<usize>) -> PyResult<Option<String>> {
        Ok(infer::obstacle(&graph.inner, &weights(graph, tensors)?, &input))
    }

    /// Features of one batch.
    fn __call__(&self, py: Python<'_>, images: PyTensor) -> PyResult<PyTensor> {
        let images = Floats::new(&images.0, "the batch").map_err(|error| convert(py, error))?;
        let inner = &self.inner;
        enter(py, move || {
            let mut network = inner.lock().unwrap_or_else(PoisonError::into_inner);
            let shape = network.output(&images.shape())?;
            let sizes: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
            let features = Tensor::f_empty(sizes, (Kind::Float, Device::Cpu))?;
            let output = match features.numel() {
                0 => &mut [][..],
                // SAFETY: a new contiguous float32 tensor that nobody else knows; every float is written before it is
                // read.
                len => unsafe { std::slice::from_raw_parts_mut(features.data_ptr().cast::<f32>(), len) },
            };
            network.run(&images.shape(), images.get(), output)?;
            Ok(PyTensor(features))
        })
    }

    /// Per step: name, kind, method, floating-point operations per image, seconds since the first batch.
    fn timings(&self, py: Python<'_>) -> PyResult<Vec<Row>> {
        let timings = self.inner.lock().unwrap_or_else(PoisonError::into_inner).timings();
        let timings = timings.map_err(|error| convert(py, error))?;
        Ok(timings.into_iter().map(|t| (t.name, t.kind, t.method, t.flops, t.seconds)).collect())
    }

    /// Bytes of activations, weights and the workers' memory, 0 before the first batch.
    fn bytes(&self) -> (usize, usize, usize) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).bytes().into()
    }
}
