//! The threads that PyTorch computes with. Beside them, others would only be in their way: after each operation they spin
//! for milliseconds, waiting for the next.

use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine::cpu::common::team::Team;
use crate::error::{Error, Result, panic_text};
use crate::os;

/// `GOMP_parallel(function, data, threads, flags)`: GNU's entry to a parallel region, which LLVM's and Intel's runtimes have
/// as well.
type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// Threads that run tasks.
pub struct Threads {
    workers: usize,
    pool: Pool,
}

enum Pool {
    OpenMp(Parallel),
    Own(Team),
}

impl Threads {
    /// # Arguments
    /// `torch`: the library whose OpenMP runtime is used, where it has one.
    ///
    /// # Errors
    /// `Threads` where there is none and the system starts no threads.
    pub fn new(workers: usize, torch: Option<&Path>) -> Result<Self> {
        let workers = workers.max(1);
        let found = torch.and_then(|library| os::symbol(library, c"GOMP_parallel"));
        let pool = match found {
            // SAFETY: a runtime of OpenMP that is loaded has this function with this signature; torch keeps it loaded.
            Some(address) => Pool::OpenMp(unsafe { std::mem::transmute::<*const c_void, Parallel>(address) }),
            None => Pool::Own(Team::new(workers, "eager")?),
        };
        Ok(Self { workers, pool })
    }

    pub fn workers(&self) -> usize {
        self.workers
    }

    pub fn is_openmp(&self) -> bool {
        matches!(self.pool, Pool::OpenMp(_))
    }

    /// Runs `work(task, worker)` for every task, each once; `worker` is below [`Self::workers`], and no two threads have the
    /// same at a time.
    ///
    /// # Errors
    /// `Panic` when a task panicked.
    pub fn run(&mut self, tasks: usize, work: &(dyn Fn(usize, usize) + Sync)) -> Result<()> {
        let job = Job {
            tasks,
            next: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            workers: self.workers,
            work,
            failed: Mutex::new(None),
        };
        match &mut self.pool {
            _ if self.workers == 1 || tasks == 1 => job.take_part(),
            Pool::OpenMp(parallel) => {
                let workers = c_uint::try_from(self.workers).unwrap_or(c_uint::MAX);
                let data = std::ptr::from_ref(&job).cast_mut().cast();
                // SAFETY: `enter` takes this job, which outlives the region; it unwinds into nobody.
                unsafe { parallel(enter, data, workers, 0) };
            }
            Pool::Own(team) => {
                if !team.survived_fork() {
                    *team = Team::new(self.workers, "eager")?;
                }
                team.run(&|_, _| job.take_part())?;
            }
        }
        match job.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(text) => Err(Error::Panic(text)),
            None => Ok(()),
        }
    }
}

struct Job<'a> {
    tasks: usize,
    next: AtomicUsize,
    arrived: AtomicUsize,
    workers: usize,
    work: &'a (dyn Fn(usize, usize) + Sync),
    failed: Mutex<Option<String>>,
}

impl Job<'_> {
    /// Tasks until there are none left.
    fn take_part(&self) {
        let worker = self.arrived.fetch_add(1, Ordering::Relaxed);
        if worker >= self.workers {
            return;
        }
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (self.work)(task, worker))) {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic_text(payload.as_ref()));
                self.next.store(self.tasks, Ordering::Relaxed);
            }
        }
    }
}

/// # Safety
/// `data` is a [`Job`] that lives until this returns.
unsafe extern "C" fn enter(data: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { &*data.cast::<Job<'_>>() }.take_part();
}
