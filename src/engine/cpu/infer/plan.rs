//! A compiled network: steps in segments, all memory laid out, run by a team of workers.
//!
//! Large images go through the first segment one by one, so that what a layer writes is still in the cache when the next
//! one reads it; small ones go through the later segments in groups, so that weights are read once for many images. Groups
//! are divided among the workers by image: cores may have no cache in common, and then what one has written is far from
//! the others.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::build::{Network, Weights};
use super::fuse::Fused;
use super::memory::{Context, Geometry, Value, arena};
use super::steps::Step;
use crate::engine::cpu::common::arena::Arena;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::common::team::{Barrier, Team};
use crate::error::{Error, Result};

/// Bytes of one layer's output that each worker may have in a group of images: a few times its second-level cache, because
/// weights are read once per group.
const GROUP: usize = 2 << 20;
/// Larger images are taken one per worker as long as together they take no more, which the third-level cache still holds.
const LARGE: usize = 8 << 20;

struct Segment {
    steps: Range<usize>,
    /// Images that go through the steps together.
    group: usize,
}

pub struct Plan {
    steps: Vec<Box<dyn Step>>,
    segments: Vec<Segment>,
    /// Most images of one run.
    images: usize,
    arena: Arena,
    weights: Arena,
    shared: Arena,
    own: Vec<Arena>,
    input: usize,
    output: usize,
    /// Nodes of each step in the order in which they are computed, and the seconds spent in it so far.
    nodes: Vec<Vec<usize>>,
    /// How each step is computed.
    methods: Vec<&'static str>,
    seconds: Vec<f64>,
}

impl Plan {
    /// # Errors
    /// `Unsupported` for operations without a kernel, `NoMemory` when there is not enough.
    pub fn compile(network: &Network<'_>, images: usize, team: &mut Team) -> Result<Self> {
        let geometries = network.geometries()?;
        let geometry = |node: usize| {
            geometries[node].ok_or_else(|| Error::internal(format_args!("node {node} of the graph has no value")))
        };
        let mut groups = Vec::new();
        for layer in &network.layers {
            let mut floats = geometry(layer.last)?.len();
            for &node in &layer.inputs {
                floats = floats.max(geometry(node)?.len());
            }
            groups.push(group(4 * floats, team.workers()).min(images));
        }
        // Handing over the result is a step too.
        groups.push(images);
        // A small value between large ones (squeeze and excitation) does not make a segment of its own.
        for step in (1..groups.len()).rev() {
            groups[step - 1] = groups[step - 1].min(groups[step]);
        }
        let segments = segments(&groups);
        let segment_of = |step: usize| segments.iter().position(|s| s.steps.contains(&step)).unwrap_or(0);
        let producer = |node: usize| network.layers.iter().position(|l| l.last == node).unwrap_or(0);

        // The last step that reads each layer's value.
        let mut last_use: Vec<usize> = (0..network.layers.len()).collect();
        for (step, layer) in network.layers.iter().enumerate() {
            for &node in layer.inputs.iter().chain(&layer.residual) {
                last_use[producer(node)] = step;
            }
        }
        last_use[producer(network.output)] = network.layers.len();
        let mut outlives: Vec<bool> =
            last_use.iter().enumerate().map(|(step, &used)| segment_of(used) != segment_of(step)).collect();
        spread(&mut outlives, network.together().map(|nodes| nodes.iter().map(|&n| producer(n)).collect()).collect());
        let mut values: Vec<Option<Value>> = vec![None; 2 * network.graph.nodes.len()];
        let (mut room, mut held) = (Room::default(), Vec::new());
        for (step, layer) in network.layers.iter().enumerate() {
            if let Some(before) = &layer.expand {
                // Never whole anywhere: only its geometry counts.
                values[before.last] = Some(Value { geometry: geometry(before.last)?, offset: 0, whole: false });
            }
            let segment = segment_of(step);
            let whole = outlives[step];
            let count = if whole { images } else { segments[segment].group };
            let geometry = geometry(layer.last)?;
            let offset = room.take(geometry, count);
            values[layer.last] = Some(Value { geometry, offset, whole });
            // The steps of a segment come again for every group of images.
            let again = whole && segments[segment].group < images;
            let first = if again { segments[segment].steps.start } else { step };
            let last = if whole { segments[segment_of(last_use[step])].steps.end - 1 } else { last_use[step] };
            held.push(Held { floats: offset..offset + count * geometry.len(), steps: first..last + 1 });
            for (before, &used) in last_use.iter().enumerate().take(step + 1) {
                let Some(value) = values[network.layers[before].last] else { continue };
                // A value of the whole batch is read until its last segment has seen every image.
                let end = if value.whole { segments[segment_of(used)].steps.end - 1 } else { used };
                if end == step {
                    let count = if value.whole { images } else { segments[segment_of(before)].group };
                    room.give(value, count);
                }
            }
        }
        debug_assert_eq!(clash(&held), None, "two values have the same memory at the same time");
        let mut weights = Weights::default();
        let value = |node: usize| {
            values[node].ok_or_else(|| Error::internal(format_args!("node {node} of the graph has no value")))
        };
        let mut steps = Vec::new();
        for layer in &network.layers {
            steps.push(network.step(layer, value, &mut weights)?);
        }
        steps.push(network.store(value(network.output)?));
        let own = steps.iter().map(|s| s.own()).max().unwrap_or(0);
        let images_of = |step: usize| segments[segment_of(step)].group;
        let shared = steps.iter().enumerate().map(|(i, s)| s.shared(images_of(i))).max().unwrap_or(0);
        let elements = |node: usize| network.shapes[node][1..].iter().product();
        let both = |l: &Fused| l.expand.iter().map(|before| before.node).chain([l.node]).collect();
        let mut nodes: Vec<Vec<usize>> = network.layers.iter().map(both).collect();
        nodes.push(vec![network.output]);
        let methods = network.layers.iter().map(|layer| network.named(layer)).chain([""]).collect();
        Ok(Self {
            seconds: vec![0.0; steps.len()],
            steps,
            images,
            arena: arena(room.len)?,
            weights: weights.arena(team)?,
            shared: arena(shared)?,
            own: (0..team.workers()).map(|_| arena(own)).collect::<Result<_>>()?,
            input: elements(0),
            output: elements(network.graph.output),
            nodes,
            methods,
            segments,
        })
    }

