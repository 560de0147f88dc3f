//! JPEG through libjpeg-turbo, the library inside Pillow.

#![forbid(unsafe_code)]

use super::libjpeg::{Decoder, Failure, JCS_CMYK, JCS_EXT_RGBX};
use super::{check_pixels, truncated};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let outcome = match decode_with(bytes, true, limits, out) {
        Err(Failed::Jpeg(Failure::Again)) => decode_with(bytes, false, limits, out),
        outcome => outcome,
    };
    outcome.map_err(|failed| match failed {
        Failed::Other(error) => error,
        Failed::Jpeg(Failure::Truncated | Failure::Again) => truncated("JPEG", bytes.len()),
        Failed::Jpeg(Failure::Corrupt(reason)) => Error::decode(format_args!("broken JPEG: {reason}")),
    })
}

enum Failed {
    Jpeg(Failure),
    Other(Error),
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self::Jpeg(failure)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

fn decode_with(bytes: &[u8], fast: bool, limits: &Limits, out: &mut Image) -> std::result::Result<(), Failed> {
    let mut decoder = Decoder::new(bytes)?;
    let header = decoder.header()?;
    check_pixels(header.width as u64, header.height as u64, limits)?;
    if header.precision != 8 {
        return Err(Failed::Other(Error::decode(format_args!(
            "JPEG with {} bits per sample; only 8 are supported: convert the file",
            header.precision
        ))));
    }
    let color_space = match header.components {
        1 | 3 => JCS_EXT_RGBX,
        4 => JCS_CMYK,
        other => {
            return Err(Failed::Other(Error::decode(format_args!(
                "JPEG with {other} components; 1 (gray), 3 (colour) and 4 (CMYK) are supported: convert the file"
            ))));
        }
    };
    out.reshape(header.width, header.height, Layout::Rgbx);
    decoder.pixels(color_space, fast, &mut out.data)?;
    if color_space == JCS_CMYK {
        cmyk_to_rgb(&mut out.data, true);
    }
    Ok(())
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
