//! The operations on a uint8 image: what each is called, what it makes of sizes, and which function computes it.

#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;

use super::affine::{AffineForm, AffineRange, affine};
use super::crop::{self, PadMode, Window, center_crop, pad};
use super::flip::{flip_horizontal, flip_vertical};
use super::resize::resize_with;
use super::{Filter, Image, PillowOrder, ResizePath, Scratch, Size, color, draw, rotate};
use crate::error::{Error, Result};

/// One operation, parameters as torchvision spells them.
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
    /// A border: left, top, right, bottom.
    Pad {
        border: [usize; 4],
        fill: [u8; 3],
        mode: PadMode,
    },
    /// Any window of that size; torchvision's `padding` is a [`Op::Pad`] in front.
    RandomCrop {
        height: usize,
        width: usize,
        pad_if_needed: bool,
        fill: [u8; 3],
        mode: PadMode,
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
    Affine {
        range: AffineRange,
        filter: Filter,
        center: Option<(f64, f64)>,
        fill: [u8; 3],
        form: AffineForm,
    },
    /// One of the four of `ColorJitter`, its factor drawn from `[low, high)`.
    Adjust {
        property: Property,
        low: f64,
        high: f64,
    },
    Sharpness {
        factor: f64,
    },
    Invert,
    Solarize {
        threshold: f64,
    },
    Posterize {
        bits: u8,
    },
    Equalize,
    AutoContrast,
    /// All of them, with probability `p`.
    RandomApply {
        p: f64,
        ops: Vec<Op>,
    },
    /// One of them, with probability proportional to its weight.
    RandomChoice {
        weights: Vec<f64>,
        branches: Vec<Vec<Op>>,
    },
    /// All of them, in any order.
    RandomOrder {
        parts: Vec<Vec<Op>>,
    },
}

/// What [`Op::Adjust`] adjusts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    Brightness,
    Contrast,
    Saturation,
    Hue,
}

/// Channels, and height and width where they are known.
pub(super) type Shape = (usize, Option<(usize, usize)>);

/// The shape behind all of `ops`.
pub(super) fn shape_behind(ops: &[Op], shape: Shape) -> Shape {
    ops.iter().fold(shape, |shape, op| op.shape_behind(shape))
}

impl Op {
    fn shape_behind(&self, (channels, size): Shape) -> Shape {
        // Branches that do not agree leave the size to the draw. Their channels agree: the lowering sees to it.
        let behind = |ops: &[Self]| shape_behind(ops, (channels, size));
        let agreed = |shapes: Vec<Shape>| {
            let first = shapes.first().copied().unwrap_or((channels, size));
            if shapes.iter().all(|&shape| shape == first) { first } else { (first.0, None) }
        };
        match *self {
            Self::Resize { size: Size::Exact { height, width }, .. }
            | Self::CenterCrop { height, width }
            | Self::Crop(Window { height, width, .. })
            | Self::RandomCrop { height, width, .. }
            | Self::RandomResizedCrop { height, width, .. } => (channels, Some((height, width))),
            Self::Pad { border: [left, top, right, bottom], .. } => {
                (channels, size.map(|(height, width)| (top + height + bottom, left + width + right)))
            }
            Self::Resize { size: shorter @ Size::Shorter { .. }, .. } => {
                (channels, size.and_then(|(height, width)| shorter.resolve(height, width).ok()))
            }
            Self::Grayscale { channels } => (channels, size),
            Self::Rotation { expand: true, .. } => (channels, None),
            Self::RandomApply { ref ops, .. } => agreed(vec![behind(ops), (channels, size)]),
            Self::RandomChoice { ref branches, .. } => agreed(branches.iter().map(|ops| behind(ops)).collect()),
            // Whatever the order, only parts that keep the size give a size that is known.
            Self::RandomOrder { ref parts } => {
                agreed(parts.iter().map(|ops| behind(ops)).chain([(channels, size)]).collect())
            }
            Self::HorizontalFlip { .. }
            | Self::VerticalFlip { .. }
            | Self::Rotation { .. }
            | Self::Affine { .. }
            | Self::Adjust { .. }
            | Self::Sharpness { .. }
            | Self::Invert
            | Self::Solarize { .. }
            | Self::Posterize { .. }
            | Self::Equalize
            | Self::AutoContrast => (channels, size),
        }
    }

