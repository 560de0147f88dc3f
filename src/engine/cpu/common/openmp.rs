//! The threads that PyTorch computes with. Beside them, others would only be in their way: after each operation they spin
//! for milliseconds, waiting for the next.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::os;

/// `GOMP_parallel(function, data, threads, flags)`: GNU's entry to a parallel region, which LLVM's and Intel's runtimes have
/// as well.
type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
/// `omp_get_thread_num` and `omp_get_num_threads`.
type Number = unsafe extern "C" fn() -> c_int;

/// The process that has loaded this code.
static PROCESS: OnceLock<u32> = OnceLock::new();

/// To be called when this code is loaded: a process forked later has none of the runtime's threads, for which it would
/// wait forever.
pub fn loaded() {
    PROCESS.get_or_init(std::process::id);
}

/// A runtime of OpenMP.
#[derive(Clone, Copy)]
pub struct OpenMp {
    parallel: Parallel,
    number: Number,
    count: Number,
}

impl OpenMp {
    /// The runtime of a library that is loaded; None where it has none, and in a forked process.
    pub fn of(library: &Path) -> Option<Self> {
        if PROCESS.get() != Some(&std::process::id()) {
            return None;
        }
        let find = |name: &CStr| os::symbol(library, name);
        let parallel = find(c"GOMP_parallel")?;
        let [number, count] = [find(c"omp_get_thread_num")?, find(c"omp_get_num_threads")?];
        // SAFETY: a runtime of OpenMP has these functions with these signatures; torch keeps it loaded.
        unsafe {
            Some(Self {
                parallel: std::mem::transmute::<*const c_void, Parallel>(parallel),
                number: std::mem::transmute::<*const c_void, Number>(number),
                count: std::mem::transmute::<*const c_void, Number>(count),
            })
        }
    }

    /// Calls `work(worker)` on that many threads, the calling one being worker 0; it must not unwind.
    ///
    /// # Returns
    /// False where the runtime has fewer threads to give, as inside another parallel region: nothing was called then.
    pub fn run(&self, workers: usize, work: &(dyn Fn(usize) + Sync)) -> bool {
        let region = Region { openmp: *self, workers, work, ran: AtomicBool::new(false) };
        let threads = c_uint::try_from(workers).unwrap_or(c_uint::MAX);
        // SAFETY: `enter` takes this region, which outlives the call.
        unsafe { (self.parallel)(enter, std::ptr::from_ref(&region).cast_mut().cast(), threads, 0) };
        region.ran.into_inner()
    }
}

struct Region<'a> {
    openmp: OpenMp,
    workers: usize,
    work: &'a (dyn Fn(usize) + Sync),
    ran: AtomicBool,
}

/// # Safety
/// `data` is a [`Region`] that lives until this returns.
unsafe extern "C" fn enter(data: *mut c_void) {
    // SAFETY: the caller's promise.
    let region = unsafe { &*data.cast::<Region<'_>>() };
    // SAFETY: inside a parallel region both may be asked.
    let [number, count] = unsafe { [(region.openmp.number)(), (region.openmp.count)()] };
    if usize::try_from(count) == Ok(region.workers) {
        region.ran.store(true, Ordering::Relaxed);
        (region.work)(usize::try_from(number).unwrap_or_default());
    }
}
