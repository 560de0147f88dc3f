//! Loops on slices; each knows nothing of plans.

pub mod direct;
pub mod im2col;
pub mod matmul;
pub mod simd;
pub mod skinny;
pub mod sparse;
pub mod terms;
