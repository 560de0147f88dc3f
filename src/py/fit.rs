//! One epoch of `cnnrs.fit` on either engine.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

use super::batches::Batches;
use super::enter::enter;
use super::error::{convert, stash};
use super::graph::Graph;
use crate::engine::optimizer::{Adam, Sgd};
use crate::engine::torch::{Loss, Native, Optimizer, Parameter, Rule, TorchEngine, TorchLoss, correct, gradients};
use crate::engine::{Engine, Phase, Step};
use crate::error::{Error, Result};
use crate::fit::{Metrics, epoch};
use crate::threads;

/// (sum of losses, correct predictions or None, samples)
pub(super) type Totals = (f64, Option<u64>, u64);

/// One epoch of a lowered model through libtorch.
///
/// `loss`: ("nll", weight, ignore_index), ("cross_entropy", weight, ignore_index, label_smoothing) or a callable;
/// `optimizer`: a NativeOptimizer, or (parameters, callable that takes their gradients and steps), or None;
/// `batches`: iterator of (inputs, targets), already on the model's device.
#[pyfunction]
#[pyo3(signature = (number, phase, graph, tensors, loss, optimizer, batches))]
#[allow(clippy::too_many_arguments)] // one doorway per engine; Python has given every argument its name already
pub fn fit_torch(
    py: Python<'_>,
    number: i64,
    phase: &str,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    loss: &Bound<'_, PyAny>,
    optimizer: Option<&Bound<'_, PyAny>>,
    batches: Py<PyAny>,
) -> PyResult<Totals> {
    let phase = parse_phase(phase)?;
    if tensors.len() != graph.inner.tensors.len() {
        return Err(PyValueError::new_err(format!("{} tensors for {}", tensors.len(), graph.inner.tensors.len())));
    }
    let tensors: Vec<Tensor> = tensors.into_iter().map(|t| t.0).collect();
    let (graph, loss, optimizer) =
        (graph.inner.clone(), parse_loss(loss)?, optimizer.map(parse_optimizer).transpose()?);
    let metrics = enter(py, move || {
        let kernel_threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        threads::set_compute_threads(kernel_threads)?;
        let mut engine = TorchEngine::new(graph, tensors, loss, optimizer);
        epoch(
            number,
            phase,
            &mut engine,
            Batches { iterator: batches, read: |batch: Bound<'_, PyAny>| batch.extract().map(tensor_pair) },
        )
    })?;
    Ok(totals(&metrics))
}

/// One epoch of any module: `forward(inputs, targets, training)` returns (sum of losses, correct or None, samples),
/// `step()` does the rest of a training step.
#[pyfunction]
pub fn fit_python(
    py: Python<'_>,
    number: i64,
    phase: &str,
    forward: Py<PyAny>,
    step: Py<PyAny>,
    batches: Py<PyAny>,
) -> PyResult<Totals> {
    let phase = parse_phase(phase)?;
    let metrics = enter(py, move || {
        let mut engine = PythonEngine { forward, step };
        epoch(
            number,
            phase,
            &mut engine,
            Batches { iterator: batches, read: |batch: Bound<'_, PyAny>| batch.extract() },
        )
    })?;
    Ok(totals(&metrics))
}

fn totals(metrics: &Metrics) -> Totals {
    (metrics.loss, metrics.correct, metrics.samples)
}

pub(super) fn parse_phase(phase: &str) -> PyResult<Phase> {
    match phase {
        "training" => Ok(Phase::Training),
        "validation" => Ok(Phase::Validation),
        other => Err(PyValueError::new_err(format!("phase must be 'training' or 'validation', got '{other}'"))),
    }
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

fn parse_optimizer(optimizer: &Bound<'_, PyAny>) -> PyResult<Box<dyn Optimizer>> {
    if let Ok(native) = optimizer.downcast::<NativeOptimizer>() {
        return Ok(Box::new(Shared(Arc::clone(&native.get().inner))));
    }
    let (parameters, step) = optimizer.extract::<(Vec<PyTensor>, Py<PyAny>)>()?;
    Ok(Box::new(PythonOptimizer { parameters: parameters.into_iter().map(|p| p.0).collect(), step }))
}

fn tensor_pair((inputs, targets): (PyTensor, PyTensor)) -> (Tensor, Tensor) {
    (inputs.0, targets.0)
}

/// Calls the user's module, loss and optimizer.
struct PythonEngine {
    forward: Py<PyAny>,
    step: Py<PyAny>,
}

impl Engine for PythonEngine {
    type Batch = (Py<PyAny>, Py<PyAny>);

    fn forward(&mut self, (inputs, targets): Self::Batch, phase: Phase) -> Result<Step> {
        Python::with_gil(|py| {
            let result = self.forward.call1(py, (inputs, targets, phase == Phase::Training));
            let (loss, correct, samples) = result.and_then(|r| r.extract(py)).map_err(stash)?;
            Ok(Step { loss, correct, samples })
        })
    }

    fn step(&mut self) -> Result<()> {
        Python::with_gil(|py| self.step.call0(py).map(drop)).map_err(stash)
    }
}

/// A loss function of the user's; its value is taken to be the mean over the batch.
struct PythonLoss(Py<PyAny>);

impl Loss for PythonLoss {
    fn evaluate(&self, output: &Tensor, targets: &Tensor) -> Result<(Tensor, Step)> {
        let arguments = (PyTensor(output.shallow_clone()), PyTensor(targets.shallow_clone()));
        let loss = Python::with_gil(|py| self.0.call1(py, arguments).and_then(|loss| loss.extract::<PyTensor>(py)));
        let loss = loss.map_err(stash)?.0;
        if loss.numel() != 1 {
            return Err(Error::Torch(format!(
                "grad can be implicitly created only for scalar outputs: loss_fn returned shape {:?}",
                loss.size()
            )));
        }
        let samples = output.size().first().map_or(1, |&n| n.unsigned_abs());
        let step =
            Step { loss: loss.f_double_value(&[])? * samples as f64, correct: correct(output, targets)?, samples };
        Ok((loss, step))
    }
}

/// An optimizer of the user's: gets the gradients, steps in Python.
struct PythonOptimizer {
    parameters: Vec<Tensor>,
    step: Py<PyAny>,
}

impl Optimizer for PythonOptimizer {
    fn step(&mut self, loss: &Tensor) -> Result<()> {
        let parameters: Vec<&Tensor> = self.parameters.iter().collect();
        let grads: Vec<Option<PyTensor>> = gradients(loss, &parameters)?.into_iter().map(|g| g.map(PyTensor)).collect();
        Python::with_gil(|py| self.step.call1(py, (grads,)).map(drop)).map_err(stash)
    }
}

/// SGD, Adam or AdamW over float32 CPU tensors that stay the user's.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct NativeOptimizer {
    inner: Arc<Mutex<Native>>,
}

struct Shared(Arc<Mutex<Native>>);

impl Optimizer for Shared {
    fn step(&mut self, loss: &Tensor) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).step(loss)
    }
}

