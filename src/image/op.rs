//! The operations on a uint8 image: what each is called, what it makes of sizes, and which function computes it.

#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;

use super::affine::{AffineForm, affine};
use super::augment::{Drawn, flip_horizontal, flip_vertical, grayscale};
use super::color;
use super::crop::{self, PadMode, Window, center_crop, pad};
use super::resize::resize_with;
use super::{Filter, Image, PillowOrder, ResizePath, Scratch, Size, rotate};
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
    /// Degrees, shares of width and height, a factor, degrees along both axes; all but `translate` are ranges.
    Affine {
        degrees: (f64, f64),
        translate: (f64, f64),
        scale: (f64, f64),
        shear: [(f64, f64); 2],
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
        let nested = |ops: &[Self], image: &mut Image, scratch: &mut Scratch, rng: &mut ChaCha8Rng| {
            ops.iter().try_for_each(|op| op.run(rng, image, order, scratch))
        };
        match (self, self.draw(rng, image)) {
            (Self::RandomApply { ops, .. }, Drawn::Yes(true)) => nested(ops, image, scratch, rng),
            (Self::RandomChoice { branches, .. }, Drawn::Branch(i)) => {
                branches.get(i).map_or(Ok(()), |ops| nested(ops, image, scratch, rng))
            }
            (Self::RandomOrder { parts }, Drawn::Order(order)) => {
                order.iter().filter_map(|&i| parts.get(i)).try_for_each(|ops| nested(ops, image, scratch, rng))
            }
            (op, drawn) => op.apply(drawn, image, order, scratch),
        }
    }

    fn apply(&self, drawn: Drawn, image: &mut Image, order: PillowOrder, scratch: &mut Scratch) -> Result<()> {
        match (self, drawn) {
            (&Self::Resize { size, filter }, _) => {
                let (height, width) = size.resolve(image.height, image.width)?;
                resize_with(ResizePath::best(), image, height, width, filter, order, &mut scratch.resize)?;
            }
            (&Self::CenterCrop { height, width }, _) if (image.height, image.width) != (height, width) => {
                center_crop(image, height, width, &mut scratch.spare)?;
                std::mem::swap(image, &mut scratch.spare);
            }
            (&Self::Crop(window), _) => cut(image, window, scratch)?,
            (&Self::Pad { border, fill, mode }, _) => {
                pad(image, border, fill, mode, &mut scratch.spare)?;
                std::mem::swap(image, &mut scratch.spare);
            }
            (&Self::RandomCrop { height, width, pad_if_needed, fill, mode }, Drawn::Window(window)) => {
                let (rows, columns) = crop::padded_size(image, height, width, pad_if_needed);
                if (rows, columns) != (image.height, image.width) {
                    let (y, x) = ((rows - image.height) / 2, (columns - image.width) / 2);
                    pad(image, [x, y, x, y], fill, mode, &mut scratch.spare)?;
                    std::mem::swap(image, &mut scratch.spare);
                }
                cut(image, window, scratch)?;
            }
            (&Self::RandomResizedCrop { height, width, filter, .. }, Drawn::Window(window)) => {
                cut(image, window, scratch)?;
                let (height, width) = Size::Exact { height, width }.resolve(image.height, image.width)?;
                resize_with(ResizePath::best(), image, height, width, filter, order, &mut scratch.resize)?;
            }
            (&Self::Grayscale { channels }, _) => grayscale(image, channels)?,
            (Self::HorizontalFlip { .. }, Drawn::Yes(true)) => flip_horizontal(image),
            (Self::VerticalFlip { .. }, Drawn::Yes(true)) => flip_vertical(image),
            (&Self::Rotation { filter, expand, center, fill, .. }, Drawn::Number(angle)) => {
                rotate(image, angle, filter, expand, center, fill, &mut scratch.spare)?;
                std::mem::swap(image, &mut scratch.spare);
            }
            (&Self::Affine { filter, center, fill, form, .. }, Drawn::Map(map)) => {
                affine(image, &map, form, filter, center, fill, &mut scratch.spare)?;
                std::mem::swap(image, &mut scratch.spare);
            }
            (&Self::Adjust { property, .. }, Drawn::Number(factor)) => match property {
                Property::Brightness => color::brightness(image, factor),
                Property::Contrast => color::contrast(image, factor),
                Property::Saturation => color::saturation(image, factor),
                Property::Hue => color::hue(image, factor),
            },
            (&Self::Sharpness { factor }, _) => color::sharpness(image, factor, &mut scratch.spare)?,
            (Self::Invert, _) => color::invert(image),
            (&Self::Solarize { threshold }, _) => color::solarize(image, threshold),
            (&Self::Posterize { bits }, _) => color::posterize(image, bits),
            (Self::Equalize, _) => color::equalize(image),
            (Self::AutoContrast, _) => color::autocontrast(image),
            // Crops to the size that is there, flips and groups that the draw decided against.
            _ => {}
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
    crop::crop(image, window, &mut scratch.spare)?;
    std::mem::swap(image, &mut scratch.spare);
    Ok(())
}
