//! One image: how the bytes of one file become a `3 x H x W` slice.
//!
//! ```text
//! bytes -> decode -> op (resize | crop | rotate | affine | color | augment) -> normalize -> erase -> slice of the batch
//! ```
//! Everything equals what Pillow and torchvision compute, bit for bit; the exceptions are listed in [`decode()`].

mod affine;
mod augment;
mod avx2;
mod color;
mod crop;
mod decode;
mod erase;
mod fused;
mod memory;
mod normalize;
#[cfg(target_arch = "x86_64")]
mod normalize_avx2;
mod op;
mod resize;
#[cfg(target_arch = "x86_64")]
mod resize_avx2;
#[cfg(target_arch = "x86_64")]
mod resize_avx512;
mod resize_passes;
#[cfg(target_arch = "x86_64")]
mod resize_vbmi;
mod rotate;
mod transform;

pub use affine::{Affine, AffineForm, affine};
pub use augment::{Key, flip_horizontal, flip_vertical, grayscale};
pub use color::{
    autocontrast, brightness, contrast, equalize, hue, invert, posterize, saturation, sharpness, solarize,
};
pub use crop::{PadMode, Window, center_crop, crop, pad};
pub use decode::{Entropy, Format, Options, Seen, Truncated, decode, decode_jpeg, decode_with, orientation};
pub use erase::Erasing;
pub use normalize::Normalizer;
pub use op::{Op, Property};
pub use resize::{Filter, PillowOrder, ResizePath, Size, resize, resize_on};
pub use rotate::rotate;
pub use transform::{Finish, Scratch, Transform};

use crate::error::{Error, Result};

/// What one pixel is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Layout {
    /// Four bytes: red, green, blue and one that nobody reads. Kernels load whole pixels without shuffles.
    #[default]
    Rgbx,
    /// One byte.
    Gray,
}

impl Layout {
    pub const fn bytes_per_pixel(self) -> usize {
        match self {
            Self::Rgbx => 4,
            Self::Gray => 1,
        }
    }

    /// Channels of the tensor that such an image becomes.
    pub const fn channels(self) -> usize {
        match self {
            Self::Rgbx => 3,
            Self::Gray => 1,
        }
    }
}

/// Row-major pixels without padding. Meant to be used again and again: its buffer only grows.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pub width: usize,
    pub height: usize,
    pub layout: Layout,
    pub data: Vec<u8>,
}

impl Image {
    /// `width x height` pixels from packed RGB triples, as `PIL.Image.tobytes()` gives them.
    ///
    /// # Errors
    /// When there is no memory for them, as everywhere here.
    pub fn from_rgb(width: usize, height: usize, rgb: &[u8]) -> Result<Self> {
        let mut image = Self::default();
        image.reshape(width, height, Layout::Rgbx)?;
        for (pixel, triple) in image.data.chunks_exact_mut(4).zip(rgb.chunks_exact(3)) {
            pixel[..3].copy_from_slice(triple);
        }
        Ok(image)
    }

    /// Interleaved bytes, three per pixel (one for gray).
    pub fn to_packed(&self) -> Vec<u8> {
        match self.layout {
            Layout::Gray => self.data.clone(),
            Layout::Rgbx => self.data.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
        }
    }

    pub(crate) fn stride(&self) -> usize {
        self.width * self.layout.bytes_per_pixel()
    }

    /// New shape, contents unspecified: bytes that are already there are not cleared again.
    pub(crate) fn reshape(&mut self, width: usize, height: usize, layout: Layout) -> Result<()> {
        let pixels = width.checked_mul(height).and_then(|n| n.checked_mul(layout.bytes_per_pixel()));
        // Should it fail, this is a whole image all the same: an empty one.
        (self.width, self.height, self.layout) = (0, 0, layout);
        memory::resize(&mut self.data, pixels.ok_or_else(|| Error::memory(usize::MAX))?)?;
        (self.width, self.height) = (width, height);
        Ok(())
    }

    pub(crate) fn copy_from(&mut self, other: &Self) -> Result<()> {
        self.reshape(other.width, other.height, other.layout)?;
        self.data.copy_from_slice(&other.data);
        Ok(())
    }
}

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
