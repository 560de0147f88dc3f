//! Norms over images, repeated pixels, and sums with numbers.

use super::*;

/// Norms of images whose last block of channels is not full.
fn normed(norm: impl Fn(&mut Model, usize, usize) -> usize, ending: bool) {
    for (channels, size) in [(40, [9, 7]), (16, [1, 5]), (7, [13, 1]), (100, [2, 2])] {
        let mut m = Model::new();
        let x = m.conv(0, [3, channels], [3, 3], |_| {});
        let x = norm(&mut m, x, channels);
        if ending {
            let x = m.act(x, Activation::Silu);
            // Reads spare lanes, too.
            m.conv(x, [channels, 20], [3, 3], |_| {});
        }
        m.check(&[5, 3, size[0], size[1]], &[]);
    }
}

#[test]
fn group_norms_of_one_group() {
    for (affine, ending) in [(true, true), (true, false), (false, true)] {
        let norm = |m: &mut Model, x: usize, channels: usize| {
            let [weight, bias] = [(); 2].map(|()| affine.then(|| m.tensor(&[channels], 1.0)));
            m.op(Op::GroupNorm { groups: 1, weight, bias, eps: 1e-3 }, &[x])
        };
        normed(norm, ending);
    }
}

#[test]
fn group_norms_far_from_zero() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 24], [1, 1], |_| {});
    let summand = m.tensor(&[1], 0.0);
    m.tensors[summand] = vec![300.0];
    let x = m.op(Op::Shift { summand }, &[x]);
    m.op(Op::GroupNorm { groups: 1, weight: None, bias: None, eps: 1e-5 }, &[x]);
    let input = m.numbers.many(2 * 3 * 40 * 30, 1.0);
    let expected = reference::run(&m.graph, &m.tensors, &input, &[2, 3, 40, 30]);
    for isa in Isa::available() {
        let got = m.runner(isa, &[2, 3, 40, 30])(&input);
        // 300 has 2^-15 as its last digit, and the norm divides by less than 1.
        let largest = expected.iter().zip(&got).map(|(e, &g)| (e - f64::from(g)).abs()).fold(0.0, f64::max);
        assert!(largest < 3e-4, "{isa:?} {largest:.1e}");
    }
}

#[test]
fn response_norms() {
    for ending in [true, false] {
        let norm = |m: &mut Model, x: usize, channels: usize| {
            let [weight, bias] = [(); 2].map(|()| m.tensor(&[channels], 1.0));
            m.op(Op::ResponseNorm { dims: vec![2, 3], weight, bias, eps: 1e-2 }, &[x])
        };
        normed(norm, ending);
    }
}

#[test]
fn response_norms_of_permuted_images() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 40], [3, 3], |_| {});
    let x = m.op(Op::Permute { dims: vec![0, 2, 3, 1] }, &[x]);
    let [weight, bias] = [(); 2].map(|()| m.tensor(&[40], 1.0));
    let x = m.op(Op::ResponseNorm { dims: vec![1, 2], weight, bias, eps: 1e-6 }, &[x]);
    m.op(Op::Permute { dims: vec![0, 3, 1, 2] }, &[x]);
    m.check(&[3, 3, 6, 11], &[]);
}

#[test]
fn norms_of_other_dimensions_are_refused() {
    let cases: [(Op, &str); 2] = [
        (Op::ResponseNorm { dims: vec![1, 2], weight: 0, bias: 0, eps: 1e-6 }, "height and width"),
        (Op::GroupNorm { groups: 2, weight: None, bias: None, eps: 1e-6 }, "several groups"),
    ];
    for (op, reason) in cases {
        let mut m = Model::new();
        m.tensor(&[6], 1.0);
        m.op(op, &[0]);
        let found = obstacle(&m.graph, &m.tensors, &[2, 4, 5, 6]).unwrap_or_default();
        assert!(found.contains(reason), "{found}");
    }
}

