//! GIF: the first frame on its screen, in palette indices until the end, as Pillow keeps it.

#![forbid(unsafe_code)]

use ::gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::limits::{check_claim, check_pixels, truncated};
use super::samples::color_table;
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};
use crate::memory;

pub fn decode(file: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let bytes = whole_blocks(file);
    let failed = |error: DecodingError| match error {
        DecodingError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => truncated("GIF", file.len()),
        other => Error::decode(format_args!("broken GIF: {other}")),
    };
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    // The limits below are checked before the frame is read.
    options.set_memory_limit(MemoryLimit::Unlimited);
    let mut decoder = options.read_info(bytes).map_err(failed)?;
    let screen = (usize::from(decoder.width()), usize::from(decoder.height()));
    let frame = decoder.next_frame_info().map_err(failed)?;
    let frame = frame.ok_or_else(|| Error::decode("broken GIF: it has no frame"))?.clone();
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    if frame_width == 0 || frame_height == 0 {
        return Err(Error::decode("broken GIF: its first frame is empty"));
    }
    // A frame that sticks out enlarges the screen.
    let (width, height) = (screen.0.max(left + frame_width), screen.1.max(top + frame_height));
    check_pixels(width as u64, height as u64, limits)?;
    // Strings of at most 4096 pixels in 12 bits.
    check_claim("GIF", (frame_width * frame_height) as u64, 2731, bytes)?;
    let mut indices = memory::zeroed(frame_width * frame_height)?;
    decoder.read_into_buffer(&mut indices).map_err(failed)?;
    let palette = frame.palette.as_deref().or(decoder.global_palette()).unwrap_or(&[]);
    let mut colors = color_table(palette);
    if palette.as_chunks::<3>().0.iter().enumerate().all(|(i, color)| *color == [i as u8; 3]) {
        // Pillow drops a palette that says "index = gray": then indices behind its end are gray too, not black.
        colors = std::array::from_fn(|i| [i as u8; 3]);
    }
    let outside = colors[usize::from(frame.transparent.unwrap_or(0))];
    out.reshape(width, height, Layout::Rgbx)?;
    for (y, row) in out.data.chunks_exact_mut(4 * width).enumerate() {
        let line = y.checked_sub(top).filter(|y| *y < frame_height);
        for (x, pixel) in row.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let x = x.checked_sub(left).filter(|x| *x < frame_width);
            let color = line.zip(x).map_or(outside, |(y, x)| colors[usize::from(indices[y * frame_width + x])]);
            pixel[..3].copy_from_slice(&color);
        }
    }
    Ok(())
}

/// The file without a data block that its end cuts short: Pillow starts no block that is not complete.
fn whole_blocks(bytes: &[u8]) -> &[u8] {
    let color_table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) };
    let mut at = 13 + color_table(bytes.get(10).copied().unwrap_or(0));
    loop {
        let frame = match bytes.get(at) {
            Some(b'!') => false,
            Some(b',') => true,
            _ => return bytes,
        };
        at += 2;
        if frame {
            at += 9 + color_table(bytes.get(at + 7).copied().unwrap_or(0));
        }
        while let Some(&length @ 1..) = bytes.get(at) {
            let next = at + 1 + usize::from(length);
            if next > bytes.len() {
                return &bytes[..at];
            }
            at = next;
        }
        at += 1;
        if frame {
            return bytes;
        }
    }
}
