//! Sixteen floats at a time: one AVX-512 register, two AVX2 registers, or an array (other processors, and the reference
//! in tests).
//!
//! A kernel is written once against [`Lanes`] and compiled for each; [`dispatch`] picks at run time.

use crate::engine::cpu::common::isa::{self, Compiled, Isa};

/// Channels that travel together through every layer.
pub const LANES: usize = 16;

impl Isa {
    /// Pixels (or tiles) per microkernel, bounded by the number of registers.
    pub fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 14,
            _ => 6,
        }
    }

    /// Blocks of sixteen output channels per microkernel.
    pub fn columns(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 2,
            _ => 1,
        }
    }
}

/// Sixteen lanes. Loads and stores are unaligned.
pub trait Lanes: Copy {
    /// # Safety
    /// Sixteen floats must be readable at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// Sixteen floats must be writable at `to`.
    unsafe fn store(self, to: *mut f32);
    fn splat(value: f32) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * b + c`
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger of both; a NaN in `self` stays.
    fn max(self, other: Self) -> Self;
    /// The larger of both, NaN where either is: PyTorch's max-pooling.
    fn max_or_nan(self, other: Self) -> Self;
    /// The smaller of both; a NaN in `self` stays.
    fn min(self, other: Self) -> Self;
    /// `self` where `condition` is above 0 or NaN, else 0.
    fn unless_negative(self, condition: Self) -> Self;
    /// Sixteen rows become sixteen columns.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];
    /// Lane `l` becomes lane `order[l]`, an integer in the bits of a float; both are among the first eight, or the last.
    fn spread(self, order: Self) -> Self;
    /// The nearest integer, of two the even one; |self| at most 2^22.
    fn round(self) -> Self;
    /// `self * 2^n` for integers `n` between -126 and 127.
    fn scale(self, n: Self) -> Self;
    /// `1 / self` with a relative error below 2^-22, for numbers between 1 and 2^126; NaN stays.
    fn recip(self) -> Self;
    fn to_array(self) -> [f32; LANES];
    fn from_array(lanes: [f32; LANES]) -> Self;
    /// Whether there are registers for 14 x 2 sums; otherwise 6 x 1.
    const WIDE: bool = false;
    /// Whether multiplication and addition are one instruction.
    const FUSED: bool = true;
    /// Whether more code for common strides is worth its size.
    const FAST: bool = true;
    /// Asks for the cache line at `at` ahead of time; any address will do.
    #[inline(always)]
    fn prefetch(_at: *const f32) {}
    /// The same, into the second-level cache: for much that is needed later.
    #[inline(always)]
    fn prefetch_l2(_at: *const f32) {}
    /// A store past the caches: for much that is not read again soon.
    ///
    /// # Safety
    /// As for [`Lanes::store`]; `to` begins a cache line, and [`Lanes::fence`] follows before others may read.
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.store(to) };
    }
    /// Orders what was streamed before whatever is written after.
    #[inline(always)]
    fn fence() {}
}

#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const FAST: bool = false;
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; arrays of floats have no stricter alignment than floats.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise; arrays of floats have no stricter alignment than floats.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // Without the instruction a fused multiply-add is a library call.
        Self(std::array::from_fn(|i| match Self::FUSED {
            true => self.0[i].mul_add(b.0[i], c.0[i]),
            false => self.0[i] * b.0[i] + c.0[i],
        }))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if b > a { b } else { a })
    }

    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        self.zip(other, |a, b| if b > a || b.is_nan() { b } else { a })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if b < a { b } else { a })
    }

    #[inline(always)]
    fn unless_negative(self, condition: Self) -> Self {
        self.zip(condition, |a, c| if c <= 0.0 { 0.0 } else { a })
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|x| Self(std::array::from_fn(|y| rows[y].0[x])))
    }

    #[inline(always)]
    fn spread(self, order: Self) -> Self {
        Self(order.0.map(|lane| self.0[lane.to_bits() as usize % LANES]))
    }

    #[inline(always)]
    fn round(self) -> Self {
        // Adding and subtracting 1.5 * 2^23 leaves no room for a fraction.
        let magic = 12_582_912.0;
        Self(self.0.map(|x| (x + magic) - magic))
    }

    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        self.mul(Self(n.0.map(|n| f32::from_bits((n as i32 + 127).cast_unsigned() << 23))))
    }

    #[inline(always)]
    fn recip(self) -> Self {
        Self(self.0.map(|x| 1.0 / x))
    }

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        self.0
    }

    #[inline(always)]
    fn from_array(lanes: [f32; LANES]) -> Self {
        Self(lanes)
    }
}

/// A loop that can be compiled for any [`Lanes`]; `run` must be `#[inline(always)]`.
pub trait Kernel {
    fn run<V: Lanes>(self);
}

/// Runs a kernel with the instructions of `isa`.
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    struct Sixteen<K>(K);
    impl<K: Kernel> Compiled for Sixteen<K> {
        type Output = ();

        #[inline(always)]
        fn portable(self) {
            self.0.run::<Portable>();
        }

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn avx2(self) {
            self.0.run::<super::x86::Avx2>();
        }

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn avx512(self) {
            self.0.run::<super::x86::Avx512>();
        }
    }
    isa::dispatch(isa, Sixteen(kernel));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Check;

    impl Kernel for Check {
        fn run<V: Lanes>(self) {
            let all = |x: f32, f: fn(V) -> V| f(V::splat(x)).to_array();
            for (x, nearest) in [(0.5, 0.0), (1.5, 2.0), (-2.5, -2.0), (-126.2, -126.0), (7.49, 7.0)] {
                assert_eq!(all(x, V::round), [nearest; LANES], "round({x})");
            }
            for n in [-126.0f32, -1.0, 0.0, 5.0, 126.0] {
                assert_eq!(V::splat(1.5).scale(V::splat(n)).to_array(), [1.5 * n.exp2(); LANES], "1.5 * 2^{n}");
            }
            for i in 0..1000 {
                let x = 1.0 + 0.001 * i as f32 * (i % 126) as f32 * 2f32.powi(i % 100);
                let error = f64::from(all(x, V::recip)[0]) * f64::from(x) - 1.0;
                assert!(error.abs() < 2f64.powi(-22), "1 / {x}: {error:.1e}");
            }
            assert!(all(f32::NAN, V::recip)[0].is_nan());
            let number = |y: usize, x: usize| (y * LANES + x) as f32;
            let rows = std::array::from_fn(|y| V::from_array(std::array::from_fn(|x| number(y, x))));
            for (x, column) in V::transpose(rows).into_iter().enumerate() {
                assert_eq!(column.to_array(), std::array::from_fn(|y| number(y, x)), "column {x}");
            }
            let order: [usize; LANES] = std::array::from_fn(|l| l / 8 * 8 + (l * 3 + 1) % 8);
            let bits = V::from_array(order.map(|lane| f32::from_bits(lane as u32)));
            assert_eq!(rows[5].spread(bits).to_array(), order.map(|lane| number(5, lane)));
            let one = V::splat(1.0);
            for (condition, kept) in [(-1.0, 0.0), (0.0, 0.0), (-0.0, 0.0), (1e-30, 1.0), (f32::NAN, 1.0)] {
                assert_eq!(one.unless_negative(V::splat(condition)).to_array(), [kept; LANES], "{condition}");
            }
        }
    }

    #[test]
    fn the_same_on_every_instruction_set() {
        for isa in Isa::available() {
            dispatch(isa, Check);
        }
    }
}
