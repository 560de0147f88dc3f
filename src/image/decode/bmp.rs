//! Windows and OS/2 bitmaps: 1, 4, 8, 16, 24 and 32 bits, the usual channel masks, RLE4 and RLE8.

#![forbid(unsafe_code)]

use std::borrow::Cow;

use super::limits::{check_pixels, truncated};
use super::samples::{Samples, fill_rows, packed};
use crate::error::{Error, Result};
use crate::image::{Image, Limits};

struct BmpHeader {
    width: usize,
    height: usize,
    top_down: bool,
    bits: u16,
    compression: u32,
    colors: usize,
    /// Red, green, blue and alpha.
    masks: [u32; 4],
    /// Bytes per palette entry.
    entry: usize,
    palette_at: usize,
    pixels_at: usize,
}

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let header = read_header(bytes).ok_or_else(|| truncated("BMP", bytes.len()))??;
    check_pixels(header.width as u64, header.height as u64, limits)?;
    let colors = palette(bytes, &header)?;
    let pixels = bytes.get(header.pixels_at..).unwrap_or(&[]);
    let (samples, data, stride) = match (header.compression, header.bits) {
        (1, 8) | (2, 4) => {
            let indices = run_lengths(pixels, &header)?.ok_or_else(|| truncated("BMP", bytes.len()))?;
            (Samples::Palette { bits: 8, colors: &colors }, Cow::from(indices), header.width)
        }
        (0, 1 | 4 | 8) => {
            let stride = (header.width * header.bits as usize).div_ceil(32) * 4;
            (Samples::Palette { bits: header.bits as u8, colors: &colors }, pixels.into(), stride)
        }
        (0 | 3, 16) => {
            let stride = (header.width * 2).div_ceil(4) * 4;
            let green_bits = match (header.compression, header.masks) {
                (0, _) | (3, [0x7c00, 0x3e0, 0x1f, _]) => 5,
                (3, [0xf800, 0x7e0, 0x1f, _]) => 6,
                _ => return Err(unsupported(&header)),
            };
            (Samples::Short { green_bits }, pixels.into(), stride)
        }
        (0 | 3, 24) => {
            if header.compression == 3 && header.masks[..3] != [0xff_0000, 0xff00, 0xff] {
                return Err(unsupported(&header));
            }
            (Samples::Bytes { step: 3, rgb: [2, 1, 0] }, pixels.into(), (header.width * 3).div_ceil(4) * 4)
        }
        (0 | 3, 32) => {
            let rgb = match (header.compression, header.masks) {
                (0, _) | (_, [0xff_0000, 0xff00, 0xff, 0 | 0xff00_0000] | [0, 0, 0, 0]) => [2, 1, 0],
                (_, [0xff00_0000, 0xff_0000, 0xff00, 0 | 0xff]) => [3, 2, 1],
                (_, [0xff00_0000, 0xff00, 0xff, 0 | 0xff_0000]) => [3, 1, 0],
                (_, [0xff, 0xff00, 0xff_0000, 0xff00_0000]) => [0, 1, 2],
                _ => return Err(unsupported(&header)),
            };
            (Samples::Bytes { step: 4, rgb }, pixels.into(), 4 * header.width)
        }
        _ => return Err(unsupported(&header)),
    };
    let cut = || truncated("BMP", bytes.len());
    fill_rows((header.width, header.height), out, samples, &data, stride, !header.top_down, cut)
}

fn unsupported(header: &BmpHeader) -> Error {
    Error::unsupported(format_args!(
        "BMP with {} bits per pixel, compression {} and masks {:x?} is not supported: convert the file",
        header.bits, header.compression, header.masks
    ))
}

