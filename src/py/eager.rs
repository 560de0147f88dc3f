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
    Activate, Backward, BatchNorm, Conv3x3, Depthwise, Derivative, Filters, Forward, Gate, Gradients, Late, Moments,
    Norm, Open, Pointwise, Shape, Sums, Threads, Values, Workspace,
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

    /// A 1 x 1 convolution of stride 1 or a depthwise one, of `input` or of what `norm` and (for 1 x 1) `gate` make of it;
    /// `moments`: where mean and variance of the output go.
    #[pyo3(signature = (input, norm, gate, filters, output, stride, padding, moments))]
    #[expect(clippy::too_many_arguments, reason = "what a convolution has")]
    fn convolution(
        &self,
        py: Python<'_>,
        input: Tensor,
        norm: Option<NormRecord>,
        gate: Option<Tensor>,
        filters: Tensor,
        output: Tensor,
        stride: usize,
        padding: usize,
        moments: Option<(Tensor, Tensor)>,
    ) -> PyResult<()> {
        let conv = Convolution::of(&input, &filters, &output, stride, padding)?;
        check(norm.as_ref().is_none_or(|norm| norm.channels() == conv.input.channels), "vectors")?;
        conv.check_gate(norm.as_ref(), gate.as_ref())?;
        let vectors = moments.iter().flat_map(|(mean, var)| [mean, var]);
        check(vectors.into_iter().all(|v| v.shape() == [conv.output.channels]), "vectors")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let norm = norm.as_ref().map(NormRecord::norm).transpose()?;
            let values = Values { x: floats(&input)?, norm: norm.as_ref(), open: conv.open(gate.as_ref())? };
            let mut gathered = moments.is_some().then(Moments::default);
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let to = unsafe { written(&output)? };
            match conv.kind {
                Kind::Pointwise(of) => of.run(values, floats(&filters)?, to, gathered.as_mut(), &mut workspace)?,
                Kind::Depthwise(of) => of.run(values, floats(&filters)?, to, gathered.as_mut(), &mut workspace)?,
            }
            if let (Some((mean, var)), Some(from)) = (&moments, gathered) {
                // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
                let (mean, var) = unsafe { (written(mean)?, written(var)?) };
                mean.copy_from_slice(&from.mean);
                var.copy_from_slice(&from.var);
            }
            Ok(())
        })
    }

    /// The gradients of such a convolution and of the norm in front of it. With a norm, that of `input` goes as far as the
    /// result of the norm, with a gate as far as the gate's. `late`: what is left to do to `derivative`, that of `output`.
    #[pyo3(signature = (input, norm, gate, filters, stride, padding, derivative, output, late, gradients))]
    #[expect(clippy::too_many_arguments, reason = "what a convolution has")]
    fn convolution_backward(
        &self,
        py: Python<'_>,
        input: Tensor,
        norm: Option<NormRecord>,
        gate: Option<Tensor>,
        filters: Tensor,
        stride: usize,
        padding: usize,
        derivative: Tensor,
        output: Option<Tensor>,
        late: Option<LateRecord>,
        gradients: ConvolutionGradients,
    ) -> PyResult<()> {
        let conv = Convolution::of(&input, &filters, &derivative, stride, padding)?;
        check(norm.as_ref().is_none_or(|norm| norm.channels() == conv.input.channels), "vectors")?;
        check(late.as_ref().is_none_or(|late| late.norm.channels() == conv.output.channels), "vectors")?;
        check(output.as_ref().is_none_or(|x| x.shape() == derivative.shape()), "shapes")?;
        check(late.is_none() || output.is_some(), "output and late")?;
        check(gradients.input.as_ref().is_none_or(|x| x.shape() == input.shape()), "shapes")?;
        check(gradients.filters.as_ref().is_none_or(|x| x.shape() == filters.shape()), "filters")?;
        check(gradients.vectors().all(|v| v.shape() == [conv.input.channels]), "vectors")?;
        check(norm.is_some() && gate.is_none() || gradients.vectors().next().is_none(), "vectors")?;
        conv.check_gate(norm.as_ref(), gate.as_ref())?;
        check(gradients.gate.as_ref().is_none_or(|g| gate.as_ref().is_some_and(|of| g.shape() == of.shape())), "gate")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let made = norm.as_ref().map(NormRecord::norm).transpose()?;
            let values = Values { x: floats(&input)?, norm: made.as_ref(), open: conv.open(gate.as_ref())? };
            let pixels = output.as_ref().map_or(0, Tensor::numel) / conv.output.channels;
            let late = match (&late, &output) {
                (Some(late), Some(output)) => Some(late.late(floats(output)?, pixels)?),
                _ => None,
            };
            let derivative = Derivative { d: floats(&derivative)?, late: late.as_ref() };
            let mut sums = gradients.weight.is_some().then(Sums::default);
            // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
            let (dx, dg, df) = unsafe {
                (
                    gradients.input.as_ref().map(|t| written(t)).transpose()?,
                    gradients.gate.as_ref().map(|t| written(t)).transpose()?,
                    gradients.filters.as_ref().map(|t| written(t)).transpose()?,
                )
            };
            let (filters, to) = (floats(&filters)?, Gradients { dx, sums: sums.as_mut(), open: dg, weight: df });
            match conv.kind {
                Kind::Pointwise(of) => of.differentiate(values, filters, derivative, to, &mut workspace)?,
                Kind::Depthwise(of) => of.differentiate(values, filters, derivative, to, &mut workspace)?,
            }
            if let (Some(norm), Some(sums), Some(weight), Some(bias)) = (norm, sums, gradients.weight, gradients.bias) {
                // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
                unsafe { norm.gradients(&sums, &weight, &bias)? };
            }
            Ok(())
        })
    }

    /// The mean (N, C) over every image of what `norm` makes of `input`.
    fn squeeze(&self, py: Python<'_>, input: Tensor, norm: NormRecord, mean: Tensor) -> PyResult<()> {
        let gate = gate(&input, &norm, &mean)?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            gate.squeeze(floats(&input)?, &norm.norm()?, unsafe { written(&mean)? }, &mut workspace)
        })
    }

    /// From `derivative`, that of a gate's result, and `mean`, that of the mean from which the gate was made: the derivative
    /// of the norm's result, in its place, and the gradients of the norm's weight and bias.
    #[expect(clippy::too_many_arguments, reason = "what a gate has")]
    fn squeeze_backward(
        &self,
        py: Python<'_>,
        input: Tensor,
        norm: NormRecord,
        gate: Tensor,
        mean: Tensor,
        derivative: Tensor,
        gradients: (Tensor, Tensor),
    ) -> PyResult<()> {
        let sizes = self::gate(&input, &norm, &mean)?;
        check(gate.shape() == mean.shape() && derivative.shape() == input.shape(), "shapes")?;
        check([&gradients.0, &gradients.1].iter().all(|v| v.shape() == norm.mean.shape()), "vectors")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let (made, mut sums) = (norm.norm()?, Sums::default());
            // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
            unsafe {
                let (read, d) = ((floats(&input)?, &made), written(&derivative)?);
                sizes.differentiate(read, floats(&gate)?, floats(&mean)?, d, &mut sums, &mut workspace)?;
                norm.gradients(&sums, &gradients.0, &gradients.1)
            }
        })
    }

    /// Does what is left to do to `late`'s derivative, in its place; `input`: the batch norm's.
    fn finish(&self, py: Python<'_>, input: Tensor, late: LateRecord) -> PyResult<()> {
        let channels = images(&input)?.channels;
        check(late.derivative.shape() == input.shape(), "shapes")?;
        check(late.norm.channels() == channels, "vectors")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            let made = late.late(floats(&input)?, input.numel() / channels)?;
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            made.finish(unsafe { written(&late.derivative)? }, &mut workspace)
        })
    }

    /// Mean and biased variance of every channel.
    fn moments(&self, py: Python<'_>, input: Tensor, mean: Tensor, var: Tensor) -> PyResult<()> {
        let norm = batch_norm(&input, Activate::Nothing, 0.0)?;
        check([&mean, &var].iter().all(|v| v.shape() == [norm.channels]), "vectors")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
            let (mean, var) = unsafe { (written(&mean)?, written(&var)?) };
            norm.statistics(floats(&input)?, mean, var, &mut workspace)
        })
    }

    /// Batch norm, the sum with the residual and an activation.
    #[pyo3(signature = (input, residual, norm, output))]
    fn batch_norm(
        &self,
        py: Python<'_>,
        input: Tensor,
        residual: Option<Tensor>,
        norm: NormRecord,
        output: Tensor,
    ) -> PyResult<()> {
        let sizes = batch_norm(&input, norm.activation, norm.eps)?;
        check(norm.channels() == sizes.channels, "vectors")?;
        check([Some(&output), residual.as_ref()].iter().flatten().all(|x| x.shape() == input.shape()), "shapes")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: a new tensor of the caller's, which nobody else reads or writes meanwhile.
            let to = unsafe { written(&output)? };
            sizes.run(&norm.forward(&input, residual.as_ref())?, to, &mut workspace)
        })
    }

    /// The gradients of all of it; `training`: mean and variance are the batch's own.
    #[pyo3(signature = (input, residual, norm, derivative, training, gradients))]
    #[expect(clippy::too_many_arguments, reason = "what a batch norm has")]
    fn batch_norm_backward(
        &self,
        py: Python<'_>,
        input: Tensor,
        residual: Option<Tensor>,
        norm: NormRecord,
        derivative: Tensor,
        training: bool,
        gradients: NormGradients,
    ) -> PyResult<()> {
        let sizes = batch_norm(&input, norm.activation, norm.eps)?;
        let images = [Some(&derivative), residual.as_ref(), gradients.input.as_ref(), gradients.residual.as_ref()];
        check(images.iter().flatten().all(|x| x.shape() == input.shape()), "shapes")?;
        check(norm.channels() == sizes.channels, "vectors")?;
        check([&gradients.weight, &gradients.bias].iter().all(|v| v.shape() == norm.mean.shape()), "vectors")?;
        enter(py, move || {
            let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: new tensors of the caller's, which nobody else reads or writes meanwhile.
            let (x, dr, weight, bias) = unsafe {
                (
                    gradients.input.as_ref().map(|t| written(t)).transpose()?,
                    gradients.residual.as_ref().map(|t| written(t)).transpose()?,
                    written(&gradients.weight)?,
                    written(&gradients.bias)?,
                )
            };
            let (forward, derivative) = (norm.forward(&input, residual.as_ref())?, floats(&derivative)?);
            let backward = Backward { forward, derivative, training, x, residual: dr, weight, bias };
            sizes.differentiate(backward, &mut workspace)
        })
    }
}

