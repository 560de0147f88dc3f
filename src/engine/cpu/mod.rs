//! Training and validation on the CPU without libtorch: the graph is compiled once per input shape into layers with
//! fixed memory, and a team of threads takes the batch through them sample by sample.
//!
//! ```text
//! graph -> structure -> build -> plan --forward--> loss, gradients after the last meeting point
//!                                  \----step-----> the other gradients, reduction, new weights
//! ```
//! Every worker has its own copy of the gradients of small parameters; they are added in the order of the workers, so a
//! run repeats bit for bit with the same number of threads. The gradients of large matrices never exist as a whole.

mod build;
mod geometry;
mod kernels;
mod layer;
mod layers;
mod loss;
mod memory;
mod plan;
mod random;
mod structure;
mod update;
mod workers;

use geometry::{broadcast_map, mean_targets, spans, window_of};
pub use loss::Loss;
pub use memory::{Floats, Tensor};
use plan::Plan;
pub use update::Rule;
use update::Updates;
use workers::Team;

use super::{Engine, Phase, Step};
use crate::error::{Error, Result};
use crate::model::Graph;

/// One batch in the caller's memory.
pub trait HostBatch {
    /// (N, ...)
    fn shape(&self) -> &[usize];
    /// Contiguous float32 of that shape.
    fn inputs(&self) -> &[f32];
    /// N class indices.
    fn targets(&self) -> &[i64];
}

/// Why this engine cannot run a graph on inputs of this shape.
pub fn obstacle(graph: &Graph, input: &[usize]) -> Option<String> {
    let trained = vec![true; graph.tensors.len()];
    structure::structure(graph, input, &trained, true).err().map(|error| error.to_string())
}

/// Plans and threads that outlive an epoch.
#[derive(Default)]
pub struct Plans {
    plans: Vec<(Key, Plan)>,
    team: Option<Team>,
}

/// What a plan depends on.
#[derive(PartialEq)]
struct Key {
    operations: Vec<(crate::model::Op, Vec<usize>)>,
    output: usize,
    tensors: Vec<Vec<usize>>,
    input: Vec<usize>,
    trained: Vec<bool>,
    training: bool,
    workers: usize,
}

/// Full and last batch, in training and in validation.
const KEPT: usize = 4;

impl Plans {
    fn team(&mut self, workers: usize) -> Result<Team> {
        match self.team.take() {
            Some(team) if team.workers() == workers && team.survived_fork() => Ok(team),
            _ => Team::new(workers),
        }
    }

    /// Takes the plan out, or compiles it.
    fn take(&mut self, graph: &Graph, key: Key) -> Result<(Key, Plan)> {
        if let Some(at) = self.plans.iter().position(|(known, _)| *known == key) {
            return Ok(self.plans.remove(at));
        }
        if self.plans.len() >= KEPT {
            self.plans.remove(0);
        }
        let plan = Plan::compile(graph, &key.input, &key.trained, key.training, key.workers)?;
        Ok((key, plan))
    }

    /// Number of compiled plans at hand.
    pub fn len(&self) -> usize {
        self.plans.len()
    }

    pub fn is_empty(&self) -> bool {
        self.plans.is_empty()
    }
}

/// The cpu engine for one epoch.
pub struct CpuEngine<'a, B> {
    graph: Graph,
    plans: &'a mut Plans,
    tensors: Vec<Tensor>,
    loss: Loss,
    updates: Updates,
    seed: u64,
    team: Team,
    current: Option<(Key, Plan)>,
    pending: Option<B>,
    /// Training batches that went forward: what `num_batches_tracked` has grown by.
    pub forwards: u64,
    /// Steps taken.
    pub steps: u64,
}

