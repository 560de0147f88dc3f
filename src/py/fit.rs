//! One epoch of `cnnrs.fit` on engine `python`.

use pyo3::prelude::*;

use super::batches::Batches;
use super::enter::enter;
use super::epoch::{Epoch, Totals, unless_none};
use super::error::stash;
use crate::engine::{Engine, Outcome, Phase};
use crate::error::Result;
use crate::training::{Metrics, epoch as run};

/// One epoch of any module: `engine.forward(inputs, targets, training)` returns (loss, weight, correct or None, counted,
/// samples), `engine.backward()` adds the gradients of that loss, `engine.update()` steps the optimizer. `before`: what
/// another engine has done of this epoch.
#[pyfunction]
#[pyo3(signature = (epoch, engine, batches, before))]
pub fn fit_python(
    py: Python<'_>,
    epoch: Epoch,
    engine: &Bound<'_, PyAny>,
    batches: Py<PyAny>,
    before: Option<Totals>,
) -> PyResult<Totals> {
    let Epoch { number, phase, accumulate, after } = epoch;
    let metrics = Metrics::new(number, phase);
    let metrics = match before {
        Some(Totals { loss, weight, correct, counted, samples, batches, last, gathered }) => {
            Metrics { loss, weight, correct, counted, samples, batches, last, gathered, ..metrics }
        }
        None => metrics,
    };
    let method = |name| engine.getattr(name).map(Bound::unbind);
    let mut engine =
        PythonEngine { forward: method("forward")?, backward: method("backward")?, update: method("update")? };
    let metrics = enter(py, move || {
        run(
            metrics,
            &mut engine,
            Batches { iterator: batches, read: unless_none(|batch| batch.extract()) },
            accumulate,
            |_, batch, loss| after.call(batch, loss, |_| ()),
        )
    })?;
    Ok(Totals::from(&metrics))
}

/// Calls the user's module, loss and optimizer.
struct PythonEngine {
    forward: Py<PyAny>,
    backward: Py<PyAny>,
    update: Py<PyAny>,
}

impl Engine for PythonEngine {
    type Batch = (Py<PyAny>, Py<PyAny>);

    fn forward(&mut self, (inputs, targets): Self::Batch, phase: Phase) -> Result<Outcome> {
        Python::with_gil(|py| {
            let result = self.forward.call1(py, (inputs, targets, phase == Phase::Training));
            let (loss, weight, correct, counted, samples) = result.and_then(|r| r.extract(py)).map_err(stash)?;
            Ok(Outcome { loss, weight, correct, counted, samples })
        })
    }

    fn backward(&mut self) -> Result<()> {
        Python::with_gil(|py| self.backward.call0(py).map(drop)).map_err(stash)
    }

    fn update(&mut self) -> Result<()> {
        Python::with_gil(|py| self.update.call0(py).map(drop)).map_err(stash)
    }

    fn undo(&mut self) -> Result<()> {
        Ok(()) // Python's own business: it knows the module's buffers.
    }
}
