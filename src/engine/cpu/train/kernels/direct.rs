//! Direct convolution with stride 1 whose 2 x 2 max-pool, ReLU and channel scale happen in registers.

use super::simd::{Kernel, Vector, dispatch};
use super::terms::Terms;

/// Floats that may be read past the end of an image: the last tile's vectors and the kernel's width.
pub const SLACK: usize = 48;

/// One sample through convolution, scale, ReLU and max-pool.
pub struct Direct<'a> {
    /// `channels x height x width`, padding included, and [`SLACK`] more.
    pub image: &'a [f32],
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    /// `out_channels x channels x k x k`
    pub weights: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub k: usize,
    pub relu: bool,
    /// Output channels to compute (offsets) and their scales (factors); the others are left alone.
    pub live: Terms<'a>,
    /// Pooled height and width.
    pub pooled: [usize; 2],
    /// `out_channels x pooled`
    pub out: &'a mut [f32],
    /// Where each maximum was, `y * width + x` as a float (exact below 2^23); empty when nobody asks.
    pub origins: &'a mut [f32],
}

pub fn conv_pool(work: Direct<'_>) {
    dispatch(work);
}

impl Kernel for Direct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let ([rows, columns], k) = (self.pooled, self.k);
        assert!(2 * rows + k - 1 <= self.height && 2 * columns + k - 1 <= self.width);
        assert!(self.image.len() >= self.channels * self.height * self.width + SLACK);
        let pixels = rows * columns;
        for &o in self.live.offsets {
            let o = o as usize;
            assert!((o + 1) * self.channels * k * k <= self.weights.len() && (o + 1) * pixels <= self.out.len());
            assert!(self.origins.is_empty() || (o + 1) * pixels <= self.origins.len());
        }
        match k {
            3 => self.rows::<V, 3>(),
            5 => self.rows::<V, 5>(),
            _ => unreachable!("conv_pool: only 3 x 3 and 5 x 5 kernels"),
        }
    }
}

/// 0, 2, 4, ...: the even positions of sixteen.
const EVEN: [f32; 8] = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0];

