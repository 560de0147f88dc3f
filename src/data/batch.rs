//! Batch buffers: aligned, pooled, filled by many threads at once.
//!
//! Fresh memory for every batch costs a third of the throughput in page faults, so a buffer goes back to its pool when
//! the last tensor that looks at it dies, and the next batch of that size gets it.

use std::mem::size_of;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::Result;
use crate::memory::{filled, product};

/// One cache line: what makes every buffer 64-byte aligned without an allocator of our own.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    Uint8,
    Float32,
}

impl DType {
    pub const fn bytes(self) -> usize {
        match self {
            Self::Uint8 => 1,
            Self::Float32 => 4,
        }
    }
}

/// The buffers that wait for their next batch.
pub struct Buffers {
    free: Mutex<Vec<Vec<Line>>>,
    keep: usize,
}

impl Buffers {
    /// `keep` buffers at most are held back; a caller who collects a whole epoch and lets it go gives the rest to the
    /// system.
    pub fn new(keep: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), keep })
    }

    fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let lines = bytes.div_ceil(size_of::<Line>()).max(1);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // Last in, first out: the buffer that is still in the caches. One of another length only when none fits exactly
        // and little of it is wasted: batches of samples that all differ in size would never meet the same length.
        let fits = free.iter().rposition(|spare| spare.len() == lines);
        let roomy = || free.iter().rposition(|spare| spare.len() >= lines && spare.len() / 2 < lines);
        let found = fits.or_else(roomy).map(|i| free.remove(i));
        drop(free);
        let memory = found.map_or_else(|| filled(Line([0; 64]), lines), Ok)?;
        Ok(Buffer { memory, home: Arc::downgrade(self) })
    }
}

/// Memory that returns to its pool when dropped.
struct Buffer {
    memory: Vec<Line>,
    home: Weak<Buffers>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        // Not `lock`: in a forked child the thread that held the lock may not exist any more.
        let Ok(mut free) = home.free.try_lock() else { return };
        if free.len() >= home.keep && !free.is_empty() {
            free.remove(0);
        }
        if home.keep > 0 {
            free.push(std::mem::take(&mut self.memory));
        }
    }
}

/// `samples` arrays of one shape behind each other, complete and ready to be read.
pub struct Batch {
    buffer: Buffer,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl Batch {
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.buffer.memory.as_mut_ptr().cast()
    }

    /// The elements of a batch of floats, empty for another dtype.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        if self.dtype != DType::Float32 {
            return &mut [];
        }
        let len = self.shape.iter().product::<usize>();
        // SAFETY: as in `bytes`; a buffer begins at a cache line, so it is aligned, and every bit pattern is a float.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.memory.as_mut_ptr().cast(), len) }
    }

    pub fn bytes(&self) -> &[u8] {
        let len = self.shape.iter().product::<usize>() * self.dtype.bytes();
        // SAFETY: `Slots::new` allocated at least this many initialised bytes for this shape and dtype.
        unsafe { std::slice::from_raw_parts(self.buffer.memory.as_ptr().cast(), len) }
    }
}

/// A batch while threads fill it: every sample's slot is handed to one thread at a time.
pub struct Slots {
    start: *mut u8,
    buffer: Buffer,
    taken: Vec<AtomicBool>,
    pub sample: [usize; 3],
    pub dtype: DType,
}

// SAFETY: `start` points into `buffer`, which lives as long as the struct and is not touched otherwise until
// `into_batch` consumes it; writes through `start` go to disjoint slots, each guarded by its flag in `taken`.
unsafe impl Send for Slots {}
// SAFETY: as above; `claim` is the only way to the memory.
unsafe impl Sync for Slots {}

impl Slots {
    /// # Errors
    /// When there is no memory for them.
    pub fn new(buffers: &Arc<Buffers>, samples: usize, sample: [usize; 3], dtype: DType) -> Result<Self> {
        let bytes = product([samples, dtype.bytes()].into_iter().chain(sample))?;
        let mut buffer = buffers.take(bytes)?;
        let start = buffer.memory.as_mut_ptr().cast();
        let taken = (0..samples).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { start, buffer, taken, sample, dtype })
    }

    /// The slot of sample `i`, for the one caller who gets it; `None` when it is out of range or somebody has it.
    pub fn claim(&self, i: usize) -> Option<Slot<'_>> {
        let taken = self.taken.get(i)?;
        if taken.swap(true, Ordering::Acquire) {
            return None;
        }
        let len = self.sample.iter().product::<usize>();
        // SAFETY: `i` is in range, so the slot lies inside the buffer; the flag makes this the only reference to it.
        let start = unsafe { self.start.add(i * len * self.dtype.bytes()) };
        Some(Slot { start, len, dtype: self.dtype, taken, _slots: self })
    }

    pub fn into_batch(self) -> Batch {
        let [channels, height, width] = self.sample;
        Batch { shape: vec![self.taken.len(), channels, height, width], dtype: self.dtype, buffer: self.buffer }
    }
}

