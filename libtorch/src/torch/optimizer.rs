//! Gradients by autograd, updates in place: parameters and state are the user's own tensors.

use tch::{Device, Kind, Tensor};

use super::failure::Result;
use crate::engine::optimizer::{Adam, AdamState, Sgd};
use crate::error::Error;

pub trait Optimizer: Send {
    /// Differentiates `loss` and adds to the gradients since the last [`Optimizer::update`].
    ///
    /// # Errors
    /// libtorch's own.
    fn gather(&mut self, loss: &Tensor) -> Result<()>;

    /// One step.
    ///
    /// # Errors
    /// libtorch's own.
    fn update(&mut self) -> Result<()>;

    /// New learning rates and the like, one row per parameter; an optimizer of the user's reads them itself.
    fn set_options(&mut self, _rows: &[Vec<f64>]) {}
}

/// Gradients between two updates: the sum, in the order of the batches, as `Tensor.backward` adds to `.grad`.
#[derive(Default)]
pub struct Gathered {
    pub gradients: Vec<Option<Tensor>>,
    used: bool,
}

impl Gathered {
    /// # Errors
    /// libtorch's own.
    pub fn add(&mut self, new: Vec<Option<Tensor>>) -> Result<()> {
        if self.used || self.gradients.is_empty() {
            (self.gradients, self.used) = (new, false);
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        for (sum, grad) in self.gradients.iter_mut().zip(new) {
            *sum = match (sum.take(), grad) {
                (Some(sum), Some(grad)) => Some(sum.f_add(&grad)?),
                (sum, grad) => sum.or(grad),
            };
        }
        Ok(())
    }

    /// They have been applied: the next ones start anew, but `.grad` still shows these.
    pub fn applied(&mut self) {
        self.used = true;
    }
}

/// Changes gradients in place before they are applied, as clipping does.
pub type Hook = Box<dyn Fn(&[Option<Tensor>]) -> Result<()> + Send>;

/// The derivative of `loss` by each of `parameters`; `None` where it does not depend on one.
///
/// # Errors
/// When nothing in the loss requires a gradient.
pub fn gradients(loss: &Tensor, parameters: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
    if !loss.requires_grad() {
        // Eager PyTorch's words for the same mistake.
        return Err(Error::Torch(
            "element 0 of tensors does not require grad and does not have a grad_fn: every parameter that the loss \
             depends on is frozen"
                .to_owned(),
        )
        .into());
    }
    if parameters.is_empty() {
        return Ok(Vec::new());
    }
    let grads = Tensor::f_run_backward(&[loss], parameters, false, false)?;
    Ok(grads.into_iter().map(|grad| grad.defined().then_some(grad)).collect())
}

/// A parameter of the user's module with what its optimizer keeps for it.
pub struct Parameter {
    pub value: Tensor,
    pub rule: Rule,
    /// Whether it has been updated.
    pub updated: bool,
}

pub enum Rule {
    /// `momentum`: the buffer and whether it has ever been used.
    Sgd { options: Sgd, momentum: Option<(Tensor, bool)> },
    /// `step`: a float32 scalar that counts the steps, as in PyTorch.
    Adam { options: Adam, step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Option<Tensor> },
}

/// SGD, Adam and AdamW on contiguous float32 CPU tensors.
pub struct Native {
    parameters: Vec<Parameter>,
    gathered: Gathered,
    hook: Option<Hook>,
}

impl Native {
    /// # Errors
    /// `Argument` for a tensor that is not contiguous float32 in CPU memory.
    pub fn new(parameters: Vec<Parameter>, hook: Option<Hook>) -> Result<Self> {
        for parameter in &parameters {
            let state: Vec<&Tensor> = match &parameter.rule {
                Rule::Sgd { momentum, .. } => momentum.iter().map(|(buffer, _)| buffer).collect(),
                Rule::Adam { exp_avg, exp_avg_sq, max_exp_avg_sq, .. } => {
                    [exp_avg, exp_avg_sq].into_iter().chain(max_exp_avg_sq).collect()
                }
            };
            check(&parameter.value)?;
            for tensor in state {
                check(tensor)?;
                if tensor.size() != parameter.value.size() {
                    return Err(Error::Argument(format!(
                        "optimizer state of shape {:?} for a parameter of shape {:?}",
                        tensor.size(),
                        parameter.value.size()
                    ))
                    .into());
                }
            }
        }
        Ok(Self { parameters, gathered: Gathered::default(), hook })
    }

