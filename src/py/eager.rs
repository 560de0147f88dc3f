//! `cnnrs._cnnrs.Kernels`: operations that autograd calls, over tensors in `channels_last`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::enter::enter;
use super::error::convert;
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
    #[pyo3(signature = (input, filters, bias, output, padding, turned))]
    fn conv3x3(
        &self,
        py: Python<'_>,
        input: Tensor,
        filters: Tensor,
        bias: Option<Tensor>,
        output: Tensor,
        padding: usize,
        turned: bool,
    ) -> PyResult<()> {
        let (from, to) = (shape(&input)?, shape(&output)?);
        let mut conv = Conv3x3 { input: from, outputs: to.channels, padding };
        if turned {
            conv = Conv3x3 { padding, input: to, outputs: from.channels }.turned();
        }
        check(conv.input == from && conv.output() == to, "shapes")?;
        let wanted = if turned { [from.channels, to.channels, 3, 3] } else { [to.channels, from.channels, 3, 3] };
        check(filters.shape() == wanted, "filters")?;
        check(bias.as_ref().is_none_or(|bias| bias.shape() == [to.channels]), "bias")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let w = floats(&filters)?;
            let filters = if turned { Filters::Turned(w) } else { Filters::AsTheyAre(w) };
            let bias = bias.as_ref().map(floats).transpose()?;
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let to = unsafe { written(&output)? };
            conv.run(floats(&input)?, filters, bias, to, &mut workspace)
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

    /// Batch norm, the sum with `residual` and an activation of (N, H, W, C); `gather`: mean and variance are computed first.
    #[pyo3(signature = (input, residual, weight, bias, mean, var, gather, eps, activation, output))]
    fn batch_norm(
        &self,
        py: Python<'_>,
        input: Tensor,
        residual: Option<Tensor>,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        mean: Tensor,
        var: Tensor,
        gather: bool,
        eps: f64,
        activation: &str,
        output: Tensor,
    ) -> PyResult<()> {
        let norm = batch_norm(&input, eps, activation)?;
        let vectors = [weight.as_ref(), bias.as_ref(), Some(&mean), Some(&var)];
        let images = [residual.as_ref(), Some(&output)];
        check(vectors.iter().flatten().all(|v| v.shape() == [norm.channels]), "vectors")?;
        check(images.iter().flatten().all(|x| x.shape() == input.shape()), "shapes")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let x = floats(&input)?;
            if gather {
                // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
                let (mean, var) = unsafe { (written(&mean)?, written(&var)?) };
                norm.statistics(x, mean, var, &mut workspace)?;
            }
            let forward = forward(x, &residual, &weight, &bias, &mean, &var)?;
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            norm.run(&forward, unsafe { written(&output)? }, &mut workspace)
        })
    }

    /// The gradients of all of it; `training`: mean and variance are the batch's own.
    #[pyo3(signature = (derivative, input, residual, weight, bias, mean, var, training, eps, activation, gradients))]
    fn batch_norm_backward(
        &self,
        py: Python<'_>,
        derivative: Tensor,
        input: Tensor,
        residual: Option<Tensor>,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        mean: Tensor,
        var: Tensor,
        training: bool,
        eps: f64,
        activation: &str,
        gradients: (Option<Tensor>, Option<Tensor>, Tensor, Tensor),
    ) -> PyResult<()> {
        let norm = batch_norm(&input, eps, activation)?;
        let (dx, dr, dw, db) = gradients;
        let vectors = [weight.as_ref(), bias.as_ref(), Some(&mean), Some(&var), Some(&dw), Some(&db)];
        let images = [residual.as_ref(), Some(&derivative), dx.as_ref(), dr.as_ref()];
        check(vectors.iter().flatten().all(|v| v.shape() == [norm.channels]), "vectors")?;
        check(images.iter().flatten().all(|x| x.shape() == input.shape()), "shapes")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
            let (x, residual_gradient, weight_gradient, bias_gradient) = unsafe {
                (
                    dx.as_ref().map(|t| written(t)).transpose()?,
                    dr.as_ref().map(|t| written(t)).transpose()?,
                    written(&dw)?,
                    written(&db)?,
                )
            };
            let backward = Backward {
                forward: forward(floats(&input)?, &residual, &weight, &bias, &mean, &var)?,
                derivative: floats(&derivative)?,
                training,
                x,
                residual: residual_gradient,
                weight: weight_gradient,
                bias: bias_gradient,
            };
            norm.differentiate(backward, &mut workspace)
        })
    }
}

fn batch_norm(input: &Tensor, eps: f64, activation: &str) -> PyResult<BatchNorm> {
    let activation = match activation {
        "" => Activate::Nothing,
        "ReLU" => Activate::Relu,
        "ReLU6" => Activate::Relu6,
        "Hardswish" => Activate::Hardswish,
        "SiLU" => Activate::Silu,
        other => return Err(PyValueError::new_err(format!("no activation {other:?}"))),
    };
    match *input.shape() {
        [n, h, w, channels] if channels > 0 && BatchNorm::group(n * h * w, channels).is_some() => {
            Ok(BatchNorm { pixels: n * h * w, channels, eps, activation })
        }
        ref other => Err(PyValueError::new_err(format!("batch norm of {other:?}"))),
    }
}

fn forward<'a>(
    x: &'a [f32],
    residual: &'a Option<Tensor>,
    weight: &'a Option<Tensor>,
    bias: &'a Option<Tensor>,
    mean: &'a Tensor,
    var: &'a Tensor,
) -> Result<Forward<'a>> {
    Ok(Forward {
        x,
        residual: residual.as_ref().map(floats).transpose()?,
        weight: weight.as_ref().map(floats).transpose()?,
        bias: bias.as_ref().map(floats).transpose()?,
        mean: floats(mean)?,
        var: floats(var)?,
    })
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
