//! Loss and accuracy of an epoch.

use crate::engine::{Outcome, Phase};
use crate::error::{Error, Result};

#[derive(Debug, Clone)]
pub struct Metrics {
    /// As in [`Outcome`], summed over the batches.
    pub loss: f64,
    /// The epoch's loss is `loss / weight`.
    pub weight: f64,
    /// `None` as soon as one batch had targets that are no class indices.
    pub correct: Option<u64>,
    pub counted: u64,
    pub samples: u64,
    pub batches: usize,
    /// The last batch's mean loss.
    pub last: Option<f64>,
    /// Batches since the optimizer's last step.
    pub gathered: usize,
    pub epoch: i64,
    pub phase: Phase,
}

impl Metrics {
    pub fn new(epoch: i64, phase: Phase) -> Self {
        let (loss, weight, correct, counted, samples) = (0.0, 0.0, Some(0), 0, 0);
        Self { loss, weight, correct, counted, samples, batches: 0, last: None, gathered: 0, epoch, phase }
    }

    /// # Errors
    /// `NotFinite` when the batch's loss is NaN or infinite.
    pub fn add(&mut self, outcome: Outcome) -> Result<()> {
        // Samples that count with weight 0 have a mean of 0 / 0, and gradients of that; where all are ignored there are none.
        let loss = if outcome.weight == 0.0 && outcome.counted > 0 { f64::NAN } else { outcome.loss };
        if !loss.is_finite() {
            let last = self.last.map_or_else(|| "none".to_owned(), |loss| format!("{loss:.4}"));
            let (phase, epoch, batch) = (self.phase.name(), self.epoch, self.batches);
            return Err(Error::NotFinite { loss, last, phase, epoch, batch });
        }
        self.last = Some(outcome.mean());
        self.loss += outcome.loss;
        self.weight += outcome.weight;
        self.correct = self.correct.zip(outcome.correct).map(|(a, b)| a + b);
        self.counted += outcome.counted;
        self.samples += outcome.samples;
        self.batches += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(loss: f64) -> Outcome {
        Outcome { loss, weight: 2.0, correct: Some(1), counted: 2, samples: 2 }
    }

    #[test]
    fn nan_names_epoch_batch_and_last_finite_loss() {
        let mut metrics = Metrics::new(3, Phase::Training);
        metrics.add(outcome(1.5)).unwrap();
        let error = metrics.add(outcome(f64::NAN)).unwrap_err().to_string();
        assert_eq!(error, "loss is NaN in training epoch 3, batch 1; the last finite loss was 0.7500");
        assert_eq!((metrics.loss, metrics.correct, metrics.samples), (1.5, Some(1), 2));
    }

    #[test]
    fn only_weights_of_zero_make_a_mean_that_is_no_number() {
        let mut metrics = Metrics::new(0, Phase::Training);
        assert!(metrics.add(Outcome { weight: 0.0, ..outcome(0.0) }).is_err());
        assert!(metrics.add(Outcome { weight: 0.0, counted: 0, ..outcome(0.0) }).is_ok(), "all are ignored");
    }
}
