//! One epoch of `cnnrs.fit` on engine `torch`, and what it is made of, for Python.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use cnnrs::engine::Outcome;
use cnnrs::threads;
use cnnrs::training::{Metrics, epoch as run};

use super::batches::Batches;
use super::enter::enter;
use super::epoch::{Epoch, Totals, unless_none};
use super::error::{convert, stash};
use super::graph::Graph;
use super::record::{Kinds, Record, variant};
use super::rows;
use crate::error::Error;
use crate::torch::{
    self, Gathered, Hook, Loss, Native, Optimizer, Parameter, Result, Rule, TorchEngine, TorchLoss, gradients,
};

/// One epoch of a lowered model through libtorch.
///
/// `loss`: a record of [`LOSSES`], or a callable as for [`PythonLoss`]; `optimizer`: a NativeOptimizer, or (parameters,
/// callable that takes their gradients and whether to step), or None; `batches`: iterator of (inputs, targets), already on
/// the model's device, or None where this engine must stop.
#[pyfunction]
#[pyo3(signature = (epoch, graph, tensors, loss, optimizer, batches))]
pub fn fit(
    py: Python<'_>,
    epoch: Epoch,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    loss: &Bound<'_, PyAny>,
    optimizer: Option<&Bound<'_, PyAny>>,
    batches: Py<PyAny>,
) -> PyResult<Totals> {
    let Epoch { number, phase, accumulate, after } = epoch;
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    let tensors: Vec<Tensor> = tensors.into_iter().map(|t| t.0).collect();
    let (graph, loss, optimizer) =
        (graph.inner.clone(), parse_loss(loss)?, optimizer.map(|o| parse_optimizer(o, accumulate)).transpose()?);
    let metrics = enter(py, move || {
        let kernel_threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        threads::set_compute_threads(kernel_threads)?;
        let mut engine = TorchEngine::new(graph, tensors, loss, optimizer, accumulate);
        run(
            Metrics::new(number, phase),
            &mut engine,
            Batches { iterator: batches, read: unless_none(|batch| batch.extract().map(tensor_pair)) },
            accumulate,
            |engine, batch, loss| after.call(batch, loss, |rows| engine.set_options(rows)),
        )
    })?;
    Ok(Totals::from(&metrics))
}

/// The output of a lowered model for one batch, with autograd behind it where Python has it on.
#[pyfunction]
pub fn forward(py: Python<'_>, graph: &Graph, tensors: Vec<PyTensor>, inputs: PyTensor) -> PyResult<PyTensor> {
    let tensors: Vec<Tensor> = tensors.into_iter().map(|t| t.0).collect();
    let (graph, inputs) = (&graph.inner, inputs.0);
    enter(py, move || torch::forward(graph, &tensors, inputs).map_err(|failure| Error::from(failure).refused()))
        .map(PyTensor)
}

fn parse_loss(loss: &Bound<'_, PyAny>) -> PyResult<Box<dyn Loss>> {
    if loss.is_callable() {
        return Ok(Box::new(PythonLoss(loss.clone().unbind())));
    }
    Ok(Box::new(variant("loss", loss, LOSSES)?))
}

const LOSSES: &Kinds<TorchLoss> = &[
    ("nll", |r| Ok(TorchLoss::Nll { weight: weight(r)?, ignore_index: r.get("ignore_index")? })),
    ("cross_entropy", |r| {
        let (ignore_index, label_smoothing) = (r.get("ignore_index")?, r.get("label_smoothing")?);
        Ok(TorchLoss::CrossEntropy { weight: weight(r)?, ignore_index, label_smoothing })
    }),
];

fn weight(loss: &Record<'_>) -> PyResult<Option<Tensor>> {
    Ok(loss.get::<Option<PyTensor>>("weight")?.map(|weight| weight.0))
}

fn parse_optimizer(optimizer: &Bound<'_, PyAny>, accumulate: usize) -> PyResult<Box<dyn Optimizer>> {
    if let Ok(native) = optimizer.downcast::<NativeOptimizer>() {
        return Ok(Box::new(Shared(Arc::clone(&native.get().inner))));
    }
    let (parameters, step) = optimizer.extract::<(Vec<PyTensor>, Py<PyAny>)>()?;
    let parameters = parameters.into_iter().map(|p| p.0).collect();
    Ok(Box::new(PythonOptimizer { parameters, gathered: Gathered::default(), step, shows: accumulate > 1 }))
}

fn tensor_pair((inputs, targets): (PyTensor, PyTensor)) -> (Tensor, Tensor) {
    (inputs.0, targets.0)
}