impl<'a, B: HostBatch> CpuEngine<'a, B> {
    /// `tensors`: memory of the graph's parameters and buffers; `rules`: what the optimizer does to each; `seed`: key of
    /// this epoch's dropout.
    ///
    /// # Errors
    /// `Argument` for memory of the wrong size, or when the threads cannot be started.
    pub fn new(
        graph: Graph,
        plans: &'a mut Plans,
        tensors: Vec<Tensor>,
        loss: Loss,
        rules: Vec<Option<Rule>>,
        seed: u64,
        workers: usize,
    ) -> Result<Self> {
        for (i, (tensor, shape)) in tensors.iter().zip(&graph.tensors).enumerate() {
            let expected: usize = shape.iter().product();
            if let Tensor::Floats(floats) = tensor
                && floats.len() != expected
            {
                return Err(Error::Argument(format!("tensor {i}: {} floats for shape {shape:?}", floats.len())));
            }
        }
        if tensors.len() != graph.tensors.len() || rules.len() != tensors.len() {
            let (got, rules, expected) = (tensors.len(), rules.len(), graph.tensors.len());
            return Err(Error::Argument(format!("{got} tensors and {rules} rules for {expected} of the graph")));
        }
        let team = plans.team(workers)?;
        let nowhere = memory::Slot { place: memory::Place::Worker, offset: 0, len: 0 };
        let updates = Updates { rules, roots: nowhere };
        Ok(Self {
            graph,
            plans,
            tensors,
            loss,
            updates,
            seed,
            team,
            current: None,
            pending: None,
            forwards: 0,
            steps: 0,
        })
    }

    fn key(&self, input: &[usize], training: bool) -> Key {
        Key {
            operations: self.graph.nodes.iter().map(|n| (n.op.clone(), n.inputs.clone())).collect(),
            output: self.graph.output,
            tensors: self.graph.tensors.clone(),
            input: input.to_vec(),
            trained: self.updates.rules.iter().map(Option::is_some).collect(),
            training,
            workers: self.team.workers(),
        }
    }

    /// The plan for this shape, the last one as a rule.
    fn select(&mut self, shape: &[usize], training: bool) -> Result<()> {
        if self.current.as_ref().is_some_and(|(key, _)| key.input == shape && key.training == training) {
            return Ok(());
        }
        self.plans.plans.extend(self.current.take());
        let (key, mut plan) = self.plans.take(&self.graph, self.key(shape, training))?;
        plan.store_mut().tensors.clone_from(&self.tensors);
        self.updates.roots = plan.roots();
        self.current = Some((key, plan));
        Ok(())
    }

    fn run(
        &mut self,
        batch: &B,
        work: impl FnOnce(&mut Plan, &mut Team, &plan::Step<'_>) -> Result<(f64, u64)>,
    ) -> Result<(f64, u64)> {
        let Some((_, plan)) = &mut self.current else { return Err(Error::Argument("no plan".to_owned())) };
        let step = plan::Step {
            inputs: batch.inputs(),
            targets: batch.targets(),
            loss: &self.loss,
            seed: self.seed,
            number: self.steps,
            updates: &self.updates,
        };
        work(plan, &mut self.team, &step)
    }
}

impl<B: HostBatch> Engine for CpuEngine<'_, B> {
    type Batch = B;

    fn forward(&mut self, batch: B, phase: Phase) -> Result<Step> {
        let training = phase == Phase::Training;
        let samples = batch.shape().first().copied().unwrap_or(0);
        if samples == 0 || samples != batch.targets().len() {
            return Err(Error::Argument(format!(
                "expected one target per sample, got inputs of shape {:?} and {} targets",
                batch.shape(),
                batch.targets().len()
            )));
        }
        if batch.inputs().len() != batch.shape().iter().product::<usize>() {
            return Err(Error::Argument(format!("{} inputs for shape {:?}", batch.inputs().len(), batch.shape())));
        }
        self.select(batch.shape(), training)?;
        let (loss, correct) = self.run(&batch, |plan, team, step| plan.forward(team, step))?;
        if training {
            self.forwards += 1;
            self.pending = Some(batch);
        }
        Ok(Step { loss, correct: Some(correct), samples: samples as u64 })
    }

    fn step(&mut self) -> Result<()> {
        let batch = self.pending.take().ok_or_else(|| Error::Argument("step() before forward()".to_owned()))?;
        self.run(&batch, |plan, team, step| plan.step(team, step).map(|()| (0.0, 0)))?;
        self.updates.finish();
        self.steps += 1;
        Ok(())
    }
}

impl<B> Drop for CpuEngine<'_, B> {
    fn drop(&mut self) {
        // Plans and threads go back for the next epoch.
        self.plans.plans.extend(self.current.take());
        if let Ok(spare) = Team::new(1) {
            self.plans.team = Some(std::mem::replace(&mut self.team, spare));
        }
    }
}
