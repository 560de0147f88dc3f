//! Losses reduced by the mean, one sample at a time: the divisor is known from the targets.

use crate::error::{Error, Result};

/// A loss over (N, classes) outputs; names and meanings are `torch.nn.functional`'s.
#[derive(Debug, Clone)]
pub enum Loss {
    Classes(ClassLoss),
    Mse,
    BceWithLogits,
}

/// What the outputs are compared with.
#[derive(Debug, Clone, Copy)]
pub enum Targets<'a> {
    /// N class indices.
    Classes(&'a [i64]),
    /// As many values as outputs.
    Values(&'a [f32]),
}

impl Targets<'_> {
    fn count(&self) -> usize {
        match self {
            Self::Classes(classes) => classes.len(),
            Self::Values(values) => values.len(),
        }
    }
}

impl Loss {
    /// The sum that the mean divides by.
    ///
    /// # Errors
    /// `Target` for a class the output does not have, `Argument` for targets that do not fit the output.
    pub fn divisor(&self, targets: Targets<'_>, samples: usize, outputs: usize) -> Result<f64> {
        match (self, targets) {
            (Self::Classes(loss), Targets::Classes(classes)) if classes.len() == samples => {
                loss.divisor(classes, outputs)
            }
            (Self::Mse | Self::BceWithLogits, Targets::Values(values)) if values.len() == samples * outputs => {
                Ok(values.len() as f64)
            }
            _ => Err(Error::Argument(format!(
                "expected one target per {}, got {} for outputs of shape ({samples}, {outputs})",
                if matches!(self, Self::Classes(_)) { "sample, a class index" } else { "output, a float32 number" },
                targets.count(),
            ))),
        }
    }

    /// Loss of one sample; `grad` gets the derivative of the sum over `divisor`.
    pub fn sample(
        &self,
        output: &[f32],
        targets: Targets<'_>,
        sample: usize,
        divisor: f64,
        grad: Option<&mut [f32]>,
    ) -> Part {
        match (self, targets) {
            (Self::Classes(loss), Targets::Classes(classes)) => loss.sample(output, classes[sample], divisor, grad),
            (Self::Mse, Targets::Values(values)) => {
                let each = |x: f64, y: f64| ((x - y) * (x - y), 2.0 * (x - y));
                elementwise(output, &values[sample * output.len()..], divisor, grad, each)
            }
            (Self::BceWithLogits, Targets::Values(values)) => {
                // max(x, 0) - x y + log(1 + exp(-|x|)) does not overflow; its derivative is sigmoid(x) - y.
                let each = |x: f64, y: f64| {
                    let loss = x.max(0.0) - x * y + (-x.abs()).exp().ln_1p();
                    (if x.is_nan() { x } else { loss }, 1.0 / (1.0 + (-x).exp()) - y)
                };
                elementwise(output, &values[sample * output.len()..], divisor, grad, each)
            }
            _ => Part::default(),
        }
    }

    /// What the epoch adds up, and what it divides by: of classes what their mean is made of, else the mean per sample.
    pub fn reported(&self, sum: f64, divisor: f64, samples: usize) -> (f64, f64) {
        match self {
            Self::Classes(_) => (sum, divisor),
            _ => (sum / divisor * samples as f64, samples as f64),
        }
    }
}

fn elementwise(
    output: &[f32],
    values: &[f32],
    divisor: f64,
    mut grad: Option<&mut [f32]>,
    each: impl Fn(f64, f64) -> (f64, f64),
) -> Part {
    let mut total = 0.0;
    for (i, (&x, &y)) in output.iter().zip(values).enumerate() {
        let (loss, slope) = each(f64::from(x), f64::from(y));
        total += loss;
        if let Some(grad) = &mut grad {
            grad[i] = (slope / divisor) as f32;
        }
    }
    Part { loss: total, ..Part::default() }
}

/// `nll_loss` and `cross_entropy`.
#[derive(Debug, Clone)]
pub struct ClassLoss {
    /// `cross_entropy` takes scores, `nll_loss` log-probabilities.
    pub cross_entropy: bool,
    pub weight: Option<Vec<f32>>,
    pub ignore_index: i64,
    pub label_smoothing: f64,
}

