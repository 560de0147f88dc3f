//! Batch norms that are computed where their results are read, and derivatives where they are: a pass over memory less each.
//!
//! ```text
//! a = act(z),  z = (x - mean) scale + shift,  scale = weight / sqrt(var + eps)
//! dx = scale (dz - level) + (x - mean) along,  dz = act'(z) da
//! ```
//! `level`, the mean of dz, and `along` are the way of the batch's own statistics; they need sums over all pixels, so that dx can be had only
//! when all of dz has been seen once: by whoever reads it next.

use super::{Address, Workspace};
use crate::engine::cpu::common::kernels::activate::{Activate, activate_derivable, derive};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::error::Result;

/// Pixels of a task.
const PIXELS: usize = 256;

/// A batch norm, one float per channel each, and an activation that `derive` knows.
#[derive(Debug, Clone)]
pub struct Norm {
    pub mean: Vec<f32>,
    pub scale: Vec<f32>,
    pub shift: Vec<f32>,
    pub activation: Activate,
}

/// What is read: `x`, or act(z) of it, which a gate may have let through.
#[derive(Clone, Copy)]
pub struct Values<'a> {
    pub x: &'a [f32],
    pub norm: Option<&'a Norm>,
    pub open: Option<Open<'a>>,
}

/// How far a gate is open, behind a norm: `[image][channel]`, for so many pixels of each image.
#[derive(Clone, Copy)]
pub struct Open<'a> {
    pub factors: &'a [f32],
    pub pixels: usize,
}

impl Open<'_> {
    /// Those of sixteen channels from `channel` on, of `channels`, in the image of a pixel.
    ///
    /// # Safety
    /// There are as many.
    #[inline(always)]
    pub unsafe fn lanes<V: Lanes>(&self, pixel: usize, channels: usize, channel: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(self.factors.as_ptr().add(pixel / self.pixels * channels + channel)) }
    }
}

/// Where the gradients of a convolution go that are asked for.
#[derive(Default)]
pub struct Gradients<'a> {
    /// That of what is read: of `x` without a norm, else dz, with a gate that of act(z) times the gate.
    pub dx: Option<&'a mut [f32]>,
    /// Of dz.
    pub sums: Option<&'a mut Sums>,
    /// `[image][channel]`.
    pub open: Option<&'a mut [f32]>,
    pub weight: Option<&'a mut [f32]>,
}

/// The derivative of an operation's output: `d` itself, or what a batch norm behind that output makes of it.
#[derive(Clone, Copy)]
pub struct Derivative<'a> {
    pub d: &'a [f32],
    pub late: Option<&'a Late<'a>>,
}

/// The derivative of `x` is still to be made: `d` is that of act(z) (of z, if the activation is `Nothing`).
pub struct Late<'a> {
    pub x: &'a [f32],
    pub norm: Norm,
    pub along: Vec<f32>,
    /// Taken off first: what is the same for all pixels is gone then, without a rounding error they would share.
    pub level: Vec<f32>,
    /// Whether mean and variance are the batch's own; otherwise `along` and `level` do not count.
    pub training: bool,
}

/// Per channel, of all pixels: the sum of dz and that of dz (x - mean).
#[derive(Debug, Default)]
pub struct Sums {
    pub plain: Vec<f64>,
    pub product: Vec<f64>,
}

/// Per channel, of all pixels: mean, and variance (the biased one).
#[derive(Debug, Default)]
pub struct Moments {
    pub mean: Vec<f32>,
    pub var: Vec<f32>,
}

impl Values<'_> {
    /// Panics unless the norm is one of so many channels.
    pub(super) fn check(&self, channels: usize) {
        assert!(self.norm.is_none_or(|norm| norm.has(channels)), "channels of a norm");
        let Some(open) = self.open else { return };
        let floats = open.factors.len() * open.pixels;
        assert!(self.norm.is_some() && floats == self.x.len() && open.pixels > 0, "floats of a gate");
    }
}

