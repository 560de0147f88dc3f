//! From the workers' shares of the gradients to new weights.

use super::layer::{Context, Param, share};
use super::memory::{Floats, Slot, Store};
use crate::engine::optimizer::{Adam, AdamState, Sgd};
use crate::model::Tensor;

/// What the optimizer does to one parameter, with the state it keeps for it.
#[derive(Debug, Clone)]
pub enum Rule {
    /// `momentum`: the buffer and whether it has ever been used.
    Sgd { options: Sgd, momentum: Option<(Floats, bool)> },
    /// `step` counts the steps as a float32, as in PyTorch; `max_exp_avg_sq` is empty without `amsgrad`.
    Adam { options: Adam, step: Floats, exp_avg: Floats, exp_avg_sq: Floats, max_exp_avg_sq: Floats },
}

/// The rules of one epoch, by tensor of the graph.
pub struct Updates {
    pub rules: Vec<Option<Rule>>,
    /// Square roots of Adam's second average, one piece at a time.
    pub roots: Slot,
}

/// Elements per piece: its slices fit a second-level cache.
pub const PIECE: usize = 1 << 13;

impl Updates {
    /// Counts a step, before anything is updated.
    pub fn begin(&self) {
        for rule in self.rules.iter().flatten() {
            if let Rule::Adam { step, .. } = rule
                && let [count] = step.get_mut(0..1)
            {
                *count += 1.0;
            }
        }
    }

    /// After a step the momentum buffers hold something.
    pub fn finish(&mut self) {
        for rule in self.rules.iter_mut().flatten() {
            if let Rule::Sgd { momentum: Some((_, used)), .. } = rule {
                *used = true;
            }
        }
    }

    /// The first thing beside the parameter that an update reads; empty when there is nothing.
    pub fn state(&self, tensor: Tensor) -> &[f32] {
        match self.rules.get(tensor) {
            Some(Some(Rule::Sgd { momentum: Some((buffer, _)), .. })) => buffer.get(),
            Some(Some(Rule::Adam { exp_avg, .. })) => exp_avg.get(),
            _ => &[],
        }
    }

    /// Updates the elements of `tensor` from `first` on.
    pub fn apply(&self, cx: &Context<'_>, tensor: Tensor, first: usize, grad: &[f32]) {
        let Some(Some(rule)) = self.rules.get(tensor) else { return };
        for (i, grad) in grad.chunks(PIECE).enumerate() {
            let start = first + i * PIECE;
            let range = start..start + grad.len();
            let param = cx.store.tensor_part_mut(tensor, range.clone());
            match rule {
                Rule::Sgd { options, momentum: None } => options.update_part(param, grad, &mut [], false),
                Rule::Sgd { options, momentum: Some((buffer, used)) } => {
                    options.update_part(param, grad, buffer.get_mut(range), !used);
                }
                Rule::Adam { options, step, exp_avg, exp_avg_sq, max_exp_avg_sq } => {
                    let state = AdamState {
                        exp_avg: exp_avg.get_mut(range.clone()),
                        exp_avg_sq: exp_avg_sq.get_mut(range.clone()),
                        max_exp_avg_sq: max_exp_avg_sq.get_mut(range.clone()),
                    };
                    options.average(param, grad, state);
                    let second = if max_exp_avg_sq.is_empty() { exp_avg_sq } else { max_exp_avg_sq };
                    let roots = &mut cx.own(self.roots)[..grad.len()];
                    roots.iter_mut().zip(&second.get()[range.clone()]).for_each(|(root, v)| *root = v.sqrt());
                    options.apply(param, &exp_avg.get()[range], roots, f64::from(step.get()[0]));
                }
            }
        }
    }
}

/// Adds up the workers' shares and updates; every worker takes a contiguous part of all parameters laid end to end.
pub fn reduce_and_update(cx: &Context<'_>, params: &[Param], store: &Store) {
    let total: usize = params.iter().filter_map(|p| p.grad).map(|g| g.len).sum();
    let own = share(total, cx.worker, cx.workers, 16);
    let mut start = 0;
    for param in params {
        let Some(grad) = param.grad else { continue };
        let mine = own.start.max(start)..own.end.min(start + grad.len);
        if mine.start < mine.end {
            let mine = mine.start - start..mine.end - start;
            // Worker 0's share becomes the sum, always added in the order of the workers.
            for piece in mine.clone().step_by(PIECE) {
                let piece = piece..(piece + PIECE).min(mine.end);
                let sum = store.worker_part(grad, 0, piece.clone());
                for worker in 1..cx.workers {
                    let other = store.worker_part(grad, worker, piece.clone());
                    sum.iter_mut().zip(other).for_each(|(s, o)| *s += *o);
                }
                cx.updates.apply(cx, param.tensor, piece.start, sum);
            }
        }
        start += grad.len;
    }
}
