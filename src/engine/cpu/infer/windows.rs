//! From attention within windows to its step: the tables that it adds to scores.

use super::build::{Network, Weights};
use super::fuse::{Fused, Tensors};
use super::memory::Value;
use super::steps::{Attend, Tables, WindowAttention};
use crate::engine::cpu::common::analysis::unsupported;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::error::Result;
use crate::model::{APART, Bias, Node, Scores, Windows};

/// # Errors
/// `Unsupported` for heads that do not end with a block of channels, and for keys with a summand in cosine attention, which
/// PyTorch's layer leaves out.
pub fn check(node: &Node, channels: usize, windows: &Windows, tensors: &Tensors<'_>) -> Result<()> {
    let depth = channels / windows.heads;
    if !depth.is_multiple_of(LANES) {
        return Err(unsupported(node, &format!("has heads of {depth} channels, no multiple of {LANES}")));
    }
    if let Bias::Computed { distances, .. } = windows.bias
        && tensors[distances].is_none()
    {
        return Err(unsupported(node, "has distances that are not contiguous float32 on the CPU"));
    }
    let fill = windows.fill.and_then(|fill| tensors[fill]);
    if let (Scores::Cosine { .. }, Some(fill)) = (&windows.scores, fill)
        && fill[channels..2 * channels].iter().any(|&v| v != 0.0)
    {
        return Err(unsupported(node, "has a summand for its keys, which cosine attention leaves out"));
    }
    Ok(())
}

/// Factors, summands and masks of scores, with the weights as they are now.
pub fn step<'a>(
    network: &Network<'a>,
    layer: &Fused,
    windows: &'a Windows,
    [input, output]: [Value; 2],
    weights: &mut Weights<'a>,
) -> Result<WindowAttention> {
    let (heads, tokens) = (windows.heads, windows.tokens());
    let (scales, cosine) = match windows.scores {
        Scores::Scaled(scale) => (vec![scale as f32; heads], false),
        Scores::Cosine { logit } => {
            let logits = network.floats(layer, logit)?.iter();
            (logits.map(|&logit| f64::from(logit).min(100f64.ln()).exp() as f32).collect(), true)
        }
    };
    let fill = match windows.fill {
        Some(fill) => network.floats(layer, fill)?.iter().map(|&v| f64::from(v)).collect(),
        None => vec![0.0; input.geometry.channels],
    };
    let fill = weights.vector(fill);
    let table = biases(network, layer, windows)?;
    let row = Attend::row(tokens);
    let bias = weights.reserve_in(heads * tokens * row, tokens * row, move |head, to| {
        let biases = table(head);
        for (at, to) in to.iter_mut().enumerate() {
            let (query, key) = (at / row, at % row);
            *to = match key < tokens {
                true => (biases[windows.distance(query, key)] * std::f64::consts::LOG2_E) as f32,
                false => f32::NEG_INFINITY,
            };
        }
    });
    let shift = windows.shifted([output.geometry.height, output.geometry.width]);
    let masks = weights.reserve_in(3 * tokens * row, tokens * row, move |kind, to| {
        // Lower, right, both.
        let seams = [kind != 1, kind != 0];
        for (at, to) in to.iter_mut().enumerate() {
            let (query, key) = (at / row, at % row);
            let beyond = |token: usize| {
                let at = [token / windows.window[1], token % windows.window[1]];
                [0, 1].map(|i| seams[i] && at[i] >= windows.window[i] - shift[i])
            };
            let apart = key < tokens && beyond(query) != beyond(key);
            *to = if apart { (APART * std::f64::consts::LOG2_E) as f32 } else { 0.0 };
        }
    });
    let tables = Tables { bias, masks, fill };
    Ok(WindowAttention::new(network.isa, windows, [input, output], tables, scales, cosine))
}

type Biases<'a> = Box<dyn Fn(usize) -> Vec<f64> + Sync + 'a>;

/// What is added to the scores of a head, by the number of the distance.
fn biases<'a>(network: &Network<'a>, layer: &Fused, windows: &'a Windows) -> Result<Biases<'a>> {
    let (heads, count) = (windows.heads, windows.distances());
    let floats = |tensor| network.floats(layer, tensor);
    Ok(match windows.bias {
        Bias::Table(table) => {
            let table = floats(table)?;
            Box::new(move |head| (0..count).map(|at| f64::from(table[at * heads + head])).collect())
        }
        Bias::Computed { distances, hidden, hidden_bias, output } => {
            let (distances, output) = (floats(distances)?, floats(output)?);
            let (hidden, summands) = (floats(hidden)?, floats(hidden_bias)?);
            Box::new(move |head| {
                let output = &output[head * summands.len()..][..summands.len()];
                let distances = distances.as_chunks::<2>().0;
                let bias = |[y, x]: [f32; 2]| {
                    let units = hidden.as_chunks::<2>().0.iter().zip(summands).zip(output);
                    let sum: f64 = units
                        .map(|((&[b, a], &summand), &factor)| {
                            let unit = f64::from(b) * f64::from(y) + f64::from(a) * f64::from(x) + f64::from(summand);
                            unit.max(0.0) * f64::from(factor)
                        })
                        .sum();
                    16.0 / (1.0 + (-sum).exp())
                };
                distances.iter().map(|&distance| bias(distance)).collect()
            })
        }
    })
}
