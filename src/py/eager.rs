//! `cnnrs._cnnrs.Kernels`: operations that autograd calls, over tensors in `channels_last`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::enter::enter;
use super::error::convert;
use super::record::{Names, record};
use super::tensor::Tensor;
use crate::engine::cpu::eager::{
    Activate, Backward, BatchNorm, Conv3x3, Depthwise, Filters, Forward, Shape, Threads, Workspace,
};
use crate::error::{Error, Result};

/// The threads and the memory that they share.
#[pyclass(frozen, module = "cnnrs._cnnrs")]
pub struct Kernels {
    workspace: Mutex<Workspace>,
    openmp: bool,
}

#[pymethods]
impl Kernels {
    /// `workers`: number of threads; `torch`: the library whose threads are used, where it has some of OpenMP's.
    #[new]
    fn new(py: Python<'_>, workers: usize, torch: Option<PathBuf>) -> PyResult<Self> {
        let threads = Threads::new(workers, torch.as_deref()).map_err(|error| convert(py, error))?;
        let openmp = threads.is_openmp();
        Ok(Self { workspace: Mutex::new(Workspace::new(threads)), openmp })
    }

    /// Whether the threads are PyTorch's own.
    #[getter]
    fn openmp(&self) -> bool {
        self.openmp
    }

    /// A 3 x 3 convolution of stride 1: `input`, `output` (N, H, W, C) and `filters` (O, I, 3, 3) contiguous float32.
    #[pyo3(signature = (input, filters, bias, output, padding))]
    fn conv3x3(
        &self,
        py: Python<'_>,
        input: Tensor,
        filters: Tensor,
        bias: Option<Tensor>,
        output: Tensor,
        padding: usize,
    ) -> PyResult<()> {
        let (from, to) = (shape(&input)?, shape(&output)?);
        let conv = Conv3x3 { input: from, outputs: to.channels, padding };
        check(padding <= 2 && conv.output() == to, "shapes")?;
        check(filters.shape() == [to.channels, from.channels, 3, 3], "filters")?;
        check(bias.as_ref().is_none_or(|bias| bias.shape() == [to.channels]), "bias")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let bias = bias.as_ref().map(floats).transpose()?;
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let to = unsafe { written(&output)? };
            conv.run(floats(&input)?, Filters::AsTheyAre(floats(&filters)?), bias, to, &mut workspace)
        })
    }

    /// The gradient of the input of such a convolution.
    fn conv3x3_input(
        &self,
        py: Python<'_>,
        derivative: Tensor,
        filters: Tensor,
        gradient: Tensor,
        padding: usize,
    ) -> PyResult<()> {
        let (from, to) = (shape(&gradient)?, shape(&derivative)?);
        let conv = Conv3x3 { input: from, outputs: to.channels, padding };
        check(padding <= 2 && conv.output() == to, "shapes")?;
        check(filters.shape() == [to.channels, from.channels, 3, 3], "filters")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let to = unsafe { written(&gradient)? };
            conv.turned().run(floats(&derivative)?, Filters::Turned(floats(&filters)?), None, to, &mut workspace)
        })
    }

    /// The gradient of the filters of such a convolution.
    fn conv3x3_weight(
        &self,
        py: Python<'_>,
        input: Tensor,
        derivative: Tensor,
        gradient: Tensor,
        padding: usize,
    ) -> PyResult<()> {
        let (from, to) = (shape(&input)?, shape(&derivative)?);
        let conv = Conv3x3 { input: from, outputs: to.channels, padding };
        check(conv.output() == to && gradient.shape() == [to.channels, from.channels, 3, 3], "shapes")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let into = unsafe { written(&gradient)? };
            conv.weight_gradient(floats(&input)?, floats(&derivative)?, into, &mut workspace)
        })
    }

    /// The gradient of the filters (C, 1, k, k) of a depthwise convolution.
    fn depthwise_weight(
        &self,
        py: Python<'_>,
        input: Tensor,
        derivative: Tensor,
        gradient: Tensor,
        stride: usize,
        padding: usize,
    ) -> PyResult<()> {
        let kernel = gradient.shape().last().copied().unwrap_or(0);
        let conv = Depthwise { input: images(&input)?, kernel, stride, padding };
        check(conv.is_known() && conv.output() == images(&derivative)?, "shapes")?;
        check(gradient.shape() == [conv.input.channels, 1, kernel, kernel], "filters")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let into = unsafe { written(&gradient)? };
            conv.weight_gradient(floats(&input)?, floats(&derivative)?, into, &mut workspace)
        })
    }

    /// Batch norm, the sum with the residual and an activation; `gather`: mean and variance are computed first.
    fn batch_norm(&self, py: Python<'_>, norm: Norm, output: Tensor, gather: bool) -> PyResult<()> {
        check(output.shape() == norm.input.shape(), "shapes")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            if gather {
                // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
                let (mean, var) = unsafe { (written(&norm.mean)?, written(&norm.var)?) };
                norm.sizes.statistics(floats(&norm.input)?, mean, var, &mut workspace)?;
            }
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            norm.sizes.run(&norm.forward()?, unsafe { written(&output)? }, &mut workspace)
        })
    }

    /// The gradients of all of it; `training`: mean and variance are the batch's own.
    fn batch_norm_backward(
        &self,
        py: Python<'_>,
        norm: Norm,
        derivative: Tensor,
        training: bool,
        gradients: Gradients,
    ) -> PyResult<()> {
        let images = [Some(&derivative), gradients.input.as_ref(), gradients.residual.as_ref()];
        check(images.iter().flatten().all(|x| x.shape() == norm.input.shape()), "shapes")?;
        check([&gradients.weight, &gradients.bias].iter().all(|v| v.shape() == norm.mean.shape()), "vectors")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
            let (x, residual, weight, bias) = unsafe {
                (
                    gradients.input.as_ref().map(|t| written(t)).transpose()?,
                    gradients.residual.as_ref().map(|t| written(t)).transpose()?,
                    written(&gradients.weight)?,
                    written(&gradients.bias)?,
                )
            };
            let derivative = floats(&derivative)?;
            let backward = Backward { forward: norm.forward()?, derivative, training, x, residual, weight, bias };
            norm.sizes.differentiate(backward, &mut workspace)
        })
    }
}

