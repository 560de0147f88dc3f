//! One epoch of `cnnrs.fit` on engine `python`.

use pyo3::prelude::*;

use super::batches::Batches;
use super::enter::enter;
use super::epoch::{Callback, Totals, parse_phase, totals, unless_none};
use super::error::stash;
use crate::engine::{Engine, Phase, Step};
use crate::error::Result;
use crate::fit::{Metrics, epoch};

/// One epoch of any module: `forward(inputs, targets, training)` returns (loss, weight, correct or None, counted, samples),
/// `backward()` adds the gradients of that loss, `update()` steps the optimizer. `before`: what another engine has done of
/// this epoch.
#[pyfunction]
#[pyo3(signature = (number, phase, forward, backward, update, batches, accumulate, after, before))]
#[allow(clippy::too_many_arguments)] // one doorway per engine; Python has given every argument its name already
pub fn fit_python(
    py: Python<'_>,
    number: i64,
    phase: &str,
    forward: Py<PyAny>,
    backward: Py<PyAny>,
    update: Py<PyAny>,
    batches: Py<PyAny>,
    accumulate: usize,
    after: Option<Py<PyAny>>,
    before: Option<Totals>,
) -> PyResult<Totals> {
    let mut metrics = Metrics::new(number, parse_phase(phase)?);
    if let Some((loss, weight, correct, counted, samples, batches, last, gathered)) = before {
        metrics = Metrics { loss, weight, correct, counted, samples, batches, last, gathered, ..metrics };
    }
    let metrics = enter(py, move || {
        let mut engine = PythonEngine { forward, backward, update };
        let after = Callback(after);
        epoch(
            metrics,
            &mut engine,
            Batches { iterator: batches, read: unless_none(|batch| batch.extract()) },
            accumulate,
            |_, batch, loss| after.call(batch, loss, |_| ()),
        )
    })?;
    Ok(totals(&metrics))
}

/// Calls the user's module, loss and optimizer.
struct PythonEngine {
    forward: Py<PyAny>,
    backward: Py<PyAny>,
    update: Py<PyAny>,
}

impl Engine for PythonEngine {
    type Batch = (Py<PyAny>, Py<PyAny>);

    fn forward(&mut self, (inputs, targets): Self::Batch, phase: Phase) -> Result<Step> {
        Python::with_gil(|py| {
            let result = self.forward.call1(py, (inputs, targets, phase == Phase::Training));
            let (loss, weight, correct, counted, samples) = result.and_then(|r| r.extract(py)).map_err(stash)?;
            Ok(Step { loss, weight, correct, counted, samples })
        })
    }

    fn backward(&mut self, update: bool) -> Result<()> {
        Python::with_gil(|py| self.backward.call0(py).map(drop)).map_err(stash)?;
        if update { self.update() } else { Ok(()) }
    }

    fn update(&mut self) -> Result<()> {
        Python::with_gil(|py| self.update.call0(py).map(drop)).map_err(stash)
    }

    fn undo(&mut self) -> Result<()> {
        Ok(()) // Python's own business: it knows the module's buffers.
    }
}
