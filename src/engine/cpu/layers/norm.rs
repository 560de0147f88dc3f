//! Batch normalisation: with the statistics of the batch (the workers meet once each way) or with fixed ones.

use crate::engine::cpu::kernels::simd::vectorised;
use crate::engine::cpu::layer::{Context, Edge, Grain, Layer, Out, Param, share};
use crate::engine::cpu::memory::Slot;
use crate::model::Tensor;

pub struct Norm {
    pub channels: usize,
    pub pixels: usize,
    pub weight: Option<Param>,
    pub bias: Option<Param>,
    pub running_mean: Option<Tensor>,
    pub running_var: Option<Tensor>,
    pub num_batches_tracked: Option<Tensor>,
    pub momentum: Option<f64>,
    pub eps: f64,
    /// Normalise with the batch's own statistics.
    pub batch_statistics: bool,
    /// Update the running statistics.
    pub training: bool,
    pub input: Edge,
    pub out: Out,
    /// `workers x channels x 2`: each worker's sums, forward and backward.
    pub sums: [Slot; 2],
    /// `channels x 2`: mean and reciprocal deviation, this worker's copy.
    pub statistics: Slot,
}

impl Norm {
    /// Puts two numbers per channel where the other workers find them.
    fn own_sums(&self, cx: &Context<'_>, slot: Slot, f: impl Fn(usize) -> [f64; 2]) {
        let slots = cx.store.get_mut(slot, cx.worker, cx.worker..cx.worker + 1);
        for c in 0..self.channels {
            // Two floats hold the head and the rest of a double.
            for (i, total) in f(c).into_iter().enumerate() {
                let head = total as f32;
                slots[4 * c + 2 * i] = head;
                slots[4 * c + 2 * i + 1] = if head.is_finite() { (total - f64::from(head)) as f32 } else { 0.0 };
            }
        }
    }

    fn sums_of(&self, cx: &Context<'_>, slot: Slot, c: usize, worker: usize) -> [f64; 2] {
        let slots = cx.store.get(slot, cx.worker, worker..worker + 1);
        [0, 1].map(|i| f64::from(slots[4 * c + 2 * i]) + f64::from(slots[4 * c + 2 * i + 1]))
    }

    fn all_sums(&self, cx: &Context<'_>, slot: Slot, c: usize) -> [f64; 2] {
        let add = |[a, b]: [f64; 2], [c, d]: [f64; 2]| [a + c, b + d];
        (0..cx.workers).map(|worker| self.sums_of(cx, slot, c, worker)).fold([0.0; 2], add)
    }

