//! From sample descriptions to batches, in order, ahead of the consumer.
//!
//! The consumer submits batches of sample descriptions and polls for the results in the same order; threads of our own
//! (or the consumer itself, with 0 threads) read, decode and transform in between. What a sample becomes depends on its
//! description and the seed only, never on which thread met it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::data::batch::{Batch, Buffers};
use crate::data::job::{Job, Worker};
use crate::error::{Error, Result};
use crate::image::{self, Image, Layout, Limits, Scratch, Transform};
use crate::threads::Pool;

/// Pixels somebody else decoded: packed rows, 1 (gray) or 3 (RGB) bytes per pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raw {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub data: Vec<u8>,
}

/// Where the pixels of a sample come from.
#[derive(Clone, Debug)]
pub enum Input {
    File(PathBuf),
    /// Image `n` of [`Plan::rows`].
    Row(usize),
    Pixels(Raw),
}

#[derive(Clone, Debug)]
pub struct Sample {
    /// Index in the data set and position in the epoch: the key of its random augmentation.
    pub index: u64,
    pub position: u64,
    pub input: Input,
}

/// How pixels become numbers.
pub enum Finish {
    /// As the transform says.
    Transform,
    /// `channels x 256` values: any chain of point operations, as its owner computed it.
    Table(Vec<f32>),
}

pub enum Output {
    /// The transform's pixels, for an operation that only Python knows.
    Pixels,
    Tensor(Finish),
}

/// Gray images of one size behind each other in memory.
pub struct Rows {
    pub data: Box<dyn AsRef<[u8]> + Send + Sync>,
    pub height: usize,
    pub width: usize,
}

impl Rows {
    pub(super) fn get(&self, row: usize) -> Result<&[u8]> {
        let size = self.height * self.width;
        let end = row.checked_add(1).and_then(|next| next.checked_mul(size));
        let pixels = end.and_then(|end| (*self.data).as_ref().get(end - size..end));
        pixels.ok_or_else(|| Error::Argument(format!("image {row} is outside the data it was to be read from")))
    }
}

/// What happens to every sample of an epoch.
pub struct Plan {
    pub rows: Option<Rows>,
    pub transform: Transform,
    pub output: Output,
    pub limits: Limits,
    pub seed: u64,
}

impl Plan {
    /// Whether a sample is a table look-up, which costs less than handing it to another thread.
    fn is_trivial(&self) -> bool {
        let only_finish = self.transform.ops.is_empty() && self.transform.erase.is_none();
        self.rows.is_some() && only_finish && matches!(self.output, Output::Tensor(_))
    }

    /// The row that `input` is, when there is nothing to do but to look its pixels up.
    pub(super) fn row_only(&self, input: &Input) -> Option<usize> {
        match input {
            Input::Row(row) if self.is_trivial() && (self.table().is_some() || self.is_bytes()) => Some(*row),
            _ => None,
        }
    }

    /// What each byte of a gray image becomes.
    pub(super) fn table(&self) -> Option<&[f32; 256]> {
        match &self.output {
            Output::Tensor(Finish::Table(values)) => values.as_slice().try_into().ok(),
            _ => None,
        }
    }

    pub(super) fn is_bytes(&self) -> bool {
        matches!((&self.output, &self.transform.finish), (Output::Tensor(Finish::Transform), image::Finish::Uint8))
    }

    /// The same plan with the finish of gray rows as a table, in the transform's own numbers.
    fn tabulated(mut self) -> Self {
        if self.is_trivial() && matches!(self.output, Output::Tensor(Finish::Transform)) && !self.is_bytes() {
            let every = Image { width: 256, height: 1, layout: Layout::Gray, data: (0..=255).collect() };
            let mut values = vec![0.0; 256];
            // An error is due when a sample meets it.
            if self.transform.finish_f32(&every, &mut Scratch::default(), &mut values).is_ok() {
                self.output = Output::Tensor(Finish::Table(values));
            }
        }
        self
    }
}

