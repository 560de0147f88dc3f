//! Run the frozen part once; keep the result.

mod extract;
mod store;

pub use extract::{Dtype, Extract, Memory, Rows, Sink, extract};
pub use store::NpyFile;
