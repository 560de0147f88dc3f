//! What is to be loaded: the samples of an epoch, and what happens to each of them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::data::cache::Cache;
use crate::data::spread::Spread;
use crate::error::{Error, Result};
use crate::image::{self, Image, Layout, ReadOptions, Scratch, Transform};

/// Pixels somebody else decoded: packed rows, 1 (gray) or 3 (RGB) bytes per pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raw {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub data: Vec<u8>,
}

impl Raw {
    pub(super) fn of(image: &Image) -> Result<Self> {
        let mut data = Vec::new();
        image.pack(&mut data)?;
        Ok(Self { height: image.height, width: image.width, channels: image.layout.channels(), data })
    }
}

/// Where the pixels of a sample come from.
#[derive(Clone, Debug)]
pub enum Input {
    File(PathBuf),
    /// Image `n` of [`Plan::rows`].
    Row(usize),
    Pixels(Raw),
}

#[derive(Clone, Debug)]
pub struct Sample {
    /// Index in the data set and position in the epoch: the key of its random augmentation.
    pub index: u64,
    pub position: u64,
    pub input: Input,
}

/// How pixels become numbers.
pub enum Conversion {
    /// As the transform says.
    Transform,
    /// As the transform says, on gray rows.
    Spread(Spread),
    /// `channels x 256` values: any chain of point operations, as its owner computed it.
    Table(Vec<f32>),
}

pub enum Output {
    /// The transform's pixels, for an operation that only Python knows.
    Pixels,
    Tensor(Conversion),
}

/// Gray images of one size behind each other in memory.
pub struct Rows {
    pub data: Box<dyn AsRef<[u8]> + Send + Sync>,
    pub height: usize,
    pub width: usize,
}

impl Rows {
    pub(super) fn get(&self, row: usize) -> Result<&[u8]> {
        let size = self.height * self.width;
        let end = row.checked_add(1).and_then(|next| next.checked_mul(size));
        let pixels = end.and_then(|end| (*self.data).as_ref().get(end - size..end));
        pixels.ok_or_else(|| Error::Argument(format!("image {row} is outside the data it was to be read from")))
    }
}

/// What happens to every sample of an epoch.
pub struct Plan {
    pub rows: Option<Rows>,
    pub transform: Transform,
    pub output: Output,
    pub read: ReadOptions,
    pub seed: u64,
    pub(super) kept: Option<Kept>,
    /// Whether one of the files had an orientation other than upright.
    pub(super) turned: AtomicBool,
}

/// Images that are not decoded again.
pub struct Kept {
    pub cache: Arc<Cache>,
    /// The operations whose results are kept; those of [`Plan::transform`] follow.
    pub prefix: Transform,
    /// What comes out in the end, where every image has one size.
    shape: Option<(usize, usize, usize)>,
}

impl Plan {
    pub fn new(transform: Transform, output: Output, read: ReadOptions, seed: u64) -> Self {
        Self { rows: None, transform, output, read, seed, kept: None, turned: AtomicBool::new(false) }
    }

    /// The same plan that keeps its files' images in `cache`, as the first `ops` operations leave them. None of these
    /// may be random.
    #[must_use]
    pub fn keeping(mut self, cache: Arc<Cache>, ops: usize) -> Self {
        let shape = self.transform.output_shape();
        let mut prefix = self.transform.clone();
        self.transform.ops = prefix.ops.split_off(ops.min(prefix.ops.len()));
        self.kept = Some(Kept { cache, prefix, shape });
        self
    }

    /// `(channels, height, width)` of every sample, if that is known before one is read.
    pub(super) fn shape(&self) -> Option<(usize, usize, usize)> {
        self.kept.as_ref().map_or_else(|| self.transform.output_shape(), |kept| kept.shape)
    }

    /// Whether a sample is a table look-up, which costs less than handing it to another thread.
    pub(super) fn is_trivial(&self) -> bool {
        let only_finish = self.transform.ops.is_empty() && self.transform.erase.is_none();
        self.rows.is_some() && only_finish && matches!(self.output, Output::Tensor(_))
    }

    /// The row that `input` is, when there is nothing to do but to look its pixels up.
    pub(super) fn row_only(&self, input: &Input) -> Option<usize> {
        match input {
            Input::Row(row) if self.is_trivial() && (self.spread().is_some() || self.is_bytes()) => Some(*row),
            _ => None,
        }
    }

    /// What each byte of a gray image becomes.
    pub(super) fn spread(&self) -> Option<&Spread> {
        match &self.output {
            Output::Tensor(Conversion::Spread(spread)) => Some(spread),
            _ => None,
        }
    }

    pub(super) fn is_bytes(&self) -> bool {
        matches!((&self.output, &self.transform.finish), (Output::Tensor(Conversion::Transform), image::Finish::Uint8))
    }

    /// The same plan with the finish of gray rows as a table, in the transform's own numbers.
    pub(super) fn tabulated(mut self) -> Self {
        if !self.is_trivial() || self.is_bytes() {
            return self;
        }
        let known = match &self.output {
            Output::Tensor(Conversion::Table(values)) => values.as_slice().try_into().ok().map(|table| (table, None)),
            Output::Tensor(Conversion::Transform) => {
                let every = Image { width: 256, height: 1, layout: Layout::Gray, data: (0..=255).collect() };
                let mut table = [0.0; 256];
                let mean_std = match &self.transform.finish {
                    image::Finish::Normalize { mean, std } => mean.first().copied().zip(std.first().copied()),
                    image::Finish::Float | image::Finish::Uint8 => Some((0.0, 1.0)),
                };
                // An error is due when a sample meets it.
                let outcome = self.transform.finish_f32(&every, &mut Scratch::default(), &mut table);
                outcome.is_ok().then_some((table, mean_std))
            }
            _ => None,
        };
        if let Some((table, mean_std)) = known {
            self.output = Output::Tensor(Conversion::Spread(Spread::new(table, mean_std)));
        }
        self
    }
}
