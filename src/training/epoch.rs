//! The training loop.

use super::Metrics;
use crate::engine::{Engine, Phase};
use crate::error::{Error, Result};

/// One pass over `batches`; in training the optimizer steps after every `accumulate` of them, and after the last.
///
/// `metrics`: new ones, or those of the part of the epoch that another engine has done. Where `batches` yields `None`, the
/// rest is another engine's: this one stops without a step. `after` is called with the number and the mean loss of every
/// batch. A loss that is not finite stops the epoch before it reaches the weights; what that or any other error interrupts
/// is undone.
///
/// # Errors
/// Those of the batches, the engine and `after`, and [`crate::error::Error::NotFinite`].
pub fn epoch<E: Engine>(
    metrics: Metrics,
    engine: &mut E,
    batches: impl IntoIterator<Item = Result<Option<E::Batch>>>,
    accumulate: usize,
    after: impl FnMut(&mut E, usize, f64) -> Result<()>,
) -> Result<Metrics> {
    let result = steps(metrics, engine, batches, accumulate, after);
    match result {
        Ok(_) => engine.finish()?,
        Err(_) => engine.undo()?,
    }
    result
}

fn steps<E: Engine>(
    mut metrics: Metrics,
    engine: &mut E,
    batches: impl IntoIterator<Item = Result<Option<E::Batch>>>,
    accumulate: usize,
    mut after: impl FnMut(&mut E, usize, f64) -> Result<()>,
) -> Result<Metrics> {
    let phase = metrics.phase;
    for batch in batches {
        let Some(batch) = batch? else { return Ok(metrics) };
        let outcome = engine.forward(batch, phase).map_err(Error::refused)?;
        metrics.add(outcome)?;
        if phase == Phase::Training {
            metrics.gathered = (metrics.gathered + 1) % accumulate.max(1);
            if metrics.gathered == 0 { engine.step()? } else { engine.backward()? }
        }
        after(engine, metrics.batches - 1, outcome.mean())?;
    }
    if metrics.gathered > 0 {
        engine.update()?;
        metrics.gathered = 0;
    }
    Ok(metrics)
}
