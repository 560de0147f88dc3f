//! Running statistics as they were before a step that may come to nothing.

use tch::Tensor;

use super::Result;
use crate::model::{Graph, Op};

/// What forward passes in training change, each with a copy.
pub struct Statistics {
    tensors: Vec<(Tensor, Tensor)>,
    /// Whether the copies are from before the step under way.
    kept: bool,
}

impl Statistics {
    pub fn of(graph: &Graph, tensors: &[Tensor]) -> Self {
        let mut which: Vec<usize> = graph.nodes.iter().flat_map(|node| changed(&node.op)).flatten().collect();
        which.sort_unstable();
        which.dedup();
        let copied = |&t: &usize| tensors.get(t).map(|t| (t.shallow_clone(), t.detach().copy()));
        Self { tensors: which.iter().filter_map(copied).collect(), kept: false }
    }

    /// At the beginning of a step; does nothing within one.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn keep(&mut self) -> Result<()> {
        if self.kept || self.tensors.is_empty() {
            return Ok(());
        }
        self.kept = true;
        let _guard = tch::no_grad_guard();
        self.tensors.iter_mut().try_for_each(|(now, before)| copy(before, now))
    }

    /// The step is whole.
    pub fn accept(&mut self) {
        self.kept = false;
    }

    /// # Errors
    /// libtorch's own.
    pub fn put_back(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.kept) {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        self.tensors.iter_mut().try_for_each(|(now, before)| copy(now, before))
    }
}

fn copy(to: &mut Tensor, from: &Tensor) -> Result<()> {
    to.f_copy_(from)?;
    Ok(())
}

/// The tensors that an operation writes.
fn changed(op: &Op) -> [Option<usize>; 3] {
    match op {
        Op::BatchNorm2d { running_mean, running_var, num_batches_tracked, training: true, .. } => {
            [*running_mean, *running_var, *num_batches_tracked]
        }
        _ => [None; 3],
    }
}
