//! [`Lanes`](super::lanes::Lanes) and [`Dot`](super::dot::Dot) on x86-64.
//!
//! Values of these types exist only in kernels that `dispatch` runs after the processor was asked for the instructions.

mod avx2;
mod avx512;
mod bf16;
mod dot_avx2;
mod dot_avx512;

pub use avx2::Avx2;
pub use avx512::Avx512;
pub use bf16::DotBf16;
pub use dot_avx2::{DotAvx2, DotAvxVnni};
pub use dot_avx512::{DotAvx512, DotVnni};
