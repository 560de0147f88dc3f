//! One epoch of `cnnrs.fit` on the cpu engine: hands over the memory of the user's tensors.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::batches::Batches;
use super::dlpack::Kind;
use super::enter::enter;
use super::epoch::{Callback, Totals, parse_phase, totals, unless_none};
use super::error::{convert, stash};
use super::feature_rows::{FeatureRows, Gathered};
use super::graph::Graph;
use super::tensor;
use crate::engine::cpu::{self, ClassLoss, Clip, CpuEngine, Floats, HostBatch, Loss, Plans, Rule, Targets, Tensor};
use crate::engine::optimizer::{Adam, Sgd};
use crate::engine::{Engine, Phase, Step};
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

/// Nodes that PyTorch trains at least as fast as the cpu engine, where they are most of the work; else none.
#[pyfunction]
pub fn cpu_slow(graph: &Graph) -> Vec<usize> {
    cpu::slow(&graph.inner)
}

/// One epoch of a lowered model.
///
/// `loss`: ("nll", weight, ignore_index), ("cross_entropy", weight, ignore_index, label_smoothing), ("mse",) or
/// ("bce_with_logits",); `sgd`, `adam`: [`SgdRow`]s or [`AdamRow`]s, each after the index of its tensor; `clip`: ("norm" or
/// "value", most); `workers`: threads; `seed`: key of this epoch's dropout; `batches`: iterator of (inputs, targets), already
/// on the CPU, or None where this engine must stop; or (features, labels, order of the rows, ends of the batches in it);
/// `accumulate`: batches per step; `after`: as for [`Callback`].
#[pyfunction]
#[pyo3(signature = (number, phase, graph, tensors, loss, sgd, adam, clip, plans, workers, seed, batches, accumulate, after))]
#[allow(clippy::too_many_arguments)] // one doorway per engine; Python has given every argument its name already
pub fn fit_cpu(
    py: Python<'_>,
    number: i64,
    phase: &str,
    graph: &Graph,
    tensors: Vec<tensor::Tensor>,
    loss: &Bound<'_, PyAny>,
    sgd: Vec<(usize, SgdRow)>,
    adam: Vec<(usize, AdamRow)>,
    clip: Option<(String, f64)>,
    plans: &CpuPlans,
    workers: usize,
    seed: u64,
    batches: Py<PyAny>,
    accumulate: usize,
    after: Option<Py<PyAny>>,
) -> PyResult<Totals> {
    let clip = clip.map(|(kind, most)| if kind == "norm" { Clip::Norm(most) } else { Clip::Value(most) });
    let order: Vec<usize> = sgd.iter().map(|row| row.0).chain(adam.iter().map(|row| row.0)).collect();
    let (phase, graph, loss) = (parse_phase(phase)?, graph.inner.clone(), parse_loss(loss)?);
    // These keep the memory alive until the epoch is over.
    let mut owners: Vec<tensor::Tensor> = Vec::new();
    let mut rules = vec![None; tensors.len()];
    for (index, row) in sgd {
        let slot = rules.get_mut(index).ok_or_else(|| PyValueError::new_err(format!("no tensor {index}")))?;
        *slot = Some(sgd_rule(row, &mut owners).map_err(|error| convert(py, error))?);
    }
    for (index, row) in adam {
        let slot = rules.get_mut(index).ok_or_else(|| PyValueError::new_err(format!("no tensor {index}")))?;
        *slot = Some(adam_rule(row, &mut owners).map_err(|error| convert(py, error))?);
    }
    let memory = tensors.iter().map(memory).collect::<Result<Vec<_>>>().map_err(|error| convert(py, error))?;
    let counters: Vec<usize> = graph.nodes.iter().filter_map(|node| counter(&node.op)).collect();
    let batches = batches_of(batches.bind(py), taken(&tensors, &owners)).map_err(|error| convert(py, error))?;
    let metrics = enter(py, move || {
        // Taken out, not locked: what the user calls after a batch may validate this very model.
        let mut kept = std::mem::take(&mut *plans.inner.lock().unwrap_or_else(PoisonError::into_inner));
        let engine = CpuEngine::new(graph, &mut kept.plans, memory, loss, rules, clip, accumulate, seed, workers)?;
        let mut engine = InPlace { engine, tensors: &tensors };
        let after = Callback(after);
        let mut counters = Counters { tensors: &tensors, which: counters, shown: 0 };
        let result = epoch(Metrics::new(number, phase), &mut engine, batches, accumulate, |engine, batch, loss| {
            if after.0.is_some() {
                counters.show(engine.engine.forwards)?;
            }
            after.call(batch, loss, |rows| {
                let rows: Vec<_> = order.iter().copied().zip(rows.iter().cloned()).collect();
                engine.engine.set_options(&rows);
            })
        });
        kept.steps = engine.engine.steps;
        let forwards = engine.engine.forwards;
        drop(engine);
        *plans.inner.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        counters.show(forwards)?;
        drop(owners);
        result
    })?;
    Ok(totals(&metrics))
}