    fn plane<'a>(&self, values: &'a [f32], c: usize) -> &'a [f32] {
        &values[c * self.pixels..][..self.pixels]
    }

    /// Mean and reciprocal deviation of every channel into this worker's copy.
    fn find_statistics(&self, cx: &Context<'_>) {
        let statistics = cx.own(self.statistics);
        if !self.batch_statistics {
            let (mean, var) = (self.running_mean.map(|t| cx.tensor(t)), self.running_var.map(|t| cx.tensor(t)));
            for c in 0..self.channels {
                statistics[2 * c] = mean.map_or(0.0, |m| m[c]);
                statistics[2 * c + 1] = (1.0 / (var.map_or(1.0, |v| f64::from(v[c])) + self.eps).sqrt()) as f32;
            }
            return;
        }
        self.own_sums(cx, self.sums[0], |c| self.own_moments(cx, c));
        cx.barrier.wait();
        let count = (cx.batch * self.pixels) as f64;
        let tracked = share(self.channels, cx.worker, cx.workers, 1);
        for c in 0..self.channels {
            let (mean, squares) = self.all_moments(cx, c);
            statistics[2 * c] = mean as f32;
            statistics[2 * c + 1] = (1.0 / (squares / count + self.eps).sqrt()) as f32;
            if self.training && tracked.contains(&c) {
                self.track(cx, c, mean, squares / (count - 1.0));
            }
        }
    }

    /// Mean of this worker's samples of a channel, and the sum of squares about it.
    fn own_moments(&self, cx: &Context<'_>, c: usize) -> [f64; 2] {
        let plane = |sample| self.plane(cx.one(self.input.value, sample), c);
        if cx.samples.is_empty() {
            return [0.0; 2];
        }
        // Sums about the first element: no cancellation when the mean is far from zero.
        let origin = plane(cx.samples.start)[0];
        let mut total = [0.0; 2];
        for sample in cx.samples.clone() {
            let part = moments(plane(sample), origin);
            total = [total[0] + part[0], total[1] + part[1]];
        }
        let count = (cx.samples.len() * self.pixels) as f64;
        [total[0] / count + f64::from(origin), (total[1] - total[0] * total[0] / count).max(0.0)]
    }

    /// Mean of the batch and sum of squares about it, from the workers' own (Chan, Golub & LeVeque 1983).
    fn all_moments(&self, cx: &Context<'_>, c: usize) -> (f64, f64) {
        let own = |worker: usize| {
            let count = share(cx.batch, worker, cx.workers, 1).len() * self.pixels;
            (count as f64, self.sums_of(cx, self.sums[0], c, worker))
        };
        let count = (cx.batch * self.pixels) as f64;
        let mean = (0..cx.workers).map(own).map(|(n, [mean, _])| n * mean).sum::<f64>() / count;
        let squares = (0..cx.workers).map(own).map(|(n, [m, s])| s + n * (m - mean) * (m - mean)).sum();
        (mean, squares)
    }

    /// Moves the running statistics of a channel.
    fn track(&self, cx: &Context<'_>, c: usize, mean: f64, var: f64) {
        let momentum = self.momentum.unwrap_or_else(|| {
            let seen = self.num_batches_tracked.map_or(0, |t| cx.count(t)) + cx.step + 1;
            1.0 / seen as f64
        });
        for (tensor, now) in [(self.running_mean, mean), (self.running_var, var)] {
            if let Some([value]) = tensor.map(|t| cx.store.tensor_part_mut(t, c..c + 1)) {
                *value = (momentum * now + (1.0 - momentum) * f64::from(*value)) as f32;
            }
        }
    }

    fn affine(&self, cx: &Context<'_>, c: usize) -> (f32, f32) {
        let at = |p: Option<Param>, default: f32| p.map_or(default, |p| cx.tensor(p.tensor)[c]);
        (at(self.weight, 1.0), at(self.bias, 0.0))
    }
}

/// Sum and sum of squares about `origin`.
fn moments(plane: &[f32], origin: f32) -> [f64; 2] {
    let mut total = [0.0f64; 2];
    vectorised(|| {
        // Short blocks keep the error of the float32 lanes below one rounding per block.
        for block in plane.chunks(128) {
            let (mut sums, mut squares) = ([0.0f32; 16], [0.0f32; 16]);
            let mut rows = block.chunks_exact(16);
            for row in &mut rows {
                for i in 0..16 {
                    let x = row[i] - origin;
                    sums[i] += x;
                    squares[i] += x * x;
                }
            }
            for (i, x) in rows.remainder().iter().enumerate() {
                let x = x - origin;
                sums[i] += x;
                squares[i] += x * x;
            }
            total[0] += sums.iter().map(|&s| f64::from(s)).sum::<f64>();
            total[1] += squares.iter().map(|&s| f64::from(s)).sum::<f64>();
        }
    });
    total
}

/// Sum of `dy` and of `dy * (x - mean)`.
fn products(dy: &[f32], x: &[f32], mean: f32) -> [f64; 2] {
    let mut total = [0.0f64; 2];
    vectorised(|| {
        for (dy, x) in dy.chunks(128).zip(x.chunks(128)) {
            let (mut sums, mut dots) = ([0.0f32; 16], [0.0f32; 16]);
            for (dy, x) in dy.chunks(16).zip(x.chunks(16)) {
                for (i, (d, x)) in dy.iter().zip(x).enumerate() {
                    sums[i] += d;
                    dots[i] += d * (x - mean);
                }
            }
            total[0] += sums.iter().map(|&s| f64::from(s)).sum::<f64>();
            total[1] += dots.iter().map(|&s| f64::from(s)).sum::<f64>();
        }
    });
    total
}

