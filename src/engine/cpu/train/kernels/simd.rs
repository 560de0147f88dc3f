//! Plain loops compiled for the vectors that this processor has.

use crate::engine::cpu::common::isa::{Compiled, dispatch_narrow};

/// `value` where `keep`, else zero, without a branch: a conditional store would become a masked one, which is slow.
#[inline(always)]
pub fn select(keep: bool, value: f32) -> f32 {
    f32::from_bits(value.to_bits() & if keep { u32::MAX } else { 0 })
}

/// Compiles a plain loop for up to eight floats at a time: the compiler vectorises it.
#[inline]
pub fn vectorised<T>(work: impl FnOnce() -> T) -> T {
    struct Plain<F>(F);
    impl<T, F: FnOnce() -> T> Compiled for Plain<F> {
        type Output = T;

        #[inline(always)]
        fn portable(self) -> T {
            (self.0)()
        }

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn avx2(self) -> T {
            (self.0)()
        }
    }
    dispatch_narrow(Plain(work))
}
