//! From the workers' shares of the gradients to new weights.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::kernels::simd::vectorised;
use super::layer::{Context, Param, share};
use super::memory::{Floats, Part, Slot, arena};
use super::waiting::{Combination, Waiting};
use crate::engine::cpu::common::arena::Arena;
use crate::engine::optimizer::{Adam, AdamState, Sgd};
use crate::error::Result;
use crate::model::Tensor;

/// What the optimizer does to one parameter, with the state it keeps for it.
#[derive(Debug, Clone)]
pub enum Rule {
    /// `momentum`: the buffer and whether it has ever been used.
    Sgd { options: Sgd, momentum: Option<(Floats, bool)> },
    /// `step` counts the steps as a float32, as in PyTorch; `max_exp_avg_sq` is empty without `amsgrad`.
    Adam { options: Adam, step: Floats, exp_avg: Floats, exp_avg_sq: Floats, max_exp_avg_sq: Floats },
}

/// What happens to gradients before they are applied: `torch.nn.utils.clip_grad_norm_` or `clip_grad_value_`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Clip {
    Norm(f64),
    Value(f64),
}

/// The rules of one epoch, by tensor of the graph.
pub struct Updates {
    pub rules: Vec<Option<Rule>>,
    /// Square roots of Adam's second average, one piece at a time.
    pub roots: Slot,
    pub clip: Option<Clip>,
    /// Where gradients wait that cannot be applied where they arise.
    pub gathered: Option<Gathered>,
    /// Whether nobody looks at the weights between the steps.
    pub unseen: bool,
    pub waiting: Waiting,
}

/// Gradients of several batches, or of one until its norm is known.
pub struct Gathered {
    sums: Vec<Option<Arena>>,
    /// Tensors that have a gradient.
    reached: Vec<AtomicBool>,
    /// Whether the next gradients add to what is there.
    pub adds: bool,
    /// Each worker's part of the squared norm.
    squares: Vec<Mutex<f64>>,
}

impl Gathered {
    /// `lens`: floats of each trained tensor, 0 for the others.
    ///
    /// # Errors
    /// `Argument` when there is not that much memory.
    pub fn new(lens: &[usize], workers: usize) -> Result<Self> {
        let arena = |&len: &usize| (len > 0).then(|| arena(len)).transpose();
        Ok(Self {
            sums: lens.iter().map(arena).collect::<Result<_>>()?,
            reached: lens.iter().map(|_| AtomicBool::new(false)).collect(),
            adds: false,
            squares: (0..workers).map(|_| Mutex::new(0.0)).collect(),
        })
    }

    fn gather(&self, cx: &Context<'_>, tensor: Tensor, first: usize, grad: &[f32]) {
        let Some(Some(sums)) = self.sums.get(tensor) else { return };
        self.reached[tensor].store(true, Ordering::Relaxed);
        // SAFETY: whoever brings a gradient is the only one that has these elements of it.
        let mut sum = unsafe { cx.write(Part::of(sums, first..first + grad.len())) };
        match self.adds {
            true => sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g),
            false => sum.copy_from_slice(grad),
        }
    }

    /// This worker's part of all gradients laid end to end, piece by piece.
    fn each_piece(&self, cx: &Context<'_>, mut work: impl FnMut(Tensor, usize, &mut [f32])) {
        let tensors = || (0..self.sums.len()).filter(|&t| self.reached[t].load(Ordering::Relaxed));
        let len = |t: Tensor| cx.memory.tensor(t).len();
        let own = share(tensors().map(len).sum(), cx.worker, cx.workers, 16);
        let mut start = 0;
        for tensor in tensors() {
            for piece in pieces(&own, start, len(tensor)) {
                if let Some(sums) = &self.sums[tensor] {
                    // SAFETY: pieces of a share that is this worker's, one at a time.
                    work(tensor, piece.start, &mut unsafe { cx.write(Part::of(sums, piece.clone())) });
                }
            }
            start += len(tensor);
        }
    }

    /// Factor that brings the norm of all gradients down to `most`; the workers meet here.
    fn norm_factor(&self, cx: &Context<'_>, most: f64) -> f32 {
        let mut squares = 0.0;
        self.each_piece(cx, |_, _, grad| squares += grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>());
        *self.squares[cx.worker].lock().unwrap_or_else(PoisonError::into_inner) = squares;
        cx.meet();
        let parts = self.squares.iter().map(|part| *part.lock().unwrap_or_else(PoisonError::into_inner));
        let factor = most / (parts.sum::<f64>().sqrt() + 1e-6);
        // As in PyTorch a NaN stays one.
        (if factor > 1.0 { 1.0 } else { factor }) as f32
    }
}

/// The part of `own` in a tensor of `len` floats that lies at `start`, as indices of the tensor, cut into pieces.
fn pieces(own: &Range<usize>, start: usize, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let mine = own.start.max(start)..own.end.min(start + len);
    let mine = if mine.start < mine.end { mine.start - start..mine.end - start } else { 0..0 };
    mine.clone().step_by(PIECE).map(move |first| first..(first + PIECE).min(mine.end))
}

/// Elements per piece: its slices fit a second-level cache.
pub const PIECE: usize = 1 << 13;