    /// Draws what chance decides, then computes.
    pub(super) fn run(
        &self,
        rng: &mut ChaCha8Rng,
        image: &mut Image,
        order: PillowOrder,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let size = (image.height, image.width);
        // Without a wildcard: an operation that does nothing has to say so.
        match *self {
            Self::Resize { size, filter } => resize(image, size, filter, order, scratch),
            Self::CenterCrop { height, width } if (height, width) == size => Ok(()),
            Self::CenterCrop { height, width } => {
                into_spare(image, scratch, |image, out| center_crop(image, height, width, out))
            }
            Self::Crop(window) => cut(image, window, scratch),
            Self::Pad { border, fill, mode } => {
                into_spare(image, scratch, |image, out| pad(image, border, fill, mode, out))
            }
            Self::RandomCrop { height, width, pad_if_needed, fill, mode } => {
                let (rows, columns) = crop::padded_size(image, height, width, pad_if_needed);
                let window = crop::random_window(rng, rows, columns, height, width);
                if (rows, columns) != size {
                    let (y, x) = ((rows - image.height) / 2, (columns - image.width) / 2);
                    into_spare(image, scratch, |image, out| pad(image, [x, y, x, y], fill, mode, out))?;
                }
                cut(image, window, scratch)
            }
            Self::RandomResizedCrop { height, width, scale, ratio, filter } => {
                let window = crop::random_resized_window(rng, image.height, image.width, scale, ratio);
                cut(image, window, scratch)?;
                resize(image, Size::Exact { height, width }, filter, order, scratch)
            }
            Self::Grayscale { channels } => color::grayscale(image, channels),
            Self::HorizontalFlip { p } => {
                if draw::chance(rng, p) {
                    flip_horizontal(image);
                }
                Ok(())
            }
            Self::VerticalFlip { p } => {
                if draw::chance(rng, p) {
                    flip_vertical(image);
                }
                Ok(())
            }
            Self::Rotation { low, high, filter, expand, center, fill } => {
                let angle = draw::number(rng, (low, high));
                into_spare(image, scratch, |image, out| rotate(image, angle, filter, expand, center, fill, out))
            }
            Self::Affine { range, filter, center, fill, form } => {
                let map = range.draw(rng, image.width, image.height);
                into_spare(image, scratch, |image, out| affine(image, &map, form, filter, center, fill, out))
            }
            Self::Adjust { property, low, high } => {
                let factor = draw::number(rng, (low, high));
                match property {
                    Property::Brightness => color::brightness(image, factor),
                    Property::Contrast => color::contrast(image, factor),
                    Property::Saturation => color::saturation(image, factor),
                    Property::Hue => color::hue(image, factor),
                }
                Ok(())
            }
            Self::Sharpness { factor } => color::sharpness(image, factor, &mut scratch.spare),
            Self::Invert => {
                color::invert(image);
                Ok(())
            }
            Self::Solarize { threshold } => {
                color::solarize(image, threshold);
                Ok(())
            }
            Self::Posterize { bits } => {
                color::posterize(image, bits);
                Ok(())
            }
            Self::Equalize => {
                color::equalize(image);
                Ok(())
            }
            Self::AutoContrast => {
                color::autocontrast(image);
                Ok(())
            }
            Self::RandomApply { p, ref ops } => {
                if draw::chance(rng, p) {
                    run_all(ops, rng, image, order, scratch)?;
                }
                Ok(())
            }
            Self::RandomChoice { ref weights, ref branches } => {
                let chosen = branches.get(draw::choice(rng, weights));
                chosen.map_or(Ok(()), |ops| run_all(ops, rng, image, order, scratch))
            }
            Self::RandomOrder { ref parts } => {
                let places = draw::order(rng, parts.len());
                places.iter().try_for_each(|&i| run_all(&parts[i], rng, image, order, scratch))
            }
        }
    }
}

/// One after the other.
pub(super) fn run_all(
    ops: &[Op],
    rng: &mut ChaCha8Rng,
    image: &mut Image,
    order: PillowOrder,
    scratch: &mut Scratch,
) -> Result<()> {
    ops.iter().try_for_each(|op| op.run(rng, image, order, scratch))
}

fn resize(image: &mut Image, size: Size, filter: Filter, order: PillowOrder, scratch: &mut Scratch) -> Result<()> {
    let (height, width) = size.resolve(image.height, image.width)?;
    resize_with(ResizePath::best(), image, height, width, filter, order, &mut scratch.resize)
}

/// The image becomes what `work` makes of it; the two buffers change places.
fn into_spare(
    image: &mut Image,
    scratch: &mut Scratch,
    work: impl FnOnce(&Image, &mut Image) -> Result<()>,
) -> Result<()> {
    work(image, &mut scratch.spare)?;
    std::mem::swap(image, &mut scratch.spare);
    Ok(())
}

fn cut(image: &mut Image, window: Window, scratch: &mut Scratch) -> Result<()> {
    if !window.lies_in(image) {
        return Err(Error::Argument(format!(
            "Required crop size ({}, {}) is larger than input image size ({}, {}), or its corner ({}, {}) is too far",
            window.height, window.width, image.height, image.width, window.top, window.left
        )));
    }
    into_spare(image, scratch, |image, out| crop::crop(image, window, out))
}
