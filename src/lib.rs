//! Image folders to trained classifiers.
//!
//! ```text
//! file -> image -> data ------------> engine(model) -> preconv   features, once
//!         one      many, batched      cpu | torch   \-> fit      one epoch
//! ```
//! Layers point one way; `py` is the only place that knows Python.

pub mod error;
pub mod threads;

pub mod engine;
pub mod fit;
pub mod model;
pub mod preconv;

#[cfg(feature = "python")]
mod py;
