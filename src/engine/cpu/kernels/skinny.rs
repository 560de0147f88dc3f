//! Products with a huge matrix and a batch of few rows: bound by how often the huge matrix crosses the memory bus.

use super::simd::{Kernel, Vector, dispatch};

/// `y[b][r] += x[b] . w[r]` for `rows` rows of `w`, all `k` long.
pub struct Dots<'a> {
    pub w: &'a [f32],
    pub rows: usize,
    pub x: &'a [f32],
    pub batch: usize,
    pub k: usize,
    /// Sums, `y[b * ldy + r]`.
    pub y: &'a mut [f32],
    pub ldy: usize,
}

/// Floats of `x` that stay in a core's second-level cache while rows of `w` stream past.
const RESIDENT: usize = 1 << 17;

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        assert!(self.w.len() >= self.rows * self.k && self.x.len() >= self.batch * self.k);
        assert!(self.batch == 0 || self.y.len() >= (self.batch - 1) * self.ldy + self.rows);
        let step = (RESIDENT / self.batch.max(1)).clamp(512, self.k.max(512)) / 8 * 8;
        for k0 in (0..self.k).step_by(step) {
            let k1 = (k0 + step).min(self.k);
            let mut row = 0;
            while row + 4 <= self.rows {
                self.row_block::<V, 4>(row, k0, k1);
                row += 4;
            }
            while row < self.rows {
                self.row_block::<V, 1>(row, k0, k1);
                row += 1;
            }
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    fn row_block<V: Vector, const R: usize>(&mut self, row: usize, k0: usize, k1: usize) {
        let mut b = 0;
        while b + 3 <= self.batch {
            self.tile::<V, R, 3>(row, b, k0, k1);
            b += 3;
        }
        match self.batch - b {
            2 => self.tile::<V, R, 2>(row, b, k0, k1),
            1 => self.tile::<V, R, 1>(row, b, k0, k1),
            _ => {}
        }
    }

    #[inline(always)]
    fn tile<V: Vector, const R: usize, const B: usize>(&mut self, row: usize, b: usize, k0: usize, k1: usize) {
        let (w, x) = (self.w[row * self.k..].as_ptr(), self.x[b * self.k..].as_ptr());
        let mut acc = [[V::splat(0.0); R]; B];
        let mut at = k0;
        while at + 8 <= k1 {
            // SAFETY: rows `row..row + R` of `w` and `b..b + B` of `x` exist (asserted by `run`), `at + 8 <= k`.
            unsafe {
                let mut rows = [V::splat(0.0); R];
                for (r, row) in rows.iter_mut().enumerate() {
                    *row = V::load(w.add(r * self.k + at));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let xs = V::load(x.add(i * self.k + at));
                    for (acc, w) in acc.iter_mut().zip(rows) {
                        *acc = xs.mul_add(w, *acc);
                    }
                }
            }
            at += 8;
        }
        for (i, acc) in acc.into_iter().enumerate() {
            for (r, acc) in acc.into_iter().enumerate() {
                let tail: f32 = (at..k1).map(|j| self.x[(b + i) * self.k + j] * self.w[(row + r) * self.k + j]).sum();
                self.y[(b + i) * self.ldy + row + r] += acc.sum() + tail;
            }
        }
    }
}

pub fn dots(work: Dots<'_>) {
    dispatch(work);
}

/// Rows of the result that one call of [`outer`] makes.
pub const OUTER_ROWS: usize = 6;
/// Columns per panel.
pub const PANEL: usize = 16;

/// Reorders columns `start..start + columns` of `x (batch x k)` to panels of 16 columns, each `batch x 16`; the last
/// panel is filled up with zeros.
pub fn pack(x: &[f32], k: usize, start: usize, columns: usize, packed: &mut [f32]) {
    let batch = x.len() / k;
    for (p, panel) in packed.chunks_exact_mut(batch * PANEL).take(columns.div_ceil(PANEL)).enumerate() {
        let len = PANEL.min(columns - p * PANEL);
        for (row, to) in x.chunks_exact(k).zip(panel.chunks_exact_mut(PANEL)) {
            to[..len].copy_from_slice(&row[start + p * PANEL..][..len]);
            to[len..].fill(0.0);
        }
    }
}

