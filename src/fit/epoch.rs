//! The training loop.

use super::Metrics;
use crate::engine::{Engine, Phase};
use crate::error::Result;

/// One pass over `batches`; in training the optimizer steps after every `accumulate` of them, and after the last.
///
/// `after` is called with the number and the mean loss of every batch. A loss that is not finite stops the epoch before
/// it reaches the weights.
///
/// # Errors
/// Those of the batches, the engine and `after`, and [`crate::error::Error::NotFinite`].
pub fn epoch<E: Engine>(
    number: i64,
    phase: Phase,
    engine: &mut E,
    batches: impl IntoIterator<Item = Result<E::Batch>>,
    accumulate: usize,
    mut after: impl FnMut(&mut E, usize, f64) -> Result<()>,
) -> Result<Metrics> {
    let mut metrics = Metrics::new(number, phase);
    let mut gathered = 0;
    for batch in batches {
        let step = engine.forward(batch?, phase)?;
        metrics.add(step)?;
        if phase == Phase::Training {
            gathered = (gathered + 1) % accumulate.max(1);
            engine.backward(gathered == 0)?;
        }
        after(engine, metrics.batches - 1, step.loss / step.samples.max(1) as f64)?;
    }
    if gathered > 0 {
        engine.update()?;
    }
    Ok(metrics)
}
