//! Activation functions on sixteen lanes.

use super::lanes::{LANES, Lanes};
use crate::model::Activation;

/// What follows a layer's sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activate {
    Nothing,
    Relu,
    /// The larger of the sum and this.
    AtLeast(f32),
    Relu6,
    LeakyRelu(f32),
    Silu,
    Gelu,
    GeluTanh,
    Hardswish,
    Hardsigmoid,
    Sigmoid,
    Tanh,
}

impl From<Activation> for Activate {
    fn from(function: Activation) -> Self {
        match function {
            Activation::Relu => Self::Relu,
            Activation::Relu6 => Self::Relu6,
            Activation::LeakyRelu { negative_slope } => Self::LeakyRelu(negative_slope as f32),
            Activation::Silu => Self::Silu,
            Activation::Gelu { tanh: false } => Self::Gelu,
            Activation::Gelu { tanh: true } => Self::GeluTanh,
            Activation::Hardswish => Self::Hardswish,
            Activation::Hardsigmoid => Self::Hardsigmoid,
            Activation::Sigmoid => Self::Sigmoid,
            Activation::Tanh => Self::Tanh,
        }
    }
}

impl Activate {
    /// Whether [`activate_sums`] is enough.
    #[inline(always)]
    pub fn in_registers(self) -> bool {
        matches!(self, Self::Nothing | Self::Relu | Self::AtLeast(_) | Self::Relu6 | Self::Hardswish)
    }

    /// Whether `max` before and after the function is the same.
    pub fn keeps_order(self) -> bool {
        matches!(self, Self::Nothing | Self::Relu | Self::AtLeast(_) | Self::Relu6)
    }
}

#[inline(always)]
pub fn activate<V: Lanes>(function: Activate, x: V) -> V {
    let (zero, six) = (V::splat(0.0), V::splat(6.0));
    let sixth = V::splat(1.0 / 6.0);
    match function {
        Activate::Nothing => x,
        Activate::Relu => x.max(zero),
        Activate::AtLeast(least) => x.max(V::splat(least)),
        Activate::Relu6 => x.max(zero).min(six),
        Activate::LeakyRelu(slope) => {
            // max(x, 0) + slope * min(x, 0) holds for slopes of any sign and size.
            x.min(zero).mul_add(V::splat(slope), x.max(zero))
        }
        Activate::Hardswish => x.mul(x.mul_add(sixth, V::splat(0.5)).max(zero).min(V::splat(1.0))),
        Activate::Hardsigmoid => x.add(V::splat(3.0)).max(zero).min(six).mul(sixth),
        Activate::Silu => x.mul(sigmoid(x)),
        Activate::Sigmoid => sigmoid(x),
        Activate::GeluTanh => {
            // 0.5 (1 + tanh z) = sigmoid(2z), z = sqrt(2 / pi) (x + 0.044715 x^3)
            let cube = x.mul(x).mul(x);
            x.mul(sigmoid(cube.mul_add(V::splat(2.0 * 0.797_884_6 * 0.044_715), x.mul(V::splat(2.0 * 0.797_884_6)))))
        }
        curved => V::from_array(curve::<V>(curved, x.to_array())),
    }
}

/// The functions that [`derive()`] knows, `x` for others: less code than [`activate`].
#[inline(always)]
pub fn activate_derivable<V: Lanes>(function: Activate, x: V) -> V {
    match function {
        Activate::Relu => activate(Activate::Relu, x),
        Activate::Relu6 => activate(Activate::Relu6, x),
        Activate::Hardswish => activate(Activate::Hardswish, x),
        Activate::Silu => activate(Activate::Silu, x),
        _ => x,
    }
}

