//! Networks in int8.

use super::*;

fn seen(m: &Model, shape: &[usize], input: &[f32], options: Options) -> Vec<(usize, f32, f32)> {
    let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options, None).unwrap();
    network.look(shape, input).unwrap();
    network.ranges()
}

/// Cosine to the definition, and the methods used.
fn check(mut m: Model, shape: &[usize], least: f64, methods: &[&str]) {
    let input = m.numbers.many(shape.iter().product(), 1.0);
    let expected = reference::run(&m.graph, &m.tensors, &input, shape);
    let options = |isa, workers| Options { workers, exact: false, isa };
    let ranges = seen(&m, shape, &input, options(Isa::best(), 2));
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        for workers in [1, 3] {
            let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options(isa, workers), None).unwrap();
            network.quantize(shape, &ranges).unwrap();
            for images in [shape[0], shape[0].div_ceil(2), shape[0]] {
                let part = [&[images], &shape[1..]].concat();
                let mut got = vec![f32::NAN; network.output(&part).unwrap().iter().product()];
                network.run(&part, &input[..part.iter().product()], &mut got).unwrap();
                let expected = &expected[..got.len()];
                let dot = |a: &dyn Fn(usize) -> f64, b: &dyn Fn(usize) -> f64| -> f64 {
                    (0..got.len()).map(|i| a(i) * b(i)).sum()
                };
                let (e, g) = (|i: usize| expected[i], |i: usize| f64::from(got[i]));
                let cosine = dot(&e, &g) / (dot(&e, &e) * dot(&g, &g)).sqrt();
                assert!(cosine > least, "{isa:?} workers={workers} images={images}: {cosine}");
                if images == shape[0] {
                    let before = first.get_or_insert_with(|| got.clone());
                    // The first layer is in float32: a value on the edge between two bytes may fall on either side.
                    let norm = before.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let apart = before.iter().zip(&got).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                    assert!(apart <= 0.01 * norm, "{isa:?} workers={workers}: {apart} of {norm}");
                }
            }
            let used: Vec<_> = network.timings().unwrap().iter().map(|t| t.method).collect();
            for method in methods {
                assert!(used.contains(method), "{method} is not among {used:?}");
            }
        }
    }
}

#[test]
fn residual_blocks() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 24], [3, 3], |_| {});
    let x = m.act(x, Activation::Relu);
    let x = m.max_pool(x, 3, 2, 1, false);
    let mut x = x;
    // Channels that fill no block; a shortcut of floats, then one of bytes.
    for (inp, out, stride) in [(24, 72, 2), (72, 72, 1), (72, 72, 1)] {
        let y = m.conv(x, [inp, 20], [1, 1], |_| {});
        let y = m.norm(y, 20);
        let y = m.act(y, Activation::Relu);
        let y = m.conv(y, [20, 40], [3, 3], |op| set(op, [stride; 2], [1, 1], [1, 1], 1));
        let y = m.act(y, Activation::Relu);
        let y = m.conv(y, [40, out], [1, 1], |_| {});
        let y = m.norm(y, out);
        if stride == 2 {
            x = m.conv(x, [inp, out], [1, 1], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
        }
        x = m.op(Op::Add { inplace: false }, &[y, x]);
        x = m.act(x, Activation::Relu);
    }
    let x = m.op(Op::AdaptiveAvgPool2d { output: [Some(1), Some(1)] }, &[x]);
    let x = m.op(Op::Flatten { start: 1, end: -1 }, &[x]);
    let (weight, bias) = (m.tensor(&[33, 72], 0.2), Some(m.tensor(&[33], 0.1)));
    m.op(Op::Linear { weight, bias }, &[x]);
    check(m, &[3, 3, 36, 30], 0.999, &["int8", "quantize"]);
}

