//! One epoch of `cnnrs.fit` on the cpu engine: hands over the memory of the user's tensors.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::{Device, Kind};

use super::batches::Batches;
use super::enter::enter;
use super::error::convert;
use super::feature_rows::{FeatureRows, Gathered};
use super::fit::{AdamRow, Callback, SgdRow, Totals, parse_phase, totals, unless_none};
use super::graph::Graph;
use crate::engine::cpu::{self, ClassLoss, Clip, CpuEngine, Floats, HostBatch, Loss, Plans, Rule, Targets, Tensor};
use crate::engine::optimizer::{Adam, Sgd};
use crate::error::{Error, Result};
use crate::fit::{Metrics, epoch};
use crate::model::Op;

/// Compiled plans and the threads that run them, kept from epoch to epoch.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
#[derive(Default)]
pub struct CpuPlans {
    inner: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    plans: Plans,
    steps: u64,
}

#[pymethods]
impl CpuPlans {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Number of plans at hand: one per input shape, phase and set of trained parameters.
    fn __len__(&self) -> usize {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).plans.len()
    }

    /// Optimizer steps of the last epoch, also after an exception.
    #[getter]
    fn steps(&self) -> u64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).steps
    }
}

/// Why the cpu engine cannot run a graph on inputs of this shape, and targets of this shape where they are values; None
/// where it can.
#[pyfunction]
#[pyo3(signature = (graph, input, targets))]
pub fn cpu_obstacle(graph: &Graph, input: Vec<usize>, targets: Option<Vec<usize>>) -> Option<String> {
    cpu::obstacle(&graph.inner, &input, targets.as_deref())
}

/// Nodes that libtorch trains at least as fast as the cpu engine, where they are most of the work; else none.
#[pyfunction]
pub fn cpu_slow(graph: &Graph) -> Vec<usize> {
    cpu::slow(&graph.inner)
}

/// One epoch of a lowered model without libtorch.
///
/// `loss`: ("nll", weight, ignore_index), ("cross_entropy", weight, ignore_index, label_smoothing), ("mse",) or
/// ("bce_with_logits",); `sgd`, `adam`: rows as for NativeOptimizer, each after the index of its tensor; `clip`: ("norm"
/// or "value", most); `seed`: key of this epoch's dropout; `batches`: iterator as for `fit_torch`, or (features, labels,
/// order of the rows, ends of the batches in it); `accumulate`, `after`: as for `fit_torch`.
#[pyfunction]
#[pyo3(signature = (number, phase, graph, tensors, loss, sgd, adam, clip, plans, seed, batches, accumulate, after))]
#[allow(clippy::too_many_arguments)] // one doorway per engine; Python has given every argument its name already
pub fn fit_cpu(
    py: Python<'_>,
    number: i64,
    phase: &str,
    graph: &Graph,
    tensors: Vec<PyTensor>,
    loss: &Bound<'_, PyAny>,
    sgd: Vec<(usize, SgdRow)>,
    adam: Vec<(usize, AdamRow)>,
    clip: Option<(String, f64)>,
    plans: &CpuPlans,
    seed: u64,
    batches: Py<PyAny>,
    accumulate: usize,
    after: Option<Py<PyAny>>,
) -> PyResult<Totals> {
    let clip = clip.map(|(kind, most)| if kind == "norm" { Clip::Norm(most) } else { Clip::Value(most) });
    let order: Vec<usize> = sgd.iter().map(|row| row.0).chain(adam.iter().map(|row| row.0)).collect();
    let (phase, graph, loss) = (parse_phase(phase)?, graph.inner.clone(), parse_loss(loss)?);
    // These keep the memory alive until the epoch is over.
    let mut owners: Vec<tch::Tensor> = Vec::new();
    let mut rules = vec![None; tensors.len()];
    for (index, row) in sgd {
        let slot = rules.get_mut(index).ok_or_else(|| PyValueError::new_err(format!("no tensor {index}")))?;
        *slot = Some(sgd_rule(row, &mut owners).map_err(|error| convert(py, error))?);
    }
    for (index, row) in adam {
        let slot = rules.get_mut(index).ok_or_else(|| PyValueError::new_err(format!("no tensor {index}")))?;
        *slot = Some(adam_rule(row, &mut owners).map_err(|error| convert(py, error))?);
    }
    let tensors: Vec<tch::Tensor> = tensors.into_iter().map(|t| t.0).collect();
    let memory = tensors.iter().map(memory).collect::<Result<Vec<_>>>().map_err(|error| convert(py, error))?;
    let counters: Vec<usize> = graph.nodes.iter().filter_map(|node| counter(&node.op)).collect();
    let batches = batches_of(batches.bind(py), taken(&tensors, &owners)).map_err(|error| convert(py, error))?;
    let metrics = enter(py, move || {
        let workers = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        // Taken out, not locked: what the user calls after a batch may validate this very model.
        let mut kept = std::mem::take(&mut *plans.inner.lock().unwrap_or_else(PoisonError::into_inner));
        let mut engine = CpuEngine::new(graph, &mut kept.plans, memory, loss, rules, clip, accumulate, seed, workers)?;
        let after = Callback(after);
        let mut counters =
            Counters { tensors: counters.iter().map(|&t| tensors[t].shallow_clone()).collect(), shown: 0 };
        let result = epoch(Metrics::new(number, phase), &mut engine, batches, accumulate, |engine, batch, loss| {
            if after.0.is_some() {
                counters.show(engine.forwards)?;
            }
            after.call(batch, loss, |rows| {
                let rows: Vec<_> = order.iter().copied().zip(rows.iter().cloned()).collect();
                engine.set_options(&rows);
            })
        });
        kept.steps = engine.steps;
        let forwards = engine.forwards;
        drop(engine);
        *plans.inner.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        counters.show(forwards)?;
        drop(owners);
        result
    })?;
    Ok(totals(&metrics))
}

