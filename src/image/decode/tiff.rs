//! TIFF: the first page, turned upright by its orientation tag, as Pillow does for this format only.

#![forbid(unsafe_code)]

use std::io::Cursor;

use ::tiff::decoder::{Decoder, DecodingResult, Limits as TiffLimits};
use ::tiff::tags::Tag;
use ::tiff::{ColorType, TiffError};

use super::jpeg::cmyk_to_rgb;
use super::{Samples, check_pixels, clipped, fill_rows, truncated};
use crate::error::{Error, Result};
use crate::image::rotate::upright;
use crate::image::{Image, Layout, Limits};

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let failed = |error| match error {
        TiffError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => truncated("TIFF", bytes.len()),
        TiffError::UnsupportedError(e) => {
            Error::decode(format_args!("TIFF that is not supported: {e}; convert the file"))
        }
        other => Error::decode(format_args!("broken TIFF: {other}")),
    };
    check_counts(bytes)?;
    let mut own = Vec::new();
    let indexed = photometric_at(bytes).filter(|&(_, value)| value == PALETTE);
    if let Some((at, _)) = indexed {
        // The crate refuses palettes, but reads their indices if they call themselves gray (1).
        own.extend_from_slice(bytes);
        own[at..at + 2].copy_from_slice(if bytes[0] == b'I' { &[1, 0] } else { &[0, 1] });
    }
    let source = if own.is_empty() { bytes } else { &own };
    let mut tiff = Decoder::new(Cursor::new(source)).map_err(failed)?.with_limits(memory(limits));
    let (width, height) = tiff.dimensions().map_err(failed)?;
    check_pixels(width.into(), height.into(), limits)?;
    let (width, height) = (width as usize, height as usize);
    let color = tiff.colortype().map_err(failed)?;
    let planar = tiff.find_tag_unsigned::<u16>(Tag::PlanarConfiguration).map_err(failed)? == Some(2);
    let unsupported = || {
        Error::decode(format_args!(
            "TIFF with {color:?}{} is not supported: convert the file",
            if planar { " in separate planes" } else { "" }
        ))
    };
    if planar && !matches!(color, ColorType::Gray(_)) {
        return Err(unsupported());
    }
    let mut data = DecodingResult::U8(Vec::new());
    tiff.read_image_to_buffer(&mut data).map_err(failed)?;
    let rows = |data: &[u8], step_bits: usize, samples: Samples<'_>, out: &mut Image| {
        let stride = (width * step_bits).div_ceil(8);
        fill_rows((width, height), out, samples, data, stride, false).ok_or_else(|| truncated("TIFF", bytes.len()))
    };
    match (color, &data) {
        (ColorType::Gray(bits @ (1 | 2 | 4 | 8)), DecodingResult::U8(data)) if indexed.is_some() => {
            let map = tiff.get_tag_u16_vec(Tag::ColorMap).map_err(failed)?;
            let count = map.len() / 3;
            let mut colors = [[0; 3]; 256];
            for (i, color) in colors.iter_mut().enumerate().take(count) {
                *color = [map[i], map[count + i], map[2 * count + i]].map(|v| (v >> 8) as u8);
            }
            rows(data, bits.into(), Samples::Palette { bits, colors: &colors }, out)?;
        }
        (ColorType::Gray(bits @ (1 | 2 | 4 | 8)), DecodingResult::U8(data)) => {
            rows(data, bits.into(), Samples::Gray { bits }, out)?;
        }
        (ColorType::Gray(_), data) => gray(data, width, height, out).ok_or_else(unsupported)?,
        (ColorType::Multiband { bit_depth: 8, num_samples: 2 }, DecodingResult::U8(data)) => {
            rows(data, 16, Samples::Bytes { step: 2, rgb: [0; 3] }, out)?;
        }
        (ColorType::RGB(8), DecodingResult::U8(data)) => {
            rows(data, 24, Samples::Bytes { step: 3, rgb: [0, 1, 2] }, out)?;
        }
        (ColorType::RGBA(8), DecodingResult::U8(data)) => {
            rows(data, 32, Samples::Bytes { step: 4, rgb: [0, 1, 2] }, out)?;
            if premultiplied(&mut tiff) {
                divide_by_alpha(out, data.iter().skip(3).step_by(4).copied());
            }
        }
        (ColorType::RGB(16) | ColorType::RGBA(16), DecodingResult::U16(data)) => {
            let step = color.num_samples().into();
            out.reshape(width, height, Layout::Rgbx);
            for (pixel, sample) in out.data.as_chunks_mut::<4>().0.iter_mut().zip(data.chunks_exact(step)) {
                *pixel = [sample[0], sample[1], sample[2], 0].map(|v| (v >> 8) as u8);
            }
            if step == 4 && premultiplied(&mut tiff) {
                divide_by_alpha(out, data.iter().skip(3).step_by(4).map(|v| (v >> 8) as u8));
            }
        }
        (ColorType::CMYK(8), DecodingResult::U8(data)) => {
            out.reshape(width, height, Layout::Rgbx);
            out.data.copy_from_slice(data.get(..4 * width * height).ok_or_else(|| truncated("TIFF", bytes.len()))?);
            cmyk_to_rgb(&mut out.data, false);
        }
        _ => return Err(unsupported()),
    }
    let orientation = tiff.find_tag_unsigned::<u16>(Tag::Orientation).map_err(failed)?.unwrap_or(1);
    upright(u8::try_from(orientation).unwrap_or(1), out);
    Ok(())
}

