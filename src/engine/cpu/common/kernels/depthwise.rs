//! One row of outputs of one block of channels, each channel with a filter of its own.

use super::activate::{Activate, activate, activate_sums};
use super::lanes::{LANES, Lanes};

/// Output `x` is the sum over rows `r` and columns `c` of `rows[r][x * stride + c * dilation]` times
/// `weights[r * columns + c]`, in units of [`LANES`] floats.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub rows: &'a [*const f32],
    pub columns: usize,
    pub dilation: usize,
    pub stride: usize,
    pub weights: *const f32,
    pub bias: *const f32,
    /// Added before the activation, or null.
    pub residual: *const f32,
    pub output: *mut f32,
    pub width: usize,
    pub activation: Activate,
}

/// Outputs side by side in registers: enough to hide the latency of the additions, few enough for their inputs to stay in
/// registers beside them.
const SIDE: usize = 7;

/// # Safety
/// All addresses that the description names must be valid, and the output none of the others.
#[inline(always)]
pub unsafe fn row<V: Lanes>(row: &Row<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match (row.columns, row.stride) {
            (3, 1) if V::FAST && row.dilation == 1 => walk::<V, 3, 1>(row),
            (3, 2) if V::FAST && row.dilation == 1 => walk::<V, 3, 2>(row),
            (5, 1) if V::FAST && row.dilation == 1 => walk::<V, 5, 1>(row),
            (5, 2) if V::FAST && row.dilation == 1 => walk::<V, 5, 2>(row),
            (7, 1) if V::FAST && row.dilation == 1 => walk::<V, 7, 1>(row),
            _ => walk::<V, 0, 0>(row),
        }
        if !row.activation.in_registers() {
            for x in 0..row.width {
                let at = row.output.add(x * LANES);
                activate(row.activation, V::load(at)).store(at);
            }
        }
    }
}

/// With `COLUMNS` and `STRIDE` known, an input is loaded once for all outputs that see it.
///
/// # Safety
/// As for [`row`].
#[inline(always)]
unsafe fn walk<V: Lanes, const COLUMNS: usize, const STRIDE: usize>(row: &Row<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        if row.width < SIDE {
            for x in 0..row.width {
                pixels::<V, 1, COLUMNS, STRIDE>(row, x);
            }
            return;
        }
        for x in (0..row.width).step_by(SIDE) {
            // The last outputs are computed twice where the width is no multiple.
            pixels::<V, SIDE, COLUMNS, STRIDE>(row, x.min(row.width - SIDE));
        }
    }
}

/// `R` outputs from `x` on.
///
/// # Safety
/// As for [`row`]; `x + R` is at most its width.
#[inline(always)]
unsafe fn pixels<V: Lanes, const R: usize, const COLUMNS: usize, const STRIDE: usize>(row: &Row<'_>, x: usize) {
    let (columns, stride, dilation) =
        if COLUMNS > 0 { (COLUMNS, STRIDE, 1) } else { (row.columns, row.stride, row.dilation) };
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::load(row.bias)]; R];
        let mut weights = row.weights;
        for input in row.rows {
            let input = input.add(x * stride * LANES);
            for c in 0..columns {
                let w = V::load(weights.add(c * LANES));
                for (r, [sum]) in sums.iter_mut().enumerate() {
                    *sum = V::load(input.add((r * stride + c * dilation) * LANES)).mul_add(w, *sum);
                }
            }
            weights = weights.add(columns * LANES);
        }
        if !row.residual.is_null() {
            for (r, [sum]) in sums.iter_mut().enumerate() {
                *sum = sum.add(V::load(row.residual.add((x + r) * LANES)));
            }
        }
        activate_sums(row.activation, &mut sums);
        for (r, [sum]) in sums.iter().enumerate() {
            sum.store(row.output.add((x + r) * LANES));
        }
    }
}