/// The `num_batches_tracked` of the batch norms in training, which the engine does not write.
struct Counters {
    tensors: Vec<tch::Tensor>,
    /// Batches that they have been told of.
    shown: u64,
}

impl Counters {
    fn show(&mut self, forwards: u64) -> Result<()> {
        let more = forwards as i64 - self.shown as i64;
        self.shown = forwards;
        let _guard = tch::no_grad_guard();
        for counter in &mut self.tensors {
            let _ = counter.f_add_scalar_(more)?;
        }
        Ok(())
    }
}

/// The caller's iterator of pairs, or rows of features.
fn batches_of(
    batches: &Bound<'_, PyAny>,
    taken: Vec<Range<usize>>,
) -> Result<Box<dyn Iterator<Item = Result<Option<Batch>>> + Send>> {
    if let Ok((features, labels, order, ends)) = batches.extract::<(PyTensor, PyTensor, Vec<i64>, Vec<usize>)>() {
        let rows = FeatureRows::new(features, labels, order, ends)?;
        return Ok(Box::new(rows.map(|batch| batch.map(Batch::Rows).map(Some))));
    }
    let read = unless_none(move |batch| batch.extract().and_then(|pair| read(pair, &taken)).map(Batch::Tensors));
    Ok(Box::new(Batches { iterator: batches.clone().unbind(), read }))
}

enum Batch {
    Tensors(TorchBatch),
    Rows(Gathered),
}

impl HostBatch for Batch {
    fn shape(&self) -> &[usize] {
        match self {
            Self::Tensors(batch) => batch.shape(),
            Self::Rows(batch) => batch.shape(),
        }
    }

    fn inputs(&self) -> &[f32] {
        match self {
            Self::Tensors(batch) => batch.inputs(),
            Self::Rows(batch) => batch.inputs(),
        }
    }

    fn targets(&self) -> Targets<'_> {
        match self {
            Self::Tensors(batch) => batch.targets(),
            Self::Rows(batch) => batch.targets(),
        }
    }
}

/// The `num_batches_tracked` that a training layer counts up.
fn counter(op: &Op) -> Option<usize> {
    match op {
        Op::BatchNorm2d { num_batches_tracked, training: true, .. } => *num_batches_tracked,
        _ => None,
    }
}

fn parse_loss(loss: &Bound<'_, PyAny>) -> PyResult<Loss> {
    let weight = |w: Option<PyTensor>| -> PyResult<Option<Vec<f32>>> {
        w.map(|w| Vec::<f32>::try_from(&w.0).map_err(|e| PyTypeError::new_err(format!("loss weight: {e}")))).transpose()
    };
    if let Ok((name,)) = loss.extract::<(String,)>() {
        return Ok(if name == "mse" { Loss::Mse } else { Loss::BceWithLogits });
    }
    if let Ok((_, w, ignore_index, label_smoothing)) = loss.extract::<(String, Option<PyTensor>, i64, f64)>() {
        return Ok(Loss::Classes(ClassLoss { cross_entropy: true, weight: weight(w)?, ignore_index, label_smoothing }));
    }
    let (_, w, ignore_index) = loss.extract::<(String, Option<PyTensor>, i64)>()?;
    Ok(Loss::Classes(ClassLoss { cross_entropy: false, weight: weight(w)?, ignore_index, label_smoothing: 0.0 }))
}

fn sgd_rule(row: SgdRow, owners: &mut Vec<tch::Tensor>) -> Result<Rule> {
    let (_, buffer, used, (lr, momentum, dampening, weight_decay), nesterov, maximize) = row;
    let momentum_buffer = buffer.map(|b| lend(b, owners).map(|floats| (floats, used))).transpose()?;
    let options = Sgd { lr, momentum, dampening, weight_decay, nesterov, maximize };
    Ok(Rule::Sgd { options, momentum: momentum_buffer })
}

