//! Bytes to the values of a table: the finish of gray rows, where nothing else is left to do.

/// Each byte as its value of a table of 256.
pub struct Spread {
    table: Box<[f32; 256]>,
    #[cfg(target_arch = "x86_64")]
    quotients: Option<x86::Quotients>,
}

impl Spread {
    /// `mean` and `std` say where the table comes from, if it is `(v / 255 - mean) / std`.
    pub fn new(table: [f32; 256], mean_std: Option<(f32, f32)>) -> Self {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = mean_std;
        Self {
            #[cfg(target_arch = "x86_64")]
            quotients: mean_std.and_then(|(mean, std)| x86::Quotients::new(mean, std, &table)),
            table: Box::new(table),
        }
    }

    /// Whether the vector kernel runs (it reproduces the table exactly, or it is not used).
    pub fn is_vectorized(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.quotients.is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// `out` is as long as `bytes`.
    pub fn run(&self, bytes: &[u8], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(quotients) = &self.quotients {
            let (blocks, rest) = bytes.as_chunks::<8>();
            let (outs, last) = out.as_chunks_mut::<8>();
            quotients.run(blocks, outs);
            return self.look_up(rest, last);
        }
        self.look_up(bytes, out);
    }

    fn look_up(&self, bytes: &[u8], out: &mut [f32]) {
        for (out, &byte) in out.iter_mut().zip(bytes) {
            *out = self.table[usize::from(byte)];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// `(v / 255 - mean) / std` with a multiplication and a correction for each division.
    pub(super) struct Quotients {
        mean: f32,
        std: f32,
    }

    impl Quotients {
        /// `None` where the processor lacks AVX2 and FMA, or one of the 256 values would differ in a bit.
        pub(super) fn new(mean: f32, std: f32, table: &[f32; 256]) -> Option<Self> {
            if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
                return None;
            }
            let this = Self { mean, std };
            let every: Vec<[u8; 8]> = (0..32).map(|i| std::array::from_fn(|j| (8 * i + j) as u8)).collect();
            let mut values = [[0.0; 8]; 32];
            this.run(&every, &mut values);
            let same = values.as_flattened().iter().zip(table).all(|(a, b)| a.to_bits() == b.to_bits());
            same.then_some(this)
        }

        pub(super) fn run(&self, blocks: &[[u8; 8]], outs: &mut [[f32; 8]]) {
            // SAFETY: `new` made sure that AVX2 and FMA are there.
            unsafe { self.run_avx2(blocks, outs) }
        }

        #[target_feature(enable = "avx2,fma")]
        fn run_avx2(&self, blocks: &[[u8; 8]], outs: &mut [[f32; 8]]) {
            let full = (_mm256_set1_ps(255.0), _mm256_set1_ps(1.0 / 255.0));
            let std = (_mm256_set1_ps(self.std), _mm256_set1_ps(1.0 / self.std));
            let mean = _mm256_set1_ps(self.mean);
            // The remainder of the first guess decides its last bit.
            let divide = |x, (divisor, inverse)| {
                let guess = _mm256_mul_ps(x, inverse);
                let rest = _mm256_fnmadd_ps(guess, divisor, x);
                _mm256_fmadd_ps(rest, inverse, guess)
            };
            for (block, out) in blocks.iter().zip(outs) {
                let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*block));
                let v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
                let value = divide(_mm256_sub_ps(divide(v, full), mean), std);
                // SAFETY: `out` is eight floats, and the store needs no alignment.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(mean: f32, std: f32) -> [f32; 256] {
        std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std)
    }

    #[test]
    fn the_kernel_gives_the_bits_of_the_table() {
        let bytes: Vec<u8> = (0..1003_u32).map(|i| (i * 89 % 256) as u8).collect();
        for (mean, std) in [(0.1307, 0.3081), (0.0, 1.0), (0.5, 0.5), (0.485, 0.229), (0.1, 3.7e-3)] {
            let table = table(mean, std);
            for mean_std in [Some((mean, std)), None] {
                let spread = Spread::new(table, mean_std);
                let mut out = vec![0.0; bytes.len()];
                spread.run(&bytes, &mut out);
                assert!(out.iter().zip(&bytes).all(|(o, &b)| o.to_bits() == table[usize::from(b)].to_bits()));
            }
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            assert!(
                Spread::new(table(0.1307, 0.3081), Some((0.1307, 0.3081))).is_vectorized(),
                "MNIST's own constants"
            );
        }
    }

    #[test]
    fn another_table_is_looked_up() {
        let table = std::array::from_fn(|v| (v as f32).sqrt());
        let spread = Spread::new(table, Some((0.1307, 0.3081)));
        assert!(!spread.is_vectorized());
        let mut out = [0.0; 9];
        spread.run(&[0, 1, 4, 9, 16, 25, 36, 49, 64], &mut out);
        assert_eq!(out, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    }
}