    pub fn images(&self) -> usize {
        self.images
    }

    /// (nodes, method, seconds so far) of every step.
    pub fn seconds(&self) -> impl Iterator<Item = (&[usize], &'static str, f64)> {
        let steps = self.nodes.iter().zip(&self.methods).zip(&self.seconds);
        steps.map(|((nodes, method), seconds)| (nodes.as_slice(), *method, *seconds))
    }

    /// Bytes of activations, weights and the workers' memory.
    pub fn bytes(&self) -> [usize; 3] {
        let own: usize = self.own.iter().map(Arena::len).sum();
        [self.arena.len(), self.weights.len(), self.shared.len() + own].map(|floats| 4 * floats)
    }

    /// Images in NCHW, results likewise.
    ///
    /// # Errors
    /// `Argument` for memory of the wrong size, `Panic` when a worker panicked.
    pub fn run(&mut self, team: &mut Team, input: &[f32], output: &mut [f32]) -> Result<()> {
        let images = input.len() / self.input.max(1);
        if images * self.input != input.len() || images * self.output != output.len() {
            return Err(Error::internal(format_args!(
                "{} inputs and {} outputs do not fit",
                input.len(),
                output.len()
            )));
        }
        let chunks = input.chunks(self.images * self.input).zip(output.chunks_mut(self.images * self.output));
        for (input, output) in chunks {
            self.chunk(team, input, output)?;
        }
        Ok(())
    }

    fn chunk(&mut self, team: &mut Team, input: &[f32], output: &mut [f32]) -> Result<()> {
        let images = input.len() / self.input;
        let (from, to) = (Address(input.as_ptr().cast_mut()), Address(output.as_mut_ptr()));
        let shares: Vec<Share> = (0..team.workers()).map(|_| Share::default()).collect();
        let seconds = std::sync::Mutex::new(std::mem::take(&mut self.seconds));
        let plan = &*self;
        let result = team.run(&|worker, barrier| {
            let mut spent = if worker == 0 { seconds.lock().ok() } else { None };
            let mut phases = 0;
            for segment in &plan.segments {
                for first in (0..images).step_by(segment.group) {
                    let group = segment.group.min(images - first);
                    let cx = plan.context(worker, first, group, from.get(), to.get());
                    for step in segment.steps.clone() {
                        let start = Instant::now();
                        plan.step(step, &cx, worker, barrier, &shares, &mut phases);
                        if let Some(spent) = &mut spent {
                            spent[step] += start.elapsed().as_secs_f64();
                        }
                    }
                }
            }
        });
        self.seconds = seconds.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        result
    }

