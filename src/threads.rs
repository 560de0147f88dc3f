//! How many threads, and the pools they live in.

use std::num::NonZero;
use std::sync::Arc;

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
            .map_err(|e| Error::Argument(format!("cannot start {threads} threads: {e}")))?;
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