/// The crate takes memory for as many values as a tag of the first directory announces, up to 256 MiB, and then reads
/// them: no tag may announce more than the file has. Tags before the first of the standard and private ones are never
/// read.
fn check_counts(bytes: &[u8]) -> Result<()> {
    const STANDARD: std::ops::Range<u64> = 254..32768;
    let little = bytes.starts_with(b"II");
    let big = bytes.get(if little { 2 } else { 3 }) == Some(&b'+');
    let number = |at: u64, size: u64| -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let field = bytes.get(at..at.checked_add(size as usize)?)?;
        let join = |n: u64, &b: &u8| n << 8 | u64::from(b);
        Some(if little { field.iter().rev().fold(0, join) } else { field.iter().fold(0, join) })
    };
    // Sizes of offsets and counts, of the number of entries, and of an entry.
    let (wide, head, entry) = if big { (8, 8, 20) } else { (4, 2, 12) };
    let directory = number(if big { 8 } else { 4 }, wide).unwrap_or(u64::MAX);
    let entries = number(directory, head).unwrap_or(0);
    let ats = (0..entries).map_while(|i| directory.checked_add(head)?.checked_add(i.checked_mul(entry)?));
    for at in ats.take_while(|&at| at < bytes.len() as u64) {
        let (Some(tag), Some(kind), Some(count)) = (number(at, 2), number(at + 2, 2), number(at + 4, wide)) else {
            break;
        };
        let size = match kind {
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16..=18 => 8,
            _ => 1,
        };
        if STANDARD.contains(&tag) && count.saturating_mul(size) > bytes.len() as u64 {
            return Err(Error::decode(format_args!(
                "broken TIFF: its tag {tag} announces {count} values, the file has {} bytes",
                bytes.len()
            )));
        }
    }
    Ok(())
}

/// What headers may make the crate allocate: eight bytes per allowed pixel for the image and for one of its strips.
fn memory(limits: &Limits) -> TiffLimits {
    let mut memory = TiffLimits::default();
    memory.decoding_buffer_size = usize::try_from(limits.pixels.saturating_mul(8)).unwrap_or(usize::MAX);
    memory.intermediate_buffer_size = memory.decoding_buffer_size;
    memory
}

/// Photometric interpretation of colours by index.
const PALETTE: u16 = 3;

/// Where the first directory of a classic TIFF keeps its photometric interpretation (tag 262), and its value.
fn photometric_at(bytes: &[u8]) -> Option<(usize, u16)> {
    let little = bytes.starts_with(b"II*");
    let short = |at: usize| {
        let pair = *bytes.get(at..)?.first_chunk()?;
        Some(if little { u16::from_le_bytes(pair) } else { u16::from_be_bytes(pair) })
    };
    let (a, b) = (u32::from(short(4)?), u32::from(short(6)?));
    let directory = (if little { a | b << 16 } else { a << 16 | b }) as usize;
    let entry = |i: u16| directory + 2 + 12 * usize::from(i);
    let found = (0..short(directory)?).map(entry).find(|&at| short(at) == Some(262))?;
    Some((found + 8, short(found + 8)?))
}

/// Pillow's modes "I;16", "I" and "F": clipped to bytes, fractions cut off.
fn gray(data: &DecodingResult, width: usize, height: usize, out: &mut Image) -> Option<()> {
    let values: Vec<u8> = match data {
        DecodingResult::U16(v) => v.iter().map(|&v| clipped(v.into())).collect(),
        DecodingResult::U32(v) => v.iter().map(|&v| (v as i32).clamp(0, 255) as u8).collect(),
        DecodingResult::I16(v) => v.iter().map(|&v| v.clamp(0, 255) as u8).collect(),
        DecodingResult::I32(v) => v.iter().map(|&v| v.clamp(0, 255) as u8).collect(),
        DecodingResult::F32(v) => v.iter().map(|&v| v as u8).collect(),
        DecodingResult::F64(v) => v.iter().map(|&v| v as f32 as u8).collect(),
        _ => return None,
    };
    out.reshape(width, height, Layout::Rgbx);
    for (pixel, value) in out.data.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        pixel.fill(value);
    }
    Some(())
}

fn premultiplied(tiff: &mut Decoder<Cursor<&[u8]>>) -> bool {
    tiff.find_tag_unsigned_vec::<u16>(Tag::ExtraSamples).ok().flatten().and_then(|v| v.first().copied()) == Some(1)
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
