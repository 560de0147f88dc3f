//! Feature extraction on the cpu engine: lends it the memory of the user's tensors.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::{Device, Kind, Tensor};

use super::batches::Batches;
use super::enter::enter;
use super::error::convert;
use super::graph::Graph;
use super::preconv::{Features, run};
use crate::engine::cpu::infer::{self, CpuExtractor, Images, Isa, Options, Parameters};
use crate::engine::{Extract, Rows};
use crate::error::{Error, Result};

/// Tensors that keep their memory alive while the engine reads it.
struct Owners(Vec<Tensor>);

fn floats(tensor: &Tensor) -> Option<&[f32]> {
    let plain = tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && !tensor.is_sparse() && !tensor.is_mkldnn();
    if !plain || !tensor.is_contiguous() {
        return None;
    }
    if tensor.numel() == 0 {
        return Some(&[]);
    }
    // SAFETY: a contiguous float32 tensor on the CPU has `numel` floats at its address, for as long as it lives.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) })
}

impl Parameters for Owners {
    fn floats(&self, index: usize) -> Option<&[f32]> {
        self.0.get(index).and_then(floats)
    }
}

/// A batch whose memory [`floats`] can read.
struct Batch(Tensor);

impl Batch {
    fn new(tensor: Tensor) -> Result<Self> {
        if tensor.device() != Device::Cpu || tensor.kind() != Kind::Float {
            let (kind, device) = (tensor.kind(), tensor.device());
            return Err(Error::Argument(format!(
                "engine 'cpu' reads float32 images on the CPU, got {kind:?} on {device:?}: use engine='torch'"
            )));
        }
        Ok(Self(tensor.f_contiguous()?))
    }
}

impl Images for Batch {
    fn shape(&self) -> Vec<usize> {
        self.0.size().into_iter().map(|d| usize::try_from(d).unwrap_or_default()).collect()
    }

    fn floats(&self) -> &[f32] {
        floats(&self.0).unwrap_or_default()
    }
}

/// The engine over a model's own weights, made contiguous where they are not (channels_last).
fn extractor(graph: &Graph, tensors: Vec<PyTensor>, exact: bool) -> Result<CpuExtractor<Owners, Batch>> {
    let _guard = tch::no_grad_guard();
    let tensors = tensors.into_iter().map(|t| Ok(t.0.f_detach()?.f_contiguous()?)).collect::<Result<_>>()?;
    let workers = usize::try_from(tch::get_num_threads()).unwrap_or(1);
    CpuExtractor::new(graph.inner.clone(), Owners(tensors), Options { workers, exact, isa: Isa::best() })
}

/// Why the cpu engine cannot compute features of inputs of this shape; None where it can.
#[pyfunction]
pub fn features_obstacle(graph: &Graph, tensors: Vec<PyTensor>, input: Vec<usize>) -> PyResult<Option<String>> {
    let _guard = tch::no_grad_guard();
    let contiguous = |t: PyTensor| t.0.f_detach().and_then(|t| t.f_contiguous()).map_err(Error::from);
    let tensors = tensors.into_iter().map(contiguous).collect::<Result<_>>();
    let tensors = Python::with_gil(|py| tensors.map_err(|error| convert(py, error)))?;
    Ok(infer::obstacle(&graph.inner, &Owners(tensors), &input))
}

/// The share, 0 to 1, of a graph's floating-point operations that are convolutions the cpu engine speeds up.
#[pyfunction]
pub fn winograd_share(py: Python<'_>, graph: &Graph, input: Vec<usize>) -> PyResult<f64> {
    infer::winograd_share(&graph.inner, &input).map_err(|error| convert(py, error))
}

/// Features of a lowered model without libtorch; arguments as for `extract_torch`. `exact`: no Winograd convolution.
#[pyfunction]
#[pyo3(signature = (graph, tensors, batches, path, expected, exact))]
pub fn extract_cpu(
    py: Python<'_>,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    batches: Py<PyAny>,
    path: Option<PathBuf>,
    expected: usize,
    exact: bool,
) -> PyResult<Features> {
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    let model = extractor(graph, tensors, exact).map_err(|error| convert(py, error))?;
    let read = |x: Bound<'_, PyAny>| Batch::new(x.extract::<PyTensor>()?.0).map_err(|error| convert(x.py(), error));
    run(py, model, Batches { iterator: batches, read }, path, expected)
}

/// A network that is compiled once and called with batches, for benchmarks.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct CpuNetwork {
    inner: Mutex<CpuExtractor<Owners, Batch>>,
}

/// (name, kind, method, floating-point operations per image, seconds so far)
type Row = (String, &'static str, &'static str, u64, f64);

#[pymethods]
impl CpuNetwork {
    #[new]
    fn new(py: Python<'_>, graph: &Graph, tensors: Vec<PyTensor>, exact: bool) -> PyResult<Self> {
        let inner = extractor(graph, tensors, exact).map_err(|error| convert(py, error))?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// Features of one batch, flat, and their shape.
    fn __call__(&self, py: Python<'_>, images: PyTensor) -> PyResult<(Py<PyArray1<f32>>, Vec<usize>)> {
        let images = Batch::new(images.0).map_err(|error| convert(py, error))?;
        let rows = enter(py, || self.inner.lock().unwrap_or_else(PoisonError::into_inner).features(images))?;
        let shape = rows.shape();
        Ok((PyArray1::from_vec(py, rows.floats).unbind(), shape))
    }

    /// Per step: name, kind, method, floating-point operations per image, seconds since the first batch.
    fn timings(&self, py: Python<'_>) -> PyResult<Vec<Row>> {
        let timings = self.inner.lock().unwrap_or_else(PoisonError::into_inner).timings();
        let timings = timings.map_err(|error| convert(py, error))?;
        Ok(timings.into_iter().map(|t| (t.name, t.kind, t.method, t.flops, t.seconds)).collect())
    }

    /// Bytes of activations, weights and the workers' memory.
    fn bytes(&self) -> [usize; 3] {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }
}
