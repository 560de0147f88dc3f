//! Random draws as torchvision makes them, kept apart from what they decide: numbers in single precision.

#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Names one sample of one pass. The draws follow from it alone, so they are the same on any thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    pub seed: u64,
    pub sample: u64,
    /// Where the sample stands in the epoch, or any number that tells its visits apart.
    pub position: u64,
}

impl Key {
    pub(super) fn rng(self) -> ChaCha8Rng {
        let mut seed = [0; 32];
        for (bytes, part) in seed.chunks_exact_mut(8).zip([self.seed, self.sample, self.position]) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        ChaCha8Rng::from_seed(seed)
    }
}

/// One of the 2^24 evenly spaced numbers in `[0, 1)` that `torch.rand` can give.
pub(super) fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / 16_777_216.0
}

/// `torch.empty(1).uniform_(low, high)`.
pub(super) fn between(rng: &mut ChaCha8Rng, low: f32, high: f32) -> f32 {
    uniform(rng) * (high - low) + low
}

/// `torch.randint(0, count)`.
pub(super) fn below(rng: &mut ChaCha8Rng, count: usize) -> usize {
    ((u64::from(rng.next_u32()) * count as u64) >> 32) as usize
}

/// From `[low, high)`.
pub(super) fn number(rng: &mut ChaCha8Rng, (low, high): (f64, f64)) -> f64 {
    f64::from(between(rng, low as f32, high as f32))
}

/// `torch.rand(1) < p`.
pub(super) fn chance(rng: &mut ChaCha8Rng, p: f64) -> bool {
    f64::from(uniform(rng)) < p
}

/// An index, with probability proportional to its weight.
pub(super) fn choice(rng: &mut ChaCha8Rng, weights: &[f64]) -> usize {
    let mut left = number(rng, (0.0, 1.0)) * weights.iter().sum::<f64>();
    let chosen = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    chosen.unwrap_or(weights.len().saturating_sub(1))
}

/// The numbers below `count` in any order.
pub(super) fn order(rng: &mut ChaCha8Rng, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        order.swap(i, below(rng, i + 1));
    }
    order
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub const COUNT: usize = 20_000;

    /// Kolmogorov's distance to the uniform distribution; above 2.7 / sqrt(n) with probability 9e-7.
    pub fn assert_uniform(mut values: Vec<f64>, low: f64, high: f64) {
        values.sort_by(f64::total_cmp);
        assert!(values[0] >= low && values[values.len() - 1] < high, "outside [{low}, {high})");
        let n = values.len() as f64;
        let distance = values.iter().enumerate().map(|(i, v)| ((v - low) / (high - low) - i as f64 / n).abs());
        let distance = distance.fold(0.0, f64::max);
        assert!(distance < 2.7 / n.sqrt(), "{distance}");
    }

    /// One draw for each of [`COUNT`] samples.
    pub fn draws<T>(draw: impl Fn(&mut ChaCha8Rng) -> T) -> Vec<T> {
        let key = |sample| Key { seed: 3, sample, position: 1 };
        (0..COUNT as u64).map(|sample| draw(&mut key(sample).rng())).collect()
    }

    #[test]
    fn factors_and_angles_are_uniform() {
        assert_uniform(draws(|rng| number(rng, (-0.25, 0.5))), -0.25, 0.5);
    }

    #[test]
    fn orders_and_branches_have_their_chances() {
        let mut seen = std::collections::HashMap::new();
        for order in draws(|rng| order(rng, 4)) {
            *seen.entry(order).or_insert(0usize) += 1;
        }
        // 24 permutations: Binomial(20000, 1/24), five deviations are 141.
        assert_eq!(seen.len(), 24);
        assert!(seen.values().all(|n| n.abs_diff(COUNT / 24) < 141), "{seen:?}");

        let branches = draws(|rng| choice(rng, &[1.0, 0.0, 3.0]));
        let count = |i| branches.iter().filter(|&&branch| branch == i).count();
        // Binomial(20000, 1/4): five deviations are 306.
        assert!(count(0).abs_diff(COUNT / 4) < 306 && count(1) == 0 && count(0) + count(2) == COUNT);
    }
}
