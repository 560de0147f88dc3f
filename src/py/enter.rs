//! The doorway: every call that can take longer than a microsecond goes through [`enter`].

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;

use super::error::convert;
use crate::error::{Error, Result, panic_text};

/// Runs `work` without the GIL; panics and errors become Python exceptions.
pub fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let result = py.allow_threads(|| catch_unwind(AssertUnwindSafe(work)));
    result.unwrap_or_else(|payload| Err(Error::Panic(panic_text(payload.as_ref())))).map_err(|error| convert(py, error))
}