    /// The gradients since the last step, or of it, one per parameter; empty before the first batch.
    pub fn gradients(&self) -> &[Option<Tensor>] {
        &self.gathered.gradients
    }

    /// For every parameter, whether it has been updated.
    pub fn updated(&self) -> Vec<bool> {
        self.parameters.iter().map(|parameter| parameter.updated).collect()
    }
}

impl Optimizer for Native {
    fn gather(&mut self, loss: &Tensor) -> Result<()> {
        let values: Vec<&Tensor> = self.parameters.iter().map(|p| &p.value).collect();
        self.gathered.add(gradients(loss, &values)?)
    }

    fn update(&mut self) -> Result<()> {
        if let Some(hook) = &self.hook {
            hook(&self.gathered.gradients)?;
        }
        for (parameter, grad) in self.parameters.iter_mut().zip(&self.gathered.gradients) {
            if let Some(grad) = grad {
                parameter.updated = true;
                update(parameter, &grad.f_contiguous()?)?;
            }
        }
        self.gathered.applied();
        Ok(())
    }

    fn set_options(&mut self, rows: &[Vec<f64>]) {
        for (parameter, row) in self.parameters.iter_mut().zip(rows) {
            match &mut parameter.rule {
                Rule::Sgd { options, .. } => options.set(row),
                Rule::Adam { options, .. } => options.set(row),
            }
        }
    }
}

fn update(parameter: &mut Parameter, grad: &Tensor) -> Result<()> {
    check(grad)?;
    let (value, grad) = (floats_mut(&parameter.value), floats(grad));
    match &mut parameter.rule {
        Rule::Sgd { options, momentum: None } => options.update(value, grad, &mut [], false),
        Rule::Sgd { options, momentum: Some((buffer, used)) } => {
            options.update(value, grad, floats_mut(buffer), !*used);
            *used = true;
        }
        Rule::Adam { options, step, exp_avg, exp_avg_sq, max_exp_avg_sq } => {
            let _ = tch::no_grad(|| step.f_add_scalar_(1.0))?;
            let state = AdamState {
                exp_avg: floats_mut(exp_avg),
                exp_avg_sq: floats_mut(exp_avg_sq),
                max_exp_avg_sq: max_exp_avg_sq.as_ref().map_or(&mut [], floats_mut),
            };
            options.average(value, grad, state);
            let _guard = tch::no_grad_guard();
            let root = max_exp_avg_sq.as_ref().unwrap_or(exp_avg_sq).f_sqrt()?;
            options.apply(value, floats(exp_avg), floats(&root), step.f_double_value(&[])?);
        }
    }
    Ok(())
}

fn check(tensor: &Tensor) -> Result<()> {
    if tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous() {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "expected a contiguous float32 tensor on cpu, got {:?} on {:?}",
        tensor.kind(),
        tensor.device()
    ))
    .into())
}

/// The elements of a tensor that `check` accepted.
fn floats(tensor: &Tensor) -> &[f32] {
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: `check` made sure of contiguous float32 in CPU memory, so `numel` floats start at `data_ptr`; the
    // tensor outlives the slice, and nothing writes to a gradient while it is read.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

#[allow(clippy::mut_from_ref)] // libtorch's tensors are shared handles: the borrow says nothing about who may write.
fn floats_mut(tensor: &Tensor) -> &mut [f32] {
    if tensor.numel() == 0 {
        return &mut [];
    }
    // SAFETY: as in `floats`. Parameters and their state are distinct tensors and only the thread that runs the epoch
    // touches them: `fit` holds them between the forward pass, which is over, and the next one.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}
