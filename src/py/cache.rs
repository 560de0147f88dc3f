//! `Cache`: images that are decoded once.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use crate::data;
use crate::py::enter::enter;

/// Images that are decoded once: in memory, or in the file `path` for images that `key` shaped. At most `limit` bytes.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct Cache {
    cache: Arc<data::Cache>,
}

#[pymethods]
impl Cache {
    #[new]
    #[pyo3(signature = (limit, path=None, key=None))]
    fn new(py: Python<'_>, limit: u64, path: Option<PathBuf>, key: Option<&[u8]>) -> PyResult<Self> {
        let cache = enter(py, || match path {
            Some(path) => data::Cache::in_file(&path, key.unwrap_or_default(), limit),
            None => Ok(data::Cache::in_memory(limit)),
        })?;
        Ok(Self { cache: Arc::new(cache) })
    }

    /// Takes in what other processes have added.
    fn refresh(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, || {
            self.cache.refresh();
            Ok(())
        })
    }

    /// (images, bytes, limit in bytes, images for which there was no room, why nothing can be stored any more).
    fn status(&self) -> (u64, u64, u64, u64, Option<String>) {
        let status = self.cache.status();
        (status.images, status.bytes, status.limit, status.refused, status.trouble)
    }
}

impl Cache {
    pub(super) fn get(&self) -> Arc<data::Cache> {
        Arc::clone(&self.cache)
    }
}
