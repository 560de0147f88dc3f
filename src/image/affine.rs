//! `PIL.Image.transform` with an affine map, and torchvision's matrix for it: 16.16 fixed point for nearest, doubles for
//! bilinear and bicubic.

#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;

use super::avx2::{Loop, with_avx2};
use super::draw::number;
use super::{Filter, Image};
use crate::error::{Error, Result};

/// What `torchvision.transforms.functional.affine` is told: degrees, pixels, a factor, degrees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    pub angle: f64,
    pub translate: (f64, f64),
    pub scale: f64,
    pub shear: (f64, f64),
}

/// What `RandomAffine` draws from: ranges, but `translate` is the largest share of width and height.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AffineRange {
    pub degrees: (f64, f64),
    pub translate: (f64, f64),
    pub scale: (f64, f64),
    pub shear: [(f64, f64); 2],
}

impl AffineRange {
    /// For an image of that size.
    pub(super) fn draw(&self, rng: &mut ChaCha8Rng, width: usize, height: usize) -> Affine {
        let mut shift = |share: f64, length: usize| {
            let most = share * length as f64;
            number(rng, (-most, most)).round_ties_even()
        };
        let translate = (shift(self.translate.0, width), shift(self.translate.1, height));
        let shear = (number(rng, self.shear[0]), number(rng, self.shear[1]));
        Affine { angle: number(rng, self.degrees), translate, scale: number(rng, self.scale), shear }
    }
}

/// Whose matrix: the two are equal but for roundings, which show in the pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AffineForm {
    /// `torchvision.transforms.functional`.
    #[default]
    V1,
    /// `torchvision.transforms.v2.functional`.
    V2,
}

/// Moves the pixels into `out` of the same size; what comes from outside becomes `fill`.
///
/// # Errors
/// For filters other than nearest, bilinear and bicubic.
pub fn affine(
    image: &Image,
    map: &Affine,
    form: AffineForm,
    filter: Filter,
    center: Option<(f64, f64)>,
    fill: [u8; 3],
    out: &mut Image,
) -> Result<()> {
    let center = center.unwrap_or((image.width as f64 * 0.5, image.height as f64 * 0.5));
    out.reshape(image.width, image.height, image.layout)?;
    let matrix = match form {
        AffineForm::V1 => inverse_matrix(map, center),
        AffineForm::V2 => inverse_matrix_v2(map, center),
    };
    sample(image, &matrix, filter, fill, out)
}

/// torchvision's `_get_inverse_affine_matrix`, operation by operation.
fn inverse_matrix(map: &Affine, (cx, cy): (f64, f64)) -> [f64; 6] {
    let rotation = map.angle.to_radians();
    let (sx, sy) = (map.shear.0.to_radians(), map.shear.1.to_radians());
    let a = (rotation - sy).cos() / sy.cos();
    let b = -(rotation - sy).cos() * sx.tan() / sy.cos() - rotation.sin();
    let c = (rotation - sy).sin() / sy.cos();
    let d = -(rotation - sy).sin() * sx.tan() / sy.cos() + rotation.cos();
    let mut m = [d, -b, 0.0, -c, a, 0.0].map(|v| v / map.scale);
    let (x, y) = (-cx - map.translate.0, -cy - map.translate.1);
    m[2] += m[0] * x + m[1] * y;
    m[5] += m[3] * x + m[4] * y;
    m[2] += cx;
    m[5] += cy;
    m
}

/// The same function of v2.
fn inverse_matrix_v2(map: &Affine, (cx, cy): (f64, f64)) -> [f64; 6] {
    let rotation = map.angle.to_radians();
    let (sx, sy) = (map.shear.0.to_radians(), map.shear.1.to_radians());
    let (x, y) = (cx + map.translate.0, cy + map.translate.1);
    let a = (rotation - sy).cos() / sy.cos();
    let b = -(a * sx.tan() + rotation.sin());
    let c = (rotation - sy).sin() / sy.cos();
    let d = rotation.cos() - c * sx.tan();
    let mut m = [d, -b, 0.0, -c, a, 0.0].map(|v| v / map.scale);
    m[2] += cx - m[0] * x - m[1] * y;
    m[5] += cy - m[3] * x - m[4] * y;
    m
}

