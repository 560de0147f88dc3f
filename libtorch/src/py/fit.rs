//! One epoch of `cnnrs.fit` on engine `torch`, and what it is made of, for Python.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use cnnrs::engine::Step;
use cnnrs::engine::optimizer::{Adam, Sgd};
use cnnrs::fit::{Metrics, epoch};
use cnnrs::threads;

use super::batches::Batches;
use super::enter::enter;
use super::epoch::{Callback, Totals, parse_phase, totals, unless_none};
use super::error::{convert, stash};
use super::graph::Graph;
use crate::error::Error;
use crate::torch::{
    self, Gathered, Hook, Loss, Native, Optimizer, Parameter, Result, Rule, TorchEngine, TorchLoss, gradients,
};

/// One epoch of a lowered model through libtorch.
///
/// `loss`: ("nll", weight, ignore_index), ("cross_entropy", weight, ignore_index, label_smoothing) or a callable as for
/// [`PythonLoss`]; `optimizer`: a NativeOptimizer, or (parameters, callable that takes their gradients and whether to
/// step), or None; `batches`: iterator of (inputs, targets), already on the model's device, or None where this engine must
/// stop; `accumulate`: batches per step; `after`: as for [`Callback`].
#[pyfunction]
#[pyo3(signature = (number, phase, graph, tensors, loss, optimizer, batches, accumulate, after))]
#[allow(clippy::too_many_arguments)] // one doorway per engine; Python has given every argument its name already
pub fn fit(
    py: Python<'_>,
    number: i64,
    phase: &str,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    loss: &Bound<'_, PyAny>,
    optimizer: Option<&Bound<'_, PyAny>>,
    batches: Py<PyAny>,
    accumulate: usize,
    after: Option<Py<PyAny>>,
) -> PyResult<Totals> {
    let phase = parse_phase(phase)?;
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
        let after = Callback(after);
        epoch(
            Metrics::new(number, phase),
            &mut engine,
            Batches { iterator: batches, read: unless_none(|batch| batch.extract().map(tensor_pair)) },
            accumulate,
            |engine, batch, loss| after.call(batch, loss, |rows| engine.set_options(rows)),
        )
    })?;
    Ok(totals(&metrics))
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
    let weight = |w: Option<PyTensor>| w.map(|w| w.0);
    if let Ok((_, w, ignore_index, label_smoothing)) = loss.extract::<(String, Option<PyTensor>, i64, f64)>() {
        return Ok(Box::new(TorchLoss::CrossEntropy { weight: weight(w), ignore_index, label_smoothing }));
    }
    let (_, w, ignore_index) = loss.extract::<(String, Option<PyTensor>, i64)>()?;
    Ok(Box::new(TorchLoss::Nll { weight: weight(w), ignore_index }))
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
    fn evaluate(&self, output: &Tensor, targets: &Tensor, samples: u64) -> Result<(Tensor, Step)> {
        let arguments = (PyTensor(output.shallow_clone()), PyTensor(targets.shallow_clone()), samples);
        let found = Python::with_gil(|py| self.0.call1(py, arguments)?.extract::<(PyTensor, Counts)>(py));
        let (value, (loss, weight, correct, counted)) = found.map_err(stash)?;
        Ok((value.0, Step { loss, weight, correct, counted, samples }))
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
    /// `sgd`: (param, momentum buffer or None, whether the buffer has been used, (lr, momentum, dampening, weight_decay),
    /// nesterov, maximize); `adam`: (param, [step, exp_avg, exp_avg_sq(, max_exp_avg_sq)], (lr, beta1, beta2, eps,
    /// weight_decay), maximize, decoupled); `clip` gets the gradients before they are applied and changes them in place.
    #[new]
    #[pyo3(signature = (sgd, adam, clip))]
    fn new(py: Python<'_>, sgd: Vec<SgdRow>, adam: Vec<AdamRow>, clip: Option<Py<PyAny>>) -> PyResult<Self> {
        let mut parameters = Vec::with_capacity(sgd.len() + adam.len());
        for (value, buffer, used, (lr, momentum, dampening, weight_decay), nesterov, maximize) in sgd {
            let options = Sgd { lr, momentum, dampening, weight_decay, nesterov, maximize };
            let rule = Rule::Sgd { options, momentum: buffer.map(|b| (b.0, used)) };
            parameters.push(Parameter { value: value.0, rule, updated: false });
        }
        for (value, state, (lr, beta1, beta2, eps, weight_decay), maximize, decoupled) in adam {
            let options = Adam { lr, betas: (beta1, beta2), eps, weight_decay, maximize, decoupled };
            let mut state = state.into_iter().map(|t| t.0);
            let (Some(step), Some(exp_avg), Some(exp_avg_sq)) = (state.next(), state.next(), state.next()) else {
                return Err(PyTypeError::new_err("Adam's state needs step, exp_avg and exp_avg_sq"));
            };
            let rule = Rule::Adam { options, step, exp_avg, exp_avg_sq, max_exp_avg_sq: state.next() };
            parameters.push(Parameter { value: value.0, rule, updated: false });
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

type SgdRow = (PyTensor, Option<PyTensor>, bool, (f64, f64, f64, f64), bool, bool);
type AdamRow = (PyTensor, Vec<PyTensor>, (f64, f64, f64, f64, f64), bool, bool);
