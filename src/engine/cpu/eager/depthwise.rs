//! The gradient of a depthwise convolution's filters, of which each channel has one of its own.
//!
//! The last block of channels begins sixteen before the end: where channels are no whole blocks, some are computed twice.

use super::{Address, Shape, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::error::Result;

/// Sizes of a depthwise convolution with square filters, the same stride and padding both ways.
#[derive(Debug, Clone, Copy)]
pub struct Depthwise {
    pub input: Shape,
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl Depthwise {
    /// Whether there is code for these sizes.
    pub fn is_known(&self) -> bool {
        let long = self.input.size.iter().all(|&side| side + 2 * self.padding >= self.kernel);
        let known = matches!(self.kernel, 3 | 5 | 7) && matches!(self.stride, 1 | 2);
        known && long && self.padding < self.kernel && self.input.channels >= LANES
    }

    pub fn output(&self) -> Shape {
        let size = self.input.size.map(|side| (side + 2 * self.padding - self.kernel) / self.stride + 1);
        Shape { size, ..self.input }
    }

    /// The gradient of the filters `[channels][kernel][kernel]`.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn weight_gradient(
        &self,
        input: &[f32],
        derivative: &[f32],
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        assert_eq!((derivative.len(), input.len()), (self.output().floats(), self.input.floats()), "floats of images");
        let (taps, channels, isa) = (self.taps(), self.input.channels, workspace.isa);
        assert_eq!(gradient.len(), taps * channels, "floats of the filters");
        let parts = self.input.images * self.bands();
        let sums = Address(workspace.memory(parts * taps * channels)?);
        let job = Job { conv: *self, input: input.as_ptr(), derivative: derivative.as_ptr(), to: sums };
        workspace.threads.run(parts, &|part, _| self.part(isa, &job, part))?;
        // SAFETY: all parts have filled theirs.
        let sums = unsafe { std::slice::from_raw_parts(sums.0, parts * taps * channels) };
        for (c, filter) in gradient.chunks_exact_mut(taps).enumerate() {
            for (tap, value) in filter.iter_mut().enumerate() {
                let of_parts = sums[tap * channels + c..].iter().step_by(taps * channels);
                *value = of_parts.map(|&sum| f64::from(sum)).sum::<f64>() as f32;
            }
        }
        Ok(())
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Where the blocks of channels begin.
    fn blocks(&self) -> impl Iterator<Item = usize> {
        let channels = self.input.channels;
        (0..channels.div_ceil(LANES)).map(move |block| (block * LANES).min(channels - LANES))
    }

    /// Bands of output rows, each with what fits the second-level cache of its inputs.
    fn bands(&self) -> usize {
        let output = self.output();
        let row = self.stride * self.input.row() + output.row();
        (output.size[0] * row).div_ceil(BAND).min(output.size[0])
    }

    fn part(&self, isa: Isa, job: &Job, part: usize) {
        match (self.kernel, self.stride) {
            (3, 1) => dispatch(isa, Part::<3, 1> { job, part }),
            (3, _) => dispatch(isa, Part::<3, 2> { job, part }),
            (5, 1) => dispatch(isa, Part::<5, 1> { job, part }),
            (5, _) => dispatch(isa, Part::<5, 2> { job, part }),
            (_, 1) => dispatch(isa, Part::<7, 1> { job, part }),
            _ => dispatch(isa, Part::<7, 2> { job, part }),
        }
    }
}

/// Floats of a band.
const BAND: usize = 1 << 16;

/// What the parts read, and where they write.
struct Job {
    conv: Depthwise,
    input: *const f32,
    derivative: *const f32,
    to: Address,
}

// SAFETY: parts only read the two, and write to places of their own.
unsafe impl Sync for Job {}

/// The filters' gradients `[tap][channel]` of a band of an image.
struct Part<'a, const K: usize, const S: usize> {
    job: &'a Job,
    part: usize,
}

impl<const K: usize, const S: usize> Kernel for Part<'_, K, S> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Job { conv, input, derivative, to } = self.job;
        let (output, channels, bands) = (conv.output(), conv.input.channels, conv.bands());
        let [height, width] = conv.input.size;
        let (image, band) = (self.part / bands, self.part % bands);
        let rows = output.size[0] * band / bands..output.size[0] * (band + 1) / bands;
        let input = input.wrapping_add(image * height * conv.input.row());
        let derivative = derivative.wrapping_add(image * output.size[0] * output.row());
        // Outputs whose filter lies inside the row.
        let first = conv.padding.div_ceil(S).min(output.size[1]);
        let inner = first..((width + conv.padding + S).saturating_sub(K) / S).clamp(first, output.size[1]);
        for start in conv.blocks() {
            let mut sums = [[V::splat(0.0); K]; K];
            for oy in rows.clone() {
                for (ky, sums) in sums.iter_mut().enumerate() {
                    let Some(y) = (oy * S + ky).checked_sub(conv.padding).filter(|&y| y < height) else { continue };
                    let line = Line {
                        input: input.wrapping_add(y * width * channels + start),
                        derivative: derivative.wrapping_add(oy * output.size[1] * channels + start),
                        channels,
                    };
                    // SAFETY: inside the images, whose lengths `weight_gradient` has compared.
                    unsafe {
                        for ox in (0..inner.start).chain(inner.end..output.size[1]) {
                            for (kx, sum) in sums.iter_mut().enumerate() {
                                if let Some(x) = (ox * S + kx).checked_sub(conv.padding).filter(|&x| x < width) {
                                    *sum = line.product(x, ox, *sum);
                                }
                            }
                        }
                        for ox in inner.clone() {
                            for (kx, sum) in sums.iter_mut().enumerate() {
                                *sum = line.product(ox * S + kx - conv.padding, ox, *sum);
                            }
                        }
                    }
                }
            }
            for (tap, sum) in sums.as_flattened().iter().enumerate() {
                // SAFETY: `weight_gradient` made room for all parts.
                unsafe { sum.store(to.at((self.part * K * K + tap) * channels + start)) };
            }
        }
    }
}

/// Sixteen channels of a row of the input and of one of the derivative.
struct Line {
    input: *const f32,
    derivative: *const f32,
    channels: usize,
}

impl Line {
    /// # Safety
    /// The pixels are inside their rows.
    #[inline(always)]
    unsafe fn product<V: Lanes>(&self, x: usize, ox: usize, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            let d = V::load(self.derivative.wrapping_add(ox * self.channels));
            d.mul_add(V::load(self.input.wrapping_add(x * self.channels)), sum)
        }
    }
}
