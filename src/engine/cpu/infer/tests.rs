//! Whole networks against the definitions, on every instruction set this processor has.

mod attention;
mod bf16;
mod bytes;
mod images;
mod networks;
mod places;
mod tokens;
mod windows;

use networks::{Model, set};

use super::*;
use crate::model::{Activation, Dim, Node, Op, Pair};

#[test]
fn winograd_with_every_ending() {
    // 25 x 23: tiles reach over the edge; 150 channels: a large U, the last block half empty.
    for (inp, out, size, method) in [(32, 48, [25, 23], "winograd 6"), (150, 40, [14, 15], "winograd 4")] {
        for pool in [false, true] {
            let mut m = Model::new();
            let c = m.conv(0, [inp, out], [3, 3], |_| {});
            let n = m.norm(c, out);
            let r = m.act(n, Activation::Relu);
            if pool {
                m.max_pool(r, 2, 2, 0, false);
            }
            m.check(&[3, inp, size[0], size[1]], &[method]);
        }
    }
}

#[test]
fn winograd_padding_and_residual() {
    for padding in [0, 1, 2] {
        let mut m = Model::new();
        let a = m.conv(0, [3, 32], [3, 3], |_| {});
        let pad = |op: &mut Op| {
            if let Op::Conv2d { padding: p, .. } = op {
                *p = [padding, padding];
            }
        };
        let b = m.conv(a, [32, 64], [3, 3], pad);
        let n = m.norm(b, 64);
        let c = m.conv(a, [32, 64], [3, 3], pad);
        let s = m.op(Op::Add { inplace: false }, &[n, c]);
        let r = m.act(s, Activation::Relu);
        m.conv(r, [64, 33], [3, 3], |_| {});
        m.check(&[2, 3, 20, 23], &["winograd 6", "direct"]);
    }
}

#[test]
fn convolutions_of_every_kind() {
    type Case = (Pair, Pair, fn(&mut Op));
    let cases: &[Case] = &[
        ([3, 20], [7, 7], |op| set(op, [2, 2], [3, 3], [1, 1], 1)),
        ([1, 6], [5, 5], |op| set(op, [1, 1], [0, 0], [1, 1], 1)),
        ([3, 16], [3, 3], |op| set(op, [1, 2], [2, 1], [2, 2], 1)),
        ([40, 70], [1, 1], |op| set(op, [2, 2], [0, 0], [1, 1], 1)),
        ([64, 64], [3, 3], |op| set(op, [1, 1], [2, 2], [2, 2], 1)),
        ([48, 48], [5, 3], |op| set(op, [2, 1], [2, 1], [1, 1], 48)),
        ([64, 128], [3, 3], |op| set(op, [1, 1], [1, 1], [1, 1], 4)),
        ([32, 32], [3, 3], |op| set(op, [1, 1], [1, 1], [1, 1], 8)),
        ([24, 12], [3, 3], |op| set(op, [1, 1], [1, 1], [1, 1], 3)),
        ([6, 12], [3, 3], |op| set(op, [1, 1], [1, 1], [1, 1], 6)),
    ];
    for &(channels, kernel, change) in cases {
        let mut m = Model::new();
        let c = m.conv(0, channels, kernel, change);
        m.act(c, Activation::Hardswish);
        m.check(&[2, channels[0], 17, 31], &[]);
    }
}

#[test]
fn groups_of_few_channels() {
    // RegNet's of 8 and 24, ResNeXt's of 4, more outputs than inputs and fewer; blocks of channels that are not full.
    let cases = [
        ([48, 48], 6, 2),
        ([104, 104], 13, 1),
        ([72, 72], 3, 1),
        ([40, 40], 10, 2),
        ([20, 40], 5, 1),
        ([80, 20], 20, 1),
        ([21, 42], 21, 1),
        ([50, 50], 25, 1),
    ];
    for ([inp, out], groups, stride) in cases {
        let mut m = Model::new();
        let wide = m.conv(0, [3, inp], [1, 1], |_| {});
        let wide = m.act(wide, Activation::Sigmoid);
        let c = m.conv(wide, [inp, out], [3, 3], |op| set(op, [stride; 2], [1, 1], [1, 1], groups));
        let n = m.norm(c, out);
        let other = m.conv(0, [3, out], [1, 1], |op| set(op, [stride; 2], [0, 0], [1, 1], 1));
        let sum = m.op(Op::Add { inplace: false }, &[n, other]);
        m.act(sum, Activation::Relu);
        m.check(&[3, 3, 15, 18], &["grouped"]);
    }
}

