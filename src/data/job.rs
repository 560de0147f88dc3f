//! One batch on its way: which samples are done, and where their results are.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::data::batch::{Batch, DType, Slot, Slots, single};
use crate::data::buffers::{Memory, Worker};
use crate::data::cache::Stamp;
use crate::data::open::read;
use crate::data::plan::{Conversion, Input, Kept, Output, Plan, Raw, Rows, Sample};
use crate::data::ready::{Failure, Ready};
use crate::error::{Error, Result, panic_text};
use crate::image::{self, Key, Layout, look_up};
use crate::memory::copied;

/// A result that has no slot in the batch buffer.
enum Loose {
    Tensor([usize; 3], Vec<u8>),
    Pixels(Raw),
}

pub struct Job {
    samples: Arc<[Sample]>,
    cursor: AtomicUsize,
    slots: RwLock<Option<Slots>>,
    loose: Mutex<Vec<(usize, Loose)>>,
    failures: Mutex<Vec<Failure>>,
    dropped: Mutex<Vec<usize>>,
    done: Mutex<usize>,
    all_done: Condvar,
}

impl Job {
    pub fn new(samples: Arc<[Sample]>) -> Self {
        Self {
            samples,
            cursor: AtomicUsize::new(0),
            slots: RwLock::default(),
            loose: Mutex::default(),
            failures: Mutex::default(),
            dropped: Mutex::default(),
            done: Mutex::default(),
            all_done: Condvar::new(),
        }
    }

    /// The same samples, nothing done.
    pub fn again(&self) -> Self {
        Self::new(Arc::clone(&self.samples))
    }

    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// The next sample nobody has begun.
    pub fn next(&self) -> Option<usize> {
        let i = self.cursor.fetch_add(1, Ordering::Relaxed);
        (i < self.len()).then_some(i)
    }