pub struct Failure {
    /// Place in the batch.
    pub sample: usize,
    pub error: Error,
}

pub enum Ready {
    Batch(Batch),
    /// Samples of different shapes.
    Ragged(Vec<Batch>),
    Pixels(Vec<Raw>),
    /// Some samples have no pixels: [`Loader::retry`] each of them with pixels from elsewhere, or [`Loader::discard`].
    Failed(Vec<Failure>),
}

/// What survives an epoch: buffers and the threads' scratch space.
pub struct Memory {
    pub(super) buffers: Arc<Buffers>,
    pub(super) loose: Arc<Buffers>,
    workers: Mutex<Vec<Worker>>,
}

impl Memory {
    /// Keeps up to `batches` batch buffers for re-use.
    pub fn new(batches: usize) -> Arc<Self> {
        Arc::new(Self { buffers: Buffers::new(batches), loose: Buffers::new(0), workers: Mutex::default() })
    }

    fn worker(&self) -> Worker {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_back(&self, worker: Worker) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
    }
}

struct Shared {
    plan: Arc<Plan>,
    memory: Arc<Memory>,
    cancelled: AtomicBool,
}

impl Shared {
    /// Runs samples of `job` until none is left or `enough` says so.
    fn work(&self, job: &Job, enough: impl Fn() -> bool) {
        let mut worker = self.memory.worker();
        while !self.cancelled.load(Ordering::Relaxed) && !enough() {
            let Some(i) = job.next() else { break };
            job.run(i, &self.plan, &self.memory, &mut worker);
        }
        self.memory.give_back(worker);
    }
}

pub struct Loader {
    shared: Arc<Shared>,
    threads: usize,
    pool: Option<Pool>,
    queue: VecDeque<Arc<Job>>,
    batches: usize,
}

impl Loader {
    /// `threads` 0 means inside `poll`; `batches` is how many buffers wait for re-use after a fork.
    pub fn new(plan: Plan, threads: usize, memory: Arc<Memory>, batches: usize) -> Self {
        let plan = plan.tabulated();
        let threads = if plan.is_trivial() { 0 } else { threads };
        let shared = Arc::new(Shared { plan: Arc::new(plan), memory, cancelled: AtomicBool::new(false) });
        Self { shared, threads, pool: None, queue: VecDeque::new(), batches }
    }

    pub fn pending(&self) -> usize {
        self.queue.len()
    }

    /// # Errors
    /// When the operating system refuses to start the threads.
    pub fn submit(&mut self, samples: Vec<Sample>) -> Result<()> {
        self.survive_fork()?;
        let job = Arc::new(Job::new(samples.into()));
        self.dispatch(&job)?;
        self.queue.push_back(job);
        Ok(())
    }

    fn dispatch(&mut self, job: &Arc<Job>) -> Result<()> {
        if self.threads == 0 {
            return Ok(());
        }
        let pool = match &mut self.pool {
            Some(pool) => pool,
            none => none.insert(Pool::new(self.threads)?),
        };
        // All threads on the same batch: the next one the consumer waits for is complete first.
        for _ in 0..self.threads.min(job.len()) {
            let (shared, job) = (Arc::clone(&self.shared), Arc::clone(job));
            pool.spawn(move || shared.work(&job, || false));
        }
        Ok(())
    }

    /// In a forked child the threads are gone, with whatever they held: everything submitted starts again.
    fn survive_fork(&mut self) -> Result<()> {
        if self.pool.as_ref().is_none_or(Pool::survived_fork) {
            return Ok(());
        }
        self.pool = None;
        let plan = Arc::clone(&self.shared.plan);
        self.shared = Arc::new(Shared { plan, memory: Memory::new(self.batches), cancelled: AtomicBool::new(false) });
        let queue: VecDeque<_> = self.queue.iter().map(|job| Arc::new(job.again())).collect();
        for job in &queue {
            self.dispatch(job)?;
        }
        self.queue = queue;
        Ok(())
    }

