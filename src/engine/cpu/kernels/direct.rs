//! Direct convolution with stride 1 whose 2 x 2 max-pool, ReLU and channel scale happen in registers, and the sums its
//! derivative is made of.

use super::simd::{Kernel, Vector, dispatch};

/// Floats that may be read past the end of an image: the last tile's vectors and the kernel's width.
pub const SLACK: usize = 48;

/// One sample through convolution, scale, ReLU and max-pool.
pub struct ConvPool<'a> {
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
    /// Where each maximum was, `y * width + x` as a float (exact below 2^23, see [`position`]); empty when nobody asks.
    pub origins: &'a mut [f32],
}

pub fn conv_pool(work: ConvPool<'_>) {
    dispatch(work);
}

impl Kernel for ConvPool<'_> {
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

impl ConvPool<'_> {
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

/// Terms of a sum: `factors[i]` times what starts at `offsets[i]`.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    pub offsets: &'a [u32],
    pub factors: &'a [f32],
}

/// Memory for half as many terms as floats: (offsets, factors).
pub fn terms(memory: &mut [f32]) -> (&mut [u32], &mut [f32]) {
    let (offsets, factors) = memory.split_at_mut(memory.len() / 2);
    // SAFETY: a `u32` has the size and the alignment of a float, and any bits are valid in both.
    (unsafe { std::slice::from_raw_parts_mut(offsets.as_mut_ptr().cast(), offsets.len()) }, factors)
}

/// Terms that [`Gather`] may write beyond those that count.
pub const OVERSHOOT: usize = 8;

/// The derivative of one output channel before its pool, and the terms that are not zero.
pub struct Gather<'a> {
    /// Output of the layer, its derivative and the positions of its maxima.
    pub y: &'a [f32],
    pub dy: &'a [f32],
    pub origins: &'a [f32],
    pub scale: f32,
    pub relu: bool,
    pub grads: &'a mut [f32],
    /// A term's offset is its position times this.
    pub unit: u32,
    /// Room for all outputs and [`OVERSHOOT`] more.
    pub offsets: &'a mut [u32],
    pub factors: &'a mut [f32],
}

/// Number of terms, and the sum of their factors.
pub fn gather(work: Gather<'_>) -> (usize, f32) {
    dispatch(work)
}

impl Kernel for Gather<'_> {
    type Output = (usize, f32);

    #[inline(always)]
    fn run<V: Vector>(self) -> (usize, f32) {
        let len = self.dy.len();
        assert!(self.y.len() == len && self.origins.len() == len && self.grads.len() == len);
        assert!(self.offsets.len().min(self.factors.len()) >= len + OVERSHOOT);
        let (mut count, mut sum) = (0, V::splat(0.0));
        for start in (0..len).step_by(8) {
            let lanes = (len - start).min(8);
            // SAFETY: eight lanes from `start` on, or as many as there are, with zeros behind them.
            unsafe {
                let (y, dy, origin) =
                    (part(self.y, start, lanes), part(self.dy, start, lanes), part(self.origins, start, lanes));
                let grad: V = dy;
                let grad = grad.mul_add(V::splat(self.scale), V::splat(0.0));
                let grad = if self.relu { grad.unless_below(y) } else { grad };
                sum = sum.add(grad);
                write(grad, &mut self.grads[start..], lanes);
                let (values, offsets) = (self.factors.as_mut_ptr().add(count), self.offsets.as_mut_ptr().add(count));
                count += grad.compress(origin, self.unit, values, offsets);
            }
        }
        (count, sum.sum())
    }
}

/// `lanes` floats from `start` on, and zeros.
#[inline(always)]
fn part<V: Vector>(from: &[f32], start: usize, lanes: usize) -> V {
    let from = &from[start..start + lanes];
    if lanes == 8 {
        // SAFETY: eight floats, just sliced.
        return unsafe { V::load(from.as_ptr()) };
    }
    let mut all = [0.0; 8];
    all[..lanes].copy_from_slice(from);
    // SAFETY: eight floats.
    unsafe { V::load(all.as_ptr()) }
}

/// The integer that a float below 2^23 holds: adding 2^23 moves it to the low bits. A cast would saturate, and cost more.
#[inline(always)]
pub fn position(origin: f32) -> u32 {
    (origin + 8_388_608.0).to_bits() & 0x7f_ffff
}

/// `to[row][..] += sum over terms of factor * from[offset + row * from_stride ..]`, in registers over all terms.
pub struct Combine<'a> {
    pub terms: Terms<'a>,
    pub from: &'a [f32],
    pub from_stride: usize,
    pub to: &'a mut [f32],
    pub to_stride: usize,
    pub rows: usize,
    /// Vectors of eight per row; whole vectors are read and added.
    pub vectors: usize,
}

pub fn combine(work: Combine<'_>) {
    dispatch(work);
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let last = (self.rows - 1) * self.from_stride + 8 * self.vectors;
        assert!(furthest(self.terms) + last <= self.from.len());
        assert!((self.rows - 1) * self.to_stride + 8 * self.vectors <= self.to.len());
        self.all::<V>();
    }
}

