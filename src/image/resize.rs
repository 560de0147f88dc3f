//! Pillow's 8-bit two-pass resampling: 22-bit fixed-point weights, exact 32-bit sums, one rounding per pass.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::f64::consts::PI;
use std::sync::Arc;

use super::resize_passes::{Whole, resize_into};
use super::{Image, memory};
use crate::error::{Error, Result};

/// Pillow's resampling filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Filter {
    Nearest,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
    Lanczos,
}

/// Which pass runs first; each pass rounds to 8 bits, so the order shows in the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PillowOrder {
    /// Pillow 12: along the rows first, unless the image is more than a hundred times as high as wide and gets lower.
    HorizontalFirst,
    /// Pillow 13: down the columns first when the height shrinks by more than twice what the width does.
    #[default]
    Pillow13,
}

/// Target size as torchvision's `Resize` spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    Exact {
        height: usize,
        width: usize,
    },
    /// The shorter edge becomes `edge`, the other keeps the proportion and stays within `max_size`.
    Shorter {
        edge: usize,
        max_size: Option<usize>,
    },
}

impl Size {
    /// `(height, width)` for an image of that size.
    ///
    /// # Errors
    /// When an edge of the result would be zero, or `max_size` is not above `edge`.
    pub fn resolve(self, height: usize, width: usize) -> Result<(usize, usize)> {
        let (new_height, new_width) = match self {
            Self::Exact { height, width } => (height, width),
            Self::Shorter { edge, max_size } => {
                let (short, long) = if width <= height { (width, height) } else { (height, width) };
                // Python's int(a * b / c): the product is exact, the quotient is a float, the result is cut off.
                let scale = |a: usize, b: usize, c: usize| ((a * b) as f64 / c as f64) as usize;
                let (mut new_short, mut new_long) = (edge, scale(edge, long, short));
                if let Some(max_size) = max_size {
                    if max_size <= edge {
                        return Err(Error::Argument(format!(
                            "max_size = {max_size} must be strictly greater than the requested size for the smaller \
                             edge size = {edge}"
                        )));
                    }
                    if new_long > max_size {
                        (new_short, new_long) = (scale(max_size, new_short, new_long), max_size);
                    }
                }
                if width <= height { (new_long, new_short) } else { (new_short, new_long) }
            }
        };
        if new_height == 0 || new_width == 0 {
            return Err(Error::Argument(format!(
                "cannot resize {width} x {height} to {new_width} x {new_height}: height and width must be > 0"
            )));
        }
        Ok((new_height, new_width))
    }
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
        match self {
            Self::Nearest => 0.0,
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Hamming => match x.abs() {
                0.0 => 1.0,
                a if a >= 1.0 => 0.0,
                // The constants are floats in Pillow.
                a => (a * PI).sin() / (a * PI) * (f64::from(0.54f32) + f64::from(0.46f32) * (a * PI).cos()),
            },
            Self::Bicubic => match (x.abs(), -0.5) {
                (x, a) if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
                (x, a) if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * a,
                _ => 0.0,
            },
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// Bits behind the binary point of a weight: 32 minus 8 for the result minus 2 for sums below 0 and above 1.
pub(super) const PRECISION: u32 = 22;

/// One output position: `count` weights from `first` on, stored at `offset`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub first: usize,
    pub count: usize,
    pub offset: usize,
}

/// The weights of one pass, for every output position.
#[derive(Debug)]
pub(super) struct Weights {
    pub windows: Vec<Window>,
    pub values: Vec<i32>,
    /// For [`ResizePath::Avx2`].
    #[cfg(target_arch = "x86_64")]
    pub pairs: super::resize_avx2::Packed,
    /// For [`ResizePath::Avx512`] and what [`ResizePath::Vbmi`] leaves to it.
    #[cfg(target_arch = "x86_64")]
    pub quads: super::resize_avx512::Packed,
    /// For [`ResizePath::Vbmi`].
    #[cfg(target_arch = "x86_64")]
    pub groups: super::resize_vbmi::Packed,
}

impl Weights {
    fn new(path: ResizePath, input: usize, output: usize, filter: Filter) -> Self {
        // Pillow's box is a float.
        let scale = f64::from(input as f32) / output as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let mut windows = Vec::with_capacity(output);
        let mut values = Vec::new();
        let mut window = Vec::new();
        for x in 0..output {
            let center = (x as f64 + 0.5) * scale;
            let per_sample = 1.0 / filter_scale;
            // `as` cuts towards zero and negative values end at 0, as Pillow's do.
            let first = (center - support + 0.5) as usize;
            let last = ((center + support + 0.5) as usize).min(input);
            window.clear();
            window.extend((first..last).map(|i| filter.weight((i as f64 - center + 0.5) * per_sample)));
            let mut sum = 0.0;
            window.iter().for_each(|w| sum += w);
            windows.push(Window { first, count: window.len(), offset: values.len() });
            values.extend(window.iter().map(|&w| {
                let fixed = (if sum == 0.0 { w } else { w / sum }) * f64::from(1 << PRECISION);
                (fixed + if fixed < 0.0 { -0.5 } else { 0.5 }) as i32
            }));
        }
        #[cfg(target_arch = "x86_64")]
        let (mut pairs, mut quads, mut groups) = Default::default();
        match path {
            ResizePath::Scalar => {}
            #[cfg(target_arch = "x86_64")]
            ResizePath::Avx2 => pairs = super::resize_avx2::Packed::new(&windows, &values, input),
            #[cfg(target_arch = "x86_64")]
            ResizePath::Avx512 => quads = super::resize_avx512::Packed::new(&windows, &values, input),
            #[cfg(target_arch = "x86_64")]
            ResizePath::Vbmi => {
                quads = super::resize_avx512::Packed::new(&windows, &values, input);
                groups = super::resize_vbmi::Packed::new(&windows, &values, input);
            }
        }
        Self {
            windows,
            values,
            #[cfg(target_arch = "x86_64")]
            pairs,
            #[cfg(target_arch = "x86_64")]
            quads,
            #[cfg(target_arch = "x86_64")]
            groups,
        }
    }
}

/// Weights by (path, input, output, filter): photos of one folder share few sizes.
#[derive(Debug, Default)]
pub(super) struct WeightCache {
    by_size: HashMap<(ResizePath, usize, usize, Filter), Arc<Weights>>,
}

impl WeightCache {
    /// Some folders have a new size in every file; then keeping them all would only cost memory.
    const CAPACITY: usize = 256;

