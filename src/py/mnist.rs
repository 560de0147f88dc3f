//! `read_idx`: a file of MNIST.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::data::batch::{self, Buffers};
use crate::data::{DType, mnist};
use crate::py::dlpack;
use crate::py::enter::enter;

/// The uint8 array of an IDX file, raw or gzipped, as a capsule for `torch.from_dlpack`: (N, H, W) images or (N,) labels.
#[pyfunction]
pub fn read_idx(py: Python<'_>, path: PathBuf, labels: bool) -> PyResult<Bound<'_, PyAny>> {
    let kind = if labels { mnist::Kind::Labels } else { mnist::Kind::Images };
    let array = enter(py, || {
        let idx = mnist::read(&path, kind)?;
        batch::single(&Buffers::new(0), idx.shape, DType::Uint8, |bytes| bytes.copy_from_slice(&idx.data))
    })?;
    dlpack::export(py, array)
}
