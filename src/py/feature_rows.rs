//! Batches of features that lie in memory or in a mapped file, gathered without Python.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;

use super::error::stash;
use super::tensor::Tensor;
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
    pub fn new(features: Tensor, labels: Tensor, order: Vec<i64>, ends: Vec<usize>) -> Result<Self> {
        let rows = features.shape().first().copied().unwrap_or(0);
        let known = match labels.shape().len() {
            1 => labels.elements::<i64>().is_some(),
            2 => labels.elements::<f32>().is_some(),
            _ => false,
        };
        if features.elements::<f32>().is_none() || !known {
            return Err(Error::Argument(format!(
                "features must be contiguous float32 and labels int64 (N,) or float32 (N, K), on cpu; got {} and {}",
                features.describe(),
                labels.describe()
            )));
        }
        if labels.shape().first() != Some(&rows) {
            return Err(Error::Argument(format!("{rows} features and labels of shape {:?}", labels.shape())));
        }
        if let Some(wrong) = order.iter().find(|&&i| usize::try_from(i).map_or(true, |i| i >= rows)) {
            return Err(Error::Argument(format!("index {wrong} is out of range for {rows} features")));
        }
        if ends.iter().any(|&end| end > order.len()) || !ends.is_sorted() {
            return Err(Error::Argument("batches that end outside of the order".to_owned()));
        }
        Ok(Self { features, labels, order, ends, next: 0, spare: Arc::default() })
    }

    fn gather(&self, rows: &[i64]) -> Gathered {
        let mut inputs = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        inputs.clear();
        for row in picked(&self.features, rows) {
            inputs.extend_from_slice(row);
        }
        let mut shape = self.features.shape().to_vec();
        shape[0] = rows.len();
        let labels = match self.labels.elements::<i64>() {
            Some(classes) => Labels::Classes(rows.iter().map(|&r| classes[r as usize]).collect()),
            None => Labels::Values(picked(&self.labels, rows).flatten().copied().collect()),
        };
        Gathered { shape, inputs, labels, spare: Arc::clone(&self.spare) }
    }
}

/// These rows of a float32 tensor; `new` has checked the numbers.
fn picked<'a>(tensor: &'a Tensor, rows: &'a [i64]) -> impl Iterator<Item = &'a [f32]> {
    let width: usize = tensor.shape().iter().skip(1).product();
    let elements = tensor.elements::<f32>().unwrap_or_default();
    rows.iter().map(move |&row| &elements[row as usize * width..][..width])
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
