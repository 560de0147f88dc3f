//! Forward and backward of every operation; one file per family.

pub mod average;
pub mod binary;
pub mod conv;
pub mod conv_pool;
pub mod dropout;
pub mod large_linear;
pub mod linear;
pub mod max_pool;
pub mod norm;
pub mod pointwise;
pub mod softmax;
