//! Products with a huge matrix and a batch of few rows: bound by how often the huge matrix crosses the memory bus.

use super::simd::{Kernel, Vector, dispatch};

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
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
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
    fn all<V: Vector, const SUM: bool>(&mut self) {
        let step = (RESIDENT / self.batch.max(1)).clamp(512, self.k.max(512)) / 8 * 8;
        for k0 in (0..self.k).step_by(step) {
            let k1 = (k0 + step).min(self.k);
            let mut row = 0;
            while row + 4 <= self.rows {
                self.row_block::<V, SUM, 4>(row, k0, k1);
                row += 4;
            }
            while row < self.rows {
                self.row_block::<V, SUM, 1>(row, k0, k1);
                row += 1;
            }
        }
    }

    #[inline(always)]
    fn row_block<V: Vector, const SUM: bool, const R: usize>(&mut self, row: usize, k0: usize, k1: usize) {
        let mut b = 0;
        while b + 3 <= self.batch {
            self.tile::<V, SUM, R, 3>(row, b, k0, k1);
            b += 3;
        }
        match self.batch - b {
            2 => self.tile::<V, SUM, R, 2>(row, b, k0, k1),
            1 => self.tile::<V, SUM, R, 1>(row, b, k0, k1),
            _ => {}
        }
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // r indexes registers and addresses alike
    fn tile<V: Vector, const SUM: bool, const R: usize, const B: usize>(
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
        while at + 8 <= k1 {
            // SAFETY: rows `row..row + R` of `w` and `other` and `b..b + B` of `x` exist (asserted by `run`), `at + 8 <= k`.
            unsafe {
                // Three inputs, one row and twelve sums fit the sixteen registers.
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
                        let other = V::load(other.add(r * self.k + at)).mul_add(factors[1], V::splat(0.0));
                        row = row.mul_add(factors[0], other);
                    }
                    for i in 0..B {
                        acc[i][r] = inputs[i].mul_add(row, acc[i][r]);
                    }
                }
            }
            at += 8;
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
    dispatch(work);
}

/// Rows of the result that one call of [`outer`] makes.
pub const OUTER_ROWS: usize = 6;
/// Columns per panel.
pub const PANEL: usize = 16;
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

/// `out[r][c] = sum over s of d[s * d_step + r * d_row] * x[s * x_step + c]` for up to six rows and the sixteen columns of
/// each panel: the one product behind forward, input gradient and weight gradient.
pub struct Outer<'a> {
    pub d: &'a [f32],
    pub d_step: usize,
    pub d_row: usize,
    pub rows: usize,
    pub x: &'a [f32],
    pub x_step: usize,
    /// Distance between panels of `x`.
    pub x_panel: usize,
    pub steps: usize,
    pub panels: usize,
    /// `out[r * out_row + panel * 16 ..]`
    pub out: &'a mut [f32],
    pub out_row: usize,
    /// Add to `out` instead of overwriting it.
    pub add: bool,
    /// What will be `d` next, as many rows and steps: fetched while this computes. Only with a `d_step` of 1.
    pub ahead: &'a [f32],
}

impl Kernel for Outer<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        if self.rows == 0 || self.steps == 0 || self.panels == 0 {
            return;
        }
        let (last_row, last_step, last_panel) = (self.rows - 1, self.steps - 1, self.panels - 1);
        assert!(self.d.len() > last_step * self.d_step + last_row * self.d_row);
        assert!(self.x.len() >= last_step * self.x_step + last_panel * self.x_panel + PANEL);
        assert!(self.out.len() >= last_row * self.out_row + self.panels * PANEL);
        // Constant distances are worth a loop of their own: a third of the instructions were address arithmetic.
        let packed = self.x_step == PANEL && self.d_step == 1;
        for panel in 0..self.panels {
            match (self.rows, packed) {
                (1, _) => self.panel::<V, 1, false>(panel),
                (2, _) => self.panel::<V, 2, false>(panel),
                (3, _) => self.panel::<V, 3, false>(panel),
                (4, _) => self.panel::<V, 4, false>(panel),
                (5, _) => self.panel::<V, 5, false>(panel),
                (_, false) => self.panel::<V, OUTER_ROWS, false>(panel),
                (_, true) => self.panel::<V, OUTER_ROWS, true>(panel),
            }
        }
    }
}

