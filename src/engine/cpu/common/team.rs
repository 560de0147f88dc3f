//! A team of threads that runs one job after another with barriers inside.
//!
//! Its own threads are cheaper to wake than a pool's, because between two jobs the team spins for some microseconds before it
//! sleeps. Between PyTorch's operations it computes on PyTorch's threads.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::openmp::OpenMp;
use crate::error::{Error, Result, panic_text};

/// Turns of a spinning loop before a worker yields or sleeps: some ten microseconds.
const SPINS: u32 = 4000;

type Work<'a> = dyn Fn(usize, &Barrier) + Sync + 'a;

/// All workers of a team meet here.
pub struct Barrier {
    workers: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    broken: AtomicBool,
}

impl Barrier {
    fn new(workers: usize) -> Self {
        Self { workers, arrived: AtomicUsize::new(0), generation: AtomicUsize::new(0), broken: AtomicBool::new(false) }
    }

    pub fn wait(&self) {
        if self.workers == 1 {
            return;
        }
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.workers {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation.store(generation.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.generation.load(Ordering::Acquire) == generation {
            if self.broken.load(Ordering::Relaxed) {
                // The worker we wait for has panicked; unwinding here lets the team end the job.
                resume_unwind(Box::new("another worker panicked".to_owned()));
            }
            relax(&mut spins);
        }
    }
}

/// Spins first; another process may have our partner's core, so soon it gives ours away.
fn relax(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

/// Threads that work together on one job.
pub struct Team {
    name: &'static str,
    barrier: Barrier,
    pool: Pool,
    pid: u32,
}

enum Pool {
    Own(Own),
    OpenMp(OpenMp),
}

impl Team {
    /// `name`: what the threads are for, part of their names.
    ///
    /// # Errors
    /// When the operating system refuses to start the threads.
    pub fn new(workers: usize, name: &'static str) -> Result<Self> {
        Self::beside(workers, name, None)
    }

    /// A team for work between the operations of `torch`, the library whose threads do it, where it has OpenMP's.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn beside(workers: usize, name: &'static str, torch: Option<&Path>) -> Result<Self> {
        let workers = workers.max(1);
        let pool = match torch.and_then(OpenMp::of) {
            Some(openmp) if workers > 1 => Pool::OpenMp(openmp),
            _ => Pool::Own(Own::new(workers, name)?),
        };
        Ok(Self { name, barrier: Barrier::new(workers), pool, pid: std::process::id() })
    }

    pub fn workers(&self) -> usize {
        self.barrier.workers
    }

    pub fn is_openmp(&self) -> bool {
        matches!(self.pool, Pool::OpenMp(_))
    }

    /// Runs `job(worker, barrier)` on every worker, the calling thread being worker 0; returns when all are done.
    ///
    /// # Errors
    /// `Panic` when a worker panicked; `Threads` when there are none left.
    pub fn run(&mut self, job: &Work<'_>) -> Result<()> {
        if self.pid != std::process::id() {
            // After `fork` only the forking thread exists in the child, of whatever pool.
            *self = Self::new(self.workers(), self.name)?;
        }
        let (barrier, failed) = (&self.barrier, Mutex::new(None));
        barrier.arrived.store(0, Ordering::Relaxed);
        barrier.broken.store(false, Ordering::Relaxed);
        let guarded = |worker: usize| {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(worker, barrier))) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                // Those that waited for the first one panic as well.
                failed.get_or_insert_with(|| panic_text(payload.as_ref()));
                barrier.broken.store(true, Ordering::Relaxed);
            }
        };
        if let Pool::OpenMp(openmp) = &self.pool
            && !openmp.run(barrier.workers, &guarded)
        {
            self.pool = Pool::Own(Own::new(barrier.workers, self.name)?);
        }
        if let Pool::Own(own) = &mut self.pool {
            own.run(&guarded);
        }
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(text) => Err(Error::Panic(text)),
            None => Ok(()),
        }
    }
}

