//! The only place where Python appears: each function validates, releases the GIL, makes one call and converts the error.

mod batches;
mod cache;
mod check;
mod dlpack;
mod eager;
mod enter;
mod epoch;
mod error;
mod feature_rows;
mod fit;
mod fit_cpu;
mod folder;
mod graph;
mod image;
mod loader;
mod mnist;
mod preconv;
mod preconv_cpu;
mod read_options;
mod record;
mod rows;
mod tensor;
mod transform;

use pyo3::prelude::*;

use crate::engine::cpu::openmp;
use crate::error::Error;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::with_gil(|py| error::convert(py, error))
    }
}

/// The whole Python surface of the extension.
#[pymodule]
mod _cnnrs {
    #[pymodule_export]
    use super::cache::Cache;
    #[pymodule_export]
    use super::check::check_files;
    #[pymodule_export]
    use super::eager::Kernels;
    #[pymodule_export]
    use super::fit::fit_python;
    #[pymodule_export]
    use super::fit_cpu::{CpuPlans, cpu_obstacle, cpu_slow, fit_cpu};
    #[pymodule_export]
    use super::folder::scan_folders;
    #[pymodule_export]
    use super::graph::Graph;
    #[pymodule_export]
    use super::image::jpeg_decoder;
    #[pymodule_export]
    use super::loader::{Loader, Memory, available_threads};
    #[pymodule_export]
    use super::mnist::read_idx;
    #[pymodule_export]
    use super::preconv::{copy_rows, extract_rows, journal_line, parse_journal, row_checksums};
    #[pymodule_export]
    use super::preconv_cpu::CpuNetwork;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        openmp::loaded();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
