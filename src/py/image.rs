//! Two doors to single images: for the parity tests against Pillow, and for looking at what a file decodes to.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyTuple};

use super::enter::enter;
use super::loader::op;
use crate::image::{self, Finish, Image, Key, Limits, PillowOrder, Scratch, Transform};

type Pixels<'py> = (usize, usize, Bound<'py, PyBytes>);

fn pixels<'py>(py: Python<'py>, image: &Image) -> Pixels<'py> {
    (image.height, image.width, PyBytes::new(py, &image.to_packed()))
}

/// The bytes of an image file as `(height, width, RGB bytes)`.
#[pyfunction]
pub fn decode_image(py: Python<'_>, data: PyBackedBytes) -> PyResult<Pixels<'_>> {
    let image = enter(py, || {
        let mut image = Image::default();
        image::decode(&data, &Limits::default(), &mut image).map(|()| image)
    })?;
    Ok(pixels(py, &image))
}

/// One operation on an RGB image: `(height, width, bytes)`, three bytes per pixel or one if it is gray afterwards.
#[pyfunction]
pub fn apply_op<'py>(
    py: Python<'py>,
    rgb: PyBackedBytes,
    height: usize,
    width: usize,
    spec: &Bound<'py, PyTuple>,
    order: &str,
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
    let transform = Transform { ops: vec![op(spec)?], finish: Finish::Uint8, order };
    let image = enter(py, || {
        let mut image = Image::from_rgb(width, height, &rgb);
        transform.pixels(&mut image, Key::default(), &mut Scratch::default()).map(|()| image)
    })?;
    Ok(pixels(py, &image))
}
