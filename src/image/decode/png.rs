//! PNG; the crate unfilters and deinterlaces, the samples are interpreted here, as Pillow does.

#![forbid(unsafe_code)]

use std::io::Cursor;

use ::png::{BitDepth, ColorType, DecodeOptions, Decoder, DecodingError, Transformations};

use super::{Samples, check_pixels, clipped, color_table, fill_rows, truncated};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    check_header_chunks(bytes)?;
    let failed = |error| match error {
        DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => truncated("PNG", bytes.len()),
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
    let mut samples = vec![0; size];
    let frame = reader.next_frame(&mut samples).map_err(failed)?;
    let bits = frame.bit_depth as u8;
    let kind = match (frame.color_type, frame.bit_depth) {
        (ColorType::Grayscale, BitDepth::Sixteen) => {
            out.reshape(width, height, Layout::Rgbx);
            for (pixel, value) in out.data.as_chunks_mut::<4>().0.iter_mut().zip(samples.as_chunks::<2>().0) {
                pixel.fill(clipped(u16::from_be_bytes(*value).into()));
            }
            return Ok(());
        }
        (ColorType::Indexed, _) => {
            let palette = reader.info().palette.as_deref().ok_or_else(|| Error::decode("broken PNG: no palette"))?;
            let colors = color_table(palette);
            let kind = Samples::Palette { bits, colors: &colors };
            return fill_rows((width, height), out, kind, &samples, frame.line_size, false)
                .ok_or_else(|| truncated("PNG", bytes.len()));
        }
        (ColorType::Grayscale, _) => Samples::Gray { bits },
        (ColorType::Rgb, BitDepth::Sixteen) => Samples::Bytes { step: 6, rgb: [0, 2, 4] },
        (ColorType::Rgb, _) => Samples::Bytes { step: 3, rgb: [0, 1, 2] },
        (ColorType::Rgba, BitDepth::Sixteen) => Samples::Bytes { step: 8, rgb: [0, 2, 4] },
        (ColorType::Rgba, _) => Samples::Bytes { step: 4, rgb: [0, 1, 2] },
        (ColorType::GrayscaleAlpha, BitDepth::Sixteen) => Samples::Bytes { step: 4, rgb: [0; 3] },
        (ColorType::GrayscaleAlpha, _) => Samples::Bytes { step: 2, rgb: [0; 3] },
    };
    fill_rows((width, height), out, kind, &samples, frame.line_size, false).ok_or_else(|| truncated("PNG", bytes.len()))
}

/// Length, name and the rest from the data on.
pub(super) fn chunk(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    let (length, name) = head.split_at(4);
    Some((length.iter().fold(0, |n, &b| n << 8 | b as usize), name, rest))
}

/// Checksums of the chunks in front of the pixels: a wrong palette or size would go unnoticed. Gives the position of
/// the first chunk of pixels.
pub(super) fn check_header_chunks(bytes: &[u8]) -> Result<usize> {
    let mut at = 8;
    let cut = || truncated("PNG", bytes.len());
    loop {
        let (length, name, rest) = chunk(&bytes[at..]).ok_or_else(cut)?;
        if name == b"IDAT" {
            return Ok(at);
        }
        let (data, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
        let sum = rest.first_chunk::<4>().ok_or_else(cut)?;
        let mut crc = flate2::Crc::new();
        crc.update(name);
        crc.update(data);
        if crc.sum() != u32::from_be_bytes(*sum) {
            return Err(Error::decode(format_args!(
                "broken PNG: the checksum of its {} chunk does not match",
                String::from_utf8_lossy(name)
            )));
        }
        at += 12 + length;
    }
}
