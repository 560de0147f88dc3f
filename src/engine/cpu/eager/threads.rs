//! Tasks for the threads that PyTorch computes with.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine::cpu::common::team::Team;
use crate::error::{Error, Result, panic_text};

/// Threads that run tasks.
pub struct Threads(Team);

impl Threads {
    /// # Arguments
    /// `torch`: the library whose OpenMP runtime is used, where it has one.
    ///
    /// # Errors
    /// `Threads` where there is none and the system starts no threads.
    pub fn new(workers: usize, torch: Option<&Path>) -> Result<Self> {
        Ok(Self(Team::beside(workers, "eager", torch)?))
    }

    pub fn workers(&self) -> usize {
        self.0.workers()
    }

    pub fn is_openmp(&self) -> bool {
        self.0.is_openmp()
    }

    /// Runs `work(task, worker)` for every task, each once; `worker` is below [`Self::workers`], and no two threads have the
    /// same at a time.
    ///
    /// # Errors
    /// `Panic` when a task panicked.
    pub fn run(&mut self, tasks: usize, work: &(dyn Fn(usize, usize) + Sync)) -> Result<()> {
        let next = AtomicUsize::new(0);
        let take_part = |worker| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                work(task, worker);
            }
        };
        if tasks < 2 {
            // Nobody needs to be woken for it.
            return catch_unwind(AssertUnwindSafe(|| take_part(0)))
                .map_err(|payload| Error::Panic(panic_text(&*payload)));
        }
        self.0.run(&|worker, _| take_part(worker))
    }
}