impl Updates {
    /// Counts a step, before anything is updated.
    pub fn begin(&self) {
        for rule in self.rules.iter().flatten() {
            if let Rule::Adam { step, .. } = rule
                // SAFETY: between two steps, and nobody else counts.
                && let Some(count) = unsafe { step.get_mut() }.first_mut()
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

    /// Whether steps may wait for each other: those of SGD, with momentum that has been used before.
    pub fn may_wait(&self) -> bool {
        let mut rules = self.rules.iter().flatten();
        let plain = |rule: &Rule| matches!(rule, Rule::Sgd { momentum: None | Some((_, true)), .. });
        self.unseen && self.clip.is_none() && self.gathered.is_none() && rules.all(plain)
    }

    /// What the weights of a tensor are beside the steps that wait; its momentum buffer.
    pub fn combination(&self, tensor: Tensor) -> Option<(Combination, Floats)> {
        match self.rules.get(tensor) {
            Some(Some(Rule::Sgd { options, momentum })) if self.waiting.steps > 0 => {
                let combination = Combination::after(self.waiting.steps, options, momentum.is_some());
                Some((combination, momentum.map_or(Floats::NONE, |(buffer, _)| buffer)))
            }
            _ => None,
        }
    }

    /// The first thing beside the parameter that an update reads; empty when there is nothing.
    pub fn state(&self, tensor: Tensor) -> Floats {
        match self.rules.get(tensor) {
            Some(Some(Rule::Sgd { momentum: Some((buffer, _)), .. })) => *buffer,
            Some(Some(Rule::Adam { exp_avg, .. })) => *exp_avg,
            _ => Floats::NONE,
        }
    }

    /// New (lr, momentum, dampening, weight_decay) or (lr, beta1, beta2, eps, weight_decay) of some tensors.
    pub fn set_options(&mut self, rows: &[(Tensor, Vec<f64>)]) {
        for (tensor, row) in rows {
            match self.rules.get_mut(*tensor) {
                Some(Some(Rule::Sgd { options, .. })) => options.set(row),
                Some(Some(Rule::Adam { options, .. })) => options.set(row),
                Some(None) | None => {}
            }
        }
    }

    /// The gradient of the elements of `tensor` from `first` on: applied, or kept with those that wait.
    pub fn take(&self, cx: &Context<'_>, tensor: Tensor, first: usize, grad: &mut [f32]) {
        match &self.gathered {
            Some(gathered) => gathered.gather(cx, tensor, first, grad),
            None => self.apply(cx, tensor, first, grad),
        }
    }

    /// Updates the elements of `tensor` from `first` on.
    fn apply(&self, cx: &Context<'_>, tensor: Tensor, first: usize, grad: &mut [f32]) {
        let Some(Some(rule)) = self.rules.get(tensor) else { return };
        if let Some(Clip::Value(most)) = self.clip {
            let most = most as f32;
            grad.iter_mut().for_each(|g| *g = g.clamp(-most, most));
        }
        for (i, grad) in grad.chunks(PIECE).enumerate() {
            let start = first + i * PIECE;
            let range = start..start + grad.len();
            // SAFETY: whoever brings a gradient is the only one that has these elements of its tensor and state, which
            // share no memory (`memory::check`).
            let own = |floats: Floats| unsafe { cx.write(floats.part(range.clone())) };
            let mut param = own(cx.memory.tensor(tensor));
            match rule {
                Rule::Sgd { options, momentum: None } => options.update_part(&mut param, grad, &mut [], false),
                Rule::Sgd { options, momentum: Some((buffer, used)) } => {
                    options.update_part(&mut param, grad, &mut own(*buffer), !used);
                }
                Rule::Adam { options, step, exp_avg, exp_avg_sq, max_exp_avg_sq } => {
                    let (mut mean, mut square, mut top) = (own(*exp_avg), own(*exp_avg_sq), own(*max_exp_avg_sq));
                    let state = AdamState { exp_avg: &mut mean, exp_avg_sq: &mut square, max_exp_avg_sq: &mut top };
                    options.average(&mut param, grad, state);
                    let second = if max_exp_avg_sq.is_empty() { square } else { top };
                    // SAFETY: taken once; nobody counts within a step.
                    let (mut roots, step) = unsafe { (cx.own(self.roots), cx.read(step.part(0..1))) };
                    let roots = &mut roots[..grad.len()];
                    roots.iter_mut().zip(second.iter()).for_each(|(root, v)| *root = v.sqrt());
                    options.apply(&mut param, &mean, roots, f64::from(step[0]));
                }
            }
        }
    }
}

/// Adds up the workers' shares and updates; every worker takes a contiguous part of all parameters laid end to end.
pub fn reduce_and_update(cx: &Context<'_>, params: &[Param]) {
    let total: usize = params.iter().filter_map(|p| p.grad).map(|g| g.len).sum();
    let own = share(total, cx.worker, cx.workers, 16);
    let mut start = 0;
    for param in params {
        let Some(grad) = param.grad else { continue };
        // Worker 0's share becomes the sum, always added in the order of the workers.
        for piece in pieces(&own, start, grad.len) {
            let part = |worker| cx.memory.part_of_worker(grad, worker, piece.clone());
            // SAFETY: behind the barrier that ends the layers; the piece is this worker's in everybody's memory.
            let mut sum = unsafe { cx.write(part(0)) };
            for worker in 1..cx.workers {
                // SAFETY: as for the sum, and not the memory of worker 0.
                let other = unsafe { cx.read(part(worker)) };
                let (sum, other) = (&mut *sum, &*other);
                vectorised(|| sum.iter_mut().zip(other).for_each(|(s, o)| *s += o));
            }
            cx.updates.take(cx, param.tensor, piece.start, &mut sum);
        }
        start += grad.len;
    }
}

/// Applies the gradients that wait.
pub fn update_gathered(cx: &Context<'_>) {
    let Some(gathered) = &cx.updates.gathered else { return };
    let factor = match cx.updates.clip {
        Some(Clip::Norm(most)) => gathered.norm_factor(cx, most),
        _ => 1.0,
    };
    gathered.each_piece(cx, |tensor, first, grad| {
        if factor != 1.0 {
            grad.iter_mut().for_each(|g| *g *= factor);
        }
        cx.updates.apply(cx, tensor, first, grad);
    });
}