    /// The oldest batch, or `None` when it is not complete after `slice`.
    ///
    /// # Errors
    /// When nothing was submitted, or a forked child cannot start threads.
    pub fn poll(&mut self, slice: Duration) -> Result<Option<Ready>> {
        self.survive_fork()?;
        let Some(job) = self.queue.front() else {
            return Err(Error::Argument("no batch was submitted".into()));
        };
        if self.threads == 0 {
            let deadline = Instant::now() + slice;
            self.shared.work(job, || Instant::now() > deadline);
        }
        if !job.wait(if self.threads == 0 { Duration::ZERO } else { slice }) {
            return Ok(None);
        }
        let ready = job.collect(&self.shared.plan, &self.shared.memory);
        if !matches!(ready, Ready::Failed(_)) {
            self.queue.pop_front();
        }
        Ok(Some(ready))
    }

    /// Gives sample `i` of the oldest batch pixels that somebody else decoded.
    ///
    /// # Errors
    /// When these pixels cannot be transformed either.
    pub fn retry(&mut self, i: usize, raw: Raw) -> Result<()> {
        let Some(job) = self.queue.front() else { return Ok(()) };
        let mut worker = self.shared.memory.worker();
        let outcome = job.run_as(i, &Input::Pixels(raw), &self.shared.plan, &self.shared.memory, &mut worker);
        self.shared.memory.give_back(worker);
        outcome
    }

