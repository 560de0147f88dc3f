//! Pixels: what the operations work on, and what comes in and goes out.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::memory::{self, reserve};

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

    /// Becomes `height x width` pixels from packed rows, 1 (gray) or 3 (RGB) bytes each.
    pub(crate) fn unpack(&mut self, height: usize, width: usize, channels: usize, data: &[u8]) -> Result<()> {
        let layout = match channels {
            1 => Some(Layout::Gray),
            3 => Some(Layout::Rgbx),
            _ => None,
        };
        let fits = data.len() == memory::product([height, width, channels])?;
        let Some(layout) = layout.filter(|_| fits) else {
            return Err(Error::Argument(format!(
                "{height} x {width} pixels of {channels} bytes expected, got {} bytes",
                data.len()
            )));
        };
        self.reshape(width, height, layout)?;
        match layout {
            Layout::Gray => self.data.copy_from_slice(data),
            Layout::Rgbx => {
                for (pixel, &[r, g, b]) in self.data.as_chunks_mut::<4>().0.iter_mut().zip(data.as_chunks::<3>().0) {
                    *pixel = [r, g, b, 255];
                }
            }
        }
        Ok(())
    }

    /// Appends the rows without the fourth byte of their pixels.
    pub(crate) fn pack(&self, out: &mut Vec<u8>) -> Result<()> {
        match self.layout {
            Layout::Gray => {
                reserve(out, self.data.len())?;
                out.extend_from_slice(&self.data);
            }
            Layout::Rgbx => {
                let pixels = self.data.as_chunks::<4>().0;
                let start = out.len();
                reserve(out, 3 * pixels.len())?;
                out.resize(start + 3 * pixels.len(), 0);
                let triples = out.get_mut(start..).unwrap_or_default().as_chunks_mut::<3>().0;
                for (triple, &[r, g, b, _]) in triples.iter_mut().zip(pixels) {
                    *triple = [r, g, b];
                }
            }
        }
        Ok(())
    }
}
