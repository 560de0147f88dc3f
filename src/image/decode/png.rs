//! PNG; the crate unfilters and deinterlaces, the samples are interpreted here, as Pillow does.

use std::io::Cursor;

use ::png::{BitDepth, ColorType, Decoder, DecodingError, Transformations};

use super::{Samples, check_pixels, clipped, color_table, fill_rows, truncated};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    check_header_chunks(bytes)?;
    let failed = |error| match error {
        DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => truncated("PNG", bytes.len()),
        other => Error::decode(format_args!("broken PNG: {other}")),
    };
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(Transformations::IDENTITY);
    // Pillow compares checksums up to the first IDAT (done above), not those of the pixels.
    decoder.ignore_checksums(true);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let header = decoder.read_header_info().map_err(failed)?;
    check_pixels(header.width.into(), header.height.into(), limits)?;
    let mut reader = decoder.read_info().map_err(failed)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let size = reader.output_buffer_size().ok_or_else(|| Error::decode("the PNG does not fit into memory"))?;
    let mut samples = vec![0; size];
    let frame = reader.next_frame(&mut samples).map_err(failed)?;
    let bits = frame.bit_depth as u8;
    let lines = |y: usize| samples.get(y * frame.line_size..(y + 1) * frame.line_size);
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
            return fill_rows(width, height, out, Samples::Palette { bits, colors: &colors }, lines)
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
    fill_rows(width, height, out, kind, lines).ok_or_else(|| truncated("PNG", bytes.len()))
}

/// Checksums of the chunks in front of the pixels: a wrong palette or size would go unnoticed.
fn check_header_chunks(bytes: &[u8]) -> Result<()> {
    let mut rest = &bytes[8..];
    loop {
        let Some(([length, name], body)) = rest.split_first_chunk::<8>().map(|(head, body)| {
            let (length, name) = head.split_at(4);
            ([length, name], body)
        }) else {
            return Err(truncated("PNG", bytes.len()));
        };
        if name == b"IDAT" {
            return Ok(());
        }
        let length = length.iter().fold(0usize, |n, &b| n << 8 | b as usize);
        let Some((data, after)) = body.split_at_checked(length) else {
            return Err(truncated("PNG", bytes.len()));
        };
        let Some((sum, after)) = after.split_first_chunk::<4>() else {
            return Err(truncated("PNG", bytes.len()));
        };
        let mut crc = flate2::Crc::new();
        crc.update(name);
        crc.update(data);
        if crc.sum() != u32::from_be_bytes(*sum) {
            return Err(Error::decode(format_args!(
                "broken PNG: the checksum of its {} chunk does not match",
                String::from_utf8_lossy(name)
            )));
        }
        rest = after;
    }
}