#[test]
fn expanded_and_curved() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 20], [3, 3], |_| {});
    let x = m.act(x, Activation::Silu);
    // Values below 0 too: their zero is not the smallest byte.
    let y = m.conv(x, [20, 56], [1, 1], |_| {});
    let y = m.act(y, Activation::Hardswish);
    let y = m.conv(y, [56, 56], [5, 5], |op| set(op, [1, 1], [2, 2], [1, 1], 56));
    let y = m.act(y, Activation::Silu);
    let y = m.conv(y, [56, 20], [1, 1], |_| {});
    let x = m.op(Op::Add { inplace: false }, &[y, x]);
    // Zeros around values below 0: stays in float32.
    let x = m.conv(x, [20, 40], [3, 3], |_| {});
    let x = m.act(x, Activation::Gelu { tanh: false });
    m.conv(x, [40, 17], [1, 1], |_| {});
    check(m, &[2, 3, 14, 18], 0.999, &["int8", "int8 + depthwise", "quantize", "direct"]);
}

/// The last image alone shows whether anything is mixed up between images and tokens.
#[test]
fn vision_transformers() {
    // One block of bytes, a part of one and more than one; heads that share a block.
    for (channels, heads, size) in [(64, 2, [8, 6]), (48, 3, [10, 14]), (80, 5, [6, 6]), (192, 3, [8, 18])] {
        let mut m = Model::new();
        let x = tokens::embedded(&mut m, channels, size, &[1]);
        let x = tokens::block(&mut m, x, channels, heads);
        let x = tokens::block(&mut m, x, channels, heads);
        layer_norm(&mut m, x, channels, true);
        check(m, &[3, 3, size[0], size[1]], 0.998, &["int8", "direct", ""]);
    }
}

/// Norms that are also added as they are, or have a few large channels.
#[test]
fn large_channels_of_layer_norms() {
    for is_added in [false, true] {
        let mut m = Model::new();
        let x = tokens::embedded(&mut m, 64, [8, 6], &[1]);
        let x = layer_norm(&mut m, x, 64, true);
        let norm = m.graph.tensors.len() - 2;
        let y = linear(&mut m, x, [64, 96]);
        let first = m.graph.tensors.len() - 2;
        let y = m.act(y, Activation::Gelu { tanh: false });
        let y = linear(&mut m, y, [96, 64]);
        if is_added {
            m.op(Op::Add { inplace: false }, &[y, x]);
        } else {
            for channel in [3, 40] {
                [norm, norm + 1].into_iter().for_each(|tensor| m.tensors[tensor][channel] *= 50.0);
                m.tensors[first].iter_mut().skip(channel).step_by(64).for_each(|weight| *weight /= 50.0);
            }
        }
        check(m, &[3, 3, 8, 6], 0.999, &["int8"]);
    }
}

#[test]
fn what_bytes_cannot_hold_is_refused() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 16], [1, 1], |_| {});
    m.conv(x, [16, 16], [1, 1], |_| {});
    let shape = [1, 3, 4, 4];
    let options = Options { workers: 1, exact: false, isa: Isa::best() };
    let mut input = m.numbers.many(48, 1.0);
    let ranges = seen(&m, &shape, &input, options);
    let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options, None).unwrap();
    network.quantize(&shape, &ranges).unwrap();
    let mut output = vec![0.0; 256];
    network.run(&shape, &input, &mut output).unwrap();
    input[5] = f32::NAN;
    assert!(network.run(&shape, &input, &mut output).is_err_and(|e| e.to_string().contains("NaN")));
    let bad = seen(&m, &shape, &input, options);
    assert!(network.quantize(&shape, &bad).is_err_and(|e| e.to_string().contains("Conv2d1 makes infinite or NaN")));
    let mut alone = Model::new();
    alone.conv(0, [3, 16], [1, 1], |_| {});
    let mut network = Frozen::new(alone.graph, alone.tensors, options, None).unwrap();
    assert!(network.look(&shape, &[0.0; 48]).is_err_and(|e| e.to_string().contains("no layer would compute in int8")));
}
