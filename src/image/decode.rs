//! Bytes of a file to RGBX pixels, equal to `PIL.Image.open(file).convert("RGB")`.

mod bmp;
mod damaged;
mod exif;
mod gif;
mod huffman;
mod jpeg;
mod libjpeg;
mod png;
mod pnm;
mod tiff;
mod webp;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

pub use jpeg::{Entropy, decode_jpeg};

use super::rotate::upright;
use super::{Image, Layout, Limits, Size};
use crate::error::{Error, Result};

/// The formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Jpeg,
    Png,
    Gif,
    WebP,
    Bmp,
    Tiff,
    Pnm,
}

impl Format {
    /// By the first bytes; the file's name says nothing.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            [b'B', b'M', ..] => Some(Self::Bmp),
            [b'I', b'I', b'*' | b'+', 0, ..] | [b'M', b'M', 0, b'*' | b'+', ..] => Some(Self::Tiff),
            [b'P', b'1'..=b'6', b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, ..] => Some(Self::Pnm),
            _ => None,
        }
    }
}

/// Decodes the first frame into `out`, which is always [`Layout::Rgbx`] afterwards.
///
/// Alpha is dropped, not blended; palettes are looked up; 16-bit gray is clipped at 255 while 16-bit colour keeps its
/// high bytes; CMYK goes through Pillow's own formula; only TIFF applies its orientation tag: all as Pillow does.
///
/// What is not as in Pillow is listed in `docs/parity.md`, each exception with its largest difference and its test.
///
/// # Errors
/// [`Error::Decode`] with the reason when the bytes are no image, broken or cut off, [`Error::TooLarge`] before any
/// memory is taken for an image over `limits.pixels`. A panic inside a decoder comes back as [`Error::Panic`].
pub fn decode(bytes: &[u8], limits: &Limits, out: &mut Image) -> Result<()> {
    decode_with(bytes, &Options { limits: *limits, ..Options::default() }, out).map(|_| ())
}

/// What [`decode_with`] does beyond [`decode()`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub limits: Limits,
    /// Turns the image upright, as `PIL.ImageOps.exif_transpose` does.
    pub exif: bool,
    pub truncated: Truncated,
    /// A JPEG that is to become this size is decoded at a half, a quarter or an eighth of its width and height where that
    /// is still at least as large: as `PIL.Image.draft("RGB", size)` does. Much faster for large photos; the pixels
    /// differ from those of the whole image.
    pub scaled: Option<Size>,
}

/// What becomes of a file that ends too early.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Truncated {
    #[default]
    Error,
    /// JPEG as far as it goes, as Pillow shows it under `LOAD_TRUNCATED_IMAGES`; pixels broken inside as well. How far
    /// the others go depends on how far Pillow's zlib reads ahead: still errors, for Pillow to answer.
    Accept,
}

/// What the file said about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// EXIF: 1 is upright, 2 to 8 are not, whether [`Options::exif`] asked for turning or not.
    pub orientation: u8,
}

/// [`decode()`] with options.
///
/// # Errors
/// As [`decode()`].
pub fn decode_with(bytes: &[u8], options: &Options, out: &mut Image) -> Result<Seen> {
    let limits = &options.limits;
    if bytes.len() as u64 > limits.bytes {
        return Err(Error::decode(format_args!(
            "the file has {} bytes, over the limit of {}: raise the limit or remove the file",
            bytes.len(),
            limits.bytes
        )));
    }
    let format = Format::of(bytes).ok_or_else(|| not_an_image(bytes))?;
    let run = || {
        let orientation = exif::orientation(bytes, format);
        let scaled = match options.scaled {
            // The file lies on its side until it is turned.
            Some(Size::Exact { height, width }) if options.exif && orientation >= 5 => {
                Some(Size::Exact { height: width, width: height })
            }
            size => size,
        };
        let whole = match format {
            Format::Jpeg => jpeg::decode(bytes, limits, scaled, out),
            Format::Png => png::decode(bytes, limits, out),
            Format::Gif => gif::decode(bytes, limits, out),
            Format::WebP => webp::decode(bytes, limits, out),
            Format::Bmp => bmp::decode(bytes, limits, out),
            Format::Tiff => tiff::decode(bytes, limits, out),
            Format::Pnm => pnm::decode(bytes, limits, out),
        };
        if matches!(whole, Err(Error::Decode { .. })) {
            damaged::decode(bytes, format, limits, options.truncated == Truncated::Accept, out).unwrap_or(whole)?;
        } else {
            whole?;
        }
        if options.exif {
            upright(orientation, out)?;
        }
        Ok(Seen { orientation })
    };
    // `out` may hold half an image after a panic; the caller gets an error and does not read it.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        Err(Error::Panic(format!("{format:?} decoder: {}", text.unwrap_or("no message"))))
    })
}

/// The EXIF orientation of a file, 1 where there is none: what [`decode_with`] reports, without decoding.
pub fn orientation(bytes: &[u8]) -> u8 {
    Format::of(bytes).map_or(1, |format| exif::orientation(bytes, format))
}

