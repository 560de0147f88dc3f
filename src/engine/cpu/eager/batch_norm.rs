//! Batch norm with the addition and the activation that follow it, each value read and written as seldom as can be.
//!
//! ```text
//! y = act(z),  z = (x - mean) scale + shift + r,  scale = weight / sqrt(var + eps)
//! ```
//! Pixels lie behind each other as rows of channels. Where the channels are no whole blocks of sixteen, several pixels make
//! a row: the same channels come again every so many.

use super::late::Moments;
use super::pointwise::STREAMED;
use super::rows::{Channels, GROUP, PartMoments, join};
use super::{Address, Workspace};
use crate::engine::cpu::common::kernels::activate::{Activate, activate_derivable, derive};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::error::Result;

/// Floats that are gone over twice, in the second-level cache.
const CHUNK: usize = 1 << 15;

/// Floats of rows so far apart that the processor does not see the next ones coming.
const APART: usize = 64;

/// Sizes and kind of a batch norm.
#[derive(Debug, Clone, Copy)]
pub struct BatchNorm {
    pub pixels: usize,
    pub channels: usize,
    pub eps: f64,
    pub activation: Activate,
}

/// What the forward pass reads and writes.
pub struct Forward<'a> {
    pub x: &'a [f32],
    pub residual: Option<&'a [f32]>,
    pub weight: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
    pub mean: &'a [f32],
    pub var: &'a [f32],
}

/// What the backward pass reads besides, and writes.
pub struct Backward<'a> {
    pub forward: Forward<'a>,
    pub derivative: &'a [f32],
    /// Whether mean and variance are the batch's own.
    pub training: bool,
    pub x: Option<&'a mut [f32]>,
    pub residual: Option<&'a mut [f32]>,
    pub weight: &'a mut [f32],
    pub bias: &'a mut [f32],
}

impl BatchNorm {
    /// How many pixels make a row of whole blocks; None where the pixels do not divide into such rows.
    pub fn group(pixels: usize, channels: usize) -> Option<usize> {
        let group = (1..=LANES).find(|n| (n * channels).is_multiple_of(LANES))?;
        (pixels > 0 && pixels.is_multiple_of(group)).then_some(group)
    }

    fn rows(&self) -> Rows {
        let group = Self::group(self.pixels, self.channels).unwrap_or(1);
        let width = group * self.channels;
        let rows = self.pixels / group;
        let each = (CHUNK / width).clamp(1, rows);
        Rows { rows, width, each, chunks: rows.div_ceil(each) }
    }

