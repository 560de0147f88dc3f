//! All memory of a plan, laid out before the first step.
//!
//! Workers and layers share it without locks. The schedule hands every sample to one worker, and puts barriers around
//! the layers that look at the whole batch; a layer's own slots are different memory, except where it works in place.
//! Whoever takes a slice promises that this is enough; with debug assertions `borrows` checks every such promise.

use std::ops::{Deref, DerefMut, Range};

use super::borrows::{Borrows, Held};
use super::update::Rule;
use crate::engine::cpu::common::arena::Arena;
use crate::error::{Error, Result};

/// Where a value lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The caller's batch; read only.
    Input,
    /// One copy per sample.
    Batch,
    /// One copy per worker, reused from sample to sample.
    Worker,
}

/// A value of `len` floats per sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub place: Place,
    pub offset: usize,
    pub len: usize,
}

/// Memory of somebody else (a torch tensor), lent for one epoch.
#[derive(Debug, Clone, Copy)]
pub struct Floats {
    ptr: *mut f32,
    len: usize,
}

// SAFETY: a `Floats` is an address; who may use it, and when, is the contract of `Floats::new` and of what reads it.
unsafe impl Send for Floats {}
// SAFETY: as for `Send`: sharing an address reads nothing.
unsafe impl Sync for Floats {}

impl Floats {
    pub(super) const NONE: Self = Self { ptr: std::ptr::null_mut(), len: 0 };

    /// # Safety
    /// `ptr` must point to `len` initialised floats that stay valid while the engine that gets this value exists, and that
    /// nobody else touches while one of its methods runs.
    pub unsafe fn new(ptr: *mut f32, len: usize) -> Self {
        Self { ptr, len }
    }

    /// The floats of a slice, for callers that own the memory in Rust.
    ///
    /// # Safety
    /// As for [`Floats::new`]: the slice must outlive the engine and not be used meanwhile.
    pub unsafe fn of(slice: &mut [f32]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len() }
    }

    pub fn len(self) -> usize {
        self.len
    }

    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Where some of them are; nothing of no memory at all.
    pub(super) fn part(self, range: Range<usize>) -> Part {
        if self.len == 0 || range.is_empty() {
            return Part::NOTHING;
        }
        assert!(range.end <= self.len, "floats {range:?} of {}", self.len);
        Part { start: self.ptr.wrapping_add(range.start), len: range.len() }
    }

    /// The address of one of them, null beyond the last: to be fetched ahead of time, not to be read.
    pub(super) fn address(self, index: usize) -> *const f32 {
        if index < self.len { self.ptr.wrapping_add(index) } else { std::ptr::null() }
    }

    /// All of them.
    ///
    /// # Safety
    /// No step is running: it could write them.
    pub(super) unsafe fn get<'a>(self) -> &'a [f32] {
        let Part { start, len } = self.part(0..self.len);
        // SAFETY: valid by the contract of `new`, and the caller's promise that nobody writes.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// All of them.
    ///
    /// # Safety
    /// No step is running, and the caller has no other slice of them.
    pub(super) unsafe fn get_mut<'a>(self) -> &'a mut [f32] {
        let Part { start, len } = self.part(0..self.len);
        // SAFETY: valid by the contract of `new`, and the caller's promise that nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// The address of some floats that are valid as long as their owner is.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub start: *mut f32,
    pub len: usize,
}

impl Part {
    const NOTHING: Self = Self { start: std::ptr::NonNull::dangling().as_ptr(), len: 0 };

    pub fn of(arena: &Arena, range: Range<usize>) -> Self {
        Self { start: arena.at(range.start, range.len()), len: range.len() }
    }
}

/// Floats that nobody writes meanwhile.
pub struct Read<'a> {
    floats: &'a [f32],
    _held: Held<'a>,
}

/// Floats that nobody else has meanwhile.
pub struct Write<'a> {
    floats: &'a mut [f32],
    _held: Held<'a>,
}

impl Deref for Read<'_> {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        self.floats
    }
}

impl Deref for Write<'_> {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        self.floats
    }
}

impl DerefMut for Write<'_> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        self.floats
    }
}

/// A parameter or buffer of the graph.
#[derive(Debug, Clone, Copy)]
pub enum Tensor {
    Floats(Floats),
    /// `num_batches_tracked` before the epoch; its owner adds the epoch's batches.
    Count(u64),
}