/// The `num_batches_tracked` of the batch norms in training, which the engine does not write.
struct Counters<'a> {
    tensors: &'a [tensor::Tensor],
    which: Vec<usize>,
    /// Batches that they have been told of.
    shown: u64,
}

impl Counters<'_> {
    fn show(&mut self, forwards: u64) -> Result<()> {
        let more = forwards as i64 - self.shown as i64;
        self.shown = forwards;
        Python::with_gil(|py| self.which.iter().try_for_each(|&counter| self.tensors[counter].add(py, more)))
            .map_err(stash)
    }
}

/// The engine, as long as the user's tensors are where it found them.
struct InPlace<'a, 'p> {
    engine: CpuEngine<'p, Batch>,
    tensors: &'a [tensor::Tensor],
}

impl InPlace<'_, '_> {
    fn has_moved(&self) -> Result<bool> {
        Python::with_gil(|py| {
            for tensor in self.tensors {
                if tensor.has_moved(py)? {
                    return Ok(true);
                }
            }
            Ok(false)
        })
        .map_err(stash)
    }

    fn check(&self) -> Result<()> {
        if !self.has_moved()? {
            return Ok(());
        }
        Err(Error::Argument(
            "the model's tensors were given other memory within a step (by share_memory() or .data, for example): do that \
             between epochs, or use engine='python'"
                .to_owned(),
        ))
    }
}

impl Engine for InPlace<'_, '_> {
    type Batch = Batch;

    fn forward(&mut self, batch: Batch, phase: Phase) -> Result<Step> {
        self.check()?;
        self.engine.forward(batch, phase)
    }

    fn backward(&mut self, update: bool) -> Result<()> {
        self.engine.backward(update)
    }

    fn update(&mut self) -> Result<()> {
        self.check()?;
        self.engine.update()
    }

    fn undo(&mut self) -> Result<()> {
        // Nothing is written where nobody looks any more.
        if self.has_moved()? { Ok(()) } else { self.engine.undo() }
    }
}

/// The caller's iterator of pairs, or rows of features.
fn batches_of(
    batches: &Bound<'_, PyAny>,
    taken: Vec<Range<usize>>,
) -> Result<Box<dyn Iterator<Item = Result<Option<Batch>>> + Send>> {
    if batches.is_instance_of::<PyTuple>() {
        let (features, labels, order, ends): (tensor::Tensor, tensor::Tensor, Vec<i64>, Vec<usize>) =
            batches.extract().map_err(stash)?;
        let rows = FeatureRows::new(features, labels, order, ends)?;
        return Ok(Box::new(rows.map(|batch| batch.map(Batch::Rows).map(Some))));
    }
    let read = unless_none(move |batch| batch.extract().and_then(|pair| read(pair, &taken)).map(Batch::Tensors));
    Ok(Box::new(Batches { iterator: batches.clone().unbind(), read }))
}

enum Batch {
    Tensors(TensorBatch),
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
    if let Ok((name,)) = loss.extract::<(String,)>() {
        return Ok(if name == "mse" { Loss::Mse } else { Loss::BceWithLogits });
    }
    if let Ok((_, weight, ignore_index, label_smoothing)) = loss.extract::<(String, Option<Vec<f32>>, i64, f64)>() {
        return Ok(Loss::Classes(ClassLoss { cross_entropy: true, weight, ignore_index, label_smoothing }));
    }
    let (_, weight, ignore_index) = loss.extract::<(String, Option<Vec<f32>>, i64)>()?;
    Ok(Loss::Classes(ClassLoss { cross_entropy: false, weight, ignore_index, label_smoothing: 0.0 }))
}

/// (parameter, momentum buffer or None, whether the buffer has been used, (lr, momentum, dampening, weight_decay),
/// nesterov, maximize)
type SgdRow = (tensor::Tensor, Option<tensor::Tensor>, bool, (f64, f64, f64, f64), bool, bool);
/// (parameter, [step, exp_avg, exp_avg_sq(, max_exp_avg_sq)], (lr, beta1, beta2, eps, weight_decay), maximize, decoupled)
type AdamRow = (tensor::Tensor, Vec<tensor::Tensor>, (f64, f64, f64, f64, f64), bool, bool);

