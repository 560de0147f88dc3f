//! Losses of classification: the mean to differentiate, the sum to report.

use tch::{Kind, Reduction, Tensor};

use super::failure::Result;
use crate::engine::Outcome;
use crate::error::Error;

pub trait Loss: Send {
    /// The scalar to differentiate, and what to report of this batch of `samples`.
    ///
    /// # Errors
    /// Targets that are no classes of this output, or libtorch's own.
    fn evaluate(&self, output: &Tensor, targets: &Tensor, samples: u64) -> Result<(Tensor, Outcome)>;
}

/// `torch.nn.functional.nll_loss` and `cross_entropy`, reduced by the mean.
pub enum TorchLoss {
    Nll { weight: Option<Tensor>, ignore_index: i64 },
    CrossEntropy { weight: Option<Tensor>, ignore_index: i64, label_smoothing: f64 },
}

impl TorchLoss {
    fn value(&self, output: &Tensor, targets: &Tensor, reduction: Reduction) -> Result<Tensor> {
        Ok(match self {
            Self::Nll { weight, ignore_index } => {
                output.f_nll_loss_nd(targets, weight.as_ref(), reduction, *ignore_index)?
            }
            Self::CrossEntropy { weight, ignore_index, label_smoothing } => {
                output.f_cross_entropy_loss(targets, weight.as_ref(), reduction, *ignore_index, *label_smoothing)?
            }
        })
    }

    fn parts(&self) -> (Option<&Tensor>, i64) {
        match self {
            Self::Nll { weight, ignore_index } | Self::CrossEntropy { weight, ignore_index, .. } => {
                (weight.as_ref(), *ignore_index)
            }
        }
    }
}

impl Loss for TorchLoss {
    fn evaluate(&self, output: &Tensor, targets: &Tensor, samples: u64) -> Result<(Tensor, Outcome)> {
        let (weight, ignore_index) = self.parts();
        check_targets(output, targets, ignore_index)?;
        let mean = self.value(output, targets, Reduction::Mean)?;
        let _guard = tch::no_grad_guard();
        let loss = self.value(&output.f_detach()?, targets, Reduction::Sum)?.f_double_value(&[])?;
        if targets.is_floating_point() {
            // Probabilities of the classes: every row of them counts once, whatever the classes' weights.
            let classes = output.size().get(usize::from(output.dim() > 1)).copied().unwrap_or(1);
            let weight = targets.numel() as f64 / classes as f64;
            return Ok((mean, Outcome { loss, weight, correct: None, counted: 0, samples }));
        }
        // Bytes are classes too.
        let targets = &targets.f_to_kind(Kind::Int64)?;
        let counts = targets.f_ne(ignore_index)?;
        let weight = match weight {
            None => counts.f_sum(Kind::Double)?,
            Some(weight) => {
                let classes = targets.f_mul(&counts)?.f_flatten(0, -1)?;
                let weights = weight.f_to_kind(Kind::Double)?.f_index_select(0, &classes)?;
                weights.f_mul(&counts.f_flatten(0, -1)?)?.f_sum(Kind::Double)?
            }
        };
        let weight = weight.f_double_value(&[])?;
        let (correct, counted) = correct(output, targets, &counts)?.unzip();
        Ok((mean, Outcome { loss, weight, correct, counted: counted.unwrap_or(0), samples }))
    }
}

/// Samples that count and whose largest output is the target, and how many count; `None` unless targets are class
/// indices of a (N, C) output.
fn correct(output: &Tensor, targets: &Tensor, counts: &Tensor) -> Result<Option<(u64, u64)>> {
    if output.dim() != 2 || targets.dim() != 1 {
        return Ok(None);
    }
    // `max`, not `argmax`: the tutorial's call, and the same rule for ties.
    let (_, predictions) = output.f_max_dim(1, false)?;
    let hits = predictions.f_eq_tensor(targets)?.f_logical_and(counts)?;
    let number = |mask: &Tensor| -> Result<u64> { Ok(mask.f_sum(Kind::Int64)?.f_int64_value(&[])?.unsigned_abs()) };
    Ok(Some((number(&hits)?, number(counts)?)))
}

fn check_targets(output: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<()> {
    // On CUDA the kernel itself asserts; reading the targets back would stall the queue.
    if targets.kind() != Kind::Int64 || targets.device() != tch::Device::Cpu || targets.dim() != 1 || output.dim() != 2
    {
        return Ok(());
    }
    let classes = output.size()[1];
    let valid = targets.f_ge(0)?.f_logical_and(&targets.f_lt(classes)?)?.f_logical_or(&targets.f_eq(ignore_index)?)?;
    if valid.f_all()?.f_int64_value(&[])? == 1 {
        return Ok(());
    }
    let wrong = targets.f_masked_select(&valid.f_logical_not()?)?.f_int64_value(&[0])?;
    Err(Error::Target { target: wrong, classes }.into())
}
