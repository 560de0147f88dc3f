//! Loops on memory; each knows nothing of plans.

pub mod activate;
pub mod bf16;
pub mod bytes;
pub mod depthwise;
pub mod dot;
pub mod groups;
pub mod lanes;
pub mod tile;
pub mod winograd;
#[cfg(target_arch = "x86_64")]
mod x86;