/// What a batch norm reads.
struct Norm {
    sizes: BatchNorm,
    input: Tensor,
    residual: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    mean: Tensor,
    var: Tensor,
}

const ACTIVATIONS: &Names<Activate> = &[
    ("", Activate::Nothing),
    ("ReLU", Activate::Relu),
    ("ReLU6", Activate::Relu6),
    ("Hardswish", Activate::Hardswish),
    ("SiLU", Activate::Silu),
];

impl FromPyObject<'_> for Norm {
    fn extract_bound(norm: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("batch norm", norm, |r| {
            let input: Tensor = r.get("input")?;
            let (eps, activation) = (r.get("eps")?, r.choice("activation", ACTIVATIONS)?);
            let Shape { images, size: [h, w], channels } = images(&input)?;
            let pixels = images * h * w;
            check(BatchNorm::group(pixels, channels).is_some(), "pixels and channels")?;
            let sizes = BatchNorm { pixels, channels, eps, activation };
            let (residual, weight, bias) = (r.get("residual")?, r.get("weight")?, r.get("bias")?);
            let norm = Self { sizes, input, residual, weight, bias, mean: r.get("mean")?, var: r.get("var")? };
            let vectors = [norm.weight.as_ref(), norm.bias.as_ref(), Some(&norm.mean), Some(&norm.var)];
            check(vectors.iter().flatten().all(|v| v.shape() == [channels]), "vectors")?;
            check(norm.residual.as_ref().is_none_or(|x| x.shape() == norm.input.shape()), "shapes")?;
            Ok(norm)
        })
    }
}

impl Norm {
    fn forward(&self) -> Result<Forward<'_>> {
        Ok(Forward {
            x: floats(&self.input)?,
            residual: self.residual.as_ref().map(floats).transpose()?,
            weight: self.weight.as_ref().map(floats).transpose()?,
            bias: self.bias.as_ref().map(floats).transpose()?,
            mean: floats(&self.mean)?,
            var: floats(&self.var)?,
        })
    }
}

/// Where the gradients of a batch norm go.
struct Gradients {
    input: Option<Tensor>,
    residual: Option<Tensor>,
    weight: Tensor,
    bias: Tensor,
}

impl FromPyObject<'_> for Gradients {
    fn extract_bound(gradients: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("gradients", gradients, |r| {
            let (input, residual) = (r.get("input")?, r.get("residual")?);
            Ok(Self { input, residual, weight: r.get("weight")?, bias: r.get("bias")? })
        })
    }
}

/// # Safety
/// Nobody else reads or writes the tensor meanwhile.
#[expect(clippy::mut_from_ref, reason = "a tensor's memory is not its handle's")]
unsafe fn written(tensor: &Tensor) -> Result<&mut [f32]> {
    // SAFETY: `start` has checked that the floats are there; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.start::<f32>()?, tensor.numel()) })
}

fn check(fits: bool, what: &str) -> PyResult<()> {
    if fits { Ok(()) } else { Err(PyValueError::new_err(format!("{what} do not fit"))) }
}

fn images(tensor: &Tensor) -> PyResult<Shape> {
    match *tensor.shape() {
        [images, height, width, channels] if tensor.numel() > 0 => {
            Ok(Shape { images, size: [height, width], channels })
        }
        ref other => Err(PyValueError::new_err(format!("expected (N, H, W, C) without zeros, got {other:?}"))),
    }
}

/// Of images whose channels are whole blocks.
fn shape(tensor: &Tensor) -> PyResult<Shape> {
    let shape = images(tensor)?;
    check(shape.channels % 16 == 0, "channels")?;
    Ok(shape)
}

fn floats(tensor: &Tensor) -> Result<&[f32]> {
    tensor
        .elements()
        .ok_or_else(|| Error::Argument(format!("expected contiguous float32 on cpu, got {}", tensor.describe())))
}
