//! Weight gradients `dW = dY^T X` of which most terms are zero: ReLU and dropout leave a quarter of `dY` or less.

use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

/// Columns of X that lie side by side: four vectors of sums are eight registers of AVX2, as many as hide the latency of a
/// multiply-add. AVX-512 takes two blocks at a time.
pub const BLOCK: usize = 64;
/// Rows of the gradient that one call makes: they share the blocks of X while these are in the first-level cache.
pub const ROWS: usize = 16;

/// Reorders columns `start..start + columns` of `x (batch x k)` to blocks of 64 columns, each `batch x 64`; the last
/// block is filled up with zeros.
pub fn pack_blocks(x: &[f32], k: usize, start: usize, columns: usize, packed: &mut [f32]) {
    let batch = x.len() / k;
    for (row, x) in x.chunks_exact(k).enumerate() {
        pack_row(&x[start..start + columns], row, batch, packed);
    }
}

/// One of `rows` rows of [`pack_blocks`].
pub fn pack_row(x: &[f32], row: usize, rows: usize, packed: &mut [f32]) {
    for (x, block) in x.chunks(BLOCK).zip(packed.chunks_exact_mut(rows * BLOCK)) {
        let to = &mut block[row * BLOCK..][..BLOCK];
        to[..x.len()].copy_from_slice(x);
        to[x.len()..].fill(0.0);
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

    /// The other way round: row `part * batch + sample` has the terms of columns `16 part ..` of that sample, here
    /// the "samples" of which there are sixteen.
    pub fn find_columns(&mut self, dy: &[f32], n: usize) {
        let samples = dy.len() / n;
        for (sample, row) in dy.chunks_exact(n).enumerate() {
            for (part, row) in row.chunks(ROWS).enumerate() {
                let (start, mut count) = ((part * samples + sample) * ROWS, 0);
                for (r, &d) in row.iter().enumerate() {
                    self.values[start + count] = d;
                    self.samples[start + count] = f32::from_bits(r as u32);
                    count += usize::from(d != 0.0);
                }
                self.counts[part * samples + sample] = f32::from_bits(count as u32);
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
    /// `out[r * out_row + column]`
    pub out: &'a mut [f32],
    pub out_row: usize,
    /// Add to `out` instead of overwriting it.
    pub add: bool,
    /// Addresses, or null, of matrices whose elements, `[r * ahead_row + column]`, are wanted next: fetched while this
    /// computes. Not slices, because others write those matrices meanwhile.
    pub ahead: [*const f32; 2],
    pub ahead_row: usize,
}

/// Values and samples of the terms of up to sixteen rows.
type Found<'a> = [(&'a [f32], &'a [f32]); ROWS];

impl Kernel for SparseOuter<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let (width, batch) = (self.blocks * BLOCK, self.terms.batch);
        assert!(self.rows <= ROWS && width <= self.out_row && self.out.len() >= self.rows * self.out_row);
        assert!(self.x.len() >= batch * width);
        let mut found: Found<'_> = [(&[], &[]); ROWS];
        for (r, found) in found.iter_mut().enumerate().take(self.rows) {
            *found = self.terms.row(self.first + r);
            for sample in found.1 {
                assert!((sample.to_bits() as usize) < batch);
            }
        }
        let mut block = 0;
        while V::WIDE && block + 2 <= self.blocks {
            self.columns::<V, 2>(&found, block);
            block += 2;
        }
        while block < self.blocks {
            self.columns::<V, 1>(&found, block);
            block += 1;
        }
    }
}

/// Vectors per block.
const VECTORS: usize = BLOCK / LANES;

impl SparseOuter<'_> {
    /// `N` blocks of all rows.
    #[inline(always)]
    fn columns<V: Lanes, const N: usize>(&mut self, found: &Found<'_>, block: usize) {
        let size = self.terms.batch * BLOCK;
        let x = self.x[block * size..].as_ptr();
        for (r, (values, samples)) in found.iter().enumerate().take(self.rows) {
            let mut sums = [[V::splat(0.0); VECTORS]; N];
            for (&value, sample) in values.iter().zip(*samples) {
                let (d, row) = (V::splat(value), x.wrapping_add(sample.to_bits() as usize * BLOCK));
                for (n, sums) in sums.iter_mut().enumerate() {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: the sample is below `batch` and the blocks inside `x` (both asserted by `run`).
                        *sum = d.mul_add(unsafe { V::load(row.add(n * size + LANES * i)) }, *sum);
                    }
                }
            }
            for matrix in self.ahead {
                let next = matrix.wrapping_add(r * self.ahead_row + block * BLOCK);
                for line in 0..if matrix.is_null() { 0 } else { N * VECTORS } {
                    V::prefetch(next.wrapping_add(LANES * line));
                }
            }
            let out = self.out[r * self.out_row + block * BLOCK..][..N * BLOCK].as_mut_ptr();
            for (n, sums) in sums.into_iter().enumerate() {
                for (i, sum) in sums.into_iter().enumerate() {
                    // SAFETY: sixty-four floats per block from `out` on, as sliced.
                    unsafe {
                        let to = out.add(n * BLOCK + LANES * i);
                        (if self.add { sum.add(V::load(to)) } else { sum }).store(to);
                    }
                }
            }
        }
    }
}

pub fn sparse_outer(work: SparseOuter<'_>) {
    dispatch(Isa::best(), work);
}

#[cfg(test)]
mod tests {
    use super::*;

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
            for (isa, add) in Isa::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
                let out_row = (blocks + 1) * BLOCK;
                let mut out = vec![if add { 1.0 } else { f32::NAN }; rows * out_row];
                let work = SparseOuter {
                    terms: &terms,
                    first,
                    rows,
                    x: &packed,
                    blocks,
                    out: &mut out,
                    out_row,
                    add,
                    ahead: [std::ptr::null(); 2],
                    ahead_row: 0,
                };
                dispatch(isa, work);
                for r in 0..rows {
                    for c in 0..columns {
                        let exact: f32 = (0..batch).map(|b| dy[b * n + first + r] * x[b * k + start + c]).sum();
                        assert_eq!(out[r * out_row + c], exact + f32::from(u8::from(add)));
                    }
                }
            }
        }
    }

    #[test]
    fn terms_of_columns_are_what_is_not_zero() {
        let (samples, n) = (3, 37_usize);
        let dy: Vec<f32> = (0..samples * n).map(|i| if i % 3 == 0 { i as f32 - 30.0 } else { 0.0 }).collect();
        let parts = n.div_ceil(ROWS);
        let len = parts * samples * ROWS;
        let (mut values, mut rows, mut counts) = (vec![0.0; len], vec![0.0; len], vec![0.0; parts * samples]);
        let mut terms = RowTerms { values: &mut values, samples: &mut rows, counts: &mut counts, batch: ROWS };
        terms.find_columns(&dy, n);
        let mut found = vec![0.0; samples * n];
        for part in 0..parts {
            for sample in 0..samples {
                let (values, rows) = terms.row(part * samples + sample);
                for (value, row) in values.iter().zip(rows) {
                    assert_ne!(*value, 0.0);
                    found[sample * n + part * ROWS + row.to_bits() as usize] = *value;
                }
            }
        }
        assert_eq!(found, dy);
    }
}