impl Derivative<'_> {
    /// Panics unless what is late is of so many floats and channels.
    pub(super) fn check(&self, floats: usize, channels: usize) {
        let Some(late) = self.late else { return };
        assert!(late.x.len() == floats && late.norm.has(channels), "floats of a norm's input");
        let factors = [&late.along, &late.level].map(Vec::len);
        assert!(!late.training || factors == [channels; 2], "factors of a norm's derivative");
    }
}

impl Moments {
    /// Of parts: each one's number of pixels, and every channel's mean and sum of squared differences from it.
    pub(super) fn of_parts<'a>(
        channels: usize,
        parts: impl Iterator<Item = (usize, &'a [f32], &'a [f32])> + Clone,
    ) -> Self {
        let pixels = parts.clone().map(|(n, ..)| n as f64).sum::<f64>();
        let (mut mean, mut square) = (vec![0.0f64; channels], vec![0.0f64; channels]);
        for (n, part, _) in parts.clone() {
            for (mean, &part) in mean.iter_mut().zip(part) {
                *mean += f64::from(part) * (n as f64 / pixels);
            }
        }
        for (n, part, squares) in parts {
            for (square, ((&mean, &part), &squares)) in square.iter_mut().zip(mean.iter().zip(part).zip(squares)) {
                *square += f64::from(squares) + (f64::from(part) - mean).powi(2) * n as f64;
            }
        }
        let round = |x: f64| x as f32;
        Self {
            mean: mean.into_iter().map(round).collect(),
            var: square.into_iter().map(|x| round(x / pixels)).collect(),
        }
    }
}

/// Sixteen channels of a [`Norm`].
#[derive(Clone, Copy)]
pub struct NormLanes<V> {
    mean: V,
    scale: V,
    shift: V,
    activation: Activate,
}

impl Norm {
    pub fn new(
        weight: Option<&[f32]>,
        bias: Option<&[f32]>,
        mean: &[f32],
        var: &[f32],
        eps: f64,
        activation: Activate,
    ) -> Self {
        let scale = |c: usize| weight.map_or(1.0, |weight| f64::from(weight[c])) / (f64::from(var[c]) + eps).sqrt();
        Self {
            mean: mean.to_vec(),
            scale: (0..mean.len()).map(|c| scale(c) as f32).collect(),
            shift: bias.map_or_else(|| vec![0.0; mean.len()], <[f32]>::to_vec),
            activation,
        }
    }

    fn has(&self, channels: usize) -> bool {
        [&self.mean, &self.scale, &self.shift].iter().all(|of| of.len() == channels)
    }

    /// The sixteen channels from `channel` on.
    ///
    /// # Safety
    /// There are as many.
    #[inline(always)]
    pub unsafe fn lanes<V: Lanes>(&self, channel: usize) -> NormLanes<V> {
        // SAFETY: the caller's promise.
        let [mean, scale, shift] =
            [&self.mean, &self.scale, &self.shift].map(|of| unsafe { V::load(of.as_ptr().add(channel)) });
        NormLanes { mean, scale, shift, activation: self.activation }
    }
}

impl<V: Lanes> NormLanes<V> {
    #[inline(always)]
    pub fn value(self, x: V) -> V {
        activate_derivable(self.activation, x.sub(self.mean).mul_add(self.scale, self.shift))
    }

    /// x - mean, and dz from da.
    #[inline(always)]
    pub fn derivative(self, x: V, da: V) -> [V; 2] {
        let x = x.sub(self.mean);
        [x, derive(self.activation, x.mul_add(self.scale, self.shift), da)]
    }
}

/// Sixteen channels of a [`Late`].
#[derive(Clone, Copy)]
pub struct LateLanes<V> {
    norm: NormLanes<V>,
    along: V,
    level: V,
    training: bool,
}