#[test]
fn small_groups_with_windows_of_every_kind() {
    let cases: &[(Pair, fn(&mut Op))] = &[
        ([3, 3], |op| set(op, [1, 1], [0, 2], [1, 1], 5)),
        ([5, 3], |op| set(op, [1, 2], [2, 1], [1, 1], 5)),
        ([1, 1], |op| set(op, [2, 2], [0, 0], [1, 1], 5)),
        ([3, 3], |op| set(op, [1, 1], [2, 2], [2, 2], 5)),
        ([2, 4], |op| set(op, [3, 3], [1, 3], [1, 1], 5)),
    ];
    for &(kernel, change) in cases {
        for size in [[12, 17], [5, 4]] {
            let mut m = Model::new();
            let x = m.conv(0, [3, 40], [1, 1], |_| {});
            let x = m.conv(x, [40, 40], kernel, change);
            m.act(x, Activation::Silu);
            m.check(&[2, 3, size[0], size[1]], &["grouped"]);
        }
    }
}

/// A convolution from `inp` to `wide` channels, a depthwise one on its result, and one behind it.
fn expanded(m: &mut Model, from: usize, [inp, wide]: Pair, kernel: Pair, change: impl Fn(&mut Op)) -> [usize; 2] {
    let a = m.conv(from, [inp, wide], [1, 1], |_| {});
    let n = m.norm(a, wide);
    let r = m.act(n, Activation::Relu6);
    [r, m.conv(r, [wide, wide], kernel, change)]
}

#[test]
fn a_depthwise_convolution_takes_in_the_one_before() {
    type Case = (Pair, Pair, Pair, fn(&mut Op));
    // Blocks that are not full on either side; rows narrower than a microkernel, and no multiple of it; images high enough
    // for strips; windows that reach beyond the image by more than the image.
    let cases: &[Case] = &[
        ([20, 72], [3, 3], [33, 31], |op| set(op, [1, 1], [1, 1], [1, 1], 72)),
        ([24, 40], [3, 3], [32, 18], |op| set(op, [2, 2], [1, 1], [1, 1], 40)),
        ([16, 48], [5, 5], [19, 14], |op| set(op, [1, 1], [2, 2], [1, 1], 48)),
        ([33, 17], [5, 5], [40, 9], |op| set(op, [2, 2], [0, 0], [1, 1], 17)),
        ([16, 32], [7, 7], [4, 5], |op| set(op, [1, 1], [6, 6], [1, 1], 32)),
        ([16, 32], [3, 5], [21, 12], |op| set(op, [3, 1], [4, 2], [2, 1], 32)),
        ([16, 32], [2, 3], [26, 23], |op| set(op, [1, 2], [0, 4], [3, 3], 32)),
    ];
    for &([inp, wide], kernel, [height, width], change) in cases {
        for function in [Activation::Hardswish, Activation::Silu] {
            let mut m = Model::new();
            let [_, x] = expanded(&mut m, 0, [inp, wide], kernel, change);
            let x = m.act(x, function);
            m.conv(x, [wide, 5], [1, 1], |_| {});
            m.check(&[3, inp, height, width], &["direct + depthwise", "direct"]);
        }
    }
}

#[test]
fn a_convolution_with_other_readers_keeps_its_result() {
    let depthwise = |op: &mut Op| set(op, [1, 1], [1, 1], [1, 1], 48);
    // Read by an addition behind the depthwise convolution, by a second one, and by the caller; and an addition before.
    for case in 0..4 {
        let mut m = Model::new();
        let stem = m.conv(0, [3, 24], [3, 3], |op| set(op, [2, 2], [1, 1], [1, 1], 1));
        let [wide, x] = expanded(&mut m, stem, [24, 48], [3, 3], depthwise);
        match case {
            0 => m.op(Op::Add { inplace: false }, &[x, wide]),
            1 => {
                let y = m.conv(wide, [48, 48], [3, 3], depthwise);
                m.op(Op::Add { inplace: false }, &[x, y])
            }
            2 => m.op(Op::Cat { dim: 1 }, &[x, wide]),
            _ => {
                let a = m.conv(stem, [24, 48], [1, 1], |_| {});
                let b = m.conv(stem, [24, 48], [1, 1], |_| {});
                let sum = m.op(Op::Add { inplace: false }, &[a, b]);
                let y = m.conv(sum, [48, 48], [3, 3], depthwise);
                m.op(Op::Add { inplace: false }, &[y, x])
            }
        };
        m.check(&[2, 3, 19, 30], &["depthwise", "direct"]);
    }
}

