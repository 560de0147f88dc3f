//! Native kernels for the CPU: training and inference side by side, each on what is common to both.

mod common;
pub mod eager;
pub mod infer;
mod train;

pub use train::{ClassLoss, Clip, CpuEngine, Floats, HostBatch, Loss, Plans, Rule, Targets, Tensor, obstacle, slow};

pub use common::openmp;
