//! `check_files`: what is wrong with image files.

use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;

use crate::data::check::{self, Finding};
use crate::error::Error;
use crate::py::enter::enter;
use crate::py::error::stash;
use crate::py::read_options::Limits;

/// (format or None, width, height, bytes of the file, hash of its contents, exception or None, whose fault it is or None).
type Row = (Option<&'static str>, usize, usize, u64, u64, Option<PyObject>, Option<&'static str>);

/// Reads and decodes each file, in threads; `progress` is called with the number of finished ones a few times a second.
#[pyfunction]
pub fn check_files(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    progress: PyObject,
    threads: usize,
    limits: Limits,
) -> PyResult<Vec<Row>> {
    let Limits(limits) = limits;
    let findings = enter(py, || {
        check::files(&paths, &limits, threads, Duration::from_millis(50), |done| {
            let told = |py: Python<'_>| {
                py.check_signals()?;
                progress.call1(py, (done,)).map(drop)
            };
            Python::with_gil(|py| told(py).map_err(stash))
        })
    })?;
    let row = |finding: Finding| {
        let fault = finding.fault();
        let Finding { format, width, height, size, hash, error, .. } = finding;
        let error = error.map(|error: Error| PyErr::from(error).into_value(py).into_any());
        (format, width, height, size, hash, error, fault)
    };
    Ok(findings.into_iter().map(row).collect())
}
