//! How many threads, and the pools they live in.

use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Cores this process may use: cgroup quotas and affinity count, not what the machine has.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// A pool of our own: rayon's global pool hangs in forked children and cannot be resized.
pub struct Pool {
    pool: Arc<rayon::ThreadPool>,
    pid: u32,
}

impl Pool {
    /// # Errors
    /// When the operating system refuses to start the threads.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("cnnrs-{i}"))
            .build()
            .map_err(|e| Error::Threads(format!("cannot start {threads} threads: {e}")))?;
        Ok(Self { pool: Arc::new(pool), pid: std::process::id() })
    }

    /// After `fork` only the forking thread exists in the child: a pool from before is a pool without threads.
    pub fn survived_fork(&self) -> bool {
        self.pid == std::process::id()
    }

    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        self.pool.spawn_fifo(work);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.survived_fork() {
            // The threads to join do not exist here; joining them would wait for ever.
            std::mem::forget(Arc::clone(&self.pool));
        }
    }
}

/// Starts one more thread of `scope`. When the system has none left the others do the work, unless this one `must` be.
///
/// # Errors
/// When a thread that must be cannot be started.
pub fn spawn<'scope>(scope: &'scope Scope<'scope, '_>, must: bool, work: impl FnOnce() + Send + 'scope) -> Result<()> {
    match Builder::new().spawn_scoped(scope, work) {
        Err(error) if must => Err(Error::Threads(format!("cannot start a thread: {error}"))),
        _ => Ok(()),
    }
}

/// The pool of the numeric kernels; `None` until first used.
static COMPUTE: Mutex<Option<Arc<Pool>>> = Mutex::new(None);

/// Sets how many threads [`for_each`] uses (PyTorch's own number, so that neither oversubscribes the other).
///
/// # Errors
/// When the threads cannot be started.
pub fn set_compute_threads(threads: usize) -> Result<()> {
    let mut pool = COMPUTE.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = |p: &Arc<Pool>| p.survived_fork() && p.pool.current_num_threads() == threads.max(1);
    if !pool.as_ref().is_some_and(fits) {
        *pool = Some(Arc::new(Pool::new(threads)?));
    }
    Ok(())
}

/// Runs `work` on every item, on the compute pool where there is more than one item and more than one thread.
pub fn for_each<T: Send>(items: Vec<T>, work: impl Fn(T) + Sync + Send) {
    let pool = COMPUTE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match pool {
        Some(pool) if items.len() > 1 && pool.survived_fork() && pool.pool.current_num_threads() > 1 => {
            pool.pool.install(|| items.into_par_iter().for_each(work));
        }
        _ => items.into_iter().for_each(work),
    }
}
