//! Weight gradients `dW = dY^T X` of which most terms are zero: ReLU and dropout leave a quarter of `dY` or less.

use super::simd::{Kernel, Vector, dispatch};

/// Columns of X that lie side by side: eight vectors, as many sums as hide the latency of a multiply-add.
pub const BLOCK: usize = 64;
/// Rows of the gradient that one call makes: they share the blocks of X while these are in the first-level cache.
pub const ROWS: usize = 16;

/// Reorders columns `start..start + columns` of `x (batch x k)` to blocks of 64 columns, each `batch x 64`; the last
/// block is filled up with zeros.
pub fn pack_blocks(x: &[f32], k: usize, start: usize, columns: usize, packed: &mut [f32]) {
    let batch = x.len() / k;
    for (p, block) in packed.chunks_exact_mut(batch * BLOCK).take(columns.div_ceil(BLOCK)).enumerate() {
        let len = BLOCK.min(columns - p * BLOCK);
        for (row, to) in x.chunks_exact(k).zip(block.chunks_exact_mut(BLOCK)) {
            to[..len].copy_from_slice(&row[start + p * BLOCK..][..len]);
            to[len..].fill(0.0);
        }
    }
}

/// The terms of `dY^T` that are not zero: row `r` has `counts[r]` from `r * batch` on.
pub struct RowTerms<'a> {
    pub values: &'a mut [f32],
    /// Sample of each term and number of terms of each row, as the bits of floats.
    pub samples: &'a mut [f32],
    pub counts: &'a mut [f32],
    pub batch: usize,
}

impl RowTerms<'_> {
    /// All rows of the transpose of `dy (batch x n)`.
    pub fn find(&mut self, dy: &[f32], n: usize) {
        for first in (0..n).step_by(ROWS) {
            let rows = ROWS.min(n - first);
            let mut counts = [0; ROWS];
            for (b, row) in dy.chunks_exact(n).enumerate() {
                for (r, &d) in row[first..first + rows].iter().enumerate() {
                    // Written in any case, counted if it matters: no branch that nobody can predict.
                    let at = (first + r) * self.batch + counts[r];
                    self.values[at] = d;
                    self.samples[at] = f32::from_bits(b as u32);
                    counts[r] += usize::from(d != 0.0);
                }
            }
            for (to, count) in self.counts[first..first + rows].iter_mut().zip(counts) {
                *to = f32::from_bits(count as u32);
            }
        }
    }

    /// Values and samples of one row.
    fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.batch..row * self.batch + self.counts[row].to_bits() as usize;
        (&self.values[range.clone()], &self.samples[range])
    }
}

/// `out[r][c] = sum over the terms of row r of value * x[sample][c]`.
pub struct SparseOuter<'a> {
    pub terms: &'a RowTerms<'a>,
    /// Rows of the terms; row `r` of the result comes from row `first + r`.
    pub first: usize,
    pub rows: usize,
    /// As [`pack_blocks`] has left it.
    pub x: &'a [f32],
    pub blocks: usize,
    /// `out[r * blocks * 64 + column]`
    pub out: &'a mut [f32],
    /// Addresses, or null, of matrices whose elements, `[r * ahead_row + column]`, are wanted next: fetched while this
    /// computes. Not slices, because others write those matrices meanwhile.
    pub ahead: [*const f32; 2],
    pub ahead_row: usize,
}

impl Kernel for SparseOuter<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (width, batch) = (self.blocks * BLOCK, self.terms.batch);
        assert!(self.rows <= ROWS && self.out.len() >= self.rows * width);
        assert!(self.x.len() >= batch * width);
        let mut found = [(&[][..], &[][..]); ROWS];
        for (r, found) in found.iter_mut().enumerate().take(self.rows) {
            *found = self.terms.row(self.first + r);
            assert!(found.1.iter().all(|s| (s.to_bits() as usize) < batch));
        }
        for block in 0..self.blocks {
            let x = self.x[block * batch * BLOCK..].as_ptr();
            for (r, (values, samples)) in found.iter().enumerate().take(self.rows) {
                let mut sums = [V::splat(0.0); BLOCK / 8];
                for (&value, sample) in values.iter().zip(*samples) {
                    let (d, row) = (V::splat(value), x.wrapping_add(sample.to_bits() as usize * BLOCK));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: the sample is below `batch` and the block inside `x` (both asserted above).
                        *sum = d.mul_add(unsafe { V::load(row.add(8 * i)) }, *sum);
                    }
                }
                for matrix in self.ahead {
                    let next = matrix.wrapping_add(r * self.ahead_row + block * BLOCK);
                    (0..if matrix.is_null() { 0 } else { BLOCK / 16 })
                        .for_each(|l| V::prefetch(next.wrapping_add(16 * l)));
                }
                let out = self.out[r * width + block * BLOCK..][..BLOCK].as_mut_ptr();
                for (i, sum) in sums.into_iter().enumerate() {
                    // SAFETY: sixty-four floats from `out` on, as sliced.
                    unsafe { sum.store(out.add(8 * i)) };
                }
            }
        }
    }
}

pub fn sparse_outer(work: SparseOuter<'_>) {
    dispatch(work);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::train::kernels::simd::Portable;

    #[test]
    fn like_three_loops_whatever_is_zero() {
        let (batch, k, n, start, columns) = (7, 150, 21, 5, 130_usize);
        // Small integers: every order of adding their products is exact.
        let x: Vec<f32> = (0..batch * k).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let dy: Vec<f32> = (0..batch * n).map(|i| if i % 3 == 0 { (i * 13 % 7) as f32 - 3.0 } else { 0.0 }).collect();
        let blocks = columns.div_ceil(BLOCK);
        let mut packed = vec![f32::NAN; batch * blocks * BLOCK];
        pack_blocks(&x, k, start, columns, &mut packed);
        let (mut values, mut samples, mut counts) = (vec![0.0; n * batch], vec![0.0; n * batch], vec![0.0; n]);
        let mut terms = RowTerms { values: &mut values, samples: &mut samples, counts: &mut counts, batch };
        terms.find(&dy, n);
        for (first, rows) in [(0, ROWS), (16, 5), (20, 1)] {
            for portable in [false, true] {
                let mut out = vec![f32::NAN; rows * blocks * BLOCK];
                let work = SparseOuter {
                    terms: &terms,
                    first,
                    rows,
                    x: &packed,
                    blocks,
                    out: &mut out,
                    ahead: [std::ptr::null(); 2],
                    ahead_row: 0,
                };
                if portable {
                    work.run::<Portable>()
                } else {
                    sparse_outer(work)
                }
                for r in 0..rows {
                    for c in 0..columns {
                        let exact: f32 = (0..batch).map(|b| dy[b * n + first + r] * x[b * k + start + c]).sum();
                        assert_eq!(out[r * blocks * BLOCK + c], exact);
                    }
                }
            }
        }
    }
}