pub struct Slot<'a> {
    start: *mut u8,
    len: usize,
    dtype: DType,
    taken: &'a AtomicBool,
    _slots: &'a Slots,
}

impl Slot<'_> {
    /// The slot's elements, empty when the batch is of another dtype.
    pub fn f32(&mut self) -> &mut [f32] {
        if self.dtype != DType::Float32 {
            return &mut [];
        }
        // SAFETY: `len` f32 inside the buffer, aligned because every slot starts a multiple of 4 bytes after a line.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len) }
    }

    /// The slot's elements, empty when the batch is of another dtype.
    pub fn u8(&mut self) -> &mut [u8] {
        if self.dtype == DType::Uint8 { self.bytes() } else { &mut [] }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` elements of `dtype` inside the buffer, exclusively ours.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len * self.dtype.bytes()) }
    }

    /// The sample could not be written: somebody else may try.
    pub fn give_up(self) {
        self.taken.store(false, Ordering::Release);
    }
}

/// One array that is alone in its buffer.
///
/// # Errors
/// When there is no memory for it.
pub fn single(buffers: &Arc<Buffers>, shape: Vec<usize>, dtype: DType, fill: impl FnOnce(&mut [u8])) -> Result<Batch> {
    let len = product(shape.iter().copied())?;
    let slots = Slots::new(buffers, 1, [1, 1, len], dtype)?;
    if let Some(mut slot) = slots.claim(0) {
        fill(slot.bytes());
    }
    Ok(Batch { shape, ..slots.into_batch() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_returns_only_after_its_batch_died() {
        let buffers = Buffers::new(2);
        let mut first = Slots::new(&buffers, 4, [3, 5, 7], DType::Float32).unwrap().into_batch();
        let mut second = Slots::new(&buffers, 4, [3, 5, 7], DType::Float32).unwrap().into_batch();
        let (a, b) = (first.as_mut_ptr(), second.as_mut_ptr());
        assert_ne!(a, b);
        assert_eq!(a as usize % 64, 0);
        drop(first);
        let mut third = Slots::new(&buffers, 4, [3, 5, 7], DType::Float32).unwrap().into_batch();
        assert_eq!(third.as_mut_ptr(), a, "the freed buffer is used again");
        drop(second);
        drop(third);
        assert_eq!(buffers.free.lock().unwrap().len(), 2);
    }

    #[test]
    fn no_more_than_keep_buffers_wait() {
        let buffers = Buffers::new(2);
        let epoch: Vec<_> =
            (0..8).map(|_| Slots::new(&buffers, 2, [1, 8, 8], DType::Uint8).unwrap().into_batch()).collect();
        drop(epoch);
        assert_eq!(buffers.free.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_buffer_of_about_the_size_is_used_again() {
        let buffers = Buffers::new(4);
        let mut large = Slots::new(&buffers, 1, [1, 64, 64], DType::Uint8).unwrap().into_batch();
        let address = large.as_mut_ptr();
        drop(large);
        let mut tiny = Slots::new(&buffers, 1, [1, 8, 8], DType::Uint8).unwrap().into_batch();
        assert_ne!(tiny.as_mut_ptr(), address, "64 bytes do not occupy 4096");
        let mut less = Slots::new(&buffers, 1, [1, 64, 60], DType::Uint8).unwrap().into_batch();
        assert_eq!(less.as_mut_ptr(), address);
        assert_eq!(less.bytes().len(), 64 * 60);
    }

    #[test]
    fn a_slot_has_one_owner() {
        let buffers = Buffers::new(1);
        let slots = Slots::new(&buffers, 2, [1, 2, 2], DType::Float32).unwrap();
        let mut first = slots.claim(0).unwrap();
        assert!(slots.claim(0).is_none());
        assert!(slots.claim(2).is_none());
        first.f32().fill(1.0);
        assert!(first.u8().is_empty());
        first.give_up();
        slots.claim(0).unwrap().f32().fill(2.0);
        slots.claim(1).unwrap().f32().fill(3.0);
        let batch = slots.into_batch();
        assert_eq!(batch.shape, [2, 1, 2, 2]);
        let values: Vec<f32> =
            batch.bytes().chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect();
        assert_eq!(values, [2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]);
    }

    #[test]
    fn threads_write_disjoint_slots() {
        let buffers = Buffers::new(1);
        let slots = Slots::new(&buffers, 64, [1, 3, 11], DType::Uint8).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let slots = &slots;
                scope.spawn(move || {
                    for i in (thread..64).step_by(4) {
                        slots.claim(i).unwrap().u8().fill(u8::try_from(i).unwrap());
                    }
                });
            }
        });
        let batch = slots.into_batch();
        for (i, sample) in batch.bytes().chunks_exact(33).enumerate() {
            assert!(sample.iter().all(|&v| usize::from(v) == i));
        }
    }
}