fn sgd_rule(row: SgdRow, owners: &mut Vec<tensor::Tensor>) -> Result<Rule> {
    let (_, buffer, used, (lr, momentum, dampening, weight_decay), nesterov, maximize) = row;
    let momentum_buffer = buffer.map(|b| lend(b, owners).map(|floats| (floats, used))).transpose()?;
    let options = Sgd { lr, momentum, dampening, weight_decay, nesterov, maximize };
    Ok(Rule::Sgd { options, momentum: momentum_buffer })
}

fn adam_rule(row: AdamRow, owners: &mut Vec<tensor::Tensor>) -> Result<Rule> {
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
fn lend(tensor: tensor::Tensor, owners: &mut Vec<tensor::Tensor>) -> Result<Floats> {
    let floats = floats(&tensor)?;
    owners.push(tensor);
    Ok(floats)
}

fn floats(tensor: &tensor::Tensor) -> Result<Floats> {
    // SAFETY: `numel` plain floats start there; the tensor is kept until the engine is gone, and the caller's loop does
    // not touch it while a step runs.
    Ok(unsafe { Floats::new(tensor.start()?, tensor.numel()) })
}

fn memory(tensor: &tensor::Tensor) -> Result<Tensor> {
    match tensor.elements::<i64>() {
        Some(&[count]) => Ok(Tensor::Count(count.unsigned_abs())),
        _ => floats(tensor).map(Tensor::Floats),
    }
}

/// A batch that stays in the tensors it came in.
struct TensorBatch {
    shape: Vec<usize>,
    inputs: Apart<f32>,
    targets: Labels,
}

/// Addresses of the memory that a step may write.
fn taken(tensors: &[tensor::Tensor], state: &[tensor::Tensor]) -> Vec<Range<usize>> {
    tensors.iter().chain(state).map(tensor::Tensor::addresses).collect()
}

/// The elements of a batch, apart from what the step writes.
enum Apart<T> {
    Theirs(tensor::Tensor),
    Copied(Vec<T>),
}

impl<T: tensor::Element> Apart<T> {
    /// None for elements of another type.
    fn new(tensor: tensor::Tensor, taken: &[Range<usize>]) -> Option<Self> {
        let elements = tensor.elements::<T>()?;
        let own = tensor.addresses();
        match taken.iter().any(|other| own.start < other.end && other.start < own.end) {
            true => Some(Self::Copied(elements.to_vec())),
            false => Some(Self::Theirs(tensor)),
        }
    }

    fn get(&self) -> &[T] {
        match self {
            Self::Theirs(tensor) => tensor.elements().unwrap_or_default(),
            Self::Copied(elements) => elements,
        }
    }
}

fn read((inputs, targets): (Bound<'_, PyAny>, Bound<'_, PyAny>), taken: &[Range<usize>]) -> PyResult<TensorBatch> {
    let (inputs, targets) = (tensor::contiguous(&inputs)?, tensor::contiguous(&targets)?);
    let wrong = |what: &str, found: String| {
        PyTypeError::new_err(format!(
            "the cpu engine needs {what}, got {found}: convert the batch or use engine='python'"
        ))
    };
    let (shape, found) = (inputs.shape().to_vec(), inputs.describe());
    let Some(inputs) = Apart::new(inputs, taken) else {
        return Err(wrong("float32 inputs on cpu", found));
    };
    let (dims, kind, found) = (targets.shape().len(), targets.kind(), targets.describe());
    let targets = match (kind, dims) {
        (Kind::Int64, 1) => Apart::new(targets, taken).map(Labels::Classes),
        (Kind::Float32, 2) => Apart::new(targets, taken).map(Labels::Values),
        _ => None,
    };
    let needed = "targets that are int64 class indices (N,) or float32 values (N, K)";
    Ok(TensorBatch { shape, inputs, targets: targets.ok_or_else(|| wrong(needed, found))? })
}

enum Labels {
    Classes(Apart<i64>),
    Values(Apart<f32>),
}

impl HostBatch for TensorBatch {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn inputs(&self) -> &[f32] {
        self.inputs.get()
    }

    fn targets(&self) -> Targets<'_> {
        match &self.targets {
            Labels::Classes(classes) => Targets::Classes(classes.get()),
            Labels::Values(values) => Targets::Values(values.get()),
        }
    }
}
