//! What Python hands over by name: dicts whose every key is asked for, and words out of a list. `cnnrs._records` has
//! their types.
//!
//! Dicts and not classes: a class of one extension is a stranger to the other (`cnnrs_libtorch` reads the same).

use std::cell::RefCell;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyDict;

/// What each name stands for.
pub type Names<T> = [(&'static str, T)];
/// What reads the rest of a record of each kind.
pub type Kinds<T> = Names<fn(&Record<'_>) -> PyResult<T>>;

pub struct Record<'py> {
    what: String,
    dict: Bound<'py, PyDict>,
    /// Keys that were asked for.
    known: RefCell<Vec<&'static str>>,
}

impl<'py> Record<'py> {
    fn new(what: &str, value: &Bound<'py, PyAny>) -> PyResult<Self> {
        let dict = value.downcast::<PyDict>().map_err(|_| {
            let found = value.get_type().name().map(|name| name.to_string()).unwrap_or_default();
            PyTypeError::new_err(format!("{what}: a dict expected, got {found}"))
        })?;
        Ok(Self { what: what.to_owned(), dict: dict.clone(), known: RefCell::default() })
    }

    /// # Errors
    /// `ValueError` for a key that is not there; what reading it raises.
    pub fn get<T: FromPyObject<'py>>(&self, key: &'static str) -> PyResult<T> {
        self.known.borrow_mut().push(key);
        let value = self.dict.get_item(key)?.ok_or_else(|| {
            PyValueError::new_err(format!("{}: key '{key}' is missing among {}", self.what, quoted(self.keys())))
        })?;
        value.extract().map_err(|error| {
            let py = value.py();
            let text = format!("{}: {key}: {}", self.what, error.value(py));
            if error.is_instance_of::<PyTypeError>(py) {
                PyTypeError::new_err(text)
            } else if error.is_instance_of::<PyValueError>(py) {
                PyValueError::new_err(text)
            } else {
                // Says more than its text, as an `OSError` does.
                error
            }
        })
    }

    /// One of the words that are known for a key.
    pub fn choice<T: Copy>(&self, key: &'static str, known: &Names<T>) -> PyResult<T> {
        choice(&format!("{}: {key}", self.what), &self.get::<PyBackedStr>(key)?, known)
    }

    /// An error about the value of a key.
    pub fn wrong(&self, key: &str, why: impl std::fmt::Display) -> PyErr {
        PyValueError::new_err(format!("{}: {key}: {why}", self.what))
    }

    fn keys(&self) -> Vec<String> {
        self.dict.keys().iter().map(|key| key.to_string()).collect()
    }

    fn finish<T>(self, read: T) -> PyResult<T> {
        let known = self.known.into_inner();
        if self.dict.len() == known.len() {
            return Ok(read);
        }
        let is_unknown = |key: &Bound<'py, PyAny>| !known.contains(&&*key.to_string());
        match self.dict.keys().iter().find(is_unknown) {
            Some(key) => {
                Err(PyValueError::new_err(format!("{}: unknown key '{key}', known are {}", self.what, quoted(known))))
            }
            None => Ok(read),
        }
    }
}

/// Reads all of a dict.
///
/// # Errors
/// `TypeError` for anything else; `ValueError` for a key that is missing or unknown.
pub fn record<'py, T>(
    what: &str,
    value: &Bound<'py, PyAny>,
    read: impl FnOnce(&Record<'py>) -> PyResult<T>,
) -> PyResult<T> {
    let record = Record::new(what, value)?;
    let found = read(&record)?;
    record.finish(found)
}

/// Reads all of a dict whose key `kind` says what else is in it.
///
/// # Errors
/// As [`record`]; `ValueError` for an unknown kind.
pub fn variant<T>(what: &str, value: &Bound<'_, PyAny>, kinds: &Kinds<T>) -> PyResult<T> {
    let mut record = Record::new(what, value)?;
    let kind: PyBackedStr = record.get("kind")?;
    let read = choice(what, &kind, kinds)?;
    record.what = format!("{what} '{kind}'");
    let found = read(&record)?;
    record.finish(found)
}

/// # Errors
/// `ValueError` for a name that is not known.
pub fn choice<T: Copy>(what: &str, name: &str, known: &Names<T>) -> PyResult<T> {
    let found = known.iter().find(|(one, _)| *one == name).map(|(_, value)| *value);
    let names = || quoted(known.iter().map(|(one, _)| *one));
    found.ok_or_else(|| PyValueError::new_err(format!("{what} '{name}' is unknown, known are {}", names())))
}

fn quoted<S: std::fmt::Display>(names: impl IntoIterator<Item = S>) -> String {
    names.into_iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
}