impl Outer<'_> {
    #[inline(always)]
    fn panel<V: Vector, const R: usize, const PACKED: bool>(&mut self, panel: usize) {
        let mut acc = [[V::splat(0.0); 2]; R];
        let mut x = self.x[panel * self.x_panel..].as_ptr();
        let mut d = self.d.as_ptr();
        let ahead = if panel == 0 { self.ahead } else { &[] };
        let mut step = 0;
        while step + UNROLLED <= self.steps {
            if step % PANEL == 0 && step < ahead.len() {
                for r in 0..R {
                    V::prefetch(ahead.as_ptr().wrapping_add(r * self.d_row + step));
                }
            }
            let (x_step, d_step) = if PACKED { (PANEL, 1) } else { (self.x_step, self.d_step) };
            for i in 0..UNROLLED {
                // SAFETY: steps, rows and panels end inside `d` and `x` (asserted by `run`).
                unsafe { self.step(&mut acc, x.add(i * x_step), d.add(i * d_step)) };
            }
            x = x.wrapping_add(UNROLLED * x_step);
            d = d.wrapping_add(UNROLLED * d_step);
            step += UNROLLED;
        }
        for _ in step..self.steps {
            // SAFETY: steps, rows and panels end inside `d` and `x` (asserted by `run`).
            unsafe { self.step(&mut acc, x, d) };
            x = x.wrapping_add(self.x_step);
            d = d.wrapping_add(self.d_step);
        }
        for (r, acc) in acc.into_iter().enumerate() {
            let out = self.out[r * self.out_row + panel * PANEL..].as_mut_ptr();
            // SAFETY: row `r` and this panel end inside `out` (asserted by `run`).
            unsafe {
                let (mut low, mut high) = (acc[0], acc[1]);
                if self.add {
                    (low, high) = (low.add(V::load(out)), high.add(V::load(out.add(8))));
                }
                low.store(out);
                high.store(out.add(8));
            }
        }
    }

    /// # Safety
    /// `x` must have sixteen floats, `d` one in each of `R` rows.
    #[inline(always)]
    unsafe fn step<V: Vector, const R: usize>(&self, acc: &mut [[V; 2]; R], x: *const f32, d: *const f32) {
        // The next panel of a matrix that is not packed lies in the next cache line.
        V::prefetch(x.wrapping_add(PANEL));
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high) = (V::load(x), V::load(x.add(8)));
            for (r, acc) in acc.iter_mut().enumerate() {
                let d = V::splat(*d.add(r * self.d_row));
                acc[0] = d.mul_add(low, acc[0]);
                acc[1] = d.mul_add(high, acc[1]);
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
    use crate::engine::cpu::train::kernels::simd::Portable;

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
                y.fill(1.0);
                dots(Dots { w: &w, other, rows, x: &x, batch, k, y: &mut y, ldy });
                let mut z = vec![1.0; batch * ldy];
                Dots { w: &w, other, rows, x: &x, batch, k, y: &mut z, ldy }.run::<Portable>();
                for b in 0..batch {
                    for r in 0..rows {
                        let weight = |j: usize| f * w[r * k + j] + g * second[r * k + j];
                        let exact = 1.0 + (0..k).map(|j| x[b * k + j] * weight(j)).sum::<f32>();
                        assert_eq!((y[b * ldy + r], z[b * ldy + r]), (exact, exact));
                    }
                }
            }
        }
    }

    #[test]
    fn outer_like_three_loops_for_any_rows() {
        let (batch, k, start, columns, panels) = (5, 70, 3, 37, 3);
        for rows in 1..=OUTER_ROWS {
            let (x, d) = (numbers(batch * k), numbers(batch * rows));
            let mut packed = vec![f32::NAN; batch * panels * PANEL];
            for (p, panel) in packed.chunks_exact_mut(batch * PANEL).enumerate() {
                for (b, to) in panel.chunks_exact_mut(PANEL).enumerate() {
                    let from = |c: usize| if p * PANEL + c < columns { x[b * k + start + p * PANEL + c] } else { 0.0 };
                    to.iter_mut().enumerate().for_each(|(c, to)| *to = from(c));
                }
            }
            for (portable, add) in [(false, false), (true, true)] {
                let mut out = vec![1.0; rows * panels * PANEL];
                let work = Outer {
                    d: &d,
                    d_step: rows,
                    d_row: 1,
                    rows,
                    x: &packed,
                    x_step: PANEL,
                    x_panel: batch * PANEL,
                    steps: batch,
                    panels,
                    out: &mut out,
                    out_row: panels * PANEL,
                    add,
                    ahead: &[],
                };
                match portable {
                    true => work.run::<Portable>(),
                    false => outer(work),
                }
                for r in 0..rows {
                    for c in 0..columns {
                        let exact: f32 = (0..batch).map(|b| d[b * rows + r] * x[b * k + start + c]).sum();
                        assert_eq!(out[r * panels * PANEL + c], exact + f32::from(u8::from(add)));
                    }
                }
            }
        }
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
