//! PBM, PGM and PPM, plain and raw.

#![forbid(unsafe_code)]

use super::limits::{check_claim, check_pixels, truncated};
use super::samples::clipped;
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits};

pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    let kind = bytes[1];
    let mut reader = Reader { bytes, at: 2 };
    let cut = || truncated("PNM", bytes.len());
    let width = reader.header_number()?.ok_or_else(cut)?;
    let height = reader.header_number()?.ok_or_else(cut)?;
    check_pixels(width.into(), height.into(), limits)?;
    let channels = if matches!(kind, b'3' | b'6') { 3 } else { 1 };
    let bitmap = matches!(kind, b'1' | b'4');
    let maxval = if bitmap { 1 } else { reader.header_number()?.ok_or_else(cut)? };
    if !(1..65536).contains(&maxval) {
        return Err(Error::decode(format_args!("PNM with a maximum of {maxval}; it must be within 1..=65535")));
    }
    // Numbers are a digit and a blank at least, but for the last.
    let row_bytes = match kind {
        b'1' => u64::from(width),
        b'4' => u64::from(width).div_ceil(8),
        b'2' | b'3' => 2 * channels as u64 * u64::from(width),
        _ => channels as u64 * u64::from(width) * if maxval < 256 { 1 } else { 2 },
    };
    check_claim("PNM", (row_bytes * u64::from(height)).saturating_sub(1), 1, bytes)?;
    let (width, height) = (width as usize, height as usize);
    out.reshape(width, height, Layout::Rgbx)?;
    let gray16 = channels == 1 && maxval > 255;
    let scale = |value: u32| -> u8 {
        match (bitmap, gray16) {
            (true, _) => 255 * u8::from(value == 0),
            // Pillow's mode "I" reaches 65535 and is clipped on its way to RGB.
            (_, true) => clipped(round_half_even(value, maxval, 65535).min(65535)),
            _ => round_half_even(value, maxval, 255).min(255) as u8,
        }
    };
    for row in out.data.chunks_exact_mut(4 * width) {
        let packed_row = if kind == b'4' { reader.take(width.div_ceil(8)).ok_or_else(cut)? } else { &[] };
        for (x, pixel) in row.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for sample in &mut pixel[..channels] {
                let value = match kind {
                    b'1' => reader.digit()?.ok_or_else(cut)?,
                    b'4' => u32::from(packed_row[x / 8] >> (7 - x % 8) & 1),
                    b'2' | b'3' => reader.number()?.ok_or_else(cut)?,
                    _ if maxval < 256 => u32::from(reader.take(1).ok_or_else(cut)?[0]),
                    _ => reader.take(2).ok_or_else(cut)?.iter().fold(0, |v, &b| v << 8 | u32::from(b)),
                };
                if value > maxval && matches!(kind, b'2' | b'3') {
                    return Err(Error::decode(format_args!("broken PNM: value {value} is above its maximum {maxval}")));
                }
                *sample = scale(value);
            }
            if channels == 1 {
                *pixel = [pixel[0]; 4];
            }
        }
    }
    // Pillow looks at what follows a plain bitmap.
    while kind == b'1' && reader.digit()?.is_some() {}
    Ok(())
}

/// Python's `round(value / maxval * top)`, in its floats.
fn round_half_even(value: u32, maxval: u32, top: u32) -> u32 {
    if maxval == top {
        return value;
    }
    (f64::from(value) / f64::from(maxval) * f64::from(top)).round_ties_even() as u32
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(taken)
    }

    /// The next byte that belongs to neither white space nor a comment.
    fn skip_blank(&mut self) -> Option<u8> {
        loop {
            match self.bytes.get(self.at)? {
                b'#' => self.at += self.bytes[self.at..].iter().position(|b| matches!(b, b'\n' | b'\r'))?,
                b if is_space(*b) => self.at += 1,
                &b => return Some(b),
            }
        }
    }

    /// A number of the header and the one white-space byte behind it.
    fn header_number(&mut self) -> Result<Option<u32>> {
        let value = self.number()?;
        let whole = self.at < self.bytes.len();
        self.at += 1;
        Ok(value.filter(|_| whole))
    }

    fn number(&mut self) -> Result<Option<u32>> {
        if self.skip_blank().is_none() {
            return Ok(None);
        }
        let rest = &self.bytes[self.at..];
        let token = &rest[..rest.iter().position(|&b| is_space(b)).unwrap_or(rest.len()).min(11)];
        self.at += token.len();
        // Ten digits are the most that Pillow takes. A comment that begins in a number would join what is around it.
        let digits =
            std::str::from_utf8(token).ok().filter(|text| text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit()));
        digits.and_then(|text| text.parse().ok()).map(Some).ok_or_else(|| {
            Error::decode(format_args!(
                "broken PNM: expected a number and white space behind it, found {:?}",
                String::from_utf8_lossy(token)
            ))
        })
    }

    /// One pixel of a plain bitmap; white space between them is optional.
    fn digit(&mut self) -> Result<Option<u32>> {
        let Some(byte) = self.skip_blank() else { return Ok(None) };
        self.at += 1;
        match byte {
            b'0' | b'1' => Ok(Some(u32::from(byte - b'0'))),
            other => Err(Error::decode(format_args!("broken PNM: expected 0 or 1, found {:?}", char::from(other)))),
        }
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}
