//! The inner loop on bytes: as [`tile`](super::tile), with sums of integers that become floats at the end.

use super::activate::{Activate, activate};
use super::dot::{Dot, DotKernel};
use super::lanes::{LANES, Lanes};

/// Most pixels and blocks of output channels of a tile.
pub const ROWS: usize = 14;
const COLUMNS: usize = 2;

/// What bytes stand for: `scale * (byte - zero)`. Of bfloat16 it says nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    pub scale: f32,
    pub zero: u8,
}

impl Range {
    /// Whose bytes reach from `low` to `high`, and have 0 among them.
    ///
    /// Not beyond what a float32 holds: with nothing but zeros any scale will do.
    pub fn new(low: f32, high: f32) -> Self {
        let (low, high) = (f64::from(low.min(0.0)), f64::from(high.max(0.0)));
        let scale = ((high - low) / 255.0).max(1e-30);
        Self { scale: scale as f32, zero: (-low / scale).round_ties_even() as u8 }
    }
}

/// What is added to the sums.
#[derive(Clone, Copy)]
pub enum Residual {
    None,
    /// (where, floats to the next pixel, floats to the next block)
    Floats(*const f32, usize, usize),
    /// (where, bytes to the next pixel, range)
    Bytes(*const u8, usize, Range),
}

/// Where the results go.
#[derive(Clone, Copy)]
pub enum Output {
    /// (where, floats to the next pixel, floats to the next block)
    Floats(*mut f32, usize, usize),
    /// (where, bytes to the next pixel, range)
    Bytes(*mut u8, usize, Range),
}

/// Where the products come from and where their sums go.
///
/// Pixel `r` reads `len` times four bytes at `input + r * stride + offset` for each offset, at the last `short` offsets
/// only `short_len` times; all in floats, which hold four bytes each. Blocks of bytes are next to each other.
#[derive(Clone, Copy)]
pub struct ByteTile<'a> {
    pub input: *const f32,
    pub stride: usize,
    pub offsets: &'a [usize],
    pub len: usize,
    pub short: usize,
    pub short_len: usize,
    pub weights: *const f32,
    /// What a sum is multiplied by and what is added then, one of each per output channel.
    pub scale: *const f32,
    pub bias: *const f32,
    pub residual: Residual,
    pub activation: Activate,
    pub output: Output,
}

type Sums = [[f32; LANES]; ROWS * COLUMNS];

