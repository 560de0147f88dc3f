//! Run the frozen part once; keep the result.

mod extract;
mod store;

pub use extract::{Memory, Sink, extract};
pub use store::NpyFile;
