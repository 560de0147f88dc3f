//! A list of operations and a finish: what torchvision calls `Compose`.

#![forbid(unsafe_code)]

use super::normalize::{self, Finish, Normalizer};
use super::op::{run_all, shape_behind};
use super::resize::resize_normalized;
use super::{Erasing, Image, Key, Layout, Op, PillowOrder, Scratch, Size};
use crate::error::{Error, Result};

#[derive(Clone, Debug, PartialEq)]
pub struct Transform {
    pub ops: Vec<Op>,
    pub finish: Finish,
    /// Runs on the finished tensor.
    pub erase: Option<Erasing>,
    pub order: PillowOrder,
}

impl Transform {
    /// `(channels, height, width)` if every image comes out the same.
    pub fn output_shape(&self) -> Option<(usize, usize, usize)> {
        let (channels, size) = shape_behind(&self.ops, (3, None));
        size.map(|(height, width)| (channels, height, width))
    }

    /// The size that images become before anything else happens to them: they may be decoded near it at once.
    pub fn first_size(&self) -> Option<Size> {
        match self.ops.first() {
            Some(&Op::Resize { size, .. }) => Some(size),
            _ => None,
        }
    }

    /// The operations only, in place.
    ///
    /// # Errors
    /// When an operation's arguments make no sense for this image.
    pub fn pixels(&self, image: &mut Image, key: Key, scratch: &mut Scratch) -> Result<()> {
        self.run(&self.ops, image, key, scratch)
    }

    fn run(&self, ops: &[Op], image: &mut Image, key: Key, scratch: &mut Scratch) -> Result<()> {
        run_all(ops, &mut key.rng(), image, self.order, scratch)
    }

    /// Operations and finish, into the `channels x height x width` floats of `out`.
    ///
    /// # Errors
    /// As [`Transform::pixels`]; and when `out` has another length than the image needs.
    pub fn apply_f32(&self, image: &mut Image, key: Key, scratch: &mut Scratch, out: &mut [f32]) -> Result<()> {
        let (Some((&Op::Resize { size, filter }, before)), None) = (self.ops.split_last(), &self.erase) else {
            self.pixels(image, key, scratch)?;
            self.finish_f32(image, scratch, out)?;
            return self.erase_f32(image, key, out);
        };
        self.run(before, image, key, scratch)?;
        let (height, width) = size.resolve(image.height, image.width)?;
        check_length((image.layout, height, width), out.len())?;
        let normalizer = self.normalizer(image.layout, scratch)?;
        let done =
            resize_normalized(image, (height, width), filter, self.order, &normalizer.2, &mut scratch.resize, out)?;
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
        self.finish_u8(image, out)?;
        self.erase_u8(image, key, out)
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

impl Transform {
    /// What comes behind the finish; `image` gives the shape of `out`.
    ///
    /// # Errors
    /// When the values to erase with do not fit the channels.
    pub fn erase_f32(&self, image: &Image, key: Key, out: &mut [f32]) -> Result<()> {
        self.erase(image, key, out, |value| value)
    }

    /// [`Transform::erase_f32`] for bytes.
    ///
    /// # Errors
    /// As [`Transform::erase_f32`].
    pub fn erase_u8(&self, image: &Image, key: Key, out: &mut [u8]) -> Result<()> {
        self.erase(image, key, out, |value| value as u8)
    }

    fn erase<T: Copy>(&self, image: &Image, key: Key, out: &mut [T], from: impl Fn(f32) -> T) -> Result<()> {
        let Some(erasing) = &self.erase else { return Ok(()) };
        check_length((image.layout, image.height, image.width), out.len())?;
        // A stream of its own: whoever computes the pixels elsewhere gets the same rectangle.
        let mut rng = key.rng();
        rng.set_stream(1);
        match erasing.draw(&mut rng, image.height, image.width) {
            Some(window) => {
                erasing.fill(window, &mut rng, [image.layout.channels(), image.height, image.width], out, from)
            }
            None => Ok(()),
        }
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
