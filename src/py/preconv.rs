//! Feature extraction into memory or a store, and what a store needs besides.

use std::path::PathBuf;

use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::batches::Batches;
use super::dlpack::Kind;
use super::enter::enter;
use super::tensor::Tensor;
use crate::engine::{Dtype, Rows};
use crate::preconv::{self, Batch, Memory, Move, Place, RowFile, Target, Writer, extract};

/// (bytes in memory or None when written to a file, shape, type)
type Features = (Option<Py<PyArray1<u8>>>, Vec<usize>, &'static str);
/// (path, journal, rows in all where known, whether to go on with what is there)
type File = (PathBuf, Option<PathBuf>, Option<u64>, bool);

/// Keeps the features of all batches: `batches` yields (features, runs, tag), with features plain in CPU memory.
#[pyfunction]
#[pyo3(signature = (batches, file, expected))]
pub fn extract_rows(py: Python<'_>, batches: Py<PyAny>, file: Option<File>, expected: usize) -> PyResult<Features> {
    let batches = Batches { iterator: batches, read };
    if let Some((path, journal, total, resume)) = file {
        let shape = enter(py, move || {
            let mut writer = Writer::new(Target { path, journal, total, resume });
            extract(batches, &mut writer)?;
            writer.finish()
        })?;
        return Ok((None, shape, ""));
    }
    let (memory, rows) = enter(py, move || {
        let mut memory = Memory { expected, ..Memory::default() };
        let rows = extract(batches, &mut memory)?;
        Ok((memory, rows))
    })?;
    let dtype = memory.dtype.ok_or_else(|| PyValueError::new_err("no samples: there are no features to compute"))?;
    let shape = [&[rows], memory.row.as_slice()].concat();
    Ok((Some(PyArray1::from_vec(py, memory.bytes).unbind()), shape, name(dtype)))
}

fn read(item: Bound<'_, PyAny>) -> PyResult<Batch> {
    let (features, runs, tag): (Tensor, Vec<(u64, u64)>, String) = item.extract()?;
    let dtype = match features.kind() {
        Kind::BFloat16 => Some(Dtype::BFloat16),
        Kind::Float16 => Some(Dtype::Float16),
        Kind::Float32 => Some(Dtype::Float32),
        Kind::Float64 => Some(Dtype::Float64),
        Kind::Uint8 | Kind::Int64 | Kind::Other(..) => None,
    };
    match dtype {
        Some(dtype) if features.bytes().is_some() => {
            Ok(Batch { rows: Box::new(FeatureTensor { features, dtype }), place: Place { runs, tag } })
        }
        _ => Err(PyValueError::new_err(format!(
            "features must be contiguous float16, bfloat16, float32 or float64 on cpu, got {}",
            features.describe()
        ))),
    }
}

/// The features of one batch in the tensor they came in.
struct FeatureTensor {
    features: Tensor,
    dtype: Dtype,
}

impl Rows for FeatureTensor {
    fn shape(&self) -> Vec<usize> {
        self.features.shape().to_vec()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> &[u8] {
        self.features.bytes().unwrap_or_default()
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
    let dtype = parse(dtype)?;
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

fn parse(text: &str) -> PyResult<Dtype> {
    let found = TYPES.into_iter().find(|dtype| name(*dtype) == text);
    found.ok_or_else(|| PyValueError::new_err(format!("no type of features: {text}")))
}
