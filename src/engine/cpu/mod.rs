//! Networks on the CPU without libtorch.

pub mod infer;
mod workers;
