//! WebP, lossy and lossless; of an animation the first frame.

#![forbid(unsafe_code)]

use std::io::Cursor;

use image_webp::{DecodingError, WebPDecoder};

use super::limits::{check_pixels, truncated};
use super::samples::{Samples, fill_rows};
use crate::error::{Error, Result};
use crate::image::{Image, Limits};
use crate::memory;

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
    let own = unblended(bytes)?;
    let mut decoder = WebPDecoder::new(Cursor::new(own.as_deref().unwrap_or(bytes))).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_pixels(width.into(), height.into(), limits)?;
    check_chunks(&bytes[..8 + promised as usize], u64::from(width) * u64::from(height))?;
    let size = decoder.output_buffer_size().ok_or_else(|| Error::decode("the WebP does not fit into memory"))?;
    let mut samples = memory::zeroed(size)?;
    // What the crate takes for itself: planes and a frame of four bytes per pixel at most.
    memory::probe(8 * (width as usize) * (height as usize))?;
    decoder.read_image(&mut samples).map_err(failed)?;
    let step = if decoder.has_alpha() { 4 } else { 3 };
    let size = (width as usize, height as usize);
    let cut = || truncated("WebP", bytes.len());
    fill_rows(size, out, Samples::Bytes { step, rgb: [0, 1, 2] }, &samples, size.0 * step, false, cut)
}

/// A copy whose first frame is not to be blended, where it is: nothing lies below it, as libwebp knows and the crate does
/// not, which blends onto black.
fn unblended(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    const KEEP: u8 = 2;
    let Some(at) = first_frame(bytes).filter(|&at| bytes[at] & KEEP == 0) else { return Ok(None) };
    let mut own = Vec::new();
    memory::resize(&mut own, bytes.len())?;
    own.copy_from_slice(bytes);
    own[at] |= KEEP;
    Ok(Some(own))
}

/// Where the flags of an animation's first frame are.
fn first_frame(bytes: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        let (name, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
        if name == b"ANMF" {
            // Offsets, size and duration, three bytes each, come before.
            return Some(at + 8 + 15).filter(|&at| at < bytes.len());
        }
        let length = u32::from_le_bytes(*rest.first_chunk()?) as usize;
        at = at.checked_add(8 + length + length % 2)?;
    }
}

/// As libwebp, no chunk beyond the end that the file announces, and no unknown flags.
///
/// The decoder takes memory for what a lossy frame says about its size before it compares that with the picture's.
fn check_chunks(bytes: &[u8], pixels: u64) -> Result<()> {
    let mut at = 12;
    while let Some((name, rest)) = bytes.get(at..).and_then(|rest| rest.split_first_chunk::<4>())
        && let Some((length, data)) = rest.split_first_chunk::<4>()
    {
        let length = u32::from_le_bytes(*length) as usize;
        // Behind the start code, two more bits each say how to scale.
        if let (b"VP8 ", [_, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1, ..]) = (name, data) {
            let (width, height) = (u16::from_le_bytes([*w0, *w1]) & 0x3fff, u16::from_le_bytes([*h0, *h1]) & 0x3fff);
            if u64::from(width) * u64::from(height) > pixels {
                return Err(Error::decode(format_args!(
                    "broken WebP: a frame of {width} x {height} in a picture of {pixels} pixels"
                )));
            }
        }
        if length + length % 2 > data.len() {
            return Err(truncated("WebP", bytes.len()));
        }
        if let (b"VP8X", [flags, ..]) = (name, data)
            && flags & 0xc1 != 0
        {
            return Err(Error::unsupported(format_args!(
                "WebP with flags {flags:#x} is not supported: convert the file"
            )));
        }
        // The chunks of an animation's frame follow 16 bytes about it.
        at += 8 + if name == b"ANMF" { 16 } else { length + length % 2 };
    }
    Ok(())
}
