//! JPEG through libjpeg-turbo, the library inside Pillow.

#[cfg(target_arch = "x86_64")]
mod baseline;
mod bits;
mod entropy;
mod huffman;
#[cfg(target_arch = "x86_64")]
mod idct;
pub(super) mod layout;
pub(super) mod libjpeg;
mod probe;
#[cfg(not(target_arch = "x86_64"))]
#[path = "jpeg/no_baseline.rs"]
mod baseline;
mod table;
#[cfg(target_arch = "x86_64")]
mod ycc;

pub use entropy::Entropy;
pub use probe::Verdict;

use self::layout::{JCS_CMYK, JCS_EXT_RGBX};
use self::libjpeg::{Decoder, JpegError};
use self::probe::Probe;
use super::limits::{check_claim, check_pixels, truncated};
use crate::error::{Error, Result};
use crate::image::{Image, Layout, Limits, Size};

static PROBE: Probe = Probe::new(ours, |picture| alone(Entropy::Libjpeg, picture));

/// The image, if that decoder decodes it itself.
fn alone(entropy: Entropy, bytes: &[u8]) -> Option<Image> {
    let mut image = Image::default();
    let used = unprobed(entropy, bytes, &Limits::default(), None, &mut image).ok()?;
    (used == entropy).then_some(image)
}

/// The image, if both of our decoders make the same of it.
fn ours(bytes: &[u8]) -> Option<Image> {
    let image = alone(Entropy::Own, bytes)?;
    if !baseline::available() {
        return Some(image);
    }
    let whole = alone(Entropy::Whole, bytes)?;
    (whole.data == image.data).then_some(image)
}

pub fn decode(bytes: &[u8], limits: &Limits, size: Option<Size>, out: &mut Image) -> Result<()> {
    decode_jpeg(Entropy::Whole, bytes, limits, size, out).map(|_| ())
}

/// A JPEG with a chosen decoder, for tests and benchmarks, and who did it in the end: progressive and arithmetic JPEGs and
/// whatever is unsound are libjpeg's.
///
/// # Errors
/// As [`super::decode()`].
pub fn decode_jpeg(
    entropy: Entropy,
    bytes: &[u8],
    limits: &Limits,
    size: Option<Size>,
    out: &mut Image,
) -> Result<Entropy> {
    probed(&PROBE, entropy, bytes, limits, size, out)
}

/// Whether our decoder decodes JPEGs in this process, and why if it does not.
pub fn own_jpeg_decoder() -> Verdict {
    PROBE.verdict()
}

fn probed(
    probe: &Probe,
    entropy: Entropy,
    bytes: &[u8],
    limits: &Limits,
    size: Option<Size>,
    out: &mut Image,
) -> Result<Entropy> {
    let own = entropy != Entropy::Libjpeg && probe.verdict() == Verdict::Agrees;
    unprobed(if own { entropy } else { Entropy::Libjpeg }, bytes, limits, size, out)
}

fn unprobed(entropy: Entropy, bytes: &[u8], limits: &Limits, size: Option<Size>, out: &mut Image) -> Result<Entropy> {
    let failed = |failure| match failure {
        JpegError::Truncated => truncated("JPEG", bytes.len()),
        JpegError::Corrupt(reason) => Error::decode(format_args!("broken JPEG: {reason}")),
        // Progressive ones keep two bytes per sample.
        JpegError::Memory => Error::memory(bytes.len()),
    };
    let mut decoder = Decoder::new(bytes).map_err(failed)?;
    let header = decoder.header().map_err(failed)?;
    check_pixels(header.width as u64, header.height as u64, limits)?;
    if header.precision != 8 {
        return Err(Error::unsupported(format_args!(
            "JPEG with {} bits per sample; only 8 are supported: convert the file",
            header.precision
        )));
    }
    if !header.arithmetic {
        // A block of 8 x 8 has at least one bit. (An end marker in the middle is allowed: Pillow may judge it.)
        check_claim("JPEG", header.width as u64 * header.height as u64, 8 * 64, bytes)?;
    }
    let color_space = match header.components {
        1 | 3 => JCS_EXT_RGBX,
        4 => JCS_CMYK,
        other => {
            return Err(Error::unsupported(format_args!(
                "JPEG with {other} components; 1 (gray), 3 (colour) and 4 (CMYK) are supported: convert the file"
            )));
        }
    };
    let (width, height) = match size {
        Some(size) => decoder.scale(denominator(size, header.height, header.width)?),
        None => (header.width, header.height),
    };
    out.reshape(width, height, Layout::Rgbx)?;
    let used = match entropy {
        Entropy::Libjpeg => decoder.pixels(color_space, &mut out.data).map(|()| Some(Entropy::Libjpeg)),
        Entropy::Own => decoder.pixels_fast(color_space, &mut out.data),
        Entropy::Whole => decoder.pixels_whole(color_space, &mut out.data),
    };
    let Some(used) = used.map_err(failed)? else {
        return unprobed(Entropy::Libjpeg, bytes, limits, size, out);
    };
    if color_space == JCS_CMYK {
        cmyk_to_rgb(&mut out.data, true);
    }
    Ok(used)
}

