//! Channels that only change places.

use super::networks::{Model, set};
use super::*;

fn shuffle(m: &mut Model, from: usize, groups: usize) -> usize {
    m.op(Op::ChannelShuffle { groups }, &[from])
}

fn split(m: &mut Model, from: usize, sizes: &[usize]) -> Vec<usize> {
    let part = |part| Op::Split { dim: 1, sizes: sizes.to_vec(), part };
    (0..sizes.len()).map(|number| m.op(part(number), &[from])).collect()
}

/// The second branch of ShuffleNet's units.
fn branch(m: &mut Model, from: usize, [inp, out]: Pair, stride: usize) -> usize {
    let x = m.conv(from, [inp, out], [1, 1], |_| {});
    let x = m.norm(x, out);
    let x = m.act(x, Activation::Relu);
    let x = m.conv(x, [out, out], [3, 3], |op| set(op, [stride; 2], [1, 1], [1, 1], out));
    let x = m.norm(x, out);
    let x = m.conv(x, [out, out], [1, 1], |_| {});
    let x = m.norm(x, out);
    m.act(x, Activation::Relu)
}

fn unit(m: &mut Model, from: usize, half: usize) -> usize {
    let parts = split(m, from, &[half; 2]);
    let y = branch(m, parts[1], [half; 2], 1);
    let x = m.op(Op::Cat { dim: 1 }, &[parts[0], y]);
    shuffle(m, x, 2)
}

fn down(m: &mut Model, from: usize, [inp, half]: Pair) -> usize {
    let x = m.conv(from, [inp, inp], [3, 3], |op| set(op, [2, 2], [1, 1], [1, 1], inp));
    let x = m.norm(x, inp);
    let x = m.conv(x, [inp, half], [1, 1], |_| {});
    let x = m.act(x, Activation::Relu);
    let y = branch(m, from, [inp, half], 2);
    let x = m.op(Op::Cat { dim: 1 }, &[x, y]);
    shuffle(m, x, 2)
}

/// The kinds of the steps, but the first and the last, which bring the images and take the result away.
fn kinds(m: &Model, shape: &[usize]) -> Vec<&'static str> {
    let options = Options { workers: 1, exact: false, isa: Isa::best() };
    let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options, None).unwrap();
    let mut output = vec![0.0; network.output(shape).unwrap().iter().product()];
    network.run(shape, &vec![0.5; shape.iter().product()], &mut output).unwrap();
    let timings = network.timings().unwrap();
    timings[1..timings.len() - 1].iter().map(|t| t.kind).collect()
}

#[test]
fn shuffled_units_copy_between_stages_only() {
    // Halves of 20 and 37 channels: no part begins with a block.
    let mut m = Model::new();
    let x = m.conv(0, [3, 24], [3, 3], |op| set(op, [2, 2], [1, 1], [1, 1], 1));
    let mut x = down(&mut m, x, [24, 20]);
    for _ in 0..3 {
        x = unit(&mut m, x, 20);
    }
    let mut x = down(&mut m, x, [40, 37]);
    for _ in 0..2 {
        x = unit(&mut m, x, 37);
    }
    let x = m.conv(x, [74, 50], [1, 1], |_| {});
    m.op(Op::Mean { dims: vec![2, 3], keepdim: false }, &[x]);
    let steps = kinds(&m, &[2, 3, 45, 38]);
    let copies = |kind: &&&str| matches!(**kind, "Cat" | "Split" | "ChannelShuffle");
    assert_eq!(steps.iter().filter(copies).count(), 1, "{steps:?}");
    m.check(&[3, 3, 45, 38], &["direct", "direct + depthwise", "depthwise"]);
}