#[test]
fn a_network_with_everything_else() {
    let mut m = Model::new();
    let stem = m.conv(0, [3, 24], [3, 3], |op| set(op, [2, 2], [1, 1], [1, 1], 1));
    let n = m.norm(stem, 24);
    let x = m.act(n, Activation::Silu);
    // Squeeze and excitation.
    let s = m.op(Op::AdaptiveAvgPool2d { output: [Some(1), Some(1)] }, &[x]);
    let s = m.conv(s, [24, 6], [1, 1], |_| {});
    let s = m.act(s, Activation::Relu);
    let s = m.conv(s, [6, 24], [1, 1], |_| {});
    let s = m.act(s, Activation::Sigmoid);
    let x = m.op(Op::Mul, &[x, s]);
    let a = m.max_pool(x, 3, 2, 1, true);
    let op = Op::AvgPool2d {
        kernel: [3, 3],
        stride: [2, 2],
        padding: [1, 1],
        ceil_mode: true,
        count_include_pad: true,
        divisor: None,
    };
    let b = m.op(op, &[x]);
    let x = m.op(Op::Cat { dim: 1 }, &[a, b, a]);
    let x = m.norm(x, 72);
    let x = m.act(x, Activation::LeakyRelu { negative_slope: 0.1 });
    let x = m.op(Op::Dropout { p: 0.5, training: false, channels: false, inplace: false }, &[x]);
    let x = m.op(Op::Add { inplace: false }, &[x, x]);
    let x = m.op(Op::AdaptiveAvgPool2d { output: [Some(3), Some(2)] }, &[x]);
    let x = m.op(Op::Flatten { start: 1, end: -1 }, &[x]);
    let (weight, bias) = (m.tensor(&[10, 432], 0.05), m.tensor(&[10], 0.1));
    let x = m.op(Op::Linear { weight, bias: Some(bias) }, &[x]);
    m.op(Op::Softmax { dim: 1, log: true }, &[x]);
    m.check(&[5, 3, 30, 27], &["direct"]);
}

fn permute<const RANK: usize>(m: &mut Model, from: usize, dims: [usize; RANK]) -> usize {
    m.op(Op::Permute { dims: dims.to_vec() }, &[from])
}

fn layer_norm(m: &mut Model, from: usize, channels: usize, weighted: bool) -> usize {
    let [weight, bias] = [(); 2].map(|()| weighted.then(|| m.tensor(&[channels], 1.0)));
    m.op(Op::LayerNorm { shape: vec![channels], weight, bias, eps: 1e-6 }, &[from])
}

fn linear(m: &mut Model, from: usize, [inp, out]: Pair) -> usize {
    let (weight, bias) = (m.tensor(&[out, inp], (3.0 / inp as f32).sqrt()), Some(m.tensor(&[out], 0.5)));
    m.op(Op::Linear { weight, bias }, &[from])
}

#[test]
fn permuted_images() {
    // ConvNeXt's block with odd sizes: 37 channels end in the middle of a block.
    let mut m = Model::new();
    let stem = m.conv(0, [3, 37], [4, 4], |op| set(op, [4, 4], [0, 0], [1, 1], 1));
    let last = permute(&mut m, stem, [0, 2, 3, 1]);
    let last = layer_norm(&mut m, last, 37, true);
    let x = permute(&mut m, last, [0, 3, 1, 2]);
    let y = m.conv(x, [37, 37], [7, 7], |op| set(op, [1, 1], [3, 3], [1, 1], 37));
    let y = permute(&mut m, y, [0, 2, 3, 1]);
    let y = layer_norm(&mut m, y, 37, false);
    let y = linear(&mut m, y, [37, 75]);
    let y = m.act(y, Activation::Gelu { tanh: false });
    let y = linear(&mut m, y, [75, 37]);
    let y = permute(&mut m, y, [0, 3, 1, 2]);
    let factor = m.tensor(&[37, 1, 1], 1.0);
    let y = m.op(Op::Scale { factor, first: true }, &[y]);
    let y = m.op(Op::Add { inplace: true }, &[y, x]);
    // On its own behind an activation, the other way round, and softmax, mean and cat along permuted dimensions.
    let z = m.act(y, Activation::Sigmoid);
    let z = permute(&mut m, z, [0, 2, 3, 1]);
    let factor = m.tensor(&[37], 1.0);
    let z = m.op(Op::Scale { factor, first: false }, &[z]);
    let factor = m.tensor(&[1], 1.0);
    let z = m.op(Op::Scale { factor, first: false }, &[z]);
    let z = m.op(Op::Cat { dim: -1 }, &[z, z]);
    let z = m.op(Op::Mean { dims: vec![1, 2], keepdim: false }, &[z]);
    let z = layer_norm(&mut m, z, 74, true);
    linear(&mut m, z, [74, 5]);
    m.check(&[3, 3, 30, 41], &["depthwise", "direct"]);
}

