//! JPEG through libjpeg-turbo, the library inside Pillow.

#![forbid(unsafe_code)]

use super::libjpeg::{Decoder, Failure, JCS_CMYK, JCS_EXT_RGBX};
use super::{check_claim, check_pixels, truncated};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits, Size};

/// Who decodes the Huffman codes, most of the work in a JPEG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entropy {
    Libjpeg,
    Own,
}

pub fn decode(bytes: &[u8], limits: &Limits, size: Option<Size>, out: &mut Image) -> Result<()> {
    decode_jpeg(Entropy::Own, bytes, limits, size, out).map(|_| ())
}

/// A JPEG with a chosen entropy decoder, for tests and benchmarks, and who did it in the end: progressive and arithmetic
/// JPEGs and whatever is unsound are libjpeg's.
///
/// # Errors
/// As [`super::decode()`].
pub fn decode_jpeg(
    entropy: Entropy,
    bytes: &[u8],
    limits: &Limits,
    size: Option<Size>,
    out: &mut Image,
) -> Result<Entropy> {
    let failed = |failure| match failure {
        Failure::Truncated => truncated("JPEG", bytes.len()),
        Failure::Corrupt(reason) => Error::decode(format_args!("broken JPEG: {reason}")),
        // Progressive ones keep two bytes per sample.
        Failure::Memory => Error::memory(bytes.len()),
    };
    let mut decoder = Decoder::new(bytes).map_err(failed)?;
    let header = decoder.header().map_err(failed)?;
    check_pixels(header.width as u64, header.height as u64, limits)?;
    if header.precision != 8 {
        return Err(Error::decode(format_args!(
            "JPEG with {} bits per sample; only 8 are supported: convert the file",
            header.precision
        )));
    }
    if !header.arithmetic {
        // A block of 8 x 8 has at least one bit. (An end marker in the middle is allowed: Pillow may judge it.)
        check_claim("JPEG", header.width as u64 * header.height as u64, 8 * 64, bytes)?;
    }
    let color_space = match header.components {
        1 | 3 => JCS_EXT_RGBX,
        4 => JCS_CMYK,
        other => {
            return Err(Error::decode(format_args!(
                "JPEG with {other} components; 1 (gray), 3 (colour) and 4 (CMYK) are supported: convert the file"
            )));
        }
    };
    let (width, height) = match size {
        Some(size) => decoder.scale(denominator(size, header.height, header.width)?),
        None => (header.width, header.height),
    };
    out.reshape(width, height, Layout::Rgbx)?;
    let used = match entropy {
        Entropy::Libjpeg => decoder.pixels(color_space, &mut out.data).map(|()| Some(false)),
        Entropy::Own => decoder.pixels_fast(color_space, &mut out.data),
    };
    let Some(own) = used.map_err(failed)? else {
        return decode_jpeg(Entropy::Libjpeg, bytes, limits, size, out);
    };
    if color_space == JCS_CMYK {
        cmyk_to_rgb(&mut out.data, true);
    }
    Ok(if own { Entropy::Own } else { Entropy::Libjpeg })
}

/// The most that a file of `height x width` can be scaled down by without falling below `size`.
fn denominator(size: Size, height: usize, width: usize) -> Result<usize> {
    let (new_height, new_width) = size.resolve(height, width)?;
    let scale = (height / new_height).min(width / new_width);
    Ok([8, 4, 2].into_iter().find(|&d| scale >= d).unwrap_or(1))
}

/// Four-byte CMYK pixels to RGBX in place. Adobe writes CMYK JPEGs inverted, and Pillow takes all of them to be Adobe's.
pub fn cmyk_to_rgb(data: &mut [u8], inverted: bool) {
    let flip = if inverted { 255 } else { 0 };
    for pixel in data.chunks_exact_mut(4) {
        let paper = 255 - u32::from(pixel[3] ^ flip);
        for ink in &mut pixel[..3] {
            let t = u32::from(*ink ^ flip) * paper + 128;
            // t / 255, rounded, as Pillow's MULDIV255; never more than `paper`.
            *ink = (paper - (((t >> 8) + t) >> 8)) as u8;
        }
    }
}
