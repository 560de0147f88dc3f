//! `Loader` and `Memory`: the threads behind `cnnrs.DataLoader`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList};

use crate::data::{self, Input, Plan, Raw, Ready, Rows, Sample};
use crate::image;
use crate::memory::copied;
use crate::py::cache::Cache;
use crate::py::dlpack::{self, Kind};
use crate::py::enter::enter;
use crate::py::read_options::ReadOptions;
use crate::py::record::record;
use crate::py::tensor::Tensor;
use crate::py::transform;
use crate::threads;

/// How long a wait for a batch lasts before Python may look for Ctrl-C.
const SLICE: Duration = Duration::from_millis(50);

/// Buffers and scratch space that survive an epoch.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct Memory {
    memory: Mutex<(u32, Arc<data::Memory>)>,
    batches: usize,
}

#[pymethods]
impl Memory {
    #[new]
    fn new(batches: usize) -> Self {
        Self { memory: Mutex::new((std::process::id(), data::Memory::new(batches))), batches }
    }
}

impl Memory {
    /// The memory of this process: after a fork the parent's may be locked by a thread that does not exist here.
    fn get(&self) -> Arc<data::Memory> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.0 != std::process::id() {
            *memory = (std::process::id(), data::Memory::new(self.batches));
        }
        Arc::clone(&memory.1)
    }
}

/// Loads batches of samples in order, ahead of the consumer.
///
/// `rows` is a tensor of (N, H, W) uint8 gray images, for `submit_rows`; `cache` keeps images behind the first of the
/// operations.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct Loader {
    loader: Mutex<data::Loader>,
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (transform, read, seed, threads, memory, rows=None, cache=None))]
    fn new(
        transform: &Bound<'_, PyAny>,
        read: ReadOptions,
        seed: u64,
        threads: usize,
        memory: &Memory,
        rows: Option<Tensor>,
        cache: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (transform, output) = transform::transform(transform)?;
        let rows = rows.map(gray_images).transpose()?;
        let scaled = if read.scaled { transform.first_size() } else { None };
        let ReadOptions { limits, exif, truncated, left, .. } = read;
        let read = image::ReadOptions { limits, exif, truncated, left, scaled };
        let mut plan = Plan::new(transform, output, read, seed);
        plan.rows = rows;
        if let Some(cache) = cache {
            let (cache, ops) =
                record("cache", cache, |r| Ok((r.get::<PyRef<'_, Cache>>("images")?.get(), r.get("ops")?)))?;
            plan = plan.keeping(cache, ops);
        }
        Ok(Self { loader: Mutex::new(data::Loader::new(plan, threads, memory.get(), memory.batches)) })
    }

    /// Asks for the batch of these files; `positions` are their places in the epoch. Returns the batch's ticket.
    fn submit_files(
        &self,
        py: Python<'_>,
        indices: Vec<i64>,
        positions: Vec<u64>,
        paths: Vec<PathBuf>,
    ) -> PyResult<u64> {
        self.submit(py, indices, positions, paths.into_iter().map(Input::File))
    }

    /// Asks for the batch of these rows of `rows`; `position` is the place of the first one in the epoch.
    fn submit_rows(&self, py: Python<'_>, indices: Vec<i64>, position: u64) -> PyResult<u64> {
        let rows = indices.iter().map(|&i| Input::Row(usize::try_from(i).unwrap_or(usize::MAX)));
        let rows: Vec<_> = rows.collect();
        self.submit(py, indices, position.., rows)
    }

    /// Asks for the batch of these images, each (height, width, channels, packed bytes).
    fn submit_pixels(
        &self,
        py: Python<'_>,
        indices: Vec<i64>,
        positions: Vec<u64>,
        images: Vec<Pixels>,
    ) -> PyResult<u64> {
        let inputs: PyResult<Vec<_>> = images.into_iter().map(|image| Ok(Input::Pixels(raw(image)?))).collect();
        self.submit(py, indices, positions, inputs?)
    }

    /// Waits for the batch of `ticket` and forgets older ones: ("batch", capsule), ("samples", capsules) when their shapes differ,
    /// ("pixels", [(height, width, channels, bytes)]), or ("failed", [(place in the batch, exception)]).
    fn poll<'py>(&self, py: Python<'py>, ticket: u64) -> PyResult<(&'static str, Bound<'py, PyAny>)> {
        let ready = loop {
            let ready = enter(py, || self.loader.lock().unwrap_or_else(PoisonError::into_inner).poll(ticket, SLICE))?;
            // Also after a quick success: a loop over many small batches must notice Ctrl-C too.
            py.check_signals()?;
            if let Some(ready) = ready {
                break ready;
            }
        };
        match ready {
            Ready::Batch(batch) => Ok(("batch", dlpack::export(py, batch)?)),
            Ready::Ragged(samples) => {
                let samples = samples.into_iter().map(|sample| dlpack::export(py, sample));
                Ok(("samples", PyList::new(py, samples.collect::<PyResult<Vec<_>>>()?)?.into_any()))
            }
            Ready::Pixels(images) => {
                let images = images.into_iter().map(|raw| {
                    // Not `new`, which panics when there is no memory.
                    let bytes = PyBytes::new_with(py, raw.data.len(), |bytes| {
                        bytes.copy_from_slice(&raw.data);
                        Ok(())
                    })?;
                    (raw.height, raw.width, raw.channels, bytes).into_pyobject(py)
                });
                Ok(("pixels", PyList::new(py, images.collect::<PyResult<Vec<_>>>()?)?.into_any()))
            }
            Ready::Failed(failures) => {
                let failures = failures.into_iter().map(|failure| (failure.sample, PyErr::from(failure.error)));
                let failures = failures.map(|(i, error)| (i, error.into_value(py)));
                Ok(("failed", PyList::new(py, failures.collect::<Vec<_>>())?.into_any()))
            }
        }
    }

    /// Whether `poll` would not wait.
    fn ready(&self, ticket: u64) -> bool {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner).is_ready(ticket)
    }

    /// Whether one of the files so far had an EXIF orientation other than upright.
    fn saw_turned(&self) -> bool {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner).saw_turned()
    }

    /// Gives a failed sample of the batch pixels that somebody else decoded.
    fn retry(&self, py: Python<'_>, ticket: u64, sample: usize, pixels: Pixels) -> PyResult<()> {
        let raw = raw(pixels)?;
        enter(py, || self.loader.lock().unwrap_or_else(PoisonError::into_inner).retry(ticket, sample, raw))
    }

    /// Does without these failed samples of the batch: rows of a "batch" without meaning, absent otherwise.
    fn drop_samples(&self, ticket: u64, samples: Vec<usize>) {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner).drop_samples(ticket, &samples);
    }

    /// Forgets this batch, if it is still on its way: an exception of `poll` may come before or after it was taken.
    fn discard(&self, ticket: u64) {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner).discard(ticket);
    }
}