    /// Mean and variance (the biased one) of every channel.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn statistics(&self, x: &[f32], mean: &mut [f32], var: &mut [f32], workspace: &mut Workspace) -> Result<()> {
        assert_eq!((x.len(), mean.len(), var.len()), (self.pixels * self.channels, self.channels, self.channels));
        let r = self.rows();
        let sums = self.sums(workspace, r, |chunk, to| {
            let (rows, channels) = (r.range(chunk), Channels(r.width));
            let x = x.as_ptr().wrapping_add(rows.start * r.width);
            PartMoments { channels, x, rows: rows.len(), to }
        })?;
        let chunks = sums.chunks_exact(2 * r.width).enumerate();
        let parts = chunks.flat_map(|(chunk, sums)| {
            let (means, squares) = sums.split_at(r.width);
            let pixels = means.chunks_exact(self.channels).zip(squares.chunks_exact(self.channels));
            pixels.map(move |(means, squares)| (r.range(chunk).len(), means, squares))
        });
        let moments = Moments::of_parts(self.channels, parts);
        mean.copy_from_slice(&moments.mean);
        var.copy_from_slice(&moments.var);
        Ok(())
    }

    /// y from x.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn run(&self, from: &Forward<'_>, y: &mut [f32], workspace: &mut Workspace) -> Result<()> {
        let floats = self.pixels * self.channels;
        assert!([Some(from.x), from.residual].iter().flatten().all(|x| x.len() == floats) && y.len() == floats);
        let (r, isa) = (self.rows(), workspace.isa);
        let factors = self.factors(from, r);
        let job = Job::new(self, from, None, &factors);
        let y = Address(y.as_mut_ptr());
        workspace.threads.run(r.chunks, &|chunk, _| dispatch(isa, Apply { job: &job, y, chunk }))
    }

    /// All derivatives.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn differentiate(&self, b: Backward<'_>, workspace: &mut Workspace) -> Result<()> {
        let floats = self.pixels * self.channels;
        let read = [Some(b.forward.x), b.forward.residual, Some(b.derivative)];
        assert!(read.iter().flatten().all(|x| x.len() == floats), "floats of what is read");
        assert!([&b.x, &b.residual].into_iter().flatten().all(|x| x.len() == floats), "floats of what is written");
        let (r, isa) = (self.rows(), workspace.isa);
        let out = |x: Option<&mut [f32]>| Address(x.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr));
        let (dx, dr) = (out(b.x), out(b.residual));
        // Has left the caches before it is read.
        let past = floats >= STREAMED && [dx, dr].iter().all(|to| to.0.addr().is_multiple_of(4 * LANES));
        let mut factors = self.factors(&b.forward, r);
        let sums = {
            let job = Job::new(self, &b.forward, Some(b.derivative), &factors);
            // Without dx there is no second pass.
            let dr = if dx.0.is_null() { dr } else { Address(std::ptr::null_mut()) };
            self.sums(workspace, r, |chunk, to| Sums { job: &job, dr, past, chunk, to })?
        };
        let mut all = [vec![0.0f64; self.channels], vec![0.0f64; self.channels]];
        for sums in sums.chunks_exact(2 * r.width) {
            for (all, sums) in all.iter_mut().zip(sums.chunks_exact(r.width)) {
                for pixel in sums.chunks_exact(self.channels) {
                    for (sum, &part) in all.iter_mut().zip(pixel) {
                        *sum += f64::from(part);
                    }
                }
            }
        }
        for (c, (&plain, &product)) in all[0].iter().zip(&all[1]).enumerate() {
            let inverse = 1.0 / (f64::from(b.forward.var[c]) + self.eps).sqrt();
            (b.bias[c], b.weight[c]) = (plain as f32, (product * inverse) as f32);
            if b.training {
                let (scale, n) = (f64::from(factors[0][c]), self.pixels as f64);
                for at in (c..r.width).step_by(self.channels) {
                    factors[3][at] = (-scale * inverse * inverse * product / n) as f32;
                    factors[4][at] = (plain / n) as f32;
                }
            }
        }
        let job = Job::new(self, &b.forward, Some(b.derivative), &factors);
        if dx.0.is_null() {
            return Ok(());
        }
        let training = b.training;
        workspace
            .threads
            .run(r.chunks, &|chunk, _| dispatch(isa, Differentiate { job: &job, dx, dr, past, training, chunk }))
    }

    /// Two sums per float of a row, of every chunk, in one order whatever thread has made them.
    fn sums<'a, K: Kernel>(
        &self,
        workspace: &'a mut Workspace,
        r: Rows,
        kernel: impl Fn(usize, *mut f32) -> K + Sync,
    ) -> Result<&'a [f32]> {
        let (isa, len) = (workspace.isa, r.chunks * 2 * r.width);
        let to = Address(workspace.memory(len)?);
        workspace.threads.run(r.chunks, &|chunk, _| dispatch(isa, kernel(chunk, to.at(chunk * 2 * r.width))))?;
        // SAFETY: the kernels have filled them, and the workspace is borrowed as long as they are read.
        Ok(unsafe { std::slice::from_raw_parts(to.0, len) })
    }

    /// For every float of a row: scale, mean, shift, and of the derivative the factor of x - mean and the mean of g (0 as yet).
    fn factors(&self, from: &Forward<'_>, r: Rows) -> [Vec<f32>; 5] {
        let mut factors: [Vec<f32>; 5] = std::array::from_fn(|_| vec![0.0; r.width]);
        let [scale, mean, shift, ..] = &mut factors;
        for (at, ((scale, mean), shift)) in scale.iter_mut().zip(mean).zip(shift).enumerate() {
            let c = at % self.channels;
            let weight = from.weight.map_or(1.0, |weight| f64::from(weight[c]));
            *scale = (weight / (f64::from(from.var[c]) + self.eps).sqrt()) as f32;
            *mean = from.mean[c];
            *shift = from.bias.map_or(0.0, |bias| bias[c]);
        }
        factors
    }
}

#[derive(Clone, Copy)]
struct Rows {
    rows: usize,
    width: usize,
    /// Rows of a chunk.
    each: usize,
    chunks: usize,
}

impl Rows {
    fn range(&self, chunk: usize) -> std::ops::Range<usize> {
        chunk * self.each..self.rows.min((chunk + 1) * self.each)
    }
}

struct Job<'a> {
    norm: BatchNorm,
    r: Rows,
    factors: &'a [Vec<f32>; 5],
    x: *const f32,
    residual: *const f32,
    /// The derivative of y.
    dy: *const f32,
}

