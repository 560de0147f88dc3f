//! Batch normalisation: with the statistics of the batch (the workers meet once each way) or with fixed ones.

use crate::engine::cpu::train::kernels::simd::vectorised;
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out, Param, share};
use crate::engine::cpu::train::memory::Slot;
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
        // SAFETY: this worker's part, which the others read behind the barrier.
        let mut slots = unsafe { cx.one_mut(slot, cx.worker) };
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
        // SAFETY: behind the barrier nobody writes the sums.
        let slots = unsafe { cx.one(slot, worker) };
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
    fn find_statistics(&self, cx: &Context<'_>, statistics: &mut [f32]) {
        if !self.batch_statistics {
            // SAFETY: only the statistics of a batch are tracked, nobody writes these.
            let read = |tensor: Option<Tensor>| tensor.map(|t| unsafe { cx.tensor(t) });
            let (mean, var) = (read(self.running_mean), read(self.running_var));
            for c in 0..self.channels {
                statistics[2 * c] = mean.as_ref().map_or(0.0, |m| m[c]);
                statistics[2 * c + 1] =
                    (1.0 / (var.as_ref().map_or(1.0, |v| f64::from(v[c])) + self.eps).sqrt()) as f32;
            }
            return;
        }
        self.own_sums(cx, self.sums[0], |c| self.own_moments(cx, c));
        cx.meet();
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
        // SAFETY: an input, which this layer does not write, of a sample that is this worker's.
        let image = |sample| unsafe { cx.one(self.input.value, sample) };
        if cx.samples.is_empty() {
            return [0.0; 2];
        }
        // Sums about the first element: no cancellation when the mean is far from zero.
        let origin = self.plane(&image(cx.samples.start), c)[0];
        let mut total = [0.0; 2];
        for sample in cx.samples.clone() {
            let part = moments(self.plane(&image(sample), c), origin);
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
            let Some(tensor) = tensor else { continue };
            // SAFETY: a channel is tracked by one worker, and nobody reads what is tracked.
            let mut value = unsafe { cx.write(cx.memory.tensor(tensor).part(c..c + 1)) };
            if let [value] = &mut *value {
                *value = (momentum * now + (1.0 - momentum) * f64::from(*value)) as f32;
            }
        }
    }

    fn affine(&self, cx: &Context<'_>, c: usize) -> (f32, f32) {
        let at = |p: Option<Param>, default: f32| {
            // SAFETY: nobody writes parameters before all layers are done.
            p.map_or(default, |p| unsafe { cx.tensor(p.tensor) }[c])
        };
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
        // SAFETY: taken once.
        let mut statistics = unsafe { cx.own(self.statistics) };
        self.find_statistics(cx, &mut statistics);
        for sample in cx.samples.clone() {
            // SAFETY: the input's slot is not the output's, and the sample is this worker's.
            let (x, mut y) = unsafe { (cx.one(self.input.value, sample), cx.one_mut(self.out.value, sample)) };
            for (c, y) in y.chunks_exact_mut(self.pixels).enumerate() {
                let ((weight, bias), x) = (self.affine(cx, c), self.plane(&x, c));
                let (mean, scale) = (statistics[2 * c], weight * statistics[2 * c + 1]);
                // Not `x * scale + shift`: the two would cancel where the mean is far from zero.
                vectorised(|| y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * scale + bias));
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        // SAFETY: taken once, `input_grads` borrows it.
        let statistics = unsafe { cx.own(self.statistics) };
        // SAFETY: neither is what this layer writes, and the samples are this worker's.
        let read = |slot, sample| unsafe { cx.one(slot, sample) };
        let products = |sample, c| {
            let (dy, x) = (read(grad, sample), read(self.input.value, sample));
            products(self.plane(&dy, c), self.plane(&x, c), statistics[2 * c])
        };
        let shares = [self.weight.and_then(|p| p.grad), self.bias.and_then(|p| p.grad)];
        if !self.batch_statistics {
            for c in 0..self.channels {
                for sample in cx.samples.clone() {
                    let [sum, dot] = products(sample, c);
                    self.add_shares(cx, shares, c, sum, dot * f64::from(statistics[2 * c + 1]));
                }
            }
            self.input_grads(cx, grad, &statistics, |c| (self.affine(cx, c).0 * statistics[2 * c + 1], 0.0, 0.0));
            return;
        }
        self.own_sums(cx, self.sums[1], |c| {
            let parts = cx.samples.clone().map(|sample| products(sample, c));
            parts.fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
        });
        cx.meet();
        let count = (cx.batch * self.pixels) as f64;
        if cx.worker == 0 {
            for c in 0..self.channels {
                let [sum, dot] = self.all_sums(cx, self.sums[1], c);
                self.add_shares(cx, shares, c, sum, dot * f64::from(statistics[2 * c + 1]));
            }
        }
        self.input_grads(cx, grad, &statistics, |c| {
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
                // SAFETY: taken once at a time.
                let mut share = unsafe { cx.own(share) };
                share[c] += value as f32;
            }
        }
    }

    /// `dx = scale * (dy - level - slope * (x - mean))` per channel.
    fn input_grads(
        &self,
        cx: &Context<'_>,
        grad: Slot,
        statistics: &[f32],
        factors: impl Fn(usize) -> (f32, f32, f32),
    ) {
        let Some(input) = self.input.grad else { return };
        for c in 0..self.channels {
            let (scale, slope, level) = factors(c);
            let mean = statistics[2 * c];
            for sample in cx.samples.clone() {
                // SAFETY: a value and two derivatives are three slots, and the sample is this worker's.
                let (dy, x, mut dx) =
                    unsafe { (cx.one(grad, sample), cx.one(self.input.value, sample), cx.one_mut(input, sample)) };
                let dx = &mut dx[c * self.pixels..][..self.pixels];
                let rows = dx.iter_mut().zip(self.plane(&dy, c)).zip(self.plane(&x, c));
                vectorised(|| match self.input.add {
                    true => rows.for_each(|((d, g), x)| *d += scale * ((g - level) - slope * (x - mean))),
                    false => rows.for_each(|((d, g), x)| *d = scale * ((g - level) - slope * (x - mean))),
                });
            }
        }
    }
}