impl Loader {
    fn submit(
        &self,
        py: Python<'_>,
        indices: Vec<i64>,
        positions: impl IntoIterator<Item = u64> + Send,
        inputs: impl IntoIterator<Item = Input> + Send,
    ) -> PyResult<u64> {
        enter(py, || {
            let samples = indices.into_iter().zip(inputs).zip(positions);
            let samples =
                samples.map(|((index, input), position)| Sample { index: index.cast_unsigned(), position, input });
            self.loader.lock().unwrap_or_else(PoisonError::into_inner).submit(samples.collect())
        })
    }
}

/// Threads that `num_workers=None` means: the cores this process may use.
#[pyfunction]
pub fn available_threads() -> usize {
    threads::available()
}

type Pixels = (usize, usize, usize, PyBackedBytes);

fn raw((height, width, channels, data): Pixels) -> PyResult<Raw> {
    Ok(Raw { height, width, channels, data: copied(&data)? })
}

/// Gray images that lie in a tensor.
struct GrayImages(Tensor);

impl AsRef<[u8]> for GrayImages {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes().unwrap_or_default()
    }
}

fn gray_images(images: Tensor) -> PyResult<Rows> {
    match *images.shape() {
        [_, height, width] if images.is_plain(Kind::Uint8) => {
            Ok(Rows { data: Box::new(GrayImages(images)), height, width })
        }
        _ => Err(PyValueError::new_err(format!(
            "contiguous uint8 images (N, H, W) on cpu expected, got {}",
            images.describe()
        ))),
    }
}
