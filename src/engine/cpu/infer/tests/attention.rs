//! Attention whose queries and keys are turned, or whose queries are few, and gated linear units.

use super::*;
use crate::model::Rotation;

/// Patches of 2 x 2 as tokens.
fn patches(m: &mut Model, channels: usize) -> usize {
    let x = m.conv(0, [3, channels], [2, 2], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
    let x = m.op(Op::Flatten { start: 2, end: -1 }, &[x]);
    permute(m, x, [0, 2, 1])
}

fn attention(heads: usize, rotation: Option<Rotation>) -> Op {
    Op::Attention { heads, scale: 0.3, rotation }
}

#[test]
fn turned_queries_and_keys() {
    // Half a head is half a block, a block, and a block and a half; tokens in front that are not turned, or all of them.
    for (channels, heads, [height, width]) in [(48, 3, [10, 14]), (64, 2, [8, 6]), (96, 2, [6, 26]), (64, 1, [2, 2])] {
        let tokens = height * width / 4;
        for (half, first) in [(true, 0), (false, 0), (true, 1), (false, 5), (false, 1000)] {
            let mut m = Model::new();
            let x = patches(&mut m, channels);
            let first = first.min(tokens);
            let table = m.tensor(&[2, tokens - first, channels / heads], 1.0);
            let rotation = Some(Rotation { table, first, half });
            let y = if half {
                let x = linear(&mut m, x, [channels, 3 * channels]);
                m.op(attention(heads, rotation), &[x])
            } else {
                let parts = [1, 2].map(|parts| linear(&mut m, x, [channels, parts * channels]));
                m.op(attention(heads, rotation), &parts)
            };
            linear(&mut m, y, [channels, 20]);
            m.check(&[3, 3, height, width], &["direct"]);
        }
    }
}

#[test]
fn few_queries_of_every_image() {
    for (channels, heads, queries) in [(48, 3, 1), (64, 1, 3), (64, 2, 20)] {
        for parts in [1, 2] {
            let mut m = Model::new();
            let x = patches(&mut m, channels);
            let tensor = m.tensor(&[1, queries, channels], 1.0);
            let mut inputs = vec![m.op(Op::Expand { tensor }, &[0])];
            inputs.extend((0..parts).map(|_| linear(&mut m, x, [channels, 2 / parts * channels])));
            let x = m.op(attention(heads, None), &inputs);
            linear(&mut m, x, [channels, 20]);
            m.check(&[3, 3, 10, 14], &["direct"]);
        }
    }
}

#[test]
fn few_queries_of_an_image() {
    for parts in [1, 2] {
        let mut m = Model::new();
        let x = patches(&mut m, 64);
        let some = m.op(Op::Split { dim: 1, sizes: vec![2, 3, 30], part: 1 }, &[x]);
        let mut inputs = vec![linear(&mut m, some, [64, 64])];
        inputs.extend((0..parts).map(|_| linear(&mut m, x, [64, 2 / parts * 64])));
        m.op(attention(2, None), &inputs);
        m.check(&[3, 3, 10, 14], &["direct"]);
    }
}

#[test]
fn gated_linear_units() {
    // Parts of whole blocks are one step; others are copied.
    for (wide, swapped, last) in [(64, false, false), (64, true, true), (40, false, true)] {
        let mut m = Model::new();
        let x = patches(&mut m, 32);
        let x = linear(&mut m, x, [32, 2 * wide]);
        let parts = [0, 1].map(|part| m.op(Op::Split { dim: 2, sizes: vec![wide; 2], part }, &[x]));
        let function = Activation::Silu;
        let gate = m.op(Op::Activation { function, inplace: false }, &[parts[usize::from(last)]]);
        let operands = [gate, parts[usize::from(!last)]];
        let x = m.op(Op::Mul, &if swapped { [operands[1], operands[0]] } else { operands });
        let x = layer_norm(&mut m, x, wide, true);
        linear(&mut m, x, [wide, 20]);
        let canonical = canonical(&m.graph, model::shapes(&m.graph, &[1, 3, 10, 14]).unwrap()).unwrap();
        let tensors: Vec<_> = m.tensors.iter().map(|t| Some(t.as_slice())).collect();
        let (layers, _) = fuse::fuse(&canonical.graph, &canonical.shapes, &tensors, Exact::Nowhere).unwrap();
        assert_eq!(layers.iter().filter(|layer| layer.gate.is_some()).count(), usize::from(wide == 64));
        m.check(&[3, 3, 10, 14], &["direct"]);
    }
    // A part that others read, too; an image whose channels are parts, and the part times itself.
    for itself in [false, true] {
        let mut m = Model::new();
        let x = m.conv(0, [3, 64], [3, 3], |_| {});
        let parts = [0, 1].map(|part| m.op(Op::Split { dim: 1, sizes: vec![32; 2], part }, &[x]));
        let gate = m.op(Op::Activation { function: Activation::Sigmoid, inplace: false }, &[parts[0]]);
        let y = m.op(Op::Mul, &[gate, parts[usize::from(!itself)]]);
        let y = m.op(Op::Add { inplace: false }, &[y, parts[0]]);
        m.conv(y, [32, 20], [3, 3], |_| {});
        m.check(&[3, 3, 9, 12], &["direct"]);
    }
}

#[test]
fn tokens_of_images_with_channels_last() {
    for flatten in [false, true] {
        let mut m = Model::new();
        let x = m.conv(0, [3, 37], [2, 2], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
        let x = permute(&mut m, x, [0, 2, 3, 1]);
        let dims = vec![Dim::SizeOf { node: 0, dim: 0 }, Dim::Infer, Dim::Fixed(37)];
        let x = m.op(if flatten { Op::Flatten { start: 1, end: 2 } } else { Op::Reshape { dims } }, &[x]);
        let summand = m.tensor(&[1, 15, 37], 1.0);
        let x = m.op(Op::Shift { summand }, &[x]);
        let x = linear(&mut m, x, [37, 64]);
        m.op(Op::Mean { dims: vec![1], keepdim: false }, &[x]);
        m.check(&[3, 3, 6, 10], &["direct"]);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let obstacle_of = |make: &dyn Fn(&mut Model, usize)| {
        let mut m = Model::new();
        let x = patches(&mut m, 32);
        make(&mut m, x);
        obstacle(&m.graph, &m.tensors, &[2, 3, 6, 6]).unwrap()
    };
    let turned = |table: [usize; 3], first: usize| {
        move |m: &mut Model, x: usize| {
            let x = linear(m, x, [32, 96]);
            let table = m.tensor(&table, 1.0);
            m.op(attention(2, Some(Rotation { table, first, half: true })), &[x]);
        }
    };
    for (table, first) in [([2, 9, 16], 1), ([2, 8, 16], 0), ([1, 9, 16], 0), ([2, 9, 32], 0), ([2, 0, 16], 10)] {
        let reason = obstacle_of(&turned(table, first));
        assert!(reason.contains("cannot turn 9 queries and 9 keys by"), "{reason}");
    }
    let keys = |m: &mut Model, x: usize| {
        let inputs = [32, 32].map(|wide| linear(m, x, [32, wide]));
        m.op(attention(2, None), &inputs);
    };
    let reason = "Attention6 (Attention): expects keys and values of 32 channels, got [2, 9, 32]";
    assert_eq!(obstacle_of(&keys), reason);
    // The same keys for every sample.
    let constant = |m: &mut Model, x: usize| {
        let tensor = m.tensor(&[1, 9, 64], 1.0);
        let keys = m.op(Op::Expand { tensor }, &[0]);
        m.op(attention(2, None), &[x, keys]);
    };
    let reason = "Expand4 (Expand): is read by something else than a concatenation of tokens";
    assert_eq!(obstacle_of(&constant), reason);
}