    fn context(&self, worker: usize, first: usize, images: usize, input: *const f32, output: *mut f32) -> Context<'_> {
        let all = |arena: &Arena| arena.at(0, arena.len());
        let (shared, own) = (all(&self.shared), all(&self.own[worker]));
        Context { arena: &self.arena, weights: &self.weights, shared, own, first, images, input, output }
    }

    fn step(
        &self,
        step: usize,
        cx: &Context<'_>,
        worker: usize,
        barrier: &Barrier,
        shares: &[Share],
        phases: &mut usize,
    ) {
        let step = &self.steps[step];
        for phase in 0..step.phases() {
            let tasks = step.tasks(phase, cx.images);
            let (now, next) = (*phases % 2, (*phases + 1) % 2);
            // The other counter rests: everyone has passed the barrier after the phase that used it.
            shares[worker].taken[next].store(0, Ordering::Relaxed);
            // First this worker's share, images that it computed in the step before, then what is left of the others'.
            for owner in (worker..shares.len()).chain(0..worker) {
                let start = tasks * owner / shares.len();
                let end = tasks * (owner + 1) / shares.len();
                let taken = &shares[owner].taken[now];
                // Looking is cheap, counting takes the line away from its owner.
                while start + taken.load(Ordering::Relaxed) < end {
                    let task = start + taken.fetch_add(1, Ordering::Relaxed);
                    if task < end {
                        step.run(phase, task, cx);
                    }
                }
            }
            barrier.wait();
            *phases += 1;
        }
    }
}

/// How many tasks of a worker's share have been taken, by itself or by others; two counters used in turn. On cache lines of
/// its own.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    taken: [AtomicUsize; 2],
}

#[derive(Clone, Copy)]
struct Address(*mut f32);

// SAFETY: an address; the steps write disjoint parts of the output and only read the input.
unsafe impl Sync for Address {}

impl Address {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Images of so many bytes that go through a step together: the same number for every worker where the batch has them, so
/// that each finds in its caches what it wrote in the step before.
fn group(bytes: usize, workers: usize) -> usize {
    match GROUP / bytes {
        0 if bytes * workers > LARGE => 1,
        each => each.max(1) * workers,
    }
}

/// Steps with about the same group size belong together; sizes never fall.
fn segments(groups: &[usize]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for (step, &group) in groups.iter().enumerate() {
        match segments.last_mut() {
            Some(segment) if group < 2 * segment.group => segment.steps.end = step + 1,
            _ => segments.push(Segment { steps: step..step + 1, group }),
        }
    }
    segments
}

/// Where one of a set of values is there for the whole batch, all are: one distance leads from image to image in each.
fn spread(whole: &mut [bool], sets: Vec<Vec<usize>>) {
    let mut sets = sets;
    let (mut before, mut after) = (usize::MAX, sets.len());
    while before != after {
        sets.retain(|set| {
            let any = set.iter().any(|&step| whole[step]);
            set.iter().filter(|_| any).for_each(|&step| whole[step] = true);
            !any
        });
        (before, after) = (after, sets.len());
    }
}

/// Memory for values; a place is used again only for the same geometry, so that zero borders stay zero.
#[derive(Default)]
struct Room {
    len: usize,
    free: Vec<(Geometry, usize, usize)>,
}

impl Room {
    fn take(&mut self, geometry: Geometry, images: usize) -> usize {
        if let Some(at) = self.free.iter().position(|&(g, n, _)| g == geometry && n == images) {
            return self.free.swap_remove(at).2;
        }
        let offset = self.len;
        self.len += images * geometry.len().next_multiple_of(LANES);
        offset
    }

    fn give(&mut self, value: Value, images: usize) {
        self.free.push((value.geometry, images, value.offset));
    }
}

/// A value's memory, and the steps from which to which it is needed.
#[derive(Debug, PartialEq)]
struct Held {
    floats: Range<usize>,
    steps: Range<usize>,
}

/// Two values of which one is written over the other while both are needed.
fn clash(held: &[Held]) -> Option<[&Held; 2]> {
    let meet = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
    let pairs = held.iter().enumerate().flat_map(|(i, a)| held[i + 1..].iter().map(move |b| [a, b]));
    pairs.into_iter().find(|[a, b]| meet(&a.floats, &b.floats) && meet(&a.steps, &b.steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlap_on_purpose_is_found() {
        let held = |floats, steps| Held { floats, steps };
        let apart = [held(0..16, 0..3), held(16..32, 0..9), held(0..16, 3..5)];
        assert_eq!(clash(&apart), None);
        let both = [held(0..16, 0..3), held(16..32, 0..9), held(8..24, 2..5)];
        assert_eq!(clash(&both), Some([&both[0], &both[2]]));
    }

    #[test]
    fn every_worker_gets_as_many_images() {
        assert_eq!([1 << 10, 2 << 20, 3 << 20, 4 << 20, 5 << 20].map(|bytes| group(bytes, 2)), [4096, 2, 2, 2, 1]);
        assert_eq!(group(1 << 20, 8), 16);
    }
}
