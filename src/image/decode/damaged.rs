//! Files that end too early or are broken inside: those that Pillow reads all the same, and JPEGs that it shows as far as
//! they go under `LOAD_TRUNCATED_IMAGES`.

#![forbid(unsafe_code)]

use flate2::{Decompress, FlushDecompress, Status};

use super::format::Format;
use super::jpeg::cmyk_to_rgb;
use super::jpeg::layout::{JCS_CMYK, JCS_EXT_RGBX};
use super::jpeg::libjpeg::Decoder;
use super::limits::{check_claim, check_pixels};
use super::png::{EXPANSION, check_chunks, chunk};
use super::samples::{Samples, clipped, color_table};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};
use crate::memory;

/// What Pillow makes of a file that the decoders above refuse; `None` where it refuses too. With `accept`, pixels that
/// a JPEG misses are gray.
pub fn decode(bytes: &[u8], format: Format, limits: &Limits, accept: bool, out: &mut Image) -> Option<Result<()>> {
    match format {
        Format::Jpeg if accept => Some(jpeg(bytes, limits, out)),
        // Pillow does not look behind the last pixel: checksums and the end of the file may be missing.
        Format::Png => matches!(png(bytes, limits, out), Ok(true)).then_some(Ok(())),
        _ => None,
    }
}

/// With an end marker where the bytes end: libjpeg then fills up what is missing.
fn jpeg(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let mut ended = memory::zeroed(bytes.len() + 2)?;
    ended[..bytes.len()].copy_from_slice(bytes);
    ended[bytes.len()..].copy_from_slice(&[0xff, 0xd9]);
    let headless = || Error::decode("the JPEG ends or breaks before its first scan");
    let mut decoder = Decoder::new(&ended).map_err(|_| headless())?;
    let header = decoder.header().map_err(|_| headless())?;
    check_pixels(header.width as u64, header.height as u64, limits)?;
    let color_space = match (header.precision, header.components) {
        (8, 1 | 3) => JCS_EXT_RGBX,
        (8, 4) => JCS_CMYK,
        _ => return Err(headless()),
    };
    out.reshape(header.width, header.height, Layout::Rgbx)?;
    // Rows that libjpeg does not reach stay zero, in CMYK too: Pillow inverts only the rows it gets.
    let unreached = if color_space == JCS_CMYK { 255 } else { 0 };
    out.data.fill(unreached);
    // The rows before an error are kept, whatever the error is.
    let _ = decoder.pixels(color_space, &mut out.data);
    if color_space == JCS_CMYK {
        cmyk_to_rgb(&mut out.data, true);
    }
    Ok(())
}

/// First position, step: columns and rows of the seven passes.
const ADAM7: [[usize; 4]; 7] =
    [[0, 8, 0, 8], [4, 8, 0, 8], [0, 4, 4, 8], [2, 4, 0, 4], [0, 2, 2, 4], [1, 2, 0, 2], [0, 1, 1, 2]];

