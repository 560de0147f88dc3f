//! `PIL.Image.rotate`: shortcuts for right angles, 16.16 fixed point for nearest, doubles for bilinear.

#![forbid(unsafe_code)]

use super::{Filter, Image};
use crate::error::{Error, Result};

/// Rotates by `angle` degrees counter-clockwise into `out`; the uncovered corners become `fill` (its first channel for
/// gray images).
///
/// # Errors
/// For filters other than nearest and bilinear.
pub fn rotate(
    image: &Image,
    angle: f64,
    filter: Filter,
    expand: bool,
    center: Option<(f64, f64)>,
    fill: [u8; 3],
    out: &mut Image,
) -> Result<()> {
    if !matches!(filter, Filter::Nearest | Filter::Bilinear) {
        return Err(Error::Argument(format!("rotation with {filter:?}: only Nearest and Bilinear are built in")));
    }
    // Python's modulo has the sign of the divisor.
    let angle = angle.rem_euclid(360.0);
    let square = image.width == image.height;
    if center.is_none() {
        if angle == 0.0 {
            out.clone_from(image);
            return Ok(());
        }
        if angle == 180.0 {
            turn(image, image.height, image.width, out, |y, x| (image.height - 1 - y, image.width - 1 - x));
            return Ok(());
        }
        if (angle == 90.0 || angle == 270.0) && (expand || square) {
            turn(image, image.width, image.height, out, |y, x| {
                if angle == 90.0 { (x, image.width - 1 - y) } else { (image.height - 1 - x, y) }
            });
            return Ok(());
        }
    }
    let (matrix, width, height) = matrix(image.width, image.height, angle, expand, center);
    out.reshape(width, height, image.layout);
    match image.layout.bytes_per_pixel() {
        1 => affine::<1>(image, &matrix, filter, [fill[0]], out),
        _ => affine::<4>(image, &matrix, filter, [fill[0], fill[1], fill[2], 0], out),
    }
    Ok(())
}

/// Whole pixels moved: output (y, x) takes input `from(y, x)`.
pub(super) fn turn(
    image: &Image,
    height: usize,
    width: usize,
    out: &mut Image,
    from: impl Fn(usize, usize) -> (usize, usize),
) {
    let pixel = image.layout.bytes_per_pixel();
    out.reshape(width, height, image.layout);
    for (y, line) in out.data.chunks_exact_mut(width * pixel).enumerate() {
        for (x, value) in line.chunks_exact_mut(pixel).enumerate() {
            let (y, x) = from(y, x);
            value.copy_from_slice(&image.data[(y * image.width + x) * pixel..][..pixel]);
        }
    }
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

fn affine<const N: usize>(image: &Image, m: &[f64; 6], filter: Filter, fill: [u8; N], out: &mut Image) {
    let (width, height) = (out.width, out.height);
    let pixels = |y: usize, x: usize| -> [u8; N] { std::array::from_fn(|c| image.data[(y * image.width + x) * N + c]) };
    let fits =
        |x: f64, y: f64| (x * m[0] + y * m[1] + m[2]).abs() < 32768.0 && (x * m[3] + y * m[4] + m[5]).abs() < 32768.0;
    let (w, h) = (width as f64, height as f64);
    let lines = out.data.chunks_exact_mut(width * N);
    if filter == Filter::Bilinear {
        for (y, line) in lines.enumerate() {
            for (x, value) in line.chunks_exact_mut(N).enumerate() {
                let (x, y) = (x as f64 + 0.5, y as f64 + 0.5);
                let at = (m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]);
                value.copy_from_slice(&bilinear(image, at, pixels).unwrap_or(fill));
            }
        }
    } else if m[1] == 0.0 && m[3] == 0.0 {
        // No rotation left (a centre was given with a right angle of 0 or 180): positions add up axis by axis.
        let table = |start: f64, step: f64, count: usize, limit: usize| {
            let mut at = start;
            (0..count).map(|_| (inside(at, limit), at += step).0).collect::<Vec<_>>()
        };
        let columns = table(m[2] + m[0] * 0.5, m[0], width, image.width);
        let rows = table(m[5] + m[4] * 0.5, m[4], height, image.height);
        for (y, line) in lines.enumerate() {
            for (column, value) in columns.iter().zip(line.chunks_exact_mut(N)) {
                value.copy_from_slice(&rows[y].zip(*column).map_or(fill, |(y, x)| pixels(y, x)));
            }
        }
    } else if fits(0.0, 0.0) && fits(w, h) && fits(0.0, h) && fits(w, 0.0) {
        let fix = |v: f64| (v * 65536.0 + 0.5).floor() as i32;
        let step = [m[0], m[1], m[3], m[4]].map(fix);
        let mut start = [fix(m[2] + m[0] * 0.5 + m[1] * 0.5), fix(m[5] + m[3] * 0.5 + m[4] * 0.5)];
        for line in lines {
            let [mut xx, mut yy] = start;
            for value in line.chunks_exact_mut(N) {
                let (x, y) = ((xx >> 16) as usize, (yy >> 16) as usize);
                // Negative positions wrap to huge ones.
                let covered = x < image.width && y < image.height;
                value.copy_from_slice(&if covered { pixels(y, x) } else { fill });
                (xx, yy) = (xx.wrapping_add(step[0]), yy.wrapping_add(step[2]));
            }
            start = [start[0].wrapping_add(step[1]), start[1].wrapping_add(step[3])];
        }
    } else {
        let mut start = (m[2] + m[1] * 0.5 + m[0] * 0.5, m[5] + m[4] * 0.5 + m[3] * 0.5);
        for line in lines {
            let (mut xx, mut yy) = start;
            for value in line.chunks_exact_mut(N) {
                let at = inside(yy, image.height).zip(inside(xx, image.width));
                value.copy_from_slice(&at.map_or(fill, |(y, x)| pixels(y, x)));
                (xx, yy) = (xx + m[0], yy + m[3]);
            }
            start = (start.0 + m[1], start.1 + m[4]);
        }
    }
}

fn inside(position: f64, limit: usize) -> Option<usize> {
    (position >= 0.0 && position < limit as f64).then_some(position as usize)
}

fn bilinear<const N: usize>(
    image: &Image,
    (x, y): (f64, f64),
    pixels: impl Fn(usize, usize) -> [u8; N],
) -> Option<[u8; N]> {
    let (width, height) = (image.width as f64, image.height as f64);
    if !(x >= 0.0 && x < width && y >= 0.0 && y < height) {
        return None;
    }
    let (x, y) = (x - 0.5, y - 0.5);
    let (left, top) = (x.floor(), y.floor());
    let (dx, dy) = (x - left, y - top);
    // Outside the edges the edge pixel is repeated.
    let column = |x: f64| x.clamp(0.0, width - 1.0) as usize;
    let row = |y: f64| y.clamp(0.0, height - 1.0) as usize;
    let mix = |a: f64, b: f64, d: f64| a + (b - a) * d;
    let line = |y: usize| {
        let (a, b) = (pixels(y, column(left)), pixels(y, column(left + 1.0)));
        std::array::from_fn::<f64, N, _>(|c| mix(f64::from(a[c]), f64::from(b[c]), dx))
    };
    let upper = line(row(top));
    let lower = if top + 1.0 < height { line(row(top + 1.0)) } else { upper };
    Some(std::array::from_fn(|c| mix(upper[c], lower[c], dy) as u8))
}