/// `rows` pixels times `columns` blocks of output channels.
///
/// # Safety
/// All addresses that the description names must be valid; `rows` at most [`ROWS`], `columns` at most 2.
#[inline(always)]
pub unsafe fn byte_tile<D: Dot>(rows: usize, columns: usize, t: &ByteTile<'_>) {
    let mut sums: Sums = [[0.0; LANES]; ROWS * COLUMNS];
    macro_rules! fixed {
        ($c:literal, $($r:literal)*) => {
            match rows {
                $($r => { run::<D, $r, $c, LANES>(t, t.input, sums.as_mut_ptr()); })*
                _ => unreachable!("no microkernel for {rows} rows"),
            }
        };
    }
    // SAFETY: the caller's promise; the parts cover the rows one after the other.
    unsafe {
        match (t.stride, columns) {
            (LANES, 2) if D::Floats::WIDE => fixed!(2, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            (LANES, 1) if !D::Floats::WIDE && rows <= 6 => fixed!(1, 1 2 3 4 5 6),
            (LANES, _) => parts::<D, LANES>(rows, columns, t, &mut sums),
            (TWICE, _) if D::Floats::FAST => parts::<D, TWICE>(rows, columns, t, &mut sums),
            _ => parts::<D, 0>(rows, columns, t, &mut sums),
        }
        match (t.activation, t.output) {
            (Activate::Nothing, Output::Bytes(to, pixel, range)) if D::INTEGERS => {
                finish_bytes::<D>(rows, columns, t, &sums, (to, pixel, range), 0);
            }
            // What is below zero becomes the byte of zero.
            (Activate::Relu, Output::Bytes(to, pixel, range)) if D::INTEGERS => {
                finish_bytes::<D>(rows, columns, t, &sums, (to, pixel, range), range.zero);
            }
            (Activate::Nothing, _) => finish::<D, 0>(rows, columns, t, &sums),
            (Activate::Relu, _) => finish::<D, 1>(rows, columns, t, &sums),
            _ => finish::<D, 2>(rows, columns, t, &sums),
        }
    }
}

/// Known strides become part of the instructions: blocks of channels with stride 2.
const TWICE: usize = 2 * LANES;

/// The sums of pixels in a few sizes: they are short parts of a network, and code is not free.
///
/// # Safety
/// As for [`byte_tile`].
#[inline(always)]
unsafe fn parts<D: Dot, const STRIDE: usize>(rows: usize, columns: usize, t: &ByteTile<'_>, sums: &mut Sums) {
    let mut done = 0;
    while done < rows {
        // SAFETY: the caller's promise; the parts cover the rows one after the other.
        unsafe {
            let (from, to) = (t.input.add(done * t.stride), sums.as_mut_ptr().add(done * columns));
            done += match (rows - done, columns) {
                (14.., 2) if D::Floats::WIDE => run::<D, 14, 2, STRIDE>(t, from, to),
                (7.., 2) if D::Floats::WIDE => run::<D, 7, 2, STRIDE>(t, from, to),
                (4.., 2) if D::Floats::WIDE => run::<D, 4, 2, STRIDE>(t, from, to),
                (2.., 2) => run::<D, 2, 2, STRIDE>(t, from, to),
                (_, 2) => run::<D, 1, 2, STRIDE>(t, from, to),
                (14.., _) if D::Floats::WIDE => run::<D, 14, 1, STRIDE>(t, from, to),
                (7.., _) if D::Floats::WIDE => run::<D, 7, 1, STRIDE>(t, from, to),
                (6.., _) if !D::Floats::WIDE => run::<D, 6, 1, STRIDE>(t, from, to),
                (4.., _) => run::<D, 4, 1, STRIDE>(t, from, to),
                (2.., _) => run::<D, 2, 1, STRIDE>(t, from, to),
                _ => run::<D, 1, 1, STRIDE>(t, from, to),
            };
        }
    }
}

/// All sums of `R` pixels and `C` blocks of output channels, as `[pixel][block]`; returns `R`.
///
/// # Safety
/// As for [`byte_tile`], with `R` rows from `input` on and `C` columns; `to` has room for all.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn run<D: Dot, const R: usize, const C: usize, const STRIDE: usize>(
    t: &ByteTile<'_>,
    input: *const f32,
    to: *mut [f32; LANES],
) -> usize {
    let stride = if STRIDE > 0 { STRIDE } else { t.stride };
    let mut weights = t.weights;
    let mut sums = [[D::zero(); C]; R];
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        for (i, &offset) in t.offsets.iter().enumerate() {
            let input = input.add(offset);
            let next = t.offsets.get(i + 1).map_or(t.offsets[0] + R * stride, |&next| next);
            for r in 0..R {
                D::Floats::prefetch(input.wrapping_sub(offset).wrapping_add(next + r * stride));
            }
            for k in 0..if t.offsets.len() - i > t.short { t.len } else { t.short_len } {
                let mut w = [D::weights(weights); C];
                for (c, w) in w.iter_mut().enumerate().skip(1) {
                    *w = D::weights(weights.add(c * LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = D::pixel(input.add(r * stride + k));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = D::dot(*sum, x, w);
                    }
                }
                weights = weights.add(C * LANES);
            }
        }
        // Known numbers of steps: were it a slice of any length, the sums would not stay in registers.
        for r in 0..R {
            for c in 0..C {
                D::floats(sums[r][c]).store(to.add(r * C + c).cast());
            }
        }
    }
    R
}

/// The same as [`finish`] without curves, in units of the bytes that it makes: fewer instructions.
///
/// # Safety
/// As for [`byte_tile`].
#[inline(always)]
unsafe fn finish_bytes<D: Dot>(
    rows: usize,
    columns: usize,
    t: &ByteTile<'_>,
    sums: &Sums,
    (to, pixel, range): (*mut u8, usize, Range),
    least: u8,
) {
    let unit = D::Floats::splat(1.0 / range.scale);
    let (least, most) = (D::Floats::splat(f32::from(least)), D::Floats::splat(255.0));
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        for c in 0..columns {
            let scale = D::Floats::load(t.scale.add(c * LANES)).mul(unit);
            let mut bias =
                D::Floats::load(t.bias.add(c * LANES)).mul(unit).add(D::Floats::splat(f32::from(range.zero)));
            let mut share = unit;
            if let Residual::Bytes(_, _, range) = t.residual {
                share = unit.mul(D::Floats::splat(range.scale));
                bias = bias.sub(share.mul(D::Floats::splat(f32::from(range.zero))));
            }
            for r in 0..rows {
                // Not fused: the same numbers with every instruction set.
                let mut x = D::Floats::load(sums[r * columns + c].as_ptr()).mul(scale).add(bias);
                match t.residual {
                    Residual::None => {}
                    Residual::Floats(at, pixel, block) => {
                        x = x.add(D::Floats::load(at.add(r * pixel + c * block)).mul(share));
                    }
                    Residual::Bytes(at, pixel, _) => {
                        x = x.add(D::load_bytes(at.add(r * pixel + c * LANES)).mul(share));
                    }
                }
                D::store_bytes(x.max(least).min(most), to.add(r * pixel + c * LANES));
            }
        }
    }
}

