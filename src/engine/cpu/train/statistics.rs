//! Running statistics as they were before a step that may come to nothing.

use super::memory::Tensor;
use crate::model::{Graph, Op};

pub struct Statistics {
    /// What forward passes in training write, each with a copy.
    tensors: Vec<(usize, Vec<f32>)>,
    /// Forward passes before the step under way, if the copies are from then.
    pub kept: Option<u64>,
}

impl Statistics {
    pub fn of(graph: &Graph) -> Self {
        let written = graph.nodes.iter().flat_map(|node| match node.op {
            Op::BatchNorm2d { running_mean, running_var, training: true, .. } => [running_mean, running_var],
            _ => [None; 2],
        });
        let copy = |t: usize| (t, vec![0.0; graph.tensors[t].iter().product()]);
        Self { tensors: written.flatten().map(copy).collect(), kept: None }
    }

    /// At the beginning of a step; does nothing within one.
    pub fn keep(&mut self, tensors: &[Tensor], forwards: u64) {
        if self.kept.is_some() {
            return;
        }
        self.kept = Some(forwards);
        for (tensor, copy) in &mut self.tensors {
            if let Some(Tensor::Floats(now)) = tensors.get(*tensor) {
                // SAFETY: between two steps.
                copy.copy_from_slice(unsafe { now.get() });
            }
        }
    }

    /// The number of forward passes to go on from, if a step was under way.
    pub fn put_back(&mut self, tensors: &[Tensor]) -> Option<u64> {
        let forwards = self.kept.take()?;
        for (tensor, copy) in &self.tensors {
            if let Some(Tensor::Floats(now)) = tensors.get(*tensor) {
                // SAFETY: between two steps, one tensor at a time.
                unsafe { now.get_mut() }.copy_from_slice(copy);
            }
        }
        Some(forwards)
    }
}
