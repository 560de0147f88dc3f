//! Image folders to trained classifiers.
//!
//! ```text
//! file -> image -> data ------------> engine(model) -> features   once
//!         one      many, batched      cpu           \-> training   one epoch
//! ```
//! Layers point one way; `py` is the only place that knows Python.

pub mod error;
#[cfg(feature = "native")]
mod memory;
#[cfg(feature = "native")]
mod os;
pub mod threads;

#[cfg(feature = "native")]
pub mod image;
#[cfg(feature = "native")]
pub mod data;
pub mod model;
pub mod engine;
#[cfg(feature = "native")]
pub mod features;
pub mod training;

#[cfg(feature = "python")]
mod py;