/// Sums times scale plus bias plus residual, through the activation, to where they go. `F`: 0 no activation, 1 ReLU, 2 any.
///
/// # Safety
/// As for [`byte_tile`].
#[inline(always)]
unsafe fn finish<D: Dot, const F: u8>(rows: usize, columns: usize, t: &ByteTile<'_>, sums: &Sums) {
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        for c in 0..columns {
            let (scale, bias) = (D::Floats::load(t.scale.add(c * LANES)), D::Floats::load(t.bias.add(c * LANES)));
            for r in 0..rows {
                // Not fused: the same numbers with every instruction set.
                let mut x = D::Floats::load(sums[r * columns + c].as_ptr());
                x = if D::INTEGERS { x.mul(scale).add(bias) } else { x.add(bias) };
                match t.residual {
                    Residual::None => {}
                    Residual::Floats(at, pixel, block) => x = x.add(D::Floats::load(at.add(r * pixel + c * block))),
                    Residual::Bytes(at, pixel, Range { scale, zero }) => {
                        let byte = D::load_bytes(at.add(r * pixel + c * lanes::<D>()));
                        x = x.add(match D::INTEGERS {
                            true => byte.sub(D::Floats::splat(f32::from(zero))).mul(D::Floats::splat(scale)),
                            false => byte,
                        });
                    }
                }
                x = match F {
                    0 => x,
                    1 => x.max(D::Floats::splat(0.0)),
                    _ => activate(t.activation, x),
                };
                match t.output {
                    Output::Floats(to, pixel, block) => x.store(to.add(r * pixel + c * block)),
                    Output::Bytes(to, pixel, range) => store::<D>(x, range, to.add(r * pixel + c * lanes::<D>())),
                }
            }
        }
    }
}

/// Bytes that sixteen numbers take.
#[inline(always)]
pub const fn lanes<D: Dot>() -> usize {
    if D::INTEGERS { LANES } else { 2 * LANES }
}

/// Floats as bytes of a range; what is beyond it becomes the nearest in it.
///
/// # Safety
/// Sixteen bytes, or bfloat16, must be writable at `to`.
#[inline(always)]
pub unsafe fn store<D: Dot>(x: D::Floats, range: Range, to: *mut u8) {
    if !D::INTEGERS {
        // SAFETY: the caller's promise.
        return unsafe { D::store_bytes(x, to) };
    }
    let (factor, zero) = (D::Floats::splat(1.0 / range.scale), D::Floats::splat(f32::from(range.zero)));
    let byte = x.mul(factor).add(zero).max(D::Floats::splat(0.0)).min(D::Floats::splat(255.0));
    // SAFETY: the caller's promise.
    unsafe { D::store_bytes(byte, to) };
}

/// A line of pixels, blocks of sixteen floats, becomes bytes: up to four blocks next to each other, two of bfloat16.
pub struct Quantize {
    pub input: *const f32,
    /// Floats to the next block.
    pub block: usize,
    pub blocks: usize,
    pub pixels: usize,
    pub output: *mut u8,
    pub range: Range,
}

