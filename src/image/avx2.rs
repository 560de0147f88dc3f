//! Plain loops compiled a second time, for AVX2: there rounding is an instruction instead of a call, and vectors are wide.
//! Rust never contracts a multiplication and an addition to one operation, so the results have the same bits.

/// A loop with its arguments. A closure would not do: it is a function of its own, compiled once, for any processor.
pub(super) trait Loop {
    /// Must be `#[inline(always)]`, as what it calls.
    fn run(self);
}

/// Runs the loop as AVX2 code where the processor has that.
pub(super) fn with_avx2(work: impl Loop) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn compiled(work: impl Loop) {
            work.run();
        }
        // SAFETY: the processor has AVX2.
        return unsafe { compiled(work) };
    }
    work.run();
}
