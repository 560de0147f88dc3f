//! The update rules of `torch.optim.SGD`, `Adam` and `AdamW` on slices, in one pass over memory.
//!
//! PyTorch runs each rule as several whole-tensor operations; element by element they round exactly as below (its
//! vector kernels fuse `a + alpha * b`), so one pass gives the same bits and reads the weights once.

use crate::threads;

/// Options of one parameter group of `torch.optim.SGD`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    pub lr: f64,
    pub momentum: f64,
    pub dampening: f64,
    pub weight_decay: f64,
    pub nesterov: bool,
    pub maximize: bool,
}

/// Options of one parameter group of `torch.optim.Adam` (`decoupled`: `AdamW`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    pub maximize: bool,
    pub decoupled: bool,
}

/// What Adam keeps per parameter; `max_exp_avg_sq` is empty without `amsgrad`.
pub struct AdamState<'a> {
    pub exp_avg: &'a mut [f32],
    pub exp_avg_sq: &'a mut [f32],
    pub max_exp_avg_sq: &'a mut [f32],
}

/// Elements per task: four slices of this length fit the L2 cache, and a task outlasts the cost of handing it over.
const CHUNK: usize = 1 << 15;

impl Sgd {
    /// New (lr, momentum, dampening, weight_decay); a row of another length changes nothing.
    pub fn set(&mut self, row: &[f64]) {
        if let &[lr, momentum, dampening, weight_decay] = row {
            *self = Self { lr, momentum, dampening, weight_decay, ..*self };
        }
    }

    /// One step. `momentum` is the buffer, empty without momentum; at its `first` use it becomes the gradient itself.
    pub fn update(&self, param: &mut [f32], grad: &[f32], momentum: &mut [f32], first: bool) {
        let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).zip(maybe_chunks(momentum));
        threads::for_each(chunks.collect(), |((param, grad), momentum)| self.update_part(param, grad, momentum, first));
    }

    /// As [`Sgd::update`], on the calling thread.
    pub fn update_part(&self, param: &mut [f32], grad: &[f32], momentum: &mut [f32], first: bool) {
        with_fma(|fma| match fma {
            true => sgd::<true>(self, param, grad, momentum, first),
            false => sgd::<false>(self, param, grad, momentum, first),
        });
    }
}

impl Adam {
    /// New (lr, beta1, beta2, eps, weight_decay); a row of another length changes nothing.
    pub fn set(&mut self, row: &[f64]) {
        if let &[lr, beta1, beta2, eps, weight_decay] = row {
            *self = Self { lr, betas: (beta1, beta2), eps, weight_decay, ..*self };
        }
    }

    /// The first half of a step: weight decay and both moving averages.
    pub fn average(&self, param: &mut [f32], grad: &[f32], state: AdamState<'_>) {
        let constants = AdamConstants::new(self);
        let chunks = param
            .chunks_mut(CHUNK)
            .zip(grad.chunks(CHUNK))
            .zip(state.exp_avg.chunks_mut(CHUNK).zip(state.exp_avg_sq.chunks_mut(CHUNK)))
            .zip(maybe_chunks(state.max_exp_avg_sq));
        threads::for_each(chunks.collect(), |(((param, grad), (exp_avg, exp_avg_sq)), max_exp_avg_sq)| {
            let state = AdamState { exp_avg, exp_avg_sq, max_exp_avg_sq };
            with_fma(|fma| match fma {
                true => adam::<true>(&constants, param, grad, state),
                false => adam::<false>(&constants, param, grad, state),
            });
        });
    }

    /// The second half: `root` is the square root of the second average (of its maximum with `amsgrad`), `step` counts
    /// from 1. The root is an argument because PyTorch's own is not always the correctly rounded one.
    pub fn apply(&self, param: &mut [f32], exp_avg: &[f32], root: &[f32], step: f64) {
        let correction = (1.0 - self.betas.1.powf(step)).sqrt() as f32;
        let step_size = -(self.lr / (1.0 - self.betas.0.powf(step))) as f32;
        let eps = self.eps as f32;
        let chunks = param.chunks_mut(CHUNK).zip(exp_avg.chunks(CHUNK)).zip(root.chunks(CHUNK));
        threads::for_each(chunks.collect(), |((param, exp_avg), root)| {
            for ((p, &m), &root) in param.iter_mut().zip(exp_avg).zip(root) {
                *p += step_size * m / (root / correction + eps);
            }
        });
    }
}

