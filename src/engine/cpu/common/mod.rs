//! What training and inference both stand on; it names neither.

pub mod analysis;
pub mod arena;
pub mod geometry;
pub mod isa;
pub mod kernels;
pub mod openmp;
pub mod team;
pub mod winograd;
