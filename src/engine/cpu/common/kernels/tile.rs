//! The one inner loop: a few pixels times a few output channels, all products of one pixel row in registers.

use super::activate::{Activate, activate, activate_sums};
use super::lanes::{LANES, Lanes};

/// Where the products come from and where their sums go.
///
/// Pixel `r` reads `len` floats at `input + r * stride + offset` for each offset, at the last `short` offsets only
/// `short_len`; the weights lie in the order in which they are used, `columns * LANES` at a time. Output block `c` of
/// pixel `r` goes to `output + r * output_stride + c * output_block`.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    pub input: *const f32,
    pub stride: usize,
    pub offsets: &'a [usize],
    pub len: usize,
    pub short: usize,
    pub short_len: usize,
    pub weights: *const f32,
    /// Weights of a later call, of which each offset asks for so many cache lines.
    pub later: *const f32,
    pub later_lines: usize,
    pub output: *mut f32,
    pub output_stride: usize,
    pub output_block: usize,
    /// What the sums begin with, one float per output channel, or null.
    pub bias: *const f32,
    /// Added to the sums, laid out with strides of its own, or null.
    pub residual: *const f32,
    pub residual_stride: usize,
    pub residual_block: usize,
    pub activation: Activate,
}

/// One call of the kernel of this size.
macro_rules! fixed {
    ($v:ty, $c:literal, $stride:expr, $rows:expr, $t:expr, $($r:literal)*) => {
        match $rows {
            $($r => run::<$v, $r, $c, { $stride }>($t),)*
            rows => unreachable!("no microkernel for {rows} rows"),
        }
    };
}

/// `rows` pixels times `columns` blocks of output channels. Without `ANY` the stride is [`LANES`] and there is nothing but
/// sums.
///
/// # Safety
/// All addresses that the description names must be valid; `rows` and `columns` at most what the `Isa` of `V` allows.
#[inline(always)]
pub unsafe fn tile<V: Lanes, const ANY: bool>(rows: usize, columns: usize, t: &Tile<'_>) {
    let blocks = !ANY || t.stride == LANES;
    // SAFETY: the caller's promise; the parts below cover the rows one after the other.
    unsafe {
        if blocks && V::WIDE && columns == 2 {
            fixed!(V, 2, LANES, rows, t, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        } else if blocks && !V::WIDE {
            fixed!(V, 1, LANES, rows, t, 1 2 3 4 5 6);
        } else {
            // Few sizes for all others: they are short parts of a network, and code is not free.
            let mut done = 0;
            while done < rows {
                let mut part = *t;
                part.input = t.input.add(done * t.stride);
                part.output = t.output.add(done * t.output_stride);
                if !t.residual.is_null() {
                    part.residual = t.residual.add(done * t.residual_stride);
                }
                let size = largest::<V>(rows - done);
                match columns {
                    2 if V::WIDE => strides::<V, 2, ANY>(size, &part),
                    _ => strides::<V, 1, ANY>(size, &part),
                }
                done += size;
            }
        }
        if ANY && !t.activation.in_registers() {
            curve::<V>(rows, columns, t);
        }
    }
}

/// Rows of [`outer`].
pub const fn outer_rows<V: Lanes>() -> usize {
    if V::WIDE { 8 } else { 4 }
}

/// Sums of products of columns: the "pixels" are [`outer_rows`] floats side by side, each offset is one product.
///
/// # Safety
/// As for [`tile`]; the stride is 1 and so is `len`.
#[inline(always)]
pub unsafe fn outer<V: Lanes>(columns: usize, t: &Tile<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match (V::WIDE, columns) {
            (true, 2) => run::<V, 8, 2, 1>(t),
            (true, _) => run::<V, 8, 1, 1>(t),
            (false, _) => run::<V, 4, 1, 1>(t),
        }
    }
}