/// `None` when the file ends inside.
fn read_header(bytes: &[u8]) -> Option<Result<BmpHeader>> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let offset = u32_at(10)? as usize;
    let size = u32_at(14)? as usize;
    let mut header = BmpHeader {
        width: 0,
        height: 0,
        top_down: false,
        bits: 0,
        compression: 0,
        colors: 0,
        masks: [0; 4],
        entry: 4,
        palette_at: 14 + size,
        pixels_at: offset,
    };
    match size {
        12 => {
            (header.width, header.height) = (u16_at(18)?.into(), u16_at(20)?.into());
            header.bits = u16_at(24)?;
            header.entry = 3;
        }
        40 | 52 | 56 | 64 | 108 | 124 => {
            let height = u32_at(22)?;
            // As Pillow: heights are negative when their highest byte is 0xff.
            header.top_down = height >> 24 == 0xff;
            header.width = u32_at(18)? as usize;
            header.height = if header.top_down { height.wrapping_neg() } else { height } as usize;
            header.bits = u16_at(28)?;
            header.compression = u32_at(30)?;
            header.colors = u32_at(46)? as usize;
            if header.compression == 3 {
                let alpha = if size >= 56 { u32_at(66)? } else { 0 };
                header.masks = [u32_at(54)?, u32_at(58)?, u32_at(62)?, alpha];
                if size == 40 {
                    header.palette_at += 12;
                }
            }
        }
        other => return Some(Err(Error::unsupported(format_args!("BMP with an unknown header of {other} bytes")))),
    }
    if offset == 0 {
        return Some(Err(Error::unsupported(
            "BMP that does not say where its pixels are is not supported: convert the file",
        )));
    }
    if header.colors == 0 && header.bits <= 8 {
        header.colors = 1 << header.bits;
    }
    if offset == 14 + size && header.bits <= 8 {
        // Some writers forget the palette when they say where the pixels are.
        header.pixels_at = offset + header.entry * header.colors;
    }
    Some(Ok(header))
}

/// The colours of an indexed bitmap; a palette that is a plain gray ramp stands for all 256 grays, as in Pillow.
fn palette(bytes: &[u8], header: &BmpHeader) -> Result<[[u8; 3]; 256]> {
    let mut table = [[0; 3]; 256];
    if header.bits > 8 {
        return Ok(table);
    }
    if header.colors > 256 {
        return Err(Error::unsupported(format_args!("BMP with a palette of {} colours", header.colors)));
    }
    let end = (header.palette_at + header.entry * header.colors).min(bytes.len());
    let entries = bytes.get(header.palette_at..end).unwrap_or(&[]);
    for (color, entry) in table.iter_mut().zip(entries.chunks_exact(header.entry)) {
        *color = [entry[2], entry[1], entry[0]];
    }
    let colors = header.colors.min(256);
    if header.colors != 2 && colors == header.colors && (0..colors).all(|i| table[i] == [i as u8; 3]) {
        table = std::array::from_fn(|i| [i as u8; 3]);
    }
    Ok(table)
}

/// Run-length coded indices, one byte each, bottom row first. `None` when the file ends before the picture does.
fn run_lengths(bytes: &[u8], header: &BmpHeader) -> Result<Option<Vec<u8>>> {
    let (width, total, four) = (header.width, header.width * header.height, header.compression == 2);
    let mut out = Vec::new();
    out.try_reserve_exact(total).map_err(|_| Error::memory(total))?;
    let mut at = 0;
    let mut x = 0;
    while out.len() < total {
        let (Some(&count), Some(&value)) = (bytes.get(at), bytes.get(at + 1)) else { break };
        at += 2;
        if count > 0 {
            let count = usize::from(count).min(width.saturating_sub(x));
            out.extend((0..count).map(|i| if four { packed(&[value], i % 2, 4) } else { value }));
            x += count;
            continue;
        }
        match value {
            0 => {
                out.resize(out.len().next_multiple_of(width), 0);
                x = 0;
            }
            1 => break,
            2 => {
                let (Some(&right), Some(&up)) = (bytes.get(at), bytes.get(at + 1)) else { break };
                at += 2;
                let skip = usize::from(right) + usize::from(up) * width;
                out.resize((out.len() + skip).min(total), 0);
                x = out.len() % width;
            }
            literal => {
                let count = usize::from(literal).min(total - out.len());
                let length = if four { count.div_ceil(2) } else { count };
                let data = &bytes[at..(at + length).min(bytes.len())];
                at += length;
                out.extend(
                    (0..count.min(data.len() * if four { 2 } else { 1 }))
                        .map(|i| if four { packed(data, i, 4) } else { data[i] }),
                );
                if data.len() < length || out.len() == total {
                    break;
                }
                x += usize::from(literal);
                // Literals are padded to 16 bits, counted from the start of the file.
                at += (header.pixels_at + at) % 2;
            }
        }
    }
    Ok(Some(out).filter(|out| out.len() >= total))
}
