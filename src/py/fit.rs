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
use crate::engine::torch::{
    Gathered, Hook, Loss, Native, Optimizer, Parameter, Rule, TorchEngine, TorchLoss, correct, forward, gradients,
};
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
/// `batches`: iterator of (inputs, targets), already on the model's device; `accumulate`: batches per step; `after`: as
/// for [`Callback`].
#[pyfunction]
#[pyo3(signature = (number, phase, graph, tensors, loss, optimizer, batches, accumulate, after))]
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
    accumulate: usize,
    after: Option<Py<PyAny>>,
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
        let mut engine = TorchEngine::new(graph, tensors, loss, optimizer, accumulate);
        let after = Callback(after);
        epoch(
            number,
            phase,
            &mut engine,
            Batches { iterator: batches, read: |batch: Bound<'_, PyAny>| batch.extract().map(tensor_pair) },
            accumulate,
            |engine, batch, loss| after.call(batch, loss, |rows| engine.set_options(rows)),
        )
    })?;
    Ok(totals(&metrics))
}

/// The output of a lowered model for one batch, with autograd behind it where Python has it on.
#[pyfunction]
pub fn forward_torch(py: Python<'_>, graph: &Graph, tensors: Vec<PyTensor>, inputs: PyTensor) -> PyResult<PyTensor> {
    let tensors: Vec<Tensor> = tensors.into_iter().map(|t| t.0).collect();
    let (graph, inputs) = (&graph.inner, inputs.0);
    enter(py, move || forward(graph, &tensors, inputs)).map(PyTensor)
}

/// What the user wants called after every batch: `after(batch, mean loss)` returns None, or new options for each of the
/// optimizer's rows: (lr, momentum, dampening, weight_decay) or (lr, beta1, beta2, eps, weight_decay).
pub(super) struct Callback(pub Option<Py<PyAny>>);

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

/// One epoch of any module: `forward(inputs, targets, training)` returns (sum of losses, correct or None, samples),
/// `backward()` adds the gradients of that loss, `update()` steps the optimizer.
#[pyfunction]
#[pyo3(signature = (number, phase, forward, backward, update, batches, accumulate, after))]
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
) -> PyResult<Totals> {
    let phase = parse_phase(phase)?;
    let metrics = enter(py, move || {
        let mut engine = PythonEngine { forward, backward, update };
        let after = Callback(after);
        epoch(
            number,
            phase,
            &mut engine,
            Batches { iterator: batches, read: |batch: Bound<'_, PyAny>| batch.extract() },
            accumulate,
            |_, batch, loss| after.call(batch, loss, |_| ()),
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
    let parameters = parameters.into_iter().map(|p| p.0).collect();
    Ok(Box::new(PythonOptimizer { parameters, gathered: Gathered::default(), step }))
}

fn tensor_pair((inputs, targets): (PyTensor, PyTensor)) -> (Tensor, Tensor) {
    (inputs.0, targets.0)
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
            let (loss, correct, samples) = result.and_then(|r| r.extract(py)).map_err(stash)?;
            Ok(Step { loss, correct, samples })
        })
    }

    fn backward(&mut self, update: bool) -> Result<()> {
        Python::with_gil(|py| self.backward.call0(py).map(drop)).map_err(stash)?;
        if update { self.update() } else { Ok(()) }
    }

    fn update(&mut self) -> Result<()> {
        Python::with_gil(|py| self.update.call0(py).map(drop)).map_err(stash)
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
    gathered: Gathered,
    step: Py<PyAny>,
}

impl Optimizer for PythonOptimizer {
    fn gather(&mut self, loss: &Tensor) -> Result<()> {
        let parameters: Vec<&Tensor> = self.parameters.iter().collect();
        self.gathered.add(gradients(loss, &parameters)?)
    }

    fn update(&mut self) -> Result<()> {
        let grads = std::mem::take(&mut self.gathered.gradients);
        call_with(&self.step, &grads)
    }
}

fn call_with(function: &Py<PyAny>, grads: &[Option<Tensor>]) -> Result<()> {
    let grads: Vec<Option<PyTensor>> = grads.iter().map(|g| g.as_ref().map(|g| PyTensor(g.shallow_clone()))).collect();
    Python::with_gil(|py| function.call1(py, (grads,)).map(drop)).map_err(stash)
}

/// SGD, Adam or AdamW over float32 CPU tensors that stay the user's.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
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
        let hook = clip.map(|clip| Box::new(move |grads: &[Option<Tensor>]| call_with(&clip, grads)) as Hook);
        let inner = Native::new(parameters, hook).map_err(|error| convert(py, error))?;
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
