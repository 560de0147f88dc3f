//! TIFF: the first page, turned upright by its orientation tag, as Pillow does for this format only.

#![forbid(unsafe_code)]

mod directory;

use std::io::Cursor;

use ::tiff::TiffError;
use ::tiff::decoder::{Decoder, Limits as TiffLimits};

use self::directory::{COLOR_MAP, Directory, Page, XMP, unsupported};
use super::exif::in_xmp;
use super::jpeg::cmyk_to_rgb;
use super::limits::{check_claim, check_pixels, truncated};
use super::samples::{Samples, clipped, fill_rows};
use crate::error::{Error, Result};
use crate::image::rotate::upright;
use crate::image::{Image, Layout, Limits};
use crate::memory;

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let failed = |error| match error {
        TiffError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => truncated("TIFF", bytes.len()),
        TiffError::UnsupportedError(e) => unsupported(e),
        other => Error::decode(format_args!("broken TIFF: {other}")),
    };
    let directory = Directory::first(bytes)?;
    let (width, height, kind) = directory.layout()?;
    check_pixels(width, height, limits)?;
    let row_bytes = width.saturating_mul(kind.bits * kind.samples).div_ceil(8);
    check_claim("TIFF", row_bytes.saturating_mul(height), kind.expansion(), bytes)?;
    let mut own = Vec::new();
    if kind.is_indexed() {
        // The crate refuses palettes, but reads their indices if they call themselves gray (1).
        let at = directory.photometric_at().ok_or_else(|| unsupported("its photometric interpretation"))?;
        memory::resize(&mut own, bytes.len())?;
        own.copy_from_slice(bytes);
        own[at..at + 2].copy_from_slice(if bytes[0] == b'I' { &[1, 0] } else { &[0, 1] });
    }
    let source = if own.is_empty() { bytes } else { &own };
    let mut tiff = Decoder::new(Cursor::new(source)).map_err(failed)?.with_limits(TiffLimits::unlimited());
    // Checked above; the crate may see other tags.
    let size = tiff.image_buffer_layout().map_err(failed)?.complete_len;
    if tiff.dimensions().map_err(failed)? != (width as u32, height as u32) || size as u64 != row_bytes * height {
        return Err(unsupported(format_args!("{size} bytes of pixels where {} were expected", row_bytes * height)));
    }
    let mut data = memory::zeroed(size)?;
    // What the crate takes for a strip at a time.
    memory::probe(size)?;
    tiff.read_image_bytes(&mut data).map_err(failed)?;
    pixels(&directory, &kind, (width as usize, height as usize), &data, out)?;
    let orientation = directory.orientation()?.or_else(|| directory.data(XMP).and_then(in_xmp).map(u64::from));
    upright(orientation.and_then(|value| u8::try_from(value).ok()).unwrap_or(1), out)
}

/// Samples, in this machine's byte order, to RGBX.
fn pixels(directory: &Directory<'_>, kind: &Page, size: (usize, usize), data: &[u8], out: &mut Image) -> Result<()> {
    let bits = kind.bits as u8;
    let rows = |samples: Samples<'_>, out: &mut Image| {
        fill_rows(size, out, samples, data, samples.row_bytes(size.0), false, || truncated("TIFF", data.len()))
    };
    let colors;
    match (kind.photometric, bits) {
        (3, _) => {
            colors = palette(directory)?;
            rows(Samples::Palette { bits, colors: &colors }, out)
        }
        (0 | 1, 1 | 2 | 4 | 8) if kind.samples == 1 => rows(Samples::Gray { bits }, out),
        (0 | 1, 8) => rows(Samples::Bytes { step: 2, rgb: [0; 3] }, out),
        (0 | 1, _) => gray(kind, size, data, out),
        (2, 8) => {
            rows(Samples::Bytes { step: kind.samples as usize, rgb: [0, 1, 2] }, out)?;
            if kind.extra == [1] {
                divide_by_alpha(out, data.iter().skip(3).step_by(4).copied());
            }
            Ok(())
        }
        (2, _) => {
            // The high bytes.
            let high = usize::from(cfg!(target_endian = "little"));
            let step = 2 * kind.samples as usize;
            rows(Samples::Bytes { step, rgb: [high, 2 + high, 4 + high] }, out)?;
            if kind.extra == [1] {
                divide_by_alpha(out, data.iter().skip(6 + high).step_by(8).copied());
            }
            Ok(())
        }
        _ => {
            out.reshape(size.0, size.1, Layout::Rgbx)?;
            out.data.copy_from_slice(data);
            cmyk_to_rgb(&mut out.data, false);
            Ok(())
        }
    }
}

fn palette(directory: &Directory<'_>) -> Result<[[u8; 3]; 256]> {
    let map = directory.numbers(COLOR_MAP)?.ok_or_else(|| Error::decode("broken TIFF: no palette"))?;
    let count = map.len() / 3;
    let mut colors = [[0; 3]; 256];
    if count > colors.len() || map.len() % 3 != 0 {
        return Err(unsupported(format_args!("a palette of {} numbers", map.len())));
    }
    for (i, color) in colors.iter_mut().enumerate().take(count) {
        *color = [map[i], map[count + i], map[2 * count + i]].map(|v| (v >> 8) as u8);
    }
    Ok(colors)
}

/// Pillow's modes "I;16", "I" and "F": clipped to bytes, fractions cut off.
fn gray(kind: &Page, (width, height): (usize, usize), data: &[u8], out: &mut Image) -> Result<()> {
    out.reshape(width, height, Layout::Rgbx)?;
    let (pixels, step) = (out.data.as_chunks_mut::<4>().0, kind.bits as usize / 8);
    for (pixel, sample) in pixels.iter_mut().zip(data.chunks_exact(step)) {
        let value = match (sample, kind.format) {
            (&[a, b], 1) => clipped(u16::from_ne_bytes([a, b]).into()),
            (&[a, b], _) => i16::from_ne_bytes([a, b]).clamp(0, 255) as u8,
            (&[a, b, c, d], 3) => f32::from_ne_bytes([a, b, c, d]) as u8,
            // Unsigned ones become Pillow's signed "I" too.
            (&[a, b, c, d], _) => i32::from_ne_bytes([a, b, c, d]).clamp(0, 255) as u8,
            _ => return Err(unsupported(format_args!("{} bits of gray", kind.bits))),
        };
        pixel.fill(value);
    }
    Ok(())
}

fn divide_by_alpha(image: &mut Image, alpha: impl Iterator<Item = u8>) {
    for (pixel, alpha) in image.data.as_chunks_mut::<4>().0.iter_mut().zip(alpha) {
        for value in &mut pixel[..3] {
            *value = match alpha {
                0 => 0,
                255 => *value,
                a => (u32::from(*value) * 255 / u32::from(a)).min(255) as u8,
            };
        }
    }
}
