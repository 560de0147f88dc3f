//! One epoch of `cnnrs.fit` on the cpu engine: hands over the memory of the user's tensors.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::batches::Batches;
use super::dlpack::Kind;
use super::enter::enter;
use super::epoch::{Epoch, Totals, unless_none};
use super::error::{convert, stash};
use super::feature_rows::{FeatureRows, Gathered};
use super::graph::Graph;
use super::record::{Kinds, Record, record, variant};
use super::{rows, tensor};
use crate::engine::cpu::{self, ClassLoss, Clip, CpuEngine, Floats, HostBatch, Loss, Plans, Rule, Targets, Tensor};
use crate::engine::{Engine, Outcome, Phase};
use crate::error::{Error, Result};
use crate::model::Op;
use crate::training::{Metrics, epoch as run};

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

/// What an engine makes of the model's output, and with what.
pub struct Task {
    loss: Loss,
    sgd: Vec<SgdRow>,
    adam: Vec<AdamRow>,
    clip: Option<Clip>,
    /// Threads.
    workers: usize,
    /// Key of this epoch's dropout.
    seed: u64,
    /// Whether nobody looks at weights and optimizer before the epoch ends.
    unseen: bool,
}

impl FromPyObject<'_> for Task {
    fn extract_bound(task: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("task", task, |r| {
            let clip: Option<Bound<'_, PyAny>> = r.get("clip")?;
            Ok(Self {
                loss: variant("loss", &r.get("loss")?, LOSSES)?,
                sgd: r.get("sgd")?,
                adam: r.get("adam")?,
                clip: clip.map(|clip| variant("clip", &clip, CLIPS)).transpose()?,
                workers: r.get("workers")?,
                seed: r.get("seed")?,
                unseen: r.get("unseen")?,
            })
        })
    }
}

/// One epoch of a lowered model. `batches`: iterator of (inputs, targets), already on the CPU, or None where this engine
/// must stop; or (features, labels, order of the rows, ends of the batches in it).
#[pyfunction]
#[pyo3(signature = (epoch, graph, tensors, task, plans, batches))]
pub fn fit_cpu(
    py: Python<'_>,
    epoch: Epoch,
    graph: &Graph,
    tensors: Vec<tensor::Tensor>,
    task: Task,
    plans: &CpuPlans,
    batches: &Bound<'_, PyAny>,
) -> PyResult<Totals> {
    let Epoch { number, phase, accumulate, after } = epoch;
    let Task { loss, sgd, adam, clip, workers, seed, unseen } = task;
    let order: Vec<usize> = sgd.iter().map(|r| r.parameter).chain(adam.iter().map(|r| r.parameter)).collect();
    let graph = graph.inner.clone();
    // These keep the memory alive until the epoch is over.
    let mut owners: Vec<tensor::Tensor> = Vec::new();
    let mut rules = vec![None; tensors.len()];
    if let Some(index) = order.iter().find(|&&index| index >= rules.len()) {
        return Err(PyValueError::new_err(format!("no tensor {index}")));
    }
    for row in sgd {
        let index = row.parameter;
        rules[index] = Some(sgd_rule(row, &mut owners).map_err(|error| convert(py, error))?);
    }
    for row in adam {
        let index = row.parameter;
        rules[index] = Some(adam_rule(row, &mut owners).map_err(|error| convert(py, error))?);
    }
    let memory = tensors.iter().map(memory).collect::<Result<Vec<_>>>().map_err(|error| convert(py, error))?;
    let counters: Vec<usize> = graph.nodes.iter().filter_map(|node| counter(&node.op)).collect();
    let batches = batches_of(batches, taken(&tensors, &owners)).map_err(|error| convert(py, error))?;
    let metrics = enter(py, move || {
        // Taken out, not locked: what the user calls after a batch may validate this very model.
        let mut kept = std::mem::take(&mut *plans.inner.lock().unwrap_or_else(PoisonError::into_inner));
        let engine = CpuEngine::new(graph, &mut kept.plans, memory, loss, rules, clip, accumulate, seed, workers)?;
        let mut engine = InPlace { engine, tensors: &tensors };
        if unseen {
            engine.engine.is_unseen();
        }
        let mut counters = Counters { tensors: &tensors, which: counters, shown: 0 };
        let result = run(Metrics::new(number, phase), &mut engine, batches, accumulate, |engine, batch, loss| {
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
    Ok(Totals::from(&metrics))
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

    fn forward(&mut self, batch: Batch, phase: Phase) -> Result<Outcome> {
        self.check()?;
        self.engine.forward(batch, phase)
    }

    fn backward(&mut self) -> Result<()> {
        self.engine.backward()
    }

    fn step(&mut self) -> Result<()> {
        self.engine.step()
    }

    fn update(&mut self) -> Result<()> {
        self.check()?;
        self.engine.update()
    }

    fn finish(&mut self) -> Result<()> {
        if self.engine.steps_wait() {
            self.check()?;
        }
        self.engine.finish()
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

const LOSSES: &Kinds<Loss> = &[
    ("mse", |_| Ok(Loss::Mse)),
    ("bce_with_logits", |_| Ok(Loss::BceWithLogits)),
    ("nll", |r| classes(r, false, 0.0)),
    ("cross_entropy", |r| classes(r, true, r.get("label_smoothing")?)),
];

fn classes(loss: &Record<'_>, cross_entropy: bool, label_smoothing: f64) -> PyResult<Loss> {
    // As numbers, in whatever order of memory the tensor is.
    let weight: Option<Bound<'_, PyAny>> = loss.get("weight")?;
    let weight = weight.map(|weight| weight.call_method0("tolist")?.extract()).transpose()?;
    let ignore_index = loss.get("ignore_index")?;
    Ok(Loss::Classes(ClassLoss { cross_entropy, weight, ignore_index, label_smoothing }))
}

const CLIPS: &Kinds<Clip> =
    &[("norm", |r| r.get("most").map(Clip::Norm)), ("value", |r| r.get("most").map(Clip::Value))];

/// After the index of its tensor.
type SgdRow = rows::SgdRow<usize, tensor::Tensor>;
type AdamRow = rows::AdamRow<usize, tensor::Tensor>;

fn sgd_rule(row: SgdRow, owners: &mut Vec<tensor::Tensor>) -> Result<Rule> {
    let momentum = row.momentum.map(|(b, used)| lend(b, owners).map(|floats| (floats, used))).transpose()?;
    Ok(Rule::Sgd { options: row.options, momentum })
}

fn adam_rule(row: AdamRow, owners: &mut Vec<tensor::Tensor>) -> Result<Rule> {
    let mut lend = |tensor| lend(tensor, owners);
    let (step, exp_avg, exp_avg_sq) = (lend(row.step)?, lend(row.exp_avg)?, lend(row.exp_avg_sq)?);
    let max_exp_avg_sq = match row.max_exp_avg_sq {
        Some(tensor) => lend(tensor)?,
        // SAFETY: no memory at all.
        None => unsafe { Floats::new(std::ptr::null_mut(), 0) },
    };
    Ok(Rule::Adam { options: row.options, step, exp_avg, exp_avg_sq, max_exp_avg_sq })
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