/// Chunks of an optional buffer; an absent one gives empty chunks for ever.
fn maybe_chunks(buffer: &mut [f32]) -> Box<dyn Iterator<Item = &mut [f32]> + '_> {
    match buffer.is_empty() {
        true => Box::new(std::iter::repeat_with(|| &mut [][..])),
        false => Box::new(buffer.chunks_mut(CHUNK)),
    }
}

/// `a * b + c`, rounded once where PyTorch's kernels do so.
#[inline(always)]
fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn sgd<const FMA: bool>(rule: &Sgd, param: &mut [f32], grad: &[f32], momentum: &mut [f32], first: bool) {
    let sign = if rule.maximize { -1.0 } else { 1.0 };
    let (lr, decay) = (-rule.lr as f32, rule.weight_decay as f32);
    let gradient = |g: f32, p: f32| {
        let g = sign * g;
        if rule.weight_decay == 0.0 { g } else { madd::<FMA>(p, decay, g) }
    };
    if momentum.is_empty() {
        for (p, &g) in param.iter_mut().zip(grad) {
            *p = madd::<FMA>(gradient(g, *p), lr, *p);
        }
        return;
    }
    let (mu, fresh) = (rule.momentum as f32, (1.0 - rule.dampening) as f32);
    for ((p, &g), b) in param.iter_mut().zip(grad).zip(momentum) {
        let g = gradient(g, *p);
        *b = if first { g } else { madd::<FMA>(g, fresh, *b * mu) };
        let direction = if rule.nesterov { madd::<FMA>(*b, mu, g) } else { *b };
        *p = madd::<FMA>(direction, lr, *p);
    }
}

/// The scalars of Adam's averages, computed in f64 and rounded once, as PyTorch does.
struct AdamConstants {
    sign: f32,
    coupled_decay: Option<f32>,
    decoupled_decay: Option<f32>,
    lerp: f32,
    beta2: f32,
    one_minus_beta2: f32,
}

impl AdamConstants {
    fn new(rule: &Adam) -> Self {
        let (beta1, beta2) = rule.betas;
        let decays = rule.weight_decay != 0.0;
        Self {
            sign: if rule.maximize { -1.0 } else { 1.0 },
            coupled_decay: (decays && !rule.decoupled).then_some(rule.weight_decay as f32),
            decoupled_decay: (decays && rule.decoupled).then_some((1.0 - rule.lr * rule.weight_decay) as f32),
            lerp: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
        }
    }
}

#[inline(always)]
fn adam<const FMA: bool>(c: &AdamConstants, param: &mut [f32], grad: &[f32], state: AdamState<'_>) {
    let rows = param.iter_mut().zip(grad).zip(state.exp_avg.iter_mut().zip(state.exp_avg_sq));
    let mut tops = state.max_exp_avg_sq.iter_mut();
    for ((p, &g), (m, v)) in rows {
        let mut g = c.sign * g;
        if let Some(shrink) = c.decoupled_decay {
            *p *= shrink;
        }
        if let Some(decay) = c.coupled_decay {
            g = madd::<FMA>(*p, decay, g);
        }
        // Tensor.lerp_ starts from the nearer end.
        *m = if c.lerp < 0.5 { madd::<FMA>(c.lerp, g - *m, *m) } else { madd::<FMA>(c.lerp - 1.0, g - *m, g) };
        *v = madd::<FMA>(c.one_minus_beta2 * g, g, *v * c.beta2);
        if let Some(top) = tops.next() {
            // torch.maximum: NaN wins.
            *top = if v.is_nan() || *v > *top { *v } else { *top };
        }
    }
}

/// Runs `kernel` compiled for AVX2 and FMA where the processor has them; `true`: fuse multiply and add.
#[cfg(target_arch = "x86_64")]
fn with_fma(kernel: impl FnOnce(bool)) {
    #[target_feature(enable = "avx2,fma")]
    fn enabled(kernel: impl FnOnce(bool)) {
        kernel(true);
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: both features were just detected.
        unsafe { enabled(kernel) }
    } else {
        kernel(false);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn with_fma(kernel: impl FnOnce(bool)) {
    // Fused multiply-add belongs to the base instruction set of every 64-bit Arm.
    kernel(cfg!(target_arch = "aarch64"));
}
