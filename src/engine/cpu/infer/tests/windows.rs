//! Attention within windows, and the layers around it.

use super::*;
use crate::model::{Bias, Scores, Windows};

/// How a block of Swin or MaxViT is put together.
#[derive(Clone, Copy)]
struct Block {
    heads: usize,
    window: Pair,
    shift: Pair,
    grid: bool,
    /// Cosine attention, and a bias that is computed.
    second: bool,
    biased: bool,
}

const PLAIN: Block = Block { heads: 2, window: [4, 4], shift: [0, 0], grid: false, second: false, biased: true };

impl Block {
    fn attention(self, m: &mut Model, x: usize, channels: usize) -> usize {
        let Self { heads, window, shift, grid, second, biased } = self;
        let weight = m.tensor(&[3 * channels, channels], (9.0 / channels as f32).sqrt());
        let bias = biased.then(|| m.tensor(&[3 * channels], 1.0));
        let x = m.op(Op::Linear { weight, bias }, &[x]);
        let sides = [2 * window[0] - 1, 2 * window[1] - 1];
        let (scores, distance) = if second {
            if let Some(bias) = bias {
                m.tensors[bias][channels..2 * channels].fill(0.0);
            }
            let logit = m.tensor(&[heads, 1, 1], 1.0);
            // Beyond ln(100) it is cut off.
            m.tensors[logit][0] = 7.0;
            let distance = Bias::Computed {
                distances: m.tensor(&[1, sides[0], sides[1], 2], 1.5),
                hidden: m.tensor(&[20, 2], 1.0),
                hidden_bias: m.tensor(&[20], 1.0),
                output: m.tensor(&[heads, 20], 0.3),
            };
            (Scores::Cosine { logit }, distance)
        } else {
            (Scores::Scaled(0.4), Bias::Table(m.tensor(&[sides[0] * sides[1], heads], 2.0)))
        };
        m.op(Op::WindowAttention(Windows { heads, window, shift, grid, scores, bias: distance, fill: bias }), &[x])
    }

    fn apply(self, m: &mut Model, x: usize, channels: usize) -> usize {
        let y = layer_norm(m, x, channels, true);
        let y = self.attention(m, y, channels);
        let y = linear(m, y, [channels, channels]);
        m.op(Op::Add { inplace: false }, &[x, y])
    }
}

