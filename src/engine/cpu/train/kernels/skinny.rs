//! Products with a huge matrix and a batch of few rows: bound by how often the huge matrix crosses the memory bus.

use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

/// `y[b][r] += x[b] . w[r]` for `rows` rows of `w`, all `k` long.
pub struct Dots<'a> {
    pub w: &'a [f32],
    /// A matrix like `w` and two factors: then `factors[0] w + factors[1] other` takes the place of `w`.
    pub other: Option<(&'a [f32], [f32; 2])>,
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

/// Distance in floats at which a row is asked for: some hundred nanoseconds.
const AHEAD: usize = 512;

impl Kernel for Dots<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        assert!(self.w.len() >= self.rows * self.k && self.x.len() >= self.batch * self.k);
        assert!(self.batch == 0 || self.y.len() >= (self.batch - 1) * self.ldy + self.rows);
        assert!(self.other.is_none_or(|(other, _)| other.len() >= self.rows * self.k));
        match self.other {
            Some(_) => self.all::<V, true>(),
            None => self.all::<V, false>(),
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    fn all<V: Lanes, const SUM: bool>(&mut self) {
        let step = (RESIDENT / self.batch.max(1)).clamp(512, self.k.max(512)) / LANES * LANES;
        for k0 in (0..self.k).step_by(step) {
            let k1 = (k0 + step).min(self.k);
            let mut row = 0;
            while V::WIDE && row + 4 <= self.rows {
                self.row_block::<V, SUM, 4>(row, k0, k1);
                row += 4;
            }
            while !V::WIDE && row + 2 <= self.rows {
                self.row_block::<V, SUM, 2>(row, k0, k1);
                row += 2;
            }
            while row < self.rows {
                self.row_block::<V, SUM, 1>(row, k0, k1);
                row += 1;
            }
        }
    }

    #[inline(always)]
    fn row_block<V: Lanes, const SUM: bool, const R: usize>(&mut self, row: usize, k0: usize, k1: usize) {
        // Inputs, one row and sums: two and four of each fit sixteen and thirty-two registers.
        let blocks = self.batch.div_ceil(if V::WIDE { 4 } else { 2 });
        let mut b = 0;
        for block in 0..blocks {
            let size = (self.batch - b).div_ceil(blocks - block);
            match size {
                1 => self.tile::<V, SUM, R, 1>(row, b, k0, k1),
                2 => self.tile::<V, SUM, R, 2>(row, b, k0, k1),
                3 if V::WIDE => self.tile::<V, SUM, R, 3>(row, b, k0, k1),
                4 if V::WIDE => self.tile::<V, SUM, R, 4>(row, b, k0, k1),
                _ => unreachable!("dots: no tile of {size} inputs"),
            }
            b += size;
        }
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // r indexes registers and addresses alike
    fn tile<V: Lanes, const SUM: bool, const R: usize, const B: usize>(
        &mut self,
        row: usize,
        b: usize,
        k0: usize,
        k1: usize,
    ) {
        let (w, x) = (self.w[row * self.k..].as_ptr(), self.x[b * self.k..].as_ptr());
        let (all, [first, second]) = self.other.unwrap_or((self.w, [1.0, 0.0]));
        let (other, factors) = (all[row * self.k..].as_ptr(), [V::splat(first), V::splat(second)]);
        let mut acc = [[V::splat(0.0); R]; B];
        let mut at = k0;
        while at + LANES <= k1 {
            // SAFETY: rows `row..row + R` of `w` and `other` and `b..b + B` of `x` exist (asserted by `run`), `at + 16 <= k`.
            unsafe {
                let mut inputs = [V::splat(0.0); B];
                for (i, input) in inputs.iter_mut().enumerate() {
                    *input = V::load(x.add(i * self.k + at));
                }
                for r in 0..R {
                    if b == 0 {
                        // The first to pass by fetches for all; rows cross pages, where the processor's own prefetch stops.
                        V::prefetch(w.wrapping_add(r * self.k + at + AHEAD));
                        if SUM {
                            V::prefetch(other.wrapping_add(r * self.k + at + AHEAD));
                        }
                    }
                    let mut row = V::load(w.add(r * self.k + at));
                    if SUM {
                        let other = V::load(other.add(r * self.k + at)).mul(factors[1]);
                        row = row.mul_add(factors[0], other);
                    }
                    for i in 0..B {
                        acc[i][r] = inputs[i].mul_add(row, acc[i][r]);
                    }
                }
            }
            at += LANES;
        }
        for (i, acc) in acc.into_iter().enumerate() {
            for (r, acc) in acc.into_iter().enumerate() {
                let weight = |j: usize| match SUM {
                    true => first * self.w[(row + r) * self.k + j] + second * all[(row + r) * self.k + j],
                    false => self.w[(row + r) * self.k + j],
                };
                let tail: f32 = (at..k1).map(|j| self.x[(b + i) * self.k + j] * weight(j)).sum();
                self.y[(b + i) * self.ldy + row + r] += acc.sum() + tail;
            }
        }
    }
}

pub fn dots(work: Dots<'_>) {
    dispatch(Isa::best(), work);
}

/// Rows of the result that one call of [`outer`] makes at most.
pub const OUTER_ROWS: usize = 12;
/// Columns per panel.
pub const PANEL: usize = LANES;
/// Steps of [`outer`] without a look at what comes next.
const UNROLLED: usize = 4;

/// Rows of `x` with lanes across the batch: `packed[panel][k][16]`, filled up with zeros, for columns
/// `start..start + columns` of `x (batch x k)`.
pub fn pack_transposed(x: &[f32], k: usize, start: usize, columns: usize, packed: &mut [f32]) {
    for (rows, panel) in x.chunks(k * PANEL).zip(packed.chunks_exact_mut(columns * PANEL)) {
        let batch = rows.len() / k;
        for (j, to) in panel.chunks_exact_mut(PANEL).enumerate() {
            for (b, to) in to.iter_mut().enumerate() {
                *to = if b < batch { rows[b * k + start + j] } else { 0.0 };
            }
        }
    }
}

/// `out[r][c] += sum over s of d[r * d_row + s] * x[s][c]` for up to twelve rows and the sixteen columns of each panel.
pub struct Outer<'a> {
    pub d: &'a [f32],
    pub d_row: usize,
    pub rows: usize,
    /// As [`pack_transposed`] has left it.
    pub x: &'a [f32],
    pub steps: usize,
    pub panels: usize,
    /// `out[r * panels * 16 + column]`
    pub out: &'a mut [f32],
    /// What will be `d` next, as many rows and steps: fetched while this computes.
    pub ahead: &'a [f32],
}

/// Rows that share what is loaded of `x`: twelve registers of sums, or twelve for each of two panels.
const fn together<V: Lanes>() -> usize {
    if V::WIDE { OUTER_ROWS } else { OUTER_ROWS / 2 }
}

impl Kernel for Outer<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        if self.rows == 0 || self.steps == 0 || self.panels == 0 {
            return;
        }
        assert!(self.rows <= OUTER_ROWS && self.d.len() >= (self.rows - 1) * self.d_row + self.steps);
        assert!(self.x.len() >= self.panels * self.steps * PANEL && self.out.len() >= self.rows * self.panels * PANEL);
        let mut row = 0;
        while row < self.rows {
            row += match self.rows - row {
                left if left >= together::<V>() && V::WIDE => self.rows_from::<V, 12>(row),
                6.. => self.rows_from::<V, 6>(row),
                2.. => self.rows_from::<V, 2>(row),
                _ => self.rows_from::<V, 1>(row),
            };
        }
    }
}