impl Direct<'_> {
    #[inline(always)]
    fn rows<V: Vector, const K: usize>(&mut self) {
        let vectors = (2 * self.pooled[1]).div_ceil(8);
        for row in 0..self.pooled[0] {
            let mut done = 0;
            while done < vectors {
                // Twelve accumulators each: tiles are 3, 2 or 1 vectors wide, and four are two and two.
                let wide = match vectors - done {
                    1 => 1,
                    2 | 4 => 2,
                    _ => 3,
                };
                match wide {
                    1 => self.blocks::<V, K, 1>(row, done),
                    2 => self.blocks::<V, K, 2>(row, done),
                    _ => self.blocks::<V, K, 3>(row, done),
                }
                done += wide;
            }
        }
    }

    #[inline(always)]
    fn blocks<V: Vector, const K: usize, const N: usize>(&mut self, row: usize, vector: usize) {
        let mut at = 0;
        while at < self.live.offsets.len() {
            let left = self.live.offsets.len() - at;
            match (N, left) {
                (1, 6..) => self.tile::<V, K, N, 6>(row, vector, at),
                (1, 4..) => self.tile::<V, K, N, 4>(row, vector, at),
                (1 | 2, 3..) => self.tile::<V, K, N, 3>(row, vector, at),
                (_, 2..) => self.tile::<V, K, N, 2>(row, vector, at),
                _ => self.tile::<V, K, N, 1>(row, vector, at),
            }
            at += match (N, left) {
                (1, 6..) => 6,
                (1, 4..) => 4,
                (1 | 2, 3..) => 3,
                (_, 2..) => 2,
                _ => 1,
            };
        }
    }

    /// `N` vectors of two rows of `B` output channels.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // r, n and b index registers and addresses alike
    fn tile<V: Vector, const K: usize, const N: usize, const B: usize>(
        &mut self,
        row: usize,
        vector: usize,
        at: usize,
    ) {
        let per_channel = self.channels * K * K;
        let (mut live, mut scales) = ([0; B], [0.0; B]);
        live.copy_from_slice(&self.live.offsets[at..at + B]);
        scales.copy_from_slice(&self.live.factors[at..at + B]);
        let mut acc = [[[V::splat(0.0); N]; 2]; B];
        let mut weights = [self.weights.as_ptr(); B];
        for b in 0..B {
            if let Some(bias) = self.bias {
                acc[b] = [[V::splat(bias[live[b] as usize]); N]; 2];
            }
            weights[b] = self.weights[live[b] as usize * per_channel..].as_ptr();
        }
        let mut image = self.image[2 * row * self.width + 8 * vector..].as_ptr();
        for _ in 0..self.channels {
            for ky in 0..K {
                for kx in 0..K {
                    // SAFETY: rows `2 row + ky` and the next are below `height` (asserted by `run`); a vector may run
                    // past its row, and past the last one by less than SLACK. Weights end at `(o + 1) * per_channel`.
                    unsafe {
                        let corner = image.add(ky * self.width + kx);
                        if N == 1 {
                            // Many channels and one vector: the two inputs stay in registers, the weights pass by.
                            let (upper, lower) = (V::load(corner), V::load(corner.add(self.width)));
                            for b in 0..B {
                                let w = V::splat(*weights[b].add(ky * K + kx));
                                acc[b][0][0] = upper.mul_add(w, acc[b][0][0]);
                                acc[b][1][0] = lower.mul_add(w, acc[b][1][0]);
                            }
                            continue;
                        }
                        let mut w = [V::splat(0.0); B];
                        for b in 0..B {
                            w[b] = V::splat(*weights[b].add(ky * K + kx));
                        }
                        for r in 0..2 {
                            for n in 0..N {
                                let x = V::load(corner.add(r * self.width + 8 * n));
                                for b in 0..B {
                                    acc[b][r][n] = x.mul_add(w[b], acc[b][r][n]);
                                }
                            }
                        }
                    }
                }
            }
            image = image.wrapping_add(self.height * self.width);
            for w in &mut weights {
                *w = w.wrapping_add(K * K);
            }
        }
        for b in 0..B {
            self.pool::<V, N>(acc[b], live[b] as usize, scales[b], row, vector);
        }
    }

    #[inline(always)]
    fn pool<V: Vector, const N: usize>(&mut self, acc: [[V; N]; 2], o: usize, scale: f32, row: usize, vector: usize) {
        let [rows, columns] = self.pooled;
        let start = (o * rows + row) * columns;
        for n in (0..N).step_by(2) {
            let next = (n + 1).min(N - 1);
            let first = 4 * (vector + n);
            let base = V::splat((2 * row * self.width + 2 * first) as f32);
            // SAFETY: `EVEN` holds eight floats.
            let even = unsafe { V::load(EVEN.as_ptr()) }.add(base);
            let (odd, below) = (even.add(V::splat(1.0)), V::splat(self.width as f32));
            let (left, right) = V::unzip(acc[0][n], acc[0][next]);
            let (upper, upper_tag) = left.later_max(right, even, odd);
            let (left, right) = V::unzip(acc[1][n], acc[1][next]);
            let (lower, lower_tag) = left.later_max(right, even.add(below), odd.add(below));
            let (best, origin) = upper.later_max(lower, upper_tag, lower_tag);
            let best = if self.relu { best.relu() } else { best };
            let best = best.mul_add(V::splat(scale), V::splat(0.0));
            let valid = (if next == n { 4 } else { 8 }).min(columns - first);
            write(best, &mut self.out[start + first..start + columns], valid);
            if !self.origins.is_empty() {
                write(origin, &mut self.origins[start + first..start + columns], valid);
            }
        }
    }
}

/// The first `valid` lanes.
#[inline(always)]
fn write<V: Vector>(vector: V, to: &mut [f32], valid: usize) {
    assert!(to.len() >= valid);
    // SAFETY: as many floats as are written, just checked; `lanes` holds eight.
    unsafe {
        match valid {
            8 => vector.store(to.as_mut_ptr()),
            4 => vector.store_half(to.as_mut_ptr()),
            _ => {
                let mut lanes = [0.0; 8];
                vector.store(lanes.as_mut_ptr());
                to[..valid].iter_mut().zip(lanes).for_each(|(t, l)| *t = l);
            }
        }
    }
}

#[cfg(test)]
#[path = "direct_tests.rs"]
pub mod tests;