/// `g` times the derivative at `x` of ReLU, ReLU6, Hardswish or SiLU, as PyTorch has it at their corners; `g` for others.
#[inline(always)]
pub fn derive<V: Lanes>(function: Activate, x: V, g: V) -> V {
    let three = V::splat(3.0);
    match function {
        Activate::Relu => g.unless_negative(x),
        Activate::Relu6 => g.unless_negative(x).unless_negative(V::splat(6.0).sub(x)),
        Activate::Hardswish => {
            let below = three.sub(x);
            let inner = g.mul(x.mul_add(V::splat(1.0 / 3.0), V::splat(0.5))).unless_negative(x.add(three));
            inner.unless_negative(below).add(g.sub(g.unless_negative(below)))
        }
        Activate::Silu => {
            // s (1 + x (1 - s))
            let s = sigmoid(x);
            g.mul(s).mul(x.mul(V::splat(1.0).sub(s)).add(V::splat(1.0)))
        }
        _ => g,
    }
}

/// Applies a simple function to sums without forcing them out of their registers; others go over memory again.
#[inline(always)]
pub fn activate_sums<V: Lanes, const R: usize, const C: usize>(function: Activate, sums: &mut [[V; C]; R]) {
    // One loop per function, so that none has to ask for every sum.
    match function {
        Activate::Relu => each(Activate::Relu, sums),
        Activate::AtLeast(least) => each(Activate::AtLeast(least), sums),
        Activate::Relu6 => each(Activate::Relu6, sums),
        Activate::Hardswish => each(Activate::Hardswish, sums),
        _ => {}
    }
}

#[inline(always)]
fn each<V: Lanes, const R: usize, const C: usize>(function: Activate, sums: &mut [[V; C]; R]) {
    for sum in sums.as_flattened_mut() {
        *sum = activate(function, *sum);
    }
}

/// `1 / (1 + exp(-x))` with an absolute error of 2e-7.
#[inline(always)]
fn sigmoid<V: Lanes>(x: V) -> V {
    // exp(-x) = 2^y = 2^n 2^f with |f| at most 1/2.
    let y = x.mul(V::splat(-std::f32::consts::LOG2_E)).max(V::splat(-126.0)).min(V::splat(126.0));
    power_of_two(y).add(V::splat(1.0)).recip()
}

/// `2^y` for numbers between -126 and 126, with a relative error of 1.5e-7; NaN stays.
#[inline(always)]
pub fn power_of_two<V: Lanes>(y: V) -> V {
    let n = y.round();
    let f = y.sub(n);
    let mut power = V::splat(POWER[4]);
    for c in [POWER[3], POWER[2], POWER[1], POWER[0], 1.0] {
        power = power.mul_add(f, V::splat(c));
    }
    power.scale(n)
}

/// 2^f = 1 + `POWER[0]` f + `POWER[1]` f^2 + ... on [-1/2, 1/2]: the least largest relative error (9.1e-8) of such a
/// polynomial of degree 5, by iterated least squares.
#[expect(clippy::approx_constant, reason = "fitted, not the logarithm of 2")]
const POWER: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];

/// Written on an array: the compiler vectorises it with whatever the function around it may use.
#[inline(always)]
fn curve<V: Lanes>(function: Activate, mut x: [f32; LANES]) -> [f32; LANES] {
    match function {
        Activate::Gelu => {
            for x in &mut x {
                let half = 0.5 * *x;
                *x = fma::<V>(half, erf::<V>(*x * std::f32::consts::FRAC_1_SQRT_2), half);
            }
        }
        _ => {
            for x in &mut x {
                *x = x.tanh();
            }
        }
    }
    x
}

