//! `(x / 255 - mean) / std` for eight pixels at a time, without a division.
//!
//! A quotient estimated with the reciprocal and corrected once with its exact remainder (two fused multiply-adds) is
//! the correctly rounded quotient for nearly all divisors. "Nearly": so all 256 values of every channel are compared
//! with the divided ones when the constants are set, and the tables are used if a single bit differs.

use std::arch::x86_64::*;

use crate::image::Layout;

#[derive(Clone, Copy, Debug)]
struct Channel {
    mean: f32,
    std: f32,
    reciprocal: f32,
}

#[derive(Debug)]
pub struct Arithmetic {
    channels: Vec<Channel>,
}

const BY_255: f32 = 1.0 / 255.0;

impl Arithmetic {
    /// `None` where the processor lacks the instructions or the arithmetic would differ from the tables.
    pub fn new(constants: &[(f32, f32)], tables: &[[f32; 256]]) -> Option<Self> {
        let channels: Vec<_> =
            constants.iter().map(|&(mean, std)| Channel { mean, std, reciprocal: 1.0 / std }).collect();
        let exact = channels.iter().zip(tables).all(|(channel, table)| {
            table.iter().enumerate().all(|(v, value)| channel.scalar(v as f32).to_bits() == value.to_bits())
        });
        (exact && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self { channels })
    }

    /// Pixels to planes of `size` values, from value `at` on.
    pub fn part(&self, pixels: &[u8], layout: Layout, tables: &[[f32; 256]], at: usize, size: usize, out: &mut [f32]) {
        let step = layout.bytes_per_pixel();
        let count = pixels.len() / step;
        assert!(self.channels.len() == layout.channels() && out.len() == self.channels.len() * size);
        assert!(at + count <= size && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
        // SAFETY: the instructions are there and the lengths agree (just asserted).
        unsafe {
            match layout {
                Layout::Rgbx => self.colors(&pixels[..4 * count], at, size, out),
                Layout::Gray => self.grays(pixels, &mut out[at..at + count]),
            }
        }
        for i in count / 8 * 8..count {
            for (c, table) in tables.iter().enumerate() {
                out[c * size + at + i] = table[pixels[step * i + c] as usize];
            }
        }
    }

    /// # Safety
    /// AVX2 and FMA, three channels, `out` of `3 * size` values, all pixels before `size - at`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn colors(&self, pixels: &[u8], at: usize, size: usize, out: &mut [f32]) {
        let byte = _mm256_set1_epi32(0xff);
        let [red, green, blue] = self.channels[..] else { return };
        let constants = [red.vectors(), green.vectors(), blue.vectors()];
        for i in (0..pixels.len() / 32 * 8).step_by(8) {
            // SAFETY: pixel i + 7 is one of `pixels`.
            let eight = unsafe { _mm256_loadu_si256(pixels.as_ptr().add(4 * i).cast()) };
            let bytes = [
                _mm256_and_si256(eight, byte),
                _mm256_and_si256(_mm256_srli_epi32::<8>(eight), byte),
                _mm256_and_si256(_mm256_srli_epi32::<16>(eight), byte),
            ];
            for (c, constants) in constants.iter().enumerate() {
                let value = constants.apply(bytes[c]);
                // SAFETY: c < 3 and at + i + 8 <= size.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(c * size + at + i), value) }
            }
        }
    }

    /// # Safety
    /// AVX2 and FMA, one channel, `out` as long as `pixels`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn grays(&self, pixels: &[u8], out: &mut [f32]) {
        let [gray] = self.channels[..] else { return };
        let constants = gray.vectors();
        for i in (0..pixels.len() / 8 * 8).step_by(8) {
            // SAFETY: pixel and value i + 7 exist.
            unsafe {
                let eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64(pixels.as_ptr().add(i).cast()));
                _mm256_storeu_ps(out.as_mut_ptr().add(i), constants.apply(eight));
            }
        }
    }
}

/// The constants of a channel in every lane.
#[derive(Clone, Copy)]
struct Vectors {
    mean: __m256,
    minus_std: __m256,
    reciprocal: __m256,
}

impl Vectors {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn apply(self, bytes: __m256i) -> __m256 {
        let by_255 = _mm256_set1_ps(BY_255);
        let x = _mm256_cvtepi32_ps(bytes);
        let q = _mm256_mul_ps(x, by_255);
        let unit = _mm256_fmadd_ps(_mm256_fmadd_ps(q, _mm256_set1_ps(-255.0), x), by_255, q);
        let centred = _mm256_sub_ps(unit, self.mean);
        let q = _mm256_mul_ps(centred, self.reciprocal);
        _mm256_fmadd_ps(_mm256_fmadd_ps(q, self.minus_std, centred), self.reciprocal, q)
    }
}

impl Channel {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn vectors(self) -> Vectors {
        Vectors {
            mean: _mm256_set1_ps(self.mean),
            minus_std: _mm256_set1_ps(-self.std),
            reciprocal: _mm256_set1_ps(self.reciprocal),
        }
    }

    /// The kernel's arithmetic for one value.
    fn scalar(self, x: f32) -> f32 {
        let q = x * BY_255;
        let unit = q.mul_add(-255.0, x).mul_add(BY_255, q);
        let centred = unit - self.mean;
        let q = centred * self.reciprocal;
        q.mul_add(-self.std, centred).mul_add(self.reciprocal, q)
    }
}
