//! Brightness, contrast and the other point operations of `PIL.ImageEnhance` and `PIL.ImageOps`, in their arithmetic.

#![forbid(unsafe_code)]

use super::avx2::{Loop, with_avx2};
use super::{Image, Layout};
use crate::error::Result;

/// `PIL.Image.blend(degenerate, image, factor)` of two bytes: in single precision, cut off, clipped when extrapolating.
fn blend(degenerate: u8, value: u8, factor: f32) -> u8 {
    // `as` cuts towards zero and ends at 0 and 255, as Pillow's casts and clips do.
    (f32::from(degenerate) + factor * (f32::from(value) - f32::from(degenerate))) as u8
}

/// Every byte of the image through a table; the fourth byte of a pixel is nobody's.
fn map(image: &mut Image, table: &[u8; 256]) {
    for value in &mut image.data {
        *value = table[usize::from(*value)];
    }
}

pub fn brightness(image: &mut Image, factor: f64) {
    let factor = factor as f32;
    map(image, &std::array::from_fn(|v| blend(0, v as u8, factor)));
}

/// Away from the rounded mean of the gray image.
pub fn contrast(image: &mut Image, factor: f64) {
    let count = image.width * image.height;
    let sum: u64 = match image.layout {
        Layout::Gray => image.data.iter().map(|&v| u64::from(v)).sum(),
        Layout::Rgbx => image.data.as_chunks::<4>().0.iter().map(|pixel| u64::from(luma(pixel))).sum(),
    };
    let mean = (sum as f64 / count.max(1) as f64 + 0.5) as u8;
    let factor = factor as f32;
    map(image, &std::array::from_fn(|v| blend(mean, v as u8, factor)));
}

/// Away from the gray of the pixel; a gray image stays as it is.
pub fn saturation(image: &mut Image, factor: f64) {
    if image.layout == Layout::Gray {
        return;
    }
    let factor = factor as f32;
    for pixel in image.data.as_chunks_mut::<4>().0 {
        let gray = luma(pixel);
        for value in &mut pixel[..3] {
            *value = blend(gray, *value, factor);
        }
    }
}

/// Turns the colour circle by `factor`, which is within -0.5 and 0.5; through Pillow's 8-bit HSV.
pub fn hue(image: &mut Image, factor: f64) {
    if image.layout == Layout::Gray {
        return;
    }
    let turn = (factor * 255.0) as i32 as u8;
    with_avx2(Turn(image.data.as_chunks_mut().0, turn));
}

struct Turn<'a>(&'a mut [[u8; 4]], u8);

impl Loop for Turn<'_> {
    #[inline(always)]
    fn run(self) {
        for pixel in self.0 {
            let [h, s, v] = to_hsv([pixel[0], pixel[1], pixel[2]]);
            let [r, g, b] = from_hsv([h.wrapping_add(self.1), s, v]);
            *pixel = [r, g, b, 255];
        }
    }
}

/// Floats where Pillow has floats, doubles where its literals make doubles.
#[inline(always)]
fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (highest, lowest) = (r.max(g).max(b), r.min(g).min(b));
    if highest == lowest {
        return [0, 0, highest];
    }
    let range = f32::from(highest - lowest);
    let saturation = range / f32::from(highest);
    let [rc, gc, bc] = [r, g, b].map(|v| f32::from(highest - v) / range);
    let sector = if r == highest {
        bc - gc
    } else if g == highest {
        (2.0 + f64::from(rc) - f64::from(bc)) as f32
    } else {
        (4.0 + f64::from(gc) - f64::from(rc)) as f32
    };
    // At least 5/6 and less than 2: the remainder of a division by 1 is what follows the point.
    let turned = f64::from(sector) / 6.0 + 1.0;
    let hue = (turned - turned.trunc()) as f32;
    [(f64::from(hue) * 255.0) as u8, (f64::from(saturation) * 255.0) as u8, highest]
}

