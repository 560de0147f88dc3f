//! Image folders to trained classifiers.
//!
//! ```text
//! file -> image -> data ------------> engine(model) -> preconv   features, once
//!         one      many, batched      cpu | torch   \-> fit      one epoch
//! ```
//! Layers point one way; `py` is the only place that knows Python.

pub mod error;
pub mod threads;

pub mod image;
pub mod data;
pub mod model;
pub mod engine;
pub mod preconv;
pub mod fit;

#[cfg(feature = "python")]
mod py;
