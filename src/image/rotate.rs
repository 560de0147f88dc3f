//! `PIL.Image.rotate`: shortcuts for right angles, an affine map for the others.

#![forbid(unsafe_code)]

use super::affine::sample;
use super::{Filter, Image};
use crate::error::Result;

/// Rotates by `angle` degrees counter-clockwise into `out`; the uncovered corners become `fill` (its first channel for
/// gray images).
///
/// # Errors
/// For filters other than nearest, bilinear and bicubic.
pub fn rotate(
    image: &Image,
    angle: f64,
    filter: Filter,
    expand: bool,
    center: Option<(f64, f64)>,
    fill: [u8; 3],
    out: &mut Image,
) -> Result<()> {
    // Python's modulo has the sign of the divisor.
    let angle = angle.rem_euclid(360.0);
    let square = image.width == image.height;
    if center.is_none() {
        if angle == 0.0 {
            return out.copy_from(image);
        }
        if angle == 180.0 {
            return turn(image, image.height, image.width, out, |y, x| (image.height - 1 - y, image.width - 1 - x));
        }
        if (angle == 90.0 || angle == 270.0) && (expand || square) {
            return turn(image, image.width, image.height, out, |y, x| {
                if angle == 90.0 { (x, image.width - 1 - y) } else { (image.height - 1 - x, y) }
            });
        }
    }
    let (matrix, width, height) = matrix(image.width, image.height, angle, expand, center);
    out.reshape(width, height, image.layout)?;
    sample(image, &matrix, filter, fill, out)
}

/// Whole pixels moved: output (y, x) takes input `from(y, x)`.
fn turn(
    image: &Image,
    height: usize,
    width: usize,
    out: &mut Image,
    from: impl Fn(usize, usize) -> (usize, usize),
) -> Result<()> {
    let pixel = image.layout.bytes_per_pixel();
    out.reshape(width, height, image.layout)?;
    for (y, line) in out.data.chunks_exact_mut(width * pixel).enumerate() {
        for (x, value) in line.chunks_exact_mut(pixel).enumerate() {
            let (y, x) = from(y, x);
            value.copy_from_slice(&image.data[(y * image.width + x) * pixel..][..pixel]);
        }
    }
    Ok(())
}

/// Turns a picture with this EXIF orientation upright; numbers other than 2 to 8 change nothing.
pub(super) fn upright(orientation: u8, image: &mut Image) -> Result<()> {
    let (h, w) = (image.height, image.width);
    let mut turned = Image::default();
    match orientation {
        2 => turn(image, h, w, &mut turned, |y, x| (y, w - 1 - x)),
        3 => turn(image, h, w, &mut turned, |y, x| (h - 1 - y, w - 1 - x)),
        4 => turn(image, h, w, &mut turned, |y, x| (h - 1 - y, x)),
        5 => turn(image, w, h, &mut turned, |y, x| (x, y)),
        6 => turn(image, w, h, &mut turned, |y, x| (h - 1 - x, y)),
        7 => turn(image, w, h, &mut turned, |y, x| (h - 1 - x, w - 1 - y)),
        8 => turn(image, w, h, &mut turned, |y, x| (x, w - 1 - y)),
        _ => return Ok(()),
    }?;
    std::mem::swap(image, &mut turned);
    Ok(())
}

/// The map from output to input positions, and the output size.
fn matrix(
    width: usize,
    height: usize,
    angle: f64,
    expand: bool,
    center: Option<(f64, f64)>,
) -> ([f64; 6], usize, usize) {
    let (w, h) = (width as f64, height as f64);
    let (cx, cy) = center.unwrap_or((w / 2.0, h / 2.0));
    let radians = -angle.to_radians();
    let (cos, sin) = (round15(radians.cos()), round15(radians.sin()));
    let mut m = [cos, sin, 0.0, round15(-radians.sin()), cos, 0.0];
    let apply = |m: &[f64; 6], x: f64, y: f64| (m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]);
    (m[2], m[5]) = apply(&m, -cx, -cy);
    m[2] += cx;
    m[5] += cy;
    if !expand {
        return (m, width, height);
    }
    let corners = [(0.0, 0.0), (w, 0.0), (w, h), (0.0, h)].map(|(x, y)| apply(&m, x, y));
    let extent = |pick: fn(&(f64, f64)) -> f64| {
        let highest = corners.iter().map(pick).fold(f64::NEG_INFINITY, f64::max);
        let lowest = corners.iter().map(pick).fold(f64::INFINITY, f64::min);
        highest.ceil() - lowest.floor()
    };
    let (new_w, new_h) = (extent(|c| c.0), extent(|c| c.1));
    (m[2], m[5]) = apply(&m, -(new_w - w) / 2.0, -(new_h - h) / 2.0);
    (m, new_w as usize, new_h as usize)
}

/// Python's `round(x, 15)`: through the shortest decimal text, as both languages round that exactly.
fn round15(x: f64) -> f64 {
    format!("{x:.15}").parse().unwrap_or(x)
}
