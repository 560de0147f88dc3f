//! What is known of an image that is kept, wherever that is.

use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::error::{Error, Result};
use crate::image::Image;

/// What tells two versions of a file apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: i64,
}

impl Stamp {
    /// # Errors
    /// When the file cannot be looked at.
    pub fn of(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        let metadata = fs::metadata(path).map_err(io)?;
        let modified = metadata.modified().map_err(io)?;
        let nanoseconds = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
        };
        Ok(Self { size: metadata.len(), modified: nanoseconds })
    }
}

/// An image as it is kept: packed rows of 1 or 3 bytes per pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedShape {
    pub width: u32,
    pub height: u32,
    pub channels: u32,
}

impl PackedShape {
    pub fn of(image: &Image) -> Option<Self> {
        let number = |n: usize| u32::try_from(n).ok();
        let channels = number(image.layout.channels())?;
        Some(Self { width: number(image.width)?, height: number(image.height)?, channels })
    }

    /// `None` where the product is no length of anything.
    pub fn bytes(self) -> Option<usize> {
        let [width, height, channels] = [self.width, self.height, self.channels].map(|n| n as usize);
        width.checked_mul(height)?.checked_mul(channels)
    }

    /// Whether `data` was an image of this shape, which is in `image` now.
    pub fn restore(self, data: &[u8], image: &mut Image) -> bool {
        image.unpack(self.height as usize, self.width as usize, self.channels as usize, data).is_ok()
    }
}

/// What became of an image that was to be kept.
pub enum Outcome {
    Kept,
    NoRoom,
    /// Somebody else keeps it, or nobody may.
    Passed,
}