/// A loss that is called: `function(output, targets, samples)` returns the scalar to differentiate and (loss, weight,
/// correct or None, counted).
struct PythonLoss(Py<PyAny>);

impl Loss for PythonLoss {
    fn evaluate(&self, output: &Tensor, targets: &Tensor, samples: u64) -> Result<(Tensor, Outcome)> {
        let arguments = (PyTensor(output.shallow_clone()), PyTensor(targets.shallow_clone()), samples);
        let found = Python::with_gil(|py| self.0.call1(py, arguments)?.extract::<(PyTensor, Counts)>(py));
        let (value, (loss, weight, correct, counted)) = found.map_err(stash)?;
        Ok((value.0, Outcome { loss, weight, correct, counted, samples }))
    }
}

type Counts = (f64, f64, Option<u64>, u64);

/// An optimizer of the user's: gets the gradients, steps in Python.
struct PythonOptimizer {
    parameters: Vec<Tensor>,
    gathered: Gathered,
    step: Py<PyAny>,
    /// Whether gradients are shown before they are applied.
    shows: bool,
}

impl Optimizer for PythonOptimizer {
    fn gather(&mut self, loss: &Tensor) -> Result<()> {
        let parameters: Vec<&Tensor> = self.parameters.iter().collect();
        self.gathered.add(gradients(loss, &parameters)?)?;
        if self.shows { self.call(&self.gathered.gradients, false) } else { Ok(()) }
    }

    fn update(&mut self) -> Result<()> {
        let grads = std::mem::take(&mut self.gathered.gradients);
        self.call(&grads, true)
    }
}

impl PythonOptimizer {
    fn call(&self, grads: &[Option<Tensor>], step: bool) -> Result<()> {
        Ok(Python::with_gil(|py| self.step.call1(py, (shared(grads), step)).map(drop)).map_err(stash)?)
    }
}

/// Handles for Python.
fn shared(grads: &[Option<Tensor>]) -> Vec<Option<PyTensor>> {
    grads.iter().map(|g| g.as_ref().map(|g| PyTensor(g.shallow_clone()))).collect()
}

/// SGD, Adam or AdamW over float32 CPU tensors that stay the user's.
#[pyclass(frozen, module = "cnnrs_libtorch._libtorch")]
pub struct NativeOptimizer {
    inner: Arc<Mutex<Native>>,
}

struct Shared(Arc<Mutex<Native>>);

impl Optimizer for Shared {
    fn gather(&mut self, loss: &Tensor) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).gather(loss)
    }

    fn update(&mut self) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).update()
    }

    fn set_options(&mut self, rows: &[Vec<f64>]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).set_options(rows);
    }
}

#[pymethods]
impl NativeOptimizer {
    /// `clip` gets the gradients before they are applied and changes them in place.
    #[new]
    #[pyo3(signature = (sgd, adam, clip))]
    fn new(py: Python<'_>, sgd: Vec<SgdRow>, adam: Vec<AdamRow>, clip: Option<Py<PyAny>>) -> PyResult<Self> {
        let mut parameters = Vec::with_capacity(sgd.len() + adam.len());
        for row in sgd {
            let rule = Rule::Sgd { options: row.options, momentum: row.momentum.map(|(b, used)| (b.0, used)) };
            parameters.push(Parameter { value: row.parameter.0, rule, updated: false });
        }
        for row in adam {
            let rule = Rule::Adam {
                options: row.options,
                step: row.step.0,
                exp_avg: row.exp_avg.0,
                exp_avg_sq: row.exp_avg_sq.0,
                max_exp_avg_sq: row.max_exp_avg_sq.map(|t| t.0),
            };
            parameters.push(Parameter { value: row.parameter.0, rule, updated: false });
        }
        let hook = clip.map(|clip| {
            Box::new(move |grads: &[Option<Tensor>]| {
                Ok(Python::with_gil(|py| clip.call1(py, (shared(grads),)).map(drop)).map_err(stash)?)
            }) as Hook
        });
        let inner = Native::new(parameters, hook).map_err(|error| convert(py, error.into()))?;
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    /// The gradients since the last step, or of it, one per parameter in the order given; empty before the first batch.
    fn gradients(&self) -> Vec<Option<PyTensor>> {
        shared(self.inner.lock().unwrap_or_else(PoisonError::into_inner).gradients())
    }

    /// For every parameter, whether it has been updated.
    fn updated(&self) -> Vec<bool> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).updated()
    }
}

type SgdRow = rows::SgdRow<PyTensor, PyTensor>;
type AdamRow = rows::AdamRow<PyTensor, PyTensor>;
