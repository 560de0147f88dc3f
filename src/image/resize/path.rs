//! The implementations.

#![forbid(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, vbmi};

/// Which implementation computes the passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResizePath {
    /// The reference, and what runs where no kernel fits the processor.
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// With VNNI and VBMI.
    #[cfg(target_arch = "x86_64")]
    Vbmi,
}

impl ResizePath {
    /// The fastest that this processor has.
    pub fn best() -> Self {
        Self::all().last().copied().unwrap_or(Self::Scalar)
    }

    /// Those that this processor has, slowest first.
    pub fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(avx2::available().then_some(Self::Avx2));
            all.extend(avx512::available().then_some(Self::Avx512));
            all.extend(vbmi::available().then_some(Self::Vbmi));
        }
        all
    }
}
