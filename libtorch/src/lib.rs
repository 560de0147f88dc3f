//! Engine `torch` of cnnrs: the lowered graph through libtorch's C++ interface, for exactly one version of torch.
//!
//! ```text
//! tensors of the user -> torch: forward -> loss -> optimizer (autograd, then the update in place)
//! ```

// What the shared files of the binding name as `crate::...`.
use cnnrs::{engine, error, model, training};

mod torch;

/// The binding's files that know Python but not torch, the same as in `cnnrs._cnnrs`.
mod py {
    #[path = "../../../src/py/batches.rs"]
    pub mod batches;
    #[path = "../../../src/py/enter.rs"]
    pub mod enter;
    #[path = "../../../src/py/epoch.rs"]
    pub mod epoch;
    #[path = "../../../src/py/error.rs"]
    pub mod error;
    #[path = "../../../src/py/graph.rs"]
    pub mod graph;
    #[path = "../../../src/py/record.rs"]
    pub mod record;
    #[path = "../../../src/py/rows.rs"]
    pub mod rows;

    pub mod fit;
}

use pyo3::prelude::*;

#[pymodule]
mod _libtorch {
    #[pymodule_export]
    use super::py::fit::{NativeOptimizer, fit, forward};
    #[pymodule_export]
    use super::py::graph::Graph;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // libtorch_python fills its type pointers when Python imports torch; before that every tensor call crashes.
        module.py().import("torch")?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
