//! Squeeze and excitation behind a batch norm: the mean of `a = act(z)` over every image, from which somebody makes a gate
//! per image and channel, and the way back from `m = a gate`.
//!
//! ```text
//! dz = act'(z) (dm gate + dmean / pixels)
//! ```
//! Blocks of channels are those of [`Channels`].

use super::late::{Norm, Sums};
use super::rows::Channels;
use super::{Address, Workspace};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::error::Result;

/// Pixels of a task, and those whose sum is made before it joins the others, for the sake of rounding.
const PIXELS: usize = 1 << 10;
const CHUNK: usize = 64;

/// Sizes of what is gated: `pixels` of each image, at least sixteen channels.
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    pub images: usize,
    pub pixels: usize,
    pub channels: usize,
}

impl Gate {
    /// The mean `[image][channel]` of all pixels of what is read.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn squeeze(&self, x: &[f32], norm: &Norm, mean: &mut [f32], workspace: &mut Workspace) -> Result<()> {
        assert_eq!((x.len(), mean.len()), (self.floats(), self.images * self.channels), "floats");
        let (parts, isa) = (self.parts(), workspace.isa);
        let to = Address(workspace.memory(self.images * parts * self.channels)?);
        let job = Squeeze { gate: *self, x, norm, to };
        workspace.threads.run(self.images * parts, &|part, _| dispatch(isa, Squeezed(&job, part)))?;
        for (image, mean) in mean.chunks_exact_mut(self.channels).enumerate() {
            for (c, mean) in mean.iter_mut().enumerate() {
                let part = |part: usize| to.at((image * parts + part) * self.channels + c);
                // SAFETY: the kernels have filled them.
                let sum: f64 = (0..parts).map(|at| f64::from(unsafe { part(at).read() })).sum();
                *mean = (sum / self.pixels as f64) as f32;
            }
        }
        Ok(())
    }

    /// dz in the place of dm, and its sums.
    ///
    /// # Arguments
    /// `gate`, `mean`: `[image][channel]`, the gate and the derivative of the mean.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn differentiate(
        &self,
        (x, norm): (&[f32], &Norm),
        gate: &[f32],
        mean: &[f32],
        derivative: &mut [f32],
        sums: &mut Sums,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let vectors = self.images * self.channels;
        assert_eq!((x.len(), derivative.len()), (self.floats(), self.floats()), "floats of images");
        assert_eq!((gate.len(), mean.len()), (vectors, vectors), "floats of vectors");
        let (tasks, isa) = (self.images * self.parts(), workspace.isa);
        let to = Address(workspace.memory(tasks * 2 * self.channels)?);
        let share: Vec<f32> = mean.iter().map(|mean| mean / self.pixels as f32).collect();
        let d = Address(derivative.as_mut_ptr());
        let job = Differentiate { gate: *self, x, norm, open: gate, share: &share, d, to };
        workspace.threads.run(tasks, &|part, _| dispatch(isa, Differentiated(&job, part)))?;
        let sum = |which: usize, c: usize| -> f64 {
            let part = |part: usize| to.at((part * 2 + which) * self.channels + c);
            // SAFETY: the kernels have filled them.
            (0..tasks).map(|at| f64::from(unsafe { part(at).read() })).sum()
        };
        sums.plain = (0..self.channels).map(|c| sum(0, c)).collect();
        sums.product = (0..self.channels).map(|c| sum(1, c)).collect();
        Ok(())
    }

    fn floats(&self) -> usize {
        self.images * self.pixels * self.channels
    }

    /// Tasks of an image.
    fn parts(&self) -> usize {
        self.pixels.div_ceil(PIXELS)
    }

    /// The image of a task, and its pixels among those of all images.
    fn place(&self, task: usize) -> (usize, std::ops::Range<usize>) {
        let (image, part) = (task / self.parts(), task % self.parts());
        let end = self.pixels.min((part + 1) * PIXELS);
        (image, image * self.pixels + part * PIXELS..image * self.pixels + end)
    }
}

struct Squeeze<'a> {
    gate: Gate,
    x: &'a [f32],
    norm: &'a Norm,
    to: Address,
}

struct Squeezed<'a>(&'a Squeeze<'a>, usize);

impl Kernel for Squeezed<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self(job, task) = self;
        let channels = job.gate.channels;
        let (_, pixels) = job.gate.place(task);
        for start in Channels(channels).starts() {
            // SAFETY: at least sixteen channels; `squeeze` has compared the lengths and made room for the sums.
            unsafe {
                let lanes = job.norm.lanes::<V>(start);
                let mut all = V::splat(0.0);
                for first in pixels.clone().step_by(CHUNK) {
                    let mut sum = V::splat(0.0);
                    for pixel in first..pixels.end.min(first + CHUNK) {
                        sum = sum.add(lanes.value(V::load(job.x.as_ptr().wrapping_add(pixel * channels + start))));
                    }
                    all = all.add(sum);
                }
                all.store(job.to.at(task * channels + start));
            }
        }
    }
}

struct Differentiate<'a> {
    gate: Gate,
    x: &'a [f32],
    norm: &'a Norm,
    open: &'a [f32],
    share: &'a [f32],
    d: Address,
    to: Address,
}

struct Differentiated<'a>(&'a Differentiate<'a>, usize);

impl Kernel for Differentiated<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self(job, task) = self;
        let channels = job.gate.channels;
        let (image, pixels) = job.gate.place(task);
        let whole = channels / LANES * LANES;
        for start in Channels(channels).starts() {
            // What a block before has overwritten already stays as it is.
            let again = whole.saturating_sub(start) % LANES;
            // SAFETY: at least sixteen channels; `differentiate` has compared the lengths and made room for the sums.
            unsafe {
                let lanes = job.norm.lanes::<V>(start);
                let [open, share] =
                    [job.open, job.share].map(|of| V::load(of.as_ptr().wrapping_add(image * channels + start)));
                let (mut plain, mut product) = (V::splat(0.0), V::splat(0.0));
                for first in pixels.clone().step_by(CHUNK) {
                    let (mut sum, mut along) = (V::splat(0.0), V::splat(0.0));
                    for pixel in first..pixels.end.min(first + CHUNK) {
                        let at = pixel * channels + start;
                        let x = V::load(job.x.as_ptr().wrapping_add(at));
                        let [x, dz] = lanes.derivative(x, V::load(job.d.at(at)).mul_add(open, share));
                        (sum, along) = (sum.add(dz), x.mul_add(dz, along));
                        if again == 0 {
                            dz.store(job.d.at(at));
                        } else {
                            store_end(dz, again, job.d.at(at));
                        }
                    }
                    (plain, product) = (plain.add(sum), product.add(along));
                }
                let to = job.to.at(task * 2 * channels + start);
                if again == 0 {
                    plain.store(to);
                    product.store(to.wrapping_add(channels));
                } else {
                    store_end(plain, again, to);
                    store_end(product, again, to.wrapping_add(channels));
                }
            }
        }
    }
}

/// All lanes but the first ones.
///
/// # Safety
/// `to` is writable.
#[inline(always)]
unsafe fn store_end<V: Lanes>(value: V, first: usize, to: *mut f32) {
    for (lane, value) in value.to_array().into_iter().enumerate().skip(first) {
        // SAFETY: the caller's promise.
        unsafe { to.wrapping_add(lane).write(value) };
    }
}