/// Fills `out`, which has its shape already: position `(x, y)` comes from `m (x, y, 1)` of the image.
pub(super) fn sample(image: &Image, m: &[f64; 6], filter: Filter, fill: [u8; 3], out: &mut Image) -> Result<()> {
    if !matches!(filter, Filter::Nearest | Filter::Bilinear | Filter::Bicubic) {
        return Err(Error::Argument(format!(
            "rotation and affine maps with {filter:?}: Pillow knows Nearest, Bilinear and Bicubic for them"
        )));
    }
    match image.layout.bytes_per_pixel() {
        1 => by_pixel::<1>(image, m, filter, [fill[0]], out),
        _ => by_pixel::<4>(image, m, filter, [fill[0], fill[1], fill[2], 0], out),
    }
    Ok(())
}

fn by_pixel<const N: usize>(image: &Image, m: &[f64; 6], filter: Filter, fill: [u8; N], out: &mut Image) {
    let (width, height) = (out.width, out.height);
    let pixels = |y: usize, x: usize| -> [u8; N] { std::array::from_fn(|c| image.data[(y * image.width + x) * N + c]) };
    let fits =
        |x: f64, y: f64| (x * m[0] + y * m[1] + m[2]).abs() < 32768.0 && (x * m[3] + y * m[4] + m[5]).abs() < 32768.0;
    let (w, h) = (width as f64, height as f64);
    if filter == Filter::Bilinear {
        with_avx2(Smooth::<N, false> { image, m, fill, out });
    } else if filter == Filter::Bicubic {
        with_avx2(Smooth::<N, true> { image, m, fill, out });
    } else if m[1] == 0.0 && m[3] == 0.0 {
        // No rotation left (a centre was given with a right angle of 0 or 180): positions add up axis by axis.
        let table = |start: f64, step: f64, count: usize, limit: usize| {
            let mut at = start;
            (0..count).map(|_| (inside(at, limit), at += step).0).collect::<Vec<_>>()
        };
        let columns = table(m[2] + m[0] * 0.5, m[0], width, image.width);
        let rows = table(m[5] + m[4] * 0.5, m[4], height, image.height);
        for (y, line) in out.data.chunks_exact_mut(width * N).enumerate() {
            for (column, value) in columns.iter().zip(line.chunks_exact_mut(N)) {
                value.copy_from_slice(&rows[y].zip(*column).map_or(fill, |(y, x)| pixels(y, x)));
            }
        }
    } else if fits(0.0, 0.0) && fits(w, h) && fits(0.0, h) && fits(w, 0.0) {
        let fix = |v: f64| (v * 65536.0 + 0.5).floor() as i32;
        let step = [m[0], m[1], m[3], m[4]].map(fix);
        let mut start = [fix(m[2] + m[0] * 0.5 + m[1] * 0.5), fix(m[5] + m[3] * 0.5 + m[4] * 0.5)];
        for line in out.data.chunks_exact_mut(width * N) {
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
        for line in out.data.chunks_exact_mut(width * N) {
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

/// Every position of `out` from several pixels of `image`.
struct Smooth<'a, const N: usize, const CUBIC: bool> {
    image: &'a Image,
    m: &'a [f64; 6],
    fill: [u8; N],
    out: &'a mut Image,
}

impl<const N: usize, const CUBIC: bool> Loop for Smooth<'_, N, CUBIC> {
    #[inline(always)]
    fn run(self) {
        let Self { image, m, fill, out } = self;
        let (pixels, size) = (image.data.as_chunks::<N>().0, [image.width, image.height]);
        for (y, line) in out.data.as_chunks_mut::<N>().0.chunks_exact_mut(out.width.max(1)).enumerate() {
            let y = y as f64 + 0.5;
            for (x, value) in line.iter_mut().enumerate() {
                let x = x as f64 + 0.5;
                let at = [m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]];
                let found = if CUBIC { bicubic(pixels, size, at) } else { bilinear(pixels, size, at) };
                *value = found.unwrap_or(fill);
            }
        }
    }
}

fn inside(position: f64, limit: usize) -> Option<usize> {
    (position >= 0.0 && position < limit as f64).then_some(position as usize)
}

#[inline(always)]
fn bilinear<const N: usize>(pixels: &[[u8; N]], [columns, rows]: [usize; 2], [x, y]: [f64; 2]) -> Option<[u8; N]> {
    let (width, height) = (columns as f64, rows as f64);
    if !(x >= 0.0 && x < width && y >= 0.0 && y < height) {
        return None;
    }
    let (x, y) = (x - 0.5, y - 0.5);
    let (left, top) = (x.floor(), y.floor());
    let (dx, dy) = (x - left, y - top);
    // Outside the edges the edge pixel is repeated.
    let column = |x: f64| x.clamp(0.0, width - 1.0) as usize;
    let row = |y: f64| y.clamp(0.0, height - 1.0) as usize * columns;
    let mix = |a: f64, b: f64, d: f64| a + (b - a) * d;
    let (left, right) = (column(left), column(left + 1.0));
    let line = |start: usize| {
        let (a, b) = (pixels[start + left].map(f64::from), pixels[start + right].map(f64::from));
        std::array::from_fn::<f64, N, _>(|c| mix(a[c], b[c], dx))
    };
    let upper = line(row(top));
    let lower = if top + 1.0 < height { line(row(top + 1.0)) } else { upper };
    Some(std::array::from_fn(|c| mix(upper[c], lower[c], dy) as u8))
}

#[inline(always)]
fn bicubic<const N: usize>(pixels: &[[u8; N]], [columns, rows]: [usize; 2], [x, y]: [f64; 2]) -> Option<[u8; N]> {
    let (width, height) = (columns as f64, rows as f64);
    if !(x >= 0.0 && x < width && y >= 0.0 && y < height) {
        return None;
    }
    let (x, y) = (x - 0.5, y - 0.5);
    let (dx, dy) = (x - x.floor(), y - y.floor());
    let (left, top) = (x.floor() - 1.0, y.floor() - 1.0);
    let places = [0.0, 1.0, 2.0, 3.0].map(|i| (left + i).clamp(0.0, width - 1.0) as usize);
    let line = |y: usize| cubic(places.map(|x| pixels[y * columns + x].map(f64::from)), dx);
    // Rows outside repeat the row before them.
    let mut lines = [line(top.clamp(0.0, height - 1.0) as usize); 4];
    for i in 1..4 {
        let y = top + i as f64;
        lines[i] = if y >= 0.0 && y < height { line(y as usize) } else { lines[i - 1] };
    }
    Some(cubic(lines, dy).map(|v| v as u8))
}

#[inline(always)]
fn cubic<const N: usize>([v1, v2, v3, v4]: [[f64; N]; 4], d: f64) -> [f64; N] {
    std::array::from_fn(|c| {
        let p1 = v2[c];
        let p2 = -v1[c] + v3[c];
        let p3 = 2.0 * (v1[c] - v2[c]) + v3[c] - v4[c];
        let p4 = -v1[c] + v2[c] - v3[c] + v4[c];
        p1 + d * (p2 + d * (p3 + d * p4))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::draw::tests::{COUNT, assert_uniform, draws};

    #[test]
    fn maps_are_uniform_in_each_parameter_and_independent() {
        let range = AffineRange {
            degrees: (-30.0, 60.0),
            translate: (0.1, 0.25),
            scale: (0.5, 2.0),
            shear: [(-5.0, 5.0), (10.0, 20.0)],
        };
        let maps = draws(|rng| range.draw(rng, 200, 100));
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
}
