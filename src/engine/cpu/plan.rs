//! A graph compiled for one shape: layers, memory and schedule.

use super::build::Builder;
use super::layer::{Context, Grain, Layer, Out, Param, share};
use super::loss::{Loss, Part, Targets};
use super::memory::{Slot, Store};
use super::structure::structure;
use super::update::{PIECE, Updates, reduce_and_update, update_gathered};
use super::workers::Team;
use crate::error::{Error, Result};
use crate::model::Graph;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Layers that run one after the other without meeting the other workers.
enum Segment {
    /// Sample by sample through all of them.
    Samples(Range<usize>),
    /// All samples of the worker at once.
    Chunk(usize),
    /// The workers meet inside.
    Batch(usize),
}

/// Samples that go through the layers after the last meeting point together: their values stay in the cache from
/// forward to backward.
const MICRO: usize = 32;

pub struct Plan {
    layers: Vec<Box<dyn Layer>>,
    segments: Vec<Segment>,
    /// First segment after the last meeting point.
    tail: usize,
    store: Store,
    /// Parameters whose gradients the workers add up.
    params: Vec<Param>,
    output: Out,
    roots: Slot,
    pub batch: usize,
    pub training: bool,
    /// Every worker's part of the last loss.
    parts: Vec<Mutex<Part>>,
}

/// What a step needs besides the plan.
pub struct Step<'a> {
    pub inputs: &'a [f32],
    pub targets: Targets<'a>,
    pub loss: &'a Loss,
    /// Batches per step of the optimizer: the gradient is divided by it.
    pub accumulate: usize,
    pub seed: u64,
    /// Number of the batch.
    pub number: u64,
    pub updates: &'a Updates,
}

impl Plan {
    /// Lays out everything for inputs of shape `input`; `trained`: which tensors the optimizer holds.
    ///
    /// # Errors
    /// `Shape` for layers that cannot take what reaches them, `Argument` for what this engine does not do.
    pub fn compile(graph: &Graph, input: &[usize], trained: &[bool], training: bool, workers: usize) -> Result<Self> {
        let structure = structure(graph, input, trained, training)?;
        let mut builder = Builder::new(graph, &structure, trained, training, workers);
        let layers = builder.layers()?;
        let roots = builder.own(PIECE);
        let output = builder.output();
        let (batch, params) = (input.first().copied().unwrap_or(0), builder.params());
        let store = Store::new(builder.batch_len, builder.worker_len, workers)?;
        let segments = segments(&layers);
        let tail = segments.iter().rposition(|s| matches!(s, Segment::Batch(_))).map_or(0, |last| last + 1);
        let parts = (0..workers).map(|_| Mutex::new(Part::default())).collect();
        Ok(Self { layers, segments, tail, store, params, output, roots, batch, training, parts })
    }

    /// Where Adam's square roots go.
    pub fn roots(&self) -> Slot {
        self.roots
    }

    pub fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    /// Outputs, and of the loss: sum, what divides it, correct and counted predictions; in training also the gradients of
    /// everything after the last meeting point.
    ///
    /// # Errors
    /// `Target` for a class the output does not have, `Panic` for a bug of ours.
    pub fn forward(&mut self, team: &mut Team, step: &Step<'_>) -> Result<(f64, f64, Option<u64>, u64)> {
        let classes = self.output.value.len;
        let divisor = step.loss.divisor(step.targets, self.batch, classes)?;
        let scaled = divisor * step.accumulate.max(1) as f64;
        self.store.set_input(step.inputs);
        let result = self.on_team(team, step, &|plan, cx| {
            plan.begin(cx);
            let all = cx.samples.clone();
            plan.run_forward(&plan.segments[..plan.tail], cx);
            let mut total = Part::default();
            for start in all.clone().step_by(MICRO) {
                let cx = cx.with(start..(start + MICRO).min(all.end));
                plan.run_forward(&plan.segments[plan.tail..], &cx);
                for sample in cx.samples.clone() {
                    let grad = plan.output.grad.map(|g| cx.one_mut(g, sample));
                    let output = cx.one(plan.output.value, sample);
                    total += step.loss.sample(output, step.targets, sample, scaled, grad);
                }
                if plan.training {
                    plan.run_backward(&plan.segments[plan.tail..], &cx);
                }
            }
            *plan.parts[cx.worker].lock().unwrap_or_else(PoisonError::into_inner) = total;
        });
        self.store.clear_input();
        result?;
        let mut total = Part::default();
        for part in &self.parts {
            total += *part.lock().unwrap_or_else(PoisonError::into_inner);
        }
        let correct = matches!(step.targets, Targets::Classes(_)).then_some(total.correct);
        let (loss, weight) = step.loss.reported(total.loss, divisor, self.batch);
        Ok((loss, weight, correct, total.counted))
    }

