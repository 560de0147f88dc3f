//! Products of bfloat16, which have the range of a float and the first eight of its 24 binary digits.

use super::dot::Dot;
use super::lanes::{LANES, Lanes, Portable};

/// The nearest bfloat16, of two the one whose last bit is 0; a NaN stays one. Below 2^-126 zero, as the instruction has it.
#[inline(always)]
pub fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    if x.is_subnormal() {
        return (bits >> 16) as u16 & 0x8000;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[inline(always)]
pub fn float(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// A pair of products joins the sum one after the other, the second one (of the higher 16 bits) first, each rounded once:
/// what `vdpbf16ps` is documented to do. Processors differ there in the last bits, and this code only says what is meant.
#[derive(Clone, Copy)]
pub struct Bf16Portable;

impl Dot for Bf16Portable {
    const INTEGERS: bool = false;
    type Floats = Portable;
    type Sums = [f32; LANES];
    type Pixel = [u16; 2];
    type Weights = [[u16; 2]; LANES];

    #[inline(always)]
    fn zero() -> Self::Sums {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn pixel(from: *const f32) -> [u16; 2] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u16; 2]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn weights(from: *const f32) -> Self::Weights {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    fn dot(mut sums: Self::Sums, pixel: [u16; 2], weights: Self::Weights) -> Self::Sums {
        for (sum, weight) in sums.iter_mut().zip(weights) {
            for i in [1, 0] {
                // Products of numbers of eight digits are exact.
                *sum += float(pixel[i]) * float(weight[i]);
            }
        }
        sums
    }

    #[inline(always)]
    fn floats(sums: Self::Sums) -> Portable {
        Portable::from_array(sums)
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Portable {
        // SAFETY: the caller's promise.
        Portable::from_array(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(float))
    }

    #[inline(always)]
    unsafe fn store_bytes(values: Portable, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(values.to_array().map(rounded)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::dot::{DotKernel, Dots, dispatch};
    use super::*;
    use crate::engine::cpu::common::isa::Isa;

    #[test]
    fn rounded_to_the_nearest() {
        // One step above 1 is 2^-7: halves go to the even neighbour.
        for (x, expected) in [
            (1.0, 1.0),
            (1.0 + 2f32.powi(-8), 1.0),
            (1.0 + 3.0 * 2f32.powi(-8), 1.0 + 2f32.powi(-6)),
            (1.0 + 2f32.powi(-8) + 2f32.powi(-20), 1.0 + 2f32.powi(-7)),
            (-1.0 - 2f32.powi(-8), -1.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (1e-40, 0.0),
        ] {
            assert_eq!(float(rounded(x)), expected, "{x}");
        }
        assert!(float(rounded(f32::from_bits(0x7f80_0001))).is_nan());
    }

    /// Rounds, multiplies pair by pair and sums.
    struct Sums<'a> {
        pixel: &'a [f32],
        weights: &'a [u16],
        narrow: &'a mut [u16],
        sums: &'a mut [f32; LANES],
    }

    impl DotKernel for Sums<'_> {
        #[inline(always)]
        fn run<D: Dot>(self) {
            let mut sums = D::zero();
            // SAFETY: the vectors have whole blocks, the weights two per lane and pair.
            unsafe {
                for at in (0..self.pixel.len()).step_by(LANES) {
                    let values = D::Floats::load(self.pixel[at..].as_ptr());
                    D::store_bytes(values, self.narrow[at..].as_mut_ptr().cast());
                    assert_eq!(D::load_bytes(self.narrow[at..].as_ptr().cast()).to_array()[0], float(self.narrow[at]));
                }
                for pair in 0..self.pixel.len() / 2 {
                    let x = D::pixel(self.narrow[2 * pair..].as_ptr().cast());
                    sums = D::dot(sums, x, D::weights(self.weights[2 * LANES * pair..].as_ptr().cast()));
                }
                D::floats(sums).store(self.sums.as_mut_ptr());
            }
        }
    }

    #[test]
    fn the_instruction_does_what_the_portable_code_says() {
        const LEN: usize = 256;
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut pixel: Vec<f32> = (0..LEN).map(|_| next()).collect();
        pixel[..3].copy_from_slice(&[1.0 + 2f32.powi(-8), 1e-40, -3e38]);
        let mut weights: Vec<u16> = (0..LEN * LANES).map(|_| rounded(next())).collect();
        weights[2 * LANES..4 * LANES].fill(0);
        let mut found: Vec<(Vec<u16>, [f32; LANES])> = Vec::new();
        for dots in Isa::available().into_iter().map(Dots::bf16) {
            let (mut narrow, mut sums) = (vec![0; LEN], [0.0; LANES]);
            dispatch(dots, Sums { pixel: &pixel, weights: &weights, narrow: &mut narrow, sums: &mut sums });
            for (lane, sum) in sums.into_iter().enumerate() {
                let product = |i: usize| {
                    f64::from(float(narrow[i])) * f64::from(float(weights[(i / 2 * LANES + lane) * 2 + i % 2]))
                };
                let (exact, size): (f64, f64) =
                    (0..LEN).map(product).fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                // One rounding of 2^-24 per product, of partial sums no larger than all products together.
                let tolerance = LEN as f64 * 2f64.powi(-24) * size;
                assert!((f64::from(sum) - exact).abs() <= tolerance, "{dots:?}: {sum}, not {exact}");
            }
            found.push((narrow, sums));
        }
        assert!(found.iter().all(|(narrow, _)| *narrow == found[0].0), "rounded otherwise");
    }
}
