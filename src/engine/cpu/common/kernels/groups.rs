//! One row of outputs of one block of channels, in groups of 2, 4 or 8 channels that see each other and no others.

use super::activate::{Activate, activate, activate_sums};
use super::lanes::{LANES, Lanes};

/// Output `x` of a channel is the sum over rows `r`, the `n` inputs `i` of its group and columns `c` of that input at
/// `rows[r][x * stride + c]` times `weights[(r * n + i) * columns + c]`, in units of [`LANES`] floats.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub rows: &'a [*const f32],
    pub columns: usize,
    pub stride: usize,
    /// For each input of a group the lane in which every lane finds it: see [`orders`].
    pub orders: &'a [f32],
    pub weights: *const f32,
    pub bias: *const f32,
    /// Added before the activation, or null.
    pub residual: *const f32,
    pub output: *mut f32,
    pub length: usize,
    pub activation: Activate,
}

/// Which lane holds input `i` of the group that each lane is in, as [`Lanes::spread`] takes it, for every `i`.
pub fn orders(width: usize) -> Vec<f32> {
    let lane = |at: usize| at % LANES / width * width + at / LANES;
    (0..width * LANES).map(|at| f32::from_bits(lane(at) as u32)).collect()
}

/// Outputs side by side in registers.
const WIDE: usize = 7;
const NARROW: usize = 4;

/// # Safety
/// All addresses that the description names must be valid, and the output none of the others.
#[inline(always)]
pub unsafe fn row<V: Lanes>(row: &Row<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match (row.columns, row.stride) {
            (3, 1) if V::FAST => walk::<V, 3, 1>(row),
            (3, 2) if V::FAST => walk::<V, 3, 2>(row),
            _ => walk::<V, 0, 0>(row),
        }
        if !row.activation.in_registers() {
            for x in 0..row.length {
                let at = row.output.add(x * LANES);
                activate(row.activation, V::load(at)).store(at);
            }
        }
    }
}

/// # Safety
/// As for [`row`].
#[inline(always)]
unsafe fn walk<V: Lanes, const COLUMNS: usize, const STRIDE: usize>(row: &Row<'_>) {
    let side = if V::WIDE { WIDE } else { NARROW };
    // SAFETY: the caller's promise.
    unsafe {
        if row.length < side {
            for x in 0..row.length {
                pixels::<V, 1, COLUMNS, STRIDE>(row, x);
            }
            return;
        }
        for x in (0..row.length).step_by(side) {
            // The last outputs are computed twice where the length is no multiple.
            let x = x.min(row.length - side);
            if V::WIDE {
                pixels::<V, WIDE, COLUMNS, STRIDE>(row, x);
            } else {
                pixels::<V, NARROW, COLUMNS, STRIDE>(row, x);
            }
        }
    }
}

/// `R` outputs from `x` on.
///
/// # Safety
/// As for [`row`]; `x + R` is at most its length.
#[inline(always)]
unsafe fn pixels<V: Lanes, const R: usize, const COLUMNS: usize, const STRIDE: usize>(row: &Row<'_>, x: usize) {
    let (columns, stride) = if COLUMNS > 0 { (COLUMNS, STRIDE) } else { (row.columns, row.stride) };
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::load(row.bias)]; R];
        let mut weights = row.weights;
        for input in row.rows {
            let input = input.add(x * stride * LANES);
            for order in row.orders.chunks_exact(LANES) {
                let order = V::load(order.as_ptr());
                // With the sizes known, an input is loaded and spread once for all outputs that see it.
                for c in 0..columns {
                    let w = V::load(weights.add(c * LANES));
                    for (r, [sum]) in sums.iter_mut().enumerate() {
                        *sum = V::load(input.add((r * stride + c) * LANES)).spread(order).mul_add(w, *sum);
                    }
                }
                weights = weights.add(columns * LANES);
            }
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
