//! `RandomErasing`: the one operation of torchvision that works on the finished tensor.

#![forbid(unsafe_code)]

use std::f64::consts::TAU;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::crop::Window;
use super::draw::{below, between, uniform};
use crate::error::{Error, Result};

/// A rectangle of drawn area and aspect ratio is overwritten.
#[derive(Clone, Debug, PartialEq)]
pub struct Erasing {
    pub p: f64,
    pub scale: (f64, f64),
    pub ratio: (f64, f64),
    /// One value, or one per channel; none means normally distributed noise.
    pub value: Vec<f32>,
}

impl Erasing {
    /// Ten tries to find a rectangle that is smaller than the image on both axes.
    pub(super) fn draw(&self, rng: &mut ChaCha8Rng, height: usize, width: usize) -> Option<Window> {
        if f64::from(uniform(rng)) >= self.p {
            return None;
        }
        let area = (height * width) as f64;
        let (low, high) = ((self.ratio.0 as f32).ln(), (self.ratio.1 as f32).ln());
        for _ in 0..10 {
            let target = area * f64::from(between(rng, self.scale.0 as f32, self.scale.1 as f32));
            // Height over width, the other way round than in RandomResizedCrop.
            let aspect = f64::from(between(rng, low, high).exp());
            let rows = (target * aspect).sqrt().round_ties_even() as usize;
            let columns = (target / aspect).sqrt().round_ties_even() as usize;
            if rows < height && columns < width {
                let top = below(rng, height - rows + 1);
                return Some(Window { top, left: below(rng, width - columns + 1), height: rows, width: columns });
            }
        }
        None
    }

    /// Overwrites the window in `planes`, which are `channels x height x width`.
    ///
    /// # Errors
    /// When the number of values fits neither one nor the channels.
    pub(super) fn fill<T: Copy>(
        &self,
        window: Window,
        rng: &mut ChaCha8Rng,
        [channels, height, width]: [usize; 3],
        planes: &mut [T],
        from: impl Fn(f32) -> T,
    ) -> Result<()> {
        if self.value.len() > 1 && self.value.len() != channels {
            return Err(Error::Argument(format!(
                "RandomErasing has {} values, but the image has {channels} channel(s): give 1 or {channels} values",
                self.value.len()
            )));
        }
        for (channel, plane) in planes.chunks_exact_mut((height * width).max(1)).enumerate() {
            let value = self.value.get(channel).or(self.value.first());
            for line in plane.chunks_exact_mut(width).skip(window.top).take(window.height) {
                for out in &mut line[window.left..window.left + window.width] {
                    *out = from(value.copied().unwrap_or_else(|| normal(rng)));
                }
            }
        }
        Ok(())
    }
}

/// Box and Muller's way to the standard normal distribution.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    // In (0, 1], so that the logarithm is finite.
    let mut unit = || (f64::from(rng.next_u32()) + 1.0) / 4_294_967_296.0;
    ((-2.0 * unit().ln()).sqrt() * (TAU * unit()).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Key;

    fn erasing(p: f64, value: Vec<f32>) -> Erasing {
        Erasing { p, scale: (0.02, 0.33), ratio: (0.3, 3.3), value }
    }

    #[test]
    fn rectangles_are_drawn_as_often_and_as_large_as_torchvisions() {
        let mut rng = Key::default().rng();
        let rule = erasing(0.25, vec![0.0]);
        let count = 40_000;
        let windows: Vec<_> = (0..count).filter_map(|_| rule.draw(&mut rng, 200, 240)).collect();
        // Binomial(40000, 0.25): five deviations are 433. A try fails only if sqrt(0.33 * 3.3) > 1 is near: ten never do.
        assert!(windows.len().abs_diff(10_000) < 433, "{}", windows.len());
        assert!(windows.iter().all(|w| w.top + w.height <= 200 && w.left + w.width <= 240));
        let mean = |f: fn(&Window) -> f64| windows.iter().map(f).sum::<f64>() / windows.len() as f64;
        // Areas uniform on [0.02, 0.33): mean 0.175, deviation 0.0895 / 100; the few refused tall ones move it by less.
        let area = mean(|w| (w.height * w.width) as f64 / 48_000.0);
        assert!((area - 0.175).abs() < 0.006, "{area}");
        // Log-uniform, symmetric but for rounding and refusals: deviation 0.69 / 100.
        let aspect = mean(|w| (w.height as f64 / w.width as f64).ln());
        assert!(aspect.abs() < 0.05, "{aspect}");
    }

    #[test]
    fn noise_is_standard_normal() {
        let mut rng = Key::default().rng();
        let count = 200_000;
        let values: Vec<f64> = (0..count).map(|_| f64::from(normal(&mut rng))).collect();
        let moment = |k: i32| values.iter().map(|v| v.powi(k)).sum::<f64>() / f64::from(count);
        // Deviations of the first, second and fourth moment: 1, sqrt(2) and sqrt(96) over sqrt(200000), times five.
        assert!(moment(1).abs() < 0.0112, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.0159, "{}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.11, "{}", moment(4));
    }

    #[test]
    fn only_the_window_is_overwritten() {
        let mut rng = Key::default().rng();
        let window = Window { top: 1, left: 2, height: 2, width: 1 };
        let mut planes = vec![9.0f32; 2 * 3 * 4];
        erasing(1.0, vec![1.0, 2.0]).fill(window, &mut rng, [2, 3, 4], &mut planes, |v| v).unwrap();
        let at = |c: usize, y: usize, x: usize| planes[c * 12 + y * 4 + x];
        assert_eq!([at(0, 1, 2), at(0, 2, 2), at(1, 1, 2), at(1, 2, 2)], [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(planes.iter().filter(|&&v| v == 9.0).count(), 20);
        assert!(erasing(1.0, vec![1.0; 3]).fill(window, &mut rng, [2, 3, 4], &mut planes, |v| v).is_err());
    }
}
