//! Every operation against its definition in float64, on every instruction set, by one thread and by three.

mod conv3x3;
mod depthwise;
mod gate;
mod pointwise;

use std::sync::Mutex;

use super::*;
use crate::error::Error;

/// Numbers between -1 and 1 without order.
pub(super) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

pub(super) fn workspaces() -> impl Iterator<Item = Workspace> {
    let all = Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]);
    all.map(|(isa, workers)| Workspace { isa, ..Workspace::new(Threads::new(workers, None).unwrap()) })
}

/// `tolerance`: of the largest expected value.
pub(super) fn assert_close(got: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    for (at, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let gap = (f64::from(got) - expected).abs();
        assert!(gap <= tolerance * largest, "{what}: {got} instead of {expected} at {at} of {}", got);
    }
}

/// A convolution by its definition: calls `product(output, input, filter)` for the places of every product; filters are
/// `[out][in / groups][k][k]`.
pub(super) fn products(
    input: Shape,
    output: Shape,
    [kernel, stride, padding, groups]: [usize; 4],
    mut product: impl FnMut(usize, usize, usize),
) {
    let (ins, outs) = (input.channels / groups, output.channels / groups);
    for n in 0..input.images {
        for (oy, ox) in (0..output.size[0]).flat_map(|y| (0..output.size[1]).map(move |x| (y, x))) {
            for (ky, kx) in (0..kernel).flat_map(|y| (0..kernel).map(move |x| (y, x))) {
                let (y, x) = ((oy * stride + ky).wrapping_sub(padding), (ox * stride + kx).wrapping_sub(padding));
                if y >= input.size[0] || x >= input.size[1] {
                    continue;
                }
                for (o, i) in (0..output.channels).flat_map(|o| (0..ins).map(move |i| (o, i))) {
                    let from = ((n * input.size[0] + y) * input.size[1] + x) * input.channels + o / outs * ins + i;
                    let to = ((n * output.size[0] + oy) * output.size[1] + ox) * output.channels + o;
                    product(to, from, (o * ins + i) * kernel * kernel + ky * kernel + kx);
                }
            }
        }
    }
}

#[test]
fn gradients_of_depthwise_filters() {
    // With zeros above and to the left, and below and to the right.
    for (kernel, stride, padding, channels, size) in [
        (3, 1, [1, 1], 16, [5, 7]),
        (3, 2, [1, 1], 24, [9, 8]),
        (3, 2, [0, 1], 20, [8, 6]),
        (5, 1, [2, 2], 40, [3, 4]),
        (5, 2, [0, 0], 17, [11, 9]),
        (5, 2, [1, 2], 33, [12, 7]),
        (7, 1, [3, 3], 32, [70, 90]),
        (7, 1, [6, 6], 20, [8, 8]),
        (7, 1, [0, 6], 16, [3, 5]),
    ] {
        let conv = depthwise_of(Shape { images: 2, size, channels }, kernel, stride, padding);
        let padding = conv.padding;
        assert!(conv.is_known());
        let output = conv.output();
        let (x, dy) = (numbers(conv.input.floats(), 1), numbers(output.floats(), 2));
        let mut dw = vec![0.0; channels * kernel * kernel];
        products(conv.input, output, [kernel, stride, padding, channels], |to, from, filter| {
            dw[filter] += f64::from(dy[to]) * f64::from(x[from]);
        });
        for mut workspace in workspaces() {
            let mut got = vec![f32::NAN; dw.len()];
            let values = Values { x: &x, norm: None, open: None };
            let to = Gradients { weight: Some(&mut got), ..Gradients::default() };
            conv.differentiate(values, &vec![0.0; dw.len()], Derivative { d: &dy, late: None }, to, &mut workspace)
                .unwrap();
            // Sums of up to 2^13 products of either sign.
            assert_close(&got, &dw, 1e-5, &format!("{conv:?} on {:?}", workspace.isa));
        }
    }
}

/// `padding`: in front of every row and column, and behind.
pub(super) fn depthwise_of(input: Shape, kernel: usize, stride: usize, padding: [usize; 2]) -> Depthwise {
    let outputs = input.size.map(|side| (side + padding[0] + padding[1] - kernel) / stride + 1);
    Depthwise { input, kernel, stride, padding: padding[0], outputs }
}

pub(super) fn activation(function: Activate, z: f64) -> (f64, f64) {
    let s = 1.0 / (1.0 + (-z).exp());
    match function {
        Activate::Relu => (z.max(0.0), f64::from(z > 0.0)),
        Activate::Relu6 => (z.clamp(0.0, 6.0), f64::from(z > 0.0 && z < 6.0)),
        Activate::Hardswish if z.abs() < 3.0 => (z * (z + 3.0) / 6.0, z / 3.0 + 0.5),
        Activate::Hardswish => (z.max(0.0), f64::from(z > 0.0)),
        Activate::Silu => (z * s, s * (1.0 + z * (1.0 - s))),
        _ => (z, 1.0),
    }
}

