//! Two doors to single images: for the parity tests against Pillow, and for looking at what a file decodes to.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyTuple};

use super::enter::enter;
use super::transform::op;
use crate::image::{self, Finish, Image, Key, Options, PillowOrder, Scratch, Transform, Truncated};

type Pixels<'py> = (usize, usize, Bound<'py, PyBytes>);

fn pixels<'py>(py: Python<'py>, image: &Image) -> Pixels<'py> {
    (image.height, image.width, PyBytes::new(py, &image.to_packed()))
}

/// The bytes of an image file as `(height, width, RGB bytes)`.
#[pyfunction]
#[pyo3(signature = (data, *, exif=false, truncated="error"))]
pub fn decode_image<'py>(py: Python<'py>, data: PyBackedBytes, exif: bool, truncated: &str) -> PyResult<Pixels<'py>> {
    let truncated = match truncated {
        "error" => Truncated::Error,
        "accept" => Truncated::Accept,
        other => {
            return Err(PyValueError::new_err(format!("truncated={other:?}: expected \"error\" or \"accept\"")));
        }
    };
    let options = Options { exif, truncated, ..Options::default() };
    let image = enter(py, || {
        let mut image = Image::default();
        image::decode_with(&data, &options, &mut image).map(|_| image)
    })?;
    Ok(pixels(py, &image))
}

/// The EXIF orientation of an image file, 1 to 8.
#[pyfunction]
pub fn image_orientation(data: PyBackedBytes) -> u8 {
    image::orientation(&data)
}

/// One operation on an RGB image: `(height, width, bytes)`, three bytes per pixel or one if it is gray afterwards.
/// `key` is (seed, sample, position) of the draws.
#[pyfunction]
#[pyo3(signature = (rgb, height, width, spec, order, key=None))]
pub fn apply_op<'py>(
    py: Python<'py>,
    rgb: PyBackedBytes,
    height: usize,
    width: usize,
    spec: &Bound<'py, PyTuple>,
    order: &str,
    key: Option<(u64, u64, u64)>,
) -> PyResult<Pixels<'py>> {
    if height.checked_mul(width).and_then(|n| n.checked_mul(3)) != Some(rgb.len()) || rgb.is_empty() {
        return Err(PyValueError::new_err(format!(
            "expected {height} x {width} x 3 bytes of RGB and at least one pixel, got {} bytes",
            rgb.len()
        )));
    }
    let order = match order {
        "pillow13" => PillowOrder::Pillow13,
        "horizontal_first" => PillowOrder::HorizontalFirst,
        other => {
            return Err(PyValueError::new_err(format!(
                "unknown order {other:?}: expected \"pillow13\" or \"horizontal_first\""
            )));
        }
    };
    let key = key.map_or(Key::default(), |(seed, sample, position)| Key { seed, sample, position });
    let transform = Transform { ops: vec![op(spec)?], finish: Finish::Uint8, erase: None, order };
    let image = enter(py, || {
        let mut image = Image::from_rgb(width, height, &rgb)?;
        transform.pixels(&mut image, key, &mut Scratch::default()).map(|()| image)
    })?;
    Ok(pixels(py, &image))
}
