//! The records of `cnnrs._records` about images, as operations.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use super::record::{Kinds, Names, Record, record, variant};
use crate::data::{Conversion, Output};
use crate::image::{
    AffineForm, AffineRange, Erasing, Filter, Finish, Op, PadMode, PillowOrder, Property, Size, Transform, Window,
};

/// What becomes of an image's pixels; its `ops` may end in an erasure, `finish` None asks for pixels.
pub(super) fn transform(spec: &Bound<'_, PyAny>) -> PyResult<(Transform, Output)> {
    record("transform", spec, |spec| {
        let mut ops: Vec<Step> = steps(spec.get("ops")?)?;
        let erase = match ops.pop() {
            Some(Step::Erase(erasing)) => Some(erasing),
            last => {
                ops.extend(last);
                None
            }
        };
        let ops = ops.into_iter().map(Step::op).collect::<PyResult<_>>()?;
        let order = if spec.get("pillow13")? { PillowOrder::Pillow13 } else { PillowOrder::HorizontalFirst };
        let finish: Option<Bound<'_, PyAny>> = spec.get("finish")?;
        let (finish, output) = match finish {
            Some(finish) => variant("finish", &finish, FINISHES)?,
            None => (Finish::Uint8, Output::Pixels),
        };
        Ok((Transform { ops, finish, erase, order }, output))
    })
}

fn op(spec: &Bound<'_, PyAny>) -> PyResult<Op> {
    step(spec)?.op()
}

/// An operation on pixels, or what may only come last.
enum Step {
    Op(Op),
    Erase(Erasing),
}

impl Step {
    fn op(self) -> PyResult<Op> {
        match self {
            Self::Op(op) => Ok(op),
            Self::Erase(_) => Err(pyo3::exceptions::PyValueError::new_err("only the last operation can be 'erase'")),
        }
    }
}

fn step(spec: &Bound<'_, PyAny>) -> PyResult<Step> {
    variant("image operation", spec, STEPS)
}

fn steps(specs: Vec<Bound<'_, PyAny>>) -> PyResult<Vec<Step>> {
    specs.iter().map(step).collect()
}

