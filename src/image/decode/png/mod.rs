//! PNG; the crate unfilters and deinterlaces, the samples are interpreted here, as Pillow does.

#![forbid(unsafe_code)]

mod chunks;

use std::io::Cursor;

use ::png::{BitDepth, ColorType, DecodeOptions, Decoder, DecodingError, Transformations};

pub(super) use self::chunks::{check as check_chunks, chunk, is_animated};
use super::limits::{check_claim, check_pixels, truncated};
use super::samples::{Samples, clipped, color_table, fill_rows};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};
use crate::memory;

/// As many bytes as one of a deflated stream becomes at most.
pub(super) const EXPANSION: u64 = 1032;

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    chunks::check(bytes)?;
    let cut = || truncated("PNG", bytes.len());
    let failed = |error| match error {
        DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => cut(),
        other => Error::decode(format_args!("broken PNG: {other}")),
    };
    let mut options = DecodeOptions::default();
    // Pillow compares chunk checksums up to the first IDAT (done above), and the one of the compressed pixels.
    options.set_ignore_crc(true);
    options.set_ignore_adler32(false);
    options.set_ignore_text_chunk(true);
    options.set_ignore_iccp_chunk(true);
    let mut decoder = Decoder::new_with_options(Cursor::new(bytes), options);
    decoder.set_transformations(Transformations::IDENTITY);
    let header = decoder.read_header_info().map_err(failed)?;
    check_pixels(header.width.into(), header.height.into(), limits)?;
    let mut reader = decoder.read_info().map_err(failed)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let size = reader.output_buffer_size().ok_or_else(|| Error::decode("the PNG does not fit into memory"))?;
    check_claim("PNG", size as u64, EXPANSION, bytes)?;
    let mut samples = memory::zeroed(size)?;
    let frame = reader.next_frame(&mut samples).map_err(failed)?;
    let bits = frame.bit_depth as u8;
    let kind = match (frame.color_type, frame.bit_depth) {
        (ColorType::Grayscale, BitDepth::Sixteen) => {
            out.reshape(width, height, Layout::Rgbx)?;
            for (pixel, value) in out.data.as_chunks_mut::<4>().0.iter_mut().zip(samples.as_chunks::<2>().0) {
                pixel.fill(clipped(u16::from_be_bytes(*value).into()));
            }
            return Ok(());
        }
        (ColorType::Indexed, _) => {
            let palette = reader.info().palette.as_deref().ok_or_else(|| Error::decode("broken PNG: no palette"))?;
            let colors = color_table(palette);
            let kind = Samples::Palette { bits, colors: &colors };
            return fill_rows((width, height), out, kind, &samples, frame.line_size, false, cut);
        }
        (ColorType::Grayscale, _) => Samples::Gray { bits },
        (ColorType::Rgb, BitDepth::Sixteen) => Samples::Bytes { step: 6, rgb: [0, 2, 4] },
        (ColorType::Rgb, _) => Samples::Bytes { step: 3, rgb: [0, 1, 2] },
        (ColorType::Rgba, BitDepth::Sixteen) => Samples::Bytes { step: 8, rgb: [0, 2, 4] },
        (ColorType::Rgba, _) => Samples::Bytes { step: 4, rgb: [0, 1, 2] },
        (ColorType::GrayscaleAlpha, BitDepth::Sixteen) => Samples::Bytes { step: 4, rgb: [0; 3] },
        (ColorType::GrayscaleAlpha, _) => Samples::Bytes { step: 2, rgb: [0; 3] },
    };
    fill_rows((width, height), out, kind, &samples, frame.line_size, false, cut)
}
