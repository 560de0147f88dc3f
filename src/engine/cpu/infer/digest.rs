//! Whether weights are those that a plan was made of: nothing but their bits tells what was written past PyTorch.

/// Multiplications under way at a time: what is waited for then is memory.
const LANES: usize = 8;
/// Odd, half of its bits set: 2^64 over the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Of the bits of tensors, in their order.
///
/// Where one number is another one, so is the digest: each step is one to one in its word and in what came before. Where
/// several are, it is, too, unless they were chosen so that they cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest([u64; LANES]);

impl Digest {
    /// `tensors`: `None` for those that no plan reads.
    pub fn of<'a>(tensors: impl Iterator<Item = Option<&'a [f32]>>) -> Self {
        let mut lanes = [FACTOR; LANES];
        for tensor in tensors {
            lanes[0] = step(lanes[0], tensor.map_or(u64::MAX, |floats| floats.len() as u64));
            let (blocks, rest) = tensor.unwrap_or_default().as_chunks::<{ 2 * LANES }>();
            for block in blocks {
                for (lane, pair) in lanes.iter_mut().zip(block.as_chunks::<2>().0) {
                    *lane = step(*lane, u64::from(pair[1].to_bits()) << 32 | u64::from(pair[0].to_bits()));
                }
            }
            for float in rest {
                lanes[0] = step(lanes[0], u64::from(float.to_bits()));
            }
        }
        Self(lanes)
    }
}

fn step(lane: u64, word: u64) -> u64 {
    (lane ^ word).wrapping_mul(FACTOR).rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(tensors: &[&[f32]]) -> Digest {
        Digest::of(tensors.iter().map(|&tensor| Some(tensor)))
    }

    #[test]
    fn every_bit_of_every_number_counts() {
        let numbers: Vec<f32> = (0..37u8).map(f32::from).collect();
        let before = digest(&[&numbers, &[0.0]]);
        assert_eq!(digest(&[&numbers, &[0.0]]), before);
        for at in 0..numbers.len() {
            for bit in 0..32 {
                let mut changed = numbers.clone();
                changed[at] = f32::from_bits(changed[at].to_bits() ^ 1 << bit);
                assert_ne!(digest(&[&changed, &[0.0]]), before, "bit {bit} of number {at}");
            }
        }
        assert_ne!(digest(&[&numbers, &[-0.0]]), before);
    }

    #[test]
    fn places_and_borders_count() {
        let numbers: Vec<f32> = (0..40u8).map(f32::from).collect();
        let mut swapped = numbers.clone();
        swapped.swap(0, 16);
        assert_ne!(digest(&[&swapped]), digest(&[&numbers]));
        assert_ne!(digest(&[&numbers[..8], &numbers[8..]]), digest(&[&numbers]));
        assert_ne!(digest(&[&numbers, &[]]), digest(&[&numbers]));
        assert_ne!(Digest::of([Some(&numbers[..]), None].into_iter()), digest(&[&numbers, &[]]));
    }
}
