//! `scan_folders`: the files of class folders.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::data::folder;
use crate::py::enter::enter;
use crate::py::error::stash;

/// The files below each folder (links followed) in torchvision's order, or None for a folder that does not exist.
#[pyfunction]
#[pyo3(signature = (folders, extensions=None))]
pub fn scan_folders(
    py: Python<'_>,
    folders: Vec<PathBuf>,
    extensions: Option<Vec<String>>,
) -> PyResult<Vec<Option<Vec<OsString>>>> {
    let found = enter(py, || {
        let mut asked = Instant::now();
        folder::scan(&folders, extensions.as_deref(), || {
            if asked.elapsed() < Duration::from_millis(50) {
                return Ok(());
            }
            asked = Instant::now();
            Python::with_gil(|py| py.check_signals().map_err(stash))
        })
    })?;
    // Strings, not the `pathlib.Path`s that a `PathBuf` becomes: torchvision's samples are strings, and much cheaper.
    let strings = |paths: Vec<PathBuf>| paths.into_iter().map(PathBuf::into_os_string).collect();
    Ok(found.into_iter().map(|paths| paths.map(strings)).collect())
}
