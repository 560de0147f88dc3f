//! A list of operations and a finish: what torchvision calls `Compose`.

#![forbid(unsafe_code)]

use super::augment::{Drawn, flip_horizontal, flip_vertical, grayscale};
use super::crop::{self, Window, center_crop, pad};
use super::fused::resize_normalized;
use super::normalize::{self, Normalizer};
use super::resize::{ResizeScratch, resize_with};
use super::{Filter, Image, Key, Layout, PillowOrder, ResizePath, Size, rotate};
use crate::error::{Error, Result};

/// One operation on a uint8 image, parameters as torchvision spells them.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Resize {
        size: Size,
        filter: Filter,
    },
    CenterCrop {
        height: usize,
        width: usize,
    },
    Crop(Window),
    /// A border of one colour: left, top, right, bottom.
    Pad {
        border: [usize; 4],
        fill: [u8; 3],
    },
    /// Any window of that size; torchvision's `padding` is a [`Op::Pad`] in front.
    RandomCrop {
        height: usize,
        width: usize,
        pad_if_needed: bool,
        fill: [u8; 3],
    },
    /// A window of drawn area and aspect ratio, resized.
    RandomResizedCrop {
        height: usize,
        width: usize,
        scale: (f64, f64),
        ratio: (f64, f64),
        filter: Filter,
    },
    /// One channel, or three equal ones.
    Grayscale {
        channels: usize,
    },
    HorizontalFlip {
        p: f64,
    },
    VerticalFlip {
        p: f64,
    },
    /// Degrees counter-clockwise, drawn from `[low, high)`.
    Rotation {
        low: f64,
        high: f64,
        filter: Filter,
        expand: bool,
        center: Option<(f64, f64)>,
        fill: [u8; 3],
    },
}

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

#[derive(Clone, Debug, PartialEq)]
pub struct Transform {
    pub ops: Vec<Op>,
    pub finish: Finish,
    pub order: PillowOrder,
}

/// What one thread keeps between images: buffers and tables. Never part of a result.
#[derive(Debug, Default)]
pub struct Scratch {
    resize: ResizeScratch,
    spare: Image,
    normalizer: Option<(Finish, usize, Normalizer)>,
}

impl Transform {
    /// `(channels, height, width)` if every image comes out the same.
    pub fn output_shape(&self) -> Option<(usize, usize, usize)> {
        let mut channels = 3;
        let mut size = None;
        for op in &self.ops {
            match *op {
                Op::Resize { size: Size::Exact { height, width }, .. }
                | Op::CenterCrop { height, width }
                | Op::Crop(Window { height, width, .. })
                | Op::RandomCrop { height, width, .. }
                | Op::RandomResizedCrop { height, width, .. } => size = Some((height, width)),
                Op::Pad { border: [left, top, right, bottom], .. } => {
                    size = size.map(|(height, width)| (top + height + bottom, left + width + right));
                }
                Op::Resize { size: shorter @ Size::Shorter { .. }, .. } => {
                    size = size.and_then(|(height, width)| shorter.resolve(height, width).ok());
                }
                Op::Grayscale { channels: n } => channels = n,
                Op::HorizontalFlip { .. } | Op::VerticalFlip { .. } | Op::Rotation { expand: false, .. } => {}
                Op::Rotation { .. } => size = None,
            }
        }
        size.map(|(height, width)| (channels, height, width))
    }

    /// The operations only, in place.
    ///
    /// # Errors
    /// When an operation's arguments make no sense for this image.
    pub fn pixels(&self, image: &mut Image, key: Key, scratch: &mut Scratch) -> Result<()> {
        self.run(&self.ops, image, key, scratch)
    }

    fn run(&self, ops: &[Op], image: &mut Image, key: Key, scratch: &mut Scratch) -> Result<()> {
        let mut rng = ops.iter().any(Op::is_random).then(|| key.rng());
        for op in ops {
            let drawn = rng.as_mut().map_or(Drawn::Sure, |rng| op.draw(rng, image));
            op.apply(drawn, image, self.order, scratch)?;
        }
        Ok(())
    }

    /// Operations and finish, into the `channels x height x width` floats of `out`.
    ///
    /// # Errors
    /// As [`Transform::pixels`]; and when `out` has another length than the image needs.
    pub fn apply_f32(&self, image: &mut Image, key: Key, scratch: &mut Scratch, out: &mut [f32]) -> Result<()> {
        let Some((&Op::Resize { size, filter }, before)) = self.ops.split_last() else {
            self.pixels(image, key, scratch)?;
            return self.finish_f32(image, scratch, out);
        };
        self.run(before, image, key, scratch)?;
        let (height, width) = size.resolve(image.height, image.width)?;
        check_length((image.layout, height, width), out.len())?;
        let normalizer = self.normalizer(image.layout, scratch)?;
        let done =
            resize_normalized(image, (height, width), filter, self.order, &normalizer.2, &mut scratch.resize, out);
        scratch.normalizer = Some(normalizer);
        if done {
            return Ok(());
        }
        self.run(&self.ops[before.len()..], image, key, scratch)?;
        self.finish_f32(image, scratch, out)
    }

