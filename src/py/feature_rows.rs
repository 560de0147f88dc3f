//! Batches of features that lie in memory or in a mapped file, gathered without Python.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::{Device, Kind, Tensor};

use super::error::stash;
use crate::engine::cpu::{HostBatch, Targets};
use crate::error::{Error, Result};

/// (N, ...) float32 features, N labels (int64, or float32 (N, K)), the order of the epoch and where each batch ends.
pub struct FeatureRows {
    features: Tensor,
    labels: Tensor,
    order: Vec<i64>,
    ends: Vec<usize>,
    next: usize,
    /// Memory of batches that are done.
    spare: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl FeatureRows {
    /// # Errors
    /// `Argument` for tensors that are not contiguous in CPU memory, or an index outside of them.
    pub fn new(features: PyTensor, labels: PyTensor, order: Vec<i64>, ends: Vec<usize>) -> Result<Self> {
        let (features, labels) = (features.0, labels.0);
        let plain =
            |t: &Tensor, kinds: &[Kind]| t.device() == Device::Cpu && t.is_contiguous() && kinds.contains(&t.kind());
        let rows = features.size().first().copied().unwrap_or(0);
        if !plain(&features, &[Kind::Float]) || !plain(&labels, &[Kind::Int64, Kind::Float]) {
            return Err(Error::Argument(
                "features and labels must be contiguous, float32 and int64 or float32".to_owned(),
            ));
        }
        if labels.size().first() != Some(&rows) {
            return Err(Error::Argument(format!("{rows} features and labels of shape {:?}", labels.size())));
        }
        if let Some(wrong) = order.iter().find(|&&i| i < 0 || i >= rows) {
            return Err(Error::Argument(format!("index {wrong} is out of range for {rows} features")));
        }
        if ends.iter().any(|&end| end > order.len()) || !ends.is_sorted() {
            return Err(Error::Argument("batches that end outside of the order".to_owned()));
        }
        Ok(Self { features, labels, order, ends, next: 0, spare: Arc::default() })
    }

    fn gather(&self, rows: &[i64]) -> Gathered {
        let width: usize = self.features.size().iter().skip(1).map(|&d| d.unsigned_abs() as usize).product();
        // SAFETY: `new` made sure of contiguous float32 in CPU memory; the tensor lives as long as `self`.
        let features: &[f32] = unsafe { elements(&self.features) };
        let mut inputs = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        inputs.clear();
        for &row in rows {
            inputs.extend_from_slice(&features[row as usize * width..][..width]);
        }
        let mut shape: Vec<usize> = self.features.size().iter().map(|&d| d.unsigned_abs() as usize).collect();
        shape[0] = rows.len();
        let labels = match self.labels.kind() {
            Kind::Float => {
                let width = self.labels.numel() / self.labels.size()[0].max(1).unsigned_abs() as usize;
                // SAFETY: as above.
                let values: &[f32] = unsafe { elements(&self.labels) };
                Labels::Values(rows.iter().flat_map(|&r| &values[r as usize * width..][..width]).copied().collect())
            }
            _ => {
                // SAFETY: as above, int64.
                let classes: &[i64] = unsafe { elements(&self.labels) };
                Labels::Classes(rows.iter().map(|&r| classes[r as usize]).collect())
            }
        };
        Gathered { shape, inputs, labels, spare: Arc::clone(&self.spare) }
    }
}

/// # Safety
/// The tensor must be contiguous, in CPU memory and of elements `T`.
unsafe fn elements<T>(tensor: &Tensor) -> &[T] {
    match tensor.numel() {
        0 => &[],
        // SAFETY: the caller's promise.
        len => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) },
    }
}

impl Iterator for FeatureRows {
    type Item = Result<Gathered>;

    fn next(&mut self) -> Option<Self::Item> {
        // Ctrl-C: a look at the signals costs less than a microsecond when nobody else holds the GIL.
        if let Err(error) = Python::with_gil(|py| py.check_signals()) {
            return Some(Err(stash(error)));
        }
        let end = *self.ends.get(self.next)?;
        let start = if self.next == 0 { 0 } else { self.ends[self.next - 1] };
        self.next += 1;
        Some(Ok(self.gather(&self.order[start..end])))
    }
}

enum Labels {
    Classes(Vec<i64>),
    Values(Vec<f32>),
}

/// A batch in memory of its own, which goes back to the pool.
pub struct Gathered {
    shape: Vec<usize>,
    inputs: Vec<f32>,
    labels: Labels,
    spare: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl Drop for Gathered {
    fn drop(&mut self) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.inputs));
    }
}

impl HostBatch for Gathered {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn inputs(&self) -> &[f32] {
        &self.inputs
    }

    fn targets(&self) -> Targets<'_> {
        match &self.labels {
            Labels::Classes(classes) => Targets::Classes(classes),
            Labels::Values(values) => Targets::Values(values),
        }
    }
}