    pub fn get(&mut self, path: ResizePath, input: usize, output: usize, filter: Filter) -> Result<Arc<Weights>> {
        let key = (path, input, output, filter);
        if let Some(weights) = self.by_size.get(&key) {
            return Ok(Arc::clone(weights));
        }
        // Per weight four bytes here and at most 16 in what the kernels read, which pad windows to whole vectors.
        let taps = 2.0 * filter.support() * (input as f64 / output as f64).max(1.0) + 2.0;
        memory::probe((output as f64 * (taps * 20.0 + 256.0)) as usize)?;
        if self.by_size.len() >= Self::CAPACITY {
            self.by_size.clear();
        }
        let weights = Arc::new(Weights::new(path, input, output, filter));
        self.by_size.insert(key, Arc::clone(&weights));
        Ok(weights)
    }
}

/// Buffers and weights that resizing needs and the next image can use again.
#[derive(Debug, Default)]
pub(super) struct ResizeScratch {
    pub weights: WeightCache,
    /// Rows after the first pass that the second one still reads.
    pub between: Vec<u8>,
    /// Rows of the result that go on to the tensor.
    pub rows: Vec<u8>,
    result: Image,
}

/// Which implementation computes the passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResizePath {
    /// The reference, and what runs where no kernel fits the processor.
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// With VNNI and VBMI.
    #[cfg(target_arch = "x86_64")]
    Vbmi,
}

impl ResizePath {
    /// The fastest that this processor has.
    pub fn best() -> Self {
        Self::all().last().copied().unwrap_or(Self::Scalar)
    }

    /// Those that this processor has, slowest first.
    pub fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(super::resize_avx2::available().then_some(Self::Avx2));
            all.extend(super::resize_avx512::available().then_some(Self::Avx512));
            all.extend(super::resize_vbmi::available().then_some(Self::Vbmi));
        }
        all
    }
}

/// Resizes in place as `PIL.Image.resize((width, height), filter)`; zero sizes are the caller's to refuse.
///
/// # Errors
/// When there is no memory for the result.
pub fn resize(image: &mut Image, height: usize, width: usize, filter: Filter, order: PillowOrder) -> Result<()> {
    resize_on(ResizePath::best(), image, height, width, filter, order)
}

/// [`resize`] on a chosen implementation, for tests and benchmarks: one of [`ResizePath::all`].
///
/// # Errors
/// As [`resize`].
pub fn resize_on(
    path: ResizePath,
    image: &mut Image,
    height: usize,
    width: usize,
    filter: Filter,
    order: PillowOrder,
) -> Result<()> {
    resize_with(path, image, height, width, filter, order, &mut ResizeScratch::default())
}

pub(super) fn resize_with(
    path: ResizePath,
    image: &mut Image,
    height: usize,
    width: usize,
    filter: Filter,
    order: PillowOrder,
    scratch: &mut ResizeScratch,
) -> Result<()> {
    if (image.height, image.width) == (height, width) {
        return Ok(());
    }
    let mut result = std::mem::take(&mut scratch.result);
    if filter == Filter::Nearest {
        nearest(image, height, width, &mut result)?;
    } else {
        result.reshape(width, height, image.layout)?;
        let stride = result.stride();
        let mut rows = Whole { stride, data: &mut result.data };
        resize_into(path, image, (height, width), filter, order, scratch, &mut rows)?;
    }
    std::mem::swap(image, &mut result);
    scratch.result = result;
    Ok(())
}

/// Rounds a fixed-point sum to a byte.
pub(super) fn clip(sum: i32) -> u8 {
    ((sum + (1 << (PRECISION - 1))) >> PRECISION).clamp(0, 255) as u8
}

/// Pillow's nearest resize: positions are accumulated, so that they drift as its do.
fn nearest(image: &Image, height: usize, width: usize, out: &mut Image) -> Result<()> {
    out.reshape(width, height, image.layout)?;
    // The table of positions.
    memory::probe(8 * (width + height))?;
    let positions = |input: usize, output: usize| {
        let step = f64::from(input as f32) / output as f64;
        let mut at = step * 0.5;
        (0..output)
            .map(|_| {
                let position = at as usize;
                at += step;
                position.min(input - 1)
            })
            .collect::<Vec<_>>()
    };
    let columns = positions(image.width, width);
    let pixel = image.layout.bytes_per_pixel();
    for (y, line) in positions(image.height, height).into_iter().zip(out.data.chunks_exact_mut(width * pixel)) {
        let row = &image.data[y * image.stride()..];
        for (&x, value) in columns.iter().zip(line.chunks_exact_mut(pixel)) {
            value.copy_from_slice(&row[x * pixel..][..pixel]);
        }
    }
    Ok(())
}
