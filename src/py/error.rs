//! The only file that knows Python's exceptions.

use std::cell::RefCell;
use std::io::ErrorKind;

use pyo3::exceptions::{PyIndexError, PyIsADirectoryError, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{DecodeKind, Error};

thread_local! {
    /// An exception raised by Python code that we called while the GIL was released around us.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Keeps a Python exception for [`convert`], while [`Error::Interrupted`] travels up through Rust.
pub fn stash(error: PyErr) -> Error {
    RAISED.with(|raised| *raised.borrow_mut() = Some(error));
    Error::Interrupted
}

pub fn convert(py: Python<'_>, error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::OutOfMemory { .. } | Error::NoMemory(_) => PyMemoryError::new_err(text),
        Error::Io { source, .. } if source.kind() == ErrorKind::OutOfMemory => PyMemoryError::new_err(text),
        Error::Io { path, source } => match source.raw_os_error() {
            // OSError(errno, text, filename) picks FileNotFoundError, PermissionError, ... by itself.
            // A str, as the file functions of Python give it, not a Path. On Windows the number is not errno's: OSError
            // takes it as its fourth argument and finds errno itself.
            Some(number) => {
                let system = cfg!(windows).then_some(number);
                PyOSError::new_err((number, describe(&source), path.into_os_string(), system))
            }
            None if source.kind() == ErrorKind::IsADirectory => PyIsADirectoryError::new_err(text),
            None => PyOSError::new_err(text),
        },
        Error::Decode { kind, .. } => undecodable(py, kind, text),
        Error::TooLarge { .. } => undecodable(py, DecodeKind::TooLarge, text),
        Error::NotFinite { .. } => ours(py, "NonFiniteLossError", text),
        Error::Panic(_) => ours(py, "CnnrsError", text),
        Error::Argument(_) | Error::Unsupported(_) => PyValueError::new_err(text),
        Error::Target { .. } => PyIndexError::new_err(text),
        Error::Shape { .. } | Error::Torch(_) | Error::Threads(_) | Error::Internal(_) => PyRuntimeError::new_err(text),
        Error::Refused(error) => {
            let error = convert(py, *error);
            // `cnnrs.training.feed` asks the user's own module about the batch.
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

fn undecodable(py: Python<'_>, kind: DecodeKind, text: String) -> PyErr {
    let error = ours(py, "DecodeError", text);
    let _ = error.value(py).setattr("kind", kind.name());
    error
}

/// An exception class of `cnnrs.errors` (PyO3 cannot make classes with two bases).
fn ours(py: Python<'_>, class: &str, text: String) -> PyErr {
    let raise = || -> PyResult<PyErr> {
        Ok(PyErr::from_value(py.import("cnnrs.errors")?.getattr(class)?.call1((text.as_str(),))?))
    };
    raise().unwrap_or_else(|error| error)
}
