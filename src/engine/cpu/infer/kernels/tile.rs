//! The one inner loop: a few pixels times a few output channels, all products of one pixel row in registers.

use super::activate::{Activate, activate};
use super::lanes::{LANES, Lanes};

/// Where the products come from and where their sums go.
///
/// Pixel `r` reads `len` floats at `input + r * stride + offset` for each offset; the weights lie in the order in which
/// they are used, `columns * LANES` at a time. Output block `c` of pixel `r` goes to
/// `output + r * output_stride + c * output_block`.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    pub input: *const f32,
    pub stride: usize,
    pub offsets: &'a [usize],
    pub len: usize,
    pub weights: *const f32,
    pub output: *mut f32,
    pub output_stride: usize,
    pub output_block: usize,
    /// Added to the sums, one float per output channel, or null.
    pub bias: *const f32,
    /// Added after the bias, laid out with strides of its own, or null.
    pub residual: *const f32,
    pub residual_stride: usize,
    pub residual_block: usize,
    pub activation: Activate,
}

/// `rows` pixels times `columns` blocks of output channels. Without `ANY` the stride is [`LANES`] and there is nothing but
/// sums.
///
/// # Safety
/// All addresses that the description names must be valid; `rows` and `columns` at most what the `Isa` of `V` allows.
#[inline(always)]
pub unsafe fn tile<V: Lanes, const ANY: bool>(rows: usize, columns: usize, t: &Tile<'_>) {
    macro_rules! fixed {
        ($($r:literal)*) => {
            match (columns, rows) {
                $(
                    // SAFETY: the caller's promise.
                    (1, $r) => unsafe { pick_stride::<V, $r, 1, ANY>(t) },
                    // SAFETY: the caller's promise.
                    (2, $r) if V::WIDE => unsafe { pick_stride::<V, $r, 2, ANY>(t) },
                )*
                _ => unreachable!("no microkernel for {rows} x {columns}"),
            }
        };
    }
    if V::WIDE {
        fixed!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    } else {
        fixed!(1 2 3 4 5 6);
    }
    if ANY && t.activation.bounds().is_none() {
        // SAFETY: the caller's promise.
        unsafe { curve::<V>(rows, columns, t) };
    }
}

/// Known strides become part of the instructions instead of occupying registers.
#[inline(always)]
unsafe fn pick_stride<V: Lanes, const R: usize, const C: usize, const ANY: bool>(t: &Tile<'_>) {
    /// Colour images, stride 1 and 2.
    const COLOUR: usize = 3;
    const COLOUR_2: usize = 6;
    const LANES_2: usize = 2 * LANES;
    // SAFETY: the caller's promise.
    unsafe {
        match t.stride {
            _ if !ANY => run::<V, R, C, LANES>(t),
            LANES => run::<V, R, C, LANES>(t),
            LANES_2 => run::<V, R, C, LANES_2>(t),
            COLOUR => run::<V, R, C, COLOUR>(t),
            COLOUR_2 => run::<V, R, C, COLOUR_2>(t),
            _ => run::<V, R, C, 0>(t),
        }
    }
}

#[inline(always)]
unsafe fn run<V: Lanes, const R: usize, const C: usize, const STRIDE: usize>(t: &Tile<'_>) {
    let stride = if STRIDE > 0 { STRIDE } else { t.stride };
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        let mut first = [V::splat(0.0); C];
        if !t.bias.is_null() {
            for (c, first) in first.iter_mut().enumerate() {
                *first = V::load(t.bias.add(c * LANES));
            }
        }
        let mut sums = [first; R];
        let mut weights = t.weights;
        for &offset in t.offsets {
            let input = t.input.add(offset);
            for k in 0..t.len {
                let mut w = [V::splat(0.0); C];
                for (c, w) in w.iter_mut().enumerate() {
                    *w = V::load(weights.add(c * LANES));
                }
                // Some microkernel steps ahead, so that weights from the second-level cache arrive in time.
                V::prefetch(weights.wrapping_add(16 * C * LANES));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*input.add(r * stride + k));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = x.mul_add(w, *sum);
                    }
                }
                weights = weights.add(C * LANES);
            }
        }
        if !t.residual.is_null() {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(V::load(t.residual.add(r * t.residual_stride + c * t.residual_block)));
                }
            }
        }
        // Nothing here may keep the sums from living in registers: what is more than a bound goes over memory again.
        if let Some([low, high]) = t.activation.bounds()
            && t.activation != Activate::Nothing
        {
            let (low, high) = (V::splat(low), V::splat(high));
            for sums in &mut sums {
                for sum in sums.iter_mut() {
                    *sum = sum.max(low).min(high);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                sum.store(t.output.add(r * t.output_stride + c * t.output_block));
            }
        }
    }
}

/// Applies the activation to outputs that have just been written.
#[inline(always)]
unsafe fn curve<V: Lanes>(rows: usize, columns: usize, t: &Tile<'_>) {
    for c in 0..columns {
        for r in 0..rows {
            let at = t.output.wrapping_add(r * t.output_stride + c * t.output_block);
            // SAFETY: the outputs of this tile.
            unsafe { activate(t.activation, V::load(at)).store(at) };
        }
    }
}