// SAFETY: a kernel reads the images and writes to a place of its chunk's own.
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    fn new(norm: &BatchNorm, from: &Forward<'_>, dy: Option<&[f32]>, factors: &'a [Vec<f32>; 5]) -> Self {
        let address = |floats: Option<&[f32]>| floats.map_or(std::ptr::null(), <[f32]>::as_ptr);
        let (residual, dy) = (address(from.residual), address(dy));
        Self { norm: *norm, r: norm.rows(), factors, x: from.x.as_ptr(), residual, dy }
    }

    /// Sixteen of one of the factors.
    #[inline(always)]
    fn factor<V: Lanes>(&self, which: usize, at: usize) -> V {
        // SAFETY: a row has whole blocks.
        unsafe { V::load(self.factors[which].as_ptr().add(at)) }
    }

    /// Asks for what is read at an offset, which may be beyond the images.
    #[inline(always)]
    fn ahead<V: Lanes>(&self, at: usize) {
        for from in [self.x, self.dy, self.residual] {
            if !from.is_null() {
                V::prefetch(from.wrapping_add(at));
            }
        }
    }

    /// x - mean, and z.
    ///
    /// # Safety
    /// `at`, an offset of sixteen floats whose place in their row is `column`, is inside the images.
    #[inline(always)]
    unsafe fn value<V: Lanes>(&self, at: usize, column: usize) -> [V; 2] {
        // SAFETY: the caller's promise.
        let x = unsafe { V::load(self.x.wrapping_add(at)) }.sub(self.factor(1, column));
        let z = x.mul_add(self.factor(0, column), self.factor(2, column));
        if self.residual.is_null() {
            return [x, z];
        }
        // SAFETY: the caller's promise.
        [x, z.add(unsafe { V::load(self.residual.wrapping_add(at)) })]
    }

    /// x - mean, and the derivative of z.
    ///
    /// # Safety
    /// As for [`Self::value`]; there is a derivative of y.
    #[inline(always)]
    unsafe fn derivative<V: Lanes>(&self, at: usize, column: usize) -> [V; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let [x, z] = self.value::<V>(at, column);
            [x, derive(self.norm.activation, z, V::load(self.dy.wrapping_add(at)))]
        }
    }
}

struct Apply<'a> {
    job: &'a Job<'a>,
    y: Address,
    chunk: usize,
}

impl Kernel for Apply<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (job, r) = (self.job, self.job.r);
        for row in r.range(self.chunk) {
            for column in (0..r.width).step_by(LANES) {
                let at = row * r.width + column;
                // SAFETY: inside the images, whose lengths `run` has compared; nobody else writes this chunk.
                unsafe {
                    let [_, z] = job.value::<V>(at, column);
                    activate_derivable(job.norm.activation, z).store(self.y.at(at));
                }
            }
        }
    }
}

/// Sums of g, the derivative of z, and of g (x - mean), of a chunk; g itself goes to `dr`, unless that is null.
struct Sums<'a> {
    job: &'a Job<'a>,
    dr: Address,
    /// Whether that goes past the caches.
    past: bool,
    chunk: usize,
    to: *mut f32,
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { job, dr, past, chunk, to } = self;
        let r = job.r;
        for at in (0..2 * r.width).step_by(LANES) {
            // SAFETY: two sums per float of a row.
            unsafe { V::splat(0.0).store(to.wrapping_add(at)) };
        }
        let rows = r.range(chunk);
        for first in rows.clone().step_by(GROUP) {
            for column in (0..r.width).step_by(LANES) {
                let (mut sum, mut along) = (V::splat(0.0), V::splat(0.0));
                for row in first..rows.end.min(first + GROUP) {
                    let at = row * r.width + column;
                    if r.width >= APART {
                        job.ahead::<V>(at + GROUP * r.width);
                    }
                    // SAFETY: inside the images, whose lengths `differentiate` has compared; nobody else writes this chunk.
                    unsafe {
                        let [x, g] = job.derivative::<V>(at, column);
                        (sum, along) = (sum.add(g), x.mul_add(g, along));
                        if !dr.0.is_null() {
                            put(g, dr.at(at), past);
                        }
                    }
                }
                let (plain, product) = (to.wrapping_add(column), to.wrapping_add(r.width + column));
                // SAFETY: two sums per float of a row.
                unsafe {
                    join(sum, plain);
                    join(along, product);
                }
            }
        }
        if past {
            V::fence();
        }
    }
}

struct Differentiate<'a> {
    job: &'a Job<'a>,
    dx: Address,
    dr: Address,
    /// Whether both go past the caches.
    past: bool,
    /// Whether mean and variance are the batch's own.
    training: bool,
    chunk: usize,
}

impl Kernel for Differentiate<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (job, r) = (self.job, self.job.r);
        for row in r.range(self.chunk) {
            for column in (0..r.width).step_by(LANES) {
                let at = row * r.width + column;
                // SAFETY: inside the images, whose lengths `differentiate` has compared; nobody else writes this chunk.
                unsafe {
                    let [x, g] = job.derivative::<V>(at, column);
                    if !self.dr.0.is_null() {
                        put(g, self.dr.at(at), self.past);
                    }
                    if !self.dx.0.is_null() {
                        // Statistics that are not the batch's own do not depend on x, which may be infinite.
                        let scale = job.factor::<V>(0, column);
                        let dx = match self.training {
                            true => g.sub(job.factor(4, column)).mul_add(scale, x.mul(job.factor(3, column))),
                            false => g.mul(scale),
                        };
                        put(dx, self.dx.at(at), self.past);
                    }
                }
            }
        }
        if self.past {
            V::fence();
        }
    }
}

/// Writes sixteen floats, `past` the caches or not.
///
/// # Safety
/// They are there, with `past` a whole cache line.
#[inline(always)]
unsafe fn put<V: Lanes>(values: V, to: *mut f32, past: bool) {
    // SAFETY: the caller's promise.
    unsafe { if past { values.stream(to) } else { values.store(to) } }
}
