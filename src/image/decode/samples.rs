//! Rows of samples, as they lie in files, to pixels.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::image::{Image, Layout};

/// How one row of samples, as it lies in the file, becomes RGBX pixels.
#[derive(Clone, Copy)]
pub enum Samples<'a> {
    /// `bits` per sample, packed from the high bit, white at the highest value.
    Gray { bits: u8 },
    /// Packed indices; colours that the palette lacks are black, as in Pillow.
    Palette { bits: u8, colors: &'a [[u8; 3]; 256] },
    /// Bytes per pixel and the offsets of red, green and blue.
    Bytes { step: usize, rgb: [usize; 3] },
    /// 16 bits, blue in the lowest five; green has five or six.
    Short { green_bits: u16 },
}

impl Samples<'_> {
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Gray { bits } | Self::Palette { bits, .. } => (width * bits as usize).div_ceil(8),
            Self::Bytes { step, .. } => width * step,
            Self::Short { .. } => width * 2,
        }
    }

    /// `line` must hold at least one row of `out.len() / 4` pixels.
    pub fn unpack(self, line: &[u8], out: &mut [u8]) {
        let pixels = out.as_chunks_mut::<4>().0;
        match self {
            Self::Gray { bits } => {
                let scale = 255 / ((1u16 << bits) - 1) as u8;
                for (x, pixel) in pixels.iter_mut().enumerate() {
                    pixel.fill(packed(line, x, bits) * scale);
                }
            }
            Self::Palette { bits, colors } => {
                for (x, pixel) in pixels.iter_mut().enumerate() {
                    pixel[..3].copy_from_slice(&colors[packed(line, x, bits) as usize]);
                }
            }
            Self::Bytes { step, rgb: [r, g, b] } => {
                for (pixel, sample) in pixels.iter_mut().zip(line.chunks_exact(step)) {
                    *pixel = [sample[r], sample[g], sample[b], 255];
                }
            }
            Self::Short { green_bits } => {
                for (pixel, pair) in pixels.iter_mut().zip(line.as_chunks().0) {
                    pixel[..3].copy_from_slice(&expand16(u16::from_le_bytes(*pair), green_bits));
                }
            }
        }
    }
}

/// Sample `x` of a row with 1, 2, 4 or 8 bits per sample, the first in the high bits.
pub fn packed(line: &[u8], x: usize, bits: u8) -> u8 {
    if bits == 8 {
        return line[x];
    }
    let bit = x * bits as usize;
    (line[bit / 8] >> (8 - bits as usize - bit % 8)) & ((1 << bits) - 1)
}

/// RGB triples to a table in which missing colours are black.
pub fn color_table(rgb: &[u8]) -> [[u8; 3]; 256] {
    let mut table = [[0; 3]; 256];
    for (entry, color) in table.iter_mut().zip(rgb.as_chunks::<3>().0) {
        *entry = *color;
    }
    table
}

/// A value of Pillow's 16- or 32-bit modes as a byte: clipped, not scaled.
pub fn clipped(value: u32) -> u8 {
    value.min(255) as u8
}

/// `out` gets its shape, then every row is filled from `data`, which has one row every `stride` bytes; padding behind
/// the last row may be missing. Fails with `cut` when a row is, before memory is taken.
pub fn fill_rows(
    (width, height): (usize, usize),
    out: &mut Image,
    samples: Samples<'_>,
    data: &[u8],
    stride: usize,
    bottom_up: bool,
    cut: impl Fn() -> Error,
) -> Result<()> {
    let row_bytes = samples.row_bytes(width);
    let needed = stride.checked_mul(height - 1).and_then(|rows| rows.checked_add(row_bytes));
    if needed.is_none_or(|needed| needed > data.len()) {
        return Err(cut());
    }
    out.reshape(width, height, Layout::Rgbx)?;
    for (y, row) in out.data.chunks_exact_mut(4 * width).enumerate() {
        let y = if bottom_up { height - 1 - y } else { y };
        samples.unpack(&data[y * stride..y * stride + row_bytes], row);
    }
    Ok(())
}

/// Five or six bits to eight, the quotient rounded down, as Pillow.
pub fn expand16(pixel: u16, green_bits: u16) -> [u8; 3] {
    let five = |v: u16| ((v & 31) * 255 / 31) as u8;
    let green = pixel >> 5;
    let green = if green_bits == 6 { ((green & 63) * 255 / 63) as u8 } else { five(green) };
    [five(pixel >> (5 + green_bits)), green, five(pixel)]
}