    /// Whether every sample is done, after at most `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self
            .all_done
            .wait_timeout_while(done, patience, |done| *done < self.len())
            .map_or_else(|poisoned| *poisoned.into_inner().0, |(done, _)| *done);
        done >= self.len()
    }

    pub fn run(&self, i: usize, plan: &Plan, memory: &Memory, worker: &mut Worker) {
        let outcome = match self.samples.get(i) {
            Some(sample) => self.run_as(i, &sample.input, plan, memory, worker),
            None => Ok(()),
        };
        if let Err(error) = outcome {
            self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(Failure { sample: i, error });
        }
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += 1;
        if *done >= self.len() {
            self.all_done.notify_all();
        }
    }

    /// Sample `i` with its pixels from `input`.
    pub fn run_as(&self, i: usize, input: &Input, plan: &Plan, memory: &Memory, worker: &mut Worker) -> Result<()> {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if let Some((rows, row)) = plan.rows.as_ref().zip(plan.row_only(input)) {
                return self.finish_row(i, rows, row, plan, memory);
            }
            load(input, self.samples.get(i).map(|sample| &sample.input), plan, worker)?;
            self.finish(i, input, plan, memory, worker)
        }));
        outcome.unwrap_or_else(|panic| {
            // Whatever the worker held may be half written.
            *worker = Worker::default();
            Err(Error::Panic(panic_text(panic.as_ref())))
        })
    }

    fn finish(&self, i: usize, input: &Input, plan: &Plan, memory: &Memory, worker: &mut Worker) -> Result<()> {
        let Some(sample) = self.samples.get(i) else { return Ok(()) };
        let key = Key { seed: plan.seed, sample: sample.index, position: sample.position };
        let Worker { image, scratch, .. } = worker;
        let transform = &plan.transform;
        let finish = match &plan.output {
            Output::Pixels => {
                transform.pixels(image, key, scratch)?;
                self.keep(i, Loose::Pixels(Raw::of(image)?));
                return Ok(());
            }
            Output::Tensor(finish) => finish,
        };
        let byte = plan.is_bytes();
        let dtype = if byte { DType::Uint8 } else { DType::Float32 };
        let color = !matches!(input, Input::Row(_)) && matches!(image.layout, Layout::Rgbx);
        if let (Conversion::Transform, true, Some((c, h, w))) = (finish, color, plan.shape()) {
            // Known beforehand: the last pass over the pixels may write into the batch.
            return self.fill(i, [c, h, w], dtype, memory, |slot| {
                if byte {
                    transform.apply_u8(image, key, scratch, slot.u8())
                } else {
                    transform.apply_f32(image, key, scratch, slot.f32())
                }
            });
        }
        transform.pixels(image, key, scratch)?;
        self.fill(i, [image.layout.channels(), image.height, image.width], dtype, memory, |slot| {
            match finish {
                Conversion::Transform if byte => transform.finish_u8(image, slot.u8())?,
                Conversion::Transform | Conversion::Spread(_) => transform.finish_f32(image, scratch, slot.f32())?,
                Conversion::Table(table) => look_up(image, table, slot.f32())?,
            }
            if byte { transform.erase_u8(image, key, slot.u8()) } else { transform.erase_f32(image, key, slot.f32()) }
        })
    }

    /// A gray image straight from where it lies: nothing but a table is between it and the batch.
    fn finish_row(&self, i: usize, rows: &Rows, row: usize, plan: &Plan, memory: &Memory) -> Result<()> {
        let pixels = rows.get(row)?;
        let (shape, spread) = ([1, rows.height, rows.width], plan.spread());
        let dtype = if spread.is_some() { DType::Float32 } else { DType::Uint8 };
        self.fill(i, shape, dtype, memory, |slot| {
            match spread {
                Some(spread) => spread.run(pixels, slot.f32()),
                None => slot.u8().copy_from_slice(pixels),
            }
            Ok(())
        })
    }

    /// Lets `write` fill the slot of sample `i`; the first sample decides the shape of the batch.
    fn fill(
        &self,
        i: usize,
        shape: [usize; 3],
        dtype: DType,
        memory: &Memory,
        write: impl FnOnce(&mut Slot) -> Result<()>,
    ) -> Result<()> {
        let mut slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        if slots.is_none() {
            drop(slots);
            let mut empty = self.slots.write().unwrap_or_else(PoisonError::into_inner);
            if empty.is_none() {
                *empty = Some(Slots::new(&memory.buffers, self.len(), shape, dtype)?);
            }
            drop(empty);
            slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(mut slot) = slots.as_ref().filter(|slots| slots.sample == shape).and_then(|slots| slots.claim(i)) {
            let outcome = write(&mut slot);
            if outcome.is_err() {
                slot.give_up();
            }
            return outcome;
        }
        drop(slots);
        let lone = Slots::new(&memory.loose, 1, shape, dtype)?;
        if let Some(mut slot) = lone.claim(0) {
            write(&mut slot)?;
        }
        self.keep(i, Loose::Tensor(shape, copied(lone.into_batch().bytes())?));
        Ok(())
    }

    fn keep(&self, i: usize, result: Loose) {
        self.loose.lock().unwrap_or_else(PoisonError::into_inner).push((i, result));
    }

    pub fn drop_samples(&self, samples: &[usize]) {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(samples);
    }

    /// The results, once `wait` said that every sample is done.
    ///
    /// # Errors
    /// When there is no memory for samples of different shapes.
    pub fn collect(&self, plan: &Plan, memory: &Memory) -> Result<Ready> {
        let mut failures = std::mem::take(&mut *self.failures.lock().unwrap_or_else(PoisonError::into_inner));
        if !failures.is_empty() {
            failures.sort_by_key(|failure| failure.sample);
            return Ok(Ready::Failed(failures));
        }
        let mut loose = std::mem::take(&mut *self.loose.lock().unwrap_or_else(PoisonError::into_inner));
        loose.sort_by_key(|(i, _)| *i);
        if matches!(plan.output, Output::Pixels) {
            let pixels = loose.into_iter().filter_map(|(_, result)| match result {
                Loose::Pixels(raw) => Some(raw),
                Loose::Tensor(..) => None,
            });
            return Ok(Ready::Pixels(pixels.collect()));
        }
        let slots = self.slots.write().unwrap_or_else(PoisonError::into_inner).take();
        Ok(match slots {
            Some(slots) if loose.is_empty() => Ready::Batch(slots.into_batch()),
            Some(slots) => {
                let dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
                Ready::Ragged(apart(slots, loose, &dropped, memory)?)
            }
            None => Ready::Ragged(Vec::new()),
        })
    }
}