    /// The rest of the gradients, and new weights unless gradients are gathered first.
    ///
    /// # Errors
    /// `Panic` for a bug of ours.
    pub fn backward(&mut self, team: &mut Team, step: &Step<'_>) -> Result<()> {
        if !self.training {
            return Err(Error::Argument("a plan for validation cannot train".to_owned()));
        }
        self.store.set_input(step.inputs);
        let result = self.on_team(team, step, &|plan, cx| {
            plan.run_backward(&plan.segments[..plan.tail], cx);
            plan.layers.iter().for_each(|layer| layer.end(cx));
            cx.barrier.wait();
            reduce_and_update(cx, &plan.params, &plan.store);
        });
        self.store.clear_input();
        result
    }

    /// New weights from the gathered gradients.
    ///
    /// # Errors
    /// `Panic` for a bug of ours.
    pub fn update(&mut self, team: &mut Team, step: &Step<'_>) -> Result<()> {
        self.on_team(team, step, &|_, cx| update_gathered(cx))
    }

    fn on_team(&self, team: &mut Team, step: &Step<'_>, job: &(dyn Fn(&Self, &Context<'_>) + Sync)) -> Result<()> {
        let workers = team.workers();
        team.run(&|worker, barrier| {
            let cx = Context {
                store: &self.store,
                barrier,
                worker,
                workers,
                samples: share(self.batch, worker, workers, 1),
                batch: self.batch,
                seed: step.seed,
                step: step.number,
                updates: step.updates,
            };
            job(self, &cx);
        })
    }

    fn begin(&self, cx: &Context<'_>) {
        if self.training {
            for grad in self.params.iter().filter_map(|p| p.grad) {
                cx.own(grad).fill(0.0);
            }
        }
        self.layers.iter().for_each(|layer| layer.begin(cx));
    }

    fn run_forward(&self, segments: &[Segment], cx: &Context<'_>) {
        for segment in segments {
            match segment {
                Segment::Samples(run) => {
                    for sample in cx.samples.clone() {
                        let cx = cx.with(sample..sample + 1);
                        self.layers[run.clone()].iter().for_each(|layer| layer.forward(&cx));
                    }
                }
                Segment::Chunk(layer) | Segment::Batch(layer) => self.layers[*layer].forward(cx),
            }
        }
    }

    fn run_backward(&self, segments: &[Segment], cx: &Context<'_>) {
        for segment in segments.iter().rev() {
            match segment {
                Segment::Samples(run) => {
                    for sample in cx.samples.clone() {
                        let cx = cx.with(sample..sample + 1);
                        self.layers[run.clone()].iter().rev().for_each(|layer| layer.backward(&cx));
                    }
                }
                Segment::Chunk(layer) | Segment::Batch(layer) => self.layers[*layer].backward(cx),
            }
        }
    }
}

fn segments(layers: &[Box<dyn Layer>]) -> Vec<Segment> {
    let mut segments = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        match (layer.grain(), segments.last_mut()) {
            (Grain::Sample, Some(Segment::Samples(run))) => run.end = index + 1,
            (Grain::Sample, _) => segments.push(Segment::Samples(index..index + 1)),
            (Grain::Chunk, _) => segments.push(Segment::Chunk(index)),
            (Grain::Batch, _) => segments.push(Segment::Batch(index)),
        }
    }
    segments
}
