//! What a layer of a plan is, and what it sees of a step.

use std::ops::Range;

use super::memory::{Memory, Part, Read, Slot, Tensor, Write};
use super::update::Updates;
use crate::engine::cpu::common::team::Barrier;
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
    pub memory: &'a Memory,
    pub barrier: &'a Barrier,
    pub worker: usize,
    pub workers: usize,
    /// The samples to work on: this worker's alone between two barriers.
    pub samples: Range<usize>,
    /// Samples of the whole batch.
    pub batch: usize,
    /// Key of the random numbers, drawn once per epoch, and the number of the step.
    pub seed: u64,
    pub step: u64,
    pub updates: &'a Updates,
}

// The promise of whoever calls one of the `unsafe` functions: while the result exists nobody writes these floats, and
// nobody else reads them either when the result is a `Write`. Within a worker it is enough that a layer's slots are
// different memory and that no call takes one twice; between workers, that `samples` are this worker's until the next
// barrier. With debug assertions a broken promise is a panic (`borrows`).
impl<'a> Context<'a> {
    /// The same step for other samples.
    pub fn with(&self, samples: Range<usize>) -> Context<'a> {
        Context { samples, ..*self }
    }

    /// Waits for all workers: what they wrote before, this one may read.
    pub fn meet(&self) {
        self.barrier.wait();
        self.memory.borrows.meet(self.worker);
    }

    /// # Safety
    /// The promise above; and `part` is memory of this step's.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn read(&self, part: Part) -> Read<'a> {
        // SAFETY: memory of the step outlives it; the rest is the caller's promise.
        unsafe { self.memory.read(self.worker, part) }
    }

    /// # Safety
    /// The promise above; and `part` is memory of this step's, not its input.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn write(&self, part: Part) -> Write<'a> {
        // SAFETY: memory of the step outlives it; the rest is the caller's promise.
        unsafe { self.memory.write(self.worker, part) }
    }

    /// The values of all of this call's samples, one after the other.
    ///
    /// # Safety
    /// The promise above.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn rows(&self, slot: Slot) -> Read<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.read(self.memory.values(slot, self.worker, self.samples.clone())) }
    }

    /// # Safety
    /// The promise above; the slot is not the input.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn rows_mut(&self, slot: Slot) -> Write<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.write(self.memory.values(slot, self.worker, self.samples.clone())) }
    }

    /// # Safety
    /// The promise above.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn one(&self, slot: Slot, sample: usize) -> Read<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.read(self.memory.values(slot, self.worker, sample..sample + 1)) }
    }

    /// # Safety
    /// The promise above; the slot is not the input.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn one_mut(&self, slot: Slot, sample: usize) -> Write<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.write(self.memory.values(slot, self.worker, sample..sample + 1)) }
    }

    /// The values of every sample of the batch: only between barriers.
    ///
    /// # Safety
    /// The promise above.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn all(&self, slot: Slot) -> Read<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.read(self.memory.values(slot, self.worker, 0..self.batch)) }
    }

    /// This worker's own memory, which no other worker asks for before the layers are done: it is enough that this call
    /// takes the slot once at a time.
    ///
    /// # Safety
    /// The promise above.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn own(&self, slot: Slot) -> Write<'a> {
        // SAFETY: the caller's promise.
        unsafe { self.write(self.memory.values(slot, self.worker, 0..1)) }
    }

    /// A parameter or buffer, none for `num_batches_tracked`.
    ///
    /// # Safety
    /// The promise above: parameters are written when all layers are done, except by [`Layer`]s that update theirs
    /// themselves.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn tensor(&self, tensor: model::Tensor) -> Read<'a> {
        let floats = self.memory.tensor(tensor);
        // SAFETY: the caller's promise.
        unsafe { self.read(floats.part(0..floats.len())) }
    }

    pub fn count(&self, tensor: model::Tensor) -> u64 {
        match self.memory.tensors.get(tensor) {
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

    /// Takes the steps that wait.
    fn settle(&self, _cx: &Context<'_>) {}
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
