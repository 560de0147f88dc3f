//! [`Lanes`](super::lanes::Lanes) on x86-64.
//!
//! Values of these types exist only in kernels that `dispatch` runs after the processor was asked for the instructions.

mod avx2;
mod avx512;

pub use avx2::Avx2;
pub use avx512::Avx512;
