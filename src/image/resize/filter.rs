//! Pillow's resampling filters and their weights.

#![forbid(unsafe_code)]

use std::f64::consts::PI;

/// Pillow's resampling filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Filter {
    Nearest,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
    Lanczos,
}

impl Filter {
    pub(super) fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    pub(super) fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
        match self {
            Self::Nearest => 0.0,
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Hamming => match x.abs() {
                0.0 => 1.0,
                a if a >= 1.0 => 0.0,
                // The constants are floats in Pillow.
                a => (a * PI).sin() / (a * PI) * (f64::from(0.54f32) + f64::from(0.46f32) * (a * PI).cos()),
            },
            Self::Bicubic => match (x.abs(), -0.5) {
                (x, a) if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
                (x, a) if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * a,
                _ => 0.0,
            },
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}