impl DotKernel for Quantize {
    #[inline(always)]
    fn run<D: Dot>(self) {
        for x in 0..self.pixels {
            for b in 0..self.blocks {
                // SAFETY: who made this promises memory for all pixels and blocks.
                unsafe {
                    let floats = D::Floats::load(self.input.add(b * self.block + x * LANES));
                    store::<D>(floats, self.range, self.output.add(x * 4 * LANES + b * lanes::<D>()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::dot::{Dots, dispatch};
    use super::*;

    const PIXELS: usize = 16;

    struct Check<'a> {
        rows: usize,
        columns: usize,
        stride: usize,
        values: &'a [u8],
        weights: &'a [i8],
        activation: Activate,
        floats: &'a mut [f32],
        bytes: &'a mut [u8],
    }

    const SHORT: usize = 5;
    const RANGE: Range = Range { scale: 0.37, zero: 11 };

    impl DotKernel for Check<'_> {
        fn run<D: Dot>(self) {
            let offsets = [0, 7 * LANES, 3 * LANES];
            let vectors: Vec<f32> = (0..2 * COLUMNS * LANES).map(|i| 0.01 * (i as f32 - 20.0)).collect();
            let mut job = ByteTile {
                input: self.values.as_ptr().cast(),
                stride: self.stride,
                offsets: &offsets,
                len: LANES,
                short: 1,
                short_len: SHORT,
                weights: self.weights.as_ptr().cast(),
                scale: vectors.as_ptr(),
                bias: vectors[COLUMNS * LANES..].as_ptr(),
                residual: Residual::Bytes(self.values.as_ptr(), 48, RANGE),
                activation: self.activation,
                output: Output::Floats(self.floats.as_mut_ptr(), LANES, PIXELS * LANES),
            };
            // SAFETY: the vectors have room for sixteen pixels of two blocks.
            unsafe {
                byte_tile::<D>(self.rows, self.columns, &job);
                job.residual = Residual::None;
                job.output = Output::Bytes(self.bytes.as_mut_ptr(), 64, RANGE);
                byte_tile::<D>(self.rows, self.columns, &job);
            }
        }
    }

    #[test]
    fn the_same_numbers_on_every_instruction_set() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u8
        };
        // Extremes among them: what saturates at 16 bits somewhere shows.
        let values: Vec<u8> = (0..1 << 14).map(|_| next()).map(|x| if x % 3 == 0 { 255 } else { x }).collect();
        let weights: Vec<i8> =
            (0..1 << 14).map(|_| next()).map(|x| if x % 3 == 0 { 127 } else { x as i8 / 2 }).collect();
        for (rows, columns) in [(1, 1), (3, 1), (6, 1), (14, 1), (1, 2), (5, 2), (13, 2), (14, 2)] {
            for (stride, activation) in
                [(LANES, Activate::Nothing), (2 * LANES, Activate::Relu), (40, Activate::Hardswish)]
            {
                let mut found: Vec<(Vec<u32>, Vec<u8>)> = Vec::new();
                for dots in Dots::available() {
                    let (mut floats, mut bytes) = (vec![7.0; 2 * PIXELS * LANES], vec![9; PIXELS * 64]);
                    let (floats_to, bytes_to) = (&mut floats[..], &mut bytes[..]);
                    let (values, weights) = (&values[..], &weights[..]);
                    let check = Check {
                        rows,
                        columns,
                        stride,
                        values,
                        weights,
                        activation,
                        floats: floats_to,
                        bytes: bytes_to,
                    };
                    dispatch(dots, check);
                    // Row 0, channel 3, by the definition.
                    let mut sum = 0i32;
                    for (number, offset) in [0, 7 * LANES, 3 * LANES].into_iter().enumerate() {
                        for k in 0..if number == 2 { 4 * SHORT } else { 4 * LANES } {
                            let row = number * LANES + k / 4;
                            let weight = weights[(row * columns * LANES + 3) * 4 + k % 4];
                            sum += i32::from(values[4 * offset + k]) * i32::from(weight);
                        }
                    }
                    let scaled = sum as f32 * (0.01 * -17.0) + 0.01 * 15.0 + (f32::from(values[3]) - 11.0) * 0.37;
                    if activation == Activate::Nothing {
                        assert!((floats[3] - scaled).abs() < 1e-3 * scaled.abs().max(1.0), "{} {scaled}", floats[3]);
                    }
                    found.push((floats.iter().map(|x| x.to_bits()).collect(), bytes));
                }
                // Only a fused multiply-add within a function rounds otherwise.
                if activation != Activate::Hardswish {
                    assert!(found.iter().all(|one| *one == found[0]), "{rows} x {columns}, {stride}");
                }
            }
        }
    }

    #[test]
    fn zero_is_always_a_byte() {
        assert_eq!(Range::new(0.0, 255.0), Range { scale: 1.0, zero: 0 });
        assert_eq!(Range::new(-1.0, 1.0).zero, 128);
        assert_eq!(Range::new(0.5, 1.0).zero, 0);
        assert_eq!(Range::new(-2.0, -1.0).zero, 255);
        assert!(Range::new(0.0, 0.0).scale > 0.0);
    }
}
