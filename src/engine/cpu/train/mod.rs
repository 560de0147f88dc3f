//! Training and validation on the CPU without libtorch: the graph is compiled once per input shape into layers with
//! fixed memory, and a team of threads takes the batch through them sample by sample.
//!
//! ```text
//! graph -> structure -> build -> plan
//! plan: forward_and_tail_backward  loss, gradients after the last meeting point
//!       head_backward_and_reduce   the other gradients, the sums of all: new weights, or gathered
//!       update                     new weights from what is gathered
//! ```
//! Every worker has its own copy of the gradients of small parameters; they are added in the order of the workers, so a
//! run repeats bit for bit with the same number of threads. The gradients of large matrices never exist as a whole, and with
//! few samples their steps wait for each other (`waiting`).

mod borrows;
mod build;
mod engine;
mod kernels;
mod layer;
mod layers;
mod loss;
mod maps;
mod memory;
mod plan;
mod random;
mod statistics;
mod structure;
#[cfg(test)]
mod tests;
mod update;
mod waiting;

pub use engine::{CpuEngine, HostBatch, Plans, obstacle};
pub use loss::{ClassLoss, Loss, Targets};
pub use memory::{Floats, Tensor};
pub use structure::slow;
pub use update::{Clip, Rule};