/// Memory that a step writes must have one owner, and optimizer state the size of its parameter.
///
/// # Errors
/// `Argument` where it is not so.
pub fn check(tensors: &[Tensor], rules: &[Option<Rule>]) -> Result<()> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    let mut own = |floats: &Floats| all.push((floats.ptr as usize, floats.ptr as usize + 4 * floats.len));
    for (tensor, rule) in tensors.iter().zip(rules) {
        let Tensor::Floats(floats) = tensor else { continue };
        own(floats);
        let state: &[&Floats] = match rule {
            None | Some(Rule::Sgd { momentum: None, .. }) => &[],
            Some(Rule::Sgd { momentum: Some((buffer, _)), .. }) => &[buffer],
            Some(Rule::Adam { step, exp_avg, exp_avg_sq, max_exp_avg_sq, .. }) => {
                own(step);
                if max_exp_avg_sq.is_empty() { &[exp_avg, exp_avg_sq] } else { &[exp_avg, exp_avg_sq, max_exp_avg_sq] }
            }
        };
        for state in state {
            if state.len != floats.len {
                let (found, expected) = (state.len, floats.len);
                return Err(Error::Argument(format!("{found} numbers of optimizer state for {expected} of a weight")));
            }
            own(state);
        }
    }
    all.retain(|(start, end)| start < end);
    all.sort_unstable();
    let trained = rules.iter().any(Option::is_some);
    match trained && all.windows(2).any(|pair| pair[1].0 < pair[0].1) {
        true => Err(Error::Unsupported("two tensors share memory: use engine='python'".to_owned())),
        false => Ok(()),
    }
}

/// # Errors
/// `NoMemory` when there is not that much memory.
pub fn arena(len: usize) -> Result<Arena> {
    Arena::heap(len).ok_or_else(|| {
        Error::NoMemory(format!(
            "no memory for {:.1} GiB of values and gradients: use a smaller batch",
            len as f64 * 4.0 / f64::from(1 << 30)
        ))
    })
}

/// Everything a step reads and writes.
pub struct Memory {
    batch: Arena,
    workers: Vec<Arena>,
    input: Floats,
    pub tensors: Vec<Tensor>,
    pub borrows: Borrows,
}

impl Memory {
    /// # Errors
    /// `NoMemory` when there is not that much memory.
    pub fn new(batch: usize, worker: usize, workers: usize) -> Result<Self> {
        Ok(Self {
            batch: arena(batch)?,
            workers: (0..workers).map(|_| arena(worker)).collect::<Result<_>>()?,
            input: Floats::NONE,
            tensors: Vec::new(),
            borrows: Borrows::new(workers),
        })
    }

    /// The batch of the next step: must outlive it.
    pub fn set_input(&mut self, input: &[f32]) {
        self.input = Floats { ptr: input.as_ptr().cast_mut(), len: input.len() };
    }

    pub fn clear_input(&mut self) {
        self.input = Floats::NONE;
    }

    /// Values of consecutive samples (of one sample where the slot is the worker's).
    #[inline]
    pub fn values(&self, slot: Slot, worker: usize, samples: Range<usize>) -> Part {
        let range = samples.start * slot.len..samples.end * slot.len;
        match slot.place {
            Place::Input => self.input.part(range),
            Place::Batch => Part::of(&self.batch, slot.offset + range.start..slot.offset + range.end),
            Place::Worker => Part::of(&self.workers[worker], slot.offset..slot.offset + slot.len),
        }
    }

    /// A part of one sample's values: workers may write different parts of the same sample.
    pub fn part_of_sample(&self, slot: Slot, sample: usize, part: Range<usize>) -> Part {
        let start = slot.offset + sample * slot.len;
        Part::of(&self.batch, start + part.start..start + part.end)
    }

    /// A part of a worker's own slot, for the reduction after a barrier.
    pub fn part_of_worker(&self, slot: Slot, worker: usize, part: Range<usize>) -> Part {
        Part::of(&self.workers[worker], slot.offset + part.start..slot.offset + part.end)
    }

    /// The floats of a tensor, none of a counter.
    #[inline]
    pub fn tensor(&self, tensor: usize) -> Floats {
        match self.tensors.get(tensor) {
            Some(Tensor::Floats(floats)) => *floats,
            _ => Floats::NONE,
        }
    }

    /// # Safety
    /// `part` is initialised memory that outlives this memory's borrow, and nobody writes it before the result is
    /// dropped.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn read(&self, worker: usize, part: Part) -> Read<'_> {
        let held = self.borrows.hold(worker, part, false);
        // SAFETY: the caller's promise.
        Read { floats: unsafe { std::slice::from_raw_parts(part.start, part.len) }, _held: held }
    }

    /// # Safety
    /// `part` is initialised memory that outlives this memory's borrow, and nobody else reads or writes it before the
    /// result is dropped.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn write(&self, worker: usize, part: Part) -> Write<'_> {
        let held = self.borrows.hold(worker, part, true);
        // SAFETY: the caller's promise.
        Write { floats: unsafe { std::slice::from_raw_parts_mut(part.start, part.len) }, _held: held }
    }
}
