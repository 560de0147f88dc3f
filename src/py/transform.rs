//! The tuples of `cnnrs.transforms` as operations.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyTuple;

use crate::data::{Finish, Output};
use crate::image::{self, AffineForm, Erasing, Filter, Op, PadMode, PillowOrder, Property, Size, Transform, Window};

/// `ops` may end in an ("erase", ...); `finish=None` asks for pixels.
pub(super) fn transform(
    ops: &[Bound<'_, PyTuple>],
    finish: Option<&Bound<'_, PyTuple>>,
    pillow13: bool,
) -> PyResult<(Transform, Output)> {
    let (finish, output) = self::finish(finish)?;
    let (erase, ops) = match ops.split_last() {
        Some((last, before)) if last.get_item(0)?.extract::<String>()? == "erase" => (Some(erasing(last)?), before),
        _ => (None, ops),
    };
    let order = if pillow13 { PillowOrder::Pillow13 } else { PillowOrder::HorizontalFirst };
    Ok((Transform { ops: ops.iter().map(op).collect::<PyResult<_>>()?, finish, erase, order }, output))
}

pub(super) fn op(spec: &Bound<'_, PyTuple>) -> PyResult<Op> {
    let name: String = spec.get_item(0)?.extract()?;
    let rest = spec.get_slice(1, spec.len());
    Ok(match name.as_str() {
        "resize" => {
            let (height, width, filter): (_, _, String) = rest.extract()?;
            Op::Resize { size: Size::Exact { height, width }, filter: self::filter(&filter)? }
        }
        "resize_shorter" => {
            let (edge, max_size, filter): (_, _, String) = rest.extract()?;
            Op::Resize { size: Size::Shorter { edge, max_size }, filter: self::filter(&filter)? }
        }
        "center_crop" => {
            let (height, width) = rest.extract()?;
            Op::CenterCrop { height, width }
        }
        "crop" => {
            let (top, left, height, width) = rest.extract()?;
            Op::Crop(Window { top, left, height, width })
        }
        "pad" => {
            let (border, fill, mode): (_, _, String) = rest.extract()?;
            Op::Pad { border, fill, mode: pad_mode(&mode)? }
        }
        "random_crop" => {
            let (height, width, pad_if_needed, fill, mode): (_, _, _, _, String) = rest.extract()?;
            Op::RandomCrop { height, width, pad_if_needed, fill, mode: pad_mode(&mode)? }
        }
        "random_resized_crop" => {
            let (height, width, scale, ratio, filter): (_, _, _, _, String) = rest.extract()?;
            Op::RandomResizedCrop { height, width, scale, ratio, filter: self::filter(&filter)? }
        }
        "grayscale" => Op::Grayscale { channels: rest.get_item(0)?.extract()? },
        "horizontal_flip" => Op::HorizontalFlip { p: rest.get_item(0)?.extract()? },
        "vertical_flip" => Op::VerticalFlip { p: rest.get_item(0)?.extract()? },
        "rotation" => {
            let (low, high, filter, expand, center, fill): (_, _, String, _, _, _) = rest.extract()?;
            Op::Rotation { low, high, filter: self::filter(&filter)?, expand, center, fill }
        }
        "affine" => {
            let (degrees, translate, scale, shear, filter, center, fill, v2): (_, _, _, _, String, _, _, bool) =
                rest.extract()?;
            let form = if v2 { AffineForm::V2 } else { AffineForm::V1 };
            Op::Affine { degrees, translate, scale, shear, filter: self::filter(&filter)?, center, fill, form }
        }
        "brightness" => adjust(Property::Brightness, &rest)?,
        "contrast" => adjust(Property::Contrast, &rest)?,
        "saturation" => adjust(Property::Saturation, &rest)?,
        "hue" => adjust(Property::Hue, &rest)?,
        "sharpness" => Op::Sharpness { factor: rest.get_item(0)?.extract()? },
        "invert" => Op::Invert,
        "solarize" => Op::Solarize { threshold: rest.get_item(0)?.extract()? },
        "posterize" => Op::Posterize { bits: rest.get_item(0)?.extract()? },
        "equalize" => Op::Equalize,
        "autocontrast" => Op::AutoContrast,
        "random_apply" => {
            let (p, ops): (_, Vec<Bound<'_, PyTuple>>) = rest.extract()?;
            Op::RandomApply { p, ops: self::ops(&ops)? }
        }
        "random_choice" => {
            let (weights, branches): (_, Vec<Vec<Bound<'_, PyTuple>>>) = rest.extract()?;
            Op::RandomChoice { weights, branches: branches.iter().map(|ops| self::ops(ops)).collect::<PyResult<_>>()? }
        }
        "random_order" => {
            let parts: Vec<Vec<Bound<'_, PyTuple>>> = rest.get_item(0)?.extract()?;
            Op::RandomOrder { parts: parts.iter().map(|ops| self::ops(ops)).collect::<PyResult<_>>()? }
        }
        other => return Err(PyValueError::new_err(format!("unknown image operation {other:?}"))),
    })
}

fn ops(specs: &[Bound<'_, PyTuple>]) -> PyResult<Vec<Op>> {
    specs.iter().map(op).collect()
}

fn adjust(property: Property, range: &Bound<'_, PyTuple>) -> PyResult<Op> {
    let (low, high) = range.extract()?;
    Ok(Op::Adjust { property, low, high })
}

fn erasing(spec: &Bound<'_, PyTuple>) -> PyResult<Erasing> {
    let (p, scale, ratio, value) = spec.get_slice(1, spec.len()).extract()?;
    Ok(Erasing { p, scale, ratio, value })
}

fn filter(name: &str) -> PyResult<Filter> {
    Ok(match name {
        "nearest" => Filter::Nearest,
        "bilinear" => Filter::Bilinear,
        "bicubic" => Filter::Bicubic,
        "box" => Filter::Box,
        "hamming" => Filter::Hamming,
        "lanczos" => Filter::Lanczos,
        other => return Err(PyValueError::new_err(format!("unknown resize filter {other:?}"))),
    })
}

fn pad_mode(name: &str) -> PyResult<PadMode> {
    Ok(match name {
        "constant" => PadMode::Constant,
        "edge" => PadMode::Edge,
        "reflect" => PadMode::Reflect,
        "symmetric" => PadMode::Symmetric,
        other => return Err(PyValueError::new_err(format!("unknown padding mode {other:?}"))),
    })
}

fn finish(spec: Option<&Bound<'_, PyTuple>>) -> PyResult<(image::Finish, Output)> {
    let native = Output::Tensor(Finish::Transform);
    let Some(spec) = spec else { return Ok((image::Finish::Uint8, Output::Pixels)) };
    let name: String = spec.get_item(0)?.extract()?;
    let rest = spec.get_slice(1, spec.len());
    Ok(match name.as_str() {
        "uint8" => (image::Finish::Uint8, native),
        "float" => (image::Finish::Float, native),
        "normalize" => {
            let (mean, std) = rest.extract()?;
            (image::Finish::Normalize { mean, std }, native)
        }
        "table" => {
            let bytes: PyBackedBytes = rest.get_item(0)?.extract()?;
            let values = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            (image::Finish::Float, Output::Tensor(Finish::Table(values.collect())))
        }
        other => return Err(PyValueError::new_err(format!("unknown way to finish an image {other:?}"))),
    })
}
