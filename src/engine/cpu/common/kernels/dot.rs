//! Products of bytes, summed as 32-bit integers: the same integers with every instruction set.
//!
//! Values are 0 to 255, weights -127 to 127, four of each next to each other in the memory of a float.

use super::bf16::Bf16Portable;
use super::lanes::{LANES, Lanes, Portable};
use crate::engine::cpu::common::isa::Isa;

/// Most products of one sum: 2^31 / (255 * 127).
pub const MOST_PRODUCTS: usize = 66_000;

/// Which instructions sum the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dots {
    Portable,
    /// Products of 16-bit numbers: about as fast as float32.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// Products of 16-bit numbers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// Of bfloat16 instead of bytes, as all that follow.
    PortableBf16,
    #[cfg(target_arch = "x86_64")]
    Bf16,
}

impl Dots {
    /// What this processor has.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        for (isa, slow, fast) in [(Isa::Avx2, Self::Avx2, Self::AvxVnni), (Isa::Avx512, Self::Avx512, Self::Vnni)] {
            if Isa::available().contains(&isa) && Self::of(isa) != Self::Portable {
                all.push(slow);
                all.extend((Self::of(isa) == fast).then_some(fast));
            }
        }
        all
    }

    /// The fastest that has the vectors of `isa`, which this processor must have.
    pub fn of(isa: Isa) -> Self {
        match isa {
            Isa::Portable => Self::Portable,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if is_x86_feature_detected!("avxvnni") => Self::AvxVnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => match (is_x86_feature_detected!("avx512bw"), is_x86_feature_detected!("avx512vnni")) {
                (true, true) => Self::Vnni,
                (true, false) => Self::Avx512,
                _ => Self::Portable,
            },
        }
    }

    /// The same for bfloat16.
    pub fn bf16(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw") => Self::Bf16,
            _ => Self::PortableBf16,
        }
    }

    /// The instructions of the floats that go with it.
    pub fn isa(self, isa: Isa) -> Isa {
        if matches!(self, Self::Portable | Self::PortableBf16) { Isa::Portable } else { isa }
    }

    /// Whether there is an instruction for it: otherwise float32 is about as fast.
    pub fn is_fast(self) -> bool {
        match self {
            Self::Portable | Self::PortableBf16 => false,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 => false,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni | Self::Vnni | Self::Bf16 => true,
        }
    }
}

/// Sixteen sums, and floats of the same width. "Bytes" are what is multiplied: bfloat16 where the numbers are no integers.
pub trait Dot: Copy {
    /// Whether bytes are multiplied, four in the room of a float; otherwise two bfloat16.
    const INTEGERS: bool = true;
    type Floats: Lanes;
    type Sums: Copy;
    type Pixel: Copy;
    type Weights: Copy;

    fn zero() -> Self::Sums;
    /// Four bytes for all lanes, or two bfloat16.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn pixel(from: *const f32) -> Self::Pixel;
    /// Four weights for each lane, or two.
    ///
    /// # Safety
    /// 64 bytes must be readable.
    unsafe fn weights(from: *const f32) -> Self::Weights;
    /// Adds four products in each lane, or two.
    fn dot(sums: Self::Sums, pixel: Self::Pixel, weights: Self::Weights) -> Self::Sums;
    fn floats(sums: Self::Sums) -> Self::Floats;
    /// Sixteen bytes, or bfloat16, as floats.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_bytes(from: *const u8) -> Self::Floats;
    /// The nearest whole numbers (of two the even one) of floats between 0 and 255; of NaN any. Or the nearest bfloat16 (of
    /// two the one whose last bit is 0).
    ///
    /// # Safety
    /// Sixteen bytes, or bfloat16, must be writable.
    unsafe fn store_bytes(values: Self::Floats, to: *mut u8);
}

#[derive(Clone, Copy)]
pub struct DotPortable;

impl Dot for DotPortable {
    type Floats = Portable;
    type Sums = [i32; LANES];
    type Pixel = [u8; 4];
    type Weights = [[i8; 4]; LANES];

    #[inline(always)]
    fn zero() -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn pixel(from: *const f32) -> Self::Pixel {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u8; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn weights(from: *const f32) -> Self::Weights {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[[i8; 4]; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    fn dot(sums: Self::Sums, pixel: Self::Pixel, weights: Self::Weights) -> Self::Sums {
        std::array::from_fn(|lane| {
            (0..4).fold(sums[lane], |sum, i| sum + i32::from(pixel[i]) * i32::from(weights[lane][i]))
        })
    }

    #[inline(always)]
    fn floats(sums: Self::Sums) -> Portable {
        Portable::from_array(sums.map(|sum| sum as f32))
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Portable {
        // SAFETY: the caller's promise.
        Portable::from_array(unsafe { from.cast::<[u8; LANES]>().read_unaligned() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn store_bytes(values: Portable, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(values.to_array().map(|x| x.round_ties_even() as u8)) }
    }
}

/// A loop that can be compiled for any [`Dot`]; `run` must be `#[inline(always)]`.
pub trait DotKernel {
    fn run<D: Dot>(self);
}

/// Runs a kernel with these instructions, which must be of [`Dots::of`] or among those available.
#[inline]
pub fn dispatch<K: DotKernel>(dots: Dots, kernel: K) {
    match dots {
        Dots::Portable => kernel.run::<DotPortable>(),
        // SAFETY: `of` and `available` have asked the processor.
        #[cfg(target_arch = "x86_64")]
        Dots::Avx2 => unsafe { avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Dots::AvxVnni => unsafe { avx_vnni(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Dots::Avx512 => unsafe { avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Dots::Vnni => unsafe { vnni(kernel) },
        Dots::PortableBf16 => kernel.run::<Bf16Portable>(),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Dots::Bf16 => unsafe { bf16(kernel) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<K: DotKernel>(kernel: K) {
    kernel.run::<super::x86::DotAvx2>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma")]
fn avx_vnni<K: DotKernel>(kernel: K) {
    kernel.run::<super::x86::DotAvxVnni>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
fn avx512<K: DotKernel>(kernel: K) {
    kernel.run::<super::x86::DotAvx512>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx2,fma")]
fn vnni<K: DotKernel>(kernel: K) {
    kernel.run::<super::x86::DotVnni>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx2,fma")]
fn bf16<K: DotKernel>(kernel: K) {
    kernel.run::<super::x86::DotBf16>();
}