type Job = *const (dyn Fn(usize) + Sync + 'static);

struct Shared {
    job: Mutex<Option<SendJob>>,
    /// Counts the jobs; a helper that has done the last one waits for it to change.
    generation: AtomicUsize,
    sleepers: AtomicUsize,
    wake: Condvar,
    running: AtomicUsize,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct SendJob(Job);

// SAFETY: the job is `Sync`, and `Own::run` returns only when no helper uses it any more.
unsafe impl Send for SendJob {}

/// Threads of a team's own, and the one that calls it.
struct Own {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    pid: u32,
}

impl Own {
    fn new(workers: usize, name: &str) -> Result<Self> {
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            generation: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let mut own = Self { shared, helpers: Vec::new(), pid: std::process::id() };
        for index in 1..workers {
            let shared = Arc::clone(&own.shared);
            let helper = std::thread::Builder::new()
                .name(format!("cnnrs-{name}-{index}"))
                .spawn(move || help(&shared, index))
                .map_err(|e| Error::Threads(format!("cannot start {workers} threads: {e}")))?;
            own.helpers.push(helper);
        }
        Ok(own)
    }

    /// `job` must not unwind.
    fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        if !self.helpers.is_empty() {
            // SAFETY: only the lifetime changes; this function does not return before `running` is 0, and a helper
            // leaves the job before it counts itself out.
            let job: Job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job) };
            *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(SendJob(job));
            shared.running.store(self.helpers.len(), Ordering::Release);
            shared.generation.fetch_add(1, Ordering::SeqCst);
            if shared.sleepers.load(Ordering::SeqCst) > 0 {
                let _guard = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
                shared.wake.notify_all();
            }
        }
        job(0);
        let mut spins = 0;
        while shared.running.load(Ordering::Acquire) > 0 {
            relax(&mut spins);
        }
    }
}

fn help(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.generation.load(Ordering::SeqCst) == seen && spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        }
        let mut slot = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
        shared.sleepers.fetch_add(1, Ordering::SeqCst);
        while shared.generation.load(Ordering::SeqCst) == seen {
            slot = shared.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        shared.sleepers.fetch_sub(1, Ordering::SeqCst);
        let job = *slot;
        drop(slot);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        seen = seen.wrapping_add(1);
        if let Some(SendJob(job)) = job {
            // SAFETY: `run` put the job here and waits for `running` to fall before it lets the job go.
            unsafe { (*job)(index) };
            shared.running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            // The threads to join do not exist here.
            std::mem::forget(std::mem::take(&mut self.helpers));
            return;
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = self.shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_worker_runs_every_job_and_barriers_hold() {
        let mut team = Team::new(3, "test").unwrap();
        let before = AtomicU64::new(0);
        let wrong = AtomicU64::new(0);
        for round in 1..=2000u64 {
            team.run(&|_, barrier| {
                before.fetch_add(1, Ordering::SeqCst);
                barrier.wait();
                if before.load(Ordering::SeqCst) != 3 * round {
                    wrong.fetch_add(1, Ordering::SeqCst);
                }
                barrier.wait();
            })
            .unwrap();
        }
        assert_eq!((before.load(Ordering::SeqCst), wrong.load(Ordering::SeqCst)), (6000, 0));
    }

    #[test]
    fn helpers_are_named_after_what_they_are_for() {
        let name = Mutex::new(None);
        Team::new(2, "test")
            .unwrap()
            .run(&|worker, _| {
                if worker == 1 {
                    *name.lock().unwrap() = std::thread::current().name().map(str::to_owned);
                }
            })
            .unwrap();
        assert_eq!(name.into_inner().unwrap().as_deref(), Some("cnnrs-test-1"));
    }

    #[test]
    fn a_panic_ends_the_job_and_the_team_goes_on() {
        let mut team = Team::new(2, "test").unwrap();
        for culprit in [0, 1] {
            let result = team.run(&|worker, barrier| {
                assert!(worker != culprit, "boom");
                barrier.wait();
            });
            assert!(matches!(result, Err(Error::Panic(text)) if text.contains("boom")));
        }
        team.run(&|_, barrier| barrier.wait()).unwrap();
    }
}
