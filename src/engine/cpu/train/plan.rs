//! A graph compiled for one shape: layers, memory and schedule.

use super::build::Builder;
use super::layer::{Context, Grain, Layer, Out, Param, share};
use super::loss::{Loss, Part, Targets};
use super::memory::{Memory, Slot};
use super::structure::structure;
use super::update::{PIECE, Updates, reduce_and_update, update_gathered};
use crate::engine::Outcome;
use crate::engine::cpu::common::team::Team;
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
    memory: Memory,
    /// Parameters whose gradients the workers add up.
    params: Vec<Param>,
    output: Out,
    roots: Slot,
    pub batch: usize,
    pub training: bool,
    /// Every worker's part of the last loss.
    parts: Vec<Mutex<Part>>,
}

/// What a pass over a batch needs besides the plan.
pub struct Pass<'a> {
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
    /// `Shape` for layers that cannot take what reaches them, `Unsupported` for what this engine does not do.
    pub fn compile(graph: &Graph, input: &[usize], trained: &[bool], training: bool, workers: usize) -> Result<Self> {
        let structure = structure(graph, input, trained, training)?;
        let mut builder = Builder::new(graph, &structure, trained, training, workers);
        let layers = builder.layers()?;
        let roots = builder.own(PIECE);
        let output = builder.output();
        let (batch, params) = (input.first().copied().unwrap_or(0), builder.params());
        let memory = Memory::new(builder.batch_len, builder.worker_len, workers)?;
        let (segments, tail) = divided(&layers);
        let parts = (0..workers).map(|_| Mutex::new(Part::default())).collect();
        Ok(Self { layers, segments, tail, memory, params, output, roots, batch, training, parts })
    }

    #[cfg(test)]
    pub fn replace_layers(&mut self, layers: Vec<Box<dyn Layer>>) {
        (self.segments, self.tail) = divided(&layers);
        self.layers = layers;
    }

    /// Where Adam's square roots go.
    pub fn roots(&self) -> Slot {
        self.roots
    }

    pub fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// Outputs and loss; in training also the gradients of everything after the last meeting point, while its values
    /// are in the cache.
    ///
    /// # Errors
    /// `Target` for a class the output does not have, `Panic` for a bug of ours.
    pub fn forward_and_tail_backward(&mut self, team: &mut Team, pass: &Pass<'_>) -> Result<Outcome> {
        let classes = self.output.value.len;
        let divisor = pass.loss.divisor(pass.targets, self.batch, classes)?;
        let scaled = divisor * pass.accumulate.max(1) as f64;
        self.memory.set_input(pass.inputs);
        let result = self.on_team(team, pass, &|plan, cx| {
            plan.begin(cx);
            let all = cx.samples.clone();
            plan.run_forward(&plan.segments[..plan.tail], cx);
            let mut total = Part::default();
            for start in all.clone().step_by(MICRO) {
                let cx = cx.with(start..(start + MICRO).min(all.end));
                plan.run_forward(&plan.segments[plan.tail..], &cx);
                for sample in cx.samples.clone() {
                    // SAFETY: a value and a derivative are two slots, and the sample is this worker's.
                    let (output, mut grad) =
                        unsafe { (cx.one(plan.output.value, sample), plan.output.grad.map(|g| cx.one_mut(g, sample))) };
                    total += pass.loss.sample(&output, pass.targets, sample, scaled, grad.as_deref_mut());
                }
                if plan.training {
                    plan.run_backward(&plan.segments[plan.tail..], &cx);
                }
            }
            *plan.parts[cx.worker].lock().unwrap_or_else(PoisonError::into_inner) = total;
        });
        self.memory.clear_input();
        result?;
        let mut total = Part::default();
        for part in &self.parts {
            total += *part.lock().unwrap_or_else(PoisonError::into_inner);
        }
        let correct = matches!(pass.targets, Targets::Classes(_)).then_some(total.correct);
        let (loss, weight) = pass.loss.reported(total.loss, divisor, self.batch);
        Ok(Outcome { loss, weight, correct, counted: total.counted, samples: self.batch as u64 })
    }

    /// The gradients before the last meeting point, and the sums of all: gathered, or applied at once.
    ///
    /// # Errors
    /// `Panic` for a bug of ours.
    pub fn head_backward_and_reduce(&mut self, team: &mut Team, pass: &Pass<'_>) -> Result<()> {
        if !self.training {
            return Err(Error::internal("a plan for validation cannot train"));
        }
        self.memory.set_input(pass.inputs);
        let result = self.on_team(team, pass, &|plan, cx| {
            plan.run_backward(&plan.segments[..plan.tail], cx);
            plan.layers.iter().for_each(|layer| layer.end(cx));
            cx.meet();
            reduce_and_update(cx, &plan.params);
        });
        self.memory.clear_input();
        result
    }

    /// New weights from the gathered gradients.
    ///
    /// # Errors
    /// `Panic` for a bug of ours.
    pub fn update(&mut self, team: &mut Team, pass: &Pass<'_>) -> Result<()> {
        self.on_team(team, pass, &|_, cx| update_gathered(cx))
    }

    /// New weights by the steps that wait.
    ///
    /// # Errors
    /// `Panic` for a bug of ours.
    pub fn settle(&mut self, team: &mut Team, pass: &Pass<'_>) -> Result<()> {
        self.on_team(team, pass, &|plan, cx| plan.layers.iter().for_each(|layer| layer.settle(cx)))
    }

    fn on_team(&self, team: &mut Team, pass: &Pass<'_>, job: &(dyn Fn(&Self, &Context<'_>) + Sync)) -> Result<()> {
        let workers = team.workers();
        self.memory.borrows.begin();
        team.run(&|worker, barrier| {
            let cx = Context {
                memory: &self.memory,
                barrier,
                worker,
                workers,
                samples: share(self.batch, worker, workers, 1),
                batch: self.batch,
                seed: pass.seed,
                step: pass.number,
                updates: pass.updates,
            };
            job(self, &cx);
        })
    }

    fn begin(&self, cx: &Context<'_>) {
        if self.training {
            for grad in self.params.iter().filter_map(|p| p.grad) {
                // SAFETY: one share at a time.
                unsafe { cx.own(grad) }.fill(0.0);
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

/// The segments, and the first after the last meeting point.
fn divided(layers: &[Box<dyn Layer>]) -> (Vec<Segment>, usize) {
    let mut segments = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        match (layer.grain(), segments.last_mut()) {
            (Grain::Sample, Some(Segment::Samples(run))) => run.end = index + 1,
            (Grain::Sample, _) => segments.push(Segment::Samples(index..index + 1)),
            (Grain::Chunk, _) => segments.push(Segment::Chunk(index)),
            (Grain::Batch, _) => segments.push(Segment::Batch(index)),
        }
    }
    let tail = segments.iter().rposition(|s| matches!(s, Segment::Batch(_))).map_or(0, |last| last + 1);
    (segments, tail)
}
