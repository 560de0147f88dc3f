//! Who computes it. `training` and `features` know this trait, not its implementors.

#[cfg(feature = "native")]
pub mod cpu;
mod features;
pub mod optimizer;

pub use features::{Dtype, Rows};

use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Training,
    Validation,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Validation => "validation",
        }
    }
}

/// What one batch contributed to the epoch's metrics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Sum of the losses of what counts, each times its class's weight.
    pub loss: f64,
    /// What the mean divides that sum by: the weights of what counts.
    pub weight: f64,
    /// Samples that count and whose largest output is the target; `None` when targets are not class indices.
    pub correct: Option<u64>,
    /// Samples that count for that: those whose target is not the loss's `ignore_index`.
    pub counted: u64,
    pub samples: u64,
}

impl Outcome {
    /// The batch's loss as the loss function returns it: NaN where nothing counts.
    pub fn mean(&self) -> f64 {
        self.loss / self.weight
    }
}

pub trait Engine {
    /// Inputs and targets of one batch, in the form this engine reads.
    type Batch;

    /// Outputs and loss of one batch; in training also what [`Engine::backward`] needs.
    ///
    /// # Errors
    /// Whatever stops the computation: shapes that do not fit, targets out of range, no memory.
    fn forward(&mut self, batch: Self::Batch, phase: Phase) -> Result<Outcome>;

    /// Gradients of the last training loss, added to those since the last update.
    ///
    /// # Errors
    /// As for [`Engine::forward`].
    fn backward(&mut self) -> Result<()>;

    /// [`Engine::backward`] and [`Engine::update`], for engines that do better in one go.
    ///
    /// # Errors
    /// As for [`Engine::forward`].
    fn step(&mut self) -> Result<()> {
        self.backward()?;
        self.update()
    }

    /// New weights from the gradients since the last ones.
    ///
    /// # Errors
    /// As for [`Engine::forward`].
    fn update(&mut self) -> Result<()>;

    /// The epoch is over: weights and optimizer are as its steps have made them.
    ///
    /// # Errors
    /// As for [`Engine::forward`].
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    /// Back to the state after the last [`Engine::update`]: what forward passes since then have changed is put back.
    ///
    /// # Errors
    /// As for [`Engine::forward`].
    fn undo(&mut self) -> Result<()>;
}
