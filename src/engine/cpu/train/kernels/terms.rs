//! The sums that the derivative of a convolution in front of a max-pool is made of: few terms are not zero.

use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

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
pub const OVERSHOOT: usize = LANES;

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
    /// Number of terms, and the sum of their factors.
    pub found: &'a mut (usize, f32),
}

pub fn gather(work: Gather<'_>) {
    dispatch(Isa::best(), work);
}

impl Kernel for Gather<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let len = self.dy.len();
        assert!(self.y.len() == len && self.origins.len() == len);
        assert!(self.offsets.len().min(self.factors.len()) >= len + OVERSHOOT);
        let (mut count, mut sum) = (0, V::splat(0.0));
        for start in (0..len).step_by(LANES) {
            let range = start..len.min(start + LANES);
            let grad = part::<V>(&self.dy[range.clone()]).mul(V::splat(self.scale));
            let grad = if self.relu { grad.unless_negative(part(&self.y[range.clone()])) } else { grad };
            sum = sum.add(grad);
            // SAFETY: at most `start` terms were counted, and there is room for sixteen more (asserted above).
            unsafe {
                let (values, offsets) = (self.factors.as_mut_ptr().add(count), self.offsets.as_mut_ptr().add(count));
                count += grad.compress(part(&self.origins[range]), self.unit, values, offsets);
            }
        }
        *self.found = (count, sum.sum());
    }
}

/// At most sixteen floats, and zeros.
#[inline(always)]
fn part<V: Lanes>(from: &[f32]) -> V {
    if from.len() == LANES {
        // SAFETY: sixteen floats, just counted.
        return unsafe { V::load(from.as_ptr()) };
    }
    let mut all = [0.0; LANES];
    all[..from.len()].copy_from_slice(from);
    V::from_array(all)
}

/// `to[row][..] += sum over terms of factor * from[offset + row * from_stride ..]`, in registers over all terms.
pub struct Combine<'a> {
    pub terms: Terms<'a>,
    pub from: &'a [f32],
    pub from_stride: usize,
    pub to: &'a mut [f32],
    pub to_stride: usize,
    /// Three or five.
    pub rows: usize,
    /// Columns, all of them read and added: whole vectors of sixteen, or eight.
    pub columns: usize,
}

/// Columns of half a vector.
const HALF: usize = LANES / 2;

pub fn combine(work: Combine<'_>) {
    dispatch(Isa::best(), work);
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        assert!(self.columns == HALF || self.columns.is_multiple_of(LANES));
        assert!(furthest(self.terms) + (self.rows - 1) * self.from_stride + self.columns <= self.from.len());
        assert!((self.rows - 1) * self.to_stride + self.columns <= self.to.len());
        match (self.rows, self.columns) {
            (3, HALF) => self.tile::<V, 2, 1, true>(0),
            (5, HALF) => self.tile::<V, 3, 1, true>(0),
            (3, _) => self.all::<V, 3>(),
            (5, _) => self.all::<V, 5>(),
            (rows, _) => unreachable!("combine: no tile of {rows} rows"),
        }
    }
}

impl Combine<'_> {
    /// Tiles of as many sums as there are registers for, as even as possible.
    #[inline(always)]
    fn all<V: Lanes, const R: usize>(&mut self) {
        let vectors = self.columns / LANES;
        let tiles = vectors.div_ceil(sums::<V>() / R);
        let mut column = 0;
        for tile in 0..tiles {
            let wide = (vectors - column).div_ceil(tiles - tile);
            macro_rules! tiles {
                ($($n:literal)*) => {
                    match wide {
                        $($n => self.tile::<V, R, $n, false>(column),)*
                        _ => unreachable!("combine: no tile {wide} wide"),
                    }
                };
            }
            match sums::<V>() / R {
                1 => tiles!(1),
                2 => tiles!(1 2),
                5 => tiles!(1 2 3 4 5),
                _ => tiles!(1 2 3 4 5 6 7 8),
            }
            column += wide;
        }
    }

    /// `R` rows of `N` vectors; or, two rows in each vector, `R` pairs of rows, of which the last may be the same row twice.
    #[inline(always)]
    fn tile<V: Lanes, const R: usize, const N: usize, const HALVES: bool>(&mut self, column: usize) {
        let mut acc = [[V::splat(0.0); N]; R];
        let from = self.from[LANES * column..].as_ptr();
        let (offsets, factors) = (self.terms.offsets, self.terms.factors);
        let mut at = 0;
        if 2 * R * N <= sums::<V>() {
            // So few sums would wait for each other: every other term has sums of its own.
            let mut odd = acc;
            while at + 2 <= offsets.len() {
                self.add::<V, R, N, HALVES>(&mut acc, from, offsets[at], factors[at]);
                self.add::<V, R, N, HALVES>(&mut odd, from, offsets[at + 1], factors[at + 1]);
                at += 2;
            }
            for (acc, odd) in acc.iter_mut().flatten().zip(odd.into_iter().flatten()) {
                *acc = acc.add(odd);
            }
        }
        while at < offsets.len() {
            self.add::<V, R, N, HALVES>(&mut acc, from, offsets[at], factors[at]);
            at += 1;
        }
        let to = self.to[LANES * column..].as_mut_ptr();
        for (r, acc) in acc.into_iter().enumerate() {
            for (n, acc) in acc.into_iter().enumerate() {
                let [first, second] = self.pair::<HALVES>(r, self.to_stride);
                // SAFETY: the last vector of the last row is inside `to` (asserted by `run`).
                unsafe {
                    if HALVES {
                        let (low, high) = (to.add(first), to.add(second));
                        acc.add(V::load_halves(low, high)).store_halves(low, high);
                    } else {
                        let to = to.add(first + LANES * n);
                        acc.add(V::load(to)).store(to);
                    }
                }
            }
        }
    }

    /// Where row `r` of a tile begins, or both of a pair of rows.
    #[inline(always)]
    fn pair<const HALVES: bool>(&self, r: usize, stride: usize) -> [usize; 2] {
        match HALVES {
            true => [2 * r * stride, (2 * r + 1).min(self.rows - 1) * stride],
            false => [r * stride; 2],
        }
    }

    /// One term to all sums of a tile that begins at `from`.
    #[inline(always)]
    fn add<V: Lanes, const R: usize, const N: usize, const HALVES: bool>(
        &self,
        acc: &mut [[V; N]; R],
        from: *const f32,
        offset: u32,
        factor: f32,
    ) {
        let factor = V::splat(factor);
        for (r, acc) in acc.iter_mut().enumerate() {
            let [first, second] = self.pair::<HALVES>(r, self.from_stride);
            for (n, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the last vector of the last row of every term is inside `from` (asserted by `run`).
                let x = unsafe {
                    let from = from.add(offset as usize);
                    if HALVES {
                        V::load_halves(from.add(first), from.add(second))
                    } else {
                        V::load(from.add(first + LANES * n))
                    }
                };
                *acc = factor.mul_add(x, *acc);
            }
        }
    }
}

