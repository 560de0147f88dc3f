//! The only file that knows Python's exceptions.

use std::cell::RefCell;
use std::io::ErrorKind;

use pyo3::exceptions::{PyIndexError, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;

thread_local! {
    /// An exception raised by Python code that we called while the GIL was released around us.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Keeps a Python exception for [`convert`], while [`Error::Interrupted`] travels up through Rust.
pub fn stash(error: PyErr) -> Error {
    RAISED.with(|raised| *raised.borrow_mut() = Some(error));
    Error::Interrupted
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::with_gil(|py| convert(py, error))
    }
}

pub fn convert(py: Python<'_>, error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::OutOfMemory { .. } => PyMemoryError::new_err(text),
        Error::Io { source, .. } if source.kind() == ErrorKind::OutOfMemory => PyMemoryError::new_err(text),
        Error::Io { path, source } => match source.raw_os_error() {
            // OSError(errno, text, filename) picks FileNotFoundError, PermissionError, ... by itself.
            // A str, as the file functions of Python give it, not a Path.
            Some(errno) => PyOSError::new_err((errno, describe(&source), path.into_os_string())),
            None => PyOSError::new_err(text),
        },
        Error::Decode { .. } | Error::TooLarge { .. } => ours(py, "DecodeError", text),
        Error::NotFinite { .. } => ours(py, "NonFiniteLossError", text),
        Error::Panic(_) => ours(py, "CnnrsError", text),
        Error::Argument(_) => PyValueError::new_err(text),
        Error::Target { .. } => PyIndexError::new_err(text),
        Error::Shape { .. } | Error::Torch(_) => PyRuntimeError::new_err(text),
        Error::Refused(error) => {
            let error = convert(py, *error);
            // `cnnrs.feed` asks the user's own module about the batch.
            let _ = error.value(py).setattr("refused", true);
            error
        }
        Error::Interrupted => RAISED
            .with(|raised| raised.borrow_mut().take())
            .unwrap_or_else(|| PyRuntimeError::new_err("interrupted without an exception")),
    }
}

/// The text without Rust's "(os error 2)".
fn describe(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// An exception class of `cnnrs.errors` (PyO3 cannot make classes with two bases).
fn ours(py: Python<'_>, class: &str, text: String) -> PyErr {
    let raise = || -> PyResult<PyErr> {
        Ok(PyErr::from_value(py.import("cnnrs.errors")?.getattr(class)?.call1((text.as_str(),))?))
    };
    raise().unwrap_or_else(|error| error)
}
