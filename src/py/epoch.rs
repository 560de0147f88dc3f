//! What every epoch crosses the border with, whoever computes it.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::error::stash;
use crate::engine::Phase;
use crate::error::Result;
use crate::fit::Metrics;

/// [`Metrics`]: (loss, weight, correct or None, counted, samples, batches, last or None, gathered)
pub type Totals = (f64, f64, Option<u64>, u64, u64, usize, Option<f64>, usize);

pub fn totals(metrics: &Metrics) -> Totals {
    let &Metrics { loss, weight, correct, counted, samples, batches, last, gathered, .. } = metrics;
    (loss, weight, correct, counted, samples, batches, last, gathered)
}

/// Reads a batch; None says that the rest is another engine's.
pub fn unless_none<T>(
    read: impl Fn(Bound<'_, PyAny>) -> PyResult<T>,
) -> impl Fn(Bound<'_, PyAny>) -> PyResult<Option<T>> {
    move |batch| if batch.is_none() { Ok(None) } else { read(batch).map(Some) }
}

pub fn parse_phase(phase: &str) -> PyResult<Phase> {
    match phase {
        "training" => Ok(Phase::Training),
        "validation" => Ok(Phase::Validation),
        other => Err(PyValueError::new_err(format!("phase must be 'training' or 'validation', got '{other}'"))),
    }
}

/// What the user wants called after every batch: `after(batch, mean loss)` returns None, or new options for each of the
/// optimizer's rows: (lr, momentum, dampening, weight_decay) or (lr, beta1, beta2, eps, weight_decay).
pub struct Callback(pub Option<Py<PyAny>>);

impl Callback {
    pub fn call(&self, batch: usize, loss: f64, set_options: impl FnOnce(&[Vec<f64>])) -> Result<()> {
        let Some(after) = &self.0 else { return Ok(()) };
        let rows: Option<Vec<Vec<f64>>> =
            Python::with_gil(|py| after.call1(py, (batch, loss))?.extract(py)).map_err(stash)?;
        if let Some(rows) = rows {
            set_options(&rows);
        }
        Ok(())
    }
}
