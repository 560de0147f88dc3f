//! Batches out of a Python iterator.

use pyo3::prelude::*;

use super::error::stash;
use crate::error::Result;

/// Pulls items out of a Python iterator, taking the GIL only for that; Ctrl-C stops it.
pub struct Batches<R> {
    pub iterator: Py<PyAny>,
    /// Reads one item.
    pub read: R,
}

impl<T, R: Fn(Bound<'_, PyAny>) -> PyResult<T>> Iterator for Batches<R> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Self::Item> {
        Python::with_gil(|py| {
            let next = py.check_signals().and_then(|()| self.iterator.bind(py).try_iter()?.next().transpose());
            next.and_then(|batch| batch.map(&self.read).transpose()).map_err(stash).transpose()
        })
    }
}