fn images(m: &mut Model, channels: usize) -> usize {
    let x = m.conv(0, [3, channels], [2, 2], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
    permute(m, x, [0, 2, 3, 1])
}

#[test]
fn windows_of_every_kind() {
    let cases = [
        // As many pixels as windows have; padding below and to the right; shifts; a window that covers a side, or all.
        ([8, 12], Block { shift: [2, 2], ..PLAIN }),
        ([7, 9], Block { shift: [2, 1], ..PLAIN }),
        ([7, 9], Block { shift: [1, 3], biased: false, ..PLAIN }),
        ([3, 10], Block { shift: [2, 2], window: [4, 5], ..PLAIN }),
        ([3, 4], Block { shift: [2, 2], ..PLAIN }),
        ([14, 14], Block { shift: [3, 3], window: [7, 7], ..PLAIN }),
        ([10, 9], Block { shift: [0, 2], window: [8, 3], heads: 3, ..PLAIN }),
        ([5, 17], Block { window: [1, 17], ..PLAIN }),
        ([12, 8], Block { grid: true, ..PLAIN }),
        ([12, 12], Block { grid: true, window: [3, 6], ..PLAIN }),
        ([7, 9], Block { shift: [2, 1], second: true, ..PLAIN }),
        ([8, 8], Block { second: true, biased: false, heads: 1, ..PLAIN }),
    ];
    for (size, block) in cases {
        let mut m = Model::new();
        let channels = 32 * block.heads;
        let x = images(&mut m, channels);
        let x = block.apply(&mut m, x, channels);
        permute(&mut m, x, [0, 3, 1, 2]);
        m.check(&[3, 3, 2 * size[0], 2 * size[1]], &["direct"]);
    }
}

#[test]
fn heads_of_one_block_of_channels_and_of_three() {
    for (channels, heads) in [(48, 3), (96, 2)] {
        let mut m = Model::new();
        let x = images(&mut m, channels);
        let x = Block { heads, shift: [1, 2], ..PLAIN }.apply(&mut m, x, channels);
        permute(&mut m, x, [0, 3, 1, 2]);
        m.check(&[2, 3, 18, 14], &["direct"]);
    }
}

#[test]
fn a_hierarchy_of_windows() {
    // Odd sides when pixels are joined, and the norm in front of the linear layer or behind it.
    for (second, images_in_a_batch) in [(false, 1), (true, 8)] {
        let mut m = Model::new();
        let mut channels = 32;
        let mut x = images(&mut m, channels);
        for stage in 0..3 {
            for shift in [0, 2] {
                x = Block { shift: [shift; 2], second, heads: channels / 16, ..PLAIN }.apply(&mut m, x, channels);
            }
            if stage == 2 {
                break;
            }
            x = m.op(Op::PatchMerging, &[x]);
            if second {
                x = linear(&mut m, x, [4 * channels, 2 * channels]);
                x = layer_norm(&mut m, x, 2 * channels, true);
            } else {
                x = layer_norm(&mut m, x, 4 * channels, true);
                x = linear(&mut m, x, [4 * channels, 2 * channels]);
            }
            channels *= 2;
        }
        let x = layer_norm(&mut m, x, channels, true);
        if second {
            let x = permute(&mut m, x, [0, 3, 1, 2]);
            m.op(Op::AdaptiveAvgPool2d { output: [Some(1), Some(1)] }, &[x]);
        }
        m.check(&[images_in_a_batch, 3, 26, 38], &["direct"]);
    }
}

#[test]
fn a_nan_stays_in_its_window_and_its_image() {
    let mut m = Model::new();
    let x = images(&mut m, 32);
    PLAIN.apply(&mut m, x, 32);
    let shape = [2, 3, 16, 16];
    let mut input = m.numbers.many(shape.iter().product(), 1.0);
    for isa in Isa::available() {
        let mut run = m.runner(isa, &shape);
        let before = run(&input);
        let old = std::mem::replace(&mut input[0], f32::NAN);
        let with = run(&input);
        for (at, (with, before)) in with.iter().zip(&before).enumerate() {
            let pixel = at / 32;
            let inside = pixel / 8 < 4 && pixel % 8 < 4;
            assert!(if inside { with.is_nan() } else { with == before }, "{isa:?}: pixel {pixel}");
        }
        input[0] = old;
        assert_eq!(run(&input), before);
    }
}

#[test]
fn what_is_not_computed_of_windows_is_named() {
    let obstacle_of = |channels: usize, make: &dyn Fn(&mut Model, usize)| {
        let mut m = Model::new();
        let x = images(&mut m, channels);
        make(&mut m, x);
        obstacle(&m.graph, &m.tensors, &[2, 3, 12, 12]).unwrap()
    };
    let heads = |m: &mut Model, x: usize| {
        PLAIN.attention(m, x, 48);
    };
    assert!(obstacle_of(48, &heads).ends_with("has heads of 24 channels, no multiple of 16"));
    let merging = |m: &mut Model, x: usize| {
        m.op(Op::PatchMerging, &[x]);
    };
    assert!(obstacle_of(40, &merging).ends_with("has 40 channels, no multiple of 16"));
    let plain = |m: &mut Model, x: usize| {
        let x = permute(m, x, [0, 3, 1, 2]);
        m.op(Op::PatchMerging, &[x]);
    };
    assert!(obstacle_of(32, &plain).ends_with("is applied to something else than images (N, H, W, C)"));
    for shift in [[4, 0], [0, 5]] {
        let shifted = |m: &mut Model, x: usize| {
            Block { shift, ..PLAIN }.attention(m, x, 32);
        };
        assert!(obstacle_of(32, &shifted).contains("shifts windows of [4, 4] by"));
    }
    let grid = |m: &mut Model, x: usize| {
        Block { grid: true, ..PLAIN }.attention(m, x, 32);
    };
    assert!(obstacle_of(32, &grid).contains("divides an image of [6, 6] (H, W) into a grid of [4, 4]"));
    let keys = |m: &mut Model, x: usize| {
        Block { second: true, ..PLAIN }.attention(m, x, 32);
        let Op::WindowAttention(Windows { fill: Some(fill), .. }) = m.graph.nodes[m.graph.output].op else { panic!() };
        m.tensors[fill][40] = 0.5;
    };
    assert!(obstacle_of(32, &keys).ends_with("has a summand for its keys, which cosine attention leaves out"));
}