fn batch_norm(input: &Tensor, activation: Activate, eps: f64) -> PyResult<BatchNorm> {
    let Shape { images, size: [h, w], channels } = images(input)?;
    let pixels = images * h * w;
    check(BatchNorm::group(pixels, channels).is_some(), "pixels and channels")?;
    Ok(BatchNorm { pixels, channels, eps, activation })
}

fn gate(input: &Tensor, norm: &NormRecord, mean: &Tensor) -> PyResult<Gate> {
    let Shape { images, size: [h, w], channels } = images(input)?;
    check(channels >= 16 && mean.shape() == [images, channels], "means")?;
    check(norm.channels() == channels, "vectors")?;
    Ok(Gate { images, pixels: h * w, channels })
}

/// A convolution that has a kernel.
struct Convolution {
    input: Shape,
    output: Shape,
    kind: Kind,
}

enum Kind {
    Pointwise(Pointwise),
    Depthwise(Depthwise),
}

impl Convolution {
    fn of(input: &Tensor, filters: &Tensor, output: &Tensor, stride: usize, padding: usize) -> PyResult<Self> {
        let (input, output) = (images(input)?, images(output)?);
        let [outputs, inputs, kernel, width] = *filters.shape() else {
            return Err(PyValueError::new_err("filters do not fit"));
        };
        check(outputs == output.channels && kernel == width, "filters")?;
        if kernel == 1 {
            let pixels = input.images * input.size[0] * input.size[1];
            let of = Pointwise { pixels, inputs, outputs };
            check(inputs == input.channels && of.is_known(), "filters")?;
            check((stride, padding) == (1, 0) && (Shape { channels: outputs, ..input }) == output, "shapes")?;
            return Ok(Self { input, output, kind: Kind::Pointwise(of) });
        }
        let of = Depthwise { input, kernel, stride, padding, outputs: output.size };
        check(inputs == 1 && outputs == input.channels, "filters")?;
        check(of.is_known() && of.output() == output, "shapes")?;
        Ok(Self { input, output, kind: Kind::Depthwise(of) })
    }

