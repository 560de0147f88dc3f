//! Steps of SGD that a huge matrix is still to take.
//!
//! With a few samples per batch a step costs what it costs to carry weights and momentum over the memory bus, there and
//! back. The gradient of a linear layer is the product of two thin matrices, the derivative of its outputs and its inputs.
//! So these are kept for some steps, which are then taken one after the other while a piece of the weights is in the cache:
//! the same arithmetic, a fraction of the traffic. What the layer returns meanwhile follows from the weights and the
//! momentum of before, as SGD is linear in all of them.

use crate::engine::optimizer::Sgd;

/// Samples of the steps that wait together.
const MOST_SAMPLES: usize = 40;
/// Batches of more samples are bound by arithmetic, not by the bus.
pub const FEW_SAMPLES: usize = 8;

/// Outputs that make carrying the weights dearer than multiplying the inputs with those of all steps that wait.
const LEAST_OUTPUTS: usize = 2 * MOST_SAMPLES;
/// Weights that no core's cache holds. Tests make do with fewer.
const LEAST_WEIGHTS: usize = if cfg!(test) { 1 << 18 } else { 1 << 22 };

/// How many steps wait, in one epoch of one batch size.
#[derive(Debug, Clone, Copy, Default)]
pub struct Waiting {
    pub steps: usize,
    /// Whether the step under way may join them.
    pub joins: bool,
}

/// Steps that are taken together, for batches of this size; 1: none waits.
pub fn most_steps(batch: usize) -> usize {
    if (1..=FEW_SAMPLES).contains(&batch) { MOST_SAMPLES / batch } else { 1 }
}

/// Whether a layer gains by that.
pub fn is_worth(in_features: usize, out_features: usize) -> bool {
    out_features >= LEAST_OUTPUTS && in_features * out_features >= LEAST_WEIGHTS
}

/// Weights after some steps: `weight W + momentum B + sum over the steps of steps[i] G_i`, of the weights and the momentum
/// buffer before them and the gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    pub weight: f64,
    pub momentum: f64,
    pub steps: Vec<f64>,
}

impl Combination {
    /// `momentum`: whether there is a buffer, which has been used before.
    pub fn after(steps: usize, options: &Sgd, momentum: bool) -> Self {
        let sign = if options.maximize { -1.0 } else { 1.0 };
        let unit = |at: usize| -> Vec<f64> { (0..steps + 2).map(|i| if i == at { 1.0 } else { 0.0 }).collect() };
        let add = |a: &[f64], x: f64, b: &[f64], y: f64| -> Vec<f64> {
            a.iter().zip(b).map(|(a, b)| x * a + y * b).collect()
        };
        let (mut weight, mut buffer) = (unit(0), unit(1));
        for step in 0..steps {
            let gradient = add(&unit(2 + step), sign, &weight, options.weight_decay);
            let direction = if momentum {
                buffer = add(&buffer, options.momentum, &gradient, 1.0 - options.dampening);
                if options.nesterov { add(&gradient, 1.0, &buffer, options.momentum) } else { buffer.clone() }
            } else {
                gradient
            };
            weight = add(&weight, 1.0, &direction, -options.lr);
        }
        Self { weight: weight[0], momentum: weight[1], steps: weight.split_off(2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One number that takes the steps one by one, as `optimizer` takes them.
    #[test]
    fn the_combination_is_what_the_steps_make_of_it() {
        let gradients = [0.5_f32, -0.25, 2.0, 0.125];
        for (momentum, dampening, weight_decay, nesterov, maximize) in [
            (0.0, 0.0, 0.0, false, false),
            (0.9, 0.0, 0.0, false, false),
            (0.5, 0.0, 0.1, true, false),
            (0.9, 0.25, 0.01, false, true),
        ] {
            let options = Sgd { lr: 0.1, momentum, dampening, weight_decay, nesterov, maximize };
            let (mut weight, mut buffer) = (vec![1.5_f32], if momentum > 0.0 { vec![0.75] } else { vec![] });
            for gradient in gradients {
                options.update_part(&mut weight, &[gradient], &mut buffer, false);
            }
            let found = Combination::after(gradients.len(), &options, momentum > 0.0);
            let sums: f64 = gradients.iter().zip(&found.steps).map(|(g, c)| f64::from(*g) * c).sum();
            let ours = 1.5 * found.weight + 0.75 * found.momentum + sums;
            // A few roundings of numbers around one.
            assert!((ours - f64::from(weight[0])).abs() < 1e-6, "{ours} is not {}", weight[0]);
        }
    }

    #[test]
    fn a_few_samples_wait_together() {
        assert_eq!([1, 5, 8, 9, 64, 0].map(most_steps), [40, 8, 5, 1, 1, 1]);
    }
}