impl Outer<'_> {
    /// `R` rows of all panels; returns how many.
    #[inline(always)]
    fn rows_from<V: Lanes, const R: usize>(&mut self, row: usize) -> usize {
        let mut panel = 0;
        while V::WIDE && panel + 2 <= self.panels {
            self.tile::<V, R, 2>(row, panel);
            panel += 2;
        }
        while panel < self.panels {
            self.tile::<V, R, 1>(row, panel);
            panel += 1;
        }
        R
    }

    #[inline(always)]
    fn tile<V: Lanes, const R: usize, const N: usize>(&mut self, row: usize, panel: usize) {
        let mut acc = [[V::splat(0.0); N]; R];
        let x = self.x[panel * self.steps * PANEL..].as_ptr();
        let d = self.d[row * self.d_row..].as_ptr();
        let ahead = if panel == 0 { self.ahead.get(row * self.d_row..).unwrap_or_default() } else { &[] };
        let mut step = 0;
        while step + UNROLLED <= self.steps {
            if step % PANEL == 0 && step < ahead.len() {
                for r in 0..R {
                    V::prefetch(ahead.as_ptr().wrapping_add(r * self.d_row + step));
                }
            }
            for i in 0..UNROLLED {
                // SAFETY: steps, rows and panels end inside `d` and `x` (asserted by `run`).
                unsafe { self.step(&mut acc, x.add((step + i) * PANEL), d.add(step + i)) };
            }
            step += UNROLLED;
        }
        for step in step..self.steps {
            // SAFETY: steps, rows and panels end inside `d` and `x` (asserted by `run`).
            unsafe { self.step(&mut acc, x.add(step * PANEL), d.add(step)) };
        }
        for (r, acc) in acc.into_iter().enumerate() {
            let out = self.out[((row + r) * self.panels + panel) * PANEL..][..N * PANEL].as_mut_ptr();
            for (n, acc) in acc.into_iter().enumerate() {
                // SAFETY: sixteen floats per panel from `out` on, as sliced.
                unsafe { acc.add(V::load(out.add(n * PANEL))).store(out.add(n * PANEL)) };
            }
        }
    }

    /// # Safety
    /// `x` must have sixteen floats in each of `N` panels, `d` one in each of `R` rows.
    #[inline(always)]
    unsafe fn step<V: Lanes, const R: usize, const N: usize>(
        &self,
        acc: &mut [[V; N]; R],
        x: *const f32,
        d: *const f32,
    ) {
        let mut inputs = [V::splat(0.0); N];
        // SAFETY: the caller's promise.
        unsafe {
            for (n, input) in inputs.iter_mut().enumerate() {
                *input = V::load(x.add(n * self.steps * PANEL));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let d = V::splat(*d.add(r * self.d_row));
                for (acc, input) in acc.iter_mut().zip(inputs) {
                    *acc = d.mul_add(input, *acc);
                }
            }
        }
    }
}