fn adam_rule(row: AdamRow, owners: &mut Vec<tch::Tensor>) -> Result<Rule> {
    let (_, state, (lr, beta1, beta2, eps, weight_decay), maximize, decoupled) = row;
    let mut state = state.into_iter();
    let mut next = || match state.next() {
        Some(tensor) => lend(tensor, owners).map(Some),
        None => Ok(None),
    };
    let (Some(step), Some(exp_avg), Some(exp_avg_sq), top) = (next()?, next()?, next()?, next()?) else {
        return Err(Error::Argument("Adam's state needs step, exp_avg and exp_avg_sq".to_owned()));
    };
    // SAFETY: no memory at all.
    let none = unsafe { Floats::new(std::ptr::null_mut(), 0) };
    let options = Adam { lr, betas: (beta1, beta2), eps, weight_decay, maximize, decoupled };
    Ok(Rule::Adam { options, step, exp_avg, exp_avg_sq, max_exp_avg_sq: top.unwrap_or(none) })
}

/// The memory of a tensor that `owners` keeps alive.
fn lend(tensor: PyTensor, owners: &mut Vec<tch::Tensor>) -> Result<Floats> {
    let floats = floats(&tensor.0)?;
    owners.push(tensor.0);
    Ok(floats)
}

fn floats(tensor: &tch::Tensor) -> Result<Floats> {
    if tensor.device() != Device::Cpu || tensor.kind() != Kind::Float || !tensor.is_contiguous() {
        return Err(Error::Argument(format!(
            "the cpu engine needs contiguous float32 tensors on cpu, got {:?} on {:?}: use engine='torch'",
            tensor.kind(),
            tensor.device()
        )));
    }
    // SAFETY: contiguous float32 in CPU memory, so `numel` floats start at `data_ptr`; the tensor is kept until the
    // engine is gone, and the caller's loop does not touch it while a step runs.
    Ok(unsafe { Floats::new(tensor.data_ptr().cast(), tensor.numel()) })
}

fn memory(tensor: &tch::Tensor) -> Result<Tensor> {
    match (tensor.kind(), tensor.numel()) {
        (Kind::Int64, 1) => Ok(Tensor::Count(tensor.f_int64_value(&[])?.unsigned_abs())),
        _ => floats(tensor).map(Tensor::Floats),
    }
}

/// A batch that stays in the tensors it came in.
struct TorchBatch {
    inputs: tch::Tensor,
    targets: tch::Tensor,
    shape: Vec<usize>,
}

/// Addresses of the memory that a step may write.
fn taken(tensors: &[tch::Tensor], state: &[tch::Tensor]) -> Vec<Range<usize>> {
    tensors.iter().chain(state).map(addresses).collect()
}

/// The storage of a tensor from its first element on.
fn addresses(tensor: &tch::Tensor) -> Range<usize> {
    let start = tensor.data_ptr() as usize;
    start..start + tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Contiguous, and apart from what the step writes.
fn apart(tensor: &tch::Tensor, taken: &[Range<usize>]) -> tch::Tensor {
    let tensor = tensor.contiguous();
    let own = addresses(&tensor);
    match taken.iter().any(|other| own.start < other.end && other.start < own.end) {
        true => tensor.copy(),
        false => tensor,
    }
}

fn read((inputs, targets): (PyTensor, PyTensor), taken: &[Range<usize>]) -> PyResult<TorchBatch> {
    let (inputs, targets) = (inputs.0, targets.0);
    let wrong = |what: &str, kind: Kind| {
        PyTypeError::new_err(format!(
            "the cpu engine needs {what}, got {kind:?}: convert the batch or use engine='torch'"
        ))
    };
    if inputs.kind() != Kind::Float || inputs.device() != Device::Cpu {
        return Err(wrong("float32 inputs on cpu", inputs.kind()));
    }
    let classes = targets.kind() == Kind::Int64 && targets.dim() == 1;
    let values = targets.kind() == Kind::Float && targets.dim() == 2;
    if !(classes || values) || targets.device() != Device::Cpu {
        return Err(wrong("targets that are int64 class indices (N,) or float32 values (N, K)", targets.kind()));
    }
    let shape = inputs.size().iter().map(|&d| d.unsigned_abs() as usize).collect();
    Ok(TorchBatch { inputs: apart(&inputs, taken), targets: apart(&targets, taken), shape })
}

impl HostBatch for TorchBatch {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn inputs(&self) -> &[f32] {
        match self.inputs.numel() {
            0 => &[],
            // SAFETY: `read` made sure of contiguous float32 in CPU memory, which lives as long as `self`.
            len => unsafe { std::slice::from_raw_parts(self.inputs.data_ptr().cast(), len) },
        }
    }

    fn targets(&self) -> Targets<'_> {
        let (start, len) = (self.targets.data_ptr(), self.targets.numel());
        match (self.targets.kind(), len) {
            (_, 0) => Targets::Classes(&[]),
            // SAFETY: `read` made sure of contiguous float32 in CPU memory, which lives as long as `self`.
            (Kind::Float, _) => Targets::Values(unsafe { std::slice::from_raw_parts(start.cast(), len) }),
            // SAFETY: as above, int64.
            _ => Targets::Classes(unsafe { std::slice::from_raw_parts(start.cast(), len) }),
        }
    }
}
