//! Activation functions on sixteen lanes.

use super::lanes::{LANES, Lanes};
use crate::model::Activation;

/// What follows a layer's sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activate {
    Nothing,
    Relu,
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
        matches!(self, Self::Nothing | Self::Relu | Self::Relu6 | Self::Hardswish)
    }

    /// Whether `max` before and after the function is the same.
    pub fn keeps_order(self) -> bool {
        matches!(self, Self::Nothing | Self::Relu | Self::Relu6)
    }
}

#[inline(always)]
pub fn activate<V: Lanes>(function: Activate, x: V) -> V {
    let (zero, six) = (V::splat(0.0), V::splat(6.0));
    let sixth = V::splat(1.0 / 6.0);
    match function {
        Activate::Nothing => x,
        Activate::Relu => x.max(zero),
        Activate::Relu6 => x.max(zero).min(six),
        Activate::LeakyRelu(slope) => {
            // max(x, 0) + slope * min(x, 0) holds for slopes of any sign and size.
            x.min(zero).mul_add(V::splat(slope), x.max(zero))
        }
        Activate::Hardswish => x.mul(x.add(V::splat(3.0)).max(zero).min(six)).mul(sixth),
        Activate::Hardsigmoid => x.add(V::splat(3.0)).max(zero).min(six).mul(sixth),
        curved => V::from_array(curve::<V>(curved, x.to_array())),
    }
}

/// Applies a simple function to sums without forcing them out of their registers; others go over memory again.
#[inline(always)]
pub fn activate_sums<V: Lanes, const R: usize, const C: usize>(function: Activate, sums: &mut [[V; C]; R]) {
    let (zero, six) = (V::splat(0.0), V::splat(6.0));
    match function {
        Activate::Relu => {
            for sum in sums.as_flattened_mut() {
                *sum = sum.max(zero);
            }
        }
        Activate::Relu6 => {
            for sum in sums.as_flattened_mut() {
                *sum = sum.max(zero).min(six);
            }
        }
        Activate::Hardswish => {
            let (sixth, half, one) = (V::splat(1.0 / 6.0), V::splat(0.5), V::splat(1.0));
            for sum in sums.as_flattened_mut() {
                *sum = sum.mul(sum.mul_add(sixth, half).max(zero).min(one));
            }
        }
        _ => {}
    }
}

/// Written on an array: the compiler vectorises it with whatever the function around it may use.
#[inline(always)]
fn curve<V: Lanes>(function: Activate, mut x: [f32; LANES]) -> [f32; LANES] {
    match function {
        Activate::Silu => {
            for x in &mut x {
                *x /= 1.0 + exp::<V>(-*x);
            }
        }
        Activate::Sigmoid => {
            for x in &mut x {
                *x = 1.0 / (1.0 + exp::<V>(-*x));
            }
        }
        Activate::Gelu => {
            for x in &mut x {
                let half = 0.5 * *x;
                *x = fma::<V>(half, erf::<V>(*x * std::f32::consts::FRAC_1_SQRT_2), half);
            }
        }
        Activate::GeluTanh => {
            for x in &mut x {
                // 0.5 (1 + tanh z) = 1 / (1 + exp(-2z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
                let z = 0.797_884_6 * fma::<V>(0.044_715 * *x * *x, *x, *x);
                *x /= 1.0 + exp::<V>(-2.0 * z);
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

/// `exp` with a relative error of 2e-7 (Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]); NaN stays NaN.
#[inline(always)]
fn exp<V: Lanes>(x: f32) -> f32 {
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, in registers.
    let magic = 12_582_912.0;
    let n = fma::<V>(x, std::f32::consts::LOG2_E, magic) - magic;
    let r = fma::<V>(n, 2.121_944_4e-4, fma::<V>(n, -0.693_359_4, x));
    let p = 1.987_569_2e-4;
    let p = fma::<V>(p, r, 1.398_2e-3);
    let p = fma::<V>(p, r, 8.333_452e-3);
    let p = fma::<V>(p, r, 4.166_579_6e-2);
    let p = fma::<V>(p, r, 1.666_666_5e-1);
    let p = fma::<V>(p, r, 0.5);
    let y = fma::<V>(p * r, r, r) + 1.0;
    // The bits of `n + magic` end in the integer itself: 127 more is the exponent of 2^n.
    let exponent = (n + magic).to_bits().wrapping_sub(0x4B40_0000).wrapping_add(127) << 23;
    y * f32::from_bits(exponent)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::infer::kernels::lanes::{Isa, Kernel, dispatch};
    use crate::engine::cpu::infer::reference;

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
            Activate::Relu6 => x.clamp(0.0, 6.0),
            Activate::LeakyRelu(slope) => {
                if x > 0.0 {
                    x
                } else {
                    x * f64::from(slope)
                }
            }
            Activate::Silu => x / (1.0 + (-x).exp()),
            Activate::Gelu => x * 0.5 * (1.0 + reference::erf(x / 2f64.sqrt())),
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
        for function in [Activate::Relu, Activate::Relu6, Activate::Silu, Activate::Sigmoid, Activate::Hardswish] {
            for isa in Isa::available() {
                let mut got = Vec::new();
                dispatch(isa, Apply(function, &[f32::NAN; LANES], &mut got));
                assert!(got.iter().all(|y| y.is_nan()), "{isa:?} {function:?} {got:?}");
            }
        }
    }
}
