//! Sequences of tokens and attention.

use super::*;

/// An image of 3 channels as tokens of patches of 2 x 2, behind `first` tokens of their own, with positions.
pub fn embedded(m: &mut Model, channels: usize, [height, width]: Pair, first: &[usize]) -> usize {
    let patches = height * width / 4;
    let x = m.conv(0, [3, channels], [2, 2], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
    let x = m.op(Op::Flatten { start: 2, end: -1 }, &[x]);
    let x = permute(m, x, [0, 2, 1]);
    let mut all = Vec::new();
    for &count in first {
        let tensor = m.tensor(&[1, count, channels], 1.0);
        all.push(m.op(Op::Expand { tensor }, &[0]));
    }
    let x = m.op(Op::Cat { dim: 1 }, &[all, vec![x]].concat());
    let summand = m.tensor(&[1, first.iter().sum::<usize>() + patches, channels], 1.0);
    let x = m.op(Op::Shift { summand }, &[x]);
    m.op(Op::Dropout { p: 0.1, training: false, channels: false, inplace: false }, &[x])
}

pub fn block(m: &mut Model, x: usize, channels: usize, heads: usize) -> usize {
    let scale = 1.0 / ((channels / heads) as f64).sqrt();
    let y = layer_norm(m, x, channels, true);
    let y = linear(m, y, [channels, 3 * channels]);
    let y = m.op(Op::Attention { heads, scale, rotation: None }, &[y]);
    let y = linear(m, y, [channels, channels]);
    let factor = m.tensor(&[channels], 1.0);
    let y = m.op(Op::Scale { factor, first: false }, &[y]);
    let x = m.op(Op::Add { inplace: false }, &[x, y]);
    let y = layer_norm(m, x, channels, false);
    let y = linear(m, y, [channels, 2 * channels]);
    let y = m.act(y, Activation::Gelu { tanh: false });
    let y = linear(m, y, [2 * channels, channels]);
    m.op(Op::Add { inplace: false }, &[x, y])
}

/// `x[:, first..first + count]`
fn some(m: &mut Model, x: usize, all: usize, first: usize, count: usize) -> usize {
    m.op(Op::Split { dim: 1, sizes: vec![first, count, all - first - count], part: 1 }, &[x])
}

#[test]
fn vision_transformers() {
    // Heads of one to four blocks of channels, one of them and three: panels that are not full.
    for (channels, heads, size, first) in
        [(48, 3, [10, 14], &[1][..]), (64, 2, [8, 6], &[1, 4]), (48, 1, [6, 6], &[1]), (128, 2, [12, 12], &[2])]
    {
        for result in 0..3 {
            let mut m = Model::new();
            let tokens = size[0] * size[1] / 4 + first.iter().sum::<usize>();
            let x = embedded(&mut m, channels, size, first);
            let x = block(&mut m, x, channels, heads);
            let x = layer_norm(&mut m, x, channels, true);
            match result {
                0 => {
                    let x = some(&mut m, x, tokens, 0, 1);
                    let x = m.op(Op::Flatten { start: 1, end: -1 }, &[x]);
                    linear(&mut m, x, [channels, 5]);
                }
                1 => {
                    let x = some(&mut m, x, tokens, 1, tokens - 1);
                    m.op(Op::Mean { dims: vec![1], keepdim: false }, &[x]);
                }
                // All tokens, channels last.
                _ => {}
            }
            m.check(&[3, 3, size[0], size[1]], &["direct"]);
        }
    }
}

#[test]
fn sequences_of_every_length() {
    // One microkernel, a bit more, and sums longer than what is added up at a time.
    for side in [[2, 2], [2, 26], [2, 30], [2, 32], [26, 42]] {
        let mut m = Model::new();
        let x = m.conv(0, [3, 37], [2, 2], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
        let x = m.op(Op::Flatten { start: 2, end: -1 }, &[x]);
        let x = permute(&mut m, x, [0, 2, 1]);
        let parts = [(); 3].map(|()| linear(&mut m, x, [37, 64]));
        let y = m.op(Op::Attention { heads: 2, scale: 0.3, rotation: None }, &parts);
        // Attention takes in nothing that follows.
        let y = m.act(y, Activation::Relu);
        linear(&mut m, y, [64, 20]);
        m.check(&[2, 3, side[0], side[1]], &["direct"]);
    }
}

#[test]
fn scores_far_from_zero() {
    // All about -24: the zeros beyond the last key would win. Or all about 24.
    for shift in [-3.0, 3.0] {
        let mut m = Model::new();
        let x = embedded(&mut m, 32, [6, 6], &[1]);
        let x = linear(&mut m, x, [32, 96]);
        // Queries of one sign, keys of another.
        let bias = m.graph.tensors.len() - 1;
        m.tensors[bias][..32].fill(2.0);
        m.tensors[bias][32..64].fill(shift);
        m.op(Op::Attention { heads: 2, scale: 0.25, rotation: None }, &[x]);
        m.check(&[2, 3, 6, 6], &["direct"]);
    }
}

#[test]
fn tokens_without_a_token_of_their_own() {
    let mut m = Model::new();
    let x = m.conv(0, [3, 20], [2, 2], |op| set(op, [2, 2], [0, 0], [1, 1], 1));
    let dims = vec![Dim::SizeOf { node: 0, dim: 0 }, Dim::Fixed(20), Dim::Infer];
    let x = m.op(Op::Reshape { dims }, &[x]);
    let x = permute(&mut m, x, [0, 2, 1]);
    // Positions of all channels alike, and one for all tokens.
    for shape in [&[1, 15, 20][..], &[20]] {
        let summand = m.tensor(shape, 1.0);
        let x = m.graph.output.max(x);
        m.op(Op::Shift { summand }, &[x]);
    }
    let x = m.graph.output;
    // The same tokens twice, and joined again.
    let halves = [some(&mut m, x, 15, 3, 5), some(&mut m, x, 15, 0, 9)];
    let x = m.op(Op::Cat { dim: 1 }, &[halves[0], halves[1], x]);
    permute(&mut m, x, [0, 2, 1]);
    m.check(&[3, 3, 6, 10], &["direct"]);
}

#[test]
fn a_nan_stays_in_its_image() {
    let mut m = Model::new();
    let x = embedded(&mut m, 32, [6, 6], &[1]);
    block(&mut m, x, 32, 2);
    let shape = [2, 3, 6, 6];
    let mut input = m.numbers.many(shape.iter().product(), 1.0);
    for isa in Isa::available() {
        let mut run = m.runner(isa, &shape);
        let before = run(&input);
        let old = std::mem::replace(&mut input[7], f32::NAN);
        let with = run(&input);
        let half = with.len() / 2;
        assert!(with[..half].iter().all(|y| y.is_nan()), "{isa:?}: every token sees the one with a NaN");
        assert_eq!(with[half..], before[half..]);
        input[7] = old;
        assert_eq!(run(&input), before);
    }
}

#[test]
fn what_is_not_computed_of_tokens_is_named() {
    let obstacle_of = |make: &dyn Fn(&mut Model, usize)| {
        let mut m = Model::new();
        let x = embedded(&mut m, 40, [6, 6], &[1]);
        make(&mut m, x);
        obstacle(&m.graph, &m.tensors, &[2, 3, 6, 6]).unwrap()
    };
    let heads = |m: &mut Model, x: usize| {
        let x = linear(m, x, [40, 120]);
        m.op(Op::Attention { heads: 2, scale: 1.0, rotation: None }, &[x]);
    };
    assert_eq!(obstacle_of(&heads), "Attention9 (Attention): has heads of 20 channels, no multiple of 16");
    let channels = |m: &mut Model, x: usize| {
        let x = permute(m, x, [0, 2, 1]);
        m.op(Op::Mean { dims: vec![1], keepdim: true }, &[x]);
    };
    assert_eq!(obstacle_of(&channels), "Mean9 (Mean): is not over height and width, nor over tokens");
    let expanded = |m: &mut Model, x: usize| {
        let tensor = m.tensor(&[1, 10, 40], 1.0);
        let y = m.op(Op::Expand { tensor }, &[0]);
        m.op(Op::Add { inplace: false }, &[x, y]);
    };
    let reason = "Expand8 (Expand): is read by something else than a concatenation of tokens";
    assert_eq!(obstacle_of(&expanded), reason);
    let shifted = |m: &mut Model, x: usize| {
        let summand = m.tensor(&[2, 1, 40], 1.0);
        m.op(Op::Shift { summand }, &[x]);
    };
    assert_eq!(obstacle_of(&shifted), "Shift8 (Shift): adds something else to every image");
}