#[test]
fn layer_norm_where_the_mean_is_large_and_lanes_are_spare() {
    // Sigmoid makes 0.5 of the zeros in the lanes beyond the last channel.
    for channels in [1, 15, 16, 17, 50] {
        let mut m = Model::new();
        let x = m.conv(0, [3, channels], [1, 1], |_| {});
        let x = m.act(x, Activation::Sigmoid);
        let x = permute(&mut m, x, [0, 2, 3, 1]);
        let x = layer_norm(&mut m, x, channels, true);
        permute(&mut m, x, [0, 3, 1, 2]);
        m.check(&[2, 3, 5, 7], &[]);
    }
}

#[test]
fn padding_of_every_kind() {
    let pads: &[[Pair; 2]] = &[[[0, 0], [1, 1]], [[1, 0], [2, 3]], [[3, 2], [0, 1]], [[0, 0], [0, 0]]];
    for &[before, after] in pads {
        let pad = Op::Pad { before, after };
        let mut m = Model::new();
        // Into a colour convolution, Winograd's, a depthwise and two readers; as a step before a pool and at the end.
        let x = m.op(pad.clone(), &[0]);
        let x = m.conv(x, [3, 32], [3, 3], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
        let x = m.op(pad.clone(), &[x]);
        let x = m.conv(x, [32, 48], [3, 3], |op| set(op, [1, 1], [1, 1], [1, 1], 1));
        let x = m.op(pad.clone(), &[x]);
        let a = m.conv(x, [48, 48], [5, 5], |op| set(op, [2, 2], [0, 0], [1, 1], 48));
        let b = m.conv(x, [48, 48], [5, 5], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
        let x = m.op(Op::Add { inplace: false }, &[a, b]);
        let x = m.op(pad.clone(), &[x]);
        let x = m.max_pool(x, 2, 1, 0, false);
        let x = m.op(Op::Mul, &[x, x]);
        m.op(pad, &[x]);
        // Winograd's kernel takes at most two rows of zeros, its own included.
        let second = if before[0] > 1 { "direct" } else { "winograd 6" };
        m.check(&[3, 3, 37, 32], &["direct", second, "depthwise"]);
    }
}

#[test]
fn a_nan_does_not_outlive_its_batch() {
    // The second of the three convolutions writes where the value before them was, eight spare lanes included, and Winograd's
    // algorithm reads those lanes.
    for kind in 0..3 {
        let mut m = Model::new();
        let x = match kind {
            0 => {
                let halves = [m.conv(0, [3, 20], [1, 1], |_| {}), m.conv(0, [3, 20], [1, 1], |_| {})];
                m.op(Op::Cat { dim: 1 }, &halves)
            }
            1 => {
                let x = m.conv(0, [3, 40], [1, 1], |_| {});
                m.op(Op::Softmax { dim: 1, log: false }, &[x])
            }
            _ => {
                let x = m.conv(0, [3, 60], [1, 1], |_| {});
                let dims = vec![Dim::Infer, Dim::Fixed(40), Dim::Fixed(12), Dim::Fixed(15)];
                m.op(Op::Reshape { dims }, &[x])
            }
        };
        let x = m.conv(x, [40, 40], [3, 3], |_| {});
        let x = m.conv(x, [40, 40], [3, 3], |_| {});
        m.conv(x, [40, 40], [3, 3], |_| {});
        let shape = [2, 3, 12, 10];
        let input = m.numbers.many(shape.iter().product(), 1.0);
        for isa in Isa::available() {
            let mut run = m.runner(isa, &shape);
            let before = run(&input);
            assert!(run(&vec![f32::NAN; input.len()]).iter().all(|y| y.is_nan()));
            assert_eq!(run(&input), before, "{isa:?} {kind}");
        }
    }
}

#[test]
fn swish_by_its_definition() {
    for swapped in [false, true] {
        let mut m = Model::new();
        let x = m.conv(0, [3, 20], [3, 3], |_| {});
        let sigmoid = Op::Activation { function: Activation::Sigmoid, inplace: false };
        let gate = m.op(sigmoid, &[x]);
        let operands = if swapped { [gate, x] } else { [x, gate] };
        let x = m.op(Op::Mul, &operands);
        m.conv(x, [20, 20], [1, 1], |_| {});
        let steps = {
            let canonical = canonical(&m.graph, model::shapes(&m.graph, &[1, 3, 9, 9]).unwrap()).unwrap();
            let tensors: Vec<_> = m.tensors.iter().map(|t| Some(t.as_slice())).collect();
            fuse::fuse(&canonical.graph, &canonical.shapes, &tensors, Exact::Nowhere).unwrap().0.len()
        };
        assert_eq!(steps, 3, "the input and two convolutions");
        m.check(&[2, 3, 9, 9], &["direct"]);
    }
}

#[test]
fn segments_and_groups_of_images() {
    // Values from 4 MiB down to a few pixels: several segments, and the residual crosses one of them.
    let mut m = Model::new();
    let a = m.conv(0, [3, 64], [3, 3], |_| {});
    let a = m.max_pool(a, 4, 4, 0, false);
    let b = m.conv(a, [64, 32], [3, 3], |_| {});
    let b = m.max_pool(b, 4, 4, 0, false);
    let c = m.max_pool(a, 4, 4, 0, false);
    let b = m.conv(b, [32, 64], [3, 3], |_| {});
    let x = m.op(Op::Add { inplace: false }, &[b, c]);
    let x = m.conv(x, [64, 64], [3, 3], |_| {});
    m.op(Op::Mean { dims: vec![2, 3], keepdim: false }, &[x]);
    m.check(&[7, 3, 144, 146], &["winograd 6"]);
}

#[test]
fn what_is_not_computed_is_named() {
    let mut m = Model::new();
    let c = m.conv(0, [3, 8], [3, 3], |_| {});
    m.op(Op::Softmax { dim: 3, log: false }, &[c]);
    let reason = obstacle(&m.graph, &m.tensors, &[1, 3, 8, 8]).unwrap();
    assert_eq!(reason, "Softmax2 (Softmax): runs along another dimension than the channels");
    let obstacle_of = |make: &dyn Fn(&mut Model) -> usize| {
        let mut m = Model::new();
        make(&mut m);
        obstacle(&m.graph, &m.tensors, &[2, 8, 8, 8]).unwrap()
    };
    let last = |m: &mut Model| permute(m, 0, [0, 3, 1, 2]);
    assert_eq!(obstacle_of(&last), "Permute1 (Permute): returns permuted dimensions");
    let batch = |m: &mut Model| permute(m, 0, [1, 0, 2, 3]);
    assert_eq!(obstacle_of(&batch), "Permute1 (Permute): moves the dimension of the batch");
    let width = |m: &mut Model| linear(m, 0, [8, 8]);
    assert_eq!(obstacle_of(&width), "Linear1 (Linear): is applied to another dimension than the channels");
    let norm = |m: &mut Model| layer_norm(m, 0, 8, false);
    assert_eq!(obstacle_of(&norm), "LayerNorm1 (LayerNorm): normalises other dimensions than the channels");
    let conv = |m: &mut Model| {
        let x = permute(m, 0, [0, 2, 3, 1]);
        m.conv(x, [8, 8], [3, 3], |_| {})
    };
    assert_eq!(obstacle_of(&conv), "Conv2d2 (Conv2d): reads permuted dimensions");
    let mixed = |m: &mut Model| {
        let x = permute(m, 0, [0, 2, 3, 1]);
        m.op(Op::Add { inplace: false }, &[x, 0])
    };
    let flat = |m: &mut Model| {
        let x = permute(m, 0, [0, 2, 3, 1]);
        m.op(Op::Flatten { start: 1, end: -1 }, &[x])
    };
    assert_eq!(obstacle_of(&flat), "Flatten2 (Flatten): reads permuted dimensions");
    let reason = "Add2 (Add): combines values whose dimensions are in different orders";
    assert_eq!(obstacle_of(&mixed), reason);
    let plane = |m: &mut Model| {
        let factor = m.tensor(&[8, 8], 1.0);
        m.op(Op::Scale { factor, first: false }, &[0])
    };
    assert_eq!(obstacle_of(&plane), "Scale1 (Scale): multiplies by more than one factor per channel");
    let inplace = |m: &mut Model| {
        let x = m.conv(0, [8, 8], [3, 3], |_| {});
        let y = m.act(x, Activation::Relu);
        m.op(Op::Add { inplace: false }, &[y, x])
    };
    assert_eq!(obstacle_of(&inplace), "ReLU2 (ReLU): overwrites a value that other layers read");
    assert_eq!(
        obstacle(&m.graph, &m.tensors, &[1, 4, 8, 8]).unwrap(),
        "Conv2d1 (Conv2d): expects 3 input channels, got 4"
    );
}
