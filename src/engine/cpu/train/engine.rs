//! Training and validation for one epoch.

use super::loss::{Loss, Targets};
use super::memory::{self, Tensor};
use super::plan::{Pass, Plan};
use super::statistics::Statistics;
use super::structure;
use super::update::{Clip, Gathered, Rule, Updates};
use super::waiting::{Waiting, most_steps};
use crate::engine::cpu::common::team::Team;
use crate::engine::{Engine, Outcome, Phase};
use crate::error::{Error, Result};
use crate::model::Graph;

/// One batch in the caller's memory.
pub trait HostBatch {
    /// (N, ...)
    fn shape(&self) -> &[usize];
    /// Contiguous float32 of that shape.
    fn inputs(&self) -> &[f32];
    /// N class indices, or one value per output.
    fn targets(&self) -> Targets<'_>;
}

/// Why this engine cannot run a graph on inputs of this shape, with `targets` of this shape where they are values.
pub fn obstacle(graph: &Graph, input: &[usize], targets: Option<&[usize]>) -> Option<String> {
    let trained = vec![true; graph.tensors.len()];
    match (structure::structure(graph, input, &trained, true), targets) {
        (Err(error), _) => Some(error.to_string()),
        (Ok(found), Some(targets)) if found.shapes[graph.output] != targets => {
            Some(format!("the targets have shape {targets:?} and the outputs {:?}", found.shapes[graph.output]))
        }
        _ => None,
    }
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
            Some(team) if team.workers() == workers => Ok(team),
            _ => Team::new(workers, "fit"),
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
    accumulate: usize,
    seed: u64,
    team: Team,
    current: Option<(Key, Plan)>,
    pending: Option<B>,
    /// Number of the batch in hand.
    number: u64,
    /// Training batches that went forward: what `num_batches_tracked` has grown by.
    pub forwards: u64,
    statistics: Statistics,
    /// Steps taken.
    pub steps: u64,
}