fn not_an_image(bytes: &[u8]) -> Error {
    if bytes.is_empty() {
        return Error::decode("the file is empty");
    }
    let head = &bytes[..bytes.len().min(12)];
    let is_text = head.iter().all(|b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e));
    let shown = if is_text {
        format!("{:?}", String::from_utf8_lossy(head))
    } else {
        format!("bytes {}", head.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "))
    };
    Error::decode(format_args!("not an image (JPEG, PNG, GIF, WebP, BMP, TIFF, PNM): starts with {shown}"))
}

/// Before anything is allocated for the pixels.
fn check_pixels(width: u64, height: u64, limits: &Limits) -> Result<()> {
    if width == 0 || height == 0 {
        return Err(Error::decode(format_args!("the header says {width} x {height} pixels")));
    }
    match width.checked_mul(height) {
        Some(pixels) if pixels <= limits.pixels => Ok(()),
        _ => Err(Error::TooLarge { path: PathBuf::new(), width, height, limit: limits.pixels }),
    }
}

/// Before memory is taken for `claimed` bytes of pixels: whether the file can hold them, when one byte of it becomes at most
/// `expansion`.
fn check_claim(format: &str, claimed: u64, expansion: u64, file: &[u8]) -> Result<()> {
    if claimed <= (file.len() as u64).saturating_mul(expansion) {
        return Ok(());
    }
    Err(truncated(format, file.len()))
}

fn truncated(format: &str, length: usize) -> Error {
    Error::truncated(format_args!(
        "the {format} file is truncated: it ends after {length} bytes, in the middle of the image"
    ))
}

/// How one row of samples, as it lies in the file, becomes RGBX pixels.
#[derive(Clone, Copy)]
enum Samples<'a> {
    /// `bits` per sample, packed from the high bit, white at the highest value.
    Gray { bits: u8 },
    /// Packed indices; colours that the palette lacks are black, as in Pillow.
    Palette { bits: u8, colors: &'a [[u8; 3]; 256] },
    /// Bytes per pixel and the offsets of red, green and blue.
    Bytes { step: usize, rgb: [usize; 3] },
    /// 16 bits, blue in the lowest five; green has five or six.
    Short { green_bits: u16 },
}

impl Samples<'_> {
    fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Gray { bits } | Self::Palette { bits, .. } => (width * bits as usize).div_ceil(8),
            Self::Bytes { step, .. } => width * step,
            Self::Short { .. } => width * 2,
        }
    }

    /// `line` must hold at least one row of `out.len() / 4` pixels.
    fn unpack(self, line: &[u8], out: &mut [u8]) {
        let pixels = out.as_chunks_mut::<4>().0;
        match self {
            Self::Gray { bits } => {
                let scale = 255 / ((1u16 << bits) - 1) as u8;
                for (x, pixel) in pixels.iter_mut().enumerate() {
                    pixel.fill(packed(line, x, bits) * scale);
                }
            }
            Self::Palette { bits, colors } => {
                for (x, pixel) in pixels.iter_mut().enumerate() {
                    pixel[..3].copy_from_slice(&colors[packed(line, x, bits) as usize]);
                }
            }
            Self::Bytes { step, rgb: [r, g, b] } => {
                for (pixel, sample) in pixels.iter_mut().zip(line.chunks_exact(step)) {
                    *pixel = [sample[r], sample[g], sample[b], 255];
                }
            }
            Self::Short { green_bits } => {
                for (pixel, pair) in pixels.iter_mut().zip(line.as_chunks().0) {
                    pixel[..3].copy_from_slice(&bmp::expand16(u16::from_le_bytes(*pair), green_bits));
                }
            }
        }
    }
}

/// Sample `x` of a row with 1, 2, 4 or 8 bits per sample, the first in the high bits.
fn packed(line: &[u8], x: usize, bits: u8) -> u8 {
    if bits == 8 {
        return line[x];
    }
    let bit = x * bits as usize;
    (line[bit / 8] >> (8 - bits as usize - bit % 8)) & ((1 << bits) - 1)
}

/// RGB triples to a table in which missing colours are black.
fn color_table(rgb: &[u8]) -> [[u8; 3]; 256] {
    let mut table = [[0; 3]; 256];
    for (entry, color) in table.iter_mut().zip(rgb.as_chunks::<3>().0) {
        *entry = *color;
    }
    table
}

/// A value of Pillow's 16- or 32-bit modes as a byte: clipped, not scaled.
fn clipped(value: u32) -> u8 {
    value.min(255) as u8
}

/// `out` gets its shape, then every row is filled from `data`, which has one row every `stride` bytes; padding behind
/// the last row may be missing. Fails with `cut` when a row is, before memory is taken.
fn fill_rows(
    (width, height): (usize, usize),
    out: &mut Image,
    samples: Samples<'_>,
    data: &[u8],
    stride: usize,
    bottom_up: bool,
    cut: impl Fn() -> Error,
) -> Result<()> {
    let row_bytes = samples.row_bytes(width);
    let needed = stride.checked_mul(height - 1).and_then(|rows| rows.checked_add(row_bytes));
    if needed.is_none_or(|needed| needed > data.len()) {
        return Err(cut());
    }
    out.reshape(width, height, Layout::Rgbx)?;
    for (y, row) in out.data.chunks_exact_mut(4 * width).enumerate() {
        let y = if bottom_up { height - 1 - y } else { y };
        samples.unpack(&data[y * stride..y * stride + row_bytes], row);
    }
    Ok(())
}