/// What one sample contributes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Part {
    /// Weighted, not divided.
    pub loss: f64,
    pub correct: u64,
    /// Samples that are not ignored.
    pub counted: u64,
}

impl std::ops::AddAssign for Part {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.counted += other.counted;
    }
}

impl ClassLoss {
    fn class(&self, target: i64) -> Option<usize> {
        (target != self.ignore_index).then_some(target.unsigned_abs() as usize)
    }

    fn weight(&self, class: usize) -> f64 {
        self.weight.as_ref().map_or(1.0, |w| w.get(class).map_or(1.0, |&w| f64::from(w)))
    }

    fn divisor(&self, targets: &[i64], classes: usize) -> Result<f64> {
        if let Some(weight) = self.weight.as_ref().filter(|weight| weight.len() != classes) {
            let found = weight.len();
            return Err(Error::Argument(format!("the loss has weights for {found} classes and the model {classes}")));
        }
        let mut sum = 0.0;
        for &target in targets {
            if target == self.ignore_index {
                continue;
            }
            if target < 0 || target >= classes as i64 {
                return Err(Error::Target { target, classes: classes as i64 });
            }
            sum += self.weight(target.unsigned_abs() as usize);
        }
        Ok(sum)
    }

    fn sample(&self, output: &[f32], target: i64, divisor: f64, grad: Option<&mut [f32]>) -> Part {
        let Some(class) = self.class(target) else {
            if let Some(grad) = grad {
                grad.fill(0.0);
            }
            return Part::default();
        };
        let (correct, counted) = (u64::from(argmax(output) == class), 1);
        let weight = self.weight(class);
        if !self.cross_entropy {
            if let Some(grad) = grad {
                grad.fill(0.0);
                grad[class] = (-weight / divisor) as f32;
            }
            return Part { loss: -weight * f64::from(output[class]), correct, counted };
        }
        let top = f64::from(output.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = output.iter().map(|&x| (f64::from(x) - top).exp()).sum();
        let log_probability = |c: usize| f64::from(output[c]) - top - sum.ln();
        // loss = -(1 - s) w[y] log p[y] - s / C * sum over c of w[c] log p[c]
        let (kept, spread) = (1.0 - self.label_smoothing, self.label_smoothing / output.len() as f64);
        let mut loss = -kept * weight * log_probability(class);
        let mut mass = kept * weight;
        if spread > 0.0 {
            for c in 0..output.len() {
                loss -= spread * self.weight(c) * log_probability(c);
                mass += spread * self.weight(c);
            }
        }
        if let Some(grad) = grad {
            for (c, grad) in grad.iter_mut().enumerate() {
                let own = if c == class { kept * weight } else { 0.0 };
                let pulled = own + if spread > 0.0 { spread * self.weight(c) } else { 0.0 };
                *grad = ((mass * log_probability(c).exp() - pulled) / divisor) as f32;
            }
        }
        Part { loss, correct, counted }
    }
}

/// The first of the largest, a NaN before all, as `Tensor.max(dim)`.
fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, &x) in row.iter().enumerate() {
        if row[best].is_nan() {
            break;
        }
        if x > row[best] || x.is_nan() {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_of_two_classes_by_hand() {
        let loss = ClassLoss { cross_entropy: true, weight: None, ignore_index: -100, label_smoothing: 0.0 };
        let mut grad = [0.0; 2];
        let part = loss.sample(&[0.0, 0.0], 1, 2.0, Some(&mut grad));
        assert!((part.loss - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!((part.correct, grad), (0, [0.25, -0.25]));
        assert!(matches!(loss.divisor(&[0, 2], 2), Err(Error::Target { target: 2, classes: 2 })));
        assert_eq!(loss.divisor(&[0, -100, 1], 2).unwrap(), 2.0);
    }

    #[test]
    fn ties_go_to_the_first_and_nan_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[1.0, f32::NAN, 3.0, f32::NAN]), 1);
    }
}
