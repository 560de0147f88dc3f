//! The only place where Python appears: each function validates, releases the GIL, makes one call and converts the error.

mod batches;
mod enter;
mod error;
mod fit;
mod fit_cpu;
mod graph;
mod preconv;

use pyo3::prelude::*;

/// The whole Python surface of the extension.
#[pymodule]
mod _cnnrs {
    #[pymodule_export]
    use super::fit::{NativeOptimizer, fit_python, fit_torch};
    #[pymodule_export]
    use super::fit_cpu::{CpuPlans, cpu_obstacle, fit_cpu};
    #[pymodule_export]
    use super::graph::Graph;
    #[pymodule_export]
    use super::preconv::{extract_python, extract_torch};

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // libtorch_python fills its type pointers when Python imports torch; before that every tensor call crashes.
        module.py().import("torch")?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
