//! Run the frozen part once; keep the result.

mod checksum;
mod extract;
pub mod journal;
mod memory;
mod npy;
mod rows;
mod writer;

pub use checksum::checksums;
pub use extract::{Batch, Place, Sink, extract};
pub use memory::Memory;
pub use npy::HEADER;
pub use rows::{Move, RowFile, Target};
pub use writer::Writer;