#[test]
fn batch_norms_and_their_gradients() {
    // Channels of half a block and of no whole one, several chunks, sums and activations.
    for (pixels, channels, function, residual, training) in [
        (50, 16, Activate::Nothing, false, true),
        (64, 24, Activate::Relu, true, true),
        (32, 20, Activate::Hardswish, false, true),
        (48, 7, Activate::Silu, false, true),
        (4000, 40, Activate::Relu6, true, true),
        (98, 32, Activate::Silu, true, false),
    ] {
        let norm = BatchNorm { pixels, channels, eps: 1e-3, activation: function };
        let floats = pixels * channels;
        // Far from zero, where sums of squares would lose all digits.
        let x: Vec<f32> = numbers(floats, 1).into_iter().map(|x| 2.0 * x + 30.0).collect();
        let (r, dy) = (numbers(floats, 2), numbers(floats, 3));
        let (w, b) = (numbers(channels, 4), numbers(channels, 5));
        let r = residual.then_some(r.as_slice());
        let channel = |c: usize| (c..floats).step_by(channels);
        let n = pixels as f64;
        let mean = |c: usize| channel(c).map(|at| f64::from(x[at])).sum::<f64>() / n;
        let exact_mean: Vec<f64> = (0..channels).map(mean).collect();
        let exact_var: Vec<f64> = (0..channels)
            .map(|c| channel(c).map(|at| (f64::from(x[at]) - exact_mean[c]).powi(2)).sum::<f64>() / n)
            .collect();
        for mut workspace in workspaces() {
            let what = format!("{norm:?} on {:?} by {}", workspace.isa, workspace.threads.workers());
            let (mut mean, mut var) = (vec![f32::NAN; channels], vec![f32::NAN; channels]);
            norm.statistics(&x, &mut mean, &mut var, &mut workspace).unwrap();
            assert_close(&mean, &exact_mean, 1e-6, &format!("mean of {what}"));
            assert_close(&var, &exact_var, 1e-5, &format!("variance of {what}"));
            let forward = || Forward { x: &x, residual: r, weight: Some(&w), bias: Some(&b), mean: &mean, var: &var };
            let mut got = vec![f32::NAN; floats];
            norm.run(&forward(), &mut got, &mut workspace).unwrap();
            let (mut y, mut dx, mut dr) = (vec![0.0; floats], vec![0.0; floats], vec![0.0; floats]);
            let (mut dw, mut db) = (vec![0.0; channels], vec![0.0; channels]);
            for c in 0..channels {
                let inverse = 1.0 / (f64::from(var[c]) + norm.eps).sqrt();
                let hat = |at: usize| (f64::from(x[at]) - f64::from(mean[c])) * inverse;
                for at in channel(c) {
                    let z = hat(at) * f64::from(w[c]) + f64::from(b[c]) + r.map_or(0.0, |r| f64::from(r[at]));
                    let (value, slope) = activation(function, z);
                    (y[at], dr[at]) = (value, f64::from(dy[at]) * slope);
                    dw[c] += dr[at] * hat(at);
                    db[c] += dr[at];
                }
                for at in channel(c) {
                    let along = if training { (db[c] + hat(at) * dw[c]) / n } else { 0.0 };
                    dx[at] = f64::from(w[c]) * inverse * (dr[at] - along);
                }
            }
            // x itself has an error of 2^-24 * 32 / 2 before it is compared with its mean.
            assert_close(&got, &y, 1e-5, &format!("y of {what}"));
            // As PyTorch's tensors lie, from a cache line on.
            let mut memory = [vec![f32::NAN; floats + LANES], vec![f32::NAN; floats + LANES]];
            let [got_dx, got_dr] = memory.each_mut().map(|memory| {
                let skip = memory.as_ptr().align_offset(4 * LANES);
                &mut memory[skip..skip + floats]
            });
            let (mut got_dw, mut got_db) = (vec![f32::NAN; channels], vec![f32::NAN; channels]);
            let backward = Backward {
                forward: forward(),
                derivative: &dy,
                training,
                x: Some(&mut *got_dx),
                residual: residual.then_some(&mut *got_dr),
                weight: &mut got_dw,
                bias: &mut got_db,
            };
            norm.differentiate(backward, &mut workspace).unwrap();
            assert_close(got_dx, &dx, 1e-5, &format!("dx of {what}"));
            if residual {
                assert_close(got_dr, &dr, 1e-5, &format!("dr of {what}"));
            }
            assert_close(&got_dw, &dw, 1e-5, &format!("dw of {what}"));
            assert_close(&got_db, &db, 1e-5, &format!("db of {what}"));
        }
    }
}

#[test]
fn nan_stays() {
    let norm = BatchNorm { pixels: 4, channels: 16, eps: 0.0, activation: Activate::Relu };
    for mut workspace in workspaces() {
        let mut x = numbers(64, 1);
        x[3] = f32::NAN;
        let (mean, var, mut y) = (vec![0.0; 16], vec![1.0; 16], vec![0.0; 64]);
        let forward = Forward { x: &x, residual: None, weight: None, bias: None, mean: &mean, var: &var };
        norm.run(&forward, &mut y, &mut workspace).unwrap();
        let nan: Vec<usize> = (0..64).filter(|&at| y[at].is_nan()).collect();
        assert_eq!(nan, [3], "{:?}", workspace.isa);
    }
}

#[test]
fn every_task_once_and_no_worker_twice_at_a_time() {
    for workers in [1, 2, 5] {
        let mut threads = Threads::new(workers, None).unwrap();
        for tasks in [0, 1, 2, 100] {
            let done = Mutex::new(vec![0; tasks]);
            let busy: Vec<Mutex<()>> = (0..workers).map(|_| Mutex::new(())).collect();
            threads
                .run(tasks, &|task, worker| {
                    let _alone = busy[worker].try_lock().expect("two threads with one number");
                    done.lock().unwrap()[task] += 1;
                })
                .unwrap();
            assert!(done.into_inner().unwrap().iter().all(|&times| times == 1), "{tasks} tasks, {workers} workers");
        }
        let failed = threads.run(10, &|task, _| assert!(task != 7, "boom"));
        assert!(matches!(failed, Err(Error::Panic(text)) if text.contains("boom")));
        threads.run(3, &|_, _| ()).unwrap();
    }
}
