//! Activation functions and their derivatives, element by element.

use crate::engine::cpu::train::kernels::simd::{select, vectorised};
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out};
use crate::model::Activation;

pub struct Pointwise {
    pub function: Activation,
    pub input: Edge,
    pub out: Out,
    /// The output is the input's memory: only ReLU, whose derivative can be read off the output.
    pub inplace: bool,
}

impl Layer for Pointwise {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        // SAFETY: the samples are this worker's.
        let mut y = unsafe { cx.rows_mut(self.out.value) };
        let y = &mut *y;
        if self.inplace {
            return vectorised(|| y.iter_mut().for_each(|y| *y = relu(*y)));
        }
        // SAFETY: not in place: the input's slot is not the output's.
        let x = unsafe { cx.rows(self.input.value) };
        let x = &*x;
        // Each arm is a loop of its own, so that the choice is made once.
        macro_rules! map {
            ($f:expr) => {{
                let f = $f;
                vectorised(|| y.iter_mut().zip(x).for_each(|(y, x)| *y = f(*x)))
            }};
        }
        match self.function {
            Activation::Relu => map!(relu),
            Activation::Relu6 => map!(|x: f32| if x > 6.0 { 6.0 } else { relu(x) }),
            Activation::LeakyRelu { negative_slope } => {
                let slope = negative_slope as f32;
                map!(move |x: f32| if x > 0.0 { x } else { x * slope })
            }
            Activation::Silu => map!(|x: f32| x * sigmoid(x)),
            Activation::Gelu { tanh: false } => map!(|x: f32| x * normal_cdf(x)),
            Activation::Gelu { tanh: true } => map!(|x: f32| 0.5 * x * (1.0 + gelu_inner(x).tanh())),
            Activation::Hardswish => map!(|x: f32| x * (x + 3.0).clamp(0.0, 6.0) / 6.0),
            Activation::Hardsigmoid => map!(|x: f32| (x + 3.0).clamp(0.0, 6.0) / 6.0),
            Activation::Sigmoid => map!(sigmoid),
            Activation::Tanh => map!(f32::tanh),
        }
    }

    #[allow(clippy::neg_cmp_op_on_partial_ord)] // so that NaN lets its gradient through, as in PyTorch
    fn backward(&self, cx: &Context<'_>) {
        let (Some(grad), Some(input)) = (self.out.grad, self.input.grad) else { return };
        // SAFETY: a derivative is not a value's slot, and the samples are this worker's.
        let (y, mut dx) = unsafe { (cx.rows(self.out.value), cx.rows_mut(input)) };
        let (y, dx) = (&*y, &mut *dx);
        if self.inplace {
            return vectorised(|| dx.iter_mut().zip(y).for_each(|(d, y)| *d = select(!(*y <= 0.0), *d)));
        }
        // SAFETY: not in place: the two derivatives are two slots, too.
        let (dy, x) = unsafe { (cx.rows(grad), cx.rows(self.input.value)) };
        let (dy, x, add) = (&*dy, &*x, self.input.add);
        macro_rules! chain {
            ($from:expr, $f:expr) => {{
                let f = $f;
                vectorised(|| match add {
                    true => dx.iter_mut().zip(dy).zip($from).for_each(|((d, g), v)| *d += g * f(*v)),
                    false => dx.iter_mut().zip(dy).zip($from).for_each(|((d, g), v)| *d = g * f(*v)),
                })
            }};
        }
        match self.function {
            Activation::Relu => chain!(y, |y: f32| if y <= 0.0 { 0.0 } else { 1.0 }),
            Activation::Relu6 => chain!(x, |x: f32| if x <= 0.0 || x >= 6.0 { 0.0 } else { 1.0 }),
            Activation::LeakyRelu { negative_slope } => {
                let slope = negative_slope as f32;
                chain!(x, move |x: f32| if x > 0.0 { 1.0 } else { slope })
            }
            Activation::Silu => chain!(x, |x: f32| {
                let s = sigmoid(x);
                s * (1.0 + x * (1.0 - s))
            }),
            Activation::Gelu { tanh: false } => chain!(x, |x: f32| {
                let density = (-0.5 * f64::from(x) * f64::from(x)).exp() * FRAC_1_SQRT_2PI;
                (f64::from(normal_cdf(x)) + f64::from(x) * density) as f32
            }),
            Activation::Gelu { tanh: true } => chain!(x, |x: f32| {
                let t = gelu_inner(x).tanh();
                let slope = SQRT_2_PI * (1.0 + 3.0 * GELU_CUBIC * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
            }),
            Activation::Hardswish => chain!(x, |x: f32| {
                if x <= -3.0 {
                    0.0
                } else if x >= 3.0 {
                    1.0
                } else {
                    x / 3.0 + 0.5
                }
            }),
            Activation::Hardsigmoid => chain!(x, |x: f32| if x > -3.0 && x < 3.0 { 1.0 / 6.0 } else { 0.0 }),
            Activation::Sigmoid => chain!(y, |y: f32| y * (1.0 - y)),
            Activation::Tanh => chain!(y, |y: f32| 1.0 - y * y),
        }
    }
}

const FRAC_1_SQRT_2PI: f64 = 0.398_942_280_401_432_7;
const SQRT_2_PI: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// PyTorch's: NaN stays NaN.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord)] // so that NaN is kept
fn relu(x: f32) -> f32 {
    select(!(x < 0.0), x)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[inline(always)]
fn gelu_inner(x: f32) -> f32 {
    SQRT_2_PI * (x + GELU_CUBIC * x * x * x)
}

/// Cumulative distribution of the standard normal: `erfc(-x / sqrt(2)) / 2` by the rational fit of Cody (1969) as given
/// in Numerical Recipes, 3rd ed., section 6.2.2 (relative error below 1.2e-7, a rounding of float32).
fn normal_cdf(x: f32) -> f32 {
    const C: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let z = -f64::from(x) * std::f64::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z.abs());
    let poly = C.iter().rev().fold(0.0, |sum, c| sum * t + c);
    let erfc = t * (-z * z + poly).exp();
    (0.5 * if z >= 0.0 { erfc } else { 2.0 - erfc }) as f32
}

#[cfg(test)]
mod tests {
    use super::normal_cdf;

    #[test]
    fn normal_cdf_at_known_points() {
        // Tables of the normal distribution; tolerance: the fit's stated relative error plus one rounding.
        for (x, p) in
            [(0.0, 0.5), (1.0, 0.841_344_746), (-1.0, 0.158_655_254), (-3.0, 0.001_349_898), (2.5, 0.993_790_335)]
        {
            assert!((f64::from(normal_cdf(x)) / p - 1.0).abs() < 3e-7, "{x}");
        }
    }
}
