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
    /// Sums `f` over this worker's samples of each channel, in double precision between samples.
    fn own_sums(&self, cx: &Context<'_>, slot: Slot, f: impl Fn(usize, usize) -> [f64; 2]) {
        let slots = cx.store.get_mut(slot, cx.worker, cx.worker..cx.worker + 1);
        for c in 0..self.channels {
            let mut total = [0.0; 2];
            for sample in cx.samples.clone() {
                let part = f(sample, c);
                total = [total[0] + part[0], total[1] + part[1]];
            }
            // Two floats hold the head and the rest of a double.
            for (i, total) in total.into_iter().enumerate() {
                let head = total as f32;
                slots[4 * c + 2 * i] = head;
                slots[4 * c + 2 * i + 1] = if head.is_finite() { (total - f64::from(head)) as f32 } else { 0.0 };
            }
        }
    }

    fn all_sums(&self, cx: &Context<'_>, slot: Slot, c: usize) -> [f64; 2] {
        let mut total = [0.0; 2];
        for worker in 0..cx.workers {
            let slots = cx.store.get(slot, cx.worker, worker..worker + 1);
            for i in 0..2 {
                total[i] += f64::from(slots[4 * c + 2 * i]) + f64::from(slots[4 * c + 2 * i + 1]);
            }
        }
        total
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
        // Sums about the first element of the channel: no cancellation when the mean is far from zero.
        let first = |c: usize| cx.store.get(self.input.value, cx.worker, 0..1)[c * self.pixels];
        self.own_sums(cx, self.sums[0], |sample, c| moments(self.plane(cx.one(self.input.value, sample), c), first(c)));
        cx.barrier.wait();
        let count = (cx.batch * self.pixels) as f64;
        for c in 0..self.channels {
            let [sum, squares] = self.all_sums(cx, self.sums[0], c);
            let (mean, var) = (sum / count, (squares / count - (sum / count).powi(2)).max(0.0));
            statistics[2 * c] = (mean + f64::from(first(c))) as f32;
            statistics[2 * c + 1] = (1.0 / (var + self.eps).sqrt()) as f32;
        }
        if self.training {
            self.track(cx, count);
        }
    }

    /// Moves the running statistics, each worker its share of the channels.
    fn track(&self, cx: &Context<'_>, count: f64) {
        let momentum = self.momentum.unwrap_or_else(|| {
            let seen = self.num_batches_tracked.map_or(0, |t| cx.count(t)) + cx.step + 1;
            1.0 / seen as f64
        });
        let own = share(self.channels, cx.worker, cx.workers, 1);
        for c in own {
            let [sum, squares] = self.all_sums(cx, self.sums[0], c);
            let first = f64::from(cx.store.get(self.input.value, cx.worker, 0..1)[c * self.pixels]);
            let var = (squares - sum * sum / count).max(0.0) / (count - 1.0);
            for (tensor, now) in [(self.running_mean, sum / count + first), (self.running_var, var)] {
                if let Some([value]) = tensor.map(|t| cx.store.tensor_part_mut(t, c..c + 1)) {
                    *value = (momentum * now + (1.0 - momentum) * f64::from(*value)) as f32;
                }
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
                let scale = weight * statistics[2 * c + 1];
                let shift = bias - statistics[2 * c] * scale;
                vectorised(|| y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale + shift));
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        let statistics = cx.own(self.statistics);
        let pair = |sample, c| (self.plane(cx.one(grad, sample), c), self.plane(cx.one(self.input.value, sample), c));
        let shares = [self.weight.and_then(|p| p.grad), self.bias.and_then(|p| p.grad)];
        if !self.batch_statistics {
            // Running statistics may differ from sample to sample run: they do not here, they are the layer's own.
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
        self.own_sums(cx, self.sums[1], |sample, c| {
            let (dy, x) = pair(sample, c);
            products(dy, x, statistics[2 * c])
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
            let slope = -scale * deviation * deviation * dot / count;
            let shift = -scale * sum / count - slope * f64::from(statistics[2 * c]);
            (scale as f32, slope as f32, shift as f32)
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

    /// `dx = scale * dy + slope * x + shift` per channel.
    fn input_grads(&self, cx: &Context<'_>, grad: Slot, factors: impl Fn(usize) -> (f32, f32, f32)) {
        let Some(input) = self.input.grad else { return };
        for c in 0..self.channels {
            let (scale, slope, shift) = factors(c);
            for sample in cx.samples.clone() {
                let dy = self.plane(cx.one(grad, sample), c);
                let x = self.plane(cx.one(self.input.value, sample), c);
                let dx = &mut cx.one_mut(input, sample)[c * self.pixels..][..self.pixels];
                let rows = dx.iter_mut().zip(dy).zip(x);
                vectorised(|| match self.input.add {
                    true => rows.for_each(|((d, g), x)| *d += scale * g + (slope * x + shift)),
                    false => rows.for_each(|((d, g), x)| *d = scale * g + (slope * x + shift)),
                });
            }
        }
    }
}
