//! Buffers and tables between images.

#![forbid(unsafe_code)]

use super::resize::ResizeScratch;
use super::{Finish, Image, Normalizer};

/// What one thread keeps between images: buffers and tables. Never part of a result.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) resize: ResizeScratch,
    pub(super) spare: Image,
    pub(super) normalizer: Option<(Finish, usize, Normalizer)>,
}
