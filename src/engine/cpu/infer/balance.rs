//! Channels of a layer norm that are much larger than others, as vision transformers have them, would take the range of all:
//! part of their size goes into the weights that they are multiplied by.
//!
//! `x W = (x / b) (b W)` with one `b` per channel. A channel whose numbers reach `a`, of which the largest weight is `w`, gets
//! `b = sqrt(a / w)` (SmoothQuant, Xiao and others 2023, with a share of one half), so that both have the range `sqrt(a w)`.
//! How far they reach is known without looking at images: what comes out of the norm has mean 0 and variance 1 before its
//! own weights.

use super::fuse::{Fused, Tensors};
use crate::model::{Graph, Op};

/// How many deviations the largest numbers of a channel are away from its mean.
const REACH: f32 = 3.0;

/// By node what is divided by in a layer norm, and multiplied by in the layers that read it. `norms`: whose values only
/// layers of bytes read.
pub fn balance(graph: &Graph, tensors: &Tensors<'_>, layers: &[Fused], norms: &[usize]) -> Vec<Option<Vec<f32>>> {
    let mut all = vec![None; graph.nodes.len()];
    let floats = |tensor: Option<usize>| tensor.and_then(|tensor| tensors[tensor]);
    let value_of = |node: usize| node % graph.nodes.len();
    for layer in layers.iter().filter(|layer| norms.contains(&value_of(layer.last))) {
        let value = value_of(layer.last);
        // What is added as it is.
        if layers.iter().any(|other| other.residual.map(value_of) == Some(value)) {
            continue;
        }
        let Op::LayerNorm { shape, weight, bias, .. } = &graph.nodes[layer.node].op else { continue };
        let channels: usize = shape.iter().product();
        let mut reach = vec![REACH; channels];
        if let Some(factors) = floats(*weight) {
            reach.iter_mut().zip(factors).for_each(|(reach, factor)| *reach *= factor.abs());
        }
        if let Some(summands) = floats(*bias) {
            reach.iter_mut().zip(summands).for_each(|(reach, summand)| *reach += summand.abs());
        }
        let mut largest = vec![0f32; channels];
        for reader in layers {
            let first = reader.expand.as_deref().unwrap_or(reader);
            let reads = reader.inputs.iter().any(|&input| value_of(input) == value);
            let (Op::Conv2d { weight, .. } | Op::Linear { weight, .. }) = graph.nodes[first.node].op else { continue };
            let Some(filters) = floats(Some(weight)).filter(|_| reads) else { continue };
            let window: usize = graph.tensors[weight].iter().skip(2).product();
            for filter in filters.chunks_exact(channels * window) {
                for (largest, weights) in largest.iter_mut().zip(filter.chunks_exact(window)) {
                    *largest = weights.iter().fold(*largest, |largest, w| largest.max(w.abs()));
                }
            }
        }
        let share = reach.iter().zip(largest).map(|(reach, largest)| match (reach / largest).sqrt() {
            share if share.is_normal() => share,
            // Nothing but zeros on one side, or what bytes cannot hold.
            _ => 1.0,
        });
        all[value] = Some(share.collect());
    }
    all
}
