//! What a layer of a plan is, and what it sees of a step.

use std::ops::Range;

use super::memory::{Slot, Store, Tensor};
use super::update::Updates;
use super::workers::Barrier;
use crate::model;

/// How much of the batch a layer wants at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// One sample: neighbouring layers of this grain take a sample through all of them while it is in the cache.
    Sample,
    /// All samples of one worker, so that a matrix product is worth its while.
    Chunk,
    /// All samples: the workers meet inside this layer.
    Batch,
}

/// An input of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Edge {
    pub value: Slot,
    /// Where the derivative by this input goes; `None` when nobody wants it.
    pub grad: Option<Slot>,
    /// Another reader of the same value has already written its share.
    pub add: bool,
}

/// The value a layer makes; `grad` is complete when its `backward` runs.
#[derive(Debug, Clone, Copy)]
pub struct Out {
    pub value: Slot,
    pub grad: Option<Slot>,
}

/// A parameter and this worker's share of its gradient; no `grad`, no work for it.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    pub tensor: model::Tensor,
    pub grad: Option<Slot>,
}

/// One worker's view of a step.
pub struct Context<'a> {
    pub store: &'a Store,
    pub barrier: &'a Barrier,
    pub worker: usize,
    pub workers: usize,
    /// The samples to work on.
    pub samples: Range<usize>,
    /// Samples of the whole batch.
    pub batch: usize,
    /// Key of the random numbers, drawn once per epoch, and the number of the step.
    pub seed: u64,
    pub step: u64,
    pub updates: &'a Updates,
}

impl<'a> Context<'a> {
    /// The same step for other samples.
    pub fn with(&self, samples: Range<usize>) -> Context<'a> {
        Context { samples, ..*self }
    }

    /// The values of all of this call's samples, one after the other.
    pub fn rows(&self, slot: Slot) -> &'a [f32] {
        self.store.get(slot, self.worker, self.samples.clone())
    }

    pub fn rows_mut(&self, slot: Slot) -> &'a mut [f32] {
        self.store.get_mut(slot, self.worker, self.samples.clone())
    }

    pub fn one(&self, slot: Slot, sample: usize) -> &'a [f32] {
        self.store.get(slot, self.worker, sample..sample + 1)
    }

    pub fn one_mut(&self, slot: Slot, sample: usize) -> &'a mut [f32] {
        self.store.get_mut(slot, self.worker, sample..sample + 1)
    }

    /// The values of every sample of the batch: only between barriers.
    pub fn all(&self, slot: Slot) -> &'a [f32] {
        self.store.get(slot, self.worker, 0..self.batch)
    }

    /// This worker's own memory.
    pub fn own(&self, slot: Slot) -> &'a mut [f32] {
        self.store.get_mut(slot, self.worker, 0..1)
    }

    pub fn tensor(&self, tensor: model::Tensor) -> &'a [f32] {
        self.store.tensor(tensor)
    }

    pub fn count(&self, tensor: model::Tensor) -> u64 {
        match self.store.tensors.get(tensor) {
            Some(Tensor::Count(count)) => *count,
            _ => 0,
        }
    }
}

/// An operation, or several fused, with its memory. Called with the samples of its grain.
pub trait Layer: Send + Sync {
    fn grain(&self) -> Grain;

    fn forward(&self, cx: &Context<'_>);

    /// From `Out::grad` to the inputs' `grad`s and the parameters' shares.
    fn backward(&self, cx: &Context<'_>);

    /// Once per worker before each step, when the weights are those of this step.
    fn begin(&self, _cx: &Context<'_>) {}

    /// Once per worker after the last `backward` of a step.
    fn end(&self, _cx: &Context<'_>) {}
}

/// The part of `0..len` that belongs to worker `index` of `count`: contiguous, sizes differ by one `unit` at most.
pub fn share(len: usize, index: usize, count: usize, unit: usize) -> Range<usize> {
    let units = len.div_ceil(unit);
    let at = |i: usize| (units * i / count * unit).min(len);
    at(index)..at(index + 1)
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_cover_everything_once() {
        for (len, count, unit) in [(10, 3, 1), (1, 4, 1), (0, 2, 1), (100, 3, 16), (7, 2, 8)] {
            let all: Vec<usize> = (0..count).flat_map(|i| share(len, i, count, unit)).collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
    }
}
