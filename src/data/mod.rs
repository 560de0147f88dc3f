//! Many images: which samples, in which order, in whose buffer, how far ahead.
//!
//! ```text
//! folder | mnist -> loader (threads: read -> image::decode -> image::Transform) -> batch (pooled, 64-byte aligned)
//! ```

pub mod batch;
pub mod cache;
pub mod check;
pub mod folder;
mod job;
pub mod loader;
mod memory;
pub mod mnist;
mod open;
mod plan;
mod spread;

pub use batch::{Batch, DType};
pub use cache::Cache;
pub use loader::{Failure, Loader, Memory, Ready};
pub use memory::copied;
pub use plan::{Finish, Input, Output, Plan, Raw, Rows, Sample};