#[inline(always)]
fn from_hsv([h, s, v]: [u8; 3]) -> [u8; 3] {
    if s == 0 {
        return [v; 3];
    }
    let position = f64::from(h) * 6.0 / 255.0;
    let sector = position.floor();
    let rest = f64::from((position - sector) as f32);
    let strength = f64::from((f64::from(s) / 255.0) as f32);
    let value = f64::from(v);
    // Halves away from zero, as C's round.
    let p = (value * (1.0 - strength)).round() as u8;
    let q = (value * (1.0 - strength * rest)).round() as u8;
    let t = (value * (1.0 - strength * (1.0 - rest))).round() as u8;
    match sector as u8 % 6 {
        0 => [v, t, p],
        1 => [q, v, p],
        2 => [p, v, t],
        3 => [p, q, v],
        4 => [t, p, v],
        _ => [v, p, q],
    }
}

pub fn invert(image: &mut Image) {
    map(image, &std::array::from_fn(|v| 255 - v as u8));
}

/// Inverts what is not below `threshold`.
pub fn solarize(image: &mut Image, threshold: f64) {
    map(image, &std::array::from_fn(|v| if (v as f64) < threshold { v as u8 } else { 255 - v as u8 }));
}

/// Keeps the `bits` highest bits, 1 to 8.
pub fn posterize(image: &mut Image, bits: u8) {
    let mask = !((1u16 << (8 - bits.clamp(1, 8))) - 1) as u8;
    map(image, &std::array::from_fn(|v| v as u8 & mask));
}

/// Every channel through the table that `table` makes of its histogram.
fn by_histogram(image: &mut Image, table: impl Fn(&[u64; 256]) -> Option<[u8; 256]>) {
    let step = image.layout.bytes_per_pixel();
    for channel in 0..image.layout.channels() {
        let mut histogram = [0u64; 256];
        for &value in image.data.iter().skip(channel).step_by(step) {
            histogram[usize::from(value)] += 1;
        }
        if let Some(table) = table(&histogram) {
            for value in image.data.iter_mut().skip(channel).step_by(step) {
                *value = table[usize::from(*value)];
            }
        }
    }
}

/// Flattens the histogram of every channel.
pub fn equalize(image: &mut Image) {
    by_histogram(image, |histogram| {
        let last = histogram.iter().rev().find(|&&n| n > 0).copied().unwrap_or(0);
        // One colour gives a step of 0 too.
        let step = (histogram.iter().sum::<u64>() - last) / 255;
        if step == 0 {
            return None;
        }
        let mut n = step / 2;
        Some(std::array::from_fn(|v| {
            let value = (n / step).min(255) as u8;
            n += histogram[v];
            value
        }))
    });
}

/// Stretches every channel from its darkest to its lightest value over 0 to 255.
pub fn autocontrast(image: &mut Image) {
    by_histogram(image, |histogram| {
        let low = histogram.iter().position(|&n| n > 0)?;
        let high = histogram.iter().rposition(|&n| n > 0)?;
        if high <= low {
            return None;
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        Some(std::array::from_fn(|v| (v as f64 * scale + offset) as u8))
    });
}

/// Away from the image under Pillow's 3 x 3 `SMOOTH`; edges, and images without an inside, stay as they are.
///
/// # Errors
/// When there is no memory for a copy.
pub fn sharpness(image: &mut Image, factor: f64, spare: &mut Image) -> Result<()> {
    let (width, height, step) = (image.width, image.height, image.layout.bytes_per_pixel());
    if width < 3 || height < 3 {
        return Ok(());
    }
    let factor = factor as f32;
    let (side, middle) = (1.0 / 13.0f32, 5.0 / 13.0f32);
    let stride = image.stride();
    spare.copy_from(image)?;
    for y in 1..height - 1 {
        let rows = [y + 1, y, y - 1].map(|row| &spare.data[row * stride..][..stride]);
        let out = &mut image.data[y * stride..][..stride];
        for (x, value) in out.iter_mut().enumerate().take(stride - step).skip(step) {
            let mut sum = 0.5;
            for (row, weights) in rows.iter().zip([[side; 3], [side, middle, side], [side; 3]]) {
                sum += f32::from(row[x - step]) * weights[0]
                    + f32::from(row[x]) * weights[1]
                    + f32::from(row[x + step]) * weights[2];
            }
            *value = blend(sum as u8, *value, factor);
        }
    }
    Ok(())
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
fn luma(pixel: &[u8]) -> u8 {
    ((u32::from(pixel[0]) * 19595 + u32::from(pixel[1]) * 38470 + u32::from(pixel[2]) * 7471 + 0x8000) >> 16) as u8
}
