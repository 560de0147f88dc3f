//! Bytes to planes: `PILToTensor`, `ToTensor`, and `ToTensor` followed by `Normalize`, rounded as torch rounds.

#[cfg(target_arch = "x86_64")]
mod avx2;

use super::{Image, Layout};
use crate::error::{Error, Result};

/// How bytes become the numbers of the tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Finish {
    /// `PILToTensor`: the bytes.
    Uint8,
    /// `ToTensor`: `x / 255`.
    Float,
    /// `ToTensor`, then `Normalize`.
    Normalize { mean: Vec<f32>, std: Vec<f32> },
}

/// What each of the 256 byte values becomes in each channel.
#[derive(Debug)]
pub struct Normalizer {
    tables: Vec<[f32; 256]>,
    #[cfg(target_arch = "x86_64")]
    arithmetic: Option<avx2::Arithmetic>,
}

impl Normalizer {
    /// For images that become `channels` channels.
    ///
    /// # Errors
    /// When mean and std do not fit the number of channels, or a std is zero.
    pub fn new(finish: &Finish, channels: usize) -> Result<Self> {
        let constants = constants(finish, channels)?;
        // Three roundings, one per torch operation: x / 255, minus mean, divided by std.
        let table = |&(mean, std): &(f32, f32)| std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std);
        let tables: Vec<[f32; 256]> = constants.iter().map(table).collect();
        Ok(Self {
            #[cfg(target_arch = "x86_64")]
            arithmetic: avx2::Arithmetic::new(&constants, &tables),
            tables,
        })
    }

    /// Whether the vector kernel runs (it reproduces the tables exactly, or it is not used).
    pub fn is_vectorized(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.arithmetic.is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// `out` is `channels x height x width`, of exactly that length.
    pub(super) fn planes(&self, image: &Image, out: &mut [f32]) {
        self.part(&image.data, image.layout, 0, image.width * image.height, out);
    }

    /// `pixels`, which begin `at` pixels behind the first one, to their places in planes of `size` values.
    pub(super) fn part(&self, pixels: &[u8], layout: Layout, at: usize, size: usize, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(arithmetic) = &self.arithmetic {
            return arithmetic.part(pixels, layout, &self.tables, at, size, out);
        }
        let step = layout.bytes_per_pixel();
        for (channel, (plane, table)) in out.chunks_exact_mut(size.max(1)).zip(&self.tables).enumerate() {
            for (value, &byte) in plane[at..].iter_mut().zip(pixels.iter().skip(channel).step_by(step)) {
                *value = table[byte as usize];
            }
        }
    }

    /// The reference for [`Normalizer::is_vectorized`]: table look-ups only.
    pub fn planes_scalar(&self, image: &Image, out: &mut [f32]) {
        let tables = Self {
            tables: self.tables.clone(),
            #[cfg(target_arch = "x86_64")]
            arithmetic: None,
        };
        tables.planes(image, out);
    }
}

/// `(mean, std)` per channel; one pair serves all channels, as torch broadcasts it.
fn constants(finish: &Finish, channels: usize) -> Result<Vec<(f32, f32)>> {
    let (mean, std) = match finish {
        // Subtracting 0 and dividing by 1 change no bit.
        Finish::Uint8 | Finish::Float => return Ok(vec![(0.0, 1.0); channels]),
        Finish::Normalize { mean, std } => (mean, std),
    };
    for (name, values) in [("mean", mean), ("std", std)] {
        if values.len() != 1 && values.len() != channels {
            return Err(Error::Argument(format!(
                "Normalize has {} values in {name}, but the image has {channels} channel(s): give 1 or {channels} values",
                values.len()
            )));
        }
    }
    if std.contains(&0.0) {
        return Err(Error::Argument(
            "std evaluated to zero after conversion to torch.float32, leading to division by zero.".into(),
        ));
    }
    let pick = |values: &[f32], c: usize| if values.len() == 1 { values[0] } else { values[c] };
    Ok((0..channels).map(|c| (pick(mean, c), pick(std, c))).collect())
}

/// The bytes themselves, plane by plane.
pub(super) fn bytes(image: &Image, out: &mut [u8]) {
    let size = image.width * image.height;
    match image.layout {
        Layout::Gray => out.copy_from_slice(&image.data),
        Layout::Rgbx => {
            let (red, rest) = out.split_at_mut(size);
            let (green, blue) = rest.split_at_mut(size);
            for (((pixel, r), g), b) in image.data.as_chunks::<4>().0.iter().zip(red).zip(green).zip(blue) {
                (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
            }
        }
    }
}

/// Pixels to planes through `channels x 256` values.
pub(crate) fn look_up(image: &Image, table: &[f32], planes: &mut [f32]) -> Result<()> {
    let size = image.height * image.width;
    let (channels, step) = (image.layout.channels(), image.layout.bytes_per_pixel());
    if table.len() != channels * 256 {
        let reason = format!("a table of {} values cannot finish an image of {channels} channels", table.len());
        return Err(Error::Argument(reason));
    }
    for (channel, (values, plane)) in table.chunks_exact(256).zip(planes.chunks_exact_mut(size.max(1))).enumerate() {
        for (out, pixel) in plane.iter_mut().zip(image.data.chunks_exact(step)) {
            *out = values[usize::from(pixel[channel])];
        }
    }
    Ok(())
}
