//! `(x / 255 - mean) / std` for eight pixels at a time, without a division.
//!
//! A quotient estimated with the reciprocal and corrected once with its exact remainder (two fused multiply-adds) is
//! the correctly rounded quotient for nearly all divisors. "Nearly": so all 256 values of every channel are compared
//! with the divided ones when the constants are set, and the tables are used if a single bit differs.

use std::arch::x86_64::*;

#[derive(Clone, Copy, Debug)]
struct Channel {
    mean: f32,
    std: f32,
    reciprocal: f32,
}

#[derive(Debug)]
pub(super) struct Arithmetic {
    channels: [Channel; 3],
}

const BY_255: f32 = 1.0 / 255.0;

impl Arithmetic {
    /// `None` where the processor lacks the instructions or the arithmetic would differ from the tables.
    pub fn new(constants: &[(f32, f32)], tables: &[[f32; 256]]) -> Option<Self> {
        let channels: [Channel; 3] = constants
            .iter()
            .map(|&(mean, std)| Channel { mean, std, reciprocal: 1.0 / std })
            .collect::<Vec<_>>()
            .try_into()
            .ok()?;
        let exact = channels.iter().zip(tables).all(|(channel, table)| {
            table.iter().enumerate().all(|(v, value)| channel.scalar(v as f32).to_bits() == value.to_bits())
        });
        (exact && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self { channels })
    }

    /// RGBX pixels to three planes of `size` values, from value `at` on.
    pub fn part(&self, pixels: &[u8], tables: &[[f32; 256]], at: usize, size: usize, out: &mut [f32]) {
        let count = pixels.len() / 4;
        assert!(out.len() == 3 * size && at + count <= size);
        assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
        // SAFETY: the instructions are there and the lengths agree (just asserted).
        unsafe { self.eights(&pixels[..4 * count], at, size, out) }
        for i in count / 8 * 8..count {
            for (c, table) in tables.iter().enumerate() {
                out[c * size + at + i] = table[pixels[4 * i + c] as usize];
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn eights(&self, pixels: &[u8], at: usize, size: usize, out: &mut [f32]) {
        let by_255 = _mm256_set1_ps(BY_255);
        let minus_255 = _mm256_set1_ps(-255.0);
        let byte = _mm256_set1_epi32(0xff);
        let constants = self.channels.map(|channel| {
            (_mm256_set1_ps(channel.mean), _mm256_set1_ps(-channel.std), _mm256_set1_ps(channel.reciprocal))
        });
        for i in (0..pixels.len() / 32 * 8).step_by(8) {
            // SAFETY: pixel i + 7 is one of `pixels`.
            let eight = unsafe { _mm256_loadu_si256(pixels.as_ptr().add(4 * i).cast()) };
            let bytes = [
                _mm256_and_si256(eight, byte),
                _mm256_and_si256(_mm256_srli_epi32::<8>(eight), byte),
                _mm256_and_si256(_mm256_srli_epi32::<16>(eight), byte),
            ];
            for (c, (mean, minus_std, reciprocal)) in constants.into_iter().enumerate() {
                let x = _mm256_cvtepi32_ps(bytes[c]);
                let q = _mm256_mul_ps(x, by_255);
                let unit = _mm256_fmadd_ps(_mm256_fmadd_ps(q, minus_255, x), by_255, q);
                let centred = _mm256_sub_ps(unit, mean);
                let q = _mm256_mul_ps(centred, reciprocal);
                let value = _mm256_fmadd_ps(_mm256_fmadd_ps(q, minus_std, centred), reciprocal, q);
                // SAFETY: c < 3, the caller promises at + i + 8 <= size, and `out` has 3 * size values.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(c * size + at + i), value) }
            }
        }
    }
}

impl Channel {
    /// The kernel's arithmetic for one value.
    fn scalar(self, x: f32) -> f32 {
        let q = x * BY_255;
        let unit = q.mul_add(-255.0, x).mul_add(BY_255, q);
        let centred = unit - self.mean;
        let q = centred * self.reciprocal;
        q.mul_add(-self.std, centred).mul_add(self.reciprocal, q)
    }
}