/// Row by row as the compressed data allows. Whether Pillow would find nothing missing.
fn png(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<bool> {
    let broken = || Error::decode("the PNG ends or breaks before its first pixel");
    let start = check_chunks(bytes)?;
    let (13, b"IHDR", header) = bytes.get(8..).and_then(chunk).ok_or_else(broken)? else { return Err(broken()) };
    let number = |at: usize| header[at..at + 4].iter().fold(0, |n, &b| n << 8 | usize::from(b));
    let (width, height, depth, color, interlaced) = (number(0), number(4), header[8], header[9], header[12] != 0);
    check_pixels(width as u64, height as u64, limits)?;
    let palette = palette(bytes, start);
    let wide = usize::from(depth / 8).max(1);
    let (samples, bits) = match (color, depth) {
        // Pillow clips 16-bit gray.
        (0, 16) => (None, 16),
        (0, 1 | 2 | 4 | 8) => (Some(Samples::Gray { bits: depth }), usize::from(depth)),
        (3, 1 | 2 | 4 | 8) => {
            let colors = palette.as_ref().ok_or_else(|| Error::decode("broken PNG: no palette"))?;
            (Some(Samples::Palette { bits: depth, colors }), usize::from(depth))
        }
        (2, 8 | 16) => (Some(Samples::Bytes { step: 3 * wide, rgb: [0, wide, 2 * wide] }), 24 * wide),
        (4, 8 | 16) => (Some(Samples::Bytes { step: 2 * wide, rgb: [0; 3] }), 16 * wide),
        (6, 8 | 16) => (Some(Samples::Bytes { step: 4 * wide, rgb: [0, wide, 2 * wide] }), 32 * wide),
        _ => return Err(broken()),
    };
    check_claim("PNG", (width as u64 * bits as u64).div_ceil(8) * height as u64, EXPANSION, bytes)?;
    out.reshape(width, height, Layout::Rgbx)?;
    let unreached = palette.filter(|_| color == 3).map_or([0; 3], |colors| colors[0]);
    out.data.as_chunks_mut::<4>().0.fill([unreached[0], unreached[1], unreached[2], 0]);
    memory::probe(bytes.len())?;
    let data = pixel_data(bytes, start);
    let mut inflate = Inflate { stream: Decompress::new(true), data: &data, ended: false };
    let whole = [[0, 1, 0, 1]];
    let passes = if interlaced { &ADAM7[..] } else { &whole[..] };
    let columns = |&[x0, dx, ..]: &[usize; 4]| width.saturating_sub(x0).div_ceil(dx);
    let rows = |pass: &[usize; 4]| if columns(pass) > 0 { height.saturating_sub(pass[2]).div_ceil(pass[3]) } else { 0 };
    let mut left: usize = passes.iter().map(rows).sum();
    for pass in passes.iter().filter(|pass| rows(pass) > 0) {
        let [x0, dx, y0, dy] = *pass;
        let mut line = vec![0; 1 + (columns(pass) * bits).div_ceil(8)];
        let mut above = vec![0; line.len()];
        let mut pixels = vec![0; 4 * columns(pass)];
        for y in (y0..height).step_by(dy) {
            left -= 1;
            if inflate.fill(&mut line).is_none()
                || (left == 0 && inflate.is_broken_behind())
                || unfilter(&mut line, &above, bits.div_ceil(8)).is_none()
            {
                return Ok(false);
            }
            match samples {
                Some(samples) => samples.unpack(&line[1..], &mut pixels),
                None => {
                    for (pixel, value) in pixels.as_chunks_mut::<4>().0.iter_mut().zip(line[1..].as_chunks::<2>().0) {
                        pixel.fill(clipped(u16::from_be_bytes(*value).into()));
                    }
                }
            }
            let row = out.data[4 * y * width..4 * (y + 1) * width].as_chunks_mut::<4>().0;
            for (target, pixel) in row.iter_mut().skip(x0).step_by(dx).zip(pixels.as_chunks::<4>().0) {
                *target = *pixel;
            }
            if inflate.ended {
                // A stream that ends with a row ends the picture, wherever that is.
                return Ok(true);
            }
            std::mem::swap(&mut line, &mut above);
        }
    }
    Ok(true)
}

fn palette(bytes: &[u8], end: usize) -> Option<[[u8; 3]; 256]> {
    let mut at = 8;
    while at < end {
        match chunk(bytes.get(at..)?)? {
            (length, b"PLTE", rest) => return rest.get(..length).map(color_table),
            (length, ..) => at += 12 + length,
        }
    }
    None
}

/// The contents of the consecutive IDAT chunks, the last one as far as it goes.
fn pixel_data(bytes: &[u8], mut at: usize) -> Vec<u8> {
    let mut data = Vec::new();
    while let Some((length, b"IDAT", rest)) = bytes.get(at..).and_then(chunk) {
        data.extend_from_slice(&rest[..length.min(rest.len())]);
        at += 12 + length;
    }
    data
}

struct Inflate<'a> {
    stream: Decompress,
    data: &'a [u8],
    ended: bool,
}

impl Inflate<'_> {
    /// `None` when the data ends or breaks before `line` is full.
    fn fill(&mut self, line: &mut [u8]) -> Option<()> {
        let mut filled = 0;
        while filled < line.len() {
            let (before_in, before_out) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.decompress(self.data, &mut line[filled..], FlushDecompress::None).ok()?;
            let (taken, made) = (self.stream.total_in() - before_in, self.stream.total_out() - before_out);
            self.data = &self.data[taken as usize..];
            filled += made as usize;
            self.ended = status == Status::StreamEnd;
            if filled < line.len() && (self.ended || taken + made == 0) {
                return None;
            }
        }
        Some(())
    }

    /// Whether the checksum behind the last row, as far as it is there, does not match: zlib looks at once.
    fn is_broken_behind(&mut self) -> bool {
        self.stream.decompress(self.data, &mut [0], FlushDecompress::None).is_err()
    }
}

/// Undoes the filter that the first byte names. `None` when there is no such filter.
fn unfilter(line: &mut [u8], above: &[u8], pixel: usize) -> Option<()> {
    let filter = line[0];
    for i in 1..line.len() {
        let left = if i > pixel { line[i - pixel] } else { 0 };
        let corner = if i > pixel { above[i - pixel] } else { 0 };
        let predicted = match filter {
            0 => return Some(()),
            1 => left,
            2 => above[i],
            3 => ((u16::from(left) + u16::from(above[i])) / 2) as u8,
            4 => paeth(left, above[i], corner),
            _ => return None,
        };
        line[i] = line[i].wrapping_add(predicted);
    }
    Some(())
}

fn paeth(left: u8, above: u8, corner: u8) -> u8 {
    let [a, b, c] = [left, above, corner].map(i16::from);
    let [pa, pb, pc] = [b - c, a - c, a + b - 2 * c].map(i16::abs);
    if pa <= pb && pa <= pc {
        left
    } else if pb <= pc {
        above
    } else {
        corner
    }
}
