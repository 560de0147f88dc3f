//! The weights of a pass, in the form each kernel reads them.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
use super::avx2::Pairs;
#[cfg(target_arch = "x86_64")]
use super::avx512::Quads;
use super::taps::{PRECISION, Taps};
#[cfg(target_arch = "x86_64")]
use super::vbmi::Groups;
use super::{Filter, ResizePath};
use crate::error::Result;
use crate::memory;

/// The weights of one pass, for every output position.
#[derive(Debug)]
pub(super) struct Weights {
    pub windows: Vec<Taps>,
    pub values: Vec<i32>,
    /// For [`ResizePath::Avx2`].
    #[cfg(target_arch = "x86_64")]
    pub pairs: Pairs,
    /// For [`ResizePath::Avx512`] and what [`ResizePath::Vbmi`] leaves to it.
    #[cfg(target_arch = "x86_64")]
    pub quads: Quads,
    /// For [`ResizePath::Vbmi`].
    #[cfg(target_arch = "x86_64")]
    pub groups: Groups,
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
            windows.push(Taps { first, count: window.len(), offset: values.len() });
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
            ResizePath::Avx2 => pairs = Pairs::new(&windows, &values, input),
            #[cfg(target_arch = "x86_64")]
            ResizePath::Avx512 => quads = Quads::new(&windows, &values, input),
            #[cfg(target_arch = "x86_64")]
            ResizePath::Vbmi => {
                quads = Quads::new(&windows, &values, input);
                groups = Groups::new(&windows, &values, input);
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
