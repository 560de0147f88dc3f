//! Flips and gray; and the random draws, kept apart from what they decide.

#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::affine::Affine;
use super::crop::{self, Window};
use super::{Image, Layout, Op};
use crate::error::Result;

/// Names one sample of one pass. The draws follow from it alone, so they are the same on any thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    pub seed: u64,
    pub sample: u64,
    /// Where the sample stands in the epoch, or any number that tells its visits apart.
    pub position: u64,
}

impl Key {
    pub(super) fn rng(self) -> ChaCha8Rng {
        let mut seed = [0; 32];
        for (bytes, part) in seed.chunks_exact_mut(8).zip([self.seed, self.sample, self.position]) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        ChaCha8Rng::from_seed(seed)
    }
}

/// What chance decided for one operation.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Drawn {
    /// Nothing to decide.
    Sure,
    Yes(bool),
    /// An angle or a factor.
    Number(f64),
    Window(Window),
    Map(Affine),
    Branch(usize),
    Order(Vec<usize>),
}

impl Op {
    /// Draws as torchvision does: `torch.rand(1) < p`, numbers from `[low, high)` in single precision, windows that fit
    /// the image.
    pub(super) fn draw(&self, rng: &mut ChaCha8Rng, image: &Image) -> Drawn {
        let mut number = |(low, high): (f64, f64)| f64::from(between(rng, low as f32, high as f32));
        match *self {
            Self::HorizontalFlip { p } | Self::VerticalFlip { p } | Self::RandomApply { p, .. } => {
                Drawn::Yes(f64::from(uniform(rng)) < p)
            }
            Self::Rotation { low, high, .. } | Self::Adjust { low, high, .. } => Drawn::Number(number((low, high))),
            Self::Affine { degrees, translate, scale, shear, .. } => {
                let mut shift = |share: f64, length: usize| {
                    let most = share * length as f64;
                    number((-most, most)).round_ties_even()
                };
                let translate = (shift(translate.0, image.width), shift(translate.1, image.height));
                let shear = (number(shear[0]), number(shear[1]));
                Drawn::Map(Affine { angle: number(degrees), translate, scale: number(scale), shear })
            }
            Self::RandomCrop { height, width, pad_if_needed, .. } => {
                let (rows, columns) = crop::padded_size(image, height, width, pad_if_needed);
                Drawn::Window(crop::random_window(rng, rows, columns, height, width))
            }
            Self::RandomResizedCrop { scale, ratio, .. } => {
                Drawn::Window(crop::random_resized_window(rng, image.height, image.width, scale, ratio))
            }
            Self::RandomChoice { ref weights, .. } => {
                let mut left = number((0.0, 1.0)) * weights.iter().sum::<f64>();
                let chosen = weights.iter().position(|weight| {
                    left -= weight;
                    left < 0.0
                });
                Drawn::Branch(chosen.unwrap_or(weights.len().saturating_sub(1)))
            }
            Self::RandomOrder { ref parts } => {
                let mut order: Vec<usize> = (0..parts.len()).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, below(rng, i + 1));
                }
                Drawn::Order(order)
            }
            Self::Resize { .. }
            | Self::CenterCrop { .. }
            | Self::Crop(_)
            | Self::Pad { .. }
            | Self::Grayscale { .. }
            | Self::Sharpness { .. }
            | Self::Invert
            | Self::Solarize { .. }
            | Self::Posterize { .. }
            | Self::Equalize
            | Self::AutoContrast => Drawn::Sure,
        }
    }
}

/// One of the 2^24 evenly spaced numbers in `[0, 1)` that `torch.rand` can give.
pub(super) fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / 16_777_216.0
}

/// `torch.empty(1).uniform_(low, high)`.
pub(super) fn between(rng: &mut ChaCha8Rng, low: f32, high: f32) -> f32 {
    uniform(rng) * (high - low) + low
}

/// `torch.randint(0, count)`.
pub(super) fn below(rng: &mut ChaCha8Rng, count: usize) -> usize {
    ((u64::from(rng.next_u32()) * count as u64) >> 32) as usize
}

pub fn flip_horizontal(image: &mut Image) {
    let stride = image.stride();
    if stride == 0 {
        return;
    }
    for line in image.data.chunks_exact_mut(stride) {
        match image.layout {
            Layout::Gray => line.reverse(),
            Layout::Rgbx => line.as_chunks_mut::<4>().0.reverse(),
        }
    }
}

pub fn flip_vertical(image: &mut Image) {
    let stride = image.stride();
    let (upper, lower) = image.data.split_at_mut(image.height / 2 * stride);
    if stride > 0 {
        for (a, b) in upper.chunks_exact_mut(stride).zip(lower.rchunks_exact_mut(stride)) {
            a.swap_with_slice(b);
        }
    }
}