impl Layer for Norm {
    fn grain(&self) -> Grain {
        if self.batch_statistics { Grain::Batch } else { Grain::Sample }
    }

    fn forward(&self, cx: &Context<'_>) {
        self.find_statistics(cx);
        let statistics = cx.own(self.statistics);
        for sample in cx.samples.clone() {
            let (x, y) = (cx.one(self.input.value, sample), cx.one_mut(self.out.value, sample));
            for (c, y) in y.chunks_exact_mut(self.pixels).enumerate() {
                let ((weight, bias), x) = (self.affine(cx, c), self.plane(x, c));
                let (mean, scale) = (statistics[2 * c], weight * statistics[2 * c + 1]);
                // Not `x * scale + shift`: the two would cancel where the mean is far from zero.
                vectorised(|| y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * scale + bias));
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        let statistics = cx.own(self.statistics);
        let pair = |sample, c| (self.plane(cx.one(grad, sample), c), self.plane(cx.one(self.input.value, sample), c));
        let shares = [self.weight.and_then(|p| p.grad), self.bias.and_then(|p| p.grad)];
        if !self.batch_statistics {
            for c in 0..self.channels {
                for sample in cx.samples.clone() {
                    let (dy, x) = pair(sample, c);
                    let [sum, dot] = products(dy, x, statistics[2 * c]);
                    self.add_shares(cx, shares, c, sum, dot * f64::from(statistics[2 * c + 1]));
                }
            }
            self.input_grads(cx, grad, |c| (self.affine(cx, c).0 * statistics[2 * c + 1], 0.0, 0.0));
            return;
        }
        self.own_sums(cx, self.sums[1], |c| {
            let parts = cx.samples.clone().map(|sample| {
                let (dy, x) = pair(sample, c);
                products(dy, x, statistics[2 * c])
            });
            parts.fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
        });
        cx.barrier.wait();
        let count = (cx.batch * self.pixels) as f64;
        if cx.worker == 0 {
            for c in 0..self.channels {
                let [sum, dot] = self.all_sums(cx, self.sums[1], c);
                self.add_shares(cx, shares, c, sum, dot * f64::from(statistics[2 * c + 1]));
            }
        }
        self.input_grads(cx, grad, |c| {
            let [sum, dot] = self.all_sums(cx, self.sums[1], c);
            let deviation = f64::from(statistics[2 * c + 1]);
            let scale = f64::from(self.affine(cx, c).0) * deviation;
            let slope = deviation * deviation * dot / count;
            (scale as f32, slope as f32, (sum / count) as f32)
        });
    }
}

impl Norm {
    fn add_shares(&self, cx: &Context<'_>, shares: [Option<Slot>; 2], c: usize, bias: f64, weight: f64) {
        for (share, value) in shares.into_iter().zip([weight, bias]) {
            if let Some(share) = share {
                cx.own(share)[c] += value as f32;
            }
        }
    }

    /// `dx = scale * (dy - level - slope * (x - mean))` per channel.
    fn input_grads(&self, cx: &Context<'_>, grad: Slot, factors: impl Fn(usize) -> (f32, f32, f32)) {
        let Some(input) = self.input.grad else { return };
        for c in 0..self.channels {
            let (scale, slope, level) = factors(c);
            let mean = cx.own(self.statistics)[2 * c];
            for sample in cx.samples.clone() {
                let dy = self.plane(cx.one(grad, sample), c);
                let x = self.plane(cx.one(self.input.value, sample), c);
                let dx = &mut cx.one_mut(input, sample)[c * self.pixels..][..self.pixels];
                let rows = dx.iter_mut().zip(dy).zip(x);
                vectorised(|| match self.input.add {
                    true => rows.for_each(|((d, g), x)| *d += scale * ((g - level) - slope * (x - mean))),
                    false => rows.for_each(|((d, g), x)| *d = scale * ((g - level) - slope * (x - mean))),
                });
            }
        }
    }
}
