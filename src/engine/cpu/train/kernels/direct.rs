//! Direct convolution with stride 1 whose 2 x 2 max-pool, ReLU and channel scale happen in registers.

use super::terms::Terms;
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

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
    dispatch(Isa::best(), work);
}

impl Kernel for Direct<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
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

/// Columns of the convolution in half a vector.
const HALF: usize = LANES / 2;

/// The even columns of two vectors.
const EVEN: [f32; LANES] = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0];
/// Those of one, twice.
const TWICE: [f32; LANES] = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0];
/// Those of two half vectors, twice, and which of the two.
const QUARTERS: [[f32; LANES]; 2] = [
    [0.0, 2.0, 4.0, 6.0, 0.0, 2.0, 4.0, 6.0, 0.0, 2.0, 4.0, 6.0, 0.0, 2.0, 4.0, 6.0],
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
];

/// Output channels of a tile whose two rows are `vectors` wide: sums, inputs and a weight fit sixteen registers with two
/// channels, thirty-two with twenty-four sums.
const fn most<V: Lanes>(vectors: usize) -> usize {
    match (V::WIDE, vectors) {
        (false, _) => 2,
        (true, 1) => 8,
        (true, _) => 6,
    }
}

impl Direct<'_> {
    #[inline(always)]
    fn rows<V: Lanes, const K: usize>(&mut self) {
        let [rows, columns] = self.pooled;
        // At most eight columns beyond whole vectors are half a vector: two rows of the result fill one.
        let whole = (2 * columns + HALF - 1) / LANES;
        for row in 0..rows {
            let mut vector = 0;
            while V::WIDE && vector + 2 <= whole {
                self.blocks::<V, K, 2, false>(row, vector);
                vector += 2;
            }
            while vector < whole {
                self.blocks::<V, K, 1, false>(row, vector);
                vector += 1;
            }
            if LANES * whole < 2 * columns && row % 2 == 0 {
                self.blocks::<V, K, 1, true>(row, whole);
            }
        }
    }

    #[inline(always)]
    fn blocks<V: Lanes, const K: usize, const N: usize, const HALVES: bool>(&mut self, row: usize, vector: usize) {
        let channels = self.live.offsets.len();
        let blocks = channels.div_ceil(most::<V>(N));
        let mut at = 0;
        for block in 0..blocks {
            // As even as possible: few sums would wait for each other.
            let size = (channels - at).div_ceil(blocks - block);
            macro_rules! tiles {
                ($($b:literal)*) => {
                    match size {
                        $($b => self.tile::<V, K, N, $b, HALVES>(row, vector, at),)*
                        _ => unreachable!("conv_pool: no tile of {size} channels"),
                    }
                };
            }
            match most::<V>(N) {
                2 => tiles!(1 2),
                6 => tiles!(1 2 3 4 5 6),
                _ => tiles!(1 2 3 4 5 6 7 8),
            }
            at += size;
        }
    }

    /// Distance from a row of the convolution to that which shares its vectors.
    fn below(&self, row: usize) -> usize {
        if row + 1 < self.pooled[0] { 2 * self.width } else { 0 }
    }

    /// `N` vectors of two rows of `B` output channels; or `HALVES` of vectors of two rows and the next two.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // r, n and b index registers and addresses alike
    fn tile<V: Lanes, const K: usize, const N: usize, const B: usize, const HALVES: bool>(
        &mut self,
        row: usize,
        vector: usize,
        at: usize,
    ) {
        let (per_channel, below) = (self.channels * K * K, self.below(row));
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
        let mut image = self.image[2 * row * self.width + LANES * vector..].as_ptr();
        for _ in 0..self.channels {
            for ky in 0..K {
                for kx in 0..K {
                    // SAFETY: rows `2 row + ky` and the next are below `height` (asserted by `run`), those two further
                    // down where there is another row of the result; a vector may run past its row, and past the last
                    // one by less than SLACK. Weights end at `(o + 1) * per_channel`.
                    unsafe {
                        let corner = image.add(ky * self.width + kx);
                        // The inputs stay in registers, the weights pass by.
                        let mut inputs = [[V::splat(0.0); N]; 2];
                        for r in 0..2 {
                            for n in 0..N {
                                let x = corner.add(r * self.width + LANES * n);
                                inputs[r][n] = if HALVES { V::load_halves(x, x.add(below)) } else { V::load(x) };
                            }
                        }
                        for b in 0..B {
                            let w = V::splat(*weights[b].add(ky * K + kx));
                            for r in 0..2 {
                                for n in 0..N {
                                    acc[b][r][n] = inputs[r][n].mul_add(w, acc[b][r][n]);
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
        // A pool leaves half of a vector: two of them at a time, of one channel or of two.
        for b in 0..B {
            if N == 1 && b % 2 == 1 {
                continue;
            }
            let other = if N == 1 { (b + 1).min(B - 1) } else { b };
            let upper = V::unzip(acc[b][0][0], acc[other][0][N - 1]);
            let lower = V::unzip(acc[b][1][0], acc[other][1][N - 1]);
            let channels = [live[b] as usize, live[other] as usize];
            let single = N == 1 && other == b;
            self.pool::<V, N, HALVES>([upper, lower], channels, single, [scales[b], scales[other]], row, vector);
        }
    }

    /// Even and odd columns of two rows to what the layer returns: the lower half for a channel, the upper for what
    /// comes behind it or for another channel, unless there is a `single` one.
    #[inline(always)]
    fn pool<V: Lanes, const N: usize, const HALVES: bool>(
        &mut self,
        [upper, lower]: [(V, V); 2],
        channels: [usize; 2],
        single: bool,
        scales: [f32; 2],
        row: usize,
        vector: usize,
    ) {
        let ([rows, columns], below, width) = (self.pooled, self.below(row), V::splat(self.width as f32));
        let base = V::splat((2 * row * self.width + LANES * vector) as f32);
        let even = match (HALVES, N) {
            (true, _) => V::from_array(QUARTERS[1]).mul_add(V::splat(below as f32), V::from_array(QUARTERS[0])),
            (false, 1) => V::from_array(TWICE),
            (false, _) => V::from_array(EVEN),
        };
        let even = even.add(base);
        let odd = even.add(V::splat(1.0));
        let (upper, upper_tag) = upper.0.later_max(upper.1, even, odd);
        let (lower, lower_tag) = lower.0.later_max(lower.1, even.add(width), odd.add(width));
        let (best, origin) = upper.later_max(lower, upper_tag, lower_tag);
        let best = if self.relu { best.max(V::splat(0.0)) } else { best };
        let scales = [[scales[0]; HALF], [scales[1]; HALF]];
        // SAFETY: eight floats each.
        let best = best.mul(unsafe { V::load_halves(scales[0].as_ptr(), scales[1].as_ptr()) });
        let first = HALF * vector;
        let start = (channels[0] * rows + row) * columns + first;
        let starts = [start, if N == 1 { (channels[1] * rows + row) * columns + first } else { start + HALF }];
        let valid = [columns - first, if N == 1 { columns - first } else { columns.saturating_sub(first + HALF) }];
        for (values, to) in [(best, &mut self.out[..]), (origin, &mut self.origins[..])] {
            if to.is_empty() {
                continue;
            }
            if !HALVES && !single && valid[0] >= HALF && valid[1] >= HALF {
                let low = to[starts[0]..starts[0] + HALF].as_mut_ptr();
                let high = to[starts[1]..starts[1] + HALF].as_mut_ptr();
                // SAFETY: eight floats each, just sliced.
                unsafe { values.store_halves(low, high) };
                continue;
            }
            let lanes = values.to_array();
            for half in 0..if single { 1 } else { 2 } {
                let (lanes, to) = (&lanes[HALF * half..][..HALF], &mut to[starts[half]..]);
                if HALVES {
                    to[..valid[half]].copy_from_slice(&lanes[..valid[half]]);
                    if below > 0 {
                        to[columns..columns + valid[half]].copy_from_slice(&lanes[HALF / 2..][..valid[half]]);
                    }
                } else {
                    let valid = valid[half].min(HALF);
                    to[..valid].copy_from_slice(&lanes[..valid]);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "direct_tests.rs"]
pub mod tests;
