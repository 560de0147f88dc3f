//! `cnnrs._cnnrs.CpuNetwork`: a frozen network on the cpu engine, which borrows the memory of the user's tensors.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::enter::enter;
use super::error::convert;
use super::graph::Graph;
use super::tensor::{self, Tensor};
use crate::data::DType;
use crate::data::batch::{self, Buffers};
use crate::engine::cpu::infer::{self, Frozen, Isa, Options, Parameters};
use crate::error::Error;
use crate::model;

/// `None` for tensors that are not plain float32: only counters of batch norm may be.
struct Weights(Vec<Tensor>);

impl Parameters for Arc<Weights> {
    fn floats(&self, index: usize) -> Option<&[f32]> {
        self.0.get(index)?.elements()
    }
}

fn weights(graph: &Graph, tensors: Vec<Tensor>) -> PyResult<Arc<Weights>> {
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    Ok(Arc::new(Weights(tensors)))
}

impl Weights {
    /// The same, as they are now; None where nothing has moved.
    fn moved(&self, py: Python<'_>) -> PyResult<Option<Self>> {
        for tensor in &self.0 {
            if tensor.has_moved(py)? {
                return Ok(Some(Self(self.0.iter().map(|tensor| tensor.again(py)).collect::<PyResult<_>>()?)));
            }
        }
        Ok(None)
    }
}

/// Compiled for the shape of the first batch, and again when it changes; the weights are read then.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct CpuNetwork {
    inner: Mutex<Frozen<Arc<Weights>>>,
    weights: Mutex<Arc<Weights>>,
    graph: model::Graph,
    options: Options,
    torch: Option<PathBuf>,
    /// Memory of features that nobody looks at any more.
    buffers: Arc<Buffers>,
}

/// One batch is computed while up to four wait for the disk.
const BUFFERS: usize = 5;

/// (name, kind, method, floating-point operations per image, seconds so far)
type Row = (String, &'static str, &'static str, u64, f64);

#[pymethods]
impl CpuNetwork {
    /// `tensors`: contiguous; `workers`: number of threads; `exact`: no Winograd convolution; `torch`: the library whose
    /// threads are used, where it has some of OpenMP's.
    #[new]
    #[pyo3(signature = (graph, tensors, workers, exact, torch=None))]
    fn new(
        py: Python<'_>,
        graph: &Graph,
        tensors: Vec<Tensor>,
        workers: usize,
        exact: bool,
        torch: Option<PathBuf>,
    ) -> PyResult<Self> {
        let options = Options { workers, exact, isa: Isa::best() };
        let (weights, graph) = (weights(graph, tensors)?, graph.inner.clone());
        let inner = Frozen::new(graph.clone(), Arc::clone(&weights), options, torch.as_deref());
        let inner = inner.map_err(|error| convert(py, error))?;
        let (inner, weights) = (Mutex::new(inner), Mutex::new(weights));
        Ok(Self { inner, weights, graph, options, torch, buffers: Buffers::new(BUFFERS) })
    }

    /// Why a graph cannot be computed on inputs of this shape; None where it can.
    #[staticmethod]
    fn obstacle(graph: &Graph, tensors: Vec<Tensor>, input: Vec<usize>) -> PyResult<Option<String>> {
        Ok(infer::obstacle(&graph.inner, &weights(graph, tensors)?, &input))
    }

    /// The layers that would compute in int8, or in bfloat16, and how many convolutions and linear layers there are.
    #[staticmethod]
    fn byte_layers(
        py: Python<'_>,
        graph: &Graph,
        tensors: Vec<Tensor>,
        input: Vec<usize>,
        bf16: bool,
    ) -> PyResult<(Vec<String>, usize)> {
        let weights = weights(graph, tensors)?;
        infer::byte_layers(&graph.inner, &weights, &input, bf16).map_err(|error| convert(py, error))
    }