    /// A gate is behind a norm and in front of a 1 x 1 convolution.
    fn check_gate(&self, norm: Option<&NormRecord>, gate: Option<&Tensor>) -> PyResult<()> {
        let fits = |gate: &Tensor| gate.shape() == [self.input.images, self.input.channels];
        let may = norm.is_some() && matches!(self.kind, Kind::Pointwise(_));
        check(gate.is_none_or(|gate| may && fits(gate)), "gate")
    }

    fn open<'a>(&self, gate: Option<&'a Tensor>) -> Result<Option<Open<'a>>> {
        let pixels = self.input.size[0] * self.input.size[1];
        gate.map(|gate| Ok(Open { factors: floats(gate)?, pixels })).transpose()
    }
}

/// A batch norm and an activation.
struct NormRecord {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    mean: Tensor,
    var: Tensor,
    eps: f64,
    activation: Activate,
}

const ACTIVATIONS: &Names<Activate> = &[
    ("", Activate::Nothing),
    ("ReLU", Activate::Relu),
    ("ReLU6", Activate::Relu6),
    ("Hardswish", Activate::Hardswish),
    ("SiLU", Activate::Silu),
];

impl FromPyObject<'_> for NormRecord {
    fn extract_bound(norm: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("batch norm", norm, |r| {
            let (eps, activation) = (r.get("eps")?, r.choice("activation", ACTIVATIONS)?);
            let (weight, bias) = (r.get("weight")?, r.get("bias")?);
            let norm = Self { weight, bias, mean: r.get("mean")?, var: r.get("var")?, eps, activation };
            let vectors = [norm.weight.as_ref(), norm.bias.as_ref(), Some(&norm.mean), Some(&norm.var)];
            check(vectors.iter().flatten().all(|v| v.shape() == [norm.channels()]), "vectors")?;
            Ok(norm)
        })
    }
}

