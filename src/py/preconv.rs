//! Feature extraction into memory or a store, and what a store needs besides.

use std::path::PathBuf;

use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::batches::Batches;
use super::enter::enter;
use super::graph::Graph;
use crate::engine::torch::{HostRows, TorchExtractor};
use crate::engine::{Dtype, Extract};
use crate::error::Result;
use crate::preconv::{self, Batch, Memory, Move, Place, RowFile, Target, Writer, extract};

/// (bytes in memory or None when written to a file, shape, type)
type Features = (Option<Py<PyArray1<u8>>>, Vec<usize>, &'static str);
/// (path, journal, rows in all where known, whether to go on with what is there)
type File = (PathBuf, Option<PathBuf>, Option<u64>, bool);

/// Features of a lowered model; `batches` yields (inputs, runs, tag) with inputs on the model's device.
#[pyfunction]
#[pyo3(signature = (graph, tensors, batches, file, expected, dtype))]
pub fn extract_torch(
    py: Python<'_>,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    batches: Py<PyAny>,
    file: Option<File>,
    expected: usize,
    dtype: Option<&str>,
) -> PyResult<Features> {
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    let tensors = tensors.into_iter().map(|t| t.0).collect();
    let model = TorchExtractor { graph: graph.inner.clone(), tensors, dtype: parse(dtype)? };
    run(py, model, batches, file, expected)
}

/// Features that somebody else computes: `batches` yields (features, runs, tag).
#[pyfunction]
#[pyo3(signature = (batches, file, expected, dtype))]
pub fn extract_rows(
    py: Python<'_>,
    batches: Py<PyAny>,
    file: Option<File>,
    expected: usize,
    dtype: Option<&str>,
) -> PyResult<Features> {
    run(py, Computed(parse(dtype)?), batches, file, expected)
}

/// The one loop behind every engine.
fn run<E: Extract<Inputs = tch::Tensor> + Send>(
    py: Python<'_>,
    mut model: E,
    batches: Py<PyAny>,
    file: Option<File>,
    expected: usize,
) -> PyResult<Features> {
    let batches = Batches { iterator: batches, read };
    if let Some((path, journal, total, resume)) = file {
        let shape = enter(py, move || {
            let mut writer = Writer::new(Target { path, journal, total, resume });
            extract(&mut model, batches, &mut writer)?;
            writer.finish()
        })?;
        return Ok((None, shape, ""));
    }
    let (memory, rows) = enter(py, move || {
        let mut memory = Memory { expected, ..Memory::default() };
        let rows = extract(&mut model, batches, &mut memory)?;
        Ok((memory, rows))
    })?;
    let dtype = memory.dtype.ok_or_else(|| PyValueError::new_err("no samples: there are no features to compute"))?;
    let shape = [&[rows], memory.row.as_slice()].concat();
    Ok((Some(PyArray1::from_vec(py, memory.bytes).unbind()), shape, name(dtype)))
}

fn read(item: Bound<'_, PyAny>) -> PyResult<Batch<tch::Tensor>> {
    let (inputs, runs, tag): (PyTensor, Vec<(u64, u64)>, String) = item.extract()?;
    Ok(Batch { inputs: inputs.0, place: Place { runs, tag } })
}

struct Computed(Option<Dtype>);

impl Extract for Computed {
    type Inputs = tch::Tensor;
    type Rows = HostRows;

    fn features(&mut self, features: tch::Tensor) -> Result<HostRows> {
        HostRows::new(&features, self.0)
    }
}

/// Copies rows of shape `row` between stores; each move is (first row there, first row here, rows, tag).
#[pyfunction]
#[pyo3(signature = (source, file, row, dtype, moves))]
pub fn copy_rows(
    py: Python<'_>,
    source: PathBuf,
    file: File,
    row: Vec<usize>,
    dtype: &str,
    moves: Vec<(u64, u64, u64, String)>,
) -> PyResult<()> {
    let dtype = parse(Some(dtype))?.unwrap_or(Dtype::Float32);
    let (path, journal, total, resume) = file;
    enter(py, move || {
        let moves: Vec<_> = moves.into_iter().map(|(from, to, count, tag)| Move { from, to, count, tag }).collect();
        RowFile::open(Target { path, journal, total, resume }, &row, dtype)?.copy(&source, &moves)
    })
}

/// CRC-32 of runs (first row, rows) of `row_bytes` each, None where the file ends before.
#[pyfunction]
#[pyo3(signature = (path, row_bytes, runs))]
pub fn row_checksums(
    py: Python<'_>,
    path: PathBuf,
    row_bytes: u64,
    runs: Vec<(u64, u64)>,
) -> PyResult<Vec<Option<u32>>> {
    let parts = |(start, count)| (preconv::HEADER + start * row_bytes, count * row_bytes);
    let parts: Vec<_> = runs.into_iter().map(parts).collect();
    enter(py, move || preconv::checksums(&path, &parts))
}

const TYPES: [Dtype; 4] = [Dtype::BFloat16, Dtype::Float16, Dtype::Float32, Dtype::Float64];

/// torch's name.
fn name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BFloat16 => "bfloat16",
        Dtype::Float16 => "float16",
        Dtype::Float32 => "float32",
        Dtype::Float64 => "float64",
    }
}

fn parse(dtype: Option<&str>) -> PyResult<Option<Dtype>> {
    let Some(text) = dtype else { return Ok(None) };
    let found = TYPES.into_iter().find(|dtype| name(*dtype) == text);
    found.map(Some).ok_or_else(|| PyValueError::new_err(format!("no type of features: {text}")))
}
