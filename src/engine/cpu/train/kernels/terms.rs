//! The sums that the derivative of a convolution in front of a max-pool is made of: few terms are not zero.

use super::simd::{Kernel, Vector, dispatch};

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

/// The terms that are not zero of one output channel's derivative before its pool.
pub struct Gather<'a> {
    /// Output of the layer, its derivative and the positions of its maxima.
    pub y: &'a [f32],
    pub dy: &'a [f32],
    pub origins: &'a [f32],
    pub scale: f32,
    pub relu: bool,
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
        assert!(self.y.len() == len && self.origins.len() == len);
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
mod tests {
    use super::super::direct::tests::numbers;
    use super::super::simd::{Kernel, Portable};
    use super::*;

    #[test]
    fn combine_like_two_loops() {
        for (rows, vectors) in (1..=5).flat_map(|r| (1..=19).map(move |v| (r, v))) {
            let (from_stride, to_stride) = (8 * vectors + 3, 8 * vectors + 1);
            let from = numbers(400 + rows * from_stride, 4);
            let offsets: Vec<u32> = (0..9).map(|i| i * 37).collect();
            let factors: Vec<f32> = (0..9).map(|i| i as f32 - 4.0).collect();
            let terms = Terms { offsets: &offsets, factors: &factors };
            for portable in [false, true] {
                let mut to = numbers(rows * to_stride, 5);
                let mut expected = to.clone();
                for r in 0..rows {
                    for j in 0..8 * vectors {
                        for (offset, factor) in offsets.iter().zip(&factors) {
                            expected[r * to_stride + j] += factor * from[*offset as usize + r * from_stride + j];
                        }
                    }
                }
                let work = Combine { terms, from: &from, from_stride, to: &mut to, to_stride, rows, vectors };
                match portable {
                    true => work.run::<Portable>(),
                    false => combine(work),
                }
                assert_eq!(to, expected, "{rows} {vectors}");
            }
        }
    }

    #[test]
    fn gather_like_a_loop() {
        for (len, relu) in (0..40).flat_map(|len| [(len, false), (len, true)]) {
            let (mut y, mut dy) = (numbers(len, 1), numbers(len, 2));
            if len > 9 {
                (y[3], dy[3], y[9], dy[9]) = (f32::NAN, 1.0, 1.0, f32::NAN);
            }
            let origins: Vec<f32> = (0..len).map(|i| ((1 << 23) - 1 - 7 * i) as f32).collect();
            let pass = |i: usize| if relu && y[i] <= 0.0 { 0.0 } else { 0.5 * dy[i] };
            let kept: Vec<usize> = (0..len).filter(|&i| pass(i) != 0.0).collect();
            for portable in [false, true] {
                let (mut offsets, mut factors) = (vec![0; len + OVERSHOOT], vec![0.0; len + OVERSHOOT]);
                let work = Gather {
                    y: &y,
                    dy: &dy,
                    origins: &origins,
                    scale: 0.5,
                    relu,
                    unit: 3,
                    offsets: &mut offsets,
                    factors: &mut factors,
                };
                let (count, sum) = if portable { work.run::<Portable>() } else { gather(work) };
                let bits = |x: f32| if x.is_nan() { 1 } else { (x + 0.0).to_bits() };
                assert_eq!(count, kept.len());
                assert_eq!(bits(sum), bits((0..len).map(pass).sum()));
                for (t, &i) in kept.iter().enumerate() {
                    assert_eq!((offsets[t], bits(factors[t])), (3 * origins[i] as u32, bits(pass(i))));
                }
            }
        }
    }

    #[test]
    fn spread_like_two_loops() {
        for (rows, vectors) in (1..=5).flat_map(|r| (1..=11).map(move |v| (r, v))) {
            let (from_stride, to_stride) = (8 * vectors + 3, 8 * vectors + 1);
            let from = numbers(rows * from_stride, 4);
            let offsets: Vec<u32> = (0..9).map(|i| i * 37).collect();
            let factors: Vec<f32> = (0..9).map(|i| i as f32 - 4.0).collect();
            for portable in [false, true] {
                let mut to = numbers(400 + rows * to_stride, 5);
                let mut expected = to.clone();
                for (offset, factor) in offsets.iter().zip(&factors) {
                    for r in 0..rows {
                        for j in 0..8 * vectors {
                            expected[*offset as usize + r * to_stride + j] += factor * from[r * from_stride + j];
                        }
                    }
                }
                let terms = Terms { offsets: &offsets, factors: &factors };
                let work = Spread { terms, from: &from, from_stride, to: &mut to, to_stride, rows, vectors };
                match portable {
                    true => work.run::<Portable>(),
                    false => spread(work),
                }
                assert_eq!(to, expected, "{rows} {vectors}");
            }
        }
    }
}