impl<'a> Late<'a> {
    /// # Arguments
    /// `variance`: and what is added to it; `gradients`: of weight and bias, the two sums over all `pixels`.
    pub fn new(
        x: &'a [f32],
        norm: Norm,
        (var, eps): (&[f32], f64),
        [weight, bias]: [&[f32]; 2],
        training: bool,
        pixels: usize,
    ) -> Self {
        let n = pixels as f64;
        let along = |c: usize| -f64::from(norm.scale[c]) * f64::from(weight[c]) / (f64::from(var[c]) + eps).sqrt() / n;
        let along = (0..var.len()).map(|c| along(c) as f32).collect();
        let level = bias.iter().map(|&sum| (f64::from(sum) / n) as f32).collect();
        Self { x, norm, along, level, training }
    }

    /// The derivative of `x` in the place of `d`.
    ///
    /// # Errors
    /// `Panic`.
    pub fn finish(&self, d: &mut [f32], workspace: &mut Workspace) -> Result<()> {
        assert_eq!(self.x.len(), d.len(), "floats of the images");
        let (isa, pixels) = (workspace.isa, d.len() / self.norm.mean.len());
        let (d, tasks) = (Address(d.as_mut_ptr()), pixels.div_ceil(PIXELS));
        workspace.threads.run(tasks, &|task, _| {
            let pixels = task * PIXELS..pixels.min((task + 1) * PIXELS);
            dispatch(isa, Finish { late: self, d, pixels });
        })
    }

    /// The sixteen channels from `channel` on.
    ///
    /// # Safety
    /// There are as many.
    #[inline(always)]
    pub unsafe fn lanes<V: Lanes>(&self, channel: usize) -> LateLanes<V> {
        // SAFETY: the caller's promise.
        unsafe {
            let factor = |of: &Vec<f32>| if self.training { V::load(of.as_ptr().add(channel)) } else { V::splat(0.0) };
            let [along, level] = [&self.along, &self.level].map(factor);
            LateLanes { norm: self.norm.lanes(channel), along, level, training: self.training }
        }
    }
}

impl<V: Lanes> LateLanes<V> {
    /// The derivative of `x`.
    #[inline(always)]
    pub fn value(self, x: V, d: V) -> V {
        let [x, dz] = self.norm.derivative(x, d);
        // Statistics that are not the batch's own do not depend on x, which may be infinite.
        match self.training {
            true => dz.sub(self.level).mul_add(self.norm.scale, x.mul(self.along)),
            false => dz.mul(self.norm.scale),
        }
    }
}

struct Finish<'a> {
    late: &'a Late<'a>,
    d: Address,
    pixels: std::ops::Range<usize>,
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let channels = self.late.norm.mean.len();
        for start in (0..channels / LANES).map(|block| block * LANES) {
            // SAFETY: whole blocks of channels; `finish` has compared the lengths, and nobody else has these pixels.
            unsafe {
                let lanes = self.late.lanes::<V>(start);
                for at in self.pixels.clone().map(|pixel| pixel * channels + start) {
                    let x = V::load(self.late.x.as_ptr().wrapping_add(at));
                    lanes.value(x, V::load(self.d.at(at))).store(self.d.at(at));
                }
            }
        }
        // In place, nothing may be done twice: what is left of the channels goes one by one.
        for at in self.pixels.flat_map(|pixel| (channels / LANES * LANES..channels).map(move |c| pixel * channels + c))
        {
            let c = at % channels;
            // SAFETY: as above.
            unsafe {
                let norm = &self.late.norm;
                let x = *self.late.x.get_unchecked(at) - norm.mean[c];
                let z = V::splat(x * norm.scale[c] + norm.shift[c]);
                let dz = derive(norm.activation, z, V::splat(*self.d.at(at))).to_array()[0];
                let (along, level) =
                    if self.late.training { (x * self.late.along[c], self.late.level[c]) } else { (0.0, 0.0) };
                *self.d.at(at) = (dz - level) * norm.scale[c] + along;
            }
        }
    }
}