#[pymethods]
impl NativeOptimizer {
    /// `sgd`: (param, momentum buffer or None, whether the buffer has been used, (lr, momentum, dampening, weight_decay),
    /// nesterov, maximize); `adam`: (param, [step, exp_avg, exp_avg_sq(, max_exp_avg_sq)], (lr, beta1, beta2, eps,
    /// weight_decay), maximize, decoupled).
    #[new]
    fn new(py: Python<'_>, sgd: Vec<SgdRow>, adam: Vec<AdamRow>) -> PyResult<Self> {
        let mut parameters = Vec::with_capacity(sgd.len() + adam.len());
        for (value, buffer, used, (lr, momentum, dampening, weight_decay), nesterov, maximize) in sgd {
            let options = Sgd { lr, momentum, dampening, weight_decay, nesterov, maximize };
            let rule = Rule::Sgd { options, momentum: buffer.map(|b| (b.0, used)) };
            parameters.push(Parameter { value: value.0, rule });
        }
        for (value, state, (lr, beta1, beta2, eps, weight_decay), maximize, decoupled) in adam {
            let options = Adam { lr, betas: (beta1, beta2), eps, weight_decay, maximize, decoupled };
            let mut state = state.into_iter().map(|t| t.0);
            let (Some(step), Some(exp_avg), Some(exp_avg_sq)) = (state.next(), state.next(), state.next()) else {
                return Err(PyTypeError::new_err("Adam's state needs step, exp_avg and exp_avg_sq"));
            };
            let rule = Rule::Adam { options, step, exp_avg, exp_avg_sq, max_exp_avg_sq: state.next() };
            parameters.push(Parameter { value: value.0, rule });
        }
        let inner = Native::new(parameters).map_err(|error| convert(py, error))?;
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    /// The last step's gradients, one per parameter in the order given; empty before the first step. Forgets them.
    fn take_gradients(&self) -> Vec<Option<PyTensor>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.take_gradients().into_iter().map(|grad| grad.map(PyTensor)).collect()
    }
}

pub(super) type SgdRow = (PyTensor, Option<PyTensor>, bool, (f64, f64, f64, f64), bool, bool);
pub(super) type AdamRow = (PyTensor, Vec<PyTensor>, (f64, f64, f64, f64, f64), bool, bool);