/// `out[r][c] = sum over b of d[b][r] * x[b][c]`: six rows of the gradient of a weight matrix.
pub struct Outer<'a> {
    /// `batch x 6`
    pub d: &'a [f32],
    /// From [`pack`].
    pub packed: &'a [f32],
    pub batch: usize,
    pub panels: usize,
    /// Six rows of `panels * 16`.
    pub out: &'a mut [f32],
}

impl Kernel for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let width = self.panels * PANEL;
        assert!(self.d.len() >= self.batch * OUTER_ROWS && self.out.len() >= OUTER_ROWS * width);
        assert!(self.packed.len() >= self.batch * width);
        for p in 0..self.panels {
            let mut acc = [[V::splat(0.0); 2]; OUTER_ROWS];
            let (mut x, mut d) = (self.packed[p * self.batch * PANEL..].as_ptr(), self.d.as_ptr());
            for _ in 0..self.batch {
                // SAFETY: `x` walks one panel of `batch * 16` floats, `d` walks `batch * 6`; both asserted above.
                unsafe {
                    let (low, high) = (V::load(x), V::load(x.add(8)));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let d = V::splat(*d.add(r));
                        acc[0] = d.mul_add(low, acc[0]);
                        acc[1] = d.mul_add(high, acc[1]);
                    }
                    x = x.add(PANEL);
                    d = d.add(OUTER_ROWS);
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                let out = self.out[r * width + p * PANEL..].as_mut_ptr();
                // SAFETY: row `r` has `width` floats and this panel lies inside (asserted above).
                unsafe {
                    acc[0].store(out);
                    acc[1].store(out.add(8));
                }
            }
        }
    }
}

pub fn outer(work: Outer<'_>) {
    dispatch(work);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::kernels::simd::Portable;

    fn numbers(len: usize) -> Vec<f32> {
        // Small integers: every order of adding their products is exact.
        (0..len).map(|i| (i * 31 % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn dots_like_two_loops() {
        for (rows, batch, k) in [(9, 5, 1003), (4, 1, 8), (1, 3, 5), (7, 8, 16)] {
            let (w, x) = (numbers(rows * k), numbers(batch * k));
            let ldy = rows + 2;
            let mut y = vec![1.0; batch * ldy];
            dots(Dots { w: &w, rows, x: &x, batch, k, y: &mut y, ldy });
            let mut z = vec![1.0; batch * ldy];
            Dots { w: &w, rows, x: &x, batch, k, y: &mut z, ldy }.run::<Portable>();
            for b in 0..batch {
                for r in 0..rows {
                    let exact = 1.0 + (0..k).map(|j| x[b * k + j] * w[r * k + j]).sum::<f32>();
                    assert_eq!((y[b * ldy + r], z[b * ldy + r]), (exact, exact));
                }
            }
        }
    }

    #[test]
    fn outer_like_three_loops() {
        let (batch, k, start, columns) = (5, 70, 3, 37);
        let (x, d) = (numbers(batch * k), numbers(batch * OUTER_ROWS));
        let panels = 3;
        let mut packed = vec![f32::NAN; batch * panels * PANEL];
        pack(&x, k, start, columns, &mut packed);
        let mut out = vec![f32::NAN; OUTER_ROWS * panels * PANEL];
        outer(Outer { d: &d, packed: &packed, batch, panels, out: &mut out });
        let mut portable = vec![f32::NAN; OUTER_ROWS * panels * PANEL];
        Outer { d: &d, packed: &packed, batch, panels, out: &mut portable }.run::<Portable>();
        for r in 0..OUTER_ROWS {
            for c in 0..columns {
                let exact: f32 = (0..batch).map(|b| d[b * OUTER_ROWS + r] * x[b * k + start + c]).sum();
                let i = r * panels * PANEL + c;
                assert_eq!((out[i], portable[i]), (exact, exact));
            }
        }
    }
}
