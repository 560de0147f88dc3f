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
    /// Eight floats from each of two places.
    ///
    /// # Safety
    /// Eight floats must be readable at both.
    unsafe fn load_halves(low: *const f32, high: *const f32) -> Self;
    /// Eight floats to each of two places.
    ///
    /// # Safety
    /// Eight floats must be writable at both.
    unsafe fn store_halves(self, low: *mut f32, high: *mut f32);
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
    /// Lanes 0, 2, 4, ... of `a` then `b`, and lanes 1, 3, 5, ...
    fn unzip(a: Self, b: Self) -> (Self, Self);
    /// Of each pair of lanes PyTorch's maximum when `other` comes later in the window: the first wins a tie, a NaN wins
    /// everything; `tag` is `mine` or `others` accordingly.
    fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self);
    /// Stores the lanes that are not zero side by side, with `unit` times the numbers in the same lanes of `positions`
    /// (whole, from 0 to 2^23 - 1); returns how many there are.
    ///
    /// # Safety
    /// Sixteen numbers must be writable at `values` and at `offsets`: the rest is overwritten with anything.
    unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize;
    /// The sum of all lanes.
    fn sum(self) -> f32;
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
    unsafe fn load_halves(low: *const f32, high: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(std::array::from_fn(|i| unsafe { if i < LANES / 2 { *low.add(i) } else { *high.add(i - LANES / 2) } }))
    }

    #[inline(always)]
    unsafe fn store_halves(self, low: *mut f32, high: *mut f32) {
        for i in 0..LANES / 2 {
            // SAFETY: the caller's promise.
            unsafe {
                low.add(i).write(self.0[i]);
                high.add(i).write(self.0[i + LANES / 2]);
            }
        }
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
    fn unzip(a: Self, b: Self) -> (Self, Self) {
        let at = |i: usize| if i < LANES { a.0[i] } else { b.0[i - LANES] };
        (Self(std::array::from_fn(|i| at(2 * i))), Self(std::array::from_fn(|i| at(2 * i + 1))))
    }

    #[inline(always)]
    fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self) {
        let takes = |i: usize| other.0[i] > self.0[i] || other.0[i].is_nan();
        let pick = |a: Self, b: Self| Self(std::array::from_fn(|i| if takes(i) { b.0[i] } else { a.0[i] }));
        (pick(self, other), pick(mine, others))
    }

    #[inline(always)]
    unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize {
        let mut count = 0;
        for (value, position) in self.0.into_iter().zip(positions.0) {
            // SAFETY: the caller's promise; at most sixteen are counted, and one is written before it is counted.
            unsafe {
                values.add(count).write(value);
                offsets.add(count).write(unit * position as u32);
            }
            count += usize::from(value != 0.0);
        }
        count
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let mut sums = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
        }
        sums[0]
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
            let [a, b]: [V; 2] = std::array::from_fn(|y| V::from_array(std::array::from_fn(|x| number(y, x))));
            let (even, odd) = V::unzip(a, b);
            assert_eq!(even.to_array(), std::array::from_fn(|i| 2.0 * i as f32));
            assert_eq!(odd.to_array(), std::array::from_fn(|i| 2.0 * i as f32 + 1.0));
            assert_eq!((a.sum(), b.sum()), (120.0, 376.0));
            let all: [f32; 3 * LANES] = std::array::from_fn(|i| i as f32);
            // SAFETY: eight floats follow on both.
            let halves = unsafe { V::load_halves(all.as_ptr().add(3), all.as_ptr().add(33)) };
            assert_eq!(halves.to_array(), std::array::from_fn(|i| i as f32 + if i < 8 { 3.0 } else { 25.0 }));
            let mut stored = [-1.0; 2 * LANES];
            // SAFETY: eight floats follow on both.
            unsafe { a.store_halves(stored.as_mut_ptr().add(20), stored.as_mut_ptr().add(1)) };
            let expected = |i: usize| match i {
                1..9 => i as f32 + 7.0,
                20..28 => i as f32 - 20.0,
                _ => -1.0,
            };
            assert_eq!(stored, std::array::from_fn(expected));
            check_later_max::<V>();
            check_compress::<V>();
            let one = V::splat(1.0);
            for (condition, kept) in [(-1.0, 0.0), (0.0, 0.0), (-0.0, 0.0), (1e-30, 1.0), (f32::NAN, 1.0)] {
                assert_eq!(one.unless_negative(V::splat(condition)).to_array(), [kept; LANES], "{condition}");
            }
        }
    }

    /// The later of two wins if it is larger or NaN.
    fn check_later_max<V: Lanes>() {
        let nan = f32::NAN;
        for (first, later, takes) in [
            (1.0, 2.0, true),
            (2.0, 1.0, false),
            (1.0, 1.0, false),
            (nan, 1.0, false),
            (1.0, nan, true),
            (nan, nan, true),
        ] {
            let (max, tag) = V::splat(first).later_max(V::splat(later), V::splat(5.0), V::splat(6.0));
            let expected = if takes { (later, 6.0) } else { (first, 5.0) };
            assert_eq!(
                (max.to_array().map(f32::to_bits), tag.to_array()),
                ([expected.0.to_bits(); 16], [expected.1; 16])
            );
        }
    }

    /// What is not zero, NaN included, wherever it is.
    fn check_compress<V: Lanes>() {
        for mask in (0..1 << LANES).step_by(37).chain([0, 0xffff]) {
            let lanes = std::array::from_fn(|i| match (mask >> i & 1, i) {
                (0, _) => -0.0,
                (_, 3) => f32::NAN,
                (_, i) => i as f32 + 1.0,
            });
            let positions = V::from_array(std::array::from_fn(|i| ((1 << 23) - 1 - i) as f32));
            let (mut values, mut offsets) = ([0.0; LANES], [0; LANES]);
            // SAFETY: sixteen numbers fit both.
            let count =
                unsafe { V::from_array(lanes).compress(positions, 3, values.as_mut_ptr(), offsets.as_mut_ptr()) };
            let kept: Vec<usize> = (0..LANES).filter(|i| mask >> i & 1 == 1).collect();
            assert_eq!(count, kept.len());
            for (t, &i) in kept.iter().enumerate() {
                assert_eq!((values[t].to_bits(), offsets[t]), (lanes[i].to_bits(), 3 * ((1 << 23) - 1 - i as u32)));
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
