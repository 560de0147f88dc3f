//! Eight floats at a time: AVX2 where the processor has it, plain arrays elsewhere (and as the reference in tests).
//!
//! A kernel is written once against [`Vector`] and compiled for each; [`dispatch`] picks at run time. On Zen 3 and 4 AVX2
//! reaches the arithmetic peak that AVX-512 has (512-bit operations take two passes), so there is no third variant.

use crate::engine::cpu::common::isa::{Compiled, dispatch_narrow};

/// Eight lanes. Loads and stores are unaligned.
pub trait Vector: Copy {
    /// # Safety
    /// Eight floats must be readable at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// Eight floats must be writable at `to`.
    unsafe fn store(self, to: *mut f32);
    fn splat(value: f32) -> Self;
    /// `self * b + c`
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// Lanes 0, 2, 4, ... of `a` then `b`, and lanes 1, 3, 5, ...
    fn unzip(a: Self, b: Self) -> (Self, Self);
    /// Of each pair of lanes PyTorch's maximum when `other` comes later in the window: the first wins a tie, a NaN wins
    /// everything; `tag` is `mine` or `others` accordingly.
    fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self);
    fn add(self, other: Self) -> Self;
    /// ReLU: NaN stays NaN.
    fn relu(self) -> Self;
    /// Its derivative: zero in lanes where `y <= 0`.
    fn unless_below(self, y: Self) -> Self;
    /// Stores the lanes that are not zero side by side, with `unit` times the numbers in the same lanes of `positions`
    /// (whole, from 0 to 2^23 - 1); returns how many there are.
    ///
    /// # Safety
    /// Eight numbers must be writable at `values` and at `offsets`: the rest is overwritten with anything.
    unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize;
    /// Lanes 0 to 3.
    ///
    /// # Safety
    /// Four floats must be writable at `to`.
    unsafe fn store_half(self, to: *mut f32);
    fn sum(self) -> f32;
    /// Asks for the cache line at `at` ahead of time; any address will do.
    #[inline(always)]
    fn prefetch(_at: *const f32) {}
}

#[derive(Clone, Copy)]
pub struct Portable([f32; 8]);

