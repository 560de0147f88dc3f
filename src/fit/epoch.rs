//! The training loop.

use super::Metrics;
use crate::engine::{Engine, Phase};
use crate::error::Result;

/// One pass over `batches`; in training every batch ends with a step of the optimizer.
///
/// A loss that is not finite stops the epoch before it reaches the weights.
///
/// # Errors
/// Those of the batches and the engine, and [`crate::error::Error::NotFinite`].
pub fn epoch<E: Engine>(
    number: i64,
    phase: Phase,
    engine: &mut E,
    batches: impl IntoIterator<Item = Result<E::Batch>>,
) -> Result<Metrics> {
    let mut metrics = Metrics::new(number, phase);
    for batch in batches {
        let step = engine.forward(batch?, phase)?;
        metrics.add(step)?;
        if phase == Phase::Training {
            engine.step()?;
        }
    }
    Ok(metrics)
}
