//! Weights in 22-bit fixed point.

#![forbid(unsafe_code)]

/// Bits behind the binary point of a weight: 32 minus 8 for the result minus 2 for sums below 0 and above 1.
pub(super) const PRECISION: u32 = 22;

/// One output position: `count` weights from `first` on, stored at `offset`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taps {
    pub first: usize,
    pub count: usize,
    pub offset: usize,
}

/// Rounds a fixed-point sum to a byte.
pub(super) fn clip(sum: i32) -> u8 {
    ((sum + (1 << (PRECISION - 1))) >> PRECISION).clamp(0, 255) as u8
}