impl Vector for Portable {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; arrays of floats have no stricter alignment than floats.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise; arrays of floats have no stricter alignment than floats.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // Without the instruction a fused multiply-add is a library call.
        let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        Self(std::array::from_fn(|i| match fused {
            true => self.0[i].mul_add(b.0[i], c.0[i]),
            false => self.0[i] * b.0[i] + c.0[i],
        }))
    }

    #[inline(always)]
    fn unzip(a: Self, b: Self) -> (Self, Self) {
        let at = |i: usize| if i < 8 { a.0[i] } else { b.0[i - 8] };
        (Self(std::array::from_fn(|i| at(2 * i))), Self(std::array::from_fn(|i| at(2 * i + 1))))
    }

    #[inline(always)]
    fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self) {
        let takes = |i: usize| other.0[i] > self.0[i] || other.0[i].is_nan();
        let pick = |a: Self, b: Self| Self(std::array::from_fn(|i| if takes(i) { b.0[i] } else { a.0[i] }));
        (pick(self, other), pick(mine, others))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    fn relu(self) -> Self {
        Self(self.0.map(|x| if x < 0.0 { 0.0 } else { x }))
    }

    #[inline(always)]
    fn unless_below(self, y: Self) -> Self {
        Self(std::array::from_fn(|i| if y.0[i] <= 0.0 { 0.0 } else { self.0[i] }))
    }

    #[inline(always)]
    unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize {
        let mut count = 0;
        for (value, position) in self.0.into_iter().zip(positions.0) {
            // SAFETY: the caller's promise; at most eight are counted, and one is written before it is counted.
            unsafe {
                values.add(count).write(value);
                offsets.add(count).write(unit * position as u32);
            }
            count += usize::from(value != 0.0);
        }
        count
    }

    #[inline(always)]
    unsafe fn store_half(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        (0..4).for_each(|i| unsafe { to.add(i).write(self.0[i]) });
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::Vector;
    use std::arch::x86_64::*;

    /// For every mask of eight lanes the lanes in it, in order.
    static LANES: [[u8; 8]; 256] = {
        let mut table = [[0; 8]; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut count) = (0, 0);
            while lane < 8 {
                if mask >> lane & 1 == 1 {
                    table[mask][count] = lane;
                    count += 1;
                }
                lane += 1;
            }
            mask += 1;
        }
        table
    };

    /// Only made inside [`super::dispatch`], after the processor was asked.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    impl Vector for Avx2 {
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
            Self(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
            Self(unsafe { _mm256_set1_ps(value) })
        }

        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
            Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
        }

        #[inline(always)]
        fn unzip(a: Self, b: Self) -> (Self, Self) {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA. The shuffles work within 128 bits; the
            // permutations put the quarters in order.
            unsafe {
                let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a.0, b.0));
                let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a.0, b.0));
                let even = _mm256_permute4x64_pd::<0b11_01_10_00>(even);
                let odd = _mm256_permute4x64_pd::<0b11_01_10_00>(odd);
                (Self(_mm256_castpd_ps(even)), Self(_mm256_castpd_ps(odd)))
            }
        }

        #[inline(always)]
        fn later_max(self, other: Self, mine: Self, others: Self) -> (Self, Self) {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
            unsafe {
                let greater = _mm256_cmp_ps::<_CMP_GT_OQ>(other.0, self.0);
                let takes = _mm256_or_ps(greater, _mm256_cmp_ps::<_CMP_UNORD_Q>(other.0, other.0));
                (Self(_mm256_blendv_ps(self.0, other.0, takes)), Self(_mm256_blendv_ps(mine.0, others.0, takes)))
            }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn relu(self) -> Self {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA. Of a NaN and a number the instruction
            // returns its second operand.
            Self(unsafe { _mm256_max_ps(_mm256_setzero_ps(), self.0) })
        }

        #[inline(always)]
        fn unless_below(self, y: Self) -> Self {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
            Self(unsafe { _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NLE_UQ>(y.0, _mm256_setzero_ps())) })
        }

        #[inline(always)]
        unsafe fn compress(self, positions: Self, unit: u32, values: *mut f32, offsets: *mut u32) -> usize {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
            unsafe {
                let mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(self.0, _mm256_setzero_ps())) as usize;
                let lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(LANES[mask & 255].as_ptr().cast()));
                let numbers = _mm256_cvttps_epi32(_mm256_permutevar8x32_ps(positions.0, lanes));
                _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(self.0, lanes));
                _mm256_storeu_si256(offsets.cast(), _mm256_mullo_epi32(numbers, _mm256_set1_epi32(unit as i32)));
                mask.count_ones() as usize
            }
        }

        #[inline(always)]
        unsafe fn store_half(self, to: *mut f32) {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA; the memory is the caller's promise.
            unsafe { _mm_storeu_ps(to, _mm256_castps256_ps128(self.0)) }
        }

        #[inline(always)]
        fn prefetch(at: *const f32) {
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: this type exists only where `dispatch` found AVX2 and FMA.
            unsafe {
                let half = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;

/// A loop that can be compiled for any [`Vector`]; `run` must be `#[inline(always)]`.
pub trait Kernel {
    type Output;

    fn run<V: Vector>(self) -> Self::Output;
}

/// Runs a kernel with the widest vectors this processor has.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    struct Eight<K>(K);
    impl<K: Kernel> Compiled for Eight<K> {
        type Output = K::Output;

        #[inline(always)]
        fn portable(self) -> K::Output {
            self.0.run::<Portable>()
        }

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn avx2(self) -> K::Output {
            self.0.run::<Avx2>()
        }
    }
    dispatch_narrow(Eight(kernel))
}

/// `value` where `keep`, else zero, without a branch: a conditional store would become a masked one, which is slow.
#[inline(always)]
pub fn select(keep: bool, value: f32) -> f32 {
    f32::from_bits(value.to_bits() & if keep { u32::MAX } else { 0 })
}

/// Compiles a plain loop for the widest vectors this processor has: the compiler vectorises it.
#[inline]
pub fn vectorised<T>(work: impl FnOnce() -> T) -> T {
    struct Plain<F>(F);
    impl<T, F: FnOnce() -> T> Kernel for Plain<F> {
        type Output = T;

        #[inline(always)]
        fn run<V: Vector>(self) -> T {
            (self.0)()
        }
    }
    dispatch(Plain(work))
}
