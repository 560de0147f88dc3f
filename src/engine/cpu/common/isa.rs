//! Which instructions this processor has, and code compiled once for each of them.

/// Which instructions a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// What this processor has, widest last.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if Self::has_avx2() {
            all.push(Self::Avx2);
            if Self::has_avx512() {
                all.push(Self::Avx512);
            }
        }
        all
    }

    /// The widest; costs next to nothing, so that a kernel may ask each time.
    #[inline]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if Self::has_avx2() {
            return if Self::has_avx512() { Self::Avx512 } else { Self::Avx2 };
        }
        Self::Portable
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn has_avx512() -> bool {
        is_x86_feature_detected!("avx512f")
    }
}

/// Code that is compiled for each instruction set; every method must be `#[inline(always)]`.
///
/// No closures inside: a closure is compiled without the processor features of the function around it.
pub trait Compiled: Sized {
    type Output;

    fn portable(self) -> Self::Output;

    #[cfg(target_arch = "x86_64")]
    fn avx2(self) -> Self::Output;

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn avx512(self) -> Self::Output {
        self.avx2()
    }
}

/// Runs code with the instructions of `isa`, which must be one of this processor's [`Isa::available`].
#[inline]
pub fn dispatch<K: Compiled>(isa: Isa, code: K) -> K::Output {
    match isa {
        Isa::Portable => code.portable(),
        // SAFETY: who gave `isa` has compared it with `available`, which asks the processor (`Frozen::new`, `best`).
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(code) },
        // SAFETY: as for AVX2, `available` has asked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(code) },
    }
}

/// Runs code with what this processor has up to 256-bit vectors.
#[inline]
pub fn dispatch_narrow<K: Compiled>(code: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if Isa::has_avx2() {
        // SAFETY: the processor was just asked.
        return unsafe { avx2(code) };
    }
    code.portable()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<K: Compiled>(code: K) -> K::Output {
    code.avx2()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn avx512<K: Compiled>(code: K) -> K::Output {
    code.avx512()
}
