//! The graph through libtorch: the same ATen calls in the same order as eager PyTorch, hence the same bits on a CPU.

mod failure;
mod forward;
mod loss;
mod optimizer;
mod statistics;

pub use failure::Result;
pub use forward::forward;
pub use loss::{Loss, TorchLoss};
pub use optimizer::{Gathered, Hook, Native, Optimizer, Parameter, Rule, gradients};

use tch::Tensor;

use self::statistics::Statistics;
use crate::engine::{Engine, Outcome, Phase};
use crate::error::{self, Error};
use crate::model::Graph;

/// A graph over tensors that belong to the user's module.
pub struct TorchEngine {
    graph: Graph,
    tensors: Vec<Tensor>,
    loss: Box<dyn Loss>,
    optimizer: Option<Box<dyn Optimizer>>,
    /// Batches per step of the optimizer: the loss is divided by it.
    accumulate: usize,
    /// The loss to differentiate, between `forward` and `backward`.
    pending: Option<Tensor>,
    statistics: Statistics,
}

impl TorchEngine {
    pub fn new(
        graph: Graph,
        tensors: Vec<Tensor>,
        loss: Box<dyn Loss>,
        optimizer: Option<Box<dyn Optimizer>>,
        accumulate: usize,
    ) -> Self {
        let statistics = Statistics::of(&graph, &tensors);
        Self { graph, tensors, loss, optimizer, accumulate, pending: None, statistics }
    }

    /// As [`Optimizer::set_options`].
    pub fn set_options(&mut self, rows: &[Vec<f64>]) {
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.set_options(rows);
        }
    }

    fn optimizer(&mut self) -> Result<&mut Box<dyn Optimizer>> {
        Ok(self.optimizer.as_mut().ok_or_else(|| Error::internal("training needs an optimizer"))?)
    }

    fn run(&mut self, (inputs, targets): (Tensor, Tensor), phase: Phase) -> Result<Outcome> {
        let samples = inputs.size().first().map_or(1, |&n| n.unsigned_abs());
        self.statistics.keep()?;
        if phase == Phase::Validation {
            let _guard = tch::no_grad_guard();
            let output = forward(&self.graph, &self.tensors, inputs)?;
            let outcome = self.loss.evaluate(&output, &targets, samples)?.1;
            if outcome.loss.is_finite() {
                self.statistics.accept();
            }
            return Ok(outcome);
        }
        let output = forward(&self.graph, &self.tensors, inputs)?;
        let (loss, outcome) = self.loss.evaluate(&output, &targets, samples)?;
        self.pending = Some(if self.accumulate > 1 { loss.f_div_scalar(self.accumulate as i64)? } else { loss });
        Ok(outcome)
    }
}

impl Engine for TorchEngine {
    type Batch = (Tensor, Tensor);

    fn forward(&mut self, batch: Self::Batch, phase: Phase) -> error::Result<Outcome> {
        Ok(self.run(batch, phase)?)
    }

    fn backward(&mut self) -> error::Result<()> {
        let loss = self.pending.take().ok_or_else(|| Error::internal("backward() before forward()"))?;
        Ok(self.optimizer()?.gather(&loss)?)
    }

    fn update(&mut self) -> error::Result<()> {
        self.optimizer()?.update()?;
        self.statistics.accept();
        Ok(())
    }

    fn undo(&mut self) -> error::Result<()> {
        self.pending = None;
        Ok(self.statistics.put_back()?)
    }
}
