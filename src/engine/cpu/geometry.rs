//! Where each output element of an operation looks.

use std::ops::Range;

use super::kernels::im2col::Window;
use crate::model::{Graph, Op, Pair, Shape};

/// The geometry of one group of a convolution; `None` for any other node.
pub fn window_of(graph: &Graph, shapes: &[Shape], node: usize) -> Option<Window> {
    let Op::Conv2d { weight, stride, padding, dilation, .. } = graph.nodes[node].op else { return None };
    let [_, channels, kh, kw] = *graph.tensors[weight].as_slice() else { return None };
    let (from, to) = (shapes.get(*graph.nodes[node].inputs.first()?)?, shapes.get(node)?);
    Some(Window {
        channels,
        input: [*from.get(2)?, *from.get(3)?],
        output: [*to.get(2)?, *to.get(3)?],
        kernel: [kh, kw],
        stride,
        padding,
        dilation,
    })
}

/// Input rows and columns of each output row and column of an average pool, and each output's divisor.
pub fn spans(op: &Op, size: Pair, output: Pair) -> ([Vec<Range<usize>>; 2], Vec<f32>) {
    let mut spans: [Vec<Range<usize>>; 2] = [Vec::new(), Vec::new()];
    // Lengths that count: those of the windows, or of their part inside the padded input.
    let mut lengths: [Vec<usize>; 2] = [Vec::new(), Vec::new()];
    for axis in 0..2 {
        for o in 0..output[axis] {
            let (span, length) = match op {
                Op::AvgPool2d { kernel, stride, padding, count_include_pad, .. } => {
                    let start = o * stride[axis];
                    let end = (start + kernel[axis]).min(size[axis] + 2 * padding[axis]);
                    let inside = start.saturating_sub(padding[axis])..end.saturating_sub(padding[axis]).min(size[axis]);
                    let length = if *count_include_pad { end - start } else { inside.len() };
                    (inside, length)
                }
                // floor(o H / n) to ceil((o + 1) H / n), as PyTorch.
                _ => {
                    let span = o * size[axis] / output[axis]..((o + 1) * size[axis]).div_ceil(output[axis]);
                    (span.clone(), span.len())
                }
            };
            spans[axis].push(span);
            lengths[axis].push(length);
        }
    }
    let fixed = match op {
        Op::AvgPool2d { divisor, .. } => *divisor,
        _ => None,
    };
    let divisor = |h: usize, w: usize| fixed.unwrap_or(h * w) as f32;
    let divisors = lengths[0].iter().flat_map(|&h| lengths[1].iter().map(move |&w| divisor(h, w))).collect();
    (spans, divisors)
}

/// For `mean(dims)` over a value of this shape (batch included): the output element of each input element, and how many
/// input elements an output element has.
pub fn mean_targets(shape: &[usize], dims: &[i64]) -> (Vec<usize>, usize) {
    let rank = shape.len() as i64;
    let averaged = |axis: usize| dims.iter().any(|&d| (d + rank) % rank == axis as i64);
    let mut targets = vec![0];
    let mut count = 1;
    for (axis, &size) in shape.iter().enumerate().skip(1) {
        let grows = !averaged(axis);
        if !grows {
            count *= size;
        }
        targets = targets.iter().flat_map(|&t| (0..size).map(move |i| if grows { t * size + i } else { t })).collect();
    }
    (targets, count)
}

/// The element of `shape` that each element of `out` reads, both without the batch; `None` where they are the same.
pub fn broadcast_map(shape: &[usize], out: &[usize]) -> Option<Vec<usize>> {
    if shape == out {
        return None;
    }
    let mut map = vec![0];
    for (&size, &of) in shape.iter().zip(out) {
        map = map.iter().flat_map(|&m| (0..of).map(move |i| m * size + if size == 1 { 0 } else { i })).collect();
    }
    Some(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_per_channel_reads_one_element_per_plane() {
        assert_eq!(broadcast_map(&[2, 1, 1], &[2, 1, 3]), Some(vec![0, 0, 0, 1, 1, 1]));
        assert_eq!(broadcast_map(&[2, 3], &[2, 3]), None);
    }

    #[test]
    fn mean_over_the_plane() {
        assert_eq!(mean_targets(&[9, 2, 1, 3], &[-1, 2]), (vec![0, 0, 0, 1, 1, 1], 3));
        assert_eq!(mean_targets(&[9, 2, 2], &[1]), (vec![0, 1, 0, 1], 2));
    }

    #[test]
    fn adaptive_windows_overlap_where_sizes_do_not_divide() {
        let (spans, divisors) = spans(&Op::AdaptiveAvgPool2d { output: [None, Some(2)] }, [1, 3], [1, 2]);
        assert_eq!((spans[1].clone(), divisors), (vec![0..2, 1..3], vec![2.0, 2.0]));
    }
}