pub fn outer(work: Outer<'_>) {
    dispatch(Isa::best(), work);
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let second: Vec<f32> = w.iter().rev().copied().collect();
            for (other, [f, g]) in [(None, [1.0, 0.0]), (Some((&second[..], [2.0, -1.0])), [2.0, -1.0])] {
                for isa in Isa::available() {
                    y.fill(1.0);
                    dispatch(isa, Dots { w: &w, other, rows, x: &x, batch, k, y: &mut y, ldy });
                    for b in 0..batch {
                        for r in 0..rows {
                            let weight = |j: usize| f * w[r * k + j] + g * second[r * k + j];
                            let exact = 1.0 + (0..k).map(|j| x[b * k + j] * weight(j)).sum::<f32>();
                            assert_eq!(y[b * ldy + r], exact);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn outer_like_three_loops_for_any_rows() {
        let (batch, k, start, columns, d_row) = (37_usize, 90, 3, 71, 80);
        let panels = batch.div_ceil(PANEL);
        let x = numbers(batch * k);
        let mut packed = vec![f32::NAN; panels * columns * PANEL];
        pack_transposed(&x, k, start, columns, &mut packed);
        for rows in 1..=OUTER_ROWS {
            let d = numbers(rows * d_row);
            for isa in Isa::available() {
                let mut out = vec![1.0; rows * panels * PANEL];
                let (x, steps, ahead) = (&packed, columns, &d[..]);
                dispatch(isa, Outer { d: &d, d_row, rows, x, steps, panels, out: &mut out, ahead });
                for r in 0..rows {
                    for b in 0..batch {
                        let exact: f32 = (0..columns).map(|c| d[r * d_row + c] * x_at(&packed, columns, b, c)).sum();
                        assert_eq!(out[r * panels * PANEL + b], exact + 1.0);
                    }
                }
            }
        }
    }

    /// Element (sample, column) of packed panels.
    fn x_at(packed: &[f32], columns: usize, sample: usize, column: usize) -> f32 {
        packed[(sample / PANEL * columns + column) * PANEL + sample % PANEL]
    }

    #[test]
    fn transposed_panels_have_the_batch_in_their_lanes() {
        let (batch, k, start, columns) = (19, 9, 2, 5);
        let x = numbers(batch * k);
        let mut packed = vec![f32::NAN; 2 * columns * PANEL];
        pack_transposed(&x, k, start, columns, &mut packed);
        for (i, value) in packed.iter().enumerate() {
            let (panel, j, lane) = (i / (columns * PANEL), i / PANEL % columns, i % PANEL);
            let b = panel * PANEL + lane;
            assert_eq!(*value, if b < batch { x[b * k + start + j] } else { 0.0 });
        }
    }
}
