//! What every epoch crosses the border with, whoever computes it.

use pyo3::prelude::*;

use super::error::stash;
use super::record::{Names, record};
use crate::engine::Phase;
use crate::error::Result;
use crate::training::Metrics;

/// What every engine is told of an epoch.
pub struct Epoch {
    pub number: i64,
    pub phase: Phase,
    /// Batches per step of the optimizer.
    pub accumulate: usize,
    pub after: Callback,
}

impl FromPyObject<'_> for Epoch {
    fn extract_bound(epoch: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("epoch", epoch, |r| {
            let (number, phase) = (r.get("number")?, r.choice("phase", PHASES)?);
            Ok(Self { number, phase, accumulate: r.get("accumulate")?, after: Callback(r.get("after")?) })
        })
    }
}

const PHASES: &Names<Phase> = &[("training", Phase::Training), ("validation", Phase::Validation)];

/// [`Metrics`] as a dict.
#[derive(IntoPyObject)]
pub struct Totals {
    pub loss: f64,
    pub weight: f64,
    pub correct: Option<u64>,
    pub counted: u64,
    pub samples: u64,
    pub batches: usize,
    pub last: Option<f64>,
    pub gathered: usize,
}

impl FromPyObject<'_> for Totals {
    fn extract_bound(totals: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("totals", totals, |r| {
            Ok(Self {
                loss: r.get("loss")?,
                weight: r.get("weight")?,
                correct: r.get("correct")?,
                counted: r.get("counted")?,
                samples: r.get("samples")?,
                batches: r.get("batches")?,
                last: r.get("last")?,
                gathered: r.get("gathered")?,
            })
        })
    }
}

impl From<&Metrics> for Totals {
    fn from(metrics: &Metrics) -> Self {
        let &Metrics { loss, weight, correct, counted, samples, batches, last, gathered, .. } = metrics;
        Self { loss, weight, correct, counted, samples, batches, last, gathered }
    }
}

/// Reads a batch; None says that the rest is another engine's.
pub fn unless_none<T>(
    read: impl Fn(Bound<'_, PyAny>) -> PyResult<T>,
) -> impl Fn(Bound<'_, PyAny>) -> PyResult<Option<T>> {
    move |batch| if batch.is_none() { Ok(None) } else { read(batch).map(Some) }
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
