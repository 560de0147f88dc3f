//! What became of a batch.

use crate::data::batch::Batch;
use crate::data::plan::Raw;
use crate::error::Error;

pub struct Failure {
    /// Place in the batch.
    pub sample: usize,
    pub error: Error,
}

pub enum Ready {
    Batch(Batch),
    /// Samples of different shapes.
    Ragged(Vec<Batch>),
    Pixels(Vec<Raw>),
    /// Some samples have no pixels: [`super::Loader::retry`] each of them with pixels from elsewhere,
    /// [`super::Loader::drop_samples`], or [`super::Loader::discard`] the batch.
    Failed(Vec<Failure>),
}
