//! Feature extraction on either engine, into memory or a `.npy` file.

use std::path::PathBuf;

use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::batches::Batches;
use super::enter::enter;
use super::error::stash;
use super::graph::Graph;
use crate::engine::Extract;
use crate::engine::torch::{HostRows, TorchExtractor};
use crate::error::Result;
use crate::preconv::{Memory, NpyFile, extract};

/// (bytes in memory or None when written to `path`, shape, NumPy type string)
type Features = (Option<Py<PyArray1<u8>>>, Vec<usize>, Option<&'static str>);

/// Features of a lowered model; `batches` yields inputs on the model's device, `expected` is the number of rows (0:
/// unknown).
#[pyfunction]
#[pyo3(signature = (graph, tensors, batches, path, expected))]
pub fn extract_torch(
    py: Python<'_>,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    batches: Py<PyAny>,
    path: Option<PathBuf>,
    expected: usize,
) -> PyResult<Features> {
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    let model = TorchExtractor { graph: graph.inner.clone(), tensors: tensors.into_iter().map(|t| t.0).collect() };
    let batches = Batches { iterator: batches, read: |x: Bound<'_, PyAny>| x.extract::<PyTensor>().map(|t| t.0) };
    run(py, model, batches, path, expected)
}

/// Features of any callable that maps inputs to a tensor.
#[pyfunction]
#[pyo3(signature = (model, batches, path, expected))]
pub fn extract_python(
    py: Python<'_>,
    model: Py<PyAny>,
    batches: Py<PyAny>,
    path: Option<PathBuf>,
    expected: usize,
) -> PyResult<Features> {
    let batches = Batches { iterator: batches, read: |x: Bound<'_, PyAny>| Ok(x.unbind()) };
    run(py, PythonExtractor(model), batches, path, expected)
}

fn run<E: Extract + Send>(
    py: Python<'_>,
    mut model: E,
    batches: impl Iterator<Item = Result<E::Inputs>> + Send,
    path: Option<PathBuf>,
    expected: usize,
) -> PyResult<Features> {
    if let Some(path) = path {
        let shape = enter(py, move || {
            let mut file = NpyFile::create(&path)?;
            extract(&mut model, batches, &mut file)?;
            file.finish()
        })?;
        return Ok((None, shape, None));
    }
    let (memory, rows) = enter(py, move || {
        let mut memory = Memory { expected, ..Memory::default() };
        let rows = extract(&mut model, batches, &mut memory)?;
        Ok((memory, rows))
    })?;
    let dtype = memory.dtype.ok_or_else(|| PyValueError::new_err("no samples: there are no features to compute"))?;
    let shape = [&[rows], memory.row.as_slice()].concat();
    Ok((Some(PyArray1::from_vec(py, memory.bytes).unbind()), shape, Some(dtype.descr())))
}

struct PythonExtractor(Py<PyAny>);

impl Extract for PythonExtractor {
    type Inputs = Py<PyAny>;
    type Rows = HostRows;

    fn features(&mut self, inputs: Py<PyAny>) -> Result<HostRows> {
        let output = Python::with_gil(|py| self.0.call1(py, (inputs,)).and_then(|out| out.extract::<PyTensor>(py)));
        HostRows::new(&output.map_err(stash)?.0)
    }
}