#[test]
fn pixels_so_many_times() {
    for scale in [[2, 2], [1, 4], [8, 1]] {
        let mut m = Model::new();
        let a = m.conv(0, [3, 20], [3, 3], |op| set(op, [2, 2], [1, 1], [1, 1], 1));
        let a = m.op(Op::Upsample { scale }, &[a]);
        m.conv(a, [20, 24], [3, 3], |_| {});
        m.check(&[3, 3, 7, 10], &[]);
    }
}

/// `relu(x) * factor + summand`, each one number or one per channel.
fn behind_a_relu(factor: &[f32], summand: &[f32], function: Activation, kernel: usize) {
    let mut m = Model::new();
    let c = m.conv(0, [3, 40], [kernel, kernel], |_| {});
    let n = m.norm(c, 40);
    let r = m.act(n, function);
    let [f, s] = [factor, summand].map(|numbers| {
        let shape = if numbers.len() == 1 { vec![1] } else { vec![40, 1, 1] };
        let tensor = m.tensor(&shape, 1.0);
        m.tensors[tensor] = (0..shape[0]).map(|i| numbers[i % numbers.len()]).collect();
        tensor
    });
    let x = m.op(Op::Scale { factor: f, first: true }, &[r]);
    let x = m.op(Op::Shift { summand: s }, &[x]);
    let x = m.op(Op::Pad { before: [0, 0], after: [1, 1] }, &[x]);
    let x = m.max_pool(x, 2, 1, 0, true);
    m.conv(x, [40, 24], [2, 2], |_| {});
    m.check(&[3, 3, 12, 11], &[]);
}

#[test]
fn numbers_behind_a_relu() {
    for kernel in [1, 3] {
        for function in [Activation::Relu, Activation::Relu6, Activation::Silu] {
            behind_a_relu(&[0.7], &[-0.3], function, kernel);
        }
        behind_a_relu(&[0.7], &[0.4], Activation::Relu, kernel);
        behind_a_relu(&[-0.7], &[0.4], Activation::Relu, kernel);
        behind_a_relu(&[0.0], &[0.4], Activation::Relu, kernel);
        behind_a_relu(&[0.7, 0.8], &[0.4], Activation::Relu, kernel);
        behind_a_relu(&[0.7], &[0.4, -0.5], Activation::Relu, kernel);
    }
}

#[test]
fn numbers_behind_a_relu_are_part_of_the_convolution() {
    let mut m = Model::new();
    let c = m.conv(0, [3, 40], [3, 3], |_| {});
    let r = m.act(c, Activation::Relu);
    let [factor, summand] = [0.5, 0.25].map(|number| {
        let tensor = m.tensor(&[1], 1.0);
        m.tensors[tensor] = vec![number];
        tensor
    });
    let x = m.op(Op::Scale { factor, first: false }, &[r]);
    m.op(Op::Shift { summand }, &[x]);
    let options = Options { workers: 1, exact: false, isa: Isa::best() };
    let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options, None).unwrap();
    network.run(&[1, 3, 8, 8], &[0.5; 3 * 64], &mut [0.0; 40 * 64]).unwrap();
    let names: Vec<String> = network.timings().unwrap().into_iter().map(|timing| timing.name).collect();
    assert_eq!(names, ["input", "Conv2d1", "result"]);
}

#[test]
fn summands_of_other_dimensions_are_refused() {
    for shape in [vec![5, 1], vec![6], vec![1, 5, 1], vec![2, 1, 1, 1]] {
        let mut m = Model::new();
        let summand = m.tensor(&shape, 1.0);
        m.op(Op::Shift { summand }, &[0]);
        assert!(obstacle(&m.graph, &m.tensors, &[2, 4, 5, 6]).is_some(), "{shape:?}");
    }
}

#[test]
fn summands_per_channel_of_one_line() {
    for size in [[1, 9], [1, 1]] {
        let mut m = Model::new();
        let x = m.conv(0, [3, 20], [1, 1], |_| {});
        let x = m.act(x, Activation::Sigmoid);
        let summand = m.tensor(&[20, 1, 1], 1.0);
        m.op(Op::Shift { summand }, &[x]);
        m.check(&[3, 3, size[0], size[1]], &[]);
    }
}
