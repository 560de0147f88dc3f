//! WebP, lossy and lossless; of an animation the first frame.

#![forbid(unsafe_code)]

use std::io::Cursor;

use image_webp::{DecodingError, WebPDecoder};

use super::{Samples, check_pixels, fill_rows, truncated};
use crate::error::{Error, Result};
use crate::image::{Image, Limits};

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let failed = |error| match error {
        DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => truncated("WebP", bytes.len()),
        DecodingError::BitStreamError => truncated("WebP", bytes.len()),
        other => Error::decode(format_args!("broken WebP: {other}")),
    };
    let promised = bytes.get(4..).and_then(|rest| rest.first_chunk()).map_or(0, |size| u32::from_le_bytes(*size));
    if bytes.len() < 8 + promised as usize {
        // The pixels may be complete without the last bytes; libwebp refuses the file all the same.
        return Err(truncated("WebP", bytes.len()));
    }
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_pixels(width.into(), height.into(), limits)?;
    let size = decoder.output_buffer_size().ok_or_else(|| Error::decode("the WebP does not fit into memory"))?;
    let mut samples = vec![0; size];
    decoder.read_image(&mut samples).map_err(failed)?;
    let step = if decoder.has_alpha() { 4 } else { 3 };
    let size = (width as usize, height as usize);
    fill_rows(size, out, Samples::Bytes { step, rgb: [0, 1, 2] }, &samples, size.0 * step, false)
        .ok_or_else(|| truncated("WebP", bytes.len()))
}
