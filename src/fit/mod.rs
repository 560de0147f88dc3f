//! One epoch, either phase.

mod epoch;
mod metrics;
mod optimizer;

pub use epoch::epoch;
pub use metrics::Metrics;
pub use optimizer::{Adam, AdamState, Sgd};
