//! Which kernel computes a convolution, and what that asks of its input.

use super::memory::Geometry;
use super::steps;
use crate::engine::cpu::common::geometry::Window;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::common::kernels::winograd::Size;
use crate::model::{Graph, Op, Pair, Shape};

/// The window of a convolution, with the zeros of a joined [`Op::Pad`], or of a linear layer as the convolution of one
/// pixel.
pub fn window(graph: &Graph, shapes: &[Shape], node: usize) -> Option<Window> {
    let side = |shape: &Shape| [shape.get(2).copied().unwrap_or(1), shape.get(3).copied().unwrap_or(1)];
    let input = *graph.nodes[node].inputs.first()?;
    if let Op::Linear { .. } = graph.nodes[node].op {
        return Some(Window {
            channels: shapes[input][1],
            out_channels: shapes[node][1],
            groups: 1,
            kernel: [1, 1],
            stride: [1, 1],
            padding: [0, 0],
            dilation: [1, 1],
            input: side(&shapes[input]),
            output: side(&shapes[node]),
        });
    }
    let mut window = Window::of(graph, shapes, node)?;
    if let Some((before, source)) = joined(graph, input) {
        window.padding = [0, 1].map(|i| window.padding[i] + before[i]);
        window.input = side(&shapes[source]);
    }
    Some(window)
}

/// Zeros above and to the left, and what they are put around, where the convolutions that read a padded image can do it:
/// their inputs have borders anyway.
pub fn joined(graph: &Graph, node: usize) -> Option<(Pair, usize)> {
    let Op::Pad { before, .. } = graph.nodes[node].op else { return None };
    let mut readers = graph.nodes.iter().filter(|reader| reader.inputs.contains(&node)).peekable();
    readers.peek()?;
    (graph.output != node && readers.all(|reader| matches!(reader.op, Op::Conv2d { .. })))
        .then(|| (before, graph.nodes[node].inputs[0]))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Winograd(Size),
    Depthwise,
    /// One group, or groups of whole blocks of channels.
    Direct,
    /// Groups of fewer channels.
    Grouped,
    /// No convolution.
    None,
}

/// Where sums must be those of the definition, without Winograd's transforms.
#[derive(Debug, Clone, Copy)]
pub enum Exact<'a> {
    Nowhere,
    Everywhere,
    /// At these nodes.
    At(&'a [bool]),
}

impl Exact<'_> {
    fn is_at(self, node: usize) -> bool {
        match self {
            Self::Nowhere => false,
            Self::Everywhere => true,
            Self::At(nodes) => nodes[node],
        }
    }
}

/// Below this many channels the transforms cost more than the products they save.
const LEAST_CHANNELS: usize = 32;

impl Method {
    pub fn of(graph: &Graph, shapes: &[Shape], node: usize, exact: Exact<'_>) -> Self {
        let Some(w) = window(graph, shapes, node) else { return Self::None };
        let plain = w.kernel == [3, 3] && w.stride == [1, 1] && w.dilation == [1, 1] && w.groups == 1;
        let wide = w.channels.min(w.out_channels) >= LEAST_CHANNELS && w.output[0].min(w.output[1]) >= 4;
        if plain && wide && !exact.is_at(node) && w.padding[0].max(w.padding[1]) <= 2 {
            return Self::Winograd(steps::best_size(w.output));
        }
        if w.groups > 1 && w.groups == w.channels && w.channels == w.out_channels {
            return Self::Depthwise;
        }
        let whole = |channels: usize| (channels / w.groups).is_multiple_of(LANES);
        if w.groups == 1 || whole(w.channels) && whole(w.out_channels) { Self::Direct } else { Self::Grouped }
    }

    /// Whether the kernel can pool 2 x 2 outputs.
    pub fn pools(self) -> bool {
        matches!(self, Self::Winograd(_))
    }

    /// Makes room around the input for everything the kernel reads.
    pub fn widen(self, w: &Window, input: &mut Geometry) {
        let tiles = match self {
            Self::Winograd(size) => Some((steps::tiles(size, w.output), size.outputs())),
            _ => None,
        };
        let mut after = [0; 2];
        for i in 0..2 {
            let end = match tiles {
                Some((tiles, outputs)) => tiles[i] * outputs + 2,
                None => (w.output[i] - 1) * w.stride[i] + (w.kernel[i] - 1) * w.dilation[i] + 1,
            };
            after[i] = end.saturating_sub(w.padding[i] + w.input[i]);
        }
        input.widen(w.padding, after);
    }
}