    /// The one in `scratch`, taken out of it, if it fits.
    fn normalizer(&self, layout: Layout, scratch: &mut Scratch) -> Result<(Finish, usize, Normalizer)> {
        let channels = layout.channels();
        match scratch.normalizer.take() {
            Some(kept) if kept.0 == self.finish && kept.1 == channels => Ok(kept),
            _ => Ok((self.finish.clone(), channels, Normalizer::new(&self.finish, channels)?)),
        }
    }

    /// Operations, then the bytes plane by plane into `out`.
    ///
    /// # Errors
    /// As [`Transform::pixels`]; and when `out` has another length than the image needs.
    pub fn apply_u8(&self, image: &mut Image, key: Key, scratch: &mut Scratch, out: &mut [u8]) -> Result<()> {
        self.pixels(image, key, scratch)?;
        self.finish_u8(image, out)
    }

    /// The finish alone, for an image whose operations are done.
    ///
    /// # Errors
    /// When mean and std do not fit the channels, or `out` has another length than the image needs.
    pub fn finish_f32(&self, image: &Image, scratch: &mut Scratch, out: &mut [f32]) -> Result<()> {
        check_length((image.layout, image.height, image.width), out.len())?;
        let normalizer = self.normalizer(image.layout, scratch)?;
        normalizer.2.planes(image, out);
        scratch.normalizer = Some(normalizer);
        Ok(())
    }

    /// The bytes of an image whose operations are done, plane by plane.
    ///
    /// # Errors
    /// When `out` has another length than the image needs.
    pub fn finish_u8(&self, image: &Image, out: &mut [u8]) -> Result<()> {
        check_length((image.layout, image.height, image.width), out.len())?;
        normalize::bytes(image, out);
        Ok(())
    }
}

fn check_length((layout, height, width): (Layout, usize, usize), length: usize) -> Result<()> {
    let channels = layout.channels();
    if length == channels * height * width {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "the image is {channels} x {height} x {width}, but there is room for {length} values: images of one batch need \
         one size, add Resize((height, width)) or CenterCrop to the transform"
    )))
}

impl Op {
    fn apply(&self, drawn: Drawn, image: &mut Image, order: PillowOrder, scratch: &mut Scratch) -> Result<()> {
        match *self {
            Self::Resize { size, filter } => {
                let (height, width) = size.resolve(image.height, image.width)?;
                resize_with(ResizePath::best(), image, height, width, filter, order, &mut scratch.resize);
            }
            Self::CenterCrop { height, width } => {
                if (image.height, image.width) != (height, width) {
                    center_crop(image, height, width, &mut scratch.spare);
                    std::mem::swap(image, &mut scratch.spare);
                }
            }
            Self::Crop(window) => cut(image, window, scratch)?,
            Self::Pad { border, fill } => {
                pad(image, border, fill, &mut scratch.spare);
                std::mem::swap(image, &mut scratch.spare);
            }
            Self::RandomCrop { height, width, pad_if_needed, fill } => {
                let (rows, columns) = crop::padded_size(image, height, width, pad_if_needed);
                if (rows, columns) != (image.height, image.width) {
                    let (y, x) = ((rows - image.height) / 2, (columns - image.width) / 2);
                    pad(image, [x, y, x, y], fill, &mut scratch.spare);
                    std::mem::swap(image, &mut scratch.spare);
                }
                if let Drawn::Window(window) = drawn {
                    cut(image, window, scratch)?;
                }
            }
            Self::RandomResizedCrop { height, width, filter, .. } => {
                if let Drawn::Window(window) = drawn {
                    cut(image, window, scratch)?;
                }
                let (height, width) = Size::Exact { height, width }.resolve(image.height, image.width)?;
                resize_with(ResizePath::best(), image, height, width, filter, order, &mut scratch.resize);
            }
            Self::Grayscale { channels } => grayscale(image, channels),
            Self::HorizontalFlip { .. } => {
                if drawn == Drawn::Flip(true) {
                    flip_horizontal(image);
                }
            }
            Self::VerticalFlip { .. } => {
                if drawn == Drawn::Flip(true) {
                    flip_vertical(image);
                }
            }
            Self::Rotation { filter, expand, center, fill, .. } => {
                if let Drawn::Angle(angle) = drawn {
                    rotate(image, angle, filter, expand, center, fill, &mut scratch.spare)?;
                    std::mem::swap(image, &mut scratch.spare);
                }
            }
        }
        Ok(())
    }
}

fn cut(image: &mut Image, window: Window, scratch: &mut Scratch) -> Result<()> {
    if !window.lies_in(image) {
        return Err(Error::Argument(format!(
            "Required crop size ({}, {}) is larger than input image size ({}, {}), or its corner ({}, {}) is too far",
            window.height, window.width, image.height, image.width, window.top, window.left
        )));
    }
    crop::crop(image, window, &mut scratch.spare);
    std::mem::swap(image, &mut scratch.spare);
    Ok(())
}
