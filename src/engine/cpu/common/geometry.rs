//! Which inputs an output of a convolution or of a pool sees.

use crate::model::{Graph, Op, Pair, Shape};

/// The window of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub channels: usize,
    pub out_channels: usize,
    pub groups: usize,
    pub kernel: Pair,
    pub stride: Pair,
    /// Above and to the left; what is below and to the right follows from the output's size.
    pub padding: Pair,
    pub dilation: Pair,
    pub input: Pair,
    pub output: Pair,
}

impl Window {
    /// `None` for a node that is no convolution.
    pub fn of(graph: &Graph, shapes: &[Shape], node: usize) -> Option<Self> {
        let Op::Conv2d { weight, stride, padding, dilation, groups, .. } = graph.nodes[node].op else { return None };
        let [out_channels, group_channels, kh, kw] = *graph.tensors[weight].as_slice() else { return None };
        let (from, to) = (shapes.get(*graph.nodes[node].inputs.first()?)?, shapes.get(node)?);
        Some(Self {
            channels: group_channels * groups,
            out_channels,
            groups,
            kernel: [kh, kw],
            stride,
            padding,
            dilation,
            input: [*from.get(2)?, *from.get(3)?],
            output: [*to.get(2)?, *to.get(3)?],
        })
    }

    /// Input channels of a group.
    pub fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    /// Products per output.
    pub fn depth(&self) -> usize {
        self.group_channels() * self.kernel[0] * self.kernel[1]
    }

    /// Outputs per channel.
    pub fn pixels(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// Whether every output sees the one input in its place.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.padding == [0, 0]
    }
}

/// The inputs that one output of a pool sees along one side, clipped to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    pub step: usize,
    /// What a mean divides by along this side.
    pub count: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reduce {
    Max,
    /// `None`: divide by the spans' counts.
    Mean(Option<usize>),
}

/// Windows of a pool on images of `input` size with results of `output` size; `None` for any other operation.
pub fn pool(op: &Op, input: Pair, output: Pair) -> Option<([Vec<Span>; 2], Reduce)> {
    let sides = |span: &dyn Fn(usize, usize) -> Span| [0, 1].map(|i| (0..output[i]).map(|o| span(i, o)).collect());
    Some(match op {
        Op::MaxPool2d { kernel, stride, padding, dilation, .. } => {
            let span = |i: usize, o: usize| max_span(o * stride[i], kernel[i], padding[i], dilation[i], input[i]);
            (sides(&span), Reduce::Max)
        }
        Op::AvgPool2d { kernel, stride, padding, count_include_pad, divisor, .. } => {
            let span = |i: usize, o: usize| {
                // As in PyTorch: a window counts its padding, but not what `ceil_mode` adds beyond it.
                let end = (o * stride[i] + kernel[i]).min(input[i] + 2 * padding[i]);
                let (start, stop) = ((o * stride[i]).max(padding[i]), end.min(input[i] + padding[i]));
                let count = if *count_include_pad { end - o * stride[i] } else { stop.saturating_sub(start) };
                Span { start: start - padding[i], end: stop.saturating_sub(padding[i]), step: 1, count }
            };
            (sides(&span), Reduce::Mean(*divisor))
        }
        Op::AdaptiveAvgPool2d { .. } | Op::Mean { .. } => {
            // floor(o H / n) to ceil((o + 1) H / n), as PyTorch.
            let span = |i: usize, o: usize| {
                let (start, end) = (o * input[i] / output[i], ((o + 1) * input[i]).div_ceil(output[i]));
                Span { start, end, step: 1, count: end - start }
            };
            (sides(&span), Reduce::Mean(None))
        }
        _ => return None,
    })
}

/// The span of a max-pool's window that begins at `start` of the padded side.
pub fn max_span(start: usize, kernel: usize, padding: usize, step: usize, size: usize) -> Span {
    let skipped = padding.saturating_sub(start).div_ceil(step);
    let end = (start + (kernel - 1) * step + 1).min(size + padding).saturating_sub(padding);
    Span { start: start + skipped * step - padding, end, step, count: kernel }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_clipped_to_the_image() {
        // Size 5, kernel 3, stride 2, padding 1: windows start at -1, 1, 3.
        let spans: Vec<_> = (0..3).map(|o| max_span(2 * o, 3, 1, 1, 5)).map(|s| (s.start, s.end)).collect();
        assert_eq!(spans, [(0, 2), (1, 4), (3, 5)]);
        // Dilation 2 from -1: the taps are -1, 1, 3.
        let span = max_span(0, 3, 1, 2, 5);
        assert_eq!((span.start, span.end, span.step), (1, 4, 2));
    }

    #[test]
    fn adaptive_windows_overlap_where_sizes_do_not_divide() {
        let (spans, reduce) = pool(&Op::AdaptiveAvgPool2d { output: [None, Some(2)] }, [1, 3], [1, 2]).unwrap();
        let columns: Vec<_> = spans[1].iter().map(|s| (s.start..s.end, s.count)).collect();
        assert_eq!((columns, reduce), (vec![(0..2, 2), (1..3, 2)], Reduce::Mean(None)));
    }
}
