//! The graph through libtorch: the same ATen calls in the same order as eager PyTorch, hence the same bits on a CPU.

mod features;
mod forward;
mod loss;
mod optimizer;

pub use features::{HostRows, TorchExtractor};
pub use forward::forward;
pub use loss::{Loss, TorchLoss, correct};
pub use optimizer::{Native, Optimizer, Parameter, Rule, gradients};

use tch::Tensor;

use super::{Engine, Phase, Step};
use crate::error::{Error, Result};
use crate::model::Graph;

/// A graph over tensors that belong to the user's module.
pub struct TorchEngine {
    graph: Graph,
    tensors: Vec<Tensor>,
    loss: Box<dyn Loss>,
    optimizer: Option<Box<dyn Optimizer>>,
    /// The loss to differentiate, between `forward` and `step`.
    pending: Option<Tensor>,
}

impl TorchEngine {
    pub fn new(graph: Graph, tensors: Vec<Tensor>, loss: Box<dyn Loss>, optimizer: Option<Box<dyn Optimizer>>) -> Self {
        Self { graph, tensors, loss, optimizer, pending: None }
    }
}

impl Engine for TorchEngine {
    type Batch = (Tensor, Tensor);

    fn forward(&mut self, (inputs, targets): Self::Batch, phase: Phase) -> Result<Step> {
        if phase == Phase::Validation {
            let _guard = tch::no_grad_guard();
            let output = forward(&self.graph, &self.tensors, inputs)?;
            return Ok(self.loss.evaluate(&output, &targets)?.1);
        }
        let output = forward(&self.graph, &self.tensors, inputs)?;
        let (loss, step) = self.loss.evaluate(&output, &targets)?;
        self.pending = Some(loss);
        Ok(step)
    }

    fn step(&mut self) -> Result<()> {
        let loss = self.pending.take().ok_or_else(|| Error::Argument("step() before forward()".to_owned()))?;
        match &mut self.optimizer {
            Some(optimizer) => optimizer.step(&loss),
            None => Err(Error::Argument("training needs an optimizer".to_owned())),
        }
    }
}