    /// Forgets the oldest batch.
    pub fn discard(&mut self) {
        self.queue.pop_front();
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The threads end with the sample they are at.
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DType;
    use crate::image::{Finish as Last, Op, PillowOrder};

    struct Bytes(Vec<u8>);
    impl AsRef<[u8]> for Bytes {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    fn plan(ops: Vec<Op>, finish: Last) -> Plan {
        let transform = Transform { ops, finish, order: PillowOrder::Pillow13 };
        let output = Output::Tensor(Finish::Transform);
        Plan { rows: None, transform, output, limits: Limits::default(), seed: 1 }
    }

    fn gray(height: usize, width: usize, value: u8) -> Input {
        Input::Pixels(Raw { height, width, channels: 1, data: vec![value; height * width] })
    }

    fn samples(inputs: impl IntoIterator<Item = Input>) -> Vec<Sample> {
        let inputs = inputs.into_iter().zip(0..);
        inputs.map(|(input, i)| Sample { index: i, position: i, input }).collect()
    }

    fn wait(loader: &mut Loader) -> Ready {
        loop {
            if let Some(ready) = loader.poll(Duration::from_millis(10)).unwrap() {
                return ready;
            }
        }
    }

    #[test]
    fn batches_come_in_the_order_they_were_asked_for() {
        for threads in [0, 1, 4] {
            let mut loader = Loader::new(plan(vec![], Last::Uint8), threads, Memory::new(2), 2);
            for batch in 0..20_u8 {
                loader.submit(samples((0..5).map(|i| gray(3, 4, batch * 5 + i)))).unwrap();
            }
            for batch in 0..20_u8 {
                let Ready::Batch(ready) = wait(&mut loader) else { panic!("equal shapes make a batch") };
                assert_eq!((ready.dtype, ready.shape.as_slice()), (DType::Uint8, [5, 1, 3, 4].as_slice()));
                let expected: Vec<u8> = (0..5).flat_map(|i| vec![batch * 5 + i; 12]).collect();
                assert_eq!(ready.bytes(), expected);
            }
            assert_eq!(loader.pending(), 0);
            assert!(loader.poll(Duration::ZERO).is_err());
        }
    }

    #[test]
    fn different_shapes_come_apart() {
        let mut loader = Loader::new(plan(vec![], Last::Uint8), 3, Memory::new(2), 2);
        loader.submit(samples([gray(1, 2, 1), gray(2, 2, 2), gray(1, 2, 3), gray(3, 1, 4)])).unwrap();
        let Ready::Ragged(ready) = wait(&mut loader) else { panic!("shapes differ") };
        let shapes: Vec<_> = ready.iter().map(|sample| sample.shape.clone()).collect();
        assert_eq!(shapes, [[1, 1, 2], [1, 2, 2], [1, 1, 2], [1, 3, 1]]);
        assert!(ready.iter().zip(1..).all(|(sample, value)| sample.bytes().iter().all(|&byte| byte == value)));
    }

    #[test]
    fn failures_are_all_reported_and_can_be_mended() {
        let missing = || Input::File("/nowhere/at/all.jpg".into());
        let mut loader = Loader::new(plan(vec![], Last::Uint8), 2, Memory::new(2), 2);
        loader.submit(samples([gray(1, 1, 1), missing(), gray(1, 1, 3), missing()])).unwrap();
        loader.submit(samples([missing()])).unwrap();
        let Ready::Failed(failures) = wait(&mut loader) else { panic!("two files are missing") };
        assert_eq!(failures.iter().map(|failure| failure.sample).collect::<Vec<_>>(), [1, 3]);
        assert!(failures.iter().all(|failure| failure.error.to_string().contains("/nowhere/at/all.jpg")));
        for failure in failures {
            let data = vec![u8::try_from(failure.sample).unwrap() + 1];
            loader.retry(failure.sample, Raw { height: 1, width: 1, channels: 1, data }).unwrap();
        }
        let Ready::Batch(batch) = wait(&mut loader) else { panic!("nothing is missing any more") };
        assert_eq!(batch.bytes(), [1, 2, 3, 4]);
        assert!(matches!(wait(&mut loader), Ready::Failed(_)));
        assert!(loader.retry(0, Raw { height: 1, width: 1, channels: 1, data: vec![] }).is_err());
        loader.discard();
        assert_eq!(loader.pending(), 0);
    }

    #[test]
    fn rows_are_looked_up_with_the_transforms_own_numbers() {
        let data: Vec<u8> = (0..=255).cycle().take(3 * 20 * 20).collect();
        let normalize = Last::Normalize { mean: vec![0.1307], std: vec![0.3081] };
        let mut loaders: Vec<_> = [true, false]
            .map(|rows| {
                let mut plan = plan(vec![], normalize.clone());
                plan.rows = rows.then(|| Rows { data: Box::new(Bytes(data.clone())), height: 20, width: 20 });
                Loader::new(plan, 2, Memory::new(2), 2)
            })
            .into();
        loaders[0].submit(samples([2, 0, 1].map(Input::Row))).unwrap();
        let raw = |i: usize| Raw { height: 20, width: 20, channels: 1, data: data[i * 400..(i + 1) * 400].to_vec() };
        loaders[1].submit(samples([2, 0, 1].map(raw).map(Input::Pixels))).unwrap();
        let ready: Vec<_> = loaders.iter_mut().map(wait).collect();
        let [Ready::Batch(a), Ready::Batch(b)] = ready.as_slice() else { panic!("two batches") };
        assert_eq!((a.bytes(), &a.shape), (b.bytes(), &b.shape));

        loaders[0].submit(samples([Input::Row(3)])).unwrap();
        assert!(matches!(wait(&mut loaders[0]), Ready::Failed(_)));
        loaders[0].discard();
        loaders[0].submit(samples([Input::Row(usize::MAX)])).unwrap();
        assert!(matches!(wait(&mut loaders[0]), Ready::Failed(_)));
    }

    #[test]
    fn a_dropped_loader_leaves_its_work() {
        let memory = Memory::new(2);
        let mut loader = Loader::new(plan(vec![], Last::Float), 1, Arc::clone(&memory), 2);
        for _ in 0..500 {
            loader.submit(samples((0..8).map(|i| gray(200, 200, i)))).unwrap();
        }
        let shared = Arc::downgrade(&loader.shared);
        let begin = Instant::now();
        drop(loader);
        while shared.strong_count() > 0 {
            // The work would take seconds; leaving it takes one sample.
            assert!(begin.elapsed() < Duration::from_secs(5), "the threads go on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