/// Sums that fit the registers.
const fn sums<V: Lanes>() -> usize {
    if V::WIDE { 25 } else { 6 }
}

/// The transpose of [`Combine`]: `to[offset + row * to_stride ..] += factor * from[row * from_stride ..]` for every term.
pub struct Spread<'a> {
    pub terms: Terms<'a>,
    pub from: &'a [f32],
    pub from_stride: usize,
    pub to: &'a mut [f32],
    pub to_stride: usize,
    pub rows: usize,
    /// Vectors of sixteen per row; whole vectors are read and added.
    pub vectors: usize,
}

pub fn spread(work: Spread<'_>) {
    dispatch(Isa::best(), work);
}

impl Kernel for Spread<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let last = |stride: usize| (self.rows - 1) * stride + LANES * self.vectors;
        assert!(furthest(self.terms) + last(self.to_stride) <= self.to.len());
        assert!(last(self.from_stride) <= self.from.len());
        for (&offset, &factor) in self.terms.offsets.iter().zip(self.terms.factors) {
            let factor = V::splat(factor);
            for r in 0..self.rows {
                for n in 0..self.vectors {
                    // SAFETY: the last vector of the last row of every term is inside `from` and `to` (asserted above).
                    unsafe {
                        let to = self.to.as_mut_ptr().add(offset as usize + r * self.to_stride + LANES * n);
                        let from = V::load(self.from.as_ptr().add(r * self.from_stride + LANES * n));
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
    use super::*;

    #[test]
    fn combine_like_two_loops() {
        let widths = || std::iter::once(HALF).chain((1..=19).map(|v| LANES * v));
        for (rows, columns) in [3, 5].into_iter().flat_map(|r| widths().map(move |c| (r, c))) {
            let (from_stride, to_stride) = (columns + 3, columns + 1);
            let from = numbers(400 + rows * from_stride, 4);
            let offsets: Vec<u32> = (0..9).map(|i| i * 37).collect();
            let factors: Vec<f32> = (0..9).map(|i| i as f32 - 4.0).collect();
            let terms = Terms { offsets: &offsets, factors: &factors };
            for isa in Isa::available() {
                let mut to = numbers(rows * to_stride, 5);
                let mut expected = to.clone();
                for r in 0..rows {
                    for j in 0..columns {
                        for (offset, factor) in offsets.iter().zip(&factors) {
                            expected[r * to_stride + j] += factor * from[*offset as usize + r * from_stride + j];
                        }
                    }
                }
                let work = Combine { terms, from: &from, from_stride, to: &mut to, to_stride, rows, columns };
                dispatch(isa, work);
                assert_eq!(to, expected, "{rows} {columns}");
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
            for isa in Isa::available() {
                let (mut offsets, mut factors) = (vec![0; len + OVERSHOOT], vec![0.0; len + OVERSHOOT]);
                let mut found = (0, 0.0);
                let work = Gather {
                    y: &y,
                    dy: &dy,
                    origins: &origins,
                    scale: 0.5,
                    relu,
                    unit: 3,
                    offsets: &mut offsets,
                    factors: &mut factors,
                    found: &mut found,
                };
                dispatch(isa, work);
                let (count, sum) = found;
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
            let (from_stride, to_stride) = (LANES * vectors + 3, LANES * vectors + 1);
            let from = numbers(rows * from_stride, 4);
            let offsets: Vec<u32> = (0..9).map(|i| i * 37).collect();
            let factors: Vec<f32> = (0..9).map(|i| i as f32 - 4.0).collect();
            for isa in Isa::available() {
                let mut to = numbers(400 + rows * to_stride, 5);
                let mut expected = to.clone();
                for (offset, factor) in offsets.iter().zip(&factors) {
                    for r in 0..rows {
                        for j in 0..LANES * vectors {
                            expected[*offset as usize + r * to_stride + j] += factor * from[r * from_stride + j];
                        }
                    }
                }
                let terms = Terms { offsets: &offsets, factors: &factors };
                let work = Spread { terms, from: &from, from_stride, to: &mut to, to_stride, rows, vectors };
                dispatch(isa, work);
                assert_eq!(to, expected, "{rows} {vectors}");
            }
        }
    }
}