impl Combine<'_> {
    /// Tiles of at most twelve accumulators.
    #[inline(always)]
    fn all<V: Vector>(&mut self) {
        let mut column = 0;
        while column < self.vectors {
            let wide = (self.vectors - column).min(8);
            let mut row = 0;
            while row < self.rows {
                let left = self.rows - row;
                let tall = left.min(match wide {
                    1 | 2 => 5,
                    3 => 3,
                    4 => 2,
                    _ => 1,
                });
                macro_rules! tiles {
                    ($(($r:literal, $n:literal)),*) => {
                        match (tall, wide) {
                            $(($r, $n) => self.tile::<V, $r, $n>(row, column),)*
                            _ => unreachable!("combine: no tile of {tall} x {wide}"),
                        }
                    };
                }
                tiles!(
                    (1, 1),
                    (2, 1),
                    (3, 1),
                    (4, 1),
                    (5, 1),
                    (1, 2),
                    (2, 2),
                    (3, 2),
                    (4, 2),
                    (5, 2),
                    (1, 3),
                    (2, 3),
                    (3, 3),
                    (1, 4),
                    (2, 4),
                    (1, 5),
                    (1, 6),
                    (1, 7),
                    (1, 8)
                );
                row += tall;
            }
            column += wide;
        }
    }

    #[inline(always)]
    fn tile<V: Vector, const R: usize, const N: usize>(&mut self, row: usize, column: usize) {
        let mut acc = [[V::splat(0.0); N]; R];
        let from = self.from[row * self.from_stride + 8 * column..].as_ptr();
        let (offsets, factors) = (self.terms.offsets, self.terms.factors);
        let mut at = 0;
        if R * N <= 5 {
            // So few sums would wait for each other: every other term has sums of its own.
            let mut odd = acc;
            while at + 2 <= offsets.len() {
                self.add(&mut acc, from, offsets[at], factors[at]);
                self.add(&mut odd, from, offsets[at + 1], factors[at + 1]);
                at += 2;
            }
            for (acc, odd) in acc.iter_mut().flatten().zip(odd.into_iter().flatten()) {
                *acc = acc.add(odd);
            }
        }
        while at < offsets.len() {
            self.add(&mut acc, from, offsets[at], factors[at]);
            at += 1;
        }
        for (r, acc) in acc.into_iter().enumerate() {
            let to = self.to[(row + r) * self.to_stride + 8 * column..].as_mut_ptr();
            for (n, acc) in acc.into_iter().enumerate() {
                // SAFETY: the last vector of the last row is inside `to` (asserted by `run`).
                unsafe { acc.add(V::load(to.add(8 * n))).store(to.add(8 * n)) };
            }
        }
    }

    /// One term to all sums of a tile that begins at `from`.
    #[inline(always)]
    fn add<V: Vector, const R: usize, const N: usize>(
        &self,
        acc: &mut [[V; N]; R],
        from: *const f32,
        offset: u32,
        factor: f32,
    ) {
        let factor = V::splat(factor);
        for (r, acc) in acc.iter_mut().enumerate() {
            for (n, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the last vector of the last row of every term is inside `from` (asserted by `run`).
                let x = unsafe { V::load(from.add(offset as usize + r * self.from_stride + 8 * n)) };
                *acc = factor.mul_add(x, *acc);
            }
        }
    }
}

/// The transpose of [`Combine`]: `to[offset + row * to_stride ..] += factor * from[row * from_stride ..]` for every term.
pub struct Spread<'a> {
    pub terms: Terms<'a>,
    pub from: &'a [f32],
    pub from_stride: usize,
    pub to: &'a mut [f32],
    pub to_stride: usize,
    pub rows: usize,
    /// Vectors of eight per row; whole vectors are read and added.
    pub vectors: usize,
}

pub fn spread(work: Spread<'_>) {
    dispatch(work);
}

impl Kernel for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let last = |stride: usize| (self.rows - 1) * stride + 8 * self.vectors;
        assert!(furthest(self.terms) + last(self.to_stride) <= self.to.len());
        assert!(last(self.from_stride) <= self.from.len());
        for (&offset, &factor) in self.terms.offsets.iter().zip(self.terms.factors) {
            let factor = V::splat(factor);
            for r in 0..self.rows {
                for n in 0..self.vectors {
                    // SAFETY: the last vector of the last row of every term is inside `from` and `to` (asserted above).
                    unsafe {
                        let to = self.to.as_mut_ptr().add(offset as usize + r * self.to_stride + 8 * n);
                        let from = V::load(self.from.as_ptr().add(r * self.from_stride + 8 * n));
                        factor.mul_add(from, V::load(to)).store(to);
                    }
                }
            }
        }
    }
}

/// The largest offset.
#[inline(always)]
fn furthest(terms: Terms<'_>) -> usize {
    assert!(terms.offsets.len() == terms.factors.len());
    let mut furthest = 0;
    for &offset in terms.offsets {
        furthest = furthest.max(offset);
    }
    furthest as usize
}

#[cfg(test)]
#[path = "direct_tests.rs"]
mod tests;
