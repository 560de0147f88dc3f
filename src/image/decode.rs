//! Bytes of a file to RGBX pixels, equal to `PIL.Image.open(file).convert("RGB")`.

mod bmp;
mod damaged;
mod exif;
mod format;
mod gif;
mod jpeg;
mod limits;
mod png;
mod pnm;
mod samples;
mod tiff;
mod webp;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use format::Format;
pub use jpeg::{Entropy, Verdict, decode_jpeg, own_jpeg_decoder};
pub use limits::Limits;

use super::rotate::upright;
use super::{Image, Size};
use crate::error::{DecodeKind, Error, Result, panic_text};

/// Decodes the first frame into `out`, which is always [`Layout::Rgbx`](super::Layout::Rgbx) afterwards.
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
    decode_with(bytes, &ReadOptions { limits: *limits, ..ReadOptions::default() }, out).map(|_| ())
}

/// How a file becomes pixels, from the loader down to the decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    pub limits: Limits,
    /// Turns the image upright, as `PIL.ImageOps.exif_transpose` does.
    pub exif: bool,
    pub truncated: Truncated,
    pub left: Left,
    /// A JPEG that is to become this size is decoded at a half, a quarter or an eighth of its width and height where that
    /// is still at least as large: as `PIL.Image.draft("RGB", size)` does. Much faster for large photos; the pixels
    /// differ from those of the whole image.
    pub scaled: Option<Size>,
}

/// What is refused because somebody else reads it otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Formats whose samples may have more than 8 bits.
    pub deep: bool,
    /// Formats that may have several pages.
    pub paged: bool,
}

impl Left {
    fn takes(self, format: Format, bytes: &[u8]) -> bool {
        // The bits of a PNG stand at this place; an animated one has this chunk in front of its pixels.
        let deep = match format {
            Format::Png => bytes.get(24) == Some(&16),
            Format::Tiff | Format::Pnm => true,
            _ => false,
        };
        let paged = match format {
            Format::Png => png::is_animated(bytes),
            Format::Tiff | Format::Gif | Format::WebP => true,
            _ => false,
        };
        self.deep && deep || self.paged && paged
    }
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
    /// EXIF: 1 is upright, 2 to 8 are not, whether [`ReadOptions::exif`] asked for turning or not.
    pub orientation: u8,
}

/// [`decode()`] as `options` say.
///
/// # Errors
/// As [`decode()`].
pub fn decode_with(bytes: &[u8], options: &ReadOptions, out: &mut Image) -> Result<Seen> {
    let limits = &options.limits;
    if bytes.len() as u64 > limits.bytes {
        return Err(Error::undecodable(
            DecodeKind::TooLarge,
            format_args!(
                "the file has {} bytes, over the limit of {}: raise the limit or remove the file",
                bytes.len(),
                limits.bytes
            ),
        ));
    }
    let format = Format::of(bytes).ok_or_else(|| not_an_image(bytes))?;
    if options.left.takes(format, bytes) {
        return Err(Error::unsupported(
            "scale and page are for Pillow, where a file may have 16 bits or several pages",
        ));
    }
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
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|payload| Err(Error::Panic(format!("{format:?} decoder: {}", panic_text(payload.as_ref())))))
}

fn not_an_image(bytes: &[u8]) -> Error {
    if bytes.is_empty() {
        return Error::undecodable(DecodeKind::Unknown, "the file is empty");
    }
    let head = &bytes[..bytes.len().min(12)];
    let is_text = head.iter().all(|b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e));
    let shown = if is_text {
        format!("{:?}", String::from_utf8_lossy(head))
    } else {
        format!("bytes {}", head.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "))
    };
    let formats = "JPEG, PNG, GIF, WebP, BMP, TIFF, PNM";
    Error::undecodable(DecodeKind::Unknown, format_args!("not an image ({formats}): starts with {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_to_others_is_refused() {
        let gray = b"P5 2 1 999\n\x00\x01\x00\x02";
        let mut image = Image::default();
        let mut kind = |left| {
            let options = ReadOptions { left, ..ReadOptions::default() };
            decode_with(gray, &options, &mut image).map_err(|error| error.to_string())
        };
        assert!(kind(Left::default()).is_ok() && kind(Left { deep: false, paged: true }).is_ok());
        assert!(kind(Left { deep: true, paged: false }).unwrap_err().contains("scale and page are for Pillow"));
        let chunk = |name: &[u8]| {
            let mut bytes = vec![0u8; 4];
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(&[0u8; 4]);
            bytes
        };
        let file = |names: [&[u8]; 2]| {
            let mut bytes = vec![0u8; 8];
            names.iter().for_each(|name| bytes.extend(chunk(name)));
            bytes
        };
        assert!(png::is_animated(&file([b"IHDR", b"acTL"])));
        assert!(!png::is_animated(&file([b"IHDR", b"IDAT"])) && !png::is_animated(&file([b"IDAT", b"acTL"])));
    }
}