impl<'a, B: HostBatch> CpuEngine<'a, B> {
    /// `tensors`: memory of the graph's parameters and buffers; `rules`: what the optimizer does to each; `seed`: key of
    /// this epoch's dropout; `accumulate`: batches per step of the optimizer.
    ///
    /// # Errors
    /// `Argument` for memory of the wrong size or shared by two tensors, or when the threads cannot be started.
    #[allow(clippy::too_many_arguments)] // every one of them is another thing
    pub fn new(
        graph: Graph,
        plans: &'a mut Plans,
        tensors: Vec<Tensor>,
        loss: Loss,
        rules: Vec<Option<Rule>>,
        clip: Option<Clip>,
        accumulate: usize,
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
        memory::check(&tensors, &rules)?;
        let team = plans.team(workers)?;
        let nowhere = memory::Slot { place: memory::Place::Worker, offset: 0, len: 0 };
        let gathered = if accumulate > 1 || matches!(clip, Some(Clip::Norm(_))) {
            let sizes = graph.tensors.iter().zip(&rules);
            let lens: Vec<usize> =
                sizes.map(|(shape, rule)| rule.as_ref().map_or(0, |_| shape.iter().product())).collect();
            Some(Gathered::new(&lens, workers)?)
        } else {
            None
        };
        let statistics = Statistics::of(&graph);
        let (unseen, waiting) = (false, Waiting::default());
        let updates = Updates { rules, roots: nowhere, clip, gathered, unseen, waiting };
        Ok(Self {
            graph,
            plans,
            tensors,
            loss,
            updates,
            accumulate,
            seed,
            team,
            current: None,
            pending: None,
            number: 0,
            forwards: 0,
            statistics,
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
        self.settle()?;
        self.plans.plans.extend(self.current.take());
        let (key, mut plan) = self.plans.take(&self.graph, self.key(shape, training))?;
        plan.memory_mut().tensors.clone_from(&self.tensors);
        self.updates.roots = plan.roots();
        self.current = Some((key, plan));
        Ok(())
    }

    /// What the forward pass has left to do; gradients end up gathered or applied.
    fn rest_of_backward(&mut self) -> Result<()> {
        let batch = self.pending.take().ok_or_else(|| Error::internal("backward() before forward()"))?;
        self.run(Some(&batch), |plan, team, pass| plan.head_backward_and_reduce(team, pass))
    }

    fn stepped(&mut self) {
        self.statistics.kept = None;
        self.updates.finish();
        self.steps += 1;
    }

    /// Nobody looks at weights and optimizer before the epoch ends, in `finish` or `undo`.
    pub fn is_unseen(&mut self) {
        self.updates.unseen = true;
    }

    /// Whether `finish` and `undo` have steps to take.
    pub fn steps_wait(&self) -> bool {
        self.updates.waiting.steps > 0
    }

    /// Takes the steps that wait.
    fn settle(&mut self) -> Result<()> {
        if !self.steps_wait() {
            return Ok(());
        }
        let result = self.run(None, |plan, team, pass| plan.settle(team, pass));
        // Whatever has become of them: never twice.
        self.updates.waiting.steps = 0;
        result
    }

    /// As the optimizer's groups have changed.
    pub fn set_options(&mut self, rows: &[(crate::model::Tensor, Vec<f64>)]) {
        self.updates.set_options(rows);
    }

    fn run<T>(
        &mut self,
        batch: Option<&B>,
        work: impl FnOnce(&mut Plan, &mut Team, &Pass<'_>) -> Result<T>,
    ) -> Result<T> {
        let Some((_, plan)) = &mut self.current else { return Err(Error::internal("no plan")) };
        let pass = Pass {
            inputs: batch.map_or(&[], |batch| batch.inputs()),
            targets: batch.map_or(Targets::Classes(&[]), |batch| batch.targets()),
            loss: &self.loss,
            accumulate: self.accumulate,
            seed: self.seed,
            number: self.number,
            updates: &self.updates,
        };
        work(plan, &mut self.team, &pass)
    }
}

impl<B: HostBatch> Engine for CpuEngine<'_, B> {
    type Batch = B;

    fn forward(&mut self, batch: B, phase: Phase) -> Result<Outcome> {
        let training = phase == Phase::Training;
        let samples = batch.shape().first().copied().unwrap_or(0);
        if samples == 0 {
            return Err(Error::Argument(format!(
                "expected at least one sample, got inputs of shape {:?}",
                batch.shape()
            )));
        }
        if batch.inputs().len() != batch.shape().iter().product::<usize>() {
            return Err(Error::internal(format_args!("{} inputs for shape {:?}", batch.inputs().len(), batch.shape())));
        }
        self.select(batch.shape(), training)?;
        self.number = self.forwards;
        self.statistics.keep(&self.tensors, self.forwards);
        let outcome = self.run(Some(&batch), |plan, team, pass| plan.forward_and_tail_backward(team, pass))?;
        if training {
            self.forwards += 1;
            self.pending = Some(batch);
        } else if outcome.loss.is_finite() {
            self.statistics.kept = None;
        }
        Ok(outcome)
    }

    fn backward(&mut self) -> Result<()> {
        if self.updates.gathered.is_none() {
            return Err(Error::internal("this engine steps after every batch: call step(), or ask for more batches"));
        }
        self.rest_of_backward()?;
        if let Some(gathered) = &mut self.updates.gathered {
            gathered.adds = true;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        if self.updates.gathered.is_some() {
            self.backward()?;
            return self.update();
        }
        // Gradients are applied where they arise.
        self.updates.begin();
        self.updates.waiting.joins = self.updates.may_wait();
        self.rest_of_backward()?;
        if self.updates.waiting.joins {
            let batch = self.current.as_ref().map_or(0, |(_, plan)| plan.batch);
            self.updates.waiting.steps = (self.updates.waiting.steps + 1) % most_steps(batch);
        }
        self.stepped();
        Ok(())
    }

    fn update(&mut self) -> Result<()> {
        self.updates.begin();
        self.run(None, |plan, team, pass| plan.update(team, pass))?;
        if let Some(gathered) = &mut self.updates.gathered {
            gathered.adds = false;
        }
        self.stepped();
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.settle()
    }

    fn undo(&mut self) -> Result<()> {
        self.pending = None;
        self.settle()?;
        if let Some(forwards) = self.statistics.put_back(&self.tensors) {
            self.forwards = forwards;
        }
        Ok(())
    }
}

impl<B> Drop for CpuEngine<'_, B> {
    fn drop(&mut self) {
        // Plans and threads go back for the next epoch.
        self.plans.plans.extend(self.current.take());
        if let Ok(spare) = Team::new(1, "fit") {
            self.plans.team = Some(std::mem::replace(&mut self.team, spare));
        }
    }
}
