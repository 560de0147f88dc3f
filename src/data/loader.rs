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
use crate::image::{Limits, Transform};
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

/// What happens to every sample of an epoch.
pub struct Plan {
    pub rows: Option<Rows>,
    pub transform: Transform,
    pub output: Output,
    pub limits: Limits,
    pub seed: u64,
}

impl Plan {
    /// A table look-up costs less than handing it to another thread.
    fn is_trivial(&self) -> bool {
        self.rows.is_some() && self.transform.ops.is_empty()
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
