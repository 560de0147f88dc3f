//! Networks in bfloat16.

use super::*;

/// Nearer to the definition than the roundings of `layers` layers explain, each of two factors by up to 2^-9; nearly the
/// same on every instruction set, where a number between two of bfloat16 may fall on either side.
fn check(mut m: Model, shape: &[usize], layers: i32, methods: &[&str]) {
    let input = m.numbers.many(shape.iter().product(), 1.0);
    let expected = reference::run(&m.graph, &m.tensors, &input, shape);
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        for workers in [1, 3] {
            let options = Options { workers, exact: false, isa };
            let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options, None).unwrap();
            network.in_bf16(shape).unwrap();
            let mut got = vec![f32::NAN; expected.len()];
            network.run(shape, &input, &mut got).unwrap();
            let apart = |other: &dyn Fn(usize) -> f64| -> f64 {
                got.iter().enumerate().map(|(i, &g)| (f64::from(g) - other(i)).powi(2)).sum::<f64>().sqrt()
            };
            let error = apart(&|i| expected[i]);
            assert!(error <= 2.0 * f64::from(layers) * 2f64.powi(-9) * norm, "{isa:?}: {error} of {norm}");
            assert!(error > 0.1 * 2f64.powi(-9) * norm, "{isa:?}: {error} of {norm} is float32");
            let before = first.get_or_insert_with(|| got.clone());
            let between = apart(&|i| f64::from(before[i]));
            assert!(between <= 2f64.powi(-9) * norm, "{isa:?} workers={workers}: {between} of {norm}");
            // Images do not see each other.
            let mut alone = vec![f32::NAN; got.len() / shape[0]];
            let last = &input[input.len() - input.len() / shape[0]..];
            network.run(&[&[1], &shape[1..]].concat(), last, &mut alone).unwrap();
            assert_eq!(alone, got[got.len() - alone.len()..]);
            let used: Vec<_> = network.timings().unwrap().iter().map(|t| t.method).collect();
            for method in methods {
                assert!(used.contains(method), "{method} is not among {used:?}");
            }
        }
    }
}

#[test]
fn convolutions() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 24], [3, 3], |_| {});
    let mut x = m.act(x, Activation::Relu);
    // Channels that fill no block; a shortcut of floats, then one of bfloat16.
    for (inp, out, stride) in [(24, 74, 2), (74, 74, 1), (74, 74, 1)] {
        let y = m.conv(x, [inp, 36], [1, 1], |_| {});
        let y = m.norm(y, 36);
        let y = m.act(y, Activation::Relu);
        let y = m.conv(y, [36, 40], [3, 3], |op| set(op, [stride; 2], [1, 1], [1, 1], 1));
        let y = m.act(y, Activation::Hardswish);
        let y = m.conv(y, [40, out], [1, 1], |_| {});
        if stride == 2 {
            x = m.conv(x, [inp, out], [1, 1], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
        }
        x = m.op(Op::Add { inplace: false }, &[y, x]);
        x = m.act(x, Activation::Relu);
    }
    let x = m.op(Op::AdaptiveAvgPool2d { output: [Some(1), Some(1)] }, &[x]);
    let x = m.op(Op::Flatten { start: 1, end: -1 }, &[x]);
    let (weight, bias) = (m.tensor(&[33, 74], 0.2), Some(m.tensor(&[33], 0.1)));
    m.op(Op::Linear { weight, bias }, &[x]);
    check(m, &[3, 3, 36, 30], 8, &["bf16", "round", "winograd 6", "direct"]);
}

#[test]
fn expanded() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 20], [3, 3], |_| {});
    let x = m.act(x, Activation::Silu);
    let y = m.conv(x, [20, 56], [1, 1], |_| {});
    let y = m.act(y, Activation::Hardswish);
    let y = m.conv(y, [56, 56], [5, 5], |op| set(op, [1, 1], [2, 2], [1, 1], 56));
    let y = m.act(y, Activation::Silu);
    let y = m.conv(y, [56, 20], [1, 1], |_| {});
    let x = m.op(Op::Add { inplace: false }, &[y, x]);
    m.conv(x, [20, 17], [1, 1], |_| {});
    check(m, &[2, 3, 14, 18], 3, &["bf16", "bf16 + depthwise", "round"]);
}

#[test]
fn vision_transformers() {
    for (channels, heads, size) in [(64, 2, [8, 6]), (48, 3, [10, 14]), (80, 5, [6, 6]), (192, 3, [8, 18])] {
        let mut m = Model::new();
        let x = tokens::embedded(&mut m, channels, size, &[1]);
        let x = tokens::block(&mut m, x, channels, heads);
        let x = tokens::block(&mut m, x, channels, heads);
        layer_norm(&mut m, x, channels, true);
        check(m, &[3, 3, size[0], size[1]], 8, &["bf16", "direct", ""]);
    }
}

#[test]
fn networks_without_such_layers_are_refused() {
    for channels in [8, 17] {
        let mut m = Model::new();
        let x = m.conv(0, [3, channels], [1, 1], |_| {});
        m.conv(x, [channels, 16], [1, 1], |_| {});
        let options = Options { workers: 1, exact: false, isa: Isa::best() };
        let mut network = Frozen::new(m.graph, m.tensors, options, None).unwrap();
        assert!(network.in_bf16(&[1, 3, 4, 4]).is_err_and(|e| e.to_string().contains("an even number of 16 and more")));
    }
}
