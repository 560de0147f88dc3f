//! What a file may cost, and what is said of one that is too large or too short.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::error::{Error, Result};

/// What a file may cost before anything is allocated for its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub pixels: u64,
    pub bytes: u64,
}

impl Default for Limits {
    /// Pillow's: it raises `DecompressionBombError` above twice `Image.MAX_IMAGE_PIXELS`.
    fn default() -> Self {
        Self { pixels: 2 * 89_478_485, bytes: 1 << 30 }
    }
}

/// Before anything is allocated for the pixels.
pub fn check_pixels(width: u64, height: u64, limits: &Limits) -> Result<()> {
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
pub fn check_claim(format: &str, claimed: u64, expansion: u64, file: &[u8]) -> Result<()> {
    if claimed <= (file.len() as u64).saturating_mul(expansion) {
        return Ok(());
    }
    Err(truncated(format, file.len()))
}

pub fn truncated(format: &str, length: usize) -> Error {
    Error::truncated(format_args!(
        "the {format} file is truncated: it ends after {length} bytes, in the middle of the image"
    ))
}
