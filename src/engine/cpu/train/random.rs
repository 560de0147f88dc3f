//! Random numbers by position: the bits for element `j` of sample `i` in step `s` do not depend on who draws them, so
//! dropout is the same for any number of threads.

/// The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): every input bit reaches every output bit.
#[inline(always)]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key of one layer for one sample of one step.
pub fn key(seed: u64, step: u64, layer: u64, sample: u64) -> u64 {
    let mut z = seed;
    for part in [step, layer, sample] {
        z = mix(z.wrapping_add(GOLDEN) ^ part.wrapping_mul(GOLDEN));
    }
    z
}

/// Fills `mask` with 0 (with probability `p`) or `1 / (1 - p)`.
pub fn dropout_mask(mask: &mut [f32], p: f64, key: u64) {
    let scale = if p < 1.0 { (1.0 / (1.0 - p)) as f32 } else { 0.0 };
    // An element is kept when a 32-bit draw is below this; p = 0 keeps every one.
    let keep = ((1.0 - p) * 4_294_967_296.0) as u64;
    let mut z = key;
    for pair in mask.chunks_mut(2) {
        z = z.wrapping_add(GOLDEN);
        let bits = mix(z);
        for (m, draw) in pair.iter_mut().zip([bits & 0xffff_ffff, bits >> 32]) {
            *m = if draw < keep { scale } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_the_right_rate_and_no_pattern() {
        let n = 1 << 20;
        for p in [0.1, 0.5, 0.8] {
            let mut mask = vec![0.0f32; n];
            dropout_mask(&mut mask, p, key(1, 2, 3, 4));
            let kept = mask.iter().filter(|&&m| m != 0.0).count() as f64;
            // Five standard deviations of a binomial: sqrt(n p (1 - p)).
            let bound = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
            assert!((kept - n as f64 * (1.0 - p)).abs() < bound, "{p}: {kept}");
            let pairs = mask.windows(2).filter(|w| w[0] != 0.0 && w[1] != 0.0).count() as f64;
            assert!((pairs - n as f64 * (1.0 - p).powi(2)).abs() < 2.0 * bound, "{p}: {pairs} neighbours");
            assert!(mask.iter().all(|&m| m == 0.0 || m == (1.0 / (1.0 - p)) as f32));
        }
    }

    #[test]
    fn p_of_one_drops_all_and_zero_none() {
        let mut mask = [9.0; 5];
        dropout_mask(&mut mask, 1.0, 7);
        assert_eq!(mask, [0.0; 5]);
        dropout_mask(&mut mask, 0.0, 7);
        assert_eq!(mask, [1.0; 5]);
    }

    #[test]
    fn steps_layers_and_samples_draw_independently() {
        let keys = [key(0, 0, 0, 0), key(0, 0, 0, 1), key(0, 0, 1, 0), key(0, 1, 0, 0), key(1, 0, 0, 0)];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b));
        }
    }
}
