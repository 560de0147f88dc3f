//! The doorway: every call that can take longer than a microsecond goes through [`enter`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;

use super::error::convert;
use crate::error::{Error, Result};

/// Runs `work` without the GIL; panics and errors become Python exceptions.
pub fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let result = py.allow_threads(|| catch_unwind(AssertUnwindSafe(work)));
    result.unwrap_or_else(|payload| Err(Error::Panic(message(payload.as_ref())))).map_err(|error| convert(py, error))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown panic".to_owned())
}
