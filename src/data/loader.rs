//! From sample descriptions to batches, in order, ahead of the consumer.
//!
//! The consumer submits batches of sample descriptions and polls for the results in the same order; threads of our own
//! (or the consumer itself, with 0 threads) read, decode and transform in between. What a sample becomes depends on its
//! description and the seed only, never on which thread met it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::data::buffers::Memory;
use crate::data::job::Job;
use crate::data::plan::{Input, Plan, Raw, Sample};
use crate::data::ready::Ready;
use crate::error::{Error, Result};
use crate::threads::Pool;

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
    /// The batches on their way, oldest first, with their tickets, which grow.
    queue: VecDeque<(u64, Arc<Job>)>,
    submitted: u64,
    batches: usize,
}

impl Loader {
    /// `threads` 0 means inside `poll`; `batches` is how many buffers wait for re-use after a fork.
    pub fn new(plan: Plan, threads: usize, memory: Arc<Memory>, batches: usize) -> Self {
        let plan = plan.tabulated();
        let threads = if plan.is_trivial() { 0 } else { threads };
        let shared = Arc::new(Shared { plan: Arc::new(plan), memory, cancelled: AtomicBool::new(false) });
        Self { shared, threads, pool: None, queue: VecDeque::new(), submitted: 0, batches }
    }

    /// Returns the batch's ticket, by which the consumer asks for it.
    ///
    /// # Errors
    /// When the operating system refuses to start the threads.
    pub fn submit(&mut self, samples: Vec<Sample>) -> Result<u64> {
        self.survive_fork()?;
        let job = Arc::new(Job::new(samples.into()));
        self.dispatch(&job)?;
        let ticket = self.submitted;
        self.submitted += 1;
        self.queue.push_back((ticket, job));
        Ok(ticket)
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
        let queue: VecDeque<_> = self.queue.iter().map(|(ticket, job)| (*ticket, Arc::new(job.again()))).collect();
        for (_, job) in &queue {
            self.dispatch(job)?;
        }
        self.queue = queue;
        Ok(())
    }

    /// The batch of `ticket`, or `None` when it is not complete after `slice`. Older ones are forgotten: an exception kept
    /// their consumer from asking for them.
    ///
    /// # Errors
    /// When that batch was returned or forgotten before, a forked child cannot start threads, or there is no memory for the batch.
    pub fn poll(&mut self, ticket: u64, slice: Duration) -> Result<Option<Ready>> {
        while self.queue.front().is_some_and(|(oldest, _)| *oldest < ticket) {
            self.queue.pop_front();
        }
        self.survive_fork()?;
        let Some(job) = self.oldest(ticket) else {
            return Err(Error::internal(format_args!("batch {ticket} is not on its way")));
        };
        if self.threads == 0 {
            let deadline = Instant::now() + slice;
            self.shared.work(job, || Instant::now() > deadline);
        }
        if !job.wait(if self.threads == 0 { Duration::ZERO } else { slice }) {
            return Ok(None);
        }
        let ready = job.collect(&self.shared.plan, &self.shared.memory)?;
        if !matches!(ready, Ready::Failed(_)) {
            self.queue.pop_front();
        }
        Ok(Some(ready))
    }

    /// The job of `ticket`, if no older one is left.
    fn oldest(&self, ticket: u64) -> Option<&Arc<Job>> {
        self.queue.front().filter(|(oldest, _)| *oldest == ticket).map(|(_, job)| job)
    }

    /// Whether [`Loader::poll`] has this batch without waiting.
    pub fn is_ready(&self, ticket: u64) -> bool {
        self.queue.iter().any(|(one, job)| *one == ticket && job.wait(Duration::ZERO))
    }

    /// Whether one of the files so far had an EXIF orientation other than upright.
    pub fn saw_turned(&self) -> bool {
        self.shared.plan.turned.load(Ordering::Relaxed)
    }

    /// Gives sample `i` of a batch that [`Loader::poll`] called failed pixels that somebody else decoded.
    ///
    /// # Errors
    /// When these pixels cannot be transformed either.
    pub fn retry(&mut self, ticket: u64, i: usize, raw: Raw) -> Result<()> {
        let Some(job) = self.oldest(ticket) else { return Ok(()) };
        let mut worker = self.shared.memory.worker();
        let outcome = job.run_as(i, &Input::Pixels(raw), &self.shared.plan, &self.shared.memory, &mut worker);
        self.shared.memory.give_back(worker);
        outcome
    }

    /// Does without these failed samples of a batch: their rows of a [`Ready::Batch`] hold nothing, other results lack
    /// them.
    pub fn drop_samples(&mut self, ticket: u64, samples: &[usize]) {
        if let Some(job) = self.oldest(ticket) {
            job.drop_samples(samples);
        }
    }

    /// Forgets this batch, if it is still on its way.
    pub fn discard(&mut self, ticket: u64) {
        self.queue.retain(|(one, _)| *one != ticket);
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The threads end with the sample they are at.
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