    /// Features of one batch, contiguous float32 (N, ...).
    fn __call__<'py>(&self, py: Python<'py>, images: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let images = tensor::contiguous(images)?;
        self.follow(py)?;
        let (inner, buffers) = (&self.inner, &self.buffers);
        let features = enter(py, move || {
            let floats = images.elements::<f32>().ok_or_else(|| {
                let found = images.describe();
                Error::Argument(format!("engine 'cpu' reads contiguous float32 images on cpu, got {found}"))
            })?;
            let mut network = inner.lock().unwrap_or_else(PoisonError::into_inner);
            let shape = network.output(images.shape())?;
            let mut features = batch::single(buffers, shape, DType::Float32, |_| ())?;
            network.run(images.shape(), floats, features.f32_mut())?;
            Ok(features)
        })?;
        tensor::new(py, features)
    }

    /// Looks at the values that will be bytes, of one batch.
    fn look(&self, py: Python<'_>, images: &Bound<'_, PyAny>) -> PyResult<()> {
        let images = tensor::contiguous(images)?;
        self.follow(py)?;
        let inner = &self.inner;
        enter(py, move || {
            let floats = images.elements::<f32>().ok_or_else(|| {
                Error::Argument(format!("int8 looks at contiguous float32 images on cpu, got {}", images.describe()))
            })?;
            inner.lock().unwrap_or_else(PoisonError::into_inner).look(images.shape(), floats)
        })
    }

    /// (operation, lowest, highest) of what was seen.
    fn ranges(&self) -> Vec<(usize, f32, f32)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).ranges()
    }

    /// From now on layers that gain by it compute in int8, in these ranges.
    #[allow(clippy::needless_pass_by_value)]
    fn quantize(&self, py: Python<'_>, shape: Vec<usize>, ranges: Vec<(usize, f32, f32)>) -> PyResult<()> {
        let inner = &self.inner;
        enter(py, move || inner.lock().unwrap_or_else(PoisonError::into_inner).quantize(&shape, &ranges))
    }

    /// From now on layers that gain by it compute in bfloat16.
    #[allow(clippy::needless_pass_by_value)]
    fn in_bf16(&self, py: Python<'_>, shape: Vec<usize>) -> PyResult<()> {
        let inner = &self.inner;
        enter(py, move || inner.lock().unwrap_or_else(PoisonError::into_inner).in_bf16(&shape))
    }

    /// Whether this processor has an instruction for bfloat16.
    #[staticmethod]
    fn bf16_is_fast() -> bool {
        infer::bf16_is_fast()
    }

    /// Whether this processor has instructions for int8.
    #[staticmethod]
    fn bytes_are_fast() -> bool {
        infer::bytes_are_fast()
    }

    /// Whether the next batch of the same shape is computed with the weights as they are: they lie where they lay, and
    /// have the bits, that the plan was made of.
    fn is_current(&self, py: Python<'_>) -> PyResult<bool> {
        for tensor in &self.lock_weights(py).0 {
            if tensor.has_moved(py)? {
                return Ok(false);
            }
        }
        enter(py, || Ok(self.inner.lock().unwrap_or_else(PoisonError::into_inner).is_current()))
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

impl CpuNetwork {
    fn lock_weights(&self, py: Python<'_>) -> MutexGuard<'_, Arc<Weights>> {
        // Whoever has this lock may have let go of the GIL: nobody waits for it with the GIL in hand.
        loop {
            match self.weights.try_lock() {
                Ok(weights) => return weights,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => py.allow_threads(|| std::thread::sleep(Duration::from_micros(50))),
            }
        }
    }

    /// Weights that have been given other memory are read from there.
    fn follow(&self, py: Python<'_>) -> PyResult<()> {
        let mut weights = self.lock_weights(py);
        let Some(moved) = weights.moved(py)? else { return Ok(()) };
        let moved = Arc::new(moved);
        let compiled = Frozen::new(self.graph.clone(), Arc::clone(&moved), self.options, self.torch.as_deref());
        let compiled = compiled.map_err(|error| convert(py, error))?;
        *weights = moved;
        let old = py.allow_threads(|| {
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let mut compiled = compiled;
            compiled.inherit(&mut inner);
            std::mem::replace(&mut *inner, compiled)
        });
        drop(old);
        Ok(())
    }
}
