//! WebP, lossy and lossless; of an animation the first frame.

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
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_pixels(width.into(), height.into(), limits)?;
    let size = decoder.output_buffer_size().ok_or_else(|| Error::decode("the WebP does not fit into memory"))?;
    let mut samples = vec![0; size];
    decoder.read_image(&mut samples).map_err(failed)?;
    let step = if decoder.has_alpha() { 4 } else { 3 };
    let (width, height) = (width as usize, height as usize);
    let line = |y: usize| samples.get(y * width * step..(y + 1) * width * step);
    fill_rows(width, height, out, Samples::Bytes { step, rgb: [0, 1, 2] }, line)
        .ok_or_else(|| truncated("WebP", bytes.len()))
}
