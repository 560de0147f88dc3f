//! All memory of a plan, laid out before the first step.
//!
//! Two workers never touch the same sample of a slot at the same time: the schedule hands every sample to one worker and
//! puts a barrier around the layers that look at the whole batch. That, and that a layer never asks for a slot it is
//! writing, is what makes the slices below sound; the layers are written against it.

use std::ops::Range;

use super::update::Rule;
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

// SAFETY: a `Floats` is an address; who may use it, and when, is the contract of `Floats::new`.
unsafe impl Send for Floats {}
// SAFETY: as above.
unsafe impl Sync for Floats {}

impl Floats {
    /// # Safety
    /// `ptr` must point to `len` initialised floats that stay valid, and that nobody else touches, while the engine that
    /// gets this value exists.
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

    pub(super) fn get<'a>(self) -> &'a [f32] {
        match self.len {
            0 => &[],
            // SAFETY: the contract of `new`; the lifetime ends with the engine's step, within the epoch.
            len => unsafe { std::slice::from_raw_parts(self.ptr, len) },
        }
    }

    pub(super) fn get_mut<'a>(self, range: Range<usize>) -> &'a mut [f32] {
        if range.end > self.len || range.is_empty() {
            return &mut [];
        }
        // SAFETY: the contract of `new`, in bounds; workers ask for disjoint ranges.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
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
        true => Err(Error::Argument("two tensors share memory: use engine='python'".to_owned())),
        false => Ok(()),
    }
}

/// Floats per cache line; arenas start at one, so that no vector of an aligned slot straddles two.
const LINE: usize = 16;

/// Zeroed floats that many workers write, each in its own part.
pub struct Arena {
    ptr: *mut f32,
    len: usize,
    _owner: Vec<f32>,
}

// SAFETY: access goes through `Store`, which hands out disjoint parts.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// # Errors
    /// `Argument` when there is not that much memory.
    pub fn new(len: usize) -> Result<Self> {
        let mut owner = Vec::new();
        owner.try_reserve_exact(len + LINE).map_err(|_| {
            Error::Argument(format!(
                "no memory for {:.1} GiB of values and gradients: use a smaller batch",
                len as f64 * 4.0 / f64::from(1 << 30)
            ))
        })?;
        owner.resize(len + LINE, 0.0);
        let skip = owner.as_ptr().align_offset(4 * LINE).min(LINE);
        Ok(Self { ptr: owner[skip..].as_mut_ptr(), len, _owner: owner })
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the schedule's, see the head of this file
    pub fn slice(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "slot outside its arena");
        // SAFETY: in bounds, initialised, and no other worker holds this range (head of this file).
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

/// Everything a step reads and writes.
pub struct Store {
    batch: Arena,
    workers: Vec<Arena>,
    input: Floats,
    pub tensors: Vec<Tensor>,
}

impl Store {
    /// # Errors
    /// `Argument` when there is not that much memory.
    pub fn new(batch: usize, worker: usize, workers: usize) -> Result<Self> {
        let workers = (0..workers).map(|_| Arena::new(worker)).collect::<Result<_>>()?;
        Ok(Self {
            batch: Arena::new(batch)?,
            workers,
            input: Floats { ptr: std::ptr::null_mut(), len: 0 },
            tensors: Vec::new(),
        })
    }

    /// The batch of the next step: must outlive it.
    pub fn set_input(&mut self, input: &[f32]) {
        self.input = Floats { ptr: input.as_ptr().cast_mut(), len: input.len() };
    }

    pub fn clear_input(&mut self) {
        self.input = Floats { ptr: std::ptr::null_mut(), len: 0 };
    }

    /// Values of consecutive samples (of one sample where the slot is the worker's).
    pub fn get(&self, slot: Slot, worker: usize, samples: Range<usize>) -> &[f32] {
        match slot.place {
            Place::Input => &self.input.get()[samples.start * slot.len..samples.end * slot.len],
            _ => self.get_mut(slot, worker, samples),
        }
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the schedule's, see the head of this file
    pub fn get_mut(&self, slot: Slot, worker: usize, samples: Range<usize>) -> &mut [f32] {
        match slot.place {
            Place::Input => &mut [],
            Place::Batch => {
                self.batch.slice(slot.offset + samples.start * slot.len..slot.offset + samples.end * slot.len)
            }
            Place::Worker => self.workers[worker].slice(slot.offset..slot.offset + slot.len),
        }
    }

    /// A part of one sample's values: workers may write different parts of the same sample.
    #[allow(clippy::mut_from_ref)] // disjointness is the schedule's, see the head of this file
    pub fn part_mut(&self, slot: Slot, sample: usize, part: Range<usize>) -> &mut [f32] {
        let start = slot.offset + sample * slot.len;
        self.batch.slice(start + part.start..start + part.end)
    }

    /// A part of a worker's own slot, for the reduction after a barrier.
    #[allow(clippy::mut_from_ref)] // disjointness is the schedule's, see the head of this file
    pub fn worker_part(&self, slot: Slot, worker: usize, part: Range<usize>) -> &mut [f32] {
        self.workers[worker].slice(slot.offset + part.start..slot.offset + part.end)
    }

    pub fn tensor(&self, tensor: usize) -> &[f32] {
        match self.tensors.get(tensor) {
            Some(Tensor::Floats(floats)) => floats.get(),
            _ => &[],
        }
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the schedule's, see the head of this file
    pub fn tensor_part_mut(&self, tensor: usize, range: Range<usize>) -> &mut [f32] {
        match self.tensors.get(tensor) {
            Some(Tensor::Floats(floats)) => floats.get_mut(range),
            _ => &mut [],
        }
    }
}