/// Pillow's `convert("L")`, as one channel or repeated over three.
///
/// # Errors
/// When there is no memory for the other channels.
pub fn grayscale(image: &mut Image, channels: usize) -> Result<()> {
    let (width, height) = (image.width, image.height);
    match (image.layout, channels) {
        (Layout::Rgbx, 1) => {
            for i in 0..width * height {
                image.data[i] = luma(&image.data[4 * i..]);
            }
            image.reshape(width, height, Layout::Gray)?;
        }
        (Layout::Rgbx, _) => {
            for pixel in image.data.chunks_exact_mut(4) {
                let luma = luma(pixel);
                pixel.fill(luma);
            }
        }
        (Layout::Gray, 1) => {}
        (Layout::Gray, _) => {
            let gray = std::mem::take(image);
            image.reshape(width, height, Layout::Rgbx)?;
            for (pixel, &value) in image.data.as_chunks_mut::<4>().0.iter_mut().zip(&gray.data) {
                *pixel = [value; 4];
            }
        }
    }
    Ok(())
}

/// ITU-R 601-2 in 16-bit fixed point, as Pillow rounds it.
pub(super) fn luma(pixel: &[u8]) -> u8 {
    ((u32::from(pixel[0]) * 19595 + u32::from(pixel[1]) * 38470 + u32::from(pixel[2]) * 7471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{AffineForm, Filter, Property};

    const COUNT: usize = 20_000;

    /// Kolmogorov's distance to the uniform distribution; above 2.7 / sqrt(n) with probability 9e-7.
    fn assert_uniform(mut values: Vec<f64>, low: f64, high: f64) {
        values.sort_by(f64::total_cmp);
        assert!(values[0] >= low && values[values.len() - 1] < high, "outside [{low}, {high})");
        let n = values.len() as f64;
        let distance = values.iter().enumerate().map(|(i, v)| ((v - low) / (high - low) - i as f64 / n).abs());
        let distance = distance.fold(0.0, f64::max);
        assert!(distance < 2.7 / n.sqrt(), "{distance}");
    }

    fn draws(op: &Op) -> Vec<Drawn> {
        let image = Image { width: 200, height: 100, ..Image::default() };
        let key = |sample| Key { seed: 3, sample, position: 1 };
        (0..COUNT as u64).map(|sample| op.draw(&mut key(sample).rng(), &image)).collect()
    }

    #[test]
    fn factors_and_angles_are_uniform() {
        let op = Op::Adjust { property: Property::Hue, low: -0.25, high: 0.5 };
        let values =
            draws(&op).into_iter().filter_map(|drawn| if let Drawn::Number(v) = drawn { Some(v) } else { None });
        assert_uniform(values.collect(), -0.25, 0.5);
    }

    #[test]
    fn maps_are_uniform_in_each_parameter_and_independent() {
        let op = Op::Affine {
            degrees: (-30.0, 60.0),
            translate: (0.1, 0.25),
            scale: (0.5, 2.0),
            shear: [(-5.0, 5.0), (10.0, 20.0)],
            filter: Filter::Nearest,
            center: None,
            fill: [0; 3],
            form: AffineForm::V1,
        };
        let maps: Vec<Affine> = draws(&op)
            .into_iter()
            .filter_map(|drawn| if let Drawn::Map(map) = drawn { Some(map) } else { None })
            .collect();
        assert_eq!(maps.len(), COUNT);
        assert_uniform(maps.iter().map(|m| m.angle).collect(), -30.0, 60.0);
        assert_uniform(maps.iter().map(|m| m.scale).collect(), 0.5, 2.0);
        assert_uniform(maps.iter().map(|m| m.shear.0).collect(), -5.0, 5.0);
        assert_uniform(maps.iter().map(|m| m.shear.1).collect(), 10.0, 20.0);
        // Whole pixels of [-20, 20): the outermost two have half the chance. 39 whole bins of 500: 5 deviations are 112.
        for x in -19..=19 {
            let seen = maps.iter().filter(|m| m.translate.0 == f64::from(x)).count();
            assert!(seen.abs_diff(COUNT / 40) < 112, "{x}: {seen}");
        }
        assert!(maps.iter().all(|m| m.translate.0.abs() <= 20.0 && m.translate.1.abs() <= 25.0));
        // Correlation of independent uniform numbers: deviation 1 / sqrt(n) = 0.0071.
        let mean = |f: &dyn Fn(&Affine) -> f64| maps.iter().map(f).sum::<f64>() / COUNT as f64;
        let covariance = mean(&|m| (m.angle - 15.0) * (m.scale - 1.25));
        assert!((covariance / (90.0 * 1.5 / 12.0)).abs() < 0.036, "{covariance}");
    }

    #[test]
    fn orders_and_branches_have_their_chances() {
        let orders = draws(&Op::RandomOrder { parts: vec![vec![]; 4] });
        let mut seen = std::collections::HashMap::new();
        for drawn in orders {
            if let Drawn::Order(order) = drawn {
                *seen.entry(order).or_insert(0usize) += 1;
            }
        }
        // 24 permutations: Binomial(20000, 1/24), five deviations are 141.
        assert_eq!(seen.len(), 24);
        assert!(seen.values().all(|n| n.abs_diff(COUNT / 24) < 141), "{seen:?}");

        let branches = draws(&Op::RandomChoice { weights: vec![1.0, 0.0, 3.0], branches: vec![vec![]; 3] });
        let count = |i| branches.iter().filter(|drawn| **drawn == Drawn::Branch(i)).count();
        // Binomial(20000, 1/4): five deviations are 306.
        assert!(count(0).abs_diff(COUNT / 4) < 306 && count(1) == 0 && count(0) + count(2) == COUNT);
    }
}