#[test]
fn whoever_reads_moved_channels() {
    for case in 0..8 {
        let mut m = Model::new();
        let a = m.conv(0, [3, 20], [1, 1], |_| {});
        let a = m.act(a, Activation::Relu);
        let b = m.conv(0, [3, 20], [3, 3], |_| {});
        let x = m.op(Op::Cat { dim: 1 }, &[a, b]);
        let x = shuffle(&mut m, x, 4);
        let parts = split(&mut m, x, &[7, 30, 3]);
        let one = m.conv(parts[1], [30, 24], [1, 1], |_| {});
        match case {
            // A depthwise convolution, a wider window, an addition and its other side, a pool, nothing, several, a stride.
            0 => m.conv(parts[1], [30, 30], [3, 3], |op| set(op, [1, 1], [1, 1], [1, 1], 30)),
            1 => m.conv(x, [40, 33], [3, 3], |_| {}),
            2 => m.op(Op::Add { inplace: false }, &[x, x]),
            3 => {
                let y = m.conv(one, [24, 30], [1, 1], |_| {});
                m.op(Op::Add { inplace: false }, &[y, parts[1]])
            }
            4 => m.max_pool(parts[0], 3, 2, 1, false),
            5 => x,
            6 => {
                let y = m.op(Op::Cat { dim: 1 }, &[one, parts[0], parts[2], a]);
                shuffle(&mut m, y, 2)
            }
            _ => {
                let y = m.conv(parts[1], [30, 20], [1, 1], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
                let z = m.conv(x, [40, 20], [1, 1], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
                m.op(Op::Cat { dim: 1 }, &[y, z])
            }
        };
        m.check(&[3, 3, 13, 18], &["direct"]);
    }
}

#[test]
fn unlike_values_and_the_images_themselves() {
    let mut m = Model::new();
    let x = shuffle(&mut m, 0, 2);
    let y = m.conv(x, [40, 60], [1, 1], |_| {});
    // Three blocks and four; the images; a border around one of two that are alike.
    let z = m.op(Op::Cat { dim: 1 }, &[x, y]);
    let z = shuffle(&mut m, z, 5);
    let a = m.conv(z, [100, 20], [1, 1], |_| {});
    let b = m.conv(x, [40, 20], [1, 1], |_| {});
    let wide = m.conv(b, [20, 40], [5, 5], |_| {});
    let c = m.op(Op::Cat { dim: 1 }, &[a, b]);
    let c = shuffle(&mut m, c, 2);
    let c = m.conv(c, [40, 40], [1, 1], |_| {});
    m.op(Op::Mul, &[wide, c]);
    m.check(&[3, 40, 9, 11], &["direct"]);
}

#[test]
fn picked_values_of_several_segments() {
    // The first value is from a part of the network that takes image by image, the second from one that takes many.
    let mut m = Model::new();
    let large = m.conv(0, [3, 64], [3, 3], |_| {});
    let a = m.max_pool(large, 16, 16, 0, false);
    let b = m.max_pool(large, 8, 8, 0, false);
    let b = m.conv(b, [64, 64], [3, 3], |_| {});
    let b = m.max_pool(b, 2, 2, 0, false);
    let x = m.op(Op::Cat { dim: 1 }, &[a, b]);
    let x = shuffle(&mut m, x, 2);
    let x = m.conv(x, [128, 32], [1, 1], |_| {});
    m.op(Op::Mean { dims: vec![2, 3], keepdim: false }, &[x]);
    m.check(&[7, 3, 144, 144], &["winograd 6", "direct"]);
}

#[test]
fn numbers_that_only_move_stay_the_same() {
    let mut m = Model::new();
    let x = shuffle(&mut m, 0, 3);
    let parts = split(&mut m, x, &[5, 20, 8]);
    let x = m.op(Op::Cat { dim: 1 }, &[parts[2], parts[0], parts[1]]);
    shuffle(&mut m, x, 11);
    let shape = [2, 33, 5, 6];
    let input = m.numbers.many(shape.iter().product(), 1.0);
    let expected = reference::run(&m.graph, &m.tensors, &input, &shape);
    let options = Options { workers: 2, exact: false, isa: Isa::best() };
    let mut network = Frozen::new(m.graph.clone(), m.tensors.clone(), options, None).unwrap();
    let mut got = vec![0.0; input.len()];
    network.run(&shape, &input, &mut got).unwrap();
    assert!(expected.iter().zip(&got).all(|(e, &g)| *e == f64::from(g)));
}

#[test]
fn divisions_that_are_not_of_channels_are_named() {
    let mut m = Model::new();
    m.op(Op::Split { dim: 2, sizes: vec![4, 4], part: 1 }, &[0]);
    let reason = obstacle(&m.graph, &m.tensors, &[2, 8, 8, 8]).unwrap();
    assert_eq!(reason, "Split1 (Split): divides another dimension than the channels");
    let mut m = Model::new();
    m.op(Op::Split { dim: 1, sizes: vec![4, 3], part: 1 }, &[0]);
    let reason = obstacle(&m.graph, &m.tensors, &[2, 8, 8, 8]).unwrap();
    assert_eq!(reason, "Split1 (Split): cannot divide [2, 8, 8, 8] into [4, 3] along dimension 1");
    let mut m = Model::new();
    shuffle(&mut m, 0, 3);
    let reason = obstacle(&m.graph, &m.tensors, &[2, 8, 8, 8]).unwrap();
    assert_eq!(reason, "ChannelShuffle1 (ChannelShuffle): cannot divide 8 channels into 3 groups");
}
