//! Losses of classification: the mean to differentiate, the sum to report.

use tch::{Kind, Reduction, Tensor};

use crate::engine::Step;
use crate::error::{Error, Result};

pub trait Loss: Send {
    /// The scalar to differentiate, and what to report of this batch.
    ///
    /// # Errors
    /// Targets that are no classes of this output, or libtorch's own.
    fn evaluate(&self, output: &Tensor, targets: &Tensor) -> Result<(Tensor, Step)>;
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

    fn parts(&self) -> (bool, i64) {
        match self {
            Self::Nll { weight, ignore_index } | Self::CrossEntropy { weight, ignore_index, .. } => {
                (weight.is_some(), *ignore_index)
            }
        }
    }
}

impl Loss for TorchLoss {
    fn evaluate(&self, output: &Tensor, targets: &Tensor) -> Result<(Tensor, Step)> {
        let (weighted, ignore_index) = self.parts();
        check_targets(output, targets, ignore_index)?;
        let mean = self.value(output, targets, Reduction::Mean)?;
        let samples = output.size().first().map_or(1, |&n| n as u64);
        // With class weights the mean is not the sum over the count: report the mean, once per sample.
        let loss = if weighted {
            mean.f_double_value(&[])? * samples as f64
        } else {
            let _guard = tch::no_grad_guard();
            self.value(&output.f_detach()?, targets, Reduction::Sum)?.f_double_value(&[])?
        };
        Ok((mean, Step { loss, correct: correct(output, targets)?, samples }))
    }
}

/// Samples whose largest output is the target; `None` unless targets are class indices of a (N, C) output.
///
/// # Errors
/// libtorch's own.
pub fn correct(output: &Tensor, targets: &Tensor) -> Result<Option<u64>> {
    if output.dim() != 2 || targets.dim() != 1 || targets.kind() != Kind::Int64 {
        return Ok(None);
    }
    let _guard = tch::no_grad_guard();
    // `max`, not `argmax`: the tutorial's call, and the same rule for ties.
    let (_, predictions) = output.f_max_dim(1, false)?;
    let hits = predictions.f_eq_tensor(targets)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
    Ok(Some(hits.unsigned_abs()))
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
    Err(Error::Target { target: wrong, classes })
}
