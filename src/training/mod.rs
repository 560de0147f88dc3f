//! One epoch, either phase.

mod epoch;
mod metrics;

pub use epoch::epoch;
pub use metrics::Metrics;
