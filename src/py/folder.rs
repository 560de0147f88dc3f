//! `scan_folders`: the files of class folders.

use std::ffi::OsStr;
use std::path::{self, PathBuf};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyList, PyString, PyTuple};

use crate::data::folder::{self, Names, Rules, Tree};
use crate::os;
use crate::py::enter::enter;
use crate::py::error::stash;

/// (path, number of the folder) for each file, how many there are per folder, and the links that were not followed.
type Found<'py> = (Bound<'py, PyList>, Vec<Option<usize>>, Vec<PathBuf>);

/// The files below each folder (links followed) in torchvision's order: ([(path, number)], [files per folder, or None
/// for a folder that does not exist], [links that lead back to a folder above them, which were not followed]).
#[pyfunction]
#[pyo3(signature = (folders, numbers, extensions=None, skip_hidden=false))]
pub fn scan_folders<'py>(
    py: Python<'py>,
    folders: Vec<PathBuf>,
    numbers: Vec<Bound<'py, PyAny>>,
    extensions: Option<Vec<String>>,
    skip_hidden: bool,
) -> PyResult<Found<'py>> {
    let numbers: Vec<_> = numbers.into_iter().map(Bound::unbind).collect();
    let samples = PyList::empty(py).unbind();
    let (mut counts, mut loops) = (Vec::new(), Vec::new());
    enter(py, || {
        let rules = Rules { extensions: extensions.as_deref(), skip_hidden };
        let mut waiting = numbers.iter();
        let found = |tree: Option<Tree>| {
            let Some((number, tree)) = waiting.next().zip(tree) else {
                counts.push(None);
                return Ok(());
            };
            counts.push(Some(tree.folders.iter().map(|(_, names)| names.len()).sum()));
            loops.extend(tree.loops);
            // While the next folders are being listed.
            Python::with_gil(|py| {
                let mut folders = tree.folders.iter();
                let samples = samples.bind(py);
                folders.try_for_each(|(folder, names)| append(py, folder.as_os_str(), names, number.bind(py), samples))
            })
            .map_err(stash)
        };
        let mut asked = Instant::now();
        folder::scan(&folders, rules, found, || {
            if asked.elapsed() < Duration::from_millis(50) {
                return Ok(());
            }
            asked = Instant::now();
            Python::with_gil(|py| py.check_signals().map_err(stash))
        })
    })?;
    Ok((samples.into_bound(py), counts, loops))
}

/// Strings, not the `pathlib.Path`s that a `PathBuf` becomes: torchvision's samples are strings, and much cheaper.
fn append(
    py: Python<'_>,
    folder: &OsStr,
    names: &Names,
    number: &Bound<'_, PyAny>,
    samples: &Bound<'_, PyList>,
) -> PyResult<()> {
    let mut path = folder.as_encoded_bytes().to_vec();
    if path.last().is_some_and(|&last| !path::is_separator(last.into())) {
        path.extend_from_slice(path::MAIN_SEPARATOR_STR.as_bytes());
    }
    let start = path.len();
    for name in names.iter() {
        path.truncate(start);
        path.extend_from_slice(name);
        let text = match std::str::from_utf8(&path) {
            Ok(text) => PyString::new(py, text),
            // Bytes that are not UTF-8 become lone surrogates.
            Err(_) => os::name(&path).into_pyobject(py)?,
        };
        samples.append(PyTuple::new(py, [text.as_any(), number])?)?;
    }
    Ok(())
}