fn ops(specs: &[Bound<'_, PyAny>]) -> PyResult<Vec<Op>> {
    specs.iter().map(op).collect()
}

fn branches(specs: &[Vec<Bound<'_, PyAny>>]) -> PyResult<Vec<Vec<Op>>> {
    specs.iter().map(|specs| ops(specs)).collect()
}

const STEPS: &Kinds<Step> = &[
    ("resize", |r| {
        let size = Size::Exact { height: r.get("height")?, width: r.get("width")? };
        done(Op::Resize { size, filter: r.choice("filter", FILTERS)? })
    }),
    ("resize_shorter", |r| {
        let size = Size::Shorter { edge: r.get("edge")?, max_size: r.get("max_size")? };
        done(Op::Resize { size, filter: r.choice("filter", FILTERS)? })
    }),
    ("center_crop", |r| done(Op::CenterCrop { height: r.get("height")?, width: r.get("width")? })),
    ("crop", |r| {
        let (top, left) = (r.get("top")?, r.get("left")?);
        done(Op::Crop(Window { top, left, height: r.get("height")?, width: r.get("width")? }))
    }),
    ("pad", |r| done(Op::Pad { border: r.get("border")?, fill: r.get("fill")?, mode: r.choice("mode", PAD_MODES)? })),
    ("random_crop", |r| {
        done(Op::RandomCrop {
            height: r.get("height")?,
            width: r.get("width")?,
            pad_if_needed: r.get("pad_if_needed")?,
            fill: r.get("fill")?,
            mode: r.choice("mode", PAD_MODES)?,
        })
    }),
    ("random_resized_crop", |r| {
        done(Op::RandomResizedCrop {
            height: r.get("height")?,
            width: r.get("width")?,
            scale: r.get("scale")?,
            ratio: r.get("ratio")?,
            filter: r.choice("filter", FILTERS)?,
        })
    }),
    ("grayscale", |r| done(Op::Grayscale { channels: r.get("channels")? })),
    ("horizontal_flip", |r| done(Op::HorizontalFlip { p: r.get("p")? })),
    ("vertical_flip", |r| done(Op::VerticalFlip { p: r.get("p")? })),
    ("rotation", |r| {
        done(Op::Rotation {
            low: r.get("low")?,
            high: r.get("high")?,
            filter: r.choice("filter", FILTERS)?,
            expand: r.get("expand")?,
            center: r.get("center")?,
            fill: r.get("fill")?,
        })
    }),
    ("affine", |r| {
        let (degrees, translate) = (r.get("degrees")?, r.get("translate")?);
        done(Op::Affine {
            range: AffineRange { degrees, translate, scale: r.get("scale")?, shear: r.get("shear")? },
            filter: r.choice("filter", FILTERS)?,
            center: r.get("center")?,
            fill: r.get("fill")?,
            form: r.choice("form", AFFINE_FORMS)?,
        })
    }),
    ("brightness", |r| adjust(r, Property::Brightness)),
    ("contrast", |r| adjust(r, Property::Contrast)),
    ("saturation", |r| adjust(r, Property::Saturation)),
    ("hue", |r| adjust(r, Property::Hue)),
    ("sharpness", |r| done(Op::Sharpness { factor: r.get("factor")? })),
    ("invert", |_| done(Op::Invert)),
    ("solarize", |r| done(Op::Solarize { threshold: r.get("threshold")? })),
    ("posterize", |r| done(Op::Posterize { bits: r.get("bits")? })),
    ("equalize", |_| done(Op::Equalize)),
    ("autocontrast", |_| done(Op::AutoContrast)),
    ("random_apply", |r| done(Op::RandomApply { p: r.get("p")?, ops: ops(&r.get::<Vec<_>>("ops")?)? })),
    ("random_choice", |r| {
        done(Op::RandomChoice { weights: r.get("weights")?, branches: branches(&r.get::<Vec<_>>("branches")?)? })
    }),
    ("random_order", |r| done(Op::RandomOrder { parts: branches(&r.get::<Vec<_>>("parts")?)? })),
    ("erase", |r| {
        let (p, scale, ratio, value) = (r.get("p")?, r.get("scale")?, r.get("ratio")?, r.get("value")?);
        Ok(Step::Erase(Erasing { p, scale, ratio, value }))
    }),
];

const FILTERS: &Names<Filter> = &[
    ("nearest", Filter::Nearest),
    ("bilinear", Filter::Bilinear),
    ("bicubic", Filter::Bicubic),
    ("box", Filter::Box),
    ("hamming", Filter::Hamming),
    ("lanczos", Filter::Lanczos),
];

const PAD_MODES: &Names<PadMode> = &[
    ("constant", PadMode::Constant),
    ("edge", PadMode::Edge),
    ("reflect", PadMode::Reflect),
    ("symmetric", PadMode::Symmetric),
];

const AFFINE_FORMS: &Names<AffineForm> = &[("v1", AffineForm::V1), ("v2", AffineForm::V2)];

fn done(op: Op) -> PyResult<Step> {
    Ok(Step::Op(op))
}

fn adjust(range: &Record<'_>, property: Property) -> PyResult<Step> {
    done(Op::Adjust { property, low: range.get("low")?, high: range.get("high")? })
}

const FINISHES: &Kinds<(Finish, Output)> = &[
    ("uint8", |_| Ok((Finish::Uint8, Output::Tensor(Conversion::Transform)))),
    ("float", |_| Ok((Finish::Float, Output::Tensor(Conversion::Transform)))),
    ("normalize", |r| {
        let finish = Finish::Normalize { mean: r.get("mean")?, std: r.get("std")? };
        Ok((finish, Output::Tensor(Conversion::Transform)))
    }),
    ("table", |r| {
        let bytes: PyBackedBytes = r.get("values")?;
        let values = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
        Ok((Finish::Float, Output::Tensor(Conversion::Table(values.collect()))))
    }),
];
