//! Many images: which samples, in which order, in whose buffer, how far ahead.
//!
//! ```text
//! folder | mnist -> loader (threads: read -> image::decode -> image::Transform) -> batch (pooled, 64-byte aligned)
//! ```

pub mod batch;
pub mod folder;
mod job;
pub mod loader;
pub mod mnist;

pub use batch::{Batch, DType};
pub use loader::{Failure, Finish, Input, Loader, Memory, Output, Plan, Raw, Ready, Rows, Sample};