/// The largest microkernel that [`strides`] has for so many rows.
#[inline(always)]
fn largest<V: Lanes>(rows: usize) -> usize {
    match rows {
        14.. if V::WIDE => 14,
        7.. if V::WIDE => 7,
        6.. if !V::WIDE => 6,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Known strides become part of the instructions instead of occupying registers.
///
/// # Safety
/// As for [`tile`]; `rows` is one that [`largest`] gives.
#[inline(always)]
unsafe fn strides<V: Lanes, const C: usize, const ANY: bool>(rows: usize, t: &Tile<'_>) {
    macro_rules! sizes {
        ($stride:expr) => {
            if V::WIDE {
                match rows {
                    1 => run::<V, 1, C, { $stride }>(t),
                    2 => run::<V, 2, C, { $stride }>(t),
                    4 => run::<V, 4, C, { $stride }>(t),
                    7 => run::<V, 7, C, { $stride }>(t),
                    _ => run::<V, 14, C, { $stride }>(t),
                }
            } else {
                match rows {
                    1 => run::<V, 1, C, { $stride }>(t),
                    2 => run::<V, 2, C, { $stride }>(t),
                    4 => run::<V, 4, C, { $stride }>(t),
                    _ => run::<V, 6, C, { $stride }>(t),
                }
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match t.stride {
            LANES => sizes!(LANES),
            _ if !ANY => unreachable!("stride {}", t.stride),
            // Blocks of channels with stride 2; colour images with stride 1 and 2.
            32 if V::FAST => sizes!(32),
            3 if V::FAST => sizes!(3),
            6 if V::FAST => sizes!(6),
            _ => sizes!(0),
        }
    }
}

/// Steps between asking for weights and using them: 448 cycles with 14 x 2 sums.
const AHEAD: usize = 16;

/// Products that are added up one after the other before they join the sum so far: the rounding error of a long sum grows
/// with the square root of its length.
const CHUNK: usize = 256;

/// All sums of `R` pixels and `C` blocks of output channels; `STRIDE` is the tile's where the compiler may know it, else 0.
///
/// # Safety
/// As for [`tile`], with `R` rows and `C` columns.
#[inline(always)]
unsafe fn run<V: Lanes, const R: usize, const C: usize, const STRIDE: usize>(t: &Tile<'_>) {
    let stride = if STRIDE > 0 { STRIDE } else { t.stride };
    let mut weights = t.weights;
    let mut rest = t.offsets;
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        loop {
            let mut sums = [[V::splat(0.0); C]; R];
            if !t.bias.is_null() && rest.len() == t.offsets.len() {
                let mut bias = [V::splat(0.0); C];
                for (c, bias) in bias.iter_mut().enumerate() {
                    *bias = V::load(t.bias.add(c * LANES));
                }
                sums = [bias; R];
            }
            let (now, later) = rest.split_at(rest.len().min((CHUNK / t.len).max(1)));
            for (i, &offset) in now.iter().enumerate() {
                let input = t.input.add(offset);
                if STRIDE >= LANES {
                    // The next offset is far away, where the processor does not see it coming.
                    let next = rest.get(i + 1).map_or(t.offsets[0] + R * stride, |&next| next);
                    for r in 0..R {
                        V::prefetch(t.input.wrapping_add(next + r * stride));
                    }
                }
                let done = (t.offsets.len() - rest.len() + i) * t.later_lines;
                for line in done..done + t.later_lines {
                    V::prefetch_l2(t.later.wrapping_add(line * LANES));
                }
                for k in 0..if rest.len() - i > t.short { t.len } else { t.short_len } {
                    let mut w = [V::splat(0.0); C];
                    for (c, w) in w.iter_mut().enumerate() {
                        *w = V::load(weights.add(c * LANES));
                        // Some steps ahead, so that weights from the caches further away arrive in time.
                        V::prefetch(weights.wrapping_add((AHEAD * C + c) * LANES));
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let x = V::splat(*input.add(r * stride + k));
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = x.mul_add(w, *sum);
                        }
                    }
                    weights = weights.add(C * LANES);
                }
            }
            if rest.len() < t.offsets.len() {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (c, sum) in sums.iter_mut().enumerate() {
                        *sum = sum.add(V::load(t.output.add(r * t.output_stride + c * t.output_block)));
                    }
                }
            }
            rest = later;
            if rest.is_empty() {
                finish::<V, R, C>(t, &mut sums);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (c, sum) in sums.iter().enumerate() {
                    sum.store(t.output.add(r * t.output_stride + c * t.output_block));
                }
            }
            if rest.is_empty() {
                return;
            }
        }
    }
}

/// Residual and what is simple of the activation.
///
/// # Safety
/// The residual, if there is one, must have `R` pixels of `C` blocks.
#[inline(always)]
unsafe fn finish<V: Lanes, const R: usize, const C: usize>(t: &Tile<'_>, sums: &mut [[V; C]; R]) {
    if !t.residual.is_null() {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *sum = sum.add(unsafe { V::load(t.residual.add(r * t.residual_stride + c * t.residual_block)) });
            }
        }
    }
    activate_sums(t.activation, sums);
}

/// Applies the activation to outputs that have just been written.
///
/// # Safety
/// The output must have `rows` pixels of `columns` blocks.
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