impl NormRecord {
    fn channels(&self) -> usize {
        self.mean.numel()
    }

    fn norm(&self) -> Result<Norm> {
        let weight = self.weight.as_ref().map(floats).transpose()?;
        let bias = self.bias.as_ref().map(floats).transpose()?;
        Ok(Norm::new(weight, bias, floats(&self.mean)?, floats(&self.var)?, self.eps, self.activation))
    }

    /// Those of weight and bias from the sums of the derivative.
    ///
    /// # Safety
    /// Nobody else reads or writes the tensors meanwhile.
    unsafe fn gradients(&self, sums: &Sums, weight: &Tensor, bias: &Tensor) -> Result<()> {
        // SAFETY: the caller's promise.
        let (weight, bias) = unsafe { (written(weight)?, written(bias)?) };
        for ((to, &product), &var) in weight.iter_mut().zip(&sums.product).zip(floats(&self.var)?) {
            *to = (product / (f64::from(var) + self.eps).sqrt()) as f32;
        }
        for (to, &plain) in bias.iter_mut().zip(&sums.plain) {
            *to = plain as f32;
        }
        Ok(())
    }

    fn forward<'a>(&'a self, input: &'a Tensor, residual: Option<&'a Tensor>) -> Result<Forward<'a>> {
        Ok(Forward {
            x: floats(input)?,
            residual: residual.map(floats).transpose()?,
            weight: self.weight.as_ref().map(floats).transpose()?,
            bias: self.bias.as_ref().map(floats).transpose()?,
            mean: floats(&self.mean)?,
            var: floats(&self.var)?,
        })
    }
}

/// What is left to do to a derivative.
struct LateRecord {
    norm: NormRecord,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    derivative: Tensor,
}

impl FromPyObject<'_> for LateRecord {
    fn extract_bound(late: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("late", late, |r| {
            let norm: NormRecord = r.get("norm")?;
            let (weight, bias): (Tensor, Tensor) = (r.get("weight")?, r.get("bias")?);
            check([&weight, &bias].iter().all(|v| v.shape() == norm.mean.shape()), "vectors")?;
            Ok(Self { norm, weight, bias, training: r.get("training")?, derivative: r.get("derivative")? })
        })
    }
}

impl LateRecord {
    fn late<'a>(&self, x: &'a [f32], pixels: usize) -> Result<Late<'a>> {
        let gradients = [floats(&self.weight)?, floats(&self.bias)?];
        Ok(Late::new(x, self.norm.norm()?, (floats(&self.norm.var)?, self.norm.eps), gradients, self.training, pixels))
    }
}

/// Where the gradients of a batch norm go.
struct NormGradients {
    input: Option<Tensor>,
    residual: Option<Tensor>,
    weight: Tensor,
    bias: Tensor,
}

impl FromPyObject<'_> for NormGradients {
    fn extract_bound(gradients: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("gradients", gradients, |r| {
            let (input, residual) = (r.get("input")?, r.get("residual")?);
            Ok(Self { input, residual, weight: r.get("weight")?, bias: r.get("bias")? })
        })
    }
}

/// Where those of a convolution go.
struct ConvolutionGradients {
    input: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    gate: Option<Tensor>,
    filters: Option<Tensor>,
}

impl FromPyObject<'_> for ConvolutionGradients {
    fn extract_bound(gradients: &Bound<'_, PyAny>) -> PyResult<Self> {
        record("gradients", gradients, |r| {
            let (weight, bias) = (r.get("weight")?, r.get("bias")?);
            Ok(Self { input: r.get("input")?, weight, bias, gate: r.get("gate")?, filters: r.get("filters")? })
        })
    }
}

impl ConvolutionGradients {
    fn vectors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.weight, &self.bias].into_iter().flatten()
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
