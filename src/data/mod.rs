//! Many images: which samples, in which order, in whose buffer, how far ahead.
//!
//! ```text
//! folder | mnist -> loader (threads: read -> image::decode -> image::Transform) -> batch (pooled, 64-byte aligned)
//! ```

pub mod batch;
mod buffers;
pub mod cache;
pub mod check;
pub mod folder;
mod job;
pub mod loader;
pub mod mnist;
mod open;
mod plan;
mod ready;
mod spread;

pub use batch::{Batch, DType};
pub use buffers::Memory;
pub use cache::Cache;
pub use loader::Loader;
pub use plan::{Conversion, Input, Output, Plan, Raw, Rows, Sample};
pub use ready::{Failure, Ready};
