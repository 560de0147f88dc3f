//! Feature extraction into memory or a store, and what a store needs besides.

use std::borrow::Cow;
use std::path::PathBuf;

use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::batches::Batches;
use super::dlpack::Kind;
use super::enter::enter;
use super::record::{Names, choice, record};
use super::tensor::Tensor;
use crate::engine::{Dtype, Rows};
use crate::features::journal::{self, Run};
use crate::features::{self, Batch, Memory, Move, Place, RowFile, Target, Writer, extract};

/// (bytes in memory or None when written to a file, shape, type)
type Features = (Option<Py<PyArray1<u8>>>, Vec<usize>, &'static str);
/// Where rows are written.
pub struct File(Target);

impl FromPyObject<'_> for File {
    fn extract_bound(file: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("file", file, |r| {
            let (path, journal) = (r.get("path")?, r.get("journal")?);
            Ok(Self(Target { path, journal, total: r.get("total")?, resume: r.get("resume")? }))
        })
    }
}

/// Keeps the features of all batches: `batches` yields (features, runs, identities), with features plain in CPU memory.
#[pyfunction]
#[pyo3(signature = (batches, file, expected))]
pub fn extract_rows(py: Python<'_>, batches: Py<PyAny>, file: Option<File>, expected: usize) -> PyResult<Features> {
    let batches = Batches { iterator: batches, read };
    if let Some(File(target)) = file {
        let shape = enter(py, move || {
            let mut writer = Writer::new(target);
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
    let (features, runs, ids): (Tensor, Vec<(u64, u64)>, Vec<String>) = item.extract()?;
    let dtype = match features.kind() {
        Kind::BFloat16 => Some(Dtype::BFloat16),
        Kind::Float16 => Some(Dtype::Float16),
        Kind::Float32 => Some(Dtype::Float32),
        Kind::Float64 => Some(Dtype::Float64),
        Kind::Uint8 | Kind::Int64 | Kind::Other(..) => None,
    };
    match dtype {
        Some(dtype) if features.bytes().is_some() => {
            Ok(Batch { rows: Box::new(FeatureTensor { features, dtype }), place: Place { runs, ids } })
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

/// Copies rows of shape `row` between stores; each move is (first row there, first row here, rows, identities).
#[pyfunction]
#[pyo3(signature = (source, file, row, dtype, moves))]
pub fn copy_rows(
    py: Python<'_>,
    source: PathBuf,
    file: File,
    row: Vec<usize>,
    dtype: &str,
    moves: Vec<(u64, u64, u64, Vec<String>)>,
) -> PyResult<()> {
    let dtype = choice("type of features", dtype, TYPES)?;
    let File(target) = file;
    enter(py, move || {
        let moves: Vec<_> = moves.into_iter().map(|(from, to, count, ids)| Move { from, to, count, ids }).collect();
        RowFile::open(target, &row, dtype)?.copy(&source, moves)
    })
}

/// The line of a journal that says `json`.
#[pyfunction]
pub fn journal_line(json: &str) -> Cow<'static, [u8]> {
    journal::line(json).into_bytes().into()
}

/// (JSON of the header or None, runs (first row, rows, checksum, identities), where the records begin and end).
type Parsed = (Option<String>, Vec<Run>, (usize, usize));

#[pyfunction]
pub fn parse_journal(py: Python<'_>, data: &[u8]) -> PyResult<Parsed> {
    let journal = enter(py, || Ok(journal::parse(data)))?;
    Ok((journal.header, journal.runs, journal.records))
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
    let parts = |(start, count)| (features::HEADER + start * row_bytes, count * row_bytes);
    let parts: Vec<_> = runs.into_iter().map(parts).collect();
    enter(py, move || features::checksums(&path, &parts))
}

/// By torch's names.
const TYPES: &Names<Dtype> = &[
    ("bfloat16", Dtype::BFloat16),
    ("float16", Dtype::Float16),
    ("float32", Dtype::Float32),
    ("float64", Dtype::Float64),
];

fn name(dtype: Dtype) -> &'static str {
    TYPES.iter().find(|(_, one)| *one == dtype).map_or("", |(name, _)| name)
}
