//! How the files of images are read.

use pyo3::prelude::*;

use super::record::{Names, record};
use crate::image::{self, Left, Truncated};

pub const TRUNCATED: &Names<Truncated> = &[("error", Truncated::Error), ("accept", Truncated::Accept)];
const DECODE: &Names<bool> = &[("exact", false), ("scaled", true)];
const LEFT: &Names<bool> = &[("read", false), ("leave", true)];

pub struct ReadOptions {
    pub limits: image::Limits,
    pub exif: bool,
    pub truncated: Truncated,
    pub left: Left,
    /// JPEGs before a resize at a half, a quarter or an eighth of their size.
    pub scaled: bool,
}

impl FromPyObject<'_> for ReadOptions {
    fn extract_bound(options: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("read options", options, |r| {
            let Limits(limits) = r.get::<Bound<'_, PyAny>>("limits")?.extract()?;
            let (exif, truncated) = (r.get("exif")?, r.choice("truncated", TRUNCATED)?);
            let left = Left { deep: r.choice("deep", LEFT)?, paged: r.choice("paged", LEFT)? };
            Ok(Self { limits, exif, truncated, left, scaled: r.choice("decode", DECODE)? })
        })
    }
}

/// Pixels and bytes of a file; None is as many as by default.
pub struct Limits(pub image::Limits);

impl FromPyObject<'_> for Limits {
    fn extract_bound(limits: &Bound<'_, PyAny>) -> PyResult<Self> {
        let default = image::Limits::default();
        record("limits", limits, |r| {
            let (pixels, bytes): (Option<_>, Option<_>) = (r.get("pixels")?, r.get("bytes")?);
            Ok(Self(image::Limits { pixels: pixels.unwrap_or(default.pixels), bytes: bytes.unwrap_or(default.bytes) }))
        })
    }
}