/// The most that a file of `height x width` can be scaled down by without falling below `size`.
fn denominator(size: Size, height: usize, width: usize) -> Result<usize> {
    let (new_height, new_width) = size.resolve(height, width)?;
    let scale = (height / new_height).min(width / new_width);
    Ok([8, 4, 2].into_iter().find(|&d| scale >= d).unwrap_or(1))
}

/// Four-byte CMYK pixels to RGBX in place. Adobe writes CMYK JPEGs inverted, and Pillow takes all of them to be Adobe's.
pub fn cmyk_to_rgb(data: &mut [u8], inverted: bool) {
    let flip = if inverted { 255 } else { 0 };
    for pixel in data.chunks_exact_mut(4) {
        let paper = 255 - u32::from(pixel[3] ^ flip);
        for ink in &mut pixel[..3] {
            let t = u32::from(*ink ^ flip) * paper + 128;
            // t / 255, rounded, as Pillow's MULDIV255; never more than `paper`.
            *ink = (paper - (((t >> 8) + t) >> 8)) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn libjpegs(picture: &[u8]) -> Option<Image> {
        alone(Entropy::Libjpeg, picture)
    }

    fn tampered(picture: &[u8]) -> Option<Image> {
        let mut image = libjpegs(picture)?;
        image.data[17] ^= 1;
        Some(image)
    }

    #[test]
    fn where_the_two_differ_all_is_left_to_libjpeg() {
        let expected = libjpegs(probe::PICTURE).unwrap();
        let cases: [(fn(&[u8]) -> Option<Image>, Verdict, Entropy); 4] = [
            (ours, Verdict::Agrees, Entropy::Own),
            (tampered, Verdict::Differs, Entropy::Libjpeg),
            (|_| None, Verdict::Differs, Entropy::Libjpeg),
            (|_| panic!("injected"), Verdict::Differs, Entropy::Libjpeg),
        ];
        for (own, verdict, entropy) in cases {
            let probe = Probe::new(own, libjpegs);
            for _ in 0..2 {
                let mut image = Image::default();
                let used = probed(&probe, Entropy::Own, probe::PICTURE, &Limits::default(), None, &mut image).unwrap();
                assert_eq!((used, probe.verdict()), (entropy, verdict));
                assert!(image.data == expected.data);
            }
        }
    }

    /// Optimised tables are new in every file.
    #[test]
    fn a_small_file_makes_no_steps_for_tables_that_are_new() {
        for entropy in [Entropy::Own, Entropy::Whole] {
            // A new thread has met none.
            let met = std::thread::spawn(move || {
                [(); 2].map(|()| (alone(entropy, probe::PICTURE).is_some() || !baseline::available(), table::met()))
            });
            let met = met.join().unwrap();
            assert_eq!(met, [(true, (4, 0)), (true, (4, 2))], "{entropy:?}");
        }
    }

    /// `build.rs` compares what `layout` lists, and that is all there is.
    #[test]
    fn no_structure_of_libjpegs_is_described_elsewhere() {
        let layout = include_str!("jpeg/layout.rs");
        for text in [
            include_str!("jpeg/libjpeg.rs"),
            include_str!("jpeg/huffman.rs"),
            include_str!("jpeg/baseline.rs"),
            include_str!("jpeg/probe.rs"),
        ] {
            assert!(!text.contains("repr("), "{text}");
        }
        let (_, mirrored) = layout.rsplit_once("\nmirrors! {").unwrap();
        let listed: usize = layout::MIRRORS.iter().map(|mirror| mirror.fields.len() + 1).sum();
        let described = mirrored.lines().filter(|line| line.ends_with(',') || line.ends_with(" {")).count();
        assert_eq!(listed, described);
        assert_eq!(layout.matches("repr(").count(), 1, "only the macro's");
        assert!(cfg!(cnnrs_libjpeg_layout), "compared with the headers of the library that is linked");
    }
}