/// `a * b + c`, as one instruction where there is one.
#[inline(always)]
fn fma<V: Lanes>(a: f32, b: f32, c: f32) -> f32 {
    if V::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `erf` as x P(x^2) / Q(x^2) on [-4, 4] (the rational approximation of Eigen and XLA), absolute error below 1e-6.
#[inline(always)]
fn erf<V: Lanes>(x: f32) -> f32 {
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let z = x * x;
    let p = fma::<V>(-2.726_142_3e-10, z, 2.770_681_4e-8);
    let p = fma::<V>(p, z, -2.101_024e-6);
    let p = fma::<V>(p, z, -5.692_506_5e-5);
    let p = fma::<V>(p, z, -7.349_906e-4);
    let p = fma::<V>(p, z, -2.954_6e-3);
    let p = fma::<V>(p, z, -1.609_603_3e-2);
    let q = fma::<V>(-1.456_607_2e-5, z, -2.133_740_6e-4);
    let q = fma::<V>(q, z, -1.682_827e-3);
    let q = fma::<V>(q, z, -7.373_329e-3);
    let q = fma::<V>(q, z, -1.426_474_1e-2);
    x * p / q
}

/// `erf` by Simpson's rule: good to 1e-12 for the arguments of tests.
#[cfg(test)]
pub fn exact_erf(x: f64) -> f64 {
    let n = 2000;
    let h = x / f64::from(n);
    let f = |t: f64| (-t * t).exp();
    let sum: f64 =
        (1..n).map(|i| f64::from(if i % 2 == 1 { 4 } else { 2 }) * f(f64::from(i) * h)).sum::<f64>() + f(0.0) + f(x);
    sum * h / 3.0 * 2.0 / std::f64::consts::PI.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::common::isa::Isa;
    use crate::engine::cpu::common::kernels::lanes::{Kernel, dispatch};

    struct Apply<'a>(Activate, &'a [f32], &'a mut Vec<f32>);

    impl Kernel for Apply<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            for chunk in self.1.chunks_exact(LANES) {
                let lanes = V::from_array(chunk.try_into().unwrap());
                self.2.extend(activate(self.0, lanes).to_array());
            }
        }
    }

    fn exact(function: Activate, x: f64) -> f64 {
        match function {
            Activate::Nothing => x,
            Activate::Relu => x.max(0.0),
            Activate::AtLeast(least) => x.max(f64::from(least)),
            Activate::Relu6 => x.clamp(0.0, 6.0),
            Activate::LeakyRelu(slope) => {
                if x > 0.0 {
                    x
                } else {
                    x * f64::from(slope)
                }
            }
            Activate::Silu => x / (1.0 + (-x).exp()),
            Activate::Gelu => x * 0.5 * (1.0 + exact_erf(x / 2f64.sqrt())),
            Activate::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Activate::Hardswish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
            Activate::Hardsigmoid => (x + 3.0).clamp(0.0, 6.0) / 6.0,
            Activate::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activate::Tanh => x.tanh(),
        }
    }

    #[test]
    fn like_the_definitions_on_every_instruction_set() {
        let inputs: Vec<f32> = (0..1600).map(|i| (i as f32 - 800.0) * 0.0371).collect();
        let functions = [
            Activate::Nothing,
            Activate::Relu,
            Activate::AtLeast(-0.7),
            Activate::Relu6,
            Activate::LeakyRelu(0.01),
            Activate::Silu,
            Activate::Gelu,
            Activate::GeluTanh,
            Activate::Hardswish,
            Activate::Hardsigmoid,
            Activate::Sigmoid,
            Activate::Tanh,
        ];
        for isa in Isa::available() {
            for function in functions {
                let mut got = Vec::new();
                dispatch(isa, Apply(function, &inputs, &mut got));
                for (&x, &y) in inputs.iter().zip(&got) {
                    let expected = exact(function, f64::from(x));
                    // 8 roundings of 2^-24 on numbers up to |x| or 1.
                    let tolerance = 5e-7 * expected.abs().max(f64::from(x.abs())).max(1.0);
                    assert!(
                        (f64::from(y) - expected).abs() <= tolerance,
                        "{isa:?} {function:?}({x}) = {y}, not {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_nan_stays() {
        for function in [
            Activate::Relu,
            Activate::AtLeast(0.5),
            Activate::Relu6,
            Activate::Silu,
            Activate::Sigmoid,
            Activate::Hardswish,
        ] {
            for isa in Isa::available() {
                let mut got = Vec::new();
                dispatch(isa, Apply(function, &[f32::NAN; LANES], &mut got));
                assert!(got.iter().all(|y| y.is_nan()), "{isa:?} {function:?} {got:?}");
            }
        }
    }
}
