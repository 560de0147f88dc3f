//! Loss and accuracy of an epoch.

use crate::engine::{Phase, Step};
use crate::error::{Error, Result};

#[derive(Debug, Clone)]
pub struct Metrics {
    /// Sum of the samples' losses.
    pub loss: f64,
    /// `None` as soon as one batch had targets that are no class indices.
    pub correct: Option<u64>,
    pub samples: u64,
    pub batches: usize,
    epoch: i64,
    phase: Phase,
    last: Option<f64>,
}

impl Metrics {
    pub fn new(epoch: i64, phase: Phase) -> Self {
        Self { loss: 0.0, correct: Some(0), samples: 0, batches: 0, epoch, phase, last: None }
    }

    /// # Errors
    /// `NotFinite` when the batch's loss is NaN or infinite.
    pub fn add(&mut self, step: Step) -> Result<()> {
        if !step.loss.is_finite() {
            let last = self.last.map_or_else(|| "none".to_owned(), |loss| format!("{loss:.4}"));
            let (phase, epoch, batch) = (self.phase.name(), self.epoch, self.batches);
            return Err(Error::NotFinite { loss: step.loss, last, phase, epoch, batch });
        }
        self.last = Some(step.loss / step.samples.max(1) as f64);
        self.loss += step.loss;
        self.correct = self.correct.zip(step.correct).map(|(a, b)| a + b);
        self.samples += step.samples;
        self.batches += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(loss: f64) -> Step {
        Step { loss, correct: Some(1), samples: 2 }
    }

    #[test]
    fn nan_names_epoch_batch_and_last_finite_loss() {
        let mut metrics = Metrics::new(3, Phase::Training);
        metrics.add(step(1.5)).unwrap();
        let error = metrics.add(step(f64::NAN)).unwrap_err().to_string();
        assert_eq!(error, "loss is NaN in training epoch 3, batch 1; the last finite loss was 0.7500");
        assert_eq!((metrics.loss, metrics.correct, metrics.samples), (1.5, Some(1), 2));
    }
}