/// One array per sample but the `dropped`, those from the slots and those beside them, in sample order.
fn apart(slots: Slots, loose: Vec<(usize, Loose)>, dropped: &[usize], memory: &Memory) -> Result<Vec<Batch>> {
    let (shape, dtype) = (slots.sample, slots.dtype);
    let batch = slots.into_batch();
    let bytes = shape.iter().product::<usize>() * dtype.bytes();
    let samples = batch.shape.first().copied().unwrap_or_default();
    let mut beside = loose.into_iter().peekable();
    let mut all = Vec::with_capacity(samples);
    for i in (0..samples).filter(|i| !dropped.contains(i)) {
        match beside.next_if(|(at, _)| *at == i) {
            Some((_, Loose::Tensor(shape, data))) => {
                all.push(single(&memory.loose, shape.to_vec(), dtype, |slot| slot.copy_from_slice(&data))?);
            }
            _ => {
                let data = batch.bytes().get(i * bytes..(i + 1) * bytes).unwrap_or_default();
                all.push(single(&memory.loose, shape.to_vec(), dtype, |slot| slot.copy_from_slice(data))?);
            }
        }
    }
    Ok(all)
}

/// Brings the pixels of a sample into the worker. `file` is where they would have come from.
fn load(input: &Input, file: Option<&Input>, plan: &Plan, worker: &mut Worker) -> Result<()> {
    match (input, &plan.kept) {
        (Input::File(path), Some(kept)) => load_kept(path, kept, plan, worker),
        (Input::File(path), None) => decode(path, plan, worker),
        (Input::Row(row), _) => {
            let Some(rows) = &plan.rows else {
                return Err(Error::internal(format_args!("image {row} is a row of nothing")));
            };
            worker.image.unpack(rows.height, rows.width, 1, rows.get(*row)?)
        }
        (Input::Pixels(raw), kept) => {
            let stamp = match (kept, file) {
                // Before its pixels are used: when the file changes meanwhile, the stamp is the old one.
                (Some(kept), Some(Input::File(path))) => Some((kept, path, Stamp::of(path)?)),
                _ => None,
            };
            worker.image.unpack(raw.height, raw.width, raw.channels, &raw.data)?;
            stamp.map_or(Ok(()), |(kept, path, stamp)| keep(path, stamp, kept, worker))
        }
    }
}

fn decode(path: &Path, plan: &Plan, worker: &mut Worker) -> Result<()> {
    read(path, &plan.read.limits, &mut worker.file)?;
    let seen = image::decode_with(&worker.file, &plan.read, &mut worker.image).map_err(|error| error.at(path))?;
    if seen.orientation != 1 {
        plan.turned.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// The image behind the operations of `kept.prefix`, from the cache if the file is still the one it was made from.
fn load_kept(path: &Path, kept: &Kept, plan: &Plan, worker: &mut Worker) -> Result<()> {
    let stamp = Stamp::of(path)?;
    if kept.cache.get(path, stamp, &mut worker.image) {
        return Ok(());
    }
    decode(path, plan, worker)?;
    keep(path, stamp, kept, worker)
}

fn keep(path: &Path, stamp: Stamp, kept: &Kept, worker: &mut Worker) -> Result<()> {
    kept.prefix.pixels(&mut worker.image, Key::default(), &mut worker.scratch)?;
    kept.cache.put(path, stamp, &worker.image);
    Ok(())
}
